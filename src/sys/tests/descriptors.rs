//! What becomes of descriptors when a process can hold no more. It lowers the limit of its whole process, so it is
//! a program of its own with one test.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::resource::{Resource, setrlimit};
use sys::seqpacket::{DESCRIPTORS_MAX, Socket};

const LIMIT: u64 = 256;

#[test]
fn a_packet_whose_descriptors_find_no_room_leaves_none_behind() {
    setrlimit(Resource::RLIMIT_NOFILE, LIMIT, LIMIT).unwrap();
    let (sender, receiver) = Socket::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    // Room for a few, not for all.
    let mut kept = Vec::new();
    while kept.last().is_none_or(|last: &File| u64::try_from(last.as_raw_fd()).unwrap() < LIMIT - 20) {
        kept.push(null.try_clone().unwrap());
    }
    let free = null.try_clone().unwrap().as_raw_fd();
    let packet: Vec<BorrowedFd<'_>> = (0..DESCRIPTORS_MAX).map(|_| null.as_fd()).collect();
    for _ in 0..3 {
        sender.send(b"flood", &packet).unwrap();
        let error = receiver.receive(&mut [0; 16], DESCRIPTORS_MAX).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        assert_eq!(null.try_clone().unwrap().as_raw_fd(), free, "descriptors stay open");
    }
    // The socket goes on, and a packet with fewer arrives whole.
    sender.send(b"few", &packet[..3]).unwrap();
    let (length, descriptors) = receiver.receive(&mut [0; 16], 3).unwrap();
    assert_eq!((length, descriptors.len()), (3, 3));
}
