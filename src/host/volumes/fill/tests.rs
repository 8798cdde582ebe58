use std::os::unix::fs::MetadataExt;

use super::*;

const MIB: u64 = 1 << 20;

/// A file of 64 MiB with three islands of data, of which the last ends in the middle of a block.
fn islands() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * MIB).unwrap();
    for (at, length) in [(0, 4096), (20 * MIB, 9 << 20), (63 * MIB, 5000)] {
        file.write_all_at(&vec![0xA5; length], at).unwrap();
    }
    file
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_copy_holds_the_same_bytes_keeps_holes_and_grows() {
    let (source, target) = (islands(), tempfile::tempfile().unwrap());
    let watch = Watch::default();
    fill(&Layers::one(source.try_clone().unwrap()), &target, 80 * MIB, &watch).unwrap();
    let copied = bytes(&target);
    assert!(copied[..64 << 20] == bytes(&source)[..], "the bytes differ");
    assert!(copied[64 << 20..].iter().all(|byte| *byte == 0));
    assert!(target.metadata().unwrap().blocks() * 512 < 12 * MIB, "holes were filled");
    assert_eq!(watch.done.load(Ordering::Relaxed), watch.total.load(Ordering::Relaxed));
}

#[test]
fn a_plain_copy_keeps_holes_whatever_the_file_system_can_share() {
    let (source, target) = (islands(), tempfile::tempfile().unwrap());
    let layers = Layers::one(source.try_clone().unwrap());
    copy(&layers, &target, &Watch::default(), Of::All).unwrap();
    target.set_len(64 * MIB).unwrap();
    assert!(bytes(&target) == bytes(&source), "the bytes differ");
    assert!(target.metadata().unwrap().blocks() * 512 < 12 * MIB, "holes were filled");
}

#[test]
fn a_source_of_nothing_but_a_hole_copies_nothing() {
    let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    source.set_len(10 * MIB).unwrap();
    fill(&Layers::one(source), &target, 10 * MIB, &Watch::default()).unwrap();
    assert_eq!(target.metadata().unwrap().blocks(), 0);
}

#[test]
fn a_cancelled_copy_stops() {
    let watch = Watch::default();
    watch.cancelled.store(true, Ordering::Relaxed);
    let outcome = fill(&Layers::one(islands()), &tempfile::tempfile().unwrap(), 64 * MIB, &watch);
    assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::Interrupted);
    assert_eq!(watch.done.load(Ordering::Relaxed), 0);
}
