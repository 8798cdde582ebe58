//! Chains of snapshots on fakes: whatever is taken, deleted and killed, each that is there is what it was, and nothing is kept
//! that none of them needs.
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use model::operation::OperationState;
use model::server::{CreateServer, Server};
use model::snapshot::{CreateClones, CreateSnapshot, FullReason, PatchSnapshot, RestoreServer, Snapshot};
use model::{Code, ServerId, SnapshotId, Time};
use sha2::{Digest as _, Sha256};

use super::super::{MEMORY, SnapshotRecord, chain, disk_name};
use crate::fake_vmm::Guest;
use crate::stage::{SOON, Stage, created, keyed, server, succeeded};
use crate::store::records;
use crate::volumes::fill::Extents;
use crate::{Call, Checkpoint, Fate, Host};

const BLOCK: u64 = 64 << 10;
const DISK_BYTES: u64 = 1 << 20;

/// What a server has at a moment: a byte for each block of its disk and each page of its memory that was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Content {
    disk: BTreeMap<u64, u8>,
    memory: Option<BTreeMap<u64, u8>>,
}

fn incremental(name: &str, memory: bool) -> CreateSnapshot {
    let name = Some(name.parse().unwrap());
    CreateSnapshot { name, memory, incremental: true, ..CreateSnapshot::default() }
}

async fn taken(host: &Host, id: ServerId, spec: CreateSnapshot) -> Snapshot {
    let accepted = host.servers().snapshot(&Call::by_host(), id, spec).await.unwrap().body;
    succeeded(host, accepted.operation.id).await;
    host.snapshots().one(accepted.resource.unwrap().id).await.unwrap()
}

async fn deleted(host: &Host, id: SnapshotId) {
    let accepted = host.snapshots().delete(&Call::by_host(), id).await.unwrap().body;
    succeeded(host, accepted.operation.id).await;
}

/// What the guest writes to its disk.
fn write_block(stage: &Stage, server: &Server, block: u64, value: u8) {
    let path = stage.state_dir().join("volumes").join(format!("{}.raw", server.volumes[0].volume_id));
    let volume = std::fs::File::options().write(true).open(path).unwrap();
    volume.write_all_at(&[value; BLOCK as usize], block * BLOCK).unwrap();
}

/// What a snapshot holds, wherever it lies.
async fn content(host: &Host, id: SnapshotId) -> Content {
    let core = &host.snapshots().core;
    let find = move |all: &rusqlite::Connection| records::one::<SnapshotRecord>(all, id.0);
    let record = core.store.read(find).await.unwrap();
    let by_unit = |name: &str, unit: u64| {
        let layers = chain::open(&core.dirs, id, &record.chain, name).unwrap();
        let mut found = BTreeMap::new();
        for data in layers.data(0..layers.own.metadata().unwrap().len()) {
            let (range, _) = data.unwrap();
            for at in (range.start / unit * unit..range.end).step_by(unit as usize) {
                let mut bytes = vec![0; unit as usize];
                layers.read_exact_at(&mut bytes, at).unwrap();
                // What the image brings is not of one byte.
                let is_one = bytes.iter().all(|byte| *byte == bytes[0]);
                let value = if is_one { bytes[0] } else { Sha256::digest(&bytes)[0] | 0x80 };
                if value != 0 {
                    found.insert(at / unit, value);
                }
            }
        }
        found
    };
    let memory = record.shown.memory.then(|| by_unit(MEMORY, 4096));
    Content { disk: by_unit(&disk_name(0), BLOCK), memory }
}

/// Bytes of data in all files below `snapshots`.
fn kept_bytes(stage: &Stage) -> u64 {
    let mut bytes = 0;
    for directory in std::fs::read_dir(stage.state_dir().join("snapshots")).unwrap() {
        for file in std::fs::read_dir(directory.unwrap().path()).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            if name == MEMORY || name == disk_name(0) {
                // Not its blocks: those that say where its data are count as well.
                let (length, open) =
                    (file.metadata().unwrap().len(), std::fs::File::open(file.path()).unwrap());
                bytes += Extents::of(&open, length)
                    .map(|data| data.unwrap())
                    .map(|data| data.end - data.start)
                    .sum::<u64>();
            }
        }
    }
    bytes
}

/// Waits until no more is kept than the snapshots that are there need: each thing of a file once, and for full ones all of
/// theirs.
async fn nothing_unneeded(stage: &Stage, host: &Host) {
    let core = &host.snapshots().core;
    let all: Vec<SnapshotRecord> = core.store.read(records::all).await.unwrap();
    let mut needed: BTreeSet<(SnapshotId, String, u64)> = BTreeSet::new();
    let mut directories = BTreeSet::new();
    for record in &all {
        for name in [MEMORY.to_owned(), disk_name(0)] {
            if name == MEMORY && !record.shown.memory {
                continue;
            }
            let layers = chain::open(&core.dirs, record.shown.id, &record.chain, &name).unwrap();
            directories.insert(record.shown.id);
            for data in layers.data(0..layers.own.metadata().unwrap().len()) {
                let (range, file) = data.unwrap();
                let holder = match file {
                    None => record.shown.id,
                    Some(file) => record.chain.of(&name).unwrap().below[file as usize],
                };
                directories.insert(holder);
                // What it needs of another one may be holes there, too.
                for extent in Extents::from(layers.file(file).unwrap(), range.end, range.start) {
                    needed.extend(extent.unwrap().step_by(4096).map(|at| (holder, name.clone(), at)));
                }
            }
        }
    }
    let wanted = (needed.len() as u64 * 4096, directories.len());
    let end = std::time::Instant::now() + SOON;
    loop {
        let found = std::fs::read_dir(stage.state_dir().join("snapshots")).unwrap().count();
        let found = (kept_bytes(stage), found);
        if found == wanted {
            return;
        }
        assert!(
            std::time::Instant::now() < end,
            "{found:?} bytes and directories are kept, {wanted:?} needed"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_incremental_snapshot_holds_what_is_new_and_is_all_that_it_shows() {
    let (stage, other) = (Stage::new(), Stage::new());
    let host = stage.open_with_image().await;
    let web1 = created(&host, server("web1")).await;
    let (vmm, id) = (stage.launch.only(), web1.id);
    let first = taken(&host, id, incremental("first", true)).await;
    assert_eq!((first.parent_id, first.full_because), (None, Some(FullReason::NoParent)));
    (0..16).for_each(|block| write_block(&stage, &web1, block, 1));
    (0..8).for_each(|page| vmm.write_page(page, 1));
    let second = taken(&host, id, incremental("second", true)).await;
    assert_eq!((second.parent_id, second.full_because), (Some(first.id), None));
    write_block(&stage, &web1, 3, 2);
    vmm.write_page(100, 2);
    let third = taken(&host, id, incremental("third", true)).await;
    assert_eq!((third.parent_id, third.inherited_bytes), (Some(second.id), 15 * BLOCK + 8 * 4096));
    assert!(third.stored_bytes < 2 * BLOCK && second.stored_bytes > 16 * BLOCK, "{third:?}");
    let wanted = content(&host, third.id).await;
    assert_eq!(
        wanted.disk.values().copied().collect::<Vec<_>>(),
        [1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    );
    assert_eq!(wanted.memory.as_ref().unwrap().len(), 9);

    // Those before it may go, and what they were is not there any more.
    for id in [first.id, second.id] {
        deleted(&host, id).await;
        assert_eq!(host.snapshots().one(id).await.unwrap_err().code, Code::NotFound);
    }
    nothing_unneeded(&stage, &host).await;
    assert_eq!(content(&host, third.id).await, wanted);
    assert_eq!(
        taken(&host, id, incremental("first", false)).await.parent_id,
        Some(third.id),
        "names are free again"
    );

    // A server of its disk, clones with its memory, the server itself, and another host.
    let spec = CreateServer { image: None, snapshot: Some("third".to_owned()), ..server("web2") };
    let web2 = created(&host, spec).await;
    let disk = stage.state_dir().join("volumes").join(format!("{}.raw", web2.volumes[0].volume_id));
    let disk = std::fs::read(disk).unwrap();
    assert_eq!((disk[0], disk[3 * BLOCK as usize], disk.len() as u64), (1, 2, DISK_BYTES));
    let clones = CreateClones { name: "twin".parse().unwrap(), count: 1, labels: Default::default() };
    let clones = host.servers().clone_snapshot(&Call::by_host(), third.id, clones).await.unwrap().body;
    succeeded(&host, clones.items[0].operation.as_ref().unwrap().id).await;
    let restored = || stage.launch.alive().into_iter().filter(|vmm| vmm.is_restored());
    assert_eq!(restored().map(|vmm| vmm.pages()).collect::<Vec<_>>(), [wanted.memory.clone().unwrap()]);
    write_block(&stage, &web1, 3, 9);
    let spec = RestoreServer { snapshot: "third".to_owned(), stop: true };
    let back = host.servers().restore(&Call::by_host(), id, spec).await.unwrap().body;
    succeeded(&host, back.operation.id).await;
    assert_eq!(restored().filter(|vmm| vmm.pages() == *wanted.memory.as_ref().unwrap()).count(), 2);
    let mut export = host.snapshots().export(third.id).await.unwrap();
    let mut stream = Vec::new();
    while let Some(piece) = export.next().await {
        stream.extend(piece.unwrap());
    }
    assert_eq!(stream.len() as u64, export.bytes, "its length is known before");
    let there = other.open_with_image().await;
    let (call, stream) = (keyed("one"), std::io::Cursor::new(stream));
    let import = there.snapshots().import(&call, Default::default(), stream);
    let arrived = import.await.unwrap().body.resource.unwrap();
    assert_eq!((arrived.parent_id, arrived.inherited_bytes), (None, 0));
    assert_eq!(content(&there, arrived.id).await, wanted);
    host.close().await;
    there.close().await;
}

#[tokio::test]
async fn a_vmm_that_knows_no_base_saves_all_and_less_is_kept() {
    let stage = Stage::new();
    stage.launch.set_guest(Guest::KnowsNoBase);
    let host = stage.open_with_image().await;
    let web1 = created(&host, server("web1")).await;
    (0..8).for_each(|page| stage.launch.only().write_page(page, 1));
    taken(&host, web1.id, incremental("first", true)).await;
    stage.launch.only().write_page(3, 2);
    let second = taken(&host, web1.id, incremental("second", true)).await;
    assert!(second.inherited_bytes >= 7 * 4096, "{second:?}");
    assert_eq!(content(&host, second.id).await.memory.unwrap()[&3], 2);
    nothing_unneeded(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn a_chain_that_is_as_long_as_can_be_is_begun_anew() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let web1 = created(&host, server("web1")).await;
    let mut reasons = Vec::new();
    for number in 0..18_u8 {
        // Each block is in another one.
        write_block(&stage, &web1, u64::from(number % 16), number + 1);
        let made = taken(&host, web1.id, incremental(&format!("n{number}"), false)).await;
        assert_eq!(made.parent_id.is_none(), made.full_because.is_some());
        reasons.extend(made.full_because.map(|reason| (number, reason)));
        assert_eq!(content(&host, made.id).await.disk[&u64::from(number % 16)], number + 1);
    }
    assert_eq!(reasons, [(0, FullReason::NoParent), (16, FullReason::ChainTooLong)]);
    nothing_unneeded(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn what_somebody_reads_is_not_taken_from_him() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let web1 = created(&host, server("web1")).await;
    (0..16).for_each(|block| write_block(&stage, &web1, block, 1));
    let first = taken(&host, web1.id, incremental("first", false)).await;
    write_block(&stage, &web1, 3, 2);
    let second = taken(&host, web1.id, incremental("second", false)).await;
    // As a clone has it mapped, or an export open.
    let directory = stage.state_dir().join("snapshots").join(first.id.to_string());
    let reader = std::fs::File::open(directory.join(disk_name(0))).unwrap();
    deleted(&host, first.id).await;
    for _ in 0..3 {
        host.snapshots().let_go();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut byte = [0];
        reader.read_exact_at(&mut byte, 3 * BLOCK).unwrap();
        assert_eq!(byte, [1], "what only the deleted one had is there as long as it is read");
    }
    drop(reader);
    host.snapshots().let_go();
    nothing_unneeded(&stage, &host).await;
    deleted(&host, second.id).await;
    nothing_unneeded(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn a_list_that_was_damaged_is_told_and_nothing_is_taken_away_for_it() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let web1 = created(&host, server("web1")).await;
    (0..16).for_each(|block| write_block(&stage, &web1, block, 1));
    let first = taken(&host, web1.id, incremental("first", false)).await;
    let second = taken(&host, web1.id, incremental("second", false)).await;
    let directory = |id: SnapshotId| stage.state_dir().join("snapshots").join(id.to_string());
    let list = directory(second.id).join(chain::list_name(&disk_name(0)));
    let mut bytes = std::fs::read(&list).unwrap();
    bytes[24 + 8 + 3] ^= 1;
    std::fs::write(&list, &bytes).unwrap();
    let refused = host.snapshots().export(second.id).await.map(drop).unwrap_err();
    assert!(refused.chain().contains("not the one that was kept"), "{}", refused.chain());
    // The next one is not taken on it.
    let third = taken(&host, web1.id, incremental("third", false)).await;
    assert_eq!((third.parent_id, third.full_because), (None, Some(FullReason::ParentUnreadable)));
    assert_eq!(content(&host, third.id).await.disk.len(), 16);
    deleted(&host, third.id).await;
    deleted(&host, first.id).await;
    host.close().await;
    drop(host);
    let host = stage.open().await;
    assert!(directory(first.id).join(disk_name(0)).exists());
    // Mended, it is what it was.
    bytes[24 + 8 + 3] ^= 1;
    std::fs::write(&list, &bytes).unwrap();
    assert_eq!(content(&host, second.id).await.disk.len(), 16);
    deleted(&host, second.id).await;
    nothing_unneeded(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn what_one_is_being_taken_on_is_in_use() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let web1 = created(&host, server("web1")).await;
    let first = taken(&host, web1.id, incremental("first", false)).await;
    host.close().await;
    drop(host);
    // A daemon that dies leaves one that is being taken.
    let host = stage.open_watched(Arc::new(DieAtPoint("server.snapshot_thinned"))).await.unwrap();
    let spec = incremental("second", false);
    let accepted = host.servers().snapshot(&Call::by_host(), web1.id, spec).await.unwrap().body;
    let refused = host.snapshots().delete(&Call::by_host(), first.id).await.unwrap_err();
    assert!(refused.code == Code::Draining || refused.detail.contains("second; wait for"), "{refused:?}");
    while !host.is_dead() {
        tokio::task::yield_now().await;
    }
    host.close().await;
    drop(host);
    let host = stage.open().await;
    succeeded(&host, accepted.operation.id).await;
    deleted(&host, first.id).await;
    nothing_unneeded(&stage, &host).await;
    host.close().await;
}

struct DieAtPoint(&'static str);

impl Checkpoint for DieAtPoint {
    fn reached(&self, point: &'static str) -> Fate {
        if point == self.0 { Fate::Die } else { Fate::Live }
    }
}

/// Small numbers that follow from a seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // Numbers of Knuth's MMIX.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// What happens to a server and its snapshots, in an order that the seed says, beside what each snapshot is to hold.
async fn history(seed: u64) {
    let (mut dice, stage) = (Dice(seed), Stage::new());
    let mut host = stage.open_with_image().await;
    let web1 = created(&host, server("web1")).await;
    let mut now = content_of_new(&host, web1.id).await;
    let mut held: BTreeMap<SnapshotId, Content> = BTreeMap::new();
    for step in 0..24 {
        for _ in 0..dice.roll(3) {
            let (at, value) = (dice.roll(16), dice.roll(4) as u8);
            write_block(&stage, &web1, at, value);
            stage.launch.only().write_page(at, value);
            // Zeroes are no data, whatever was there before.
            let memory = now.memory.get_or_insert_default();
            now.disk.insert(at, value);
            memory.insert(at, value);
            if value == 0 {
                now.disk.remove(&at);
                memory.remove(&at);
            }
        }
        let pick = held.keys().nth(dice.roll(held.len().max(1) as u64) as usize).copied();
        match (dice.roll(10), pick) {
            (0, Some(id)) => {
                // On a busy machine that may have passed before anybody looks.
                loop {
                    let at = Time::from_unix_ms(Time::now().unix_ms() + 30);
                    let patch = PatchSnapshot { expires_at: Some(Some(at)), ..PatchSnapshot::default() };
                    match host.snapshots().patch(&Call::by_host(), id, patch).await {
                        Ok(_) => break,
                        Err(refused) => assert_eq!(refused.errors[0].code, "has_passed", "{refused:?}"),
                    }
                }
                while host.snapshots().one(id).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                held.remove(&id);
            }
            (1..=3, Some(id)) => {
                deleted(&host, id).await;
                held.remove(&id);
            }
            (4, _) => {
                host.close().await;
                drop(host);
                host = stage.open().await;
            }
            _ => {
                let memory = dice.roll(3) > 0;
                let is_incremental = dice.roll(5) > 0;
                let spec = CreateSnapshot {
                    incremental: is_incremental,
                    ..incremental(&format!("n{step}"), memory)
                };
                let made = taken(&host, web1.id, spec).await;
                let memory = now.memory.clone().unwrap_or_default();
                held.insert(made.id, Content { memory: made.memory.then_some(memory), ..now.clone() });
            }
        }
        for (id, wanted) in &held {
            assert_eq!(content(&host, *id).await, *wanted, "seed {seed}, step {step}, snapshot {id}");
        }
        nothing_unneeded(&stage, &host).await;
    }
    for id in held.into_keys() {
        deleted(&host, id).await;
    }
    nothing_unneeded(&stage, &host).await;
    assert_eq!(kept_bytes(&stage), 0);
    host.close().await;
}

/// The disk of the image.
async fn content_of_new(host: &Host, id: ServerId) -> Content {
    let made = taken(host, id, CreateSnapshot::default()).await;
    let found = content(host, made.id).await;
    deleted(host, made.id).await;
    found
}

#[tokio::test]
async fn every_snapshot_stays_what_it_was_and_nothing_is_kept_that_none_needs() {
    for seed in 1..=6 {
        history(seed).await;
    }
}

/// Dies at the checkpoint of this number.
struct DieAt(u32, AtomicU32);

impl Checkpoint for DieAt {
    fn reached(&self, _: &'static str) -> Fate {
        if self.1.fetch_add(1, Ordering::SeqCst) + 1 == self.0 { Fate::Die } else { Fate::Live }
    }
}

/// Takes an incremental snapshot, deletes the one below it and then that one, with a daemon that dies at a checkpoint. Answers
/// whether it died.
async fn sweep(number: u32) -> bool {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let web1 = created(&host, server("web1")).await;
    (0..16).for_each(|block| write_block(&stage, &web1, block, 1));
    (0..8).for_each(|page| stage.launch.only().write_page(page, 1));
    let first = taken(&host, web1.id, incremental("first", true)).await;
    write_block(&stage, &web1, 3, 2);
    stage.launch.only().write_page(3, 2);
    let wanted_memory: BTreeMap<u64, u8> = (0..8).map(|page| (page, if page == 3 { 2 } else { 1 })).collect();
    host.close().await;
    drop(host);
    let checkpoint = Arc::new(DieAt(number, AtomicU32::new(0)));
    let (mut died, mut host) = match stage.open_watched(checkpoint).await {
        Ok(host) => (false, host),
        Err(_) => (true, stage.open().await),
    };
    let mut second = None;
    for verb in ["take", "delete the first", "delete the second"] {
        loop {
            let ended = async {
                let operation = match verb {
                    "take" => {
                        let spec = incremental("second", true);
                        let made = host.servers().snapshot(&keyed(verb), web1.id, spec).await?.body;
                        second = made.resource.map(|made| made.id);
                        made.operation
                    }
                    verb => {
                        let id = if verb == "delete the first" { first.id } else { second.unwrap() };
                        host.snapshots().delete(&keyed(verb), id).await?.body.operation
                    }
                };
                let deadline = std::time::Instant::now() + SOON;
                loop {
                    let found = host.operations().one(operation.id, Some(Duration::from_millis(50))).await?;
                    if found.state.is_final() {
                        assert_eq!(found.state, OperationState::Succeeded, "{found:?}");
                        return crate::Result::Ok(());
                    }
                    assert!(std::time::Instant::now() < deadline, "{found:?}");
                    if host.is_dead() {
                        return Err(crate::Error::new(Code::Draining, "dead"));
                    }
                }
            };
            match ended.await {
                Ok(()) => break,
                Err(cause) => {
                    assert!(host.is_dead() && !died, "{number}, {verb}: {}", cause.chain());
                    host.close().await;
                    drop(host);
                    (died, host) = (true, stage.open().await);
                }
            }
        }
        if verb != "delete the second" && !host.is_dead() {
            let found = content(&host, second.unwrap()).await;
            assert_eq!(found.memory.as_ref(), Some(&wanted_memory), "{number}, {verb}");
            assert_eq!(found.disk.values().filter(|value| **value == 1).count(), 15);
        }
    }
    if host.is_dead() {
        host.close().await;
        drop(host);
        (died, host) = (true, stage.open().await);
    }
    nothing_unneeded(&stage, &host).await;
    assert_eq!(kept_bytes(&stage), 0);
    host.close().await;
    died
}

#[tokio::test]
async fn chains_converge_wherever_the_daemon_dies() {
    let mut number = 1;
    while sweep(number).await {
        number += 1;
    }
    assert!(number > 12, "{number} checkpoints");
}
