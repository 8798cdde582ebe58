//! What fuzzers call for streams of snapshots: bytes as they are, or frames around a head and a table whose digests are
//! right. What is taken in has the lengths its head says and the memory its table says, and is exported as it came; what is
//! refused has filled nothing that was not promised. No part of the daemon.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use arbitrary::Unstructured;
use sha2::{Digest as _, Sha256};
use wire::saved::form::{self, Section};
use wire::saved::table::{Part, Table};

pub use super::ahead::fuzz::used;
use super::bundle::{Head, Plan, Refusal, read_files, read_head};
use crate::volumes::files;
use crate::volumes::fill::Watch;
use crate::volumes::layers::Layers;

const PAGE: usize = 4096;

/// Receives a snapshot made of `data` below `place`, an empty directory that is empty again afterwards.
pub fn snapshot(data: &[u8], place: &Path) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 2 {
        0 => take(rest, place),
        _ => take(&built(rest).unwrap_or_default(), place),
    }
}

fn take(stream: &[u8], place: &Path) {
    let directory = place.join("snapshot");
    files::remove_tree(&directory).expect("no earlier one");
    std::fs::create_dir(&directory).expect("a directory");
    match read(stream, &directory) {
        Ok(head) => judge(head, &directory),
        Err(Refusal::Corrupt(detail)) => assert!(!detail.is_empty() && detail.len() < 4096),
        // What is written is sparse, and a head may promise more than a file system can hold in one file.
        Err(Refusal::Store(_)) => {}
        Err(other) => panic!("{other:?}"),
    }
    files::remove_tree(&directory).expect("its files are removed");
}

fn read(stream: &[u8], directory: &Path) -> Result<Head, Refusal> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let mut rest = stream;
    let (head, digest) = runtime.block_on(read_head(&mut rest))?;
    read_files(&mut rest, digest, &head, directory, &Watch::default())?;
    assert!(rest.is_empty(), "something follows");
    Ok(head)
}

fn judge(head: Head, directory: &Path) {
    assert_eq!(head.check(), Ok(()));
    let open = |name: &str| File::open(directory.join(name)).expect("a file of it");
    for (index, disk) in head.disks.iter().enumerate() {
        let file = open(&super::disk_name(index));
        assert_eq!(file.metadata().expect("its length").len(), disk.size_bytes);
    }
    if let Some(memory) = &head.memory {
        let state = std::fs::read(directory.join(super::STATE)).expect("its state");
        assert_eq!(Sha256::digest(&state).as_slice(), memory.root.0);
        let table = Table::parse(&mut form::split(&state).expect("a form")).expect("a table");
        let file = open(super::MEMORY);
        assert_eq!(file.metadata().expect("its length").len(), head.memory_bytes);
        for part in &table.parts {
            let mut bytes = vec![0; part.bytes as usize];
            file.read_exact_at(&mut bytes, part.offset).expect("a part of memory");
            assert_eq!(Sha256::digest(&bytes).as_slice(), part.digest.0, "memory that was not saved");
        }
    }
    let plan = Plan::of(|name| File::open(directory.join(name)).map(Layers::one), head)
        .expect("what came in can be exported");
    let mut again = Vec::new();
    plan.write(&mut again).expect("it is written");
    let twin = directory.join("twin");
    std::fs::create_dir(&twin).expect("a directory");
    assert!(read(&again, &twin).is_ok(), "what was exported again is refused");
}

/// A stream whose digests are right, but for what the input changes.
fn built(rest: &[u8]) -> arbitrary::Result<Vec<u8>> {
    let mut input = Unstructured::new(rest);
    let mut frames: Vec<(u32, u64, Vec<u8>)> = Vec::new();
    let mut parts = Vec::new();
    let with_memory = input.ratio(3, 4)?;
    let lie = input.int_in_range(0..=7_u8)?;
    if with_memory {
        for _ in 0..input.int_in_range(0..=3)? {
            let offset = u64::from(input.int_in_range(0..=0x4000_u16)?) * PAGE as u64;
            let bytes = vec![input.arbitrary()?; input.int_in_range(1..=2)? * PAGE];
            let digest = wire::saved::Digest(Sha256::digest(&bytes).into());
            parts.push(Part { offset, bytes: bytes.len() as u32, digest });
            frames.push((1, offset, bytes));
        }
    }
    for _ in 0..input.int_in_range(0..=3)? {
        let (disk, offset) = (input.int_in_range(2..=3)?, u64::from(input.arbitrary::<u32>()?));
        frames.push((
            disk,
            offset,
            vec![input.arbitrary()?; usize::from(input.int_in_range(0..=0x1FF_u16)?)],
        ));
    }
    match (lie, frames.first_mut()) {
        (1, Some((.., bytes))) => bytes.iter_mut().for_each(|byte| *byte = !*byte),
        (2, Some((_, offset, _))) => *offset += PAGE as u64,
        (3, Some((file, ..))) => *file = input.arbitrary()?,
        (4, _) => frames.reverse(),
        (5, _) => frames.truncate(frames.len() / 2),
        (7, Some((.., bytes))) => bytes.truncate(bytes.len() / 3),
        _ => {}
    }
    let memory_bytes = 64 << 20;
    let state = form::join(&[
        Section { name: "shape", version: 1, bytes: b"{}".to_vec() },
        Table { memory_bytes, parts }.section(),
    ]);
    if with_memory && lie != 6 {
        frames.insert(0, (0, 0, state.clone()));
    }
    let data_bytes: usize = frames.iter().map(|(.., bytes)| bytes.len()).sum();
    let head = serde_json::json!({
        "name": "kept", "description": "", "labels": {}, "server_id": uuid::Uuid::nil(), "server_name": "web1",
        "vcpus": 1, "memory_bytes": memory_bytes, "cpu": "host",
        "image": { "name": "tiny", "sha256": "00".repeat(32) }, "taken_at": null, "paused_ms": null,
        "memory": with_memory.then(|| serde_json::json!({
            "root": wire::saved::Digest(Sha256::digest(&state).into()), "state_bytes": state.len() })),
        "disks": [{ "size_bytes": 8 << 20, "cache": "writeback", "limits": {} }],
        "nics": [], "default_user": "root", "ssh_keys": [], "user_data": null, "restart_policy": "never",
        "isolation": "standard", "data_bytes": data_bytes,
    });
    Ok(stream(head.to_string().as_bytes(), &frames))
}

/// The whole stream, as the comment of `bundle` draws it.
fn stream(head: &[u8], frames: &[(u32, u64, Vec<u8>)]) -> Vec<u8> {
    let mut stream = b"toftsnap".to_vec();
    stream.extend(1_u32.to_le_bytes());
    stream.extend((head.len() as u32).to_le_bytes());
    stream.extend(head);
    let frame = |file: u32, bytes: usize, offset: u64, stream: &mut Vec<u8>| {
        stream.extend(file.to_le_bytes());
        stream.extend((bytes as u32).to_le_bytes());
        stream.extend(offset.to_le_bytes());
    };
    for (file, offset, bytes) in frames {
        frame(*file, bytes.len(), *offset, &mut stream);
        stream.extend(bytes);
    }
    let data_bytes: usize = frames.iter().map(|(.., bytes)| bytes.len()).sum();
    frame(u32::MAX, 32, data_bytes as u64, &mut stream);
    let digest = Sha256::digest(&stream);
    stream.extend(digest);
    stream
}
