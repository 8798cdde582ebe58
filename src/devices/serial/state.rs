//! A serial port as data. The crate that emulates it takes any register; what is checked is what bounds memory.
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState as Registers;

use crate::state::Refused;

/// Bytes of a 16550's FIFO as the crate emulates it.
const FIFO_BYTES: usize = 64;

/// Registers by their names in the 16550's data sheet, and the receive FIFO.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Low and high byte of the divisor.
    pub divisor: [u8; 2],
    /// Interrupt enable.
    pub interrupt_enable: u8,
    /// Interrupt identification.
    pub interrupt_identification: u8,
    /// Line control.
    pub line_control: u8,
    /// Line status.
    pub line_status: u8,
    /// Modem control.
    pub modem_control: u8,
    /// Modem status.
    pub modem_status: u8,
    /// Scratch.
    pub scratch: u8,
    /// What the guest has not read, oldest first.
    pub received: Vec<u8>,
}

impl SerialState {
    pub(super) fn of(registers: Registers) -> SerialState {
        SerialState {
            divisor: [registers.baud_divisor_low, registers.baud_divisor_high],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            received: registers.in_buffer,
        }
    }

    pub(super) fn registers(&self) -> Result<Registers, Refused> {
        if self.received.len() > FIFO_BYTES {
            return Err(Refused::new("serial", "its input is longer than a FIFO"));
        }
        let [baud_divisor_low, baud_divisor_high] = self.divisor;
        Ok(Registers {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.received.clone(),
        })
    }
}
