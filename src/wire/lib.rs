//! What the control family and the machine family say to each other: types and framing, no behaviour.
//! It knows no HTTP and no KVM. `host` and `cli` speak it to `vmm`, one JSON document per packet.
//!
//! ```text
//!  toftd ── launch ──▶ launcher ── fork, exec ──▶ toft-vmm (a shell: no machine yet)
//!    └───────────────── control ─────────────────────▲   Boot(MachineSpec) + descriptors
//! ```
#![forbid(unsafe_code)]

pub mod channel;
pub mod console;
pub mod control;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod isolation;
pub mod launch;
pub mod limits;
pub mod machine;
pub mod saved;
pub mod will;
