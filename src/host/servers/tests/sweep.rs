//! The daemon dies at every checkpoint of a server's whole life, one after the other, and a client that repeats its
//! calls with their keys never notices: every call is carried out once and nothing is left over.
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use model::operation::{Operation, OperationState};
use model::server::{DeleteServer, ServerAction, ServerState, StopServer};
use model::snapshot::{CreateClones, CreateSnapshot, RestoreServer, SnapshotState};
use model::volume::FillMethod;
use model::{Code, Labels, ServerId, SnapshotId};

use wire::control::MachineState;

use super::snapshot::{backing, disk, named, taken, volume};
use super::{delete, delete_snapshot, nothing_left, settle};
use crate::fake_vmm::{FakeVmm, Guest};
use crate::stage::{SOON, Stage, created, keyed, server};
use crate::{Checkpoint, Fate, Host, Result};

/// Dies at the checkpoint of this number and lets all others pass.
struct DieAt {
    number: u32,
    passed: AtomicU32,
    points: Mutex<BTreeSet<&'static str>>,
}

impl Checkpoint for DieAt {
    fn reached(&self, point: &'static str) -> Fate {
        self.points.lock().unwrap().insert(point);
        let number = self.passed.fetch_add(1, Ordering::SeqCst) + 1;
        if number == self.number { Fate::Die } else { Fate::Live }
    }
}

/// What the client does, in order, and what the server is afterwards.
const LIFE: &[(&str, Option<ServerState>)] = &[
    ("create", Some(ServerState::Running)),
    ("pause", Some(ServerState::Paused)),
    ("resume", Some(ServerState::Running)),
    ("reset", Some(ServerState::Running)),
    ("reboot", Some(ServerState::Running)),
    ("stop", Some(ServerState::Stopped)),
    ("start", Some(ServerState::Running)),
    ("snapshot", Some(ServerState::Running)),
    ("forget", Some(ServerState::Running)),
    ("snapshot with memory", Some(ServerState::Running)),
    ("restore with memory", Some(ServerState::Running)),
    ("forget again", Some(ServerState::Running)),
    ("snapshot once more", Some(ServerState::Running)),
    ("restore", Some(ServerState::Running)),
    ("forget once more", Some(ServerState::Running)),
    ("hibernate", Some(ServerState::Hibernated)),
    ("wake", Some(ServerState::Running)),
    ("delete", None),
];

async fn call(host: &Host, verb: &str, id: Option<ServerId>) -> Result<(model::OperationId, ServerId)> {
    let servers = host.servers();
    if let ("restore" | "restore with memory", Some(id)) = (verb, id) {
        let spec = RestoreServer { snapshot: "now".to_owned(), stop: true };
        return Ok((servers.restore(&keyed(verb), id, spec).await?.body.operation.id, id));
    }
    if let ("snapshot" | "snapshot with memory" | "snapshot once more", Some(id)) = (verb, id) {
        let memory = verb == "snapshot with memory";
        let spec = CreateSnapshot { name: Some("now".parse().unwrap()), memory, ..Default::default() };
        return Ok((servers.snapshot(&keyed(verb), id, spec).await?.body.operation.id, id));
    }
    if let ("forget" | "forget again" | "forget once more", Some(id)) = (verb, id) {
        // The key is looked up before the snapshot is, so one that is gone already is no trouble.
        let page = host.snapshots().list(Default::default()).await?;
        let snapshot = page.items.first().map_or_else(|| SnapshotId(uuid::Uuid::nil()), |found| found.id);
        return Ok((host.snapshots().delete(&keyed(verb), snapshot).await?.body.operation.id, id));
    }
    let grace = |grace_s| StopServer { grace_s };
    let action = match verb {
        "pause" => ServerAction::Pause,
        "resume" => ServerAction::Resume,
        "reset" => ServerAction::Reboot(grace(0)),
        "reboot" => ServerAction::Reboot(grace(60)),
        "stop" => ServerAction::Stop(grace(60)),
        "hibernate" => ServerAction::Hibernate,
        _ => ServerAction::Start,
    };
    let answer = match (verb, id) {
        ("create", _) => servers.create(&keyed(verb), server("web1")).await?,
        ("delete", Some(id)) => servers.delete(&keyed(verb), id, DeleteServer::default()).await?,
        (_, Some(id)) => servers.act(&keyed(verb), id, action).await?,
        (_, None) => panic!("{verb} needs a server"),
    };
    Ok((answer.body.operation.id, answer.body.resource.expect("a server").id))
}

/// One call, carried through: repeated with its key until it is answered, then waited for.
async fn carried_out(host: &Host, verb: &str, id: Option<ServerId>) -> Result<ServerId> {
    let (operation, id) = call(host, verb, id).await?;
    let operation = wait(host, operation).await?;
    assert_eq!(operation.state, OperationState::Succeeded, "{verb}: {operation:?}");
    Ok(id)
}

/// Waits for the end of an operation, with a daemon that may have died.
async fn wait(host: &Host, id: model::OperationId) -> Result<Operation> {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        // A daemon that has died wakes nobody, so each wait is cut short to find out.
        let found = host.operations().one(id, Some(Duration::from_millis(50))).await?;
        if found.state.is_final() || tokio::time::Instant::now() > deadline {
            return Ok(found);
        }
    }
}

/// Waits until the server is in this state and nothing is under way; false when the daemon dies before, by what it
/// does in the background.
async fn rests(host: &Host, id: ServerId, state: ServerState) -> bool {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        match host.servers().one(id).await {
            Ok(server) if server.state == state && server.operation_id.is_none() => return !host.is_dead(),
            Err(cause) if cause.code == Code::Draining => return false,
            found => assert!(tokio::time::Instant::now() < deadline, "not {state:?}: {found:?}"),
        }
        tokio::task::yield_now().await;
    }
}

/// Lives the whole life with a daemon that dies at checkpoint `number`. Answers whether it died.
async fn live(number: u32, warm_shells: usize, points: Arc<Mutex<BTreeSet<&'static str>>>) -> bool {
    let mut stage = Stage::new();
    stage.warm_shells = warm_shells;
    let host = stage.open_with_image().await;
    host.close().await;
    drop(host);
    let checkpoint = Arc::new(DieAt { number, passed: AtomicU32::new(0), points: Default::default() });
    let mut died = false;
    let mut host = match stage.open_watched(checkpoint.clone()).await {
        Ok(host) => host,
        Err(cause) => {
            assert_eq!(cause.code, Code::Draining, "{}", cause.chain());
            died = true;
            stage.open().await
        }
    };
    let mut id = None;
    for (verb, state) in LIFE {
        loop {
            match carried_out(&host, verb, id).await {
                Ok(served) => {
                    id = Some(served);
                    break;
                }
                Err(cause) if cause.code == Code::Draining && !died => {
                    died = true;
                    host.close().await;
                    drop(host);
                    host = stage.open().await;
                }
                Err(cause) => panic!("checkpoint {number}, {verb}: {}", cause.chain()),
            }
        }
        if let (Some(state), Some(id)) = (state, id)
            && rests(&host, id, *state).await
        {
            // In one look: more are made ready meanwhile.
            let machines = stage.launch.of_servers().len();
            let is_off = matches!(state, ServerState::Stopped | ServerState::Hibernated);
            let wanted = if is_off { 0 } else { 1 };
            assert_eq!(machines, wanted, "checkpoint {number}, after {verb}");
            if matches!(*verb, "wake" | "restore with memory") {
                assert!(stage.launch.only().is_restored(), "checkpoint {number}: its memory is lost");
            }
            if verb.starts_with("snapshot") {
                let snapshots = host.snapshots().list(Default::default()).await.map(|page| page.items);
                let ready = |snapshot: &model::snapshot::Snapshot| snapshot.state == SnapshotState::Ready;
                assert!(
                    snapshots.is_ok_and(|all| all.len() == 1 && all.iter().all(ready)),
                    "checkpoint {number}"
                );
                assert_eq!(stage.launch.only().state(), MachineState::Running, "checkpoint {number}");
            }
            if *verb == "restore" {
                assert!(
                    !stage.launch.only().is_restored(),
                    "checkpoint {number}: restored from an earlier memory"
                );
            }
            if *verb == "reset" {
                assert_eq!(stage.launch.only().resets(), 1, "checkpoint {number}");
            }
            assert_eq!(stage.plumbing.scene().taps.len(), wanted, "checkpoint {number}, after {verb}");
        }
    }
    // A daemon that died behind the last answer is followed by one that cleans up.
    host.close().await;
    drop(host);
    let host = stage.open().await;
    nothing_left(&stage, &host).await;
    host.close().await;
    points.lock().unwrap().extend(checkpoint.points.lock().unwrap().iter());
    died
}

/// Has a daemon carry something out that may die at its checkpoint, and then the one that follows it, before which the host may lose
/// power, too. Answers that daemon, what came of it, and whether the first one died.
async fn survived<T>(
    stage: &Stage,
    checkpoint: Arc<DieAt>,
    act: impl Fn(&Host) -> BoxFuture<'_, Result<T>> + Sync,
    loses_power: impl Fn() -> bool + Sync,
) -> (Host, T, bool) {
    let mut has_died = false;
    let mut host = stage.open_watched(checkpoint).await;
    loop {
        let outcome = match &host {
            Ok(host) => act(host).await,
            Err(cause) => Err(cause.clone()),
        };
        match (outcome, host) {
            (Ok(done), Ok(host)) => return (host, done, has_died),
            (Ok(_), Err(cause)) => panic!("{}", cause.chain()),
            (Err(cause), left) => {
                assert!(cause.code == Code::Draining && !has_died, "{}", cause.chain());
                if let Ok(host) = left {
                    host.close().await;
                }
            }
        }
        has_died = true;
        if loses_power() {
            stage.launch.power_cycle().await;
        }
        host = Ok(stage.open().await);
    }
}

/// Clones a server with a daemon that dies at checkpoint `number`. Answers whether it died.
async fn clone(number: u32, warm_shells: usize) -> bool {
    let mut stage = Stage::new();
    stage.warm_shells = warm_shells;
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let snapshot = taken(&host, first.id, named("then", true)).await;
    host.close().await;
    drop(host);
    let checkpoint = Arc::new(DieAt { number, passed: AtomicU32::new(0), points: Default::default() });
    let id = snapshot.id;
    let (host, clone, died) = survived(&stage, checkpoint, |host| cloned(host, id).boxed(), || false).await;
    if rests(&host, clone, ServerState::Running).await {
        let machines = stage.launch.of_servers();
        assert_eq!(machines.len(), 2, "checkpoint {number}");
        assert!(machines.iter().all(|machine| machine.state() == MachineState::Running));
        let restored = machines.iter().filter(|machine| machine.is_restored()).count();
        assert_eq!(restored, 1, "checkpoint {number}: its memory is lost");
    }
    host.close().await;
    drop(host);
    let host = stage.open().await;
    for id in [first.id, clone] {
        delete(&host, id).await;
    }
    delete_snapshot(&host, snapshot.id).await;
    nothing_left(&stage, &host).await;
    host.close().await;
    died
}

async fn cloned(host: &Host, snapshot: SnapshotId) -> Result<ServerId> {
    let spec = CreateClones { name: "twin".parse().unwrap(), count: 1, labels: Labels::default() };
    let made = host.servers().clone_snapshot(&keyed("clone"), snapshot, spec).await?.body;
    let operation = wait(host, made.items[0].operation.as_ref().expect("an operation").id).await?;
    assert_eq!(operation.state, OperationState::Succeeded, "{operation:?}");
    Ok(made.items[0].server_id)
}

/// A create whose machine cannot be built, with a daemon that dies at checkpoint `number`. Answers whether it died.
async fn fail_to_create(number: u32) -> bool {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    host.close().await;
    drop(host);
    stage.launch.set_guest(Guest::CannotBoot);
    let checkpoint = Arc::new(DieAt { number, passed: AtomicU32::new(0), points: Default::default() });
    let (host, operation, died) =
        survived(&stage, checkpoint, |host| create_ended(host).boxed(), || false).await;
    assert_eq!(operation.state, OperationState::Failed, "checkpoint {number}");
    host.close().await;
    drop(host);
    let host = stage.open().await;
    nothing_left(&stage, &host).await;
    host.close().await;
    died
}

/// Creates a server on a host that loses power as its daemon is at checkpoint `number`. Answers whether it did.
async fn lose_power(number: u32) -> bool {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    host.close().await;
    drop(host);
    let checkpoint = Arc::new(DieAt { number, passed: AtomicU32::new(0), points: Default::default() });
    let has_written = AtomicBool::new(false);
    let cut = || {
        // What a guest writes when it has come to run, and what is lost before it may.
        let has_run = stage.launch.of_servers().iter().any(|vmm| vmm.state() == MachineState::Running);
        let is_flushed = checkpoint.points.lock().unwrap().contains("volume.flushed");
        assert!(is_flushed || !has_run, "checkpoint {number}: it runs on a disk that may be lost");
        for entry in std::fs::read_dir(stage.state_dir().join("volumes")).unwrap() {
            let path = entry.unwrap().path();
            if has_run {
                let disk = std::fs::File::options().write(true).open(&path).unwrap();
                disk.write_all_at(b"written", 0).unwrap();
                has_written.store(true, Ordering::SeqCst);
            } else if !is_flushed {
                std::fs::remove_file(&path).unwrap();
            }
        }
        true
    };
    let (host, id, died) =
        survived(&stage, checkpoint.clone(), |host| carried_out(host, "create", None).boxed(), cut).await;
    if died {
        // A record may say for a while yet that the machine of before runs.
        let end = tokio::time::Instant::now() + SOON;
        let runs = |vmms: &[Arc<FakeVmm>]| vmms.len() == 1 && vmms[0].state() == MachineState::Running;
        while !runs(&stage.launch.of_servers()) {
            assert!(tokio::time::Instant::now() < end, "checkpoint {number}: it does not run");
            tokio::task::yield_now().await;
        }
        let server = host.servers().one(id).await.unwrap();
        let disk = std::fs::read(volume(&stage, &server)).unwrap();
        // What the image's disk begins with.
        let wanted: &[u8] = if has_written.load(Ordering::SeqCst) { b"written" } else { b"disk" };
        assert!(disk.starts_with(wanted), "checkpoint {number}: the disk is not what it was");
    }
    host.close().await;
    drop(host);
    let host = stage.open().await;
    delete(&host, id).await;
    nothing_left(&stage, &host).await;
    host.close().await;
    died
}

/// Clones a snapshot on a host that loses power as its daemon is at checkpoint `number`: one of the two files of an overlay, or both,
/// where they were not flushed. Answers whether it did.
async fn lose_power_of_clone(number: u32) -> bool {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let snapshot = taken(&host, first.id, named("then", true)).await;
    let was = disk(&stage, &first);
    delete(&host, first.id).await;
    host.close().await;
    drop(host);
    let checkpoint = Arc::new(DieAt { number, passed: AtomicU32::new(0), points: Default::default() });
    let has_written = AtomicBool::new(false);
    let cut = || {
        let has_run = stage.launch.of_servers().iter().any(|vmm| vmm.state() == MachineState::Running);
        let is_flushed = checkpoint.points.lock().unwrap().contains("volume.flushed");
        assert!(is_flushed || !has_run, "checkpoint {number}: it runs on a disk that may be lost");
        for entry in std::fs::read_dir(stage.state_dir().join("volumes")).unwrap() {
            let path = entry.unwrap().path();
            let is_below = path.extension().is_some_and(|end| end == "backing");
            if has_run && !is_below {
                let disk = std::fs::File::options().write(true).open(&path).unwrap();
                disk.write_all_at(&[b'w'; 4096], 0).unwrap();
                has_written.store(true, Ordering::SeqCst);
            } else if !is_flushed && (number.is_multiple_of(3) || is_below == (number % 3 == 1)) {
                std::fs::remove_file(&path).unwrap();
            }
        }
        true
    };
    let survived = survived(&stage, checkpoint.clone(), |host| clone_ended(host, snapshot.id).boxed(), cut);
    let (host, (id, operation), died) = survived.await;
    let what = format!("checkpoint {number}: {operation:?}");
    // It may have died behind the last answer.
    host.close().await;
    drop(host);
    let host = stage.open().await;
    match host.servers().one(id).await {
        Ok(clone) if operation.state == OperationState::Succeeded => {
            let has = disk(&stage, &clone);
            let begins = if has_written.load(Ordering::SeqCst) {
                [b'w'; 4096]
            } else {
                was[..4096].try_into().unwrap()
            };
            assert!(
                has[..4096] == begins && has[4096..] == was[4096..],
                "{what}: the disk is not what it was"
            );
            delete(&host, id).await;
        }
        // Its memory was used up as the host lost its power.
        found => {
            assert!(died && operation.state == OperationState::Failed && found.is_err(), "{what}, {found:?}")
        }
    }
    delete_snapshot(&host, snapshot.id).await;
    host.close().await;
    drop(host);
    let host = stage.open().await;
    nothing_left(&stage, &host).await;
    host.close().await;
    died
}

async fn clone_ended(host: &Host, snapshot: SnapshotId) -> Result<(ServerId, Operation)> {
    let spec = CreateClones { name: "twin".parse().unwrap(), count: 1, labels: Labels::default() };
    let made = host.servers().clone_snapshot(&keyed("clone"), snapshot, spec).await?.body;
    let operation = wait(host, made.items[0].operation.as_ref().expect("an operation").id).await?;
    Ok((made.items[0].server_id, operation))
}

/// Settles a clone, or sets it back, with a daemon that dies at checkpoint `number`: its disk becomes its own. Answers whether it died.
async fn become_whole(number: u32, is_set_back: bool) -> bool {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let (clone, ..) = settle::clone(&stage, &host).await;
    let was = disk(&stage, &clone);
    taken(&host, clone.id, named("now", false)).await;
    host.close().await;
    drop(host);
    let checkpoint = Arc::new(DieAt { number, passed: AtomicU32::new(0), points: Default::default() });
    let survived = survived(&stage, checkpoint, |host| whole(host, clone.id, is_set_back).boxed(), || false);
    let (host, operation, died) = survived.await;
    let what = format!("checkpoint {number}: {operation:?}");
    assert_eq!(operation.state, OperationState::Succeeded, "{what}");
    assert!(rests(&host, clone.id, ServerState::Running).await || died, "{what}");
    host.close().await;
    drop(host);
    // One that died behind the last answer is followed by one that cleans up.
    let host = stage.open().await;
    assert!(!backing(&stage, &clone).exists() && disk(&stage, &clone) == was, "{what}");
    let volume = host.volumes().one(clone.volumes[0].volume_id).await.unwrap();
    assert_ne!(volume.filled_by, Some(FillMethod::Overlay), "{what}");
    let here = host.servers().one(clone.id).await.unwrap();
    assert!(!settle::can_settle(&here), "{what}");
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
    died
}

async fn whole(host: &Host, id: ServerId, is_set_back: bool) -> Result<Operation> {
    let operation = if is_set_back {
        let spec = RestoreServer { snapshot: "now".to_owned(), stop: true };
        host.servers().restore(&keyed("whole"), id, spec).await?.body.operation
    } else {
        host.servers().act(&keyed("whole"), id, settle::SETTLE).await?.body.operation
    };
    wait(host, operation.id).await
}

async fn create_ended(host: &Host) -> Result<Operation> {
    let (operation, _) = call(host, "create", None).await?;
    wait(host, operation).await
}

/// How many daemons die side by side: their time goes into waiting for the disk.
const SIDE_BY_SIDE: u32 = 8;

/// Tries checkpoint after checkpoint until a daemon lives through; answers how many there are.
async fn sweep<F>(live: impl Fn(u32) -> F) -> u32
where
    F: Future<Output = bool> + Send + 'static,
{
    for first in (1..1000).step_by(SIDE_BY_SIDE as usize) {
        let tasks: Vec<_> =
            (first..first + SIDE_BY_SIDE).map(|number| (number, tokio::spawn(live(number)))).collect();
        let mut survivor = None;
        for (number, task) in tasks {
            if !task.await.unwrap() {
                survivor = survivor.or(Some(number));
            }
        }
        if let Some(survivor) = survivor {
            return survivor - 1;
        }
    }
    panic!("the life does not end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_daemon_that_dies_anywhere_converges() {
    let points = Arc::new(Mutex::new(BTreeSet::new()));
    let seen = points.clone();
    let count = sweep(move |number| live(number, 0, seen.clone())).await;
    let points = points.lock().unwrap();
    assert!(count > 40, "only {count} checkpoints: the instrumentation is gone");
    assert!(points.len() > 10, "only these kinds of checkpoints: {points:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_daemon_that_dies_with_vmms_kept_ready_converges() {
    let count = sweep(|number| live(number, 2, Arc::default())).await;
    assert!(count > 40, "only {count} checkpoints: the instrumentation is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_clone_goes_on_from_the_memory_wherever_the_daemon_dies() {
    for warm_shells in [0, 2] {
        let count = sweep(move |number| clone(number, warm_shells)).await;
        assert!(count > 10, "only {count} checkpoints: the instrumentation is gone");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_has_its_whole_disk_wherever_its_host_loses_power() {
    let count = sweep(lose_power).await;
    assert!(count > 10, "only {count} checkpoints: the instrumentation is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_clone_has_its_whole_disk_wherever_its_host_loses_power() {
    let count = sweep(lose_power_of_clone).await;
    assert!(count > 10, "only {count} checkpoints: the instrumentation is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_clones_disk_becomes_its_own_wherever_the_daemon_dies() {
    for is_set_back in [false, true] {
        let count = sweep(move |number| become_whole(number, is_set_back)).await;
        assert!(count > 5, "only {count} checkpoints: the instrumentation is gone");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_create_that_fails_is_undone_wherever_the_daemon_dies() {
    let count = sweep(fail_to_create).await;
    assert!(count > 10, "only {count} checkpoints: the instrumentation is gone");
}
