//! Entropy device (virtio 1.2, section 5.4): fills the driver's buffers from the host's random number generator.
//! It has no configuration and no state of its own. `vmm` gives one to every machine.

mod backend;

mod device;

pub use device::{Rng, RngStats};
