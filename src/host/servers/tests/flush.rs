//! No machine runs on a volume that a loss of power could take, however long flushing it takes.
use std::sync::{Arc, Condvar, Mutex};

use model::server::ServerState;
use model::{Labels, ServerId};
use wire::control::MachineState;

use super::snapshot::{named, taken};
use crate::fake_vmm::FakeVmm;
use crate::stage::{SOON, Stage, created, keyed, server, until};
use crate::{Checkpoint, Fate, Host};

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
}

impl Hold {
    fn hold(&self) {
        *self.state.lock().unwrap() = Held { is_held: true, ..Held::default() };
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
        if state.dies { Fate::Die } else { Fate::Live }
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
    for clones in [false, true] {
        let hold = Arc::new(Hold::default());
        let host = stage.open_watched(hold.clone()).await.unwrap();
        until(&host, first.id, |found| found.state == ServerState::Running).await;
        hold.hold();
        let id = if clones {
            let spec = model::snapshot::CreateClones {
                name: "twin".parse().unwrap(),
                count: 1,
                labels: Labels::default(),
            };
            let made = host.servers().clone_snapshot(&keyed("clone"), snapshot.id, spec).await.unwrap();
            made.body.items[0].server_id
        } else {
            let made = host.servers().create(&keyed("create"), server("web2")).await.unwrap();
            made.body.resource.unwrap().id
        };
        let vmm = stands_still(&stage, &host, &hold, id).await;
        // A daemon that has died there, and another that finds what it left.
        hold.release(true);
        host.close().await;
        drop(host);
        assert_eq!(vmm.state(), MachineState::Paused);
        let hold = Arc::new(Hold::default());
        hold.hold();
        let host = stage.open_watched(hold.clone()).await.unwrap();
        let found = stands_still(&stage, &host, &hold, id).await;
        assert_eq!(found.pid, vmm.pid);
        hold.release(false);
        until(&host, id, |found| found.state == ServerState::Running).await;
        assert_eq!(vmm.state(), MachineState::Running);
        host.close().await;
    }
}
