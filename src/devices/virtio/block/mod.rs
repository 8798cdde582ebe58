//! A block device (virtio 1.2, section 5.2) over one raw file, or over two of which one is what the disk was made from: reads, writes, flush, discard, write-zeroes and an
//! identity. It knows no image format and opens nothing; `vmm` makes one per disk of its machine.
//!
//! `request` turns a chain into a checked request, `backend` is the file with `overlay`, `service` joins them in one thread. A
//! queue has its own thread, ring and limits, so that more queues are more of the same.
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::limiter::{LimitsSlot, RateLimits};

mod backend;
mod changes;
mod config;
mod device;
mod keep;
mod lookout;
mod overlay;
mod pending;
mod request;
mod service;
mod state;

pub use backend::{Disk, DiskError};
pub use changes::{CHANGE_BYTES, Part};
pub use device::{Block, BlockOptions};
pub use keep::{Keeping, Kept};
pub use overlay::Piece;

/// Whether a guest may change a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// VIRTIO_BLK_F_RO is offered and every change refused.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// What a completed write promises (virtio 1.2, section 5.2.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// Durable after the guest's flush. The guest may ask for more in the configuration (CONFIG_WCE).
    Writeback,
    /// Every write is durable when it completes, whatever the guest asks.
    Writethrough,
}

/// What a disk has done, since its process started.
#[derive(Debug, Default)]
pub struct BlockStats {
    /// Completed reads.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Completed writes.
    pub writes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Completed flushes.
    pub flushes: AtomicU64,
    /// Completed discards and write-zeroes.
    pub discards: AtomicU64,
    /// Requests answered with an error of the host's storage.
    pub errors: AtomicU64,
    /// Requests that broke the protocol.
    pub malformed: AtomicU64,
    /// Times a request waited for the limits.
    pub throttled: AtomicU64,
}

/// What can be changed about a disk while it works. Cheap to clone; outlives the device without harm.
#[derive(Debug, Clone)]
pub struct BlockControl(Arc<LimitsSlot>);

impl BlockControl {
    /// Replaces the limits; a request that waits is looked at again at once.
    pub fn set_limits(&self, limits: RateLimits) {
        self.0.set(limits);
    }
}

#[cfg(test)]
mod tests;
