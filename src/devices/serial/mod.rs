//! A 16550 serial port over `vm_superio`. It keeps no output: that goes to a sink at once. Input is as much as the
//! receive FIFO holds; the rest stays with the caller. `vmm` puts it at the first serial port.
use std::convert::Infallible;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

mod state;

pub use state::SerialState;

use crate::bus::{Region, locked};
use crate::interrupt::Interrupt;
use crate::state::Refused;

/// Ports of one 16550.
pub const PORTS: u64 = 8;

/// Offset of the receive buffer.
const RECEIVE: u64 = 0;

/// Registers that [`Uart`] does not act on, or that stand in the way of those, as it counts them.
const RECEIVE_REGISTER: u8 = 0;
const FIFO_CONTROL: u8 = 2;
const LINE_CONTROL: u8 = 3;

/// FIFO control: drop what was received. The bit takes itself back.
const CLEAR_RECEIVED: u8 = 1 << 1;

/// Line control: the divisor is shown where the receive buffer was.
const DIVISOR_SHOWN: u8 = 1 << 7;

type Uart = vm_superio::Serial<Line, NoEvents, Box<dyn Write + Send>>;

/// The port. A [`Region`] of [`PORTS`] ports.
pub struct Serial {
    uart: Mutex<Uart>,
    /// Free places in an empty FIFO.
    capacity: usize,
    /// Called when the guest has emptied the FIFO.
    room: Box<dyn Fn() + Send + Sync>,
    lost: AtomicU64,
}

impl Serial {
    /// A port that raises `interrupt` and writes what the guest sends to `sink`, byte by byte, on the thread of
    /// the vCPU: the sink must not block and must bound what it keeps.
    pub fn new(interrupt: Arc<dyn Interrupt>, sink: Box<dyn Write + Send>) -> Serial {
        Serial::with_room(interrupt, sink, Box::new(|| {}))
    }

    /// Like [`Serial::new`]; `room` is called, on the vCPU's thread, each time the guest has read the last byte of
    /// input, so that whoever holds more can give it.
    pub fn with_room(
        interrupt: Arc<dyn Interrupt>,
        sink: Box<dyn Write + Send>,
        room: Box<dyn Fn() + Send + Sync>,
    ) -> Serial {
        let uart = Uart::new(Line(interrupt), sink);
        let capacity = uart.fifo_capacity();
        Serial { uart: Mutex::new(uart), capacity, room, lost: AtomicU64::new(0) }
    }

    /// Gives input to the guest. Returns how many bytes the FIFO took; the caller keeps the others.
    pub fn input(&self, data: &[u8]) -> usize {
        locked(&self.uart).enqueue_raw_bytes(data).unwrap_or(0)
    }

    /// The registers and what the guest has not read yet.
    pub fn save(&self) -> SerialState {
        SerialState::of(locked(&self.uart).state())
    }

    /// Takes over what another port was. An interrupt that was asked for is raised again: it may have been on its way.
    pub fn restore(&self, state: &SerialState) -> Result<(), Refused> {
        let mut uart = locked(&self.uart);
        let line = Line(Arc::clone(&uart.interrupt_evt().0));
        let registers = state.registers()?;
        let other = Uart::from_state(&registers, line, NoEvents, Box::new(std::io::sink()));
        let mut other = other.map_err(|_| Refused::new("serial", "its input is longer than a FIFO"))?;
        // The sink outlives the registers.
        std::mem::swap(uart.writer_mut(), other.writer_mut());
        *uart = other;
        Ok(())
    }

    /// Bytes the sink refused since the port was made.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Region for Serial {
    /// A wider access is made of byte cycles, as the bus of a PC makes them.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut emptied = false;
        {
            let mut uart = locked(&self.uart);
            for (at, byte) in (0..).zip(data.iter_mut()) {
                let register = offset.saturating_add(at);
                let held = uart.fifo_capacity() < self.capacity;
                *byte = u8::try_from(register).map_or(0xFF, |register| uart.read(register));
                emptied |= held && register == RECEIVE && uart.fifo_capacity() == self.capacity;
            }
        }
        if emptied {
            (self.room)();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut emptied = false;
        {
            let mut uart = locked(&self.uart);
            for (at, byte) in (0..).zip(data) {
                let Ok(register) = u8::try_from(offset.saturating_add(at)) else { break };
                // The interrupt cannot fail, so this is the sink.
                if uart.write(register, *byte).is_err() {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                }
                if register == FIFO_CONTROL && byte & CLEAR_RECEIVED != 0 {
                    emptied |= uart.fifo_capacity() < self.capacity;
                    clear_received(&mut uart, self.capacity);
                }
            }
        }
        if emptied {
            (self.room)();
        }
    }
}

/// Reads the FIFO empty, which is how the crate lets go of what it has received and of its interrupt.
fn clear_received(uart: &mut Uart, capacity: usize) {
    let control = uart.read(LINE_CONTROL);
    // Writing this register fails for nobody: it reaches neither interrupt nor sink.
    let _ = uart.write(LINE_CONTROL, control & !DIVISOR_SHOWN);
    for _ in uart.fifo_capacity()..capacity {
        uart.read(RECEIVE_REGISTER);
    }
    let _ = uart.write(LINE_CONTROL, control);
}

struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
