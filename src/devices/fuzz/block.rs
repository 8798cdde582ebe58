//! The disk: requests of any shape against a small file. Nothing may reach memory that was not given, a file that is
//! read-only, or a byte beyond its end. Some have a backing file, to which nobody writes, and whoever opens both again finds
//! the same disk.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arbitrary::Unstructured;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD as DISCARD, VIRTIO_BLK_T_FLUSH as FLUSH, VIRTIO_BLK_T_GET_ID as GET_ID,
    VIRTIO_BLK_T_IN as IN, VIRTIO_BLK_T_OUT as OUT, VIRTIO_BLK_T_WRITE_ZEROES as WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Guest, Manner, Piece, Step, Unheard, byte, word};
use crate::limiter::{RateLimits, TokenBucket};
use crate::virtio::VirtioDevice;
use crate::virtio::block::{Access, Block, BlockOptions, BlockStats, CacheMode, Disk};

const DISK_BYTES: u64 = 32 << 10;
/// It ends within a block.
const BACKING_BYTES: u64 = (20 << 10) + 512;
const PATTERN: u8 = 0xD5;

/// Serves a driver made of `data`.
pub fn block(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut guest = Guest::new(&mut input, 1);
    let how = byte(&mut input);
    let access = if how & 1 != 0 { Access::ReadOnly } else { Access::ReadWrite };
    let cache = if how & 2 != 0 { CacheMode::Writethrough } else { CacheMode::Writeback };
    let few = TokenBucket { per_second: 1, burst: 4 };
    let operations = (how & 12 == 12).then_some(few);
    let backing = (how & 16 != 0 && access == Access::ReadWrite).then(|| patterned(BACKING_BYTES));
    let file = if backing.is_some() { patterned(0) } else { patterned(DISK_BYTES) };
    file.set_len(DISK_BYTES).unwrap();
    let open = || {
        let backing = backing.as_ref().map(|backing| backing.try_clone().unwrap());
        Disk::plain(file.try_clone().unwrap(), backing, access).unwrap()
    };
    let disk = open();
    let stats = Arc::new(BlockStats::default());
    let options = BlockOptions {
        name: "disk0".to_owned(),
        disk: disk.clone(),
        cache,
        serial: "a serial".to_owned(),
        limits: RateLimits { bandwidth: None, operations },
        stats: Arc::clone(&stats),
    };
    let mut block = Block::new(options).unwrap();
    let features = block.features() & u64::from(word(&mut input)) | block.features() & 0xFFFF_0000;
    let (_active, mut device) = guest.start(&mut block, features, Arc::new(Unheard));
    while let Some(step) = guest.next(&mut input) {
        match step {
            Step::Kick(queue) => guest.kick(&mut device, queue, Manner::Writes),
            Step::Pause => assert!(guest.judged(&mut device, Manner::Writes, |device| device.pause())),
            Step::Resume => guest.judged(&mut device, Manner::Writes, |device| device.resume()),
            Step::Own(0x80..) => {
                request(&mut guest, &mut input);
                guest.kick(&mut device, 0, Manner::Writes);
            }
            Step::Own(offset) => {
                let value = byte(&mut input);
                block.write_config(u64::from(offset % 64), &[value]);
                let mut space = [0xA5; 80];
                block.read_config(u64::from(offset), &mut space);
            }
        }
        // Plain system calls answer at once.
        assert_eq!(device.in_flight(), 0);
    }
    drop(device);
    assert_eq!(file.metadata().unwrap().len(), DISK_BYTES, "the disk's length changed");
    let found = all(&disk);
    assert!(found == all(&open()), "another disk than it is for the next who opens it");
    let changes = stats.writes.load(Ordering::Relaxed) + stats.discards.load(Ordering::Relaxed);
    if access == Access::ReadOnly || (changes == 0 && stats.errors.load(Ordering::Relaxed) == 0) {
        let bytes = if backing.is_some() { BACKING_BYTES } else { DISK_BYTES };
        assert!(is_patterned(&found, bytes), "a disk changed that nobody wrote to");
    }
    if let Some(backing) = backing {
        assert_eq!(backing.metadata().unwrap().len(), BACKING_BYTES);
        let mut found = vec![0; BACKING_BYTES as usize];
        backing.read_exact_at(&mut found, 0).unwrap();
        assert!(is_patterned(&found, BACKING_BYTES), "somebody wrote to a backing file");
    }
}

/// Offers a request that is right but for what it asks: a kind, and a range about the disk's end or anywhere.
fn request(guest: &mut Guest, input: &mut Unstructured<'_>) {
    const HEADER: u64 = 0x4000;
    const DATA: u64 = 0x4800;
    const STATUS: u64 = 0x4400;
    let kind = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 2, OUT][usize::from(byte(input) % 8)];
    let sector = |value: u8| match value {
        0xF0.. => u64::MAX - u64::from(value & 15),
        value => u64::from(value) % 72,
    };
    let (first, count) = (sector(byte(input)), byte(input) % 8 + 1);
    let range =
        [&first.to_le_bytes()[..], &u32::from(count).to_le_bytes(), &[byte(input) % 3, 0, 0, 0]].concat();
    let header = [&kind.to_le_bytes()[..], &[0; 4], &first.to_le_bytes()].concat();
    let (length, writable) = match kind {
        IN => (u32::from(count) * 512, true),
        OUT => (u32::from(count) * 512, false),
        GET_ID => (20, true),
        DISCARD | WRITE_ZEROES => (16, false),
        _ => (0, false),
    };
    guest.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
    guest.memory.write_slice(&range, GuestAddress(DATA)).unwrap();
    let piece = |address, length, writable| Piece { address, length, writable };
    guest.offer_pieces(0, &[piece(HEADER, 16, false), piece(DATA, length, writable), piece(STATUS, 1, true)]);
}

fn patterned(bytes: u64) -> File {
    // Not a memfd of ours: those cannot grow, and what is written beyond the end would not be seen.
    let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
    file.write_all_at(&vec![PATTERN; bytes as usize], 0).unwrap();
    file
}

fn all(disk: &Disk) -> Vec<u8> {
    let mut found = vec![0; DISK_BYTES as usize];
    disk.read_exact_at(&mut found, 0).unwrap();
    found
}

/// The pattern in so many bytes, and zeroes behind it.
fn is_patterned(found: &[u8], bytes: u64) -> bool {
    let (with, without) = found.split_at(bytes as usize);
    with.iter().all(|byte| *byte == PATTERN) && without.iter().all(|byte| *byte == 0)
}
