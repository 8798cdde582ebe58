//! Guest RAM: where it lies, the memfd it lives in, and what is done to it from outside a device. It knows
//! neither KVM nor devices. `kvm` makes memory slots of it; `devices` and `vmm` read and write it.
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

pub mod layout;
pub mod marks;
mod pages;
mod ram;
pub mod settling;

mod extent;
mod file;
mod mapped;

pub mod guard;
pub mod owed;

pub mod packet;
pub mod ring;

pub use extent::{Extent, clear, fill, first_touched, is_zero, read, receive, send, touched};
pub use file::read_file;
pub use pages::Pages;
pub use ram::{Backing, Error, Ram, build, discard, handle, lay_over, new, replace};
