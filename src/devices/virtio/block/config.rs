//! What the guest reads and writes in a disk's configuration space (virtio 1.2, section 5.2.4), and the features
//! that go with it. Plain data; the device decides what a changed byte means.
use virtio_bindings::bindings::virtio_blk::*;

use super::request::SECTOR_BYTES;
use super::{Access, CacheMode};
use crate::limits;

/// Length of the fields up to `write_zeroes_may_unmap` and its padding.
const CONFIG_BYTES: usize = 60;

/// Where the one field lies that the driver may write.
pub(super) const WRITEBACK_OFFSET: u64 = 32;

/// Host pages and file system blocks have 4 KiB: 2³ sectors. A hint; single sectors work too.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// A feature's bit.
pub(super) const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What is offered.
pub(super) fn features(access: Access, cache: CacheMode) -> u64 {
    let always = [
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
    ];
    let by_access: &[u32] = match access {
        Access::ReadOnly => &[VIRTIO_BLK_F_RO],
        Access::ReadWrite => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
    };
    // A disk that is written through is not the guest's to change.
    let by_cache: &[u32] = match (access, cache) {
        (Access::ReadWrite, CacheMode::Writeback) => &[VIRTIO_BLK_F_CONFIG_WCE],
        _ => &[],
    };
    always.iter().chain(by_access).chain(by_cache).fold(0, |set, feature| set | bit(*feature))
}

/// The space as it stands.
pub(super) fn space(sectors: u64, access: Access, writeback: bool) -> [u8; CONFIG_BYTES] {
    let can_discard = access == Access::ReadWrite;
    let if_can = |value: u32| if can_discard { value } else { 0 }.to_le_bytes();
    let fields: [&[u8]; 19] = [
        &sectors.to_le_bytes(),
        &limits::BLOCK_SEGMENT_BYTES_MAX.to_le_bytes(),
        &limits::BLOCK_SEGMENTS_MAX.to_le_bytes(),
        // Geometry is not offered.
        &[0; 4],
        &SECTOR_BYTES.to_le_bytes(),
        &[PHYSICAL_BLOCK_EXPONENT],
        // Alignment offset.
        &[0],
        &(1_u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes(),
        // No size is better than another.
        &[0; 4],
        &[u8::from(writeback)],
        &[0],
        // Number of queues; without VIRTIO_BLK_F_MQ nobody reads it.
        &1_u16.to_le_bytes(),
        &if_can(limits::DISCARD_SECTORS_MAX),
        &if_can(limits::DISCARD_RANGES_MAX),
        &if_can(1 << PHYSICAL_BLOCK_EXPONENT),
        &if_can(limits::WRITE_ZEROES_SECTORS_MAX),
        &if_can(limits::WRITE_ZEROES_RANGES_MAX),
        // Write-zeroes may deallocate.
        &[u8::from(can_discard)],
        &[0; 3],
    ];
    let mut space = [0; CONFIG_BYTES];
    for (to, from) in space.iter_mut().zip(fields.iter().flat_map(|field| field.iter())) {
        *to = *from;
    }
    space
}

/// Copies the part at `offset` into `data`; what lies beyond the space reads zero.
pub(super) fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let present = space.get(start..).unwrap_or_default();
    let bytes = present.iter().copied().chain(std::iter::repeat(0));
    for (to, from) in data.iter_mut().zip(bytes) {
        *to = from;
    }
}
