//! How a driver reaches a virtio device. There is one way, PCI; a second would be a second way to do the same.

pub mod pci;
