//! Snapshots of a server that moves: they stay where they are, and are its own whenever it is there.
use std::os::unix::fs::FileExt;

use model::server::{ServerAction, ServerState};
use model::snapshot::{CreateSnapshot, FullReason, RestoreServer, Snapshot};

use super::moves::{Ground, has, listening};
use super::*;
use crate::servers::lifecycle;

async fn taken(host: &Host, id: ServerId, name: &str) -> Snapshot {
    let spec = serde_json::json!({ "name": name, "incremental": true });
    let spec: CreateSnapshot = serde_json::from_value(spec).unwrap();
    let accepted = host.servers().snapshot(&Call::by_host(), id, spec).await.unwrap().body;
    stage::succeeded(host, accepted.operation.id).await;
    host.snapshots().one(accepted.resource.unwrap().id).await.unwrap()
}

#[tokio::test]
async fn a_server_that_comes_back_goes_on_with_the_snapshots_it_has_left() {
    let ground = Ground::new().await;
    let [here, there] = [ground.stages[0].open().await, ground.stages[1].open().await];
    let id = ground.server;
    let volume = has(&here, id).await.unwrap().volumes[0].volume_id;
    let write = |at: usize, word: &[u8], place: u64| {
        let disk = std::fs::File::options().write(true).open(ground.disk(at, volume)).unwrap();
        disk.write_all_at(word, place).unwrap();
    };
    write(0, b"one", 0);
    write(0, b"kept", 512 << 10);
    let first = taken(&here, id, "first").await;
    for (source, target) in [(&here, &there), (&there, &here)] {
        let address = listening(target).await;
        let made = ticket(target, None).await.unwrap().ticket;
        let moved = source.migrations().migrate(&Call::by_host(), id, spec(address, made)).await.unwrap();
        stage::succeeded(source, moved.body.operation.id).await;
        stage::until(target, id, |server| server.state == ServerState::Stopped).await;
        if std::ptr::eq(target, &there) {
            write(1, b"two", 0);
            let elsewhere = taken(&there, id, "elsewhere").await;
            assert_eq!((elsewhere.server_id, elsewhere.full_because), (id, Some(FullReason::NoParent)));
        }
    }
    // What it has become elsewhere is new since the one that stayed here.
    let second = taken(&here, id, "second").await;
    assert_eq!((second.parent_id, second.full_because), (Some(first.id), None));
    assert!(second.inherited_bytes > 0, "{second:?}");
    for (snapshot, word) in [("first", b"one"), ("second", b"two")] {
        let asked = RestoreServer { snapshot: snapshot.to_owned(), stop: false };
        let accepted = here.servers().restore(&Call::by_host(), id, asked).await.unwrap();
        stage::succeeded(&here, accepted.body.operation.id).await;
        assert_eq!(&std::fs::read(ground.disk(0, volume)).unwrap()[..3], word);
    }
    let started = here.servers().act(&Call::by_host(), id, ServerAction::Start).await.unwrap();
    stage::succeeded(&here, started.body.operation.id).await;
    for host in [here, there] {
        host.close().await;
    }
}

#[tokio::test]
async fn a_host_that_gave_a_server_away_once_has_no_say_when_it_comes_from_another() {
    let stage = Stage::new();
    let host = stage.open().await;
    let server = ServerId::new();
    // The names are the other hosts' choice, and say nothing of what came first.
    let [former, latest, departing, other] = [4, 3, 2, 1].map(Uuid::from_u128);
    let elsewhere = ServerId::new();
    let insert = move |tx: &Tx<'_>| {
        let all = [(former, server, "target"), (latest, server, "target"), (departing, server, "source")];
        for (id, server, side) in all.into_iter().chain([(other, elsewhere, "target")]) {
            tx.execute(
                "INSERT INTO moves (id, server, body) VALUES (?1, ?2, json_object('side', ?3))",
                [id.to_string(), server.to_string(), side.to_owned()],
            )?;
        }
        let ids = [former, latest, other, Uuid::nil()];
        ids.into_iter().map(|id| moving::is_latest(tx, id)).collect::<Result<Vec<_>>>()
    };
    assert_eq!(host.store().write(insert).await.unwrap(), [false, true, true, false]);
    let side = serde_json::to_value(Side::Target).unwrap();
    assert_eq!(side, "target", "as it is asked for");
    host.close().await;
}

#[tokio::test]
async fn while_a_machine_goes_to_another_vmm_it_may_still_be_owed_memory() {
    let ground = Ground::with(ServerState::Running).await;
    let (host, id) = (ground.stages[0].open().await, ground.server);
    stage::until(&host, id, |server| server.state == ServerState::Running).await;
    // Its record says that it runs before its VMM is found.
    let known = async {
        while host.servers().lacks_memory(id).await.unwrap() != Some(false) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(stage::SOON, known).await.expect("its VMM says that nothing is owed");
    let upgrade = move |tx: &Tx<'_>| {
        let mut record: ServerRecord = records::one(tx, id.0)?;
        let vmm = record.life.phase.vmm().cloned().unwrap();
        record.life.phase = lifecycle::Phase::Upgrading { vmm, next: None, was_paused: false };
        records::save(tx, &mut record)
    };
    // Nobody is told of it, so it stays so.
    host.store().write(upgrade).await.unwrap();
    assert_eq!(host.servers().lacks_memory(id).await.unwrap(), None);
    assert!(host.servers().is_owed(id).await.unwrap(), "its source would let go of what it has");
    host.close().await;
}
