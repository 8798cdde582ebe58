//! What it means that a device is paused: it takes nothing new and has nothing in flight. The type alone; virtio
//! workers and PCI functions pause, `vmm` asks them to.

/// A pause that did not come to its end in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {in_flight} requests did not end in time")]
pub struct NotDrained {
    /// The device's name.
    pub device: String,
    /// Requests that the backend has not answered.
    pub in_flight: usize,
}
