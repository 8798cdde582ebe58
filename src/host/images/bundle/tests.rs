use std::os::unix::fs::MetadataExt;

use model::ImageId;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::images::testing::{DISK_BYTES, Entry as Piece, Sample, bundle, sha256};

/// Receives a bundle into a new directory, and answers the directory.
fn receive_all(bytes: &[u8], conditions: &Conditions) -> (tempfile::TempDir, Result<Arrived, Refusal>) {
    let images = tempfile::tempdir().unwrap();
    let incoming = Incoming::create(images.path(), ImageId::new()).unwrap();
    let outcome = receive(bytes, incoming, conditions, &Watch::default());
    (images, outcome)
}

fn refusal(bytes: &[u8], conditions: &Conditions) -> String {
    let (images, outcome) = receive_all(bytes, conditions);
    let refused = outcome.expect_err("it was taken");
    assert_eq!(std::fs::read_dir(images.path()).unwrap().count(), 0, "something was left after: {refused}");
    match refused {
        Refusal::Corrupt(detail) => detail,
        other => panic!("not told as damage: {other:?}"),
    }
}

fn piece(name: &str, content: &[u8], kind: EntryType) -> Piece {
    Piece { name: name.to_owned(), content: content.to_vec(), kind }
}

#[test]
fn a_whole_bundle_arrives_with_its_bytes_and_its_holes() {
    let sample = Sample::new();
    let bytes = sample.bundle();
    let conditions = Conditions {
        stream_sha256: Some(sha256(&bytes)),
        manifest_sha256: Some(sha256(&sample.manifest_bytes())),
    };
    let (images, outcome) = receive_all(&bytes, &conditions);
    let arrived = outcome.unwrap();
    let directory = std::fs::read_dir(images.path()).unwrap().next().unwrap().unwrap().path();
    for (name, (_, content)) in ["root.raw", "kernel", "initrd"].iter().zip(&sample.files) {
        assert!(std::fs::read(directory.join(name)).unwrap() == *content, "{name} differs");
    }
    assert_eq!(std::fs::read(directory.join("image.json")).unwrap(), sample.manifest_bytes());
    assert!(std::fs::metadata(directory.join("root.raw")).unwrap().blocks() * 512 < DISK_BYTES as u64 / 4);
    assert_eq!(arrived.sha256, sha256(&sample.manifest_bytes()));
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 4);
}

#[test]
fn the_files_may_come_in_any_order_and_be_named_with_a_leading_dot() {
    let mut entries = Sample::new().entries();
    entries[1..].reverse();
    entries.iter_mut().for_each(|entry| entry.name.insert_str(0, "./"));
    receive_all(&bundle(&entries), &Conditions::default()).1.unwrap();
}

#[test]
fn hostile_bundles_are_refused_and_nothing_is_left() {
    let sample = Sample::new();
    let good = sample.entries();
    let with = |more: &[Piece]| bundle(&[&good[..], more].concat());
    let instead = |at: usize, other: Piece| {
        let mut entries = good.clone();
        entries[at] = other;
        bundle(&entries)
    };
    let regular = EntryType::Regular;
    let kernel = &sample.files[1].1;
    let mut wrong_size = Sample::new();
    wrong_size.manifest["disk"]["size_bytes"] = json!(DISK_BYTES + 512);
    let mut flipped = sample.bundle();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let mut trailing = sample.bundle();
    trailing.extend([0; 512]);
    trailing.push(7);
    let mut padded = sample.bundle();
    padded.resize(padded.len() + BUNDLE_PADDING_BYTES_MAX as usize + 1, 0);
    let huge_manifest = vec![b' '; MANIFEST_BYTES_MAX as usize + 1];
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("nothing", Vec::new(), "empty"),
        ("no tar", vec![0x55; 10_000], "not a tar"),
        ("only an end mark", vec![0; 1024], "empty"),
        ("a manifest that is not first", bundle(&[&good[1..], &good[..1]].concat()), "first"),
        (
            "a manifest that is too long",
            instead(0, piece("image.json", &huge_manifest, regular)),
            "image.json has",
        ),
        ("an empty manifest", instead(0, piece("image.json", b"", regular)), "image.json has"),
        ("a manifest that is no JSON", instead(0, piece("image.json", b"{", regular)), "image.json"),
        ("a second manifest", with(&good[..1]), "does not name"),
        ("a stranger at the end", with(&[piece("extra", b"x", regular)]), "does not name"),
        ("a stranger in the middle", instead(1, piece("extra", b"x", regular)), "does not name"),
        ("a file twice", instead(2, good[1].clone()), "names once"),
        ("a path that climbs", instead(2, piece("../vmlinuz", kernel, regular)), "does not name"),
        ("an absolute path", instead(2, piece("/vmlinuz", kernel, regular)), "does not name"),
        ("a symbolic link", instead(2, piece("vmlinuz", b"", EntryType::Symlink)), "not a plain file"),
        ("a hard link", instead(2, piece("vmlinuz", b"", EntryType::Link)), "not a plain file"),
        ("a device", instead(2, piece("vmlinuz", b"", EntryType::Char)), "not a plain file"),
        ("a directory", instead(2, piece("vmlinuz", b"", EntryType::Directory)), "not a plain file"),
        ("a sparse file", instead(1, piece("root.raw", b"", EntryType::GNUSparse)), "not a plain file"),
        (
            "a long name",
            instead(2, piece("vmlinuz", b"vmlinuz\0", EntryType::GNULongName)),
            "not a plain file",
        ),
        (
            "an extended header",
            instead(2, piece("vmlinuz", b"12 size=99\n", EntryType::XHeader)),
            "not a plain file",
        ),
        ("a wrong sum", instead(2, piece("vmlinuz", b"another kernel", regular)), "SHA-256"),
        ("a disk of another length", wrong_size.bundle(), "root.raw has"),
        ("one bit", flipped, "SHA-256"),
        ("something after the end", trailing, "follows the end"),
        ("too much after the end", padded, "follows the end"),
    ];
    for (what, bytes, told) in cases {
        let detail = refusal(&bytes, &Conditions::default());
        assert!(detail.contains(told), "{what}: {detail}");
    }
}

#[test]
fn sums_that_were_asked_for_must_match() {
    let bytes = Sample::new().bundle();
    let other = Some(sha256(b"other"));
    let stream = Conditions { stream_sha256: other.clone(), manifest_sha256: None };
    let manifest = Conditions { stream_sha256: None, manifest_sha256: other };
    assert!(refusal(&bytes, &stream).contains("the bundle's SHA-256"));
    assert!(refusal(&bytes, &manifest).contains("the manifest's SHA-256"));
}

#[test]
fn a_size_that_the_header_promises_and_the_stream_does_not_keep_is_found() {
    let bytes = Sample::new().bundle();
    for cut in (0..bytes.len() - 1024).step_by(4999).chain([1, 511, 512, 513]) {
        refusal(&bytes[..cut], &Conditions::default());
    }
}

#[test]
fn a_header_that_promises_the_largest_sizes_costs_nothing() {
    let mut entries = Sample::new().entries();
    entries.truncate(2);
    let at = 512 + Sample::new().manifest_bytes().len().next_multiple_of(512);
    for size in [u64::MAX, 1 << 62, 1 << 40] {
        let mut bytes = bundle(&entries);
        let mut header = tar::Header::from_byte_slice(&bytes[at..at + 512]).clone();
        header.set_size(size);
        header.set_cksum();
        bytes[at..at + 512].copy_from_slice(header.as_bytes());
        refusal(&bytes, &Conditions::default());
    }
}

#[test]
fn a_cancelled_import_leaves_nothing() {
    let images = tempfile::tempdir().unwrap();
    let incoming = Incoming::create(images.path(), ImageId::new()).unwrap();
    let watch = Watch::default();
    watch.cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
    let outcome = receive(&Sample::new().bundle()[..], incoming, &Conditions::default(), &watch);
    assert!(matches!(outcome, Err(Refusal::Cancelled)));
    assert_eq!(std::fs::read_dir(images.path()).unwrap().count(), 0);
}

#[test]
fn a_full_disk_is_told_as_such_and_leaves_nothing() {
    use nix::sched::{CloneFlags, unshare};
    let work = std::thread::spawn(|| {
        if let Err(cause) = unshare(CloneFlags::CLONE_NEWNS) {
            eprintln!("skipped: a small file system of the test's own needs root ({cause})");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let private =
            rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let options = Some(c"size=256k");
        rustix::mount::mount("toft-test", place.path(), "tmpfs", rustix::mount::MountFlags::empty(), options)
            .unwrap();
        let mut sample = Sample::new();
        sample.files[0].1.fill(0x33);
        sample.manifest["disk"]["sha256"] = json!(sha256(&sample.files[0].1));
        let incoming = Incoming::create(place.path(), ImageId::new()).unwrap();
        let outcome = receive(&sample.bundle()[..], incoming, &Conditions::default(), &Watch::default());
        match outcome {
            Err(Refusal::Store(cause)) => assert_eq!(cause.kind(), io::ErrorKind::StorageFull),
            other => panic!("{other:?}"),
        }
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
        rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    });
    work.join().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn anything_is_refused_without_a_panic_and_without_a_trace(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let (images, outcome) = receive_all(&bytes, &Conditions::default());
        prop_assert!(outcome.is_err());
        prop_assert_eq!(std::fs::read_dir(images.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_bundle_arrives_intact_or_not_at_all(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let sample = Sample::new();
        let mut bytes = sample.bundle();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let (images, outcome) = receive_all(&bytes, &Conditions::default());
        match std::fs::read_dir(images.path()).unwrap().next() {
            None => prop_assert!(outcome.is_err()),
            Some(entry) => {
                prop_assert!(outcome.is_ok());
                let kernel = std::fs::read(entry.unwrap().path().join("kernel")).unwrap();
                prop_assert!(kernel == sample.files[1].1);
            }
        }
    }
}
