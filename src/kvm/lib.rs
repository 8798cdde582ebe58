//! The one room that speaks to KVM, behind types that cannot be misused. It knows no devices, no boot
//! formats and no wire: `vmm` joins those to it.
//!
//! ```text
//! host ──▶ vm ──▶ vcpu ──▶ exit       irq, doorbell, clock belong to the vm; kick to the vcpu
//! ```
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

mod cpu_state;
pub mod cpuid;
mod dirty;
mod error;
mod exit;
mod host;
mod irq;
mod kick;
mod msrs;
pub mod start;
mod vcpu;
mod vm;
mod vm_state;

pub use cpu_state::CpuState;
pub use dirty::DirtyLog;
pub use error::Error;
pub use exit::{Broken, Exit, SystemEvent};
pub use host::{EXTENSIONS, Extension, Host};
pub use irq::{Line, Message, MsiVector};
pub use kick::{Kicker, install_handler};
pub use start::Start;
pub use vcpu::Vcpu;
pub use vm::{Irqchip, Vm};
pub use vm_state::VmState;
