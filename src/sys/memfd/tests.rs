use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;

#[test]
fn a_memfd_keeps_its_length_whoever_asks() {
    let file = create("test", 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    assert_eq!(file.set_len(0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(file.set_len(2 << 20).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn a_constant_stays_what_it_is_whoever_asks() {
    let file = constant("test", b"as it is").unwrap();
    for denied in [file.write_at(b"was", 0), file.set_len(0).map(|()| 0), file.set_len(9).map(|()| 0)] {
        assert_eq!(denied.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
    let mut content = [0; 8];
    file.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"as it is");
    assert!(is_constant(&file) && !is_constant(&create("test", 8).unwrap()));
}

#[test]
fn a_punched_hole_reads_zero_and_costs_nothing() {
    let file = create("test", 1 << 20).unwrap();
    file.write_all_at(&[7; 8192], 0).unwrap();
    let before = file.metadata().unwrap().blocks();
    punch_hole(&file, 0, 4096).unwrap();
    let mut byte = [1; 1];
    file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [0]);
    file.read_exact_at(&mut byte, 4096).unwrap();
    assert_eq!(byte, [7]);
    assert!(file.metadata().unwrap().blocks() < before);
}

#[test]
fn a_hole_beyond_what_the_kernel_counts_is_refused() {
    let file = create("test", 4096).unwrap();
    assert_eq!(punch_hole(&file, u64::MAX, 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}
