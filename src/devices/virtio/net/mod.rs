//! A network interface (virtio 1.2, section 5.1) over a tap: checksum and segmentation offloads both ways, mergeable
//! receive buffers, limits. It knows no bridge, address or rule and creates no tap; `vmm` makes one per interface of
//! its machine.
//!
//! `header` checks what comes before each packet, `backend` is the tap, `receive` and `transmit` are the two
//! directions, `service` runs them in one thread.
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::limiter::{LimitsSlot, RateLimits};

mod backend;
mod config;
mod device;
mod header;
mod receive;
mod service;
mod transmit;

pub use backend::{Link, LinkError};
pub use device::{Net, NetOptions};

/// What an interface has done since its process started, as the guest sees directions. Bytes are those of the
/// Ethernet frames.
#[derive(Debug, Default)]
pub struct NetStats {
    /// Packets to the guest.
    pub rx_packets: AtomicU64,
    /// Bytes to the guest.
    pub rx_bytes: AtomicU64,
    /// Packets from the guest.
    pub tx_packets: AtomicU64,
    /// Bytes from the guest.
    pub tx_bytes: AtomicU64,
    /// Packets for the guest that did not fit its buffers or that it could not take as they were.
    pub rx_dropped: AtomicU64,
    /// Packets from the guest that the tap did not take.
    pub tx_dropped: AtomicU64,
    /// Chains that broke the protocol.
    pub malformed: AtomicU64,
    /// Times a direction waited for its limits.
    pub throttled: AtomicU64,
}

/// What can be changed about an interface while it works. Cheap to clone; outlives the device without harm.
#[derive(Debug, Clone)]
pub struct NetControl {
    rx: Arc<LimitsSlot>,
    tx: Arc<LimitsSlot>,
}

impl NetControl {
    /// Replaces the limits; what waits is looked at again at once.
    pub fn set_limits(&self, rx: RateLimits, tx: RateLimits) {
        self.rx.set(rx);
        self.tx.set(tx);
    }
}

#[cfg(test)]
mod tests;
