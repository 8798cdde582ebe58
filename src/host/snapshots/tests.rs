//! Snapshots that leave a host and come into another, on fakes.
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use model::operation::{Accepted, OperationState, Resource};
use model::server::{CreateServer, ServerState};
use model::snapshot::{CreateClones, CreateSnapshot, ImportSnapshot, Snapshot, SnapshotState};
use model::{Code, Labels, SnapshotId};
use tokio::io::AsyncReadExt;

use super::bundle::{Head, read_head};
use super::record::IMPORT;
use crate::stage::{SOON, Stage, created, keyed, server, succeeded};
use crate::{Call, Checkpoint, Fate, Host};

fn directory(stage: &Stage, id: SnapshotId) -> PathBuf {
    stage.state_dir().join("snapshots").join(id.to_string())
}

fn named(name: &str) -> ImportSnapshot {
    ImportSnapshot { name: Some(name.parse().unwrap()) }
}

/// A server's snapshot with memory, on a host of its own, and the stream it is exported as.
async fn exported(stage: &Stage) -> (Host, Snapshot, Vec<u8>) {
    let host = stage.open_with_image().await;
    let spec = CreateServer { user_data: Some("#!/bin/sh".to_owned()), ..server("web1") };
    let id = created(&host, spec).await.id;
    let spec = CreateSnapshot {
        name: Some("kept".parse().unwrap()),
        description: "before the upgrade".to_owned(),
        memory: true,
        ..CreateSnapshot::default()
    };
    let accepted = host.servers().snapshot(&Call::by_host(), id, spec).await.unwrap().body;
    succeeded(&host, accepted.operation.id).await;
    let snapshot = host.snapshots().one(accepted.resource.unwrap().id).await.unwrap();
    let stream = stream(&host, snapshot.id).await;
    (host, snapshot, stream)
}

async fn stream(host: &Host, id: SnapshotId) -> Vec<u8> {
    let mut export = host.snapshots().export(id).await.unwrap();
    let mut stream = Vec::new();
    while let Some(piece) = export.next().await {
        stream.extend(piece.unwrap());
    }
    assert_eq!(stream.len() as u64, export.bytes);
    stream
}

#[tokio::test]
async fn what_one_host_exports_another_takes_in_and_makes_servers_of() {
    let (here, there) = (Stage::new(), Stage::new());
    let (host, snapshot, stream_from_here) = exported(&here).await;
    let other = there.open_with_image().await;
    let accepted = import(&other, &stream_from_here).await.unwrap().body;
    assert_eq!(
        (accepted.operation.kind.as_str(), accepted.operation.state),
        (IMPORT, OperationState::Succeeded)
    );
    let arrived = accepted.resource.unwrap();
    assert_eq!(arrived.state, SnapshotState::Ready);
    assert!(arrived.imported && !snapshot.imported);
    assert_eq!(arrived.guest_writes_delayed, None);
    assert_ne!((arrived.id, arrived.image_id), (snapshot.id, snapshot.image_id));
    let same = |shown: &Snapshot| Snapshot {
        id: snapshot.id,
        image_id: snapshot.image_id,
        created_at: snapshot.created_at,
        updated_at: snapshot.updated_at,
        generation: snapshot.generation,
        imported: false,
        stored_bytes: 0,
        volumes: Vec::new(),
        // Of the guest that was here, not of what is in the stream.
        guest_writes_delayed: None,
        guest_write_delay_us_max: None,
        guest_write_delay_us_sum: None,
        ..shown.clone()
    };
    assert_eq!(same(&arrived), same(&snapshot));
    for file in ["machine.state", "machine.memory", "disk0.raw"] {
        let read = |stage: &Stage, id| std::fs::read(directory(stage, id).join(file)).unwrap();
        assert!(read(&here, snapshot.id) == read(&there, arrived.id), "{file} differs");
    }
    // The same again, but for when it was made: nothing was lost on the way.
    assert_eq!(stream(&other, arrived.id).await, stream_from_here);

    let made =
        created(&other, CreateServer { image: None, snapshot: Some("kept".to_owned()), ..server("web2") });
    assert_eq!(made.await.state, ServerState::Running);
    // A repeated call is told of the first, and reads no more than the head.
    let again = other.snapshots().import(&keyed("one"), ImportSnapshot::default(), &b""[..]).await;
    assert_eq!(again.unwrap_err().code, Code::SnapshotCorrupt);
    let again = import(&other, &stream_from_here).await.unwrap();
    assert!(again.replayed && again.body.resource.unwrap().id == arrived.id);
    host.close().await;
    other.close().await;
}

/// Nothing of what somebody kept is lost when it comes into a host: what that exports says the same.
#[tokio::test]
async fn what_was_kept_of_every_version_comes_in_and_servers_are_made_of_it() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshots/bundle/golden");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let stage = Stage::new();
        // As its guest was shown.
        stage.launch.shows(&["avx"]);
        let host = stage.open_with_image().await;
        let golden = std::fs::read(entry.unwrap().path()).unwrap();
        let head = async |stream: &[u8]| read_head(&mut sent(stream)).await.unwrap().0;
        let told = head(&golden).await;
        // The image that its server boots from.
        let sha256 = told.image.sha256.clone();
        let rename = move |tx: &crate::store::Tx<'_>| {
            Ok(tx.execute("UPDATE images SET body = json_set(body, '$.sha256', ?1)", [sha256])?)
        };
        assert_eq!(host.store().write(rename).await.unwrap(), 1);
        let arrived = import(&host, &golden).await.unwrap().body.resource.unwrap();
        assert_eq!((arrived.state, arrived.memory, arrived.imported), (SnapshotState::Ready, true, true));
        let again = head(&stream(&host, arrived.id).await).await;
        let same = Head { image: told.image.clone(), data_bytes: told.data_bytes, ..again };
        assert_eq!(same, told);
        let spec = CreateClones { name: "web2".parse().unwrap(), count: 1, labels: Labels::default() };
        let made = host.servers().clone_snapshot(&Call::by_host(), arrived.id, spec).await.unwrap().body;
        succeeded(&host, made.items[0].operation.as_ref().unwrap().id).await;
        assert!(stage.launch.only().is_restored(), "its memory");
        host.close().await;
        count += 1;
    }
    assert!(count >= 1);
}

fn sent(stream: &[u8]) -> std::io::Cursor<Vec<u8>> {
    std::io::Cursor::new(stream.to_vec())
}

/// Takes in what a host has exported, with one key.
async fn import(host: &Host, stream: &[u8]) -> crate::Result<crate::Answer<Accepted<Snapshot>>> {
    let import = host.snapshots();
    tokio::time::timeout(SOON, import.import(&keyed("one"), ImportSnapshot::default(), sent(stream)))
        .await
        .expect("an end")
}

async fn refused(host: &Host, stage: &Stage, spec: ImportSnapshot, stream: &[u8]) -> crate::Error {
    let refused = host.snapshots().import(&Call::by_host(), spec, sent(stream)).await.unwrap_err();
    assert_eq!(std::fs::read_dir(stage.state_dir().join("snapshots")).unwrap().count(), 0, "{refused:?}");
    assert!(host.snapshots().list(Default::default()).await.unwrap().items.is_empty());
    refused
}

#[tokio::test]
async fn what_is_missing_here_is_told_and_nothing_is_kept() {
    let (here, there) = (Stage::new(), Stage::new());
    let (host, _, stream) = exported(&here).await;
    let empty = there.open().await;
    let missing = refused(&empty, &there, ImportSnapshot::default(), &stream).await;
    assert_eq!((missing.code, missing.errors[0].pointer.as_str()), (Code::Invalid, "/image"));
    assert!(missing.detail.contains("image tiny"), "{}", missing.detail);
    crate::stage::import(&empty).await;
    let cut = refused(&empty, &there, named("cut"), &stream[..stream.len() - 1]).await;
    assert_eq!(cut.code, Code::SnapshotCorrupt);
    let mut changed = stream.clone();
    let end = changed.len() - 1;
    changed[end] ^= 1;
    let changed = refused(&empty, &there, named("changed"), &changed).await;
    assert_eq!(changed.code, Code::SnapshotCorrupt);
    let operation = empty.operations().one(changed.operation_id.unwrap(), None).await.unwrap();
    assert_eq!(
        (operation.state, operation.error.unwrap().code),
        (OperationState::Failed, Code::SnapshotCorrupt)
    );
    host.close().await;
    empty.close().await;
}

#[tokio::test]
async fn whoever_cancels_an_import_is_left_nothing_of_it() {
    let (here, there) = (Stage::new(), Stage::new());
    let (host, _, stream) = exported(&here).await;
    let other = there.open_with_image().await;
    // The second half never comes.
    let (mut sender, body) = tokio::io::duplex(1 << 16);
    let importing = {
        let other = other.clone();
        tokio::spawn(async move {
            other.snapshots().import(&Call::by_host(), ImportSnapshot::default(), body).await
        })
    };
    let half = stream.len() / 2;
    tokio::io::AsyncWriteExt::write_all(&mut sender, &stream[..half]).await.unwrap();
    let find = async {
        loop {
            let all = other.operations().list(Default::default()).await.unwrap().items;
            if let Some(found) = all.into_iter().find(|operation| operation.kind == IMPORT) {
                return found;
            }
            tokio::task::yield_now().await;
        }
    };
    let operation = tokio::time::timeout(SOON, find).await.expect("an import");
    let id = match operation.resources[..] {
        [Resource::Snapshot(id)] => id,
        ref other => panic!("{other:?}"),
    };
    let busy = other.snapshots().delete(&Call::by_host(), id).await.unwrap_err();
    assert_eq!((busy.code, busy.operation_id), (Code::WrongState, Some(operation.id)));
    assert_eq!(other.snapshots().export(id).await.err().unwrap().code, Code::WrongState);
    other.operations().cancel(&Call::by_host(), operation.id).await.unwrap();
    assert_eq!(importing.await.unwrap().unwrap_err().code, Code::WrongState);
    let ended = other.operations().one(operation.id, Some(SOON)).await.unwrap();
    assert_eq!(ended.state, OperationState::Cancelled);
    assert_eq!(std::fs::read_dir(there.state_dir().join("snapshots")).unwrap().count(), 0);
    assert!(other.snapshots().list(Default::default()).await.unwrap().items.is_empty());
    // Nobody reads on.
    drop(sender);
    host.close().await;
    other.close().await;
}

/// Dies at the n-th point.
struct DieAt(AtomicUsize);

impl Checkpoint for DieAt {
    fn reached(&self, _point: &'static str) -> Fate {
        match self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(1) | Err(_) => Fate::Die,
            Ok(_) => Fate::Live,
        }
    }
}

#[tokio::test]
async fn wherever_the_daemon_dies_a_snapshot_is_whole_or_not_there() {
    let here = Stage::new();
    let (host, _, stream) = exported(&here).await;
    host.close().await;
    let (mut whole, mut gone) = (0, 0);
    for point in 1.. {
        let there = Stage::new();
        there.open_with_image().await.close().await;
        let opened = there.open_watched(Arc::new(DieAt(AtomicUsize::new(point)))).await;
        // Some points belong to the opening.
        let Ok(other) = opened else { continue };
        let died = import(&other, &stream).await.is_err();
        let is_over = !other.is_dead();
        other.close().await;
        drop(other);
        let other = there.open().await;
        let left = other.snapshots().list(Default::default()).await.unwrap().items;
        let operations = other.operations().list(Default::default()).await.unwrap().items;
        let ended = operations.iter().filter(|operation| operation.kind == IMPORT);
        for operation in ended {
            let wanted = if left.is_empty() { OperationState::Failed } else { OperationState::Succeeded };
            assert_eq!(operation.state, wanted, "after point {point}");
        }
        match &left[..] {
            [] => gone += 1,
            [snapshot] => {
                assert_eq!(snapshot.state, SnapshotState::Ready, "after point {point}");
                whole += 1;
            }
            more => panic!("{more:?}"),
        }
        let files = std::fs::read_dir(there.state_dir().join("snapshots")).unwrap().count();
        assert_eq!(files, left.len(), "after point {point}");
        assert!(died || !left.is_empty(), "acknowledged and lost after point {point}");
        other.close().await;
        if is_over {
            break;
        }
    }
    assert!(gone > 2 && whole > 0, "{gone} gone, {whole} whole");
}

#[tokio::test]
async fn an_export_goes_on_while_its_snapshot_is_deleted() {
    let here = Stage::new();
    let (host, snapshot, before) = exported(&here).await;
    let mut export = host.snapshots().export(snapshot.id).await.unwrap();
    let deleted = host.snapshots().delete(&Call::by_host(), snapshot.id).await.unwrap();
    succeeded(&host, deleted.body.operation.id).await;
    let mut stream = Vec::new();
    while let Some(piece) = export.next().await {
        AsyncReadExt::read_to_end(&mut &piece.unwrap()[..], &mut stream).await.unwrap();
    }
    assert!(stream == before);
    host.close().await;
}

#[tokio::test]
async fn what_cannot_be_removed_of_one_that_was_given_up_is_tried_again() {
    let stage = Stage::new();
    let host = stage.open().await;
    let id = SnapshotId::new();
    let place = directory(&stage, id);
    std::fs::write(&place, b"no directory").unwrap();
    // Its server has other things to do.
    host.snapshots().tidy(id).await.unwrap();
    std::fs::remove_file(&place).unwrap();
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("disk0.raw"), b"what was copied").unwrap();
    host.snapshots().let_go();
    let removed = async {
        while place.exists() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, removed).await.expect("it is removed");
    host.close().await;
}
