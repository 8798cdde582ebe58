//! A PCI bus with one function per slot: configuration space, MSI-X, the host bridge and the root that the
//! guest reaches by ECAM, by ports and through BARs. It knows no virtio; `virtio::transport::pci` is a function.

pub mod config;
pub mod msix;

pub mod function;

pub mod bridge;
pub mod root;

pub use function::{Decoded, Function};
pub use root::{AttachError, Root};
