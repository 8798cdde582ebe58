//! `forge`, `netwatch`: a guest that sends what is not its to send, and one beside it that tells what arrives. Every
//! forged frame carries its kind in its tail, so the watcher needs to know nothing else about it.

use crate::clock::Deadline;
use crate::console::Line;
use crate::failure::Outcome;
use crate::virtio::nic::{FRAME_BYTES_MAX, Nic};
use crate::words::net::{answer, datagram, resolve};
use crate::words::{Settings, note};
use crate::{check, say};

const FRAME_BYTES: usize = 128;
const MARK: &[u8] = b"forged:";
const HONEST: &[u8] = b"honest;";
/// Where the mark begins: behind the longest headers that are forged here.
const TAIL: usize = 96;
const STRANGER: [u8; 6] = [0x52, 0x54, 0, 0xee, 0xee, 0xee];
const BROADCAST: [u8; 6] = [0xff; 6];
const DISCARD_PORT: u16 = 9;

/// Turns a datagram to the victim into what it is not.
type Forgery = (&'static str, fn(&mut [u8; FRAME_BYTES], own: [u8; 6], settings: &Settings));

const FORGERIES: &[Forgery] = &[
    ("mac", |frame, _, _| frame[6..12].copy_from_slice(&STRANGER)),
    ("ipv4", |frame, _, settings| {
        frame[26..30].copy_from_slice(&settings.gateway);
        frame[29] ^= 0x55;
        checksum(frame);
    }),
    ("no-ipv4", |frame, _, _| {
        frame[26..30].fill(0);
        checksum(frame);
    }),
    ("arp-answer", |frame, own, settings| arp(frame, 2, own, settings.gateway)),
    ("arp-question", |frame, own, settings| arp(frame, 1, own, settings.gateway)),
    ("arp-hardware", |frame, _, settings| arp(frame, 1, STRANGER, settings.ip)),
    ("dhcp-answer", |frame, _, _| {
        frame[..6].copy_from_slice(&BROADCAST);
        frame[34..36].copy_from_slice(&67u16.to_be_bytes());
        frame[36..38].copy_from_slice(&68u16.to_be_bytes());
    }),
    ("router-advertisement", |frame, _, _| {
        frame[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14..TAIL].fill(0);
        frame[14] = 0x60;
        frame[18..22].copy_from_slice(&[0, FRAME_BYTES as u8 - 54, 58, 255]);
        frame[22..24].copy_from_slice(&[0xfe, 0x80]);
        frame[38..54].copy_from_slice(&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        frame[54] = 134;
    }),
    ("vlan", |frame, _, _| {
        frame.copy_within(12..TAIL - 4, 16);
        frame[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
    }),
    ("unknown-protocol", |frame, _, _| frame[12..14].copy_from_slice(&[0x88, 0xb5])),
];

fn checksum(frame: &mut [u8; FRAME_BYTES]) {
    frame[24..26].fill(0);
    let sum = super::net::checksum(0, &frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

fn arp(frame: &mut [u8; FRAME_BYTES], operation: u8, hardware: [u8; 6], address: [u8; 4]) {
    frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame[22..28].copy_from_slice(&hardware);
    frame[28..32].copy_from_slice(&address);
    frame[32..TAIL].fill(0);
}

fn mark(frame: &mut [u8; FRAME_BYTES], parts: [&[u8]; 2]) {
    frame[TAIL..].fill(b' ');
    let bytes = parts.into_iter().flatten();
    frame[TAIL..].iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
}

/// `forge`: one frame of each kind to the guest at `gw=`, and then an honest one.
pub fn run(settings: &Settings, report: &mut Line) -> Outcome {
    check!(settings.gateway != [0; 4], "give gw=<the victim's address> first");
    let mut nic = Nic::require(settings.nic)?;
    let victim = resolve(&mut nic, settings)?;
    let mut honest = [0; FRAME_BYTES];
    datagram(&nic, settings, victim, DISCARD_PORT, &mut honest);
    for (kind, forge) in FORGERIES {
        let mut frame = honest;
        forge(&mut frame, nic.mac, settings);
        mark(&mut frame, [MARK, kind.as_bytes()]);
        nic.send(&frame, None)?;
    }
    mark(&mut honest, [HONEST, b""]);
    nic.send(&honest, None)?;
    note(report, format_args!("kinds={}", FORGERIES.len()));
    nic.device.reset()
}

/// `netwatch=<ms>`: answers ARP, and says of each marked frame what it is.
pub fn watch(settings: &Settings, ms: u64, report: &mut Line) -> Outcome {
    check!(settings.ip != [0; 4], "give ip=<address> first");
    let mut nic = Nic::require(settings.nic)?;
    say!("probe: netwatch ready");
    let end = Deadline::in_ms(ms);
    let mut frame = [0u8; FRAME_BYTES_MAX];
    let (mut honest, mut forged) = (0, 0);
    while !end.passed() {
        let Some(length) = nic.poll(&mut frame)? else {
            core::hint::spin_loop();
            continue;
        };
        match frame[..length].get(TAIL..).map(|tail| (tail.starts_with(MARK), tail.starts_with(HONEST), tail))
        {
            Some((true, _, tail)) => {
                forged += 1;
                let kind = core::str::from_utf8(&tail[MARK.len()..]).unwrap_or("?");
                say!("probe: netwatch forged {}", kind.trim());
            }
            Some((_, true, _)) => {
                honest += 1;
                say!("probe: netwatch honest {honest}");
            }
            _ => drop(answer(&mut nic, settings, &mut frame[..length])?),
        }
    }
    note(report, format_args!("honest={honest} forged={forged}"));
    nic.device.reset()
}

/// `netstall`: leaves the card without receive buffers until a line is typed, then takes what comes until the next.
pub fn stall(settings: &Settings, report: &mut Line) -> Outcome {
    const PATIENCE_MS: u64 = 60_000;
    let mut nic = Nic::without_buffers(settings.nic)?;
    let mut frame = [0u8; FRAME_BYTES_MAX];
    let wait = |what: &str, each: &mut dyn FnMut() -> Outcome| -> Outcome {
        say!("probe: netstall {what}");
        let end = Deadline::in_ms(PATIENCE_MS);
        while crate::console::read() != Some(b'\n') {
            check!(!end.passed(), "no newline after {PATIENCE_MS} ms");
            each()?;
        }
        Ok(())
    };
    wait("empty", &mut || Ok(()))?;
    nic.fill()?;
    let (mut frames, mut bytes) = (0u64, 0u64);
    wait("filled", &mut || {
        // A batch between two looks at the console, which is slow.
        for _ in 0..256 {
            let Some(length) = nic.poll(&mut frame)? else { break };
            frames += 1;
            bytes += length as u64;
            if frames == 1 {
                say!("probe: netstall received");
            }
        }
        Ok(())
    })?;
    note(report, format_args!("frames={frames} bytes={bytes}"));
    nic.device.reset()
}
