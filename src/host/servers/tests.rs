//! Servers on fakes, through the facade.

use model::operation::OperationState;
use model::server::{
    DeleteServer, Isolation, PatchServer, RestartPolicy, ServerAction, ServerState, StopServer, Wanted,
};
use model::{Code, EventId};
use wire::control::MachineState;
use wire::isolation::Item;
use wire::will::Reason;

use crate::fake_vmm::Guest;
use crate::stage::{self, Stage, created, ended, keyed, server, succeeded, until};
use crate::{Call, Error};

mod bulk;
mod clone;
mod console;
mod flush;
mod hibernate;
mod hostile;
mod limits;
mod overlay;
mod restore;
mod settle;
mod shells;
mod snapshot;
mod sweep;
mod upgrade;

const START: ServerAction = ServerAction::Start;

fn stop(grace_s: u64) -> ServerAction {
    ServerAction::Stop(StopServer { grace_s })
}

#[tokio::test]
async fn a_created_server_runs_the_machine_it_asked_for() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let server = created(&host, server("web1")).await;
    assert_eq!(server.state, ServerState::Running);
    assert_eq!(
        server.allowed_actions,
        [
            "stop",
            "reboot",
            "pause",
            "hibernate",
            "snapshot",
            "clone",
            "restore",
            "migrate",
            "upgrade-vmm",
            "delete"
        ]
    );
    assert!(server.operation_id.is_none());
    assert_eq!(server.nics.len(), 1);
    let vmm = stage.launch.only();
    let spec = vmm.spec().unwrap();
    assert_eq!((spec.memory_bytes, spec.vcpus), (128 << 20, 1));
    assert_eq!(spec.boot.cmdline, "console=ttyS0");
    assert_eq!(spec.disks.len(), 2, "root volume and seed");
    assert_eq!(spec.nics.len(), 1);
    assert_eq!(stage.plumbing.scene().taps.len(), 1);
    host.close().await;
}

#[tokio::test]
async fn a_guest_that_obeys_the_button_is_stopped_by_it() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let vmm = stage.launch.only();
    let answer = host.servers().act(&Call::by_host(), id, stop(30)).await.unwrap();
    succeeded(&host, answer.body.operation.id).await;
    assert_eq!(vmm.presses(), 1);
    let server = host.servers().one(id).await.unwrap();
    assert_eq!((server.state, server.wanted), (ServerState::Stopped, Wanted::Stopped));
    assert!(stage.launch.alive().is_empty());
    assert!(stage.plumbing.scene().taps.is_empty());
    host.close().await;
}

#[tokio::test]
async fn a_guest_that_ignores_the_button_is_forced_off_after_its_grace() {
    let stage = Stage::new();
    stage.launch.set_guest(Guest::IgnoresButton);
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let answer = host.servers().act(&Call::by_host(), id, stop(1)).await.unwrap();
    let operation = succeeded(&host, answer.body.operation.id).await;
    let took_ms = operation.finished_at.unwrap().unix_ms() - operation.created_at.unix_ms();
    assert!((1000..15_000).contains(&took_ms), "{took_ms} ms");
    assert!(stage.launch.alive().is_empty());
    host.close().await;
}

#[tokio::test]
async fn stop_is_idempotent_while_stopping_and_when_stopped() {
    let stage = Stage::new();
    stage.launch.set_guest(Guest::IgnoresButton);
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let first = host.servers().act(&Call::by_host(), id, stop(600)).await.unwrap();
    let second = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
    assert_eq!(first.body.operation.id, second.body.operation.id);
    succeeded(&host, first.body.operation.id).await;
    let third = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
    assert_eq!(third.body.operation.state, OperationState::Succeeded);
    assert_ne!(third.body.operation.id, first.body.operation.id);
    host.close().await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_what_does() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("web1");
    spec.start = false;
    let id = created(&host, spec).await.id;
    let refused = host.servers().act(&Call::by_host(), id, ServerAction::Pause).await.unwrap_err();
    assert_eq!(refused.code, Code::WrongState);
    assert_eq!(refused.allowed_actions.unwrap(), ["start", "snapshot", "restore", "migrate", "delete"]);
    host.close().await;
}

#[tokio::test]
async fn pause_and_resume_park_and_free_the_machine() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let vmm = stage.launch.only();
    let paused = host.servers().act(&Call::by_host(), id, ServerAction::Pause).await.unwrap();
    succeeded(&host, paused.body.operation.id).await;
    assert_eq!(vmm.state(), MachineState::Paused);
    let server = host.servers().one(id).await.unwrap();
    assert_eq!((server.state, server.wanted), (ServerState::Paused, Wanted::Paused));
    let resumed = host.servers().act(&Call::by_host(), id, ServerAction::Resume).await.unwrap();
    succeeded(&host, resumed.body.operation.id).await;
    assert_eq!(vmm.state(), MachineState::Running);
    host.close().await;
}

#[tokio::test]
async fn a_pause_that_does_not_drain_fails_and_the_server_runs_on() {
    let stage = Stage::new();
    stage.launch.set_guest(Guest::CannotPause);
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let paused = host.servers().act(&Call::by_host(), id, ServerAction::Pause).await.unwrap();
    let operation = ended(&host, paused.body.operation.id).await;
    assert_eq!(operation.state, OperationState::Failed);
    assert!(operation.error.unwrap().detail.contains("did not drain"));
    assert_eq!(host.servers().one(id).await.unwrap().state, ServerState::Running);
    host.close().await;
}

#[tokio::test]
async fn reboot_with_grace_is_a_new_machine_and_without_is_a_reset() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let before = stage.launch.only();
    let reboot = |grace_s| ServerAction::Reboot(StopServer { grace_s });
    let reset = host.servers().act(&Call::by_host(), id, reboot(0)).await.unwrap();
    succeeded(&host, reset.body.operation.id).await;
    assert_eq!((before.resets(), stage.launch.only().pid), (1, before.pid));
    let rebooted = host.servers().act(&Call::by_host(), id, reboot(30)).await.unwrap();
    succeeded(&host, rebooted.body.operation.id).await;
    assert_ne!(stage.launch.only().pid, before.pid);
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
}

#[tokio::test]
async fn a_create_whose_machine_fails_leaves_nothing() {
    for guest in [Guest::CannotBoot, Guest::DiesAtBoot] {
        let stage = Stage::new();
        stage.launch.set_guest(guest);
        let host = stage.open_with_image().await;
        let accepted = host.servers().create(&Call::by_host(), server("web1")).await.unwrap().body;
        let operation = ended(&host, accepted.operation.id).await;
        assert_eq!(operation.state, OperationState::Failed);
        let problem = operation.error.unwrap();
        assert_eq!(problem.code, Code::MachineFailed, "{}", problem.detail);
        nothing_left(&stage, &host).await;
        host.close().await;
    }
}

#[tokio::test]
async fn without_kvm_a_server_can_be_made_but_not_started() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let trouble = Error::new(Code::KvmUnavailable, "load the kvm module");
    stage.launch.set_trouble(Some(trouble));
    let refused = host.servers().create(&Call::by_host(), server("web1")).await.unwrap_err();
    assert_eq!(refused.code, Code::KvmUnavailable);
    nothing_left(&stage, &host).await;
    let mut spec = server("web1");
    spec.start = false;
    let id = created(&host, spec).await.id;
    let refused = host.servers().act(&Call::by_host(), id, START).await.unwrap_err();
    assert_eq!(refused.code, Code::KvmUnavailable);
    assert_eq!(host.servers().one(id).await.unwrap().state, ServerState::Stopped);
    host.close().await;
}

#[tokio::test]
async fn a_guest_that_powers_itself_off_stops_its_server_and_says_so() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    stage.launch.only().end(Reason::PoweredOff);
    let server = until(&host, id, |server| server.state == ServerState::Stopped).await;
    assert_eq!(server.state_reason.unwrap().code, "guest_powered_off");
    assert_eq!(server.wanted, Wanted::Stopped);
    host.close().await;
}

#[tokio::test]
async fn each_bad_end_is_told_apart() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("web1");
    spec.restart_policy = RestartPolicy::Never;
    let id = created(&host, spec).await.id;
    let ends: [(Option<Reason>, &str); 5] = [
        (Some(Reason::TripleFault), "triple_fault"),
        (Some(Reason::GuestPanicked), "guest_panicked"),
        (Some(Reason::KvmError("KVM_RUN: EFAULT".to_owned())), "kvm_error"),
        (Some(Reason::Crashed("vcpu.rs:1".to_owned())), "vmm_crashed"),
        (None, "vmm_killed"),
    ];
    for (reason, code) in ends {
        match reason {
            Some(reason) => stage.launch.only().end(reason),
            None => stage.launch.only().kill(),
        }
        let server = until(&host, id, |server| server.state == ServerState::Failed).await;
        assert_eq!(server.state_reason.unwrap().code, code);
        let started = host.servers().act(&Call::by_host(), id, START).await.unwrap();
        succeeded(&host, started.body.operation.id).await;
    }
    host.close().await;
}

#[tokio::test]
async fn a_server_whose_memory_ran_out_says_so_and_only_once() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("web1");
    spec.restart_policy = RestartPolicy::Never;
    let id = created(&host, spec).await.id;
    stage.launch.run_out_of_memory(&stage.launch.only());
    let server = until(&host, id, |server| server.state == ServerState::Failed).await;
    assert_eq!(server.state_reason.unwrap().code, "out_of_memory");
    let started = host.servers().act(&Call::by_host(), id, START).await.unwrap();
    succeeded(&host, started.body.operation.id).await;
    stage.launch.only().kill();
    let server = until(&host, id, |server| server.state == ServerState::Failed).await;
    assert_eq!(
        server.state_reason.unwrap().code,
        "vmm_killed",
        "the count of an earlier machine is not this one's"
    );
    host.close().await;
}

#[tokio::test]
async fn a_strict_server_is_not_started_without_every_wall() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("strict");
    spec.isolation = Isolation::Strict;
    spec.start = false;
    let id = created(&host, spec).await.id;
    stage.launch.set_lacking(Item::Landlock, "the kernel has none");
    let started = host.servers().act(&Call::by_host(), id, START).await.unwrap();
    let problem = ended(&host, started.body.operation.id).await.error.unwrap();
    assert_eq!(problem.code, Code::HostUnprepared);
    let detail = problem.detail;
    assert!(
        detail.contains("landlock: the kernel has none") && detail.contains("standard isolation"),
        "{detail}"
    );
    until(&host, id, |server| server.state == ServerState::Stopped).await;
    assert!(stage.launch.alive().is_empty());

    let eased = PatchServer { isolation: Some(Isolation::Standard), ..PatchServer::default() };
    host.servers().patch(&Call::by_host(), id, eased).await.unwrap();
    let started = host.servers().act(&Call::by_host(), id, START).await.unwrap();
    succeeded(&host, started.body.operation.id).await;
    let found = host.servers().isolation(id).await.unwrap();
    assert!(!found.complete);
    let standing = found.items.iter().filter(|item| item.stands).count();
    assert_eq!((found.items.len(), standing), (Item::ALL.len(), Item::ALL.len() - 1));
    host.close().await;
}

#[tokio::test]
async fn a_failed_server_is_started_again_as_its_policy_says() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let first = stage.launch.only();
    first.end(Reason::TripleFault);
    first.wait_for_end().await;
    let waits = until(&host, id, |server| server.state == ServerState::Starting).await;
    let reason = waits.state_reason.expect("a reason");
    let restart = waits.restart.expect("it is to be started again");
    assert_eq!((reason.code.as_str(), restart.attempt), ("triple_fault", 1));
    assert!(restart.at.is_some_and(|at| at > reason.at), "{restart:?} after {reason:?}");
    let told = host.events().page(EventId(0), 1000).await.unwrap();
    let told = told.iter().filter_map(|event| event.data.reason.as_deref()).next_back();
    assert!(told.is_some_and(|reason| reason.contains("; restart 1 in a row is due at ")), "{told:?}");
    let runs = until(&host, id, |server| server.state == ServerState::Running).await;
    assert_eq!(runs.restart.map(|restart| (restart.attempt, restart.at)), Some((1, None)));
    assert_ne!(stage.launch.only().pid, first.pid);
    host.close().await;
}

#[tokio::test]
async fn a_restarted_daemon_adopts_what_runs_and_tells_what_ended() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (one, two, three) = (
        created(&host, server("one")).await.id,
        created(&host, server("two")).await.id,
        created(&host, server("three")).await.id,
    );
    let paused = host.servers().act(&Call::by_host(), three, ServerAction::Pause).await.unwrap();
    succeeded(&host, paused.body.operation.id).await;
    let before = stage.launch.alive().iter().map(|vmm| vmm.pid).collect::<Vec<_>>();
    host.close().await;
    drop(host);
    let gone = stage.launch.alive().into_iter().find(|vmm| vmm.label == "two").unwrap();
    gone.end(Reason::PoweredOff);
    gone.wait_for_end().await;

    let host = stage.open().await;
    let server = until(&host, two, |server| server.state == ServerState::Stopped).await;
    assert_eq!(server.state_reason.unwrap().code, "guest_powered_off");
    assert_eq!(host.servers().one(one).await.unwrap().state, ServerState::Running);
    assert_eq!(host.servers().one(three).await.unwrap().state, ServerState::Paused);
    assert!(stage.launch.alive().iter().all(|vmm| before.contains(&vmm.pid)));
    // The adopted machine obeys as before.
    let stopped = host.servers().act(&Call::by_host(), one, stop(30)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    host.close().await;
}

#[tokio::test]
async fn after_the_host_lost_power_what_was_wanted_runs_again() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("runs");
    spec.restart_policy = RestartPolicy::Never;
    let before = created(&host, spec).await;
    let runs = before.id;
    let mut spec = server("rests");
    spec.start = false;
    let rests = created(&host, spec).await.id;
    host.close().await;
    drop(host);
    stage.launch.power_cycle().await;
    let host = stage.open().await;
    let again = |server: &model::server::Server| {
        server.state == ServerState::Running && server.started_at != before.started_at
    };
    until(&host, runs, again).await;
    assert_eq!(host.servers().one(rests).await.unwrap().state, ServerState::Stopped);
    assert_eq!(stage.launch.only().label, "runs");
    host.close().await;
}

#[tokio::test]
async fn delete_leaves_nothing_but_the_volume_that_is_kept() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let how = DeleteServer { keep_volumes: true };
    let deleted = host.servers().delete(&Call::by_host(), id, how).await.unwrap();
    succeeded(&host, deleted.body.operation.id).await;
    assert_eq!(host.servers().one(id).await.unwrap_err().code, Code::NotFound);
    let volumes = host.volumes().list(Default::default()).await.unwrap().items;
    assert_eq!(volumes.len(), 1);
    assert_eq!(volumes[0].server_id, None);
    let deleted = host.volumes().delete(&Call::by_host(), volumes[0].id).await.unwrap();
    succeeded(&host, deleted.body.operation.id).await;
    nothing_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn a_repeated_create_makes_one_server() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = host.servers().create(&keyed("k"), server("web1")).await.unwrap();
    let second = host.servers().create(&keyed("k"), server("web1")).await.unwrap();
    assert!(second.replayed && !first.replayed);
    assert_eq!(first.body, second.body);
    let mut other = keyed("k");
    if let Some(idempotency) = &mut other.idempotency {
        idempotency.fingerprint = "another body".to_owned();
    }
    let refused = host.servers().create(&other, server("web2")).await.unwrap_err();
    assert_eq!(refused.code, Code::IdempotencyMismatch);
    assert_eq!(host.servers().list(Default::default()).await.unwrap().items.len(), 1);
    host.close().await;
}

#[tokio::test]
async fn names_and_references_are_unique_under_a_crowd() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let tasks: Vec<_> = (0..12)
        .map(|at| {
            let host = host.clone();
            tokio::spawn(async move {
                let mut spec = server(&format!("web{}", at % 4));
                spec.start = false;
                spec.external_ref = Some(format!("order-{}", at % 3));
                host.servers().create(&Call::by_host(), spec).await
            })
        })
        .collect();
    let mut made = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(answer) => {
                succeeded(&host, answer.body.operation.id).await;
                made += 1;
            }
            Err(cause) => assert_eq!(cause.code, Code::AlreadyExists),
        }
    }
    // Twelve pairs of 4 names and 3 references: no two servers may share either.
    let servers = host.servers().list(Default::default()).await.unwrap().items;
    assert_eq!(servers.len(), made);
    for one in &servers {
        let twins =
            servers.iter().filter(|other| other.name == one.name || other.external_ref == one.external_ref);
        assert_eq!(twins.count(), 1);
    }
    assert!((1..=3).contains(&made), "{made}");
    host.close().await;
}

#[tokio::test]
async fn asks_that_race_leave_one_truth() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let actions = [stop(0), START, ServerAction::Pause, ServerAction::Resume, stop(5)];
    let tasks: Vec<_> = (0..40)
        .map(|at| {
            let (host, action) = (host.clone(), actions[at % actions.len()]);
            tokio::spawn(async move { host.servers().act(&Call::by_host(), id, action).await })
        })
        .collect();
    for task in tasks {
        match task.await.unwrap() {
            Ok(answer) => drop(ended(&host, answer.body.operation.id).await),
            Err(cause) => assert_eq!(cause.code, Code::WrongState),
        }
    }
    let stopped = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    assert!(stage.launch.alive().is_empty());
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
}

#[tokio::test]
async fn a_create_is_cancelled_without_a_trace() {
    let stage = Stage::new();
    stage.launch.set_guest(Guest::IgnoresButton);
    let host = stage.open_with_image().await;
    let accepted = host.servers().create(&Call::by_host(), server("web1")).await.unwrap().body;
    match host.operations().cancel(&Call::by_host(), accepted.operation.id).await {
        Ok(_) => {
            let operation = ended(&host, accepted.operation.id).await;
            assert_eq!(operation.state, OperationState::Cancelled);
            nothing_left(&stage, &host).await;
        }
        // The machine may have booted before the cancel came.
        Err(cause) => assert_eq!(cause.code, Code::WrongState),
    }
    host.close().await;
}

#[tokio::test]
async fn a_plan_changes_nothing() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let plan = host.servers().plan(&Call::by_host(), server("web1")).await.unwrap();
    assert_eq!(plan.server.name.as_str(), "web1");
    assert_eq!(plan.memory_bytes_left, stage.memory_bytes - (128 << 20) - super::limits::VMM_OVERHEAD_BYTES);
    assert!(plan.steps.iter().any(|step| step.contains("reserve 10.")), "{:?}", plan.steps);
    nothing_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn a_patch_is_checked_applied_and_counted() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let before = created(&host, server("web1")).await;
    let patch: PatchServer = serde_json::from_value(serde_json::json!({
        "name": "web2", "vcpus": 4, "labels": { "a": "b" },
        "disk_limits": { "operations": { "per_second": 100 } },
    }))
    .unwrap();
    let mut call = Call::by_host();
    call.if_match = Some("\"999\"".to_owned());
    let refused = host.servers().patch(&call, before.id, patch.clone()).await.unwrap_err();
    assert_eq!(refused.code, Code::StaleEtag);
    call.if_match = Some(crate::call::etag(before.generation));
    let after = host.servers().patch(&call, before.id, patch).await.unwrap().body;
    assert_eq!((after.name.as_str(), after.vcpus), ("web2", 4));
    assert_eq!(after.labels.value("a"), Some("b"));
    assert!(after.generation > before.generation);
    let live = stage.launch.only().disk_limits();
    assert_eq!(live[&0].operations.unwrap().per_second, 100);
    let bad: PatchServer =
        serde_json::from_value(serde_json::json!({ "vcpus": 0, "memory_bytes": 1 })).unwrap();
    let refused = host.servers().patch(&Call::by_host(), before.id, bad).await.unwrap_err();
    assert_eq!(
        refused.errors.iter().map(|e| e.pointer.as_str()).collect::<Vec<_>>(),
        ["/vcpus", "/memory_bytes"]
    );
    host.close().await;
}

#[tokio::test]
async fn metrics_come_from_the_machine_and_need_one() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let metrics = host.servers().metrics(id).await.unwrap();
    assert_eq!((metrics.running_ms, metrics.disks.len(), metrics.device_faults), (5, 2, 2));
    let stopped = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    assert_eq!(host.servers().metrics(id).await.unwrap_err().code, Code::WrongState);
    host.close().await;
}

#[tokio::test]
async fn two_daemons_do_not_share_a_state_directory() {
    let stage = Stage::new();
    let host = stage.open().await;
    let refused = stage.open_with(stage.config()).await.err().unwrap();
    assert_eq!(refused.code, Code::HostUnprepared);
    assert!(refused.detail.contains("another toftd"));
    host.close().await;
    drop(host);
    stage.open().await.close().await;
}

/// Deletes a server with its disks.
pub(super) async fn delete(host: &crate::Host, id: model::ServerId) {
    let deleted = host.servers().delete(&Call::by_host(), id, Default::default()).await.unwrap();
    succeeded(host, deleted.body.operation.id).await;
}

/// Deletes a snapshot.
pub(super) async fn delete_snapshot(host: &crate::Host, id: model::SnapshotId) {
    let deleted = host.snapshots().delete(&Call::by_host(), id).await.unwrap();
    succeeded(host, deleted.body.operation.id).await;
}

/// No server, VMM, tap, address, volume or directory.
pub(super) async fn nothing_left(stage: &Stage, host: &crate::Host) {
    assert_eq!(stage.launch.alive().len(), 0, "VMMs");
    assert_eq!(stage.plumbing.scene().taps.len(), 0, "taps");
    assert_eq!(host.servers().list(Default::default()).await.unwrap().items.len(), 0, "servers");
    assert_eq!(host.volumes().list(Default::default()).await.unwrap().items.len(), 0, "volumes");
    let networks = host.networks().list(Default::default()).await.unwrap().items;
    assert!(networks.iter().all(|network| network.addresses_used == 0), "addresses");
    assert_eq!(host.snapshots().list(Default::default()).await.unwrap().items.len(), 0, "snapshots");
    for directory in ["servers", "volumes", "snapshots"] {
        let entries = std::fs::read_dir(stage.state_dir().join(directory)).unwrap();
        assert_eq!(entries.count(), 0, "{directory}");
    }
    assert_eq!(host.servers().usage().await.unwrap().memory_used_bytes, 0);
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
}
