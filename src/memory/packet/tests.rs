use std::os::unix::net::UnixDatagram;

use vm_memory::Bytes;

use super::*;

#[test]
fn header_and_pieces_arrive_as_one_packet() {
    let memory = crate::new(2 << 20).unwrap();
    memory.write_slice(b"abcdef", GuestAddress(0x1000)).unwrap();
    let (near, far) = UnixDatagram::pair().unwrap();
    let mut sender = Sender::default();
    let pieces = [(GuestAddress(0x1003), 3), (GuestAddress(0x1000), 2)];
    for _ in 0..2 {
        assert_eq!(sender.send(&near, b"head", &memory, pieces).unwrap(), 9);
        let mut packet = [0; 64];
        let length = far.recv(&mut packet).unwrap();
        assert_eq!(&packet[..length], b"headdefab");
    }
}

#[test]
fn what_cannot_be_gathered_is_not_sent() {
    let memory = crate::new(2 << 20).unwrap();
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    let mut sender = Sender::default();
    for piece in [(GuestAddress(2 << 20), 1), (GuestAddress((2 << 20) - 1), 2), (GuestAddress(u64::MAX), 9)] {
        let sent = sender.send(&near, b"head", &memory, [(GuestAddress(0), 1), piece]);
        assert!(matches!(sent, Err(SendError::Gather(Refused::Outside))));
    }
    let many = vec![(GuestAddress(0), 1); crate::ring::PIECES_MAX];
    assert!(matches!(sender.send(&near, b"", &memory, many), Err(SendError::Gather(Refused::TooLong))));
    assert_eq!(far.recv(&mut [0; 64]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}
