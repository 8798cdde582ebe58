//! Hibernation on fakes, through the facade.
use std::collections::BTreeSet;
use std::time::Instant;

use model::Code;
use model::operation::OperationState;
use model::server::{CreateServer, PatchServer, ServerAction, ServerState, Wanted};
use wire::control::MachineState;

use super::snapshot::named;
use super::{START, stop};
use crate::Call;
use crate::fake_vmm::{FakeVmm, Guest};
use crate::stage::{SOON, Stage, created, ended, server, succeeded, until};

#[tokio::test]
async fn a_hibernated_server_goes_on_where_it_was_and_its_memory_is_used_once() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let directory = stage.state_dir().join("servers").join(id.to_string());
    let act = async |action| host.servers().act(&Call::by_host(), id, action).await;
    let hibernated = act(ServerAction::Hibernate).await.unwrap();
    succeeded(&host, hibernated.body.operation.id).await;
    let server = host.servers().one(id).await.unwrap();
    assert_eq!((server.state, server.wanted), (ServerState::Hibernated, Wanted::Hibernated));
    assert_eq!(server.allowed_actions, ["start", "stop", "restore", "migrate", "delete"]);
    assert!(stage.launch.alive().is_empty() && stage.plumbing.scene().taps.is_empty());
    assert_eq!(host.servers().usage().await.unwrap().memory_used_bytes, 0);
    let more = PatchServer { vcpus: Some(2), ..PatchServer::default() };
    let refused = host.servers().patch(&Call::by_host(), id, more).await.unwrap_err();
    assert_eq!(refused.code, Code::WrongState);
    let refused = act(stop(30)).await.unwrap_err();
    assert_eq!(refused.code, Code::WrongState);
    assert!(refused.detail.contains("`grace_s` 0"), "{}", refused.detail);
    // It is still there after a restart of the host, and only a start wakes it.
    host.close().await;
    drop(host);
    stage.launch.power_cycle().await;
    let host = stage.open().await;
    let act = async |action| host.servers().act(&Call::by_host(), id, action).await;
    assert_eq!(host.servers().one(id).await.unwrap().state, ServerState::Hibernated);
    let started = act(START).await.unwrap();
    succeeded(&host, started.body.operation.id).await;
    assert!(stage.launch.only().is_restored());
    assert_eq!(stage.launch.only().state(), MachineState::Running);
    assert!(!directory.join("saved.memory").exists() && !directory.join("saved.state").exists());
    // After a failure nothing is left to go back to.
    stage.launch.only().kill();
    until(&host, id, |server| server.state == ServerState::Starting).await;
    until(&host, id, |server| server.state == ServerState::Running).await;
    assert!(!stage.launch.only().is_restored());
    // Thrown away by force.
    let hibernated = act(ServerAction::Hibernate).await.unwrap();
    succeeded(&host, hibernated.body.operation.id).await;
    assert!(directory.join("saved.memory").exists());
    let stopped = act(stop(0)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    assert_eq!(host.servers().one(id).await.unwrap().state, ServerState::Stopped);
    assert!(!directory.join("saved.memory").exists());
    host.close().await;
}

#[tokio::test]
async fn a_server_that_is_to_get_another_machine_is_not_hibernated_into_this_one() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let act = async |action| host.servers().act(&Call::by_host(), id, action).await;
    let change = async |vcpus| {
        let patch = PatchServer { vcpus: Some(vcpus), ..PatchServer::default() };
        host.servers().patch(&Call::by_host(), id, patch).await.unwrap()
    };
    change(2).await;
    let refused = act(ServerAction::Hibernate).await.unwrap_err();
    assert_eq!(refused.code, Code::WrongState);
    assert!(refused.detail.contains("reboot it first"), "{}", refused.detail);
    let server = host.servers().one(id).await.unwrap();
    assert_eq!((server.state, server.vcpus), (ServerState::Running, 2));
    assert_eq!(server.machine.map(|machine| machine.vcpus), Some(1), "what it still has");
    assert_eq!(change(1).await.body.machine, None);
    let hibernated = act(ServerAction::Hibernate).await.unwrap();
    succeeded(&host, hibernated.body.operation.id).await;
    host.close().await;
}

#[tokio::test]
async fn a_memory_that_cannot_be_saved_or_read_costs_nothing() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    stage.launch.set_guest(Guest::CannotSave);
    let id = created(&host, server("web1")).await.id;
    let act = async |action| host.servers().act(&Call::by_host(), id, action).await;
    let refused = act(ServerAction::Hibernate).await.unwrap();
    let problem = ended(&host, refused.body.operation.id).await.error.unwrap();
    assert!(problem.detail.contains("no space left"), "{}", problem.detail);
    let server = until(&host, id, |server| server.state == ServerState::Running).await;
    assert_eq!(server.wanted, Wanted::Running);
    assert_eq!(stage.launch.only().state(), MachineState::Running);
    // Spoiled on the disk, it is refused and kept for whoever can mend it.
    let stopped = act(stop(0)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    stage.launch.set_guest(Guest::Obeys);
    let started = act(START).await.unwrap();
    succeeded(&host, started.body.operation.id).await;
    let hibernated = act(ServerAction::Hibernate).await.unwrap();
    succeeded(&host, hibernated.body.operation.id).await;
    let memory = stage.state_dir().join("servers").join(id.to_string()).join("saved.memory");
    let good = std::fs::read(&memory).unwrap();
    std::fs::write(&memory, "spoiled").unwrap();
    let started = act(START).await.unwrap();
    let problem = ended(&host, started.body.operation.id).await.error.unwrap();
    assert!(problem.detail.contains("not the one that was saved"), "{}", problem.detail);
    let server = until(&host, id, |server| server.state == ServerState::Hibernated).await;
    assert!(server.state_reason.is_some());
    std::fs::write(&memory, good).unwrap();
    let started = act(START).await.unwrap();
    succeeded(&host, started.body.operation.id).await;
    assert!(stage.launch.only().is_restored());
    host.close().await;
}

async fn saving(vmm: &FakeVmm) {
    let is_saving = async {
        while vmm.save_looks() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, is_saving).await.expect("its memory is being saved");
}

/// What comes of a save that never ends, as the connection breaks or as somebody cancels it, or cancels it and the daemon ends.
#[tokio::test]
async fn a_save_that_breaks_off_leaves_the_machine_as_it_was_and_no_files() {
    for is_paused in [false, true] {
        for breaks in ["connection", "cancel", "cancel and daemon"] {
            let stage = Stage::new();
            let mut host = stage.open_with_image().await;
            stage.launch.set_guest(Guest::SavesForEver);
            let id = created(&host, server("web1")).await.id;
            if is_paused {
                let paused = host.servers().act(&Call::by_host(), id, ServerAction::Pause).await.unwrap();
                succeeded(&host, paused.body.operation.id).await;
            }
            let vmm = stage.launch.only();
            let asked = host.servers().act(&Call::by_host(), id, ServerAction::Hibernate).await.unwrap();
            let operation = asked.body.operation.id;
            saving(&vmm).await;
            let directory = stage.state_dir().join("servers").join(id.to_string());
            assert!(directory.join("saved.memory.new").exists());
            match breaks {
                "connection" => vmm.hang_up(),
                _ => drop(host.operations().cancel(&Call::by_host(), operation).await.unwrap()),
            }
            if breaks == "cancel and daemon" {
                host.close().await;
                drop(host);
                host = stage.open().await;
            }
            assert_ne!(ended(&host, operation).await.state, OperationState::Succeeded);
            let (state, does) = match is_paused {
                true => (ServerState::Paused, MachineState::Paused),
                false => (ServerState::Running, MachineState::Running),
            };
            until(&host, id, |server| server.state == state).await;
            assert_eq!(vmm.state(), does, "{breaks}");
            for name in ["saved.state", "saved.memory", "saved.state.new", "saved.memory.new"] {
                assert!(!directory.join(name).exists(), "{name} after a broken {breaks}");
            }
            host.close().await;
        }
    }
}

#[tokio::test]
async fn a_memory_that_does_not_fit_is_not_begun_to_be_saved() {
    let mut stage = Stage::new();
    stage.memory_bytes = 1 << 50;
    let host = stage.open_with_image().await;
    let large = CreateServer { memory_bytes: Some(model::limits::MEMORY_BYTES_MAX), ..server("web1") };
    let id = created(&host, large).await.id;
    let hibernate = ServerAction::Hibernate;
    let refused = host.servers().act(&Call::by_host(), id, hibernate).await.unwrap_err();
    assert_eq!((refused.code, refused.code.status()), (Code::DiskFull, 507));
    assert_eq!(host.servers().one(id).await.unwrap().state, ServerState::Running);
    assert_eq!(stage.launch.only().state(), MachineState::Running);
    host.close().await;
}

/// Who has looked at an operation may cancel that, and not each look is worth a commit.
#[tokio::test]
async fn a_save_is_looked_at_more_often_than_it_is_told_of() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    stage.launch.set_guest(Guest::SavesForEver);
    let id = created(&host, server("web1")).await.id;
    let vmm = stage.launch.only();
    let paused = host.servers().act(&Call::by_host(), id, ServerAction::Pause).await.unwrap();
    succeeded(&host, paused.body.operation.id).await;
    for is_snapshot in [false, true] {
        let operation = if is_snapshot {
            let taken = host.servers().snapshot(&Call::by_host(), id, named("one", true)).await.unwrap();
            taken.body.operation.id
        } else {
            let asked = host.servers().act(&Call::by_host(), id, ServerAction::Hibernate).await.unwrap();
            asked.body.operation.id
        };
        let (before, began) = (vmm.save_looks(), Instant::now());
        let told = async || {
            let mut told = BTreeSet::new();
            while vmm.save_looks() < before + 40 {
                told.insert(host.operations().one(operation, None).await.unwrap().generation);
                tokio::task::yield_now().await;
            }
            told
        };
        let told = tokio::time::timeout(SOON, told()).await.expect("its save is looked at");
        // What else there is to be told of it: accepted, begun, its disks are copied.
        let most = 5 + usize::try_from(began.elapsed().as_millis() / 500).unwrap();
        assert!(told.len() <= most, "{} times where {most} are enough: {told:?}", told.len());
        host.operations().cancel(&Call::by_host(), operation).await.unwrap();
        until(&host, id, |server| server.state == ServerState::Paused).await;
    }
    host.close().await;
}
