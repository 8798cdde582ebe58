//! Clones on fakes, through the facade.
use std::collections::BTreeSet;
use std::sync::Arc;

use model::operation::Resource;
use model::server::{
    BulkActions, CreateServer, Isolation, PatchServer, RestartPolicy, ServerAction, ServerState, StopServer,
};
use model::snapshot::{CreateClones, GuestIdentity, RestoreServer, Snapshot};
use model::{Code, Labels, OperationId, SnapshotId};
use wire::control::MachineState;
use wire::saved::{Digest, MemoryUse};

use super::snapshot::{DieAt, disk, named, taken, volume};
use super::{delete, delete_snapshot, nothing_left, stop};
use crate::fake_vmm::{FakeVmm, Guest};
use crate::servers::lifecycle::{
    Context, Event, Life, Phase, Push, Saved, SavedOf, Spawned, Then, Trouble, step,
};
use crate::stage::{SOON, Stage, created, ended, keyed, server, succeeded, until};
use crate::vmms::ProcessId;
use crate::{Call, Host, Result};

fn of(name: &str, count: u16) -> CreateClones {
    CreateClones { name: name.parse().unwrap(), count, labels: Labels::default() }
}

async fn cloned(host: &Host, snapshot: &Snapshot, spec: CreateClones) -> Result<BulkActions> {
    Ok(host.servers().clone_snapshot(&Call::by_host(), snapshot.id, spec).await?.body)
}

#[test]
fn a_memory_that_was_restored_beside_the_disk_is_used_up_with_the_record_of_both() {
    let snapshot = SnapshotId::new();
    let of = SavedOf::Clone { snapshot };
    let saved = Some(Saved { root: Digest([1; 32]), stored_bytes: 1, of });
    let life = Life { saved, ..Life::new(OperationId::new(), true) };
    let context = Context { now_ms: 7, policy: RestartPolicy::Always };
    let vmm = ProcessId { pid: 2, start_ticks: 0, boot_id: String::new() };
    let made = |restores| {
        let spawned = Spawned { vmm: vmm.clone(), sandbox: None, cage: None, build: None };
        let made = Event::Made { volumes: Vec::new(), vmm: Some(spawned), restores };
        step(&life, made, context).life
    };
    let restored = made(true);
    assert_eq!(restored.phase, Phase::Resuming { vmm: vmm.clone() });
    assert_eq!((restored.saved, restored.shares, restored.run), (None, Some(snapshot), life.run + 1));
    let empty = made(false);
    assert_eq!((&empty.phase, empty.saved), (&Phase::Starting { vmm: Some(vmm.clone()) }, saved));
    // Where it cannot be admitted it comes to nothing, and has not run.
    let trouble = Trouble { code: Code::NoCapacity, detail: "no memory".to_owned() };
    for life in [restored, empty] {
        let refused = step(&life, Event::StartFailed(trouble.clone()), context).life;
        let then = Then::Fail(trouble.clone());
        assert_eq!(refused.phase, Phase::Stopping { vmm: Some(vmm.clone()), push: Push::Force, then });
    }
}

#[tokio::test]
async fn clones_go_on_from_the_memory_and_are_servers_of_their_own() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    std::fs::write(volume(&stage, &first), b"as it was").unwrap();
    let snapshot = taken(&host, first.id, named("then", true)).await;
    std::fs::write(volume(&stage, &first), b"as it is now").unwrap();
    let made = cloned(&host, &snapshot, of("twin", 3)).await.unwrap();
    let names: Vec<&str> = made.items.iter().map(|item| item.name.as_str()).collect();
    assert_eq!(names, ["twin-1", "twin-2", "twin-3"]);
    let mut addresses = BTreeSet::from([(first.nics[0].mac.clone(), first.nics[0].ipv4)]);
    for item in &made.items {
        let operation = item.operation.as_ref().unwrap();
        assert!(operation.resources.contains(&Resource::Snapshot(snapshot.id)));
        succeeded(&host, operation.id).await;
        let clone = host.servers().one(item.server_id).await.unwrap();
        assert_eq!((clone.state, clone.identity), (ServerState::Running, Some(GuestIdentity::Unchanged)));
        assert_eq!((clone.vcpus, clone.memory_bytes), (first.vcpus, first.memory_bytes));
        assert!(addresses.insert((clone.nics[0].mac.clone(), clone.nics[0].ipv4)));
        assert!(disk(&stage, &clone).starts_with(b"as it was"));
        // Its guest hears of a seed of another size.
        let seed =
            |id: model::ServerId| stage.state_dir().join("servers").join(id.to_string()).join("seed.img");
        let sizes = [first.id, clone.id].map(|id| std::fs::metadata(seed(id)).unwrap().len());
        assert_ne!(sizes[0], sizes[1]);
    }
    let machines = stage.launch.alive();
    // The memory is there once, however many have it.
    let shares = |machine: &&Arc<FakeVmm>| machine.restored_how() == Some(MemoryUse::Private);
    assert_eq!(machines.iter().filter(shares).count(), 3);
    assert!(machines.iter().all(|machine| machine.state() == MachineState::Running));
    let shared = created(&host, server("web2")).await;
    assert_eq!(shared.identity, None);
    for id in made.items.iter().map(|item| item.server_id).chain([first.id, shared.id]) {
        delete(&host, id).await;
    }
    delete_snapshot(&host, snapshot.id).await;
    nothing_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn a_clone_is_renewed_by_its_guests_own_word() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let snapshot = taken(&host, first.id, named("then", true)).await;
    let made = cloned(&host, &snapshot, of("twin", 2)).await.unwrap();
    for item in &made.items {
        succeeded(&host, item.operation.as_ref().unwrap().id).await;
    }
    let [one, two] = [0, 1].map(|at: usize| made.items[at].server_id);
    // All say all of it: only what a guest says of itself counts, and a server that is no clone has nothing to say.
    for machine in stage.launch.alive() {
        machine.print(&format!("\r\ntoft: identity renewed {}\r\n", first.id));
        machine.print(&format!("\r\ntoft: identity renewed {one}\r\n"));
    }
    until(&host, one, |clone| clone.identity == Some(GuestIdentity::Renewed)).await;
    let identities = async |host: &Host| {
        let mut found = Vec::new();
        for id in [first.id, one, two] {
            found.push(host.servers().one(id).await.unwrap().identity);
        }
        found
    };
    let wanted = [None, Some(GuestIdentity::Renewed), Some(GuestIdentity::Unchanged)];
    assert_eq!(identities(&host).await, wanted);
    // What is said while no daemon listens is heard by the next one.
    host.close().await;
    drop(host);
    for machine in stage.launch.alive() {
        machine.print(&format!("\r\ntoft: identity renewed {two}\r\n"));
    }
    let host = stage.open().await;
    until(&host, two, |clone| clone.identity == Some(GuestIdentity::Renewed)).await;
    assert_eq!(identities(&host).await[..2], wanted[..2]);
    host.close().await;
}

#[tokio::test]
async fn all_clones_of_a_call_are_recorded_or_none_and_one_that_fails_leaves_nothing() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    let disk = taken(&host, first.id, named("disk", false)).await;
    let problem = cloned(&host, &disk, of("twin", 1)).await.unwrap_err();
    assert_eq!(problem.code, Code::WrongState);
    assert!(problem.detail.contains("no memory to go on from"), "{}", problem.detail);
    let snapshot = taken(&host, first.id, named("then", true)).await;
    for count in [0, 101] {
        let problem = cloned(&host, &snapshot, of("twin", count)).await.unwrap_err();
        assert_eq!(problem.errors[0].pointer, "/count");
    }
    // The last name of three is taken.
    let taken_name = created(&host, server("twin-3")).await;
    assert_eq!(cloned(&host, &snapshot, of("twin", 3)).await.unwrap_err().code, Code::AlreadyExists);
    assert_eq!(host.servers().list(Default::default()).await.unwrap().items.len(), 2);
    delete(&host, taken_name.id).await;

    let call = keyed("clone");
    let once = host.servers().clone_snapshot(&call, snapshot.id, of("twin", 2)).await.unwrap();
    let twice = host.servers().clone_snapshot(&call, snapshot.id, of("twin", 2)).await.unwrap();
    assert!(twice.replayed && twice.body == once.body);
    for item in &once.body.items {
        succeeded(&host, item.operation.as_ref().unwrap().id).await;
        delete(&host, item.server_id).await;
    }

    stage.launch.set_guest(Guest::CannotBoot);
    let made = cloned(&host, &snapshot, of("twin", 1)).await.unwrap();
    let operation = ended(&host, made.items[0].operation.as_ref().unwrap().id).await;
    assert!(operation.error.is_some());
    let gone = host.servers().one(made.items[0].server_id).await.unwrap_err();
    assert_eq!(gone.code, Code::NotFound);
    host.close().await;
}

/// Its machine is not built beside its disk, but when its walls have been looked at.
#[tokio::test]
async fn a_strict_clone_that_cannot_be_built_comes_to_nothing_and_no_memory_of_it_is_spoken_of() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let strict = CreateServer { isolation: Isolation::Strict, ..server("web1") };
    let first = created(&host, strict).await;
    let snapshot = taken(&host, first.id, named("then", true)).await;
    stage.launch.set_guest(Guest::CannotBoot);
    let made = cloned(&host, &snapshot, of("twin", 1)).await.unwrap();
    let operation = ended(&host, made.items[0].operation.as_ref().unwrap().id).await;
    let detail = operation.error.unwrap().detail;
    assert!(detail.contains("KVM_CREATE_VM") && !detail.contains("grace_s"), "{detail}");
    // A server that is there has it still.
    let back = RestoreServer { snapshot: snapshot.id.to_string(), stop: true };
    let restored = host.servers().restore(&Call::by_host(), first.id, back).await.unwrap();
    let detail = ended(&host, restored.body.operation.id).await.error.unwrap().detail;
    assert!(detail.contains("KVM_CREATE_VM") && detail.contains("grace_s"), "{detail}");
    host.close().await;
}

async fn cloned_server(host: &Host, id: model::ServerId, spec: CreateClones) -> Result<BulkActions> {
    Ok(host.servers().clone_server(&Call::by_host(), id, spec).await?.body)
}

async fn no_snapshot_left(stage: &Stage, host: &Host) {
    let end = tokio::time::Instant::now() + SOON;
    let directory = stage.state_dir().join("snapshots");
    while !host.snapshots().list(Default::default()).await.unwrap().items.is_empty()
        || std::fs::read_dir(&directory).unwrap().count() > 0
    {
        assert!(tokio::time::Instant::now() < end, "the snapshot stays");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_server_that_runs_is_cloned_and_what_was_kept_for_it_goes() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    assert!(first.allowed_actions.iter().any(|action| action == "clone"));
    std::fs::write(volume(&stage, &first), b"as it was").unwrap();
    let made = cloned_server(&host, first.id, of("twin", 2)).await.unwrap();
    let larger = PatchServer { vcpus: Some(2), ..PatchServer::default() };
    let problem = host.servers().patch(&Call::by_host(), made.items[0].server_id, larger).await.unwrap_err();
    assert_eq!(problem.code, Code::WrongState);
    for item in &made.items {
        succeeded(&host, item.operation.as_ref().unwrap().id).await;
        let clone = host.servers().one(item.server_id).await.unwrap();
        assert_eq!((clone.state, clone.identity), (ServerState::Running, Some(GuestIdentity::Unchanged)));
        assert!(disk(&stage, &clone).starts_with(b"as it was"));
    }
    let machines = stage.launch.alive();
    assert_eq!(machines.iter().filter(|machine| machine.is_restored()).count(), 2);
    assert!(machines.iter().all(|machine| machine.state() == MachineState::Running));
    no_snapshot_left(&stage, &host).await;
    // Without a machine there is nothing to go on from, and a name that is taken makes none.
    let problem = cloned_server(&host, first.id, of("twin", 2)).await.unwrap_err();
    assert_eq!(problem.code, Code::AlreadyExists);
    let stopped = host.servers().act(&Call::by_host(), first.id, stop(0)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    let problem = cloned_server(&host, first.id, of("other", 1)).await.unwrap_err();
    assert_eq!(problem.code, Code::WrongState);
    assert_eq!(host.servers().list(Default::default()).await.unwrap().items.len(), 3);
    no_snapshot_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn clones_of_a_server_whose_memory_cannot_be_saved_come_to_nothing() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    stage.launch.set_guest(Guest::CannotSave);
    let second = created(&host, server("web2")).await;
    let made = cloned_server(&host, second.id, of("twin", 2)).await.unwrap();
    for item in &made.items {
        let operation = ended(&host, item.operation.as_ref().unwrap().id).await;
        assert!(operation.error.unwrap().detail.contains("no snapshot could be taken of server web2"));
        assert_eq!(host.servers().one(item.server_id).await.unwrap_err().code, Code::NotFound);
    }
    // It was parked for the moment that could not be saved.
    until(&host, second.id, |server| server.state == ServerState::Running).await;
    let left: Vec<_> = host.servers().list(Default::default()).await.unwrap().items;
    assert_eq!(left.iter().map(|server| server.id).collect::<Vec<_>>(), [first.id, second.id]);
    let states: Vec<_> = left.iter().map(|server| (server.state, &server.state_reason)).collect();
    assert!(left.iter().all(|server| server.state == ServerState::Running), "{states:?}");
    no_snapshot_left(&stage, &host).await;
    host.close().await;
}

/// A daemon that died as it copied a server that is being cloned; its VMM lives. The clone and the operation that takes the snapshot.
async fn died_as_it_was_cloned(stage: &Stage) -> (model::ServerId, BulkActions) {
    let host = stage.open_with_image().await;
    let first = created(&host, server("web1")).await;
    host.close().await;
    drop(host);
    let host = stage.open_watched(Arc::new(DieAt("server.snapshot_copied"))).await.unwrap();
    let made = cloned_server(&host, first.id, of("twin", 2)).await.unwrap();
    while !host.is_dead() {
        tokio::task::yield_now().await;
    }
    host.close().await;
    assert_eq!(std::fs::read_dir(stage.state_dir().join("snapshots")).unwrap().count(), 1);
    (first.id, made)
}

async fn come_to_nothing(host: &Host, made: &BulkActions) {
    for item in &made.items {
        let operation = ended(host, item.operation.as_ref().unwrap().id).await;
        assert!(operation.error.unwrap().detail.contains("no snapshot could be taken of server web1"));
    }
}

async fn snapshot_of(host: &Host, id: model::ServerId) -> model::OperationId {
    host.servers().one(id).await.unwrap().operation_id.expect("a snapshot is being taken")
}

/// The VMM, once it has left a greeting without an answer.
async fn unanswering(stage: &Stage) -> Arc<FakeVmm> {
    let vmm = stage.launch.only();
    while vmm.unanswered() == 0 {
        tokio::task::yield_now().await;
    }
    vmm
}

/// Asks for a cancellation as the server's VMM leaves a greeting without an answer, and then ends the VMM.
async fn cancelled_unseen(stage: &Stage, host: &Host, operation: model::OperationId) {
    let vmm = unanswering(stage).await;
    host.operations().cancel(&Call::by_host(), operation).await.unwrap();
    vmm.kill();
}

#[tokio::test]
async fn a_machine_that_ended_as_no_daemon_copied_it_leaves_no_snapshot_and_no_clones() {
    let stage = Stage::new();
    let (_, made) = died_as_it_was_cloned(&stage).await;
    stage.launch.power_cycle().await;
    let host = stage.open().await;
    come_to_nothing(&host, &made).await;
    no_snapshot_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn a_snapshot_that_is_given_up_before_its_server_is_found_again_leaves_nothing() {
    let stage = Stage::new();
    let (id, made) = died_as_it_was_cloned(&stage).await;
    stage.launch.only().fall_silent();
    let host = stage.open().await;
    cancelled_unseen(&stage, &host, snapshot_of(&host, id).await).await;
    come_to_nothing(&host, &made).await;
    no_snapshot_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn clones_do_not_wait_for_a_snapshot_that_is_given_up_unseen() {
    for stops_all in [false, true] {
        let stage = Stage::new();
        let host = stage.open_with_image().await;
        let labels: Labels = serde_json::from_value(serde_json::json!({ "role": "web" })).unwrap();
        let first = created(&host, CreateServer { labels, ..server("web1") }).await;
        host.close().await;
        drop(host);
        stage.launch.only().fall_silent();
        let host = stage.open().await;
        let made = cloned_server(&host, first.id, of("twin", 2)).await.unwrap();
        let operation = snapshot_of(&host, first.id).await;
        if stops_all {
            let vmm = unanswering(&stage).await;
            let force = ServerAction::Stop(StopServer { grace_s: 0 });
            host.servers().act_on_all(&Call::by_host(), "role=web".to_owned(), force).await.unwrap();
            vmm.kill();
        } else {
            cancelled_unseen(&stage, &host, operation).await;
        }
        come_to_nothing(&host, &made).await;
        no_snapshot_left(&stage, &host).await;
        host.close().await;
    }
}
