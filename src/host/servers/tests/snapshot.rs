//! Snapshots on fakes, through the facade.
use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use model::operation::{OperationState, Resource};
use model::server::{CreateServer, Server, ServerAction, ServerState};
use model::snapshot::{CreateSnapshot, PatchSnapshot, Snapshot, SnapshotState};
use model::{Code, ServerId, SnapshotId, Time};
use wire::control::MachineState;

use super::{START, delete, delete_snapshot, nothing_left, stop};
use crate::fake_vmm::Guest;
use crate::stage::{SOON, Stage, created, ended, keyed, server, succeeded, until};
use crate::volumes::layers::Layers;
use crate::volumes::overlay::shares_blocks;
use crate::{Call, Checkpoint, Fate, Host};

pub(super) fn named(name: &str, memory: bool) -> CreateSnapshot {
    CreateSnapshot { name: Some(name.parse().unwrap()), memory, ..CreateSnapshot::default() }
}

pub(super) async fn taken(host: &Host, id: ServerId, spec: CreateSnapshot) -> Snapshot {
    let accepted = host.servers().snapshot(&Call::by_host(), id, spec).await.unwrap().body;
    let snapshot = accepted.resource.unwrap();
    assert_eq!((snapshot.state, snapshot.taken_at), (SnapshotState::Creating, None));
    assert!(accepted.operation.resources.contains(&Resource::Snapshot(snapshot.id)));
    succeeded(host, accepted.operation.id).await;
    host.snapshots().one(snapshot.id).await.unwrap()
}

/// How many writes waited, how long at most, and how long together.
fn delays(snapshot: &Snapshot) -> Option<(u64, u64, u64)> {
    let Snapshot { guest_write_delay_us_max, guest_write_delay_us_sum, .. } = snapshot;
    Some((snapshot.guest_writes_delayed?, (*guest_write_delay_us_max)?, (*guest_write_delay_us_sum)?))
}

fn directory(stage: &Stage, id: SnapshotId) -> PathBuf {
    stage.state_dir().join("snapshots").join(id.to_string())
}

pub(super) fn volume(stage: &Stage, server: &Server) -> PathBuf {
    stage.state_dir().join("volumes").join(format!("{}.raw", server.volumes[0].volume_id))
}

/// The file that an overlay needs besides its own.
pub(super) fn backing(stage: &Stage, server: &Server) -> PathBuf {
    volume(stage, server).with_extension("raw.backing")
}

/// What the guest has on its disk, in whatever files that is.
pub(super) fn disk(stage: &Stage, server: &Server) -> Vec<u8> {
    let own = File::open(volume(stage, server)).unwrap();
    let layers = match File::open(backing(stage, server)) {
        Ok(backing) => Layers::over(own, backing),
        Err(_) => Layers::one(own),
    };
    let mut bytes = vec![0; layers.own.metadata().unwrap().len() as usize];
    layers.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn files(stage: &Stage, id: SnapshotId) -> Vec<String> {
    let entries = std::fs::read_dir(directory(stage, id)).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn no_files(stage: &Stage) {
    assert_eq!(std::fs::read_dir(stage.state_dir().join("snapshots")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_snapshot_holds_the_disk_of_its_moment_in_every_state_of_the_server() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let server = created(&host, server("web1")).await;
    let act = async |action| {
        let acted = host.servers().act(&Call::by_host(), server.id, action).await.unwrap();
        succeeded(&host, acted.body.operation.id).await;
    };
    std::fs::write(volume(&stage, &server), b"while it runs").unwrap();
    let running = taken(&host, server.id, named("runs", true)).await;
    assert_eq!(running.state, SnapshotState::Ready);
    assert!(running.memory && running.taken_at.is_some() && running.paused_ms.is_some());
    // As the fake VMM tells it, where this host can save a machine that runs.
    let is_live =
        std::fs::File::options().read(true).write(true).open(super::super::snapshot::USERFAULTFD).is_ok();
    let of_memory = is_live.then_some((3, 40, 90));
    let of_disks = (!shares_blocks(&stage.state_dir(), &stage.state_dir()).unwrap()).then_some((2, 60, 70));
    let both = [of_memory, of_disks].into_iter().flatten();
    let sum = both.reduce(|one, other| (one.0 + other.0, one.1.max(other.1), one.2 + other.2));
    assert_eq!(delays(&running), sum);
    assert!(running.volumes[0].filled_by.is_some() && running.stored_bytes > 0);
    assert_eq!((running.vcpus, running.memory_bytes), (1, 128 << 20));
    assert_eq!(files(&stage, running.id), ["disk0.raw", "machine.memory", "machine.state"]);
    assert_eq!(stage.launch.only().state(), MachineState::Running);

    act(ServerAction::Pause).await;
    std::fs::write(volume(&stage, &server), b"while it is parked").unwrap();
    let parked = taken(&host, server.id, named("parked", true)).await;
    assert_eq!(parked.paused_ms, Some(0), "it stood still anyhow");
    assert_eq!(delays(&parked), None, "nobody wrote");
    assert_eq!(stage.launch.only().state(), MachineState::Paused);

    act(stop(0)).await;
    std::fs::write(volume(&stage, &server), b"while it is off").unwrap();
    let refused = host.servers().snapshot(&Call::by_host(), server.id, named("off", true)).await.unwrap_err();
    assert_eq!(refused.code, Code::WrongState);
    assert!(refused.detail.contains("no memory to save"), "{}", refused.detail);
    let off = taken(&host, server.id, CreateSnapshot::default()).await;
    assert_eq!(files(&stage, off.id), ["disk0.raw"]);
    assert!(off.name.as_str().starts_with("web1-"), "{}", off.name);
    assert_eq!(host.servers().one(server.id).await.unwrap().state, ServerState::Stopped);

    for (id, wanted) in
        [(running.id, "while it runs"), (parked.id, "while it is parked"), (off.id, "while it is off")]
    {
        let disk = std::fs::read(directory(&stage, id).join("disk0.raw")).unwrap();
        assert!(disk.starts_with(wanted.as_bytes()) && disk.len() == 1 << 20, "{wanted}");
    }
    // They outlive their server, and keep its image.
    delete(&host, server.id).await;
    let refused = host.images().delete(&Call::by_host(), server.image_id).await.unwrap_err();
    assert_eq!(refused.code, Code::InUse);
    for id in [running.id, parked.id, off.id] {
        delete_snapshot(&host, id).await;
    }
    no_files(&stage);
    nothing_left(&stage, &host).await;
    host.close().await;
}

fn from_snapshot(name: &str, snapshot: &str) -> CreateServer {
    CreateServer { image: None, snapshot: Some(snapshot.to_owned()), ..server(name) }
}

#[tokio::test]
async fn a_server_made_from_a_snapshot_begins_with_its_disk_and_is_another() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    std::fs::write(volume(&stage, &first), b"what web1 wrote").unwrap();
    let snapshot = taken(&host, first.id, named("kept", true)).await;
    for (name, source) in [("by-name", "kept".to_owned()), ("by-id", snapshot.id.to_string())] {
        let made = created(&host, from_snapshot(name, &source)).await;
        assert_eq!(made.state, ServerState::Running);
        assert!(std::fs::read(volume(&stage, &made)).unwrap().starts_with(b"what web1 wrote"), "{name}");
        assert_eq!(made.image_id, first.image_id);
        assert_ne!((&made.nics[0].mac, made.nics[0].ipv4), (&first.nics[0].mac, first.nics[0].ipv4));
        let volume = host.volumes().one(made.volumes[0].volume_id).await.unwrap();
        assert_eq!(volume.snapshot_id, Some(snapshot.id));
    }
    // What it was made from may go, and it stays.
    delete_snapshot(&host, snapshot.id).await;

    let refused = async |spec: CreateServer| {
        let refused = host.servers().create(&Call::by_host(), spec).await.unwrap_err();
        (refused.code, refused.errors[0].pointer.clone(), refused.errors[0].code.clone())
    };
    let at = |pointer: &str, code: &str| (Code::Invalid, pointer.to_owned(), code.to_owned());
    assert_eq!(refused(from_snapshot("c", "kept")).await, at("/snapshot", "not_found"));
    assert_eq!(refused(CreateServer { image: None, ..server("c") }).await, at("/image", "missing"));
    let both = CreateServer { snapshot: Some("kept".to_owned()), ..server("c") };
    assert_eq!(refused(both).await, at("/snapshot", "conflict"));
    host.close().await;
}

#[tokio::test]
async fn a_snapshot_stays_while_a_volume_is_made_of_it_wherever_the_daemon_dies() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    std::fs::write(volume(&stage, &first), b"what web1 wrote").unwrap();
    let snapshot = taken(&host, first.id, named("kept", false)).await;
    let checkpoint = Arc::new(DieAt("server.directory_made"));
    host.close().await;
    drop(host);
    let host = stage.open_watched(checkpoint).await.unwrap();
    let call = keyed("second");
    let begun = host.servers().create(&call, from_snapshot("web2", "kept")).await.unwrap().body;
    while !host.is_dead() {
        tokio::task::yield_now().await;
    }
    host.close().await;
    drop(host);

    // The next daemon has the volume to fill: until it is, what it is filled from is in use.
    let host = stage.open().await;
    let deleted = host.snapshots().delete(&Call::by_host(), snapshot.id).await;
    let made = succeeded(&host, begun.operation.id).await;
    assert_eq!(made.state, OperationState::Succeeded);
    let second = host.servers().one(begun.resource.unwrap().id).await.unwrap();
    assert!(std::fs::read(volume(&stage, &second)).unwrap().starts_with(b"what web1 wrote"));
    // The volume may have been filled before the snapshot was to go.
    assert!(deleted.is_ok() || deleted.is_err_and(|refused| refused.code == Code::InUse));
    host.close().await;
}

/// Dies at this point.
pub(super) struct DieAt(pub(super) &'static str);

impl Checkpoint for DieAt {
    fn reached(&self, point: &'static str) -> Fate {
        if point == self.0 { Fate::Die } else { Fate::Live }
    }
}

#[tokio::test]
async fn a_snapshot_that_its_vmm_could_still_write_to_is_none() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    stage.launch.set_guest(Guest::KeepsSaved);
    let id = created(&host, server("web1")).await.id;
    let accepted = host.servers().snapshot(&Call::by_host(), id, named("one", true)).await.unwrap().body;
    let operation = ended(&host, accepted.operation.id).await;
    assert!(operation.error.unwrap().detail.contains("does not let go"));
    no_files(&stage);
    host.close().await;
}

#[tokio::test]
async fn a_snapshot_that_fails_leaves_nothing_and_a_server_that_runs() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    stage.launch.set_guest(Guest::CannotSave);
    let id = created(&host, server("web1")).await.id;
    let accepted = host.servers().snapshot(&Call::by_host(), id, named("one", true)).await.unwrap().body;
    let operation = ended(&host, accepted.operation.id).await;
    assert!(operation.error.unwrap().detail.contains("no space left"));
    until(&host, id, |server| server.state == ServerState::Running && server.operation_id.is_none()).await;
    assert_eq!(stage.launch.only().state(), MachineState::Running);
    let gone = host.snapshots().one(accepted.resource.unwrap().id).await.unwrap_err();
    assert_eq!(gone.code, Code::NotFound);
    no_files(&stage);
    // Its disk alone can be had.
    taken(&host, id, named("one", false)).await;
    let refused = host.servers().snapshot(&Call::by_host(), id, named("one", false)).await.unwrap_err();
    assert_eq!(refused.code, Code::AlreadyExists);
    host.close().await;
}

#[tokio::test]
async fn disks_that_cannot_be_copied_as_the_guest_runs_are_no_snapshot() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    if shares_blocks(&stage.state_dir(), &stage.state_dir()).unwrap() {
        // They are shared in a moment then.
        return host.close().await;
    }
    stage.launch.set_guest(Guest::CannotCopy);
    let id = created(&host, server("web1")).await.id;
    for memory in [true, false] {
        let accepted =
            host.servers().snapshot(&Call::by_host(), id, named("one", memory)).await.unwrap().body;
        let operation = ended(&host, accepted.operation.id).await;
        let detail = operation.error.unwrap().detail;
        assert!(detail.contains("disks of server web1 could not be copied: no space left"), "{detail}");
        until(&host, id, |server| server.state == ServerState::Running && server.operation_id.is_none())
            .await;
        assert_eq!(stage.launch.only().state(), MachineState::Running);
        no_files(&stage);
    }
    host.close().await;
}

#[tokio::test]
async fn a_snapshot_that_does_not_fit_is_refused_before_anything_is_done() {
    let mut stage = Stage::new();
    stage.memory_bytes = 1 << 50;
    let host = stage.open_with_image().await;
    let mut spec = server("web1");
    spec.memory_bytes = Some(model::limits::MEMORY_BYTES_MAX);
    let id = created(&host, spec).await.id;
    let refused = host.servers().snapshot(&Call::by_host(), id, named("one", true)).await.unwrap_err();
    assert_eq!((refused.code, refused.code.status()), (Code::DiskFull, 507));
    assert!(host.snapshots().list(Default::default()).await.unwrap().items.is_empty());
    assert!(host.servers().one(id).await.unwrap().operation_id.is_none());
    host.close().await;
}

/// Stops a daemon at a checkpoint until the test lets it go on.
struct HoldAt {
    point: &'static str,
    reached: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

impl Checkpoint for HoldAt {
    fn reached(&self, point: &'static str) -> Fate {
        if point == self.point {
            self.reached.lock().unwrap().send(()).unwrap();
            self.go_on.lock().unwrap().recv_timeout(SOON).unwrap();
        }
        Fate::Live
    }
}

/// What somebody asks for while the machine stands still for a snapshot; how the server and the snapshot end.
async fn asked_meanwhile(
    memory: bool,
    ask: impl AsyncFnOnce(&Host, ServerId, model::OperationId),
) -> (ServerState, OperationState) {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    host.close().await;
    drop(host);
    let ((reached, has_reached), (go_on, may_go_on)) = (channel(), channel());
    let point = "server.snapshot_parked";
    let hold = HoldAt { point, reached: Mutex::new(reached), go_on: Mutex::new(may_go_on) };
    let host = stage.open_watched(Arc::new(hold)).await.unwrap();
    let accepted = host.servers().snapshot(&Call::by_host(), id, named("one", memory)).await.unwrap().body;
    tokio::task::spawn_blocking(move || has_reached.recv_timeout(SOON).unwrap()).await.unwrap();
    let refused = host.snapshots().delete(&Call::by_host(), accepted.resource.unwrap().id).await.unwrap_err();
    assert_eq!((refused.code, refused.operation_id), (Code::WrongState, Some(accepted.operation.id)));
    ask(&host, id, accepted.operation.id).await;
    go_on.send(()).unwrap();
    let operation = ended(&host, accepted.operation.id).await;
    let rests = |server: &Server| matches!(server.state, ServerState::Running | ServerState::Stopped);
    let server = until(&host, id, |server| server.operation_id.is_none() && rests(server)).await;
    if operation.state != OperationState::Succeeded {
        assert!(host.snapshots().list(Default::default()).await.unwrap().items.is_empty());
        let removed = async {
            while std::fs::read_dir(stage.state_dir().join("snapshots")).unwrap().count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, removed).await.expect("its files are removed");
    }
    host.close().await;
    (server.state, operation.state)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_cancels_stops_or_deletes_meanwhile_has_it_so() {
    for memory in [false, true] {
        let cancelled = asked_meanwhile(memory, async |host, _, operation| {
            host.operations().cancel(&Call::by_host(), operation).await.unwrap();
        });
        assert_eq!(cancelled.await, (ServerState::Running, OperationState::Cancelled));
        let stopped = asked_meanwhile(memory, async |host, id, _| {
            let refused =
                host.servers().act(&Call::by_host(), id, ServerAction::Hibernate).await.unwrap_err();
            assert_eq!(refused.code, Code::WrongState);
            let running = host.servers().act(&Call::by_host(), id, START).await.unwrap().body;
            assert_eq!(running.operation.state, OperationState::Succeeded);
            host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
        });
        assert_eq!(stopped.await, (ServerState::Stopped, OperationState::Cancelled));
    }
}

#[tokio::test]
async fn a_snapshot_expires_when_its_time_has_come_and_not_before() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let past = Some(Time::from_unix_ms(Time::now().unix_ms() - 1));
    let refused = host
        .servers()
        .snapshot(&Call::by_host(), id, CreateSnapshot { expires_at: past, ..named("past", false) })
        .await
        .unwrap_err();
    assert_eq!(refused.errors[0].pointer, "/expires_at");
    let later = Some(Time::from_unix_ms(Time::now().unix_ms() + 3_600_000));
    let kept = taken(&host, id, CreateSnapshot { expires_at: later, ..named("kept", false) }).await;
    let going = taken(&host, id, CreateSnapshot { expires_at: later, ..named("going", false) }).await;
    let patch: PatchSnapshot =
        serde_json::from_str(r#"{ "expires_at": null, "labels": { "a": "b" }, "description": "x" }"#)
            .unwrap();
    assert_eq!(serde_json::to_string(&patch.expires_at).unwrap(), "null");
    let mut call = keyed("patch");
    call.if_match = Some("\"1\"".to_owned());
    let stale = host.snapshots().patch(&call, kept.id, patch.clone()).await.unwrap_err();
    assert_eq!(stale.code, Code::StaleEtag);
    let patched = host.snapshots().patch(&Call::by_host(), kept.id, patch).await.unwrap().body;
    assert_eq!((patched.expires_at, patched.labels.value("a")), (None, Some("b")));
    assert_eq!(patched.generation, kept.generation + 1);

    let mut events = host.events().follow(None).await.unwrap();
    let soon = Some(Time::from_unix_ms(Time::now().unix_ms() + 50));
    let patch = PatchSnapshot { expires_at: Some(soon), ..PatchSnapshot::default() };
    host.snapshots().patch(&Call::by_host(), going.id, patch).await.unwrap();
    let mut seen = Vec::new();
    while seen.last().is_none_or(|kind| kind != "snapshot.deleted") {
        seen.extend(events.next().await.unwrap().into_iter().map(|event| event.kind));
    }
    assert!(seen.contains(&"snapshot.deleting".to_owned()), "{seen:?}");
    assert_eq!(host.snapshots().one(going.id).await.unwrap_err().code, Code::NotFound);
    assert_eq!(host.snapshots().one(kept.id).await.unwrap().state, SnapshotState::Ready);
    assert!(!directory(&stage, going.id).exists());

    // One whose time came while no daemon ran goes when the next one starts.
    let soon = Some(Time::from_unix_ms(Time::now().unix_ms() + 200));
    let patch = PatchSnapshot { expires_at: Some(soon), ..PatchSnapshot::default() };
    host.snapshots().patch(&Call::by_host(), kept.id, patch).await.unwrap();
    host.close().await;
    drop(host);
    let host = stage.open().await;
    let mut events = host.events().follow(Some(model::EventId(0))).await.unwrap();
    let gone = format!("/v1/snapshots/{}", kept.id);
    loop {
        let page = events.next().await.unwrap();
        if page.iter().any(|event| event.kind == "snapshot.deleted" && event.subject == gone) {
            break;
        }
    }
    no_files(&stage);
    host.close().await;
}

#[tokio::test]
async fn a_repeated_call_takes_one_snapshot() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let first = host.servers().snapshot(&keyed("take"), id, CreateSnapshot::default()).await.unwrap();
    let second = host.servers().snapshot(&keyed("take"), id, CreateSnapshot::default()).await.unwrap();
    assert!(!first.replayed && second.replayed);
    assert_eq!(first.body, second.body);
    succeeded(&host, first.body.operation.id).await;
    assert_eq!(host.snapshots().list(Default::default()).await.unwrap().items.len(), 1);
    host.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_that_is_in_use_holds_up_the_expiry_of_no_other() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let used = taken(&host, id, named("used", false)).await.id;
    let free = taken(&host, id, named("free", false)).await.id;
    host.close().await;
    drop(host);
    let ((reached, has_reached), (go_on, may_go_on)) = (channel(), channel());
    let point = "server.directory_made";
    let hold = HoldAt { point, reached: Mutex::new(reached), go_on: Mutex::new(may_go_on) };
    let host = stage.open_watched(Arc::new(hold)).await.unwrap();
    let begun = host.servers().create(&Call::by_host(), from_snapshot("web2", "used")).await.unwrap().body;
    tokio::task::spawn_blocking(move || has_reached.recv_timeout(SOON).unwrap()).await.unwrap();
    let expire = async |id| {
        let soon = Some(Some(Time::from_unix_ms(Time::now().unix_ms() + 100)));
        let patch = PatchSnapshot { expires_at: soon, ..PatchSnapshot::default() };
        host.snapshots().patch(&Call::by_host(), id, patch).await.unwrap();
    };
    let gone = async |id| {
        let looking = async {
            while host.snapshots().one(id).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, looking).await.expect("it expires");
    };
    expire(used).await;
    expire(free).await;
    gone(free).await;
    let is_filled =
        host.servers().one(begun.resource.unwrap().id).await.unwrap().state == ServerState::Running;
    assert!(is_filled || host.snapshots().one(used).await.is_ok());
    go_on.send(()).unwrap();
    succeeded(&host, begun.operation.id).await;
    expire(used).await;
    gone(used).await;
    host.close().await;
}

#[tokio::test]
async fn one_whose_files_cannot_be_removed_holds_up_no_other_and_no_daemon() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let stuck = taken(&host, id, named("stuck", false)).await.id;
    let free = taken(&host, id, named("free", false)).await.id;
    std::fs::remove_dir_all(directory(&stage, stuck)).unwrap();
    std::fs::write(directory(&stage, stuck), b"no directory").unwrap();
    let soon = Some(Some(Time::from_unix_ms(Time::now().unix_ms() + 100)));
    for id in [stuck, free] {
        let patch = PatchSnapshot { expires_at: soon, ..PatchSnapshot::default() };
        host.snapshots().patch(&Call::by_host(), id, patch).await.unwrap();
    }
    let gone = async |host: &Host, id| {
        let looking = async {
            while host.snapshots().one(id).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, looking).await.expect("it expires");
    };
    gone(&host, free).await;
    assert_eq!(host.snapshots().one(stuck).await.unwrap().state, SnapshotState::Deleting);
    host.close().await;
    drop(host);

    let host = stage.open().await;
    assert_eq!(host.snapshots().one(stuck).await.unwrap().state, SnapshotState::Deleting);
    std::fs::remove_file(directory(&stage, stuck)).unwrap();
    gone(&host, stuck).await;
    host.close().await;
}
