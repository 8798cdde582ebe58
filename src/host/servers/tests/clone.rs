//! Clones on fakes, through the facade.
use std::collections::BTreeSet;
use std::sync::Arc;

use model::operation::Resource;
use model::server::{BulkActions, ServerState};
use model::snapshot::{CloneSnapshot, GuestIdentity, Snapshot};
use model::{Code, Labels};
use wire::control::MachineState;
use wire::saved::MemoryUse;

use super::nothing_left;
use super::snapshot::{named, taken, volume};
use crate::fake_vmm::{FakeVmm, Guest};
use crate::stage::{Stage, created, ended, keyed, server, succeeded};
use crate::{Call, Host, Result};

fn of(name: &str, count: u16) -> CloneSnapshot {
    CloneSnapshot { name: name.parse().unwrap(), count, labels: Labels::default() }
}

async fn cloned(host: &Host, snapshot: &Snapshot, spec: CloneSnapshot) -> Result<BulkActions> {
    Ok(host.servers().clone_snapshot(&Call::by_host(), snapshot.id, spec).await?.body)
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
        assert!(std::fs::read(volume(&stage, &clone)).unwrap().starts_with(b"as it was"));
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
        let deleted = host.servers().delete(&Call::by_host(), id, Default::default()).await.unwrap();
        succeeded(&host, deleted.body.operation.id).await;
    }
    let deleted = host.snapshots().delete(&Call::by_host(), snapshot.id).await.unwrap();
    succeeded(&host, deleted.body.operation.id).await;
    nothing_left(&stage, &host).await;
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
    let deleted = host.servers().delete(&Call::by_host(), taken_name.id, Default::default()).await.unwrap();
    succeeded(&host, deleted.body.operation.id).await;

    let call = keyed("clone");
    let once = host.servers().clone_snapshot(&call, snapshot.id, of("twin", 2)).await.unwrap();
    let twice = host.servers().clone_snapshot(&call, snapshot.id, of("twin", 2)).await.unwrap();
    assert!(twice.replayed && twice.body == once.body);
    for item in &once.body.items {
        succeeded(&host, item.operation.as_ref().unwrap().id).await;
        let deleted =
            host.servers().delete(&Call::by_host(), item.server_id, Default::default()).await.unwrap();
        succeeded(&host, deleted.body.operation.id).await;
    }

    stage.launch.set_guest(Guest::CannotBoot);
    let made = cloned(&host, &snapshot, of("twin", 1)).await.unwrap();
    let operation = ended(&host, made.items[0].operation.as_ref().unwrap().id).await;
    assert!(operation.error.is_some());
    let gone = host.servers().one(made.items[0].server_id).await.unwrap_err();
    assert_eq!(gone.code, Code::NotFound);
    host.close().await;
}
