//! The host: keeps servers, images, volumes and networks, and survives its own death at any line.
//! It knows no HTTP and opens no /dev/kvm ioctl; VMMs are processes it talks to through `wire`.
//! `http` serves this facade; `src/bin/toftd.rs` opens it.
//!
//! ```text
//!  facade (Servers, Images, …) ── one transaction: rows + operation + event ──▶ store
//!        └── poke ──▶ servers::actor ── lifecycle::step (pure) ──▶ effects ──▶ vmms, volumes, network
//! ```
#![forbid(unsafe_code)]

pub mod call;
pub mod config;
pub mod core;
pub mod error;
pub mod labels;
pub mod limits;

pub mod store;

pub mod events;
pub mod idempotency;
pub mod operations;
pub mod tokens;
mod upload;

pub mod images;
pub mod network;
pub mod seed;
pub mod volumes;

pub mod snapshots;

pub mod vmms;

pub mod cpu;

pub mod servers;

pub mod migration;

pub mod report;

mod open;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

// Lets the fake VMM be the same file in this room's tests and in those of the rooms above.
#[cfg(test)]
extern crate self as host;
#[cfg(test)]
#[path = "../../tests/support/fake_vmm.rs"]
#[allow(unreachable_pub, dead_code, reason = "several rooms include it, and each uses a part of it")]
mod fake_vmm;
#[cfg(test)]
#[path = "../../tests/support/stage.rs"]
#[allow(unreachable_pub, dead_code, reason = "several rooms include it, and each uses a part of it")]
mod stage;

pub use call::{Actor, Answer, Call, Idempotency};
pub use config::Config;
pub use core::{Checkpoint, Fate};
pub use error::{Error, Result};
pub use open::Host;
pub use store::Version;
