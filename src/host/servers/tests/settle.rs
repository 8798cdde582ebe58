//! Clones whose memory becomes their own, on fakes: when it is asked for, and before whatever needs it.
use std::sync::Arc;

use model::operation::OperationState;
use model::server::{RestartPolicy, Server, ServerAction, ServerState, StopServer};
use model::snapshot::{CreateClones, CreateSnapshot, Snapshot};
use model::{Code, Labels, ServerId};
use wire::control::MachineState;

use rusqlite::Connection;

use super::snapshot::{named, taken};
use super::upgrade::{survives_of, upgraded};
use super::{delete, delete_snapshot, stop};
use crate::fake_vmm::{FakeVmm, Guest, Settles};
use crate::servers::limits;
use crate::servers::record::{self, ServerRecord};
use crate::servers::settle::forget_origin;
use crate::stage::{SOON, Stage, created, ended, server, succeeded, until};
use crate::store::{Tx, records};
use crate::{Call, Host};

pub(super) const SETTLE: ServerAction = ServerAction::SettleMemory;

/// A clone that is alone on its host, in its VMM, and what it was made from, which is gone.
pub(super) async fn clone(stage: &Stage, host: &Host) -> (Server, Arc<FakeVmm>, Snapshot) {
    clone_of(stage, host, false).await
}

/// Of an incremental snapshot the disk is copied.
async fn clone_of(stage: &Stage, host: &Host, incremental: bool) -> (Server, Arc<FakeVmm>, Snapshot) {
    let mut spec = server("web1");
    spec.restart_policy = RestartPolicy::Always;
    let first = created(host, spec).await;
    let base = if incremental { Some(taken(host, first.id, named("base", false)).await) } else { None };
    let snapshot = taken(host, first.id, CreateSnapshot { incremental, ..named("then", true) }).await;
    let spec = CreateClones { name: "twin".parse().unwrap(), count: 1, labels: Labels::default() };
    let made = host.servers().clone_snapshot(&Call::by_host(), snapshot.id, spec).await.unwrap().body;
    succeeded(host, made.items[0].operation.as_ref().unwrap().id).await;
    delete(host, first.id).await;
    for id in base.map(|base| base.id).into_iter().chain([snapshot.id]) {
        delete_snapshot(host, id).await;
    }
    let clone = host.servers().one(made.items[0].server_id).await.unwrap();
    (clone, stage.launch.only(), snapshot)
}

pub(super) async fn act(host: &Host, id: ServerId, action: ServerAction) -> model::OperationId {
    host.servers().act(&Call::by_host(), id, action).await.unwrap().body.operation.id
}

pub(super) fn can_settle(server: &Server) -> bool {
    server.allowed_actions.iter().any(|action| action == "settle-memory")
}

#[tokio::test]
async fn a_clone_shares_memory_until_it_is_settled() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (clone, vmm, snapshot) = clone(&stage, &host).await;
    assert_eq!((clone.shares_memory_of, can_settle(&clone)), (Some(snapshot.id), true));
    assert_eq!(host.servers().metrics(clone.id).await.unwrap().memory_shared_bytes, clone.memory_bytes);
    let kind = succeeded(&host, act(&host, clone.id, ServerAction::Pause).await).await.kind;
    assert_eq!(kind, "server.pause");
    let operation = succeeded(&host, act(&host, clone.id, SETTLE).await).await;
    assert_eq!(operation.kind, "server.settle_memory");
    let settled = host.servers().one(clone.id).await.unwrap();
    assert_eq!((settled.state, settled.shares_memory_of), (ServerState::Paused, None));
    assert_eq!((vmm.state(), vmm.shared_quarters()), (MachineState::Paused, 0));
    assert!(!can_settle(&settled));
    let metrics = host.servers().metrics(clone.id).await.unwrap();
    assert_eq!((metrics.memory_shared_bytes, metrics.settling.unwrap().pauses), (0, 1));
    // It is so already.
    succeeded(&host, act(&host, clone.id, SETTLE).await).await;
    succeeded(&host, act(&host, clone.id, ServerAction::Resume).await).await;
    // Of a server that never shared any it always is.
    let other = created(&host, server("web2")).await;
    assert_eq!((other.shares_memory_of, can_settle(&other)), (None, false));
    succeeded(&host, act(&host, other.id, SETTLE).await).await;
    host.close().await;
}

#[tokio::test]
async fn a_clone_is_settled_before_it_is_saved_as_it_runs_or_goes_to_another_vmm() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (first, vmm, _) = clone(&stage, &host).await;
    // The fake refuses to save memory live that is not all its own.
    let snapshot = taken(&host, first.id, named("again", true)).await;
    assert_eq!(vmm.shared_quarters(), 0);
    assert_eq!(host.servers().one(first.id).await.unwrap().shares_memory_of, None);
    delete_snapshot(&host, snapshot.id).await;
    delete(&host, first.id).await;
    let (second, vmm, _) = clone(&stage, &host).await;
    let operation = upgraded(&host, second.id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{:?}", operation.error);
    let next = stage.launch.only();
    assert!(next.pid != vmm.pid && next.shared_quarters() == 0);
    assert_eq!(host.servers().one(second.id).await.unwrap().shares_memory_of, None);
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
}

#[tokio::test]
async fn one_that_cannot_be_settled_runs_on_as_it_was() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (clone, vmm, snapshot) = clone(&stage, &host).await;
    vmm.set_settles(Settles::Cannot);
    for action in [SETTLE, ServerAction::UpgradeVmm] {
        let operation = act(&host, clone.id, action).await;
        let problem = ended(&host, operation).await.error.unwrap();
        assert!(problem.detail.contains("could not be settled: disk0 did not drain"), "{problem:?}");
        // So it is left out when all servers of a host are upgraded, and the others are not.
        assert_eq!(problem.code, Code::WrongState);
    }
    // A snapshot has it stand still instead.
    taken(&host, clone.id, named("again", true)).await;
    let here = until(&host, clone.id, |server| server.state == ServerState::Running).await;
    assert_eq!((here.shares_memory_of, vmm.shared_quarters()), (Some(snapshot.id), 4));
    assert_eq!((stage.launch.only().pid, vmm.state()), (vmm.pid, MachineState::Running));
    host.close().await;
}

#[tokio::test]
async fn a_vmm_that_lives_is_asked_again_and_given_up_in_the_end() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (clone, vmm, snapshot) = clone(&stage, &host).await;
    vmm.set_settles(Settles::Mute);
    let operation = ended(&host, act(&host, clone.id, SETTLE).await).await;
    assert_eq!(operation.error.unwrap().code, Code::WrongState);
    // Nobody would look after it.
    assert!(!vmm.is_settling());
    assert_eq!(host.servers().one(clone.id).await.unwrap().shares_memory_of, Some(snapshot.id));
    vmm.set_settles(Settles::Shy(limits::SETTLE_ASKS));
    succeeded(&host, act(&host, clone.id, SETTLE).await).await;
    let settled = host.servers().one(clone.id).await.unwrap();
    assert_eq!((settled.shares_memory_of, vmm.shared_quarters()), (None, 0));
    assert_eq!((stage.launch.only().pid, vmm.state()), (vmm.pid, MachineState::Running));
    host.close().await;
}

/// Clones that ran as the daemon was updated, with whatever their records know of their memory.
#[tokio::test]
async fn a_vmm_of_an_earlier_build_is_not_asked_for_what_it_does_not_know() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    stage.launch.set_guest(Guest::SettlesNothing);
    for knows in [true, false] {
        let (clone, vmm, snapshot) = clone_of(&stage, &host, true).await;
        if !knows {
            forget_origin(host.servers().registry.workshop(), clone.id).await.unwrap();
        }
        let shares = host.servers().one(clone.id).await.unwrap().shares_memory_of;
        assert_eq!(shares, knows.then_some(snapshot.id));
        for (action, why) in [(SETTLE, "settles no memory"), (ServerAction::UpgradeVmm, "handed to another")]
        {
            let problem = ended(&host, act(&host, clone.id, action).await).await.error.unwrap();
            assert!(problem.code == Code::WrongState && problem.detail.contains(why), "{problem:?}");
        }
        // It stands still for a snapshot, and can say the rest.
        let again = taken(&host, clone.id, named("again", true)).await;
        assert_eq!(host.servers().metrics(clone.id).await.unwrap().memory_shared_bytes, 0);
        let here = until(&host, clone.id, |server| server.state == ServerState::Running).await;
        assert_eq!((here.shares_memory_of, vmm.shared_quarters()), (shares, 4));
        delete_snapshot(&host, again.id).await;
        delete(&host, clone.id).await;
    }
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
}

#[tokio::test]
async fn a_machine_that_was_reset_shares_nothing_whoever_heard_of_it() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (clone, vmm, _) = clone(&stage, &host).await;
    vmm.set_settles(Settles::Never);
    let settling = act(&host, clone.id, SETTLE).await;
    // A guest that hangs does not wait for it.
    succeeded(&host, act(&host, clone.id, ServerAction::Reboot(StopServer { grace_s: 0 })).await).await;
    assert_eq!(ended(&host, settling).await.state, OperationState::Cancelled);
    assert_eq!(host.servers().one(clone.id).await.unwrap().shares_memory_of, None);
    assert_eq!((stage.launch.only().pid, vmm.shared_quarters()), (vmm.pid, 0));
    delete(&host, clone.id).await;
    // Its guest resets it, and another one as there is no daemon.
    let (clone, vmm, snapshot) = self::clone(&stage, &host).await;
    let shares = host.servers().one(clone.id).await.unwrap().shares_memory_of;
    assert_eq!(shares, Some(snapshot.id));
    // As of one that came from another host: what it was shown there ends with the machine, too.
    let came = move |tx: &Tx<'_>| {
        let mut record: ServerRecord = records::one(tx, clone.id.0)?;
        (record.held.features, record.held.tsc_khz) = (Some(["lm".to_owned()].into()), Some(1));
        record::save(tx, &mut record)
    };
    host.store().write(came).await.unwrap();
    vmm.reset_itself();
    until(&host, clone.id, |server| server.shares_memory_of.is_none()).await;
    let look = move |all: &Connection| records::one::<ServerRecord>(all, clone.id.0);
    let held = host.store().read(look).await.unwrap().held;
    assert_eq!((held.features, held.tsc_khz), (None, None));
    delete(&host, clone.id).await;
    let (clone, vmm, _) = self::clone(&stage, &host).await;
    host.close().await;
    drop(host);
    vmm.reset_itself();
    let host = stage.open().await;
    until(&host, clone.id, |server| server.shares_memory_of.is_none()).await;
    host.close().await;
}

#[tokio::test]
async fn settling_can_be_cancelled_and_is_in_nobodys_way() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (clone, vmm, _) = clone(&stage, &host).await;
    vmm.set_settles(Settles::Never);
    let begun = async || {
        let end = tokio::time::Instant::now() + SOON;
        while !vmm.is_settling() {
            assert!(tokio::time::Instant::now() < end, "it does not begin");
            tokio::task::yield_now().await;
        }
    };
    let given_up = async || {
        let end = tokio::time::Instant::now() + SOON;
        while vmm.is_settling() {
            assert!(tokio::time::Instant::now() < end, "it goes on");
            tokio::task::yield_now().await;
        }
    };
    for action in [SETTLE, ServerAction::UpgradeVmm] {
        let operation = act(&host, clone.id, action).await;
        begun().await;
        let joined = act(&host, clone.id, action).await;
        assert_eq!(joined, operation);
        host.operations().cancel(&Call::by_host(), operation).await.unwrap();
        assert_eq!(ended(&host, operation).await.state, OperationState::Cancelled);
        given_up().await;
        assert_eq!((stage.launch.only().pid, vmm.state()), (vmm.pid, MachineState::Running));
    }
    // Whoever wants it in a new VMM has it settled for that, and a stop ends everything.
    let settling = act(&host, clone.id, SETTLE).await;
    begun().await;
    let upgrading = act(&host, clone.id, ServerAction::UpgradeVmm).await;
    assert_eq!(ended(&host, settling).await.state, OperationState::Cancelled);
    succeeded(&host, act(&host, clone.id, stop(0)).await).await;
    assert_eq!(ended(&host, upgrading).await.state, OperationState::Cancelled);
    assert_eq!(host.servers().one(clone.id).await.unwrap().shares_memory_of, None);
    host.close().await;
}

/// The daemon, or the VMM that has the machine, dies at every point between the ask for another VMM and its end.
#[tokio::test]
async fn wherever_the_daemon_or_its_vmm_dies_a_clone_has_one_machine() {
    for victims in [(false, false), (true, false)] {
        let (mut number, mut lived_count) = (1, 0);
        loop {
            let stage = Stage::new();
            let host = stage.open_with_image().await;
            let (clone, ..) = clone(&stage, &host).await;
            let (struck, lived) = survives_of(&stage, host, clone.id, number, victims, None).await;
            lived_count += u32::from(lived);
            if !struck {
                break;
            }
            number += 1;
        }
        println!("{victims:?}: {} points, the machine lived at {lived_count}", number - 1);
        assert!(number > 12, "only {number} points");
        assert!(lived_count > 3 && (lived_count == number || victims.0), "{victims:?}: {lived_count}");
    }
}

#[tokio::test]
async fn a_vmm_that_leaves_a_new_daemon_without_an_answer_is_not_asked_for_its_memory() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (clone, vmm, _) = clone(&stage, &host).await;
    host.close().await;
    drop(host);
    vmm.fall_silent();
    let host = stage.open().await;
    succeeded(&host, act(&host, clone.id, stop(0)).await).await;
    assert_eq!(vmm.unanswered(), 2, "the daemon's greeting, and that of the kill");
    host.close().await;
}
