//! `toft-vmm`: one process, one machine. It joins `kvm`, `devices` and `memory`, and obeys `wire`. It knows no
//! HTTP, no tenant, no path: everything it works on arrives as an open descriptor.
//!
//! ```text
//! launcher ──spawns──▶ control ─▶ machine ─▶ vcpu, boot          probe: one tiny guest, one report
//! ```
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable,
    clippy::indexing_slicing
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::indexing_slicing,
        reason = "a test that meets the unexpected is meant to fail there and then"
    )
)]

// Storeys: a module uses only modules above it.
mod limits;

mod bell;
mod log;
pub mod sandbox;
mod threads;
mod will;

mod boot;
mod console;
mod snapshot;
mod vcpu;

mod migrate;

mod machine;

mod control;
mod launcher;
mod probe;

mod modes;

#[cfg(any(test, fuzzing))]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable,
    clippy::indexing_slicing,
    reason = "a judge that meets the unexpected is meant to fail there and then"
)]
pub mod fuzz;

pub use launcher::jail_of;
pub use modes::main;
