use std::io::{Seek, SeekFrom, Write};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;

#[test]
fn a_piece_lands_where_it_should_and_nothing_beside_it() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"0123456789").unwrap();
    let at = file.seek(SeekFrom::Start(7)).unwrap();
    let ram = crate::new(2 << 20).unwrap();
    ram.write_slice(&[0xaa; 8], GuestAddress(0x1000)).unwrap();
    assert_eq!(read_file(&file, 4, &ram.get_slice(GuestAddress(0x1001), 3).unwrap()).unwrap(), 3);
    let mut seen = [0; 6];
    ram.read_slice(&mut seen, GuestAddress(0x1000)).unwrap();
    assert_eq!(&seen, b"\xaa456\xaa\xaa");
    assert_eq!(file.stream_position().unwrap(), at);
}

#[test]
fn the_end_of_the_file_is_a_short_answer() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"0123").unwrap();
    let ram = crate::new(2 << 20).unwrap();
    let slice = ram.get_slice(GuestAddress(0), 100).unwrap();
    assert_eq!(read_file(&file, 1, &slice).unwrap(), 3);
    assert_eq!(read_file(&file, 4, &slice).unwrap(), 0);
    assert_eq!(read_file(&file, u64::MAX, &slice).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}
