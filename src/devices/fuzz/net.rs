//! The interface: packets of any shape both ways over a socket in the tap's place. What goes out is what a tap may be
//! given; what comes in lands in buffers that were offered for it.
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use arbitrary::Unstructured;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::driver::{Guest, Manner, Piece, Step, Unheard, byte, word};
use vm_memory::{Bytes, GuestAddress};

use crate::limiter::{RateLimits, TokenBucket};
use crate::limits::NET_FRAME_BYTES_MAX;
use crate::virtio::VirtioDevice;
use crate::virtio::net::{Link, Net, NetOptions, NetStats};
use crate::virtio::worker::by_hand::ByHand;

const HEADER_BYTES: usize = 12;
const FRAME_BYTES_MIN: usize = 14;

/// Serves a driver and a wire made of `data`.
pub fn net(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut guest = Guest::new(&mut input, 2);
    let how = byte(&mut input);
    let few = TokenBucket { per_second: 1, burst: 3 };
    let limits = RateLimits { bandwidth: None, operations: (how & 3 == 3).then_some(few) };
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    let options = NetOptions {
        name: "nic0".to_owned(),
        link: Link::socket(File::from(OwnedFd::from(near))).unwrap(),
        mac: [2, 0, 0, 0, 0, 7],
        mtu: 1500,
        rx_limits: limits,
        tx_limits: limits,
        stats: Arc::new(NetStats::default()),
    };
    let mut net = Net::new(options).unwrap();
    let features = net.features() & u64::from(word(&mut input));
    let (_active, mut device) = guest.start(&mut net, features, Arc::new(Unheard));
    while let Some(step) = guest.next(&mut input) {
        match step {
            Step::Kick(queue) => guest.kick(&mut device, queue, Manner::Writes),
            Step::Pause => assert!(guest.judged(&mut device, Manner::Writes, |device| device.pause())),
            Step::Resume => guest.judged(&mut device, Manner::Writes, |device| device.resume()),
            Step::Own(0x40..0x80) => {
                send(&mut guest, &mut input);
                guest.kick(&mut device, 1, Manner::Writes);
            }
            Step::Own(what) => {
                arrive(&far, what, &mut input);
                guest.judged(&mut device, Manner::Writes, ByHand::turn);
            }
        }
        hear(&far, features);
    }
}

/// Offers a packet that is right but for its header.
fn send(guest: &mut Guest, input: &mut Unstructured<'_>) {
    const HEADER: u64 = 0x4000;
    let mut header = [0; HEADER_BYTES];
    let (flags, kind) = (byte(input), byte(input));
    (header[0], header[1]) = (flags % 4, kind % 6);
    for at in [2, 4, 6, 8] {
        header[at] = byte(input);
    }
    let frame_bytes = u16::from(byte(input)) + 1;
    if flags & 4 != 0 {
        // About where the frame ends.
        let (start, offset) = (u16::from(header[6]), u16::from(header[8] % 8));
        let offset = (frame_bytes + 3).saturating_sub(start).saturating_sub(offset);
        header[8..10].copy_from_slice(&offset.to_le_bytes());
    }
    guest.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
    let piece = |address, length| Piece { address, length, writable: false };
    guest.offer_pieces(1, &[piece(HEADER, HEADER_BYTES as u32), piece(0x5000, frame_bytes.into())]);
}

/// Packets for the guest: a header and length as the input says.
fn arrive(far: &UnixDatagram, what: u8, input: &mut Unstructured<'_>) {
    let length = match word(input) {
        length if what & 0x80 != 0 => usize::from(length) * 2,
        length => usize::from(length) % 2048,
    };
    let mut packet = vec![0x5A; length];
    for to in packet.iter_mut().take(HEADER_BYTES) {
        *to = byte(input);
    }
    for _ in 0..=what % 4 {
        // A full wire loses packets.
        let _ = far.send(&packet);
    }
}

/// Judges what came out, as a kernel would that trusts nobody.
fn hear(far: &UnixDatagram, features: u64) {
    let mut packet = [0; 68 << 10];
    while let Ok(length) = far.recv(&mut packet) {
        let packet = &packet[..length];
        assert!(length >= HEADER_BYTES + FRAME_BYTES_MIN, "a packet of {length} bytes came out");
        let frame_bytes = length - HEADER_BYTES;
        assert!(frame_bytes <= NET_FRAME_BYTES_MAX as usize, "a frame of {frame_bytes} bytes came out");
        let field = |at: usize| usize::from(u16::from_le_bytes([packet[at], packet[at + 1]]));
        let has = |feature: u32| features & (1 << feature) != 0;
        let (flags, kind, segment) = (packet[0], packet[1], field(4));
        assert!(flags & !1 == 0, "flags {flags:#x} came out");
        if flags == 1 {
            assert!(has(VIRTIO_NET_F_CSUM), "a checksum was left open that nobody agreed on");
            assert!(field(6) + field(8) + 2 <= frame_bytes, "a checksum lies outside its frame");
        }
        match kind {
            0 => assert_eq!((segment, field(2)), (0, 0)),
            1 => assert!(flags == 1 && segment > 0 && has(VIRTIO_NET_F_HOST_TSO4)),
            4 => assert!(flags == 1 && segment > 0 && has(VIRTIO_NET_F_HOST_TSO6)),
            other => panic!("segmentation {other} came out"),
        }
        assert!(field(2) <= frame_bytes, "the headers are longer than the frame");
    }
}
