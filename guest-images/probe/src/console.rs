//! The serial console: a 16550 at port 0x3f8, written line by line and read by polling.
//! Not a terminal; knows no test. Called by the word runner and by the panic path.

use crate::cpu;
use core::fmt::{self, Write};

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
const DATA_READY: u8 = 0x01;
/// What a 16550 takes at once when its transmitter is empty.
const FIFO_BYTES: usize = 16;
/// A transmitter that stays full this long is stuck, and the rest of the line is lost.
const POLLS_MAX: u32 = 1_000_000;

/// Longest line the probe prints; what is longer is cut.
pub const LINE_BYTES: usize = 512;

/// Switches the FIFOs on and clears them.
pub fn set_up() {
    cpu::out8(PORT + 2, 0x07);
}

/// A line under construction.
pub struct Line {
    bytes: [u8; LINE_BYTES],
    len: usize,
}

impl Line {
    pub const fn new() -> Self {
        Self { bytes: [0; LINE_BYTES], len: 0 }
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub fn as_str(&self) -> &str {
        // A cut inside a character leaves an invalid tail, which is dropped.
        match core::str::from_utf8(self.as_bytes()) {
            Ok(text) => text,
            Err(e) => core::str::from_utf8(&self.bytes[..e.valid_up_to()]).unwrap_or(""),
        }
    }

    pub fn push(&mut self, byte: u8) {
        if self.len < LINE_BYTES {
            self.bytes[self.len] = byte;
            self.len += 1;
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| self.push(byte));
        Ok(())
    }
}

/// Prints one line.
pub fn print(arguments: fmt::Arguments) {
    let mut line = Line::new();
    let _ = line.write_fmt(arguments);
    write(line.as_bytes());
    write(b"\r\n");
}

#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => { $crate::console::print(format_args!($($argument)*)) };
}

fn write(bytes: &[u8]) {
    for chunk in bytes.chunks(FIFO_BYTES) {
        let empty = (0..POLLS_MAX).any(|_| cpu::in8(LINE_STATUS) & TRANSMITTER_EMPTY != 0);
        if !empty {
            return;
        }
        cpu::out_string(PORT, chunk);
    }
}

/// One received byte, when there is one.
pub fn read() -> Option<u8> {
    (cpu::in8(LINE_STATUS) & DATA_READY != 0).then(|| cpu::in8(PORT))
}
