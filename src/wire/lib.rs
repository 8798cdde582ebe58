//! What the control family and the machine family say to each other: types and framing, no behaviour.
//! It knows no HTTP and no KVM. `host` and `cli` speak it to `vmm`, one JSON document per packet.
//!
//! ```text
//!  toftd ── launch ──▶ launcher ── fork, exec ──▶ toft-vmm (a shell: no machine yet)
//!    └───────────────── control ─────────────────────▲   Boot(MachineSpec) + descriptors
//! ```
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

pub mod channel;
pub mod console;
pub mod control;
pub mod copies;
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
pub mod isolation;
pub mod launch;
pub mod limits;
pub mod machine;
pub mod migration;
pub mod peer;
pub mod saved;
pub mod settling;
pub mod transfer;
pub mod will;
