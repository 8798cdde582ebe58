//! A virtio block device, driver side (virtio 1.2 section 5.2): one request at a time, or raw.
//! Called by the block words.

use crate::failure::{Outcome, out_of_memory};
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{self, Device};
use crate::{check, memory};

pub const FEATURE_SEG_MAX: u64 = 1 << 2;
pub const FEATURE_READ_ONLY: u64 = 1 << 5;
pub const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
pub const FEATURE_FLUSH: u64 = 1 << 9;
pub const FEATURE_TOPOLOGY: u64 = 1 << 10;
pub const FEATURE_CONFIG_WCE: u64 = 1 << 11;
pub const FEATURE_DISCARD: u64 = 1 << 13;
pub const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const READ_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const STATUS_OK: u8 = 0;
pub const STATUS_IO_ERROR: u8 = 1;
pub const STATUS_UNSUPPORTED: u8 = 2;
/// No status was written.
pub const STATUS_NONE: u8 = 0xff;

pub const SECTOR_BYTES: u64 = 512;
const TIMEOUT_MS: u64 = 20_000;
const WANTED: u64 = FEATURE_SEG_MAX
    | FEATURE_READ_ONLY
    | FEATURE_BLOCK_SIZE
    | FEATURE_FLUSH
    | FEATURE_TOPOLOGY
    | FEATURE_CONFIG_WCE
    | FEATURE_DISCARD
    | FEATURE_WRITE_ZEROES;

pub struct Disk {
    pub device: Device,
    pub queue: Queue,
    pub sectors: u64,
    /// A page for request headers and status bytes.
    header: u64,
}

impl Disk {
    /// The `index`th disk, ready; None when there are fewer.
    pub fn find(index: usize) -> Outcome<Option<Self>> {
        Self::find_with_vector(index, None)
    }

    pub fn require(index: usize) -> Outcome<Self> {
        match Self::find(index)? {
            Some(disk) => Ok(disk),
            None => crate::fail!("no disk {index}"),
        }
    }

    /// As `find`, with completions signalled through MSI-X table entry `entry`.
    pub fn find_with_vector(index: usize, entry: Option<u16>) -> Outcome<Option<Self>> {
        let Some(mut device) = Device::find(virtio::BLOCK, index)? else { return Ok(None) };
        device.negotiate(WANTED)?;
        let queue = device.queue_with_vector(0, 256, entry)?;
        device.ready()?;
        let sectors = device.config64(0);
        let header = memory::allocate(1).ok_or_else(out_of_memory)?;
        Ok(Some(Self { device, queue, sectors, header }))
    }

    pub fn is_read_only(&self) -> bool {
        self.device.has(FEATURE_READ_ONLY)
    }

    /// Where request `slot`'s header and status lie; 64 fit in the page.
    pub fn header(&self, slot: u16) -> (u64, u64) {
        let at = self.header + u64::from(slot % 64) * 32;
        (at, at + 16)
    }

    pub fn write_header(&self, slot: u16, kind: u32, sector: u64) {
        let (header, status) = self.header(slot);
        crate::cpu::mmio::write32(header, kind);
        crate::cpu::mmio::write32(header + 4, 0);
        crate::cpu::mmio::write64(header + 8, sector);
        crate::cpu::mmio::write8(status, STATUS_NONE);
    }

    /// One request and its status byte.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Segment]) -> Outcome<u8> {
        const DATA_MAX: usize = 62;
        check!(data.len() <= DATA_MAX, "more than {DATA_MAX} segments");
        self.write_header(0, kind, sector);
        let (header, status) = self.header(0);
        let mut segments = [Segment::Read { address: header, bytes: 16 }; DATA_MAX + 2];
        segments[1..=data.len()].copy_from_slice(data);
        segments[data.len() + 1] = Segment::Write { address: status, bytes: 1 };
        self.queue.request(&segments[..data.len() + 2], TIMEOUT_MS)?;
        Ok(crate::cpu::mmio::read8(status))
    }

    /// As `request`, but any status except OK is a failure.
    pub fn succeed(&mut self, kind: u32, sector: u64, data: &[Segment]) -> Outcome {
        let status = self.request(kind, sector, data)?;
        check!(status == STATUS_OK, "request type {kind} at sector {sector}: status {status}");
        Ok(())
    }

    pub fn write(&mut self, sector: u64, address: u64, bytes: u32) -> Outcome {
        self.succeed(OUT, sector, &[Segment::Read { address, bytes }])
    }

    pub fn read(&mut self, sector: u64, address: u64, bytes: u32) -> Outcome {
        self.succeed(IN, sector, &[Segment::Write { address, bytes }])
    }

    pub fn flush(&mut self) -> Outcome {
        if self.device.has(FEATURE_FLUSH) { self.succeed(FLUSH, 0, &[]) } else { Ok(()) }
    }
}
