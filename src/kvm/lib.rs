//! The one room that speaks to KVM, behind types that cannot be misused. It knows no devices, no boot
//! formats and no wire: `vmm` joins those to it.
//!
//! ```text
//! host ──▶ vm ──▶ vcpu ──▶ exit       irq, doorbell, clock belong to the vm; kick to the vcpu
//! ```

pub mod cpuid;
mod error;
mod exit;
mod host;
mod irq;
mod kick;
pub mod start;
mod vcpu;
mod vm;

pub use error::Error;
pub use exit::{Broken, Exit, SystemEvent};
pub use host::{EXTENSIONS, Extension, Host};
pub use irq::{Line, Message, MsiVector};
pub use kick::{Kicker, install_handler};
pub use start::Start;
pub use vcpu::Vcpu;
pub use vm::{Irqchip, Vm};
