//! The emulated hardware: buses, PCI, virtio devices, serial port, power registers. It knows no KVM, no wire and
//! no server: interrupts, doorbells and notices are trait objects that `vmm` makes. Everything that the guest
//! writes is hostile here, so nothing in this room may panic on it.
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test that meets the unexpected is meant to fail there and then"
    )
)]

// Storeys: a module uses only modules above it.
pub mod limits;

pub mod bus;
pub mod interrupt;
pub mod limiter;
pub mod pause;
pub mod state;

pub mod pci;
pub mod power;
pub mod serial;

pub mod virtio;

#[cfg(any(test, fuzzing))]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a judge that meets the unexpected is meant to fail there and then"
)]
pub mod fuzz;

pub use bus::{Bus, Claim, Region};
pub use interrupt::{Doorbells, Interrupt, Msi, MsiMessage, Notices};
pub use pause::NotDrained;
pub use state::Refused;
pub use vmm_sys_util::eventfd::EventFd;
