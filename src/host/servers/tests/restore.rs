//! Going back to snapshots on fakes, through the facade.
use std::path::PathBuf;
use std::sync::Arc;

use model::operation::OperationState;
use model::server::{PatchServer, Server, ServerAction, ServerState, Wanted};
use model::snapshot::{CreateClones, CreateSnapshot, RestoreServer, Snapshot};
use model::volume::PatchVolume;
use model::{Code, Labels, ServerId};
use wire::control::MachineState;

use super::snapshot::{DieAt, named, taken, volume};
use super::{START, delete, delete_snapshot, nothing_left, stop};
use crate::servers::record::ServerRecord;
use crate::stage::{Stage, created, ended, keyed, server, succeeded, until};
use crate::store::records;
use crate::{Call, Host};

fn back_to(snapshot: &Snapshot, stop: bool) -> RestoreServer {
    RestoreServer { snapshot: snapshot.name.to_string(), stop }
}

async fn restored(host: &Host, id: ServerId, spec: RestoreServer) -> Server {
    let accepted = host.servers().restore(&Call::by_host(), id, spec).await.unwrap().body;
    succeeded(host, accepted.operation.id).await;
    host.servers().one(id).await.unwrap()
}

async fn act(host: &Host, id: ServerId, action: ServerAction) {
    let acted = host.servers().act(&Call::by_host(), id, action).await.unwrap();
    succeeded(host, acted.body.operation.id).await;
}

/// What lies beside volumes.
fn beside(stage: &Stage) -> Vec<PathBuf> {
    let all = std::fs::read_dir(stage.state_dir().join("volumes")).unwrap();
    let all = all.map(|entry| entry.unwrap().path());
    all.filter(|path| path.extension().is_some_and(|end| end == "beside")).collect()
}

async fn refused(host: &Host, id: ServerId, spec: RestoreServer) -> crate::Error {
    host.servers().restore(&Call::by_host(), id, spec).await.unwrap_err()
}

#[tokio::test]
async fn a_server_goes_back_to_the_disk_and_the_memory_of_a_snapshot_again_and_again() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let id = first.id;
    std::fs::write(volume(&stage, &first), b"as it was").unwrap();
    let snapshot = taken(&host, id, named("then", true)).await;
    let before = stage.launch.only();
    for _ in 0..2 {
        std::fs::write(volume(&stage, &first), b"as it is now").unwrap();
        let problem = refused(&host, id, back_to(&snapshot, false)).await;
        assert_eq!(problem.code, Code::WrongState);
        assert!(problem.detail.contains("would be lost"), "{}", problem.detail);
        assert_eq!(stage.launch.only().state(), MachineState::Running);
        let server = restored(&host, id, back_to(&snapshot, true)).await;
        assert_eq!((server.state, server.wanted), (ServerState::Running, Wanted::Running));
        assert_eq!((&server.nics, server.name), (&first.nics, first.name.clone()), "it is who it was");
        assert!(stage.launch.only().is_restored());
        assert_eq!(stage.launch.only().state(), MachineState::Running);
        assert_eq!(server.shares_memory_of, Some(snapshot.id));
        assert!(std::fs::read(volume(&stage, &first)).unwrap().starts_with(b"as it was"));
        assert_eq!(beside(&stage), Vec::<PathBuf>::new());
    }
    assert_ne!(before.spec(), None);
    // Its record has the machine of that moment again.
    act(&host, id, stop(0)).await;
    let more = PatchServer { vcpus: Some(2), memory_bytes: Some(256 << 20), ..PatchServer::default() };
    host.servers().patch(&Call::by_host(), id, more).await.unwrap();
    let grown = PatchVolume { size_bytes: Some(4 << 20), ..PatchVolume::default() };
    let disk = first.volumes[0].volume_id;
    host.volumes().patch(&Call::by_host(), disk, grown).await.unwrap();
    let server = restored(&host, id, back_to(&snapshot, false)).await;
    assert_eq!((server.vcpus, server.memory_bytes), (1, 128 << 20));
    assert_eq!(server.volumes[0].size_bytes, first.volumes[0].size_bytes);
    let volume_now = host.volumes().one(disk).await.unwrap();
    assert_eq!(volume_now.snapshot_id, Some(snapshot.id));
    assert!(stage.launch.only().is_restored());
    // The memory is the snapshot's still: a machine of this server ends, and another begins afresh.
    stage.launch.only().kill();
    until(&host, id, |server| server.state == ServerState::Starting).await;
    let afresh = until(&host, id, |server| server.state == ServerState::Running).await;
    assert!(!stage.launch.only().is_restored());
    assert_eq!(afresh.shares_memory_of, None);
    delete(&host, id).await;
    delete_snapshot(&host, snapshot.id).await;
    nothing_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn of_disks_alone_what_ran_is_started_and_what_did_not_stays_off() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let id = first.id;
    std::fs::write(volume(&stage, &first), b"as it was").unwrap();
    let snapshot = taken(&host, id, named("then", false)).await;
    let disk = || std::fs::read(volume(&stage, &first)).unwrap();

    std::fs::write(volume(&stage, &first), b"as it is now").unwrap();
    let server = restored(&host, id, back_to(&snapshot, true)).await;
    assert_eq!(server.state, ServerState::Running);
    assert!(!stage.launch.only().is_restored() && disk().starts_with(b"as it was"));

    act(&host, id, ServerAction::Pause).await;
    let server = restored(&host, id, back_to(&snapshot, true)).await;
    assert_eq!((server.state, server.wanted), (ServerState::Stopped, Wanted::Stopped));

    std::fs::write(volume(&stage, &first), b"as it is now").unwrap();
    let grown = PatchVolume { size_bytes: Some(4 << 20), ..PatchVolume::default() };
    host.volumes().patch(&Call::by_host(), first.volumes[0].volume_id, grown).await.unwrap();
    let server = restored(&host, id, back_to(&snapshot, false)).await;
    assert_eq!((server.state, server.volumes[0].size_bytes), (ServerState::Stopped, 4 << 20), "larger stays");
    assert!(disk().starts_with(b"as it was") && disk().len() == 4 << 20);
    assert!(stage.launch.alive().is_empty());

    // What hibernated is lost only when that is said.
    act(&host, id, START).await;
    act(&host, id, ServerAction::Hibernate).await;
    assert_eq!(refused(&host, id, back_to(&snapshot, false)).await.code, Code::WrongState);
    assert_eq!(host.servers().one(id).await.unwrap().state, ServerState::Hibernated);
    let server = restored(&host, id, back_to(&snapshot, true)).await;
    assert_eq!((server.state, server.wanted), (ServerState::Stopped, Wanted::Stopped));
    let memory = stage.state_dir().join("servers").join(id.to_string()).join("saved.memory");
    assert!(!memory.exists());
    host.close().await;
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_what_fails_changes_nothing() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let other = created(&host, server("web2")).await;
    let snapshot = taken(&host, first.id, named("then", true)).await;
    let problem = refused(&host, other.id, back_to(&snapshot, true)).await;
    assert_eq!((problem.code, problem.errors[0].code.as_str()), (Code::Invalid, "of_another_server"));
    let none = RestoreServer { snapshot: "nothing".to_owned(), stop: true };
    assert_eq!(refused(&host, first.id, none).await.errors[0].code, "not_found");

    // The disk of the snapshot cannot be read: the machine runs on, and the disk is what it was.
    let files = stage.state_dir().join("snapshots").join(snapshot.id.to_string());
    std::fs::rename(files.join("disk0.raw"), files.join("away")).unwrap();
    std::fs::write(volume(&stage, &first), b"as it is now").unwrap();
    let machine = stage.launch.alive().len();
    let accepted =
        host.servers().restore(&Call::by_host(), first.id, back_to(&snapshot, true)).await.unwrap();
    let operation = ended(&host, accepted.body.operation.id).await;
    assert_eq!(operation.state, OperationState::Failed);
    let server = until(&host, first.id, |server| server.operation_id.is_none()).await;
    assert_eq!((server.state, stage.launch.alive().len()), (ServerState::Running, machine));
    assert!(std::fs::read(volume(&stage, &first)).unwrap().starts_with(b"as it is now"));
    assert_eq!(beside(&stage), Vec::<PathBuf>::new());
    std::fs::rename(files.join("away"), files.join("disk0.raw")).unwrap();

    // Memory that is not what was saved is refused by the VMM: disks are those of the moment, and it waits for a start.
    let memory = files.join("machine.memory");
    let good = std::fs::read(&memory).unwrap();
    std::fs::write(&memory, "spoiled").unwrap();
    let accepted =
        host.servers().restore(&Call::by_host(), first.id, back_to(&snapshot, true)).await.unwrap();
    let operation = ended(&host, accepted.body.operation.id).await;
    assert!(operation.error.unwrap().detail.contains("not the one that was saved"));
    let server = until(&host, first.id, |server| server.state == ServerState::Hibernated).await;
    assert!(server.state_reason.is_some());
    std::fs::write(&memory, good).unwrap();
    act(&host, first.id, START).await;
    host.close().await;
}

/// The machine could not be built, and what the server had would be gone by then.
#[tokio::test]
async fn a_memory_of_another_processor_is_refused_before_anything_is_given_up() {
    let stage = Stage::new();
    stage.launch.shows(&["aes", "avx"]);
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let snapshot = taken(&host, first.id, named("then", true)).await;
    std::fs::write(volume(&stage, &first), b"as it is now").unwrap();
    host.close().await;
    drop(host);

    stage.launch.shows(&["avx"]);
    let host = stage.open().await;
    until(&host, first.id, |server| server.state == ServerState::Running).await;
    let clones = CreateClones { name: "twin".parse().unwrap(), count: 1, labels: Labels::default() };
    let cloned = host.servers().clone_snapshot(&Call::by_host(), snapshot.id, clones.clone()).await;
    for problem in [refused(&host, first.id, back_to(&snapshot, true)).await, cloned.unwrap_err()] {
        assert_eq!(problem.code, Code::WrongState);
        assert!(problem.detail.contains("lacks aes, which the guest was shown"), "{}", problem.detail);
    }
    assert_eq!(stage.launch.only().state(), MachineState::Running);
    assert_eq!(std::fs::read(volume(&stage, &first)).unwrap(), b"as it is now");
    host.close().await;
    drop(host);

    // A better one takes it, and knows that its guest was shown less: it may go back to where it came from.
    stage.launch.shows(&["aes", "avx", "avx2"]);
    let host = stage.open().await;
    until(&host, first.id, |server| server.state == ServerState::Running).await;
    restored(&host, first.id, back_to(&snapshot, true)).await;
    let made = host.servers().clone_snapshot(&Call::by_host(), snapshot.id, clones).await.unwrap().body;
    let twin = made.items[0].server_id;
    until(&host, twin, |server| server.state == ServerState::Running).await;
    for id in [first.id, twin] {
        let look = move |all: &rusqlite::Connection| records::one::<ServerRecord>(all, id.0);
        let shown = host.store().read(look).await.unwrap().held.features.expect("what its guest was shown");
        assert!(shown.contains("aes") && !shown.contains("avx2"), "{shown:?}");
    }
    for action in [stop(0), START] {
        act(&host, first.id, action).await;
    }
    let id = first.id;
    let anew = host.store().read(move |all| records::one::<ServerRecord>(all, id.0)).await.unwrap();
    assert_eq!(anew.held.features, None, "it has begun anew");
    host.close().await;
}

#[tokio::test]
async fn a_snapshot_stays_while_a_server_goes_back_to_it() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let snapshot = taken(&host, first.id, CreateSnapshot::default()).await;
    host.close().await;
    drop(host);
    let host = stage.open_watched(Arc::new(DieAt("server.memory_discarded"))).await.unwrap();
    let call = keyed("back");
    let begun = host.servers().restore(&call, first.id, back_to(&snapshot, true)).await.unwrap().body;
    let mut tried = false;
    while !host.is_dead() {
        match host.snapshots().delete(&Call::by_host(), snapshot.id).await {
            Err(cause) if cause.code == Code::InUse => tried = true,
            Err(cause) if cause.code == Code::Draining => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(tried);
    host.close().await;
    drop(host);
    let host = stage.open().await;
    assert_eq!(succeeded(&host, begun.operation.id).await.state, OperationState::Succeeded);
    host.close().await;
}
