//! Frames as guests write them, built by hand so that they can be wrong in every way.
use std::net::Ipv4Addr;

use crate::network::mac::Mac;

pub(super) const BROADCAST: Mac = Mac([0xff; 6]);
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;

pub(super) fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0[..], &kind.to_be_bytes(), payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// An ARP packet; `sender` is what it claims.
pub(super) struct Arp {
    pub(super) operation: u16,
    pub(super) sender: (Mac, Ipv4Addr),
    pub(super) target: (Mac, Ipv4Addr),
}

impl Arp {
    pub(super) fn request(sender: (Mac, Ipv4Addr), target: Ipv4Addr) -> Arp {
        Arp { operation: 1, sender, target: (Mac([0; 6]), target) }
    }

    pub(super) fn payload(&self) -> Vec<u8> {
        [
            &[0, 1, 8, 0, 6, 4][..],
            &self.operation.to_be_bytes(),
            &self.sender.0.0,
            &self.sender.1.octets(),
            &self.target.0.0,
            &self.target.1.octets(),
        ]
        .concat()
    }

    pub(super) fn frame(&self, to: Mac, from: Mac) -> Vec<u8> {
        ethernet(to, from, ARP, &self.payload())
    }

    pub(super) fn read(frame: &[u8]) -> Option<Arp> {
        let arp = payload(frame, ARP)?;
        let mac = |at: usize| arp.get(at..at + 6)?.try_into().ok().map(Mac);
        let ipv4 = |at: usize| <[u8; 4]>::try_from(arp.get(at..at + 4)?).ok().map(Ipv4Addr::from);
        let operation = u16::from_be_bytes(arp.get(6..8)?.try_into().ok()?);
        Some(Arp { operation, sender: (mac(8)?, ipv4(14)?), target: (mac(18)?, ipv4(24)?) })
    }
}

/// A UDP packet over IPv4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Udp {
    pub(super) from: (Ipv4Addr, u16),
    pub(super) to: (Ipv4Addr, u16),
    pub(super) data: Vec<u8>,
}

impl Udp {
    pub(super) fn payload(&self) -> Vec<u8> {
        let length = 8 + self.data.len() as u16;
        let udp = [
            &self.from.1.to_be_bytes()[..],
            &self.to.1.to_be_bytes(),
            &length.to_be_bytes(),
            &[0, 0],
            &self.data,
        ];
        let total = (20 + length).to_be_bytes();
        let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 17, 0, 0];
        header.extend(self.from.0.octets());
        header.extend(self.to.0.octets());
        add_checksum(&mut header);
        [header, udp.concat()].concat()
    }

    /// A frame in whose IPv4 header the byte at `at` says something else, with the checksum to it.
    pub(super) fn altered(&self, to: Mac, from: Mac, at: usize, byte: u8) -> Vec<u8> {
        let mut payload = self.payload();
        payload[at] = byte;
        add_checksum(&mut payload[..20]);
        ethernet(to, from, IPV4, &payload)
    }

    pub(super) fn frame(&self, to: Mac, from: Mac) -> Vec<u8> {
        ethernet(to, from, IPV4, &self.payload())
    }

    pub(super) fn read(frame: &[u8]) -> Option<Udp> {
        let ip = payload(frame, IPV4)?;
        let header = usize::from(ip.first()? & 0x0f) * 4;
        let udp = ip.get(header..).filter(|_| ip.get(9) == Some(&17))?;
        let ipv4 = |at: usize| <[u8; 4]>::try_from(ip.get(at..at + 4)?).ok().map(Ipv4Addr::from);
        let number = |at: usize| Some(u16::from_be_bytes(udp.get(at..at + 2)?.try_into().ok()?));
        let data = udp.get(8..usize::from(number(4)?))?.to_vec();
        Some(Udp { from: (ipv4(12)?, number(0)?), to: (ipv4(16)?, number(2)?), data })
    }
}

/// RFC 791, section 3.1.
fn add_checksum(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn payload(frame: &[u8], kind: u16) -> Option<&[u8]> {
    (frame.get(12..14)? == kind.to_be_bytes()).then(|| frame.get(14..)).flatten()
}

/// A DHCP message of a client (RFC 2131): discover (1) or request (3).
pub(super) fn dhcp(kind: u8, mac: Mac, asked: Option<Ipv4Addr>) -> Vec<u8> {
    let mut message = vec![0; 236];
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[4..8].copy_from_slice(&[9, 9, 9, kind]);
    message[10] = 0x80;
    message[28..34].copy_from_slice(&mac.0);
    message.extend([0x63, 0x82, 0x53, 0x63, 53, 1, kind]);
    if let Some(asked) = asked {
        message.extend([50, 4]);
        message.extend(asked.octets());
    }
    message.push(255);
    message.resize(300, 0);
    message
}

/// The same DHCP message with one option more (RFC 2132), before all others.
pub(super) fn with_option(mut message: Vec<u8>, code: u8, value: &[u8]) -> Vec<u8> {
    message.splice(240..240, [&[code, value.len() as u8], value].concat());
    message
}

/// What a DHCP server says: 2 offers, 5 acknowledges, 6 refuses.
pub(super) struct DhcpAnswer {
    pub(super) kind: u8,
    pub(super) address: Ipv4Addr,
    options: Vec<(u8, Vec<u8>)>,
}

impl DhcpAnswer {
    pub(super) fn read(message: &[u8]) -> Option<DhcpAnswer> {
        let address = <[u8; 4]>::try_from(message.get(16..20)?).ok()?.into();
        let mut options = Vec::new();
        let mut rest = message.get(240..)?;
        while let [code, length, more @ ..] = rest {
            if *code == 255 {
                break;
            }
            let (value, after) = more.split_at_checked(usize::from(*length))?;
            options.push((*code, value.to_vec()));
            rest = after;
        }
        let kind = options.iter().find(|(code, _)| *code == 53)?.1.first().copied()?;
        Some(DhcpAnswer { kind, address, options })
    }

    pub(super) fn option(&self, code: u8) -> Option<&[u8]> {
        self.options.iter().find(|(other, _)| *other == code).map(|(_, value)| value.as_slice())
    }
}

/// A DNS question for the address of a name (RFC 1035).
pub(super) fn dns_question(name: &str) -> Vec<u8> {
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}
