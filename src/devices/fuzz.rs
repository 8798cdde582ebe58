//! What fuzzers call, one function for each thing a guest can speak to: bytes become a driver, right or wrong, and its
//! effects are judged. No part of a machine. The targets in `tests/fuzz` call it with new bytes, and the tests here
//! with the seeds kept there.
mod block;
mod driver;
mod net;
mod pci;
mod queue;
mod restored;
mod serial;
mod small;

pub use block::block;
pub use net::net;
pub use pci::pci;
pub use queue::queue;
pub use restored::restored;
pub use serial::serial;
pub use small::{balloon, rng};

#[cfg(test)]
mod tests;
