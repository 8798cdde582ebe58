//! The serial port, against a model of a 16550's data path: what the guest sends comes out in order, what is typed
//! comes in in order, and nothing is held beyond the FIFO.
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;

use super::driver::{byte, word};
use crate::bus::{Region, locked};
use crate::interrupt::Interrupt;
use crate::serial::Serial;

const FIFO_BYTES: usize = 64;
const STEPS_MAX: usize = 512;

#[derive(Default)]
pub(super) struct Pulses(AtomicUsize);

impl Interrupt for Pulses {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A sink that refuses every byte of one value.
#[derive(Clone, Default)]
pub(super) struct Sink(Arc<Mutex<Vec<u8>>>);

const REFUSED: u8 = 0xEE;

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.contains(&REFUSED) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        locked(&self.0).extend(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The part of a 16550 that data passes through.
struct Model {
    line: u8,
    modem: u8,
    fifo: VecDeque<u8>,
    sent: Vec<u8>,
    lost: u64,
    /// Times the guest has emptied the FIFO.
    emptied: usize,
}

impl Model {
    /// Eight bits, no parity, one stop bit, as firmware leaves it.
    fn new() -> Model {
        Model { line: 3, modem: 8, fifo: VecDeque::new(), sent: Vec::new(), lost: 0, emptied: 0 }
    }

    fn write(&mut self, register: u64, value: u8) {
        match register {
            0 if self.line & 0x80 != 0 => {}
            0 if self.modem & 0x10 != 0 && self.fifo.len() == FIFO_BYTES => {}
            0 if self.modem & 0x10 != 0 => self.fifo.push_back(value),
            0 if value == REFUSED => self.lost += 1,
            0 => self.sent.push(value),
            2 if value & 2 != 0 => self.fifo.clear(),
            3 => self.line = value,
            4 => self.modem = value,
            _ => {}
        }
    }

    /// What a read answers, where the model knows it.
    fn read(&mut self, register: u64) -> Option<u8> {
        match register {
            0 if self.line & 0x80 != 0 => None,
            0 => Some(self.fifo.pop_front().unwrap_or(0)),
            3 => Some(self.line),
            4 => Some(self.modem),
            256.. => Some(0xFF),
            _ => None,
        }
    }
}

/// Reads, writes and types as `data` says.
pub fn serial(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let sink = Sink::default();
    let rooms = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&rooms);
    let room = Box::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    let pulses = Arc::new(Pulses::default());
    let serial = Serial::with_room(pulses, Box::new(sink.clone()), room);
    let mut model = Model::new();
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        let verb = byte(&mut input);
        let offset = if verb & 0x80 == 0 { u64::from(verb >> 2 & 7) } else { offset(&mut input) };
        let held = !model.fifo.is_empty();
        match verb & 3 {
            0 => {
                let mut found = vec![0xA5; usize::from(byte(&mut input) % 9)];
                serial.read(offset, &mut found);
                for (at, byte) in (0..).zip(found) {
                    let wanted = model.read(offset.saturating_add(at));
                    assert!(
                        wanted.is_none_or(|wanted| wanted == byte),
                        "register {offset}+{at} read {byte:#x}, not {wanted:?}"
                    );
                }
            }
            1 | 2 => {
                let count = usize::from(byte(&mut input) % 9).min(input.len());
                let data = input.bytes(count).unwrap_or_default();
                serial.write(offset, data);
                for (at, byte) in (0..).zip(data) {
                    match offset.checked_add(at) {
                        Some(register @ 0..=255) => model.write(register, *byte),
                        _ => break,
                    }
                }
            }
            _ => {
                let count = usize::from(byte(&mut input)).min(input.len());
                let data = input.bytes(count).unwrap_or_default();
                let taken = serial.input(data);
                let free = if model.modem & 0x10 == 0 { FIFO_BYTES - model.fifo.len() } else { 0 };
                assert_eq!(taken, data.len().min(free));
                model.fifo.extend(&data[..taken]);
            }
        }
        if held && model.fifo.is_empty() {
            model.emptied += 1;
        }
        assert_eq!(*locked(&sink.0), model.sent);
        assert_eq!(serial.lost(), model.lost);
        assert!(model.fifo.len() <= FIFO_BYTES);
        assert!(rooms.load(Ordering::Relaxed) >= model.emptied, "nobody was told that there is room");
    }
    // What is left comes out when the guest looks at the right register.
    serial.write(3, &[0]);
    for wanted in model.fifo {
        let mut found = [0];
        serial.read(0, &mut found);
        assert_eq!(found, [wanted]);
    }
}

fn offset(input: &mut Unstructured<'_>) -> u64 {
    match word(input) {
        far @ 0xFF00.. => u64::MAX - u64::from(far & 0xFF),
        near => u64::from(near % 0x200),
    }
}
