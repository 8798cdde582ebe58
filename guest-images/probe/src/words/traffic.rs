//! `netsend`, `netsink`: how many frames go out, or come in, in a time.

use crate::clock::{self, Deadline};
use crate::console::Line;
use crate::cpu;
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::nic::{FRAME_BYTES_MAX, HEADER_BYTES, Nic};
use crate::virtio::queue::Segment;
use crate::words::net::{datagram, resolve};
use crate::words::{Settings, note};
use crate::{check, memory, say};

const IN_FLIGHT_MAX: u64 = 64;
const STALL_MS: u64 = 5000;
const DISCARD_PORT: u16 = 9;
/// Ethernet, IPv4 and UDP headers.
const HEADERS_BYTES: u64 = 42;

/// `netsend=<bytes>,<ms>`: datagrams with so many bytes of payload to the gateway's port 9.
pub fn send(settings: &Settings, bytes: u64, ms: u64, report: &mut Line) -> Outcome {
    check!(settings.gateway != [0; 4], "give gw=<address> first");
    check!(bytes + HEADERS_BYTES <= FRAME_BYTES_MAX as u64, "{bytes} bytes are too many for a frame");
    let mut nic = Nic::require(settings.nic)?;
    let gateway_mac = resolve(&mut nic, settings)?;
    let length = HEADER_BYTES + HEADERS_BYTES + bytes;
    let buffer = memory::allocate(length.div_ceil(memory::PAGE_BYTES)).ok_or_else(out_of_memory)?;
    let frame = memory::bytes_mut(buffer + HEADER_BYTES, length - HEADER_BYTES);
    datagram(&nic, settings, gateway_mac, DISCARD_PORT, frame);
    // Every frame in flight is the same memory: the device only reads it.
    let segment = [Segment::Read { address: buffer, bytes: length as u32 }];
    let start = cpu::tsc();
    let end = Deadline::in_ms(ms);
    let mut stalled = Deadline::in_ms(STALL_MS);
    let (mut in_flight, mut sent) = (0, 0u64);
    loop {
        while in_flight < IN_FLIGHT_MAX && !end.passed() && nic.transmit.add(&segment).is_some() {
            in_flight += 1;
        }
        nic.transmit.kick();
        while nic.transmit.poll()?.is_some() {
            in_flight -= 1;
            sent += 1;
            stalled = Deadline::in_ms(STALL_MS);
        }
        if in_flight == 0 && end.passed() {
            break;
        }
        check!(!stalled.passed(), "{in_flight} frames not taken in {STALL_MS} ms");
    }
    rates(report, sent, sent * (HEADERS_BYTES + bytes), cpu::tsc() - start);
    nic.device.reset()
}

/// `netsink=<ms>`: counts the frames that come, from the first on.
pub fn sink(settings: &Settings, ms: u64, report: &mut Line) -> Outcome {
    let mut nic = Nic::require(settings.nic)?;
    say!("probe: netsink ready");
    let mut frame = [0u8; FRAME_BYTES_MAX];
    let (mut frames, mut bytes) = (0u64, 0u64);
    let mut start = cpu::tsc();
    let mut end = Deadline::in_ms(ms);
    while !end.passed() {
        if let Some(length) = nic.poll(&mut frame)? {
            if frames == 0 {
                (start, end) = (cpu::tsc(), Deadline::in_ms(ms));
            }
            frames += 1;
            bytes += length as u64;
        }
    }
    rates(report, frames, bytes, cpu::tsc() - start);
    nic.device.reset()
}

fn rates(report: &mut Line, frames: u64, bytes: u64, cycles: u64) {
    let us = clock::cycles_to_us(cycles).max(1);
    note(report, format_args!("frames={frames} bytes={bytes} us={us}"));
    note(report, format_args!("frames_per_s={} mbit_per_s={}", frames * 1_000_000 / us, bytes * 8 / us));
}
