//! Guest RAM: where it lies, the memfd it lives in, and what is done to it from outside a device. It knows
//! neither KVM nor devices. `kvm` makes memory slots of it; `devices` and `vmm` read and write it.

pub mod layout;
mod ram;

pub mod packet;
pub mod ring;

pub use ram::{Error, Ram, discard, new};
