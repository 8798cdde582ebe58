//! What a lease tells. A process that another test starts has, until it executes its program, whatever is open here, and would be told
//! of: so these are a program of their own, which starts none.
use std::fs::File;
use std::os::fd::AsRawFd;

use sys::lease::{is_final, is_unused};

#[test]
fn a_file_is_final_when_the_last_who_could_write_has_let_go() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let writer = File::create(&path).unwrap();
    let reader = File::open(&path).unwrap();
    assert!(!is_final(&reader).unwrap());
    let twin = writer.try_clone().unwrap();
    drop(writer);
    assert!(!is_final(&reader).unwrap(), "another name for the same opening");
    drop(twin);
    assert!(is_final(&reader).unwrap());
    // Asking changes nothing: it can be opened again.
    drop(File::options().write(true).open(&path).unwrap());
    assert!(is_final(&reader).unwrap());
}

#[test]
fn a_file_is_unused_when_the_last_who_had_it_open_or_mapped_has_let_go() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, [1; 4096]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    assert!(is_unused(&file).unwrap());
    let reader = File::open(&path).unwrap();
    assert!(!is_unused(&file).unwrap());
    // SAFETY: a new mapping of a file that keeps its length; it is unmapped below.
    let mapped = unsafe {
        let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
        libc::mmap(std::ptr::null_mut(), 4096, protection, flags, reader.as_raw_fd(), 0)
    };
    assert_ne!(mapped, libc::MAP_FAILED);
    drop(reader);
    assert!(!is_unused(&file).unwrap(), "it is mapped");
    // SAFETY: the mapping made above, of which nobody has a reference.
    unsafe { libc::munmap(mapped, 4096) };
    assert!(is_unused(&file).unwrap());
}

/// Asked by one thread while others open the file: the signal that tells of them ends nobody.
#[test]
fn who_opens_a_file_meanwhile_is_not_hurt_and_hurts_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, b"x").unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| (0..20_000).for_each(|_| drop(File::open(&path).unwrap())));
        while !opener.is_finished() {
            is_unused(&file).unwrap();
        }
    });
}
