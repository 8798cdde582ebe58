//! Stands in until the device room has interfaces: refuses them.
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use devices::limiter::RateLimits;
use devices::virtio::rng::Rng;

#[derive(Default)]
pub(super) struct NetStats {
    pub(super) rx_packets: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
    pub(super) tx_packets: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) rx_dropped: AtomicU64,
    pub(super) tx_dropped: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) throttled: AtomicU64,
}
#[allow(dead_code, reason = "stands in")]
pub(super) struct NetOptions {
    pub(super) name: String,
    pub(super) tap: File,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    pub(super) rx_limits: RateLimits,
    pub(super) tx_limits: RateLimits,
    pub(super) stats: Arc<NetStats>,
}
pub(super) struct NetControl;
impl NetControl {
    pub(super) fn set_limits(&self, _: RateLimits, _: RateLimits) {}
}
pub(super) struct Net;
impl Net {
    pub(super) fn new(_: NetOptions) -> io::Result<Net> {
        Err(io::ErrorKind::Unsupported.into())
    }
    pub(super) fn control(&self) -> NetControl {
        NetControl
    }
}
impl From<Net> for Rng {
    fn from(_: Net) -> Rng {
        Rng::new(Arc::default())
    }
}
