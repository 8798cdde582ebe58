//! No machine runs on a volume that a loss of power could take, however long flushing it takes.
use std::sync::{Arc, Condvar, Mutex};

use model::server::ServerState;
use model::snapshot::CreateClones;
use model::{Labels, ServerId, SnapshotId};
use wire::control::MachineState;

use super::delete;
use super::snapshot::{named, taken};
use crate::fake_vmm::FakeVmm;
use crate::stage::{SOON, Stage, created, server, until};
use crate::{Call, Checkpoint, Fate, Host};

/// Keeps everybody who has flushed a volume from saying so.
#[derive(Default)]
struct Hold {
    state: Mutex<Held>,
    changed: Condvar,
}

#[derive(Default)]
struct Held {
    is_held: bool,
    waits: bool,
    dies: bool,
    /// Where the daemon dies in any case.
    dies_at: Option<&'static str>,
}

impl Hold {
    fn hold(&self) {
        *self.state.lock().unwrap() = Held { is_held: true, ..Held::default() };
    }

    fn let_die_at(&self, point: &'static str) {
        self.state.lock().unwrap().dies_at = Some(point);
    }

    fn waits(&self) -> bool {
        self.state.lock().unwrap().waits
    }

    /// Lets them go on, or has the daemon die there.
    fn release(&self, dies: bool) {
        *self.state.lock().unwrap() = Held { dies, ..Held::default() };
        self.changed.notify_all();
    }
}

impl Checkpoint for Hold {
    fn reached(&self, point: &'static str) -> Fate {
        let mut state = self.state.lock().unwrap();
        if point == "volume.flushed" && state.is_held {
            state.waits = true;
            // Not for ever: a test that has failed lets nobody go on.
            state = self.changed.wait_timeout_while(state, SOON, |state| state.is_held).unwrap().0;
        }
        if state.dies || state.dies_at == Some(point) { Fate::Die } else { Fate::Live }
    }
}

/// Waits until the machine is built and all else has been done, and then some; it stands still all that time.
async fn stands_still(stage: &Stage, host: &Host, hold: &Hold, id: ServerId) -> Arc<FakeVmm> {
    until(host, id, |found| found.state != ServerState::Creating).await;
    let end = tokio::time::Instant::now() + SOON;
    let built = || {
        let vmms = stage.launch.of_servers();
        vmms.into_iter().find(|vmm| vmm.state() == MachineState::Paused)
    };
    let vmm = loop {
        match built() {
            Some(vmm) if hold.waits() => break vmm,
            _ => assert!(
                tokio::time::Instant::now() < end,
                "no machine is built, or its volume is not flushed"
            ),
        }
        tokio::task::yield_now().await;
    };
    for _ in 0..200 {
        assert_ne!(host.servers().one(id).await.unwrap().state, ServerState::Running);
        assert_eq!(vmm.state(), MachineState::Paused, "it runs on a volume that is not flushed");
    }
    vmm
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_machine_runs_before_its_volume_outlives_a_loss_of_power() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let snapshot = taken(&host, first.id, named("then", true)).await;
    host.close().await;
    drop(host);
    for (clones, is_recorded) in [(false, true), (true, true), (false, false), (true, false)] {
        let hold = Arc::new(Hold::default());
        let host = stage.open_watched(hold.clone()).await.unwrap();
        until(&host, first.id, |found| found.state == ServerState::Running).await;
        hold.hold();
        if !is_recorded {
            hold.let_die_at("server.spawned");
        }
        let id = made(&host, snapshot.id, clones).await;
        // A daemon that has died when it had recorded the VMM, or before, and another that finds what it left.
        if is_recorded {
            stands_still(&stage, &host, &hold, id).await;
            hold.release(true);
        }
        let end = tokio::time::Instant::now() + SOON;
        while !host.is_dead() {
            assert!(tokio::time::Instant::now() < end, "it lives");
            tokio::task::yield_now().await;
        }
        hold.release(true);
        host.close().await;
        drop(host);
        let left = stage.launch.of_servers().into_iter().filter(|vmm| vmm.state() != MachineState::Running);
        let left: Vec<i32> = left.map(|vmm| vmm.pid).collect();
        assert_eq!(left.len(), 1);
        let hold = Arc::new(Hold::default());
        hold.hold();
        let host = stage.open_watched(hold.clone()).await.unwrap();
        let vmm = stands_still(&stage, &host, &hold, id).await;
        assert_eq!(vmm.pid == left[0], is_recorded);
        hold.release(false);
        until(&host, id, |found| found.state == ServerState::Running).await;
        assert_eq!(vmm.state(), MachineState::Running);
        delete(&host, id).await;
        host.close().await;
    }
}

async fn made(host: &Host, snapshot: SnapshotId, clones: bool) -> ServerId {
    if clones {
        let spec = CreateClones { name: "twin".parse().unwrap(), count: 1, labels: Labels::default() };
        let made = host.servers().clone_snapshot(&Call::by_host(), snapshot, spec).await.unwrap();
        return made.body.items[0].server_id;
    }
    let made = host.servers().create(&Call::by_host(), server("web2")).await.unwrap();
    made.body.resource.unwrap().id
}
