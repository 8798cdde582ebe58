use std::io::Cursor;
use std::os::unix::fs::FileExt;
use std::path::Path;

use model::server::Rate;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use wire::peer::OfferedCpu;
use wire::saved::form::{self, Section};
use wire::saved::table::{Part, Table};

use super::*;
use crate::volumes::fill::Watch;

const MEMORY_BYTES: u64 = 64 << 20;
const DISK_BYTES: u64 = 8 << 20;

fn digest(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

/// A snapshot's files: two parts of memory, and a disk with data at its start and its end.
fn files(directory: &Path) -> Head {
    let [first, second] = [vec![1; 8192], vec![2; 4096]];
    let memory = std::fs::File::create(directory.join("machine.memory")).unwrap();
    memory.set_len(MEMORY_BYTES).unwrap();
    memory.write_all_at(&first, 4096).unwrap();
    memory.write_all_at(&second, MEMORY_BYTES - 4096).unwrap();
    let part = |offset, bytes: &[u8]| Part { offset, bytes: bytes.len() as u32, digest: digest(bytes) };
    let parts = vec![part(4096, &first), part(MEMORY_BYTES - 4096, &second)];
    let shape = Section { name: "shape", version: 1, bytes: b"{}".to_vec() };
    let state = form::join(&[shape, Table { memory_bytes: MEMORY_BYTES, parts }.section()]);
    std::fs::write(directory.join("machine.state"), &state).unwrap();
    let disk = std::fs::File::create(directory.join("disk0.raw")).unwrap();
    disk.set_len(DISK_BYTES).unwrap();
    disk.write_all_at(&[7; 3 << 20], 0).unwrap();
    disk.write_all_at(b"the end", DISK_BYTES - 7).unwrap();
    Head {
        name: "kept".parse().unwrap(),
        description: String::new(),
        labels: Labels::default(),
        server_id: ServerId::new(),
        server_name: "web1".parse().unwrap(),
        vcpus: 1,
        memory_bytes: MEMORY_BYTES,
        cpu: CpuTemplate::Host,
        image: HeadImage { name: "tiny".parse().unwrap(), sha256: "ab".repeat(32) },
        taken_at: None,
        paused_ms: None,
        memory: Some(HeadMemory { root: digest(&state), state_bytes: state.len() as u64 }),
        disks: vec![HeadDisk {
            size_bytes: DISK_BYTES,
            cache: CacheMode::default(),
            limits: DiskLimits::default(),
        }],
        nics: Vec::new(),
        default_user: "root".to_owned(),
        ssh_keys: Vec::new(),
        user_data: None,
        restart_policy: RestartPolicy::default(),
        isolation: Isolation::default(),
        descent: 3,
        processor: Some(OfferedCpu {
            template: wire::machine::CpuTemplate::Host,
            vendor: "GenuineIntel".to_owned(),
            features: ["avx".to_owned()].into(),
            tsc_khz: Some(2_000_000),
        }),
        data_bytes: 0,
    }
}

fn written() -> (tempfile::TempDir, Vec<u8>) {
    let place = tempfile::tempdir().unwrap();
    let head = files(place.path());
    let stream = stream_of(place.path(), head);
    (place, stream)
}

/// A snapshot whose files lie in a directory, as a stream.
fn stream_of(directory: &Path, head: Head) -> Vec<u8> {
    let open =
        |name: &str| std::fs::File::open(directory.join(name)).map(crate::volumes::layers::Layers::one);
    let plan = Plan::of(open, head).unwrap();
    let mut stream = Vec::new();
    plan.write(&mut stream).unwrap();
    assert_eq!(plan.bytes().unwrap(), stream.len() as u64);
    stream
}

/// Reads a stream to its end into a new directory.
fn read(stream: &[u8]) -> Result<tempfile::TempDir, Refusal> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut stream = Cursor::new(stream);
    let (head, digest) = runtime.block_on(read_head(&mut stream))?;
    let place = tempfile::tempdir().unwrap();
    read_files(&mut stream, digest, &head, place.path(), &Watch::default())?;
    Ok(place)
}

/// A stream whose digest is right again after a change.
fn sealed(mut stream: Vec<u8>) -> Vec<u8> {
    let end = stream.len() - DIGEST_BYTES;
    let digest = Sha256::digest(&stream[..end]);
    stream[end..].copy_from_slice(&digest);
    stream
}

#[test]
fn files_arrive_as_they_were_with_their_holes() {
    let (sent, stream) = written();
    assert!(stream.len() < 4 << 20, "holes are not sent: {} bytes", stream.len());
    let arrived = read(&stream).unwrap();
    for name in ["machine.state", "machine.memory", "disk0.raw"] {
        let both = [&sent, &arrived].map(|place| std::fs::read(place.path().join(name)).unwrap());
        assert!(both[0] == both[1], "{name} differs");
    }
    use std::os::unix::fs::MetadataExt;
    let memory = std::fs::metadata(arrived.path().join("machine.memory")).unwrap();
    assert!(memory.blocks() * 512 < 1 << 20, "{} blocks", memory.blocks());
}

/// A snapshot that has a little of everything a stream can hold, with its files. Golden files are of it, so it never changes.
fn kept(directory: &Path) -> Head {
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    let (first, last) = ([0xA1; 4096], [0xA2; 4096]);
    let memory = std::fs::File::create(directory.join("machine.memory")).unwrap();
    memory.set_len(MEMORY_BYTES).unwrap();
    memory.write_all_at(&first, 4096).unwrap();
    memory.write_all_at(&last, MEMORY_BYTES - 4096).unwrap();
    let part = |offset, bytes: &[u8]| Part { offset, bytes: bytes.len() as u32, digest: digest(bytes) };
    let parts = vec![part(4096, &first), part(MEMORY_BYTES - 4096, &last)];
    let shape = Section { name: "shape", version: 1, bytes: b"{}".to_vec() };
    let state = form::join(&[shape, Table { memory_bytes: MEMORY_BYTES, parts }.section()]);
    std::fs::write(directory.join("machine.state"), &state).unwrap();
    let root = std::fs::File::create(directory.join("disk0.raw")).unwrap();
    root.set_len(DISK_BYTES).unwrap();
    root.write_all_at(b"begin", 0).unwrap();
    root.write_all_at(b"end", DISK_BYTES - 3).unwrap();
    let limits = DiskLimits { bandwidth_bytes: rate(1 << 20, Some(2 << 20)), operations: rate(500, None) };
    let nic_limits = NicLimits {
        rx_bytes: rate(1 << 20, None),
        rx_packets: rate(1000, Some(2000)),
        tx_bytes: rate(2 << 20, Some(4 << 20)),
        tx_packets: rate(3000, None),
    };
    Head {
        name: "kept".parse().unwrap(),
        description: "before the upgrade".to_owned(),
        labels: serde_json::from_value(serde_json::json!({ "tier": "front" })).unwrap(),
        server_id: "01990b5a-7c00-7000-8000-000000000001".parse().unwrap(),
        server_name: "web1".parse().unwrap(),
        vcpus: 2,
        memory_bytes: MEMORY_BYTES,
        cpu: CpuTemplate::Features(["avx".to_owned(), "lm".to_owned()].into()),
        image: HeadImage { name: "tiny".parse().unwrap(), sha256: "ab".repeat(32) },
        taken_at: Some(Time::from_unix_ms(1_790_000_000_123)),
        paused_ms: Some(7),
        memory: Some(HeadMemory { root: digest(&state), state_bytes: state.len() as u64 }),
        disks: vec![HeadDisk { size_bytes: DISK_BYTES, cache: CacheMode::Writethrough, limits }],
        nics: vec![HeadNic {
            network: Some("default".parse().unwrap()),
            mac: "02:00:00:00:00:07".to_owned(),
            ipv4: Ipv4Addr::new(10, 90, 0, 7),
            limits: nic_limits,
        }],
        default_user: "root".to_owned(),
        ssh_keys: vec!["ssh-ed25519 AAAA somebody".to_owned()],
        user_data: Some("#!/bin/sh\nexit\n".to_owned()),
        restart_policy: RestartPolicy::Always,
        isolation: Isolation::Strict,
        descent: 3,
        processor: Some(OfferedCpu {
            template: wire::machine::CpuTemplate::Host,
            vendor: "FakeVendor".to_owned(),
            features: ["avx".to_owned()].into(),
            tsc_khz: Some(2_000_000),
        }),
        data_bytes: 0,
    }
}

/// Streams of every released version, kept for ever: users keep theirs. A new version adds a file and changes none. To make
/// it, delete nothing and run this test with TOFT_GOLDEN=<name>.
#[test]
fn golden_streams_still_open() {
    let sent = tempfile::tempdir().unwrap();
    let head = kept(sent.path());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshots/bundle/golden");
    if let Some(name) = std::env::var_os("TOFT_GOLDEN") {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(name), stream_of(sent.path(), head.clone())).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let shown = path.display();
        let stream = std::fs::read(&path).unwrap();
        let (told, _) = runtime.block_on(read_head(&mut Cursor::new(&stream))).unwrap();
        assert!(told.data_bytes > 0 && told.check().is_ok(), "{shown}");
        assert_eq!(Head { data_bytes: 0, ..told }, head, "{shown}");
        let arrived = read(&stream).unwrap();
        for name in ["machine.state", "machine.memory", "disk0.raw"] {
            let both = [&sent, &arrived].map(|place| std::fs::read(place.path().join(name)).unwrap());
            assert!(both[0] == both[1], "{shown}: {name} differs");
        }
        count += 1;
    }
    assert!(count >= 1);
}

/// Where the frames begin.
fn frames(stream: &[u8]) -> Vec<usize> {
    let number = |at: usize| u32::from_le_bytes(stream[at..at + 4].try_into().unwrap()) as usize;
    let mut found = vec![16 + number(12)];
    while number(found[found.len() - 1]) != END as usize {
        let at = found[found.len() - 1];
        found.push(at + FRAME_HEAD_BYTES + number(at + 4));
    }
    found
}

#[test]
fn streams_that_cannot_be_are_refused_by_what_is_wrong() {
    let (_, good) = written();
    let at = frames(&good);
    // State, two parts of memory, three pieces of the disk and its end.
    assert_eq!(at.len(), 1 + 2 + 3 + 1 + 1);
    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
    let changes: [(&str, Change<'_>); 17] = [
        ("begin like", &|stream| stream[0] = b'T'),
        ("has version 2", &|stream| stream[8] = 2),
        ("1048577 bytes", &|stream| stream[12..16].copy_from_slice(&1_048_577_u32.to_le_bytes())),
        ("head cannot be read", &|stream| stream[16] = b'['),
        ("in the middle", &|stream| stream.truncate(at[3] + 100)),
        ("in the middle", &|stream| stream.truncate(stream.len() - 40)),
        ("not the one that its head names", &|stream| stream[at[0] + FRAME_HEAD_BYTES + 40] ^= 1),
        ("is not what was saved there", &|stream| stream[at[1] + FRAME_HEAD_BYTES] ^= 1),
        ("is no part", &|stream| stream[at[1] + 8 + 1] = 0x20),
        ("is no part", &|stream| drop(stream.drain(at[1]..at[2]))),
        ("not complete", &|stream| drop(stream.drain(at[2]..at[3]))),
        ("is outside", &|stream| stream[at[6] + 8 + 2] = 0xFF),
        ("is outside", &|stream| stream[at[4] + 8 + 2] = 0),
        ("cannot be one frame", &|stream| stream[at[3] + 4..at[3] + 8].fill(0)),
        ("is not whole pages", &|stream| stream[at[4] + 8] = 1),
        ("a file that is not to be", &|stream| stream[at[5]] = 9),
        ("before all of its data", &|stream| drop(stream.drain(at[6]..at[7]))),
    ];
    for (wanted, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let refused = read(&sealed(bad)).map(drop).expect_err(wanted).to_string();
        assert!(refused.contains(wanted), "{refused} is not {wanted}");
    }
    let unsealed: [(&str, Change<'_>); 2] = [
        ("was changed on the way", &|stream| stream[at[3] + FRAME_HEAD_BYTES] ^= 1),
        ("follows its end", &|stream| stream.push(0)),
    ];
    for (wanted, change) in unsealed {
        let mut bad = good.clone();
        change(&mut bad);
        let refused = read(&bad).map(drop).expect_err(wanted).to_string();
        assert!(refused.contains(wanted), "{refused} is not {wanted}");
    }
}

#[test]
fn heads_that_cannot_be_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let good = files(place.path());
    type Change = fn(&mut Head);
    let changes: [(&str, Change); 13] = [
        ("description", |head| head.description = "x".repeat(2000)),
        ("vCPUs", |head| head.vcpus = 0),
        ("memory's size", |head| head.memory_bytes = 4096),
        ("memory's size", |head| head.memory_bytes += 1 << 20),
        ("processor of its guest", |head| {
            head.processor.as_mut().unwrap().features.insert("A B".to_owned());
        }),
        ("state file", |head| head.memory.as_mut().unwrap().state_bytes = u64::MAX),
        ("it has 2 disks, and a server 1 at most", |head| head.disks.push(head.disks[0].clone())),
        ("a disk", |head| head.disks[0].size_bytes += 1),
        ("user's name", |head| head.default_user = "x".repeat(300)),
        ("a key", |head| head.ssh_keys = vec!["ssh-ed25519 A\nB".to_owned()]),
        ("user data", |head| head.user_data = Some("x".repeat(100_000))),
        ("image's digest", |head| head.image.sha256 = "../..".to_owned()),
        ("amount of its data", |head| head.data_bytes = u64::MAX),
    ];
    assert_eq!(good.check(), Ok(()));
    for (wanted, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let refused = bad.check().unwrap_err();
        assert!(refused.contains(wanted), "{refused} is not {wanted}");
    }
}

#[test]
fn one_that_is_cancelled_stops() {
    let (_, stream) = written();
    let watch = Watch::default();
    watch.cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
    let place = tempfile::tempdir().unwrap();
    let mut stream = &stream[frames(&stream)[0]..];
    let stopped = read_files(&mut stream, Sha256::new(), &files(place.path()), place.path(), &watch);
    assert!(matches!(stopped, Err(Refusal::Cancelled)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_change_comes_in_unnoticed(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (_, mut stream) = written();
        for (at, value) in flips {
            let at = at.index(stream.len());
            stream[at] ^= value;
        }
        if let Some(cut) = cut {
            stream.truncate(cut.index(stream.len()));
        }
        prop_assert!(read(&stream).is_err());
    }
}
