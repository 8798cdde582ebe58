//! `toft-vmm`: one process, one machine. It joins `kvm`, `devices` and `memory`, and obeys `wire`. It knows no
//! HTTP, no tenant, no path: everything it works on arrives as an open descriptor.
//!
//! ```text
//! launcher ──spawns──▶ control ─▶ machine ─▶ vcpu, boot          probe: one tiny guest, one report
//! ```
#![forbid(unsafe_code)]

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

mod machine;

mod control;
mod launcher;
mod probe;

mod modes;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use modes::main;
