//! `net`, `netecho`: a network card, an ARP question, and a tiny host that answers ARP, ICMP echo
//! and UDP port 7. Addresses come from the words `ip=` and `gw=`.

use crate::clock::Deadline;
use crate::console::Line;
use crate::failure::Outcome;
use crate::virtio::nic::{FEATURE_CHECKSUM, FRAME_BYTES_MAX, Nic, PartialChecksum};
use crate::words::{Settings, note};
use crate::{check, fail, say};

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ARP_ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const BROADCAST: [u8; 6] = [0xff; 6];
const FRAME_BYTES_MIN: usize = 60;
const ICMP: u8 = 1;
const UDP: u8 = 17;
const ECHO_PORT: u16 = 7;
const ARP_TRIES: u32 = 5;
const ARP_MS: u64 = 500;

/// What a received frame was, after it has been answered.
#[derive(PartialEq)]
pub enum Answered {
    Arp,
    Ping,
    Datagram,
    Nothing,
}

/// `net`: brings the card up and, with `gw=`, asks for the gateway's hardware address.
pub fn run(settings: &Settings, report: &mut Line) -> Outcome {
    let mut nic = Nic::require(settings.nic)?;
    describe(&nic, report);
    if settings.gateway != [0; 4] {
        let mac = resolve(&mut nic, settings)?;
        note(report, format_args!("gw_mac={}", Mac(mac)));
    }
    nic.device.reset()
}

fn describe(nic: &Nic, report: &mut Line) {
    note(report, format_args!("mac={} link={}", Mac(nic.mac), u8::from(nic.link_is_up())));
    note(report, format_args!("mtu={} features={:#x}", nic.mtu().unwrap_or(1500), nic.device.features));
    note(report, format_args!("queues={}", nic.device.queue_count()));
}

struct Mac([u8; 6]);

impl core::fmt::Display for Mac {
    fn fmt(&self, f: &mut core::fmt::Formatter) -> core::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

pub fn resolve(nic: &mut Nic, settings: &Settings) -> Outcome<[u8; 6]> {
    let mut frame = [0u8; FRAME_BYTES_MAX];
    for _ in 0..ARP_TRIES {
        let mut question = [0u8; FRAME_BYTES_MIN];
        question[..6].copy_from_slice(&BROADCAST);
        question[6..12].copy_from_slice(&nic.mac);
        question[12..14].copy_from_slice(&ETHERTYPE_ARP);
        question[14..20].copy_from_slice(&ARP_ETHERNET_IPV4);
        question[21] = 1;
        question[22..28].copy_from_slice(&nic.mac);
        question[28..32].copy_from_slice(&settings.ip);
        question[38..42].copy_from_slice(&settings.gateway);
        nic.send(&question, None)?;
        let deadline = Deadline::in_ms(ARP_MS);
        while !deadline.passed() {
            let Some(length) = nic.poll(&mut frame)? else { continue };
            let is_answer = length >= 42
                && frame[12..14] == ETHERTYPE_ARP
                && frame[20..22] == [0, 2]
                && frame[28..32] == settings.gateway;
            if is_answer {
                return Ok(core::array::from_fn(|index| frame[22 + index]));
            }
        }
    }
    fail!("{ARP_TRIES} ARP questions for the gateway, no answer")
}

/// `netecho=<n>[,<ms>]`: until `n` datagrams to port 7 were echoed.
pub fn echo(settings: &Settings, wanted: u64, timeout_ms: u64, report: &mut Line) -> Outcome {
    check!(settings.ip != [0; 4], "give ip=<address> first");
    let mut nic = Nic::require(settings.nic)?;
    say!("probe: netecho ready mac={}", Mac(nic.mac));
    let deadline = Deadline::in_ms(timeout_ms);
    let mut frame = [0u8; FRAME_BYTES_MAX];
    let (mut echoed, mut arps, mut pings) = (0, 0, 0);
    while echoed < wanted {
        check!(!deadline.passed(), "{echoed} of {wanted} datagrams echoed in {timeout_ms} ms");
        let Some(length) = nic.poll(&mut frame)? else {
            core::hint::spin_loop();
            continue;
        };
        match answer(&mut nic, settings, &mut frame[..length])? {
            Answered::Datagram => echoed += 1,
            Answered::Arp => arps += 1,
            Answered::Ping => pings += 1,
            Answered::Nothing => {}
        }
    }
    note(report, format_args!("echoed={echoed} arps={arps} pings={pings} merged_max={}", nic.merged_max));
    nic.device.reset()
}

/// Turns the frame into its own answer and sends it.
pub fn answer(nic: &mut Nic, settings: &Settings, frame: &mut [u8]) -> Outcome<Answered> {
    if frame.len() < 42 {
        return Ok(Answered::Nothing);
    }
    if frame[12..14] == ETHERTYPE_ARP && frame[20..22] == [0, 1] && frame[38..42] == settings.ip {
        frame.copy_within(22..32, 32);
        frame[21] = 2;
        frame[22..28].copy_from_slice(&nic.mac);
        frame[28..32].copy_from_slice(&settings.ip);
        to_sender(nic, frame);
        nic.send(frame, None)?;
        return Ok(Answered::Arp);
    }
    let header_bytes = usize::from(frame[14] & 0x0f) * 4;
    let total = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let is_for_us = frame[12..14] == ETHERTYPE_IPV4 && frame[30..34] == settings.ip;
    let upper = 14 + header_bytes;
    if !is_for_us || header_bytes < 20 || total > frame.len() || total < upper + 8 {
        return Ok(Answered::Nothing);
    }
    let protocol = frame[23];
    let frame = &mut frame[..total];
    match protocol {
        ICMP if frame[upper] == 8 => {
            frame[upper] = 0;
            addressed_back(nic, frame, header_bytes);
            frame[upper + 2..upper + 4].fill(0);
            let sum = checksum(0, &frame[upper..]);
            frame[upper + 2..upper + 4].copy_from_slice(&sum.to_be_bytes());
            nic.send(frame, None)?;
            Ok(Answered::Ping)
        }
        UDP if frame[upper + 2..upper + 4] == ECHO_PORT.to_be_bytes() => {
            frame.copy_within(upper..upper + 2, upper + 2);
            frame[upper..upper + 2].copy_from_slice(&ECHO_PORT.to_be_bytes());
            addressed_back(nic, frame, header_bytes);
            send_datagram(nic, frame, upper)?;
            Ok(Answered::Datagram)
        }
        _ => Ok(Answered::Nothing),
    }
}

fn to_sender(nic: &Nic, frame: &mut [u8]) {
    frame.copy_within(6..12, 0);
    frame[6..12].copy_from_slice(&nic.mac);
}

fn addressed_back(nic: &Nic, frame: &mut [u8], header_bytes: usize) {
    to_sender(nic, frame);
    let (source, target) = frame[26..34].split_at_mut(4);
    source.swap_with_slice(target);
    frame[24..26].fill(0);
    let sum = checksum(0, &frame[14..14 + header_bytes]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

/// Fills `frame` with a datagram to the gateway's `port`, without a UDP checksum.
pub fn datagram(nic: &Nic, settings: &Settings, gateway_mac: [u8; 6], port: u16, frame: &mut [u8]) {
    let ip_bytes = (frame.len() - 14) as u16;
    frame[..6].copy_from_slice(&gateway_mac);
    frame[6..12].copy_from_slice(&nic.mac);
    frame[12..14].copy_from_slice(&ETHERTYPE_IPV4);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&ip_bytes.to_be_bytes());
    frame[22] = 64;
    frame[23] = UDP;
    frame[26..30].copy_from_slice(&settings.ip);
    frame[30..34].copy_from_slice(&settings.gateway);
    let sum = checksum(0, &frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame[34..36].copy_from_slice(&port.to_be_bytes());
    frame[36..38].copy_from_slice(&port.to_be_bytes());
    frame[38..40].copy_from_slice(&(ip_bytes - 20).to_be_bytes());
}

/// Lets the device finish the checksum when it offers to, so that this path is used too.
fn send_datagram(nic: &mut Nic, frame: &mut [u8], upper: usize) -> Outcome {
    let udp_bytes = (frame.len() - upper) as u32;
    let pseudo_header = frame[26..34].chunks_exact(2).fold(u32::from(UDP) + udp_bytes, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair[1]]))
    });
    frame[upper + 6..upper + 8].fill(0);
    if nic.device.has(FEATURE_CHECKSUM) {
        let partial = !checksum(pseudo_header, &[]);
        frame[upper + 6..upper + 8].copy_from_slice(&partial.to_be_bytes());
        return nic.send(frame, Some(PartialChecksum { start: upper as u16, offset: 6 }));
    }
    // Zero would mean "no checksum".
    let sum = match checksum(pseudo_header, &frame[upper..]) {
        0 => 0xffff,
        sum => sum,
    };
    frame[upper + 6..upper + 8].copy_from_slice(&sum.to_be_bytes());
    nic.send(frame, None)
}

/// The internet checksum (RFC 1071) over `bytes`, begun with `start`.
pub fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = bytes.chunks(2).fold(start, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
    });
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
