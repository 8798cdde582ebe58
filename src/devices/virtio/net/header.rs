//! The header before each packet (virtio 1.2, section 5.1.6), checked in both directions against what was agreed on.
//! Pure: bytes in, bytes out. From the guest it may say anything; from the tap it may still speak of an earlier
//! driver's offloads.
use sys::tap::{Offloads, VNET_HEADER_BYTES};
use virtio_bindings::bindings::virtio_net::*;

use super::config::{bit, offloads};

/// The shortest frame: two addresses and a type.
pub(super) const FRAME_BYTES_MIN: u32 = 14;

/// Headers that each segment has at least: Ethernet, IPv4 or IPv6, TCP.
const TCP4_HEADERS_BYTES: u32 = 14 + 20 + 20;
const TCP6_HEADERS_BYTES: u32 = 14 + 40 + 20;

const NEEDS_CHECKSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const CHECKSUM_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const WHOLE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const TCP4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const TCP6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;

/// A header's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fields {
    flags: u8,
    segmentation: u8,
    header_bytes: u16,
    segment_bytes: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl Fields {
    fn read(header: [u8; VNET_HEADER_BYTES]) -> Fields {
        let [flags, segmentation, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = header;
        Fields {
            flags,
            segmentation,
            header_bytes: u16::from_le_bytes([h0, h1]),
            segment_bytes: u16::from_le_bytes([s0, s1]),
            checksum_start: u16::from_le_bytes([c0, c1]),
            checksum_offset: u16::from_le_bytes([o0, o1]),
        }
    }

    fn write(self, buffers: u16) -> [u8; VNET_HEADER_BYTES] {
        let [h0, h1] = self.header_bytes.to_le_bytes();
        let [s0, s1] = self.segment_bytes.to_le_bytes();
        let [c0, c1] = self.checksum_start.to_le_bytes();
        let [o0, o1] = self.checksum_offset.to_le_bytes();
        let [b0, b1] = buffers.to_le_bytes();
        [self.flags, self.segmentation, h0, h1, s0, s1, c0, c1, o0, o1, b0, b1]
    }
}

/// The header to give the kernel for a frame of `frame_bytes` that came with `header`, or nothing when a driver that
/// agreed to `features` must not send that.
pub(super) fn to_tap(
    header: [u8; VNET_HEADER_BYTES],
    frame_bytes: u32,
    features: u64,
) -> Option<[u8; VNET_HEADER_BYTES]> {
    let has = |feature| features & bit(feature) != 0;
    let mut fields = Fields::read(header);
    // Flags that the device does not know are ignored (section 5.1.6.2.2).
    fields.flags &= NEEDS_CHECKSUM;
    let needs_checksum = fields.flags != 0;
    if needs_checksum {
        let end =
            u32::from(fields.checksum_start).saturating_add(fields.checksum_offset.into()).saturating_add(2);
        if !has(VIRTIO_NET_F_CSUM) || end > frame_bytes {
            return None;
        }
    } else {
        (fields.checksum_start, fields.checksum_offset) = (0, 0);
    }
    let is_allowed = match fields.segmentation {
        WHOLE => true,
        TCP4 => needs_checksum && has(VIRTIO_NET_F_HOST_TSO4),
        TCP6 => needs_checksum && has(VIRTIO_NET_F_HOST_TSO6),
        _ => false,
    };
    if fields.segmentation == WHOLE {
        (fields.segment_bytes, fields.header_bytes) = (0, 0);
    } else if fields.segment_bytes == 0 {
        return None;
    }
    // A hint that may be wrong (section 5.1.6.2.2), but not so wrong that the kernel refuses the packet.
    fields.header_bytes = fields.header_bytes.min(u16::try_from(frame_bytes).unwrap_or(u16::MAX));
    is_allowed.then(|| fields.write(0))
}

/// What a frame of `frame_bytes`, checked by [`to_tap`], is on a wire: how many frames, and how many bytes in all. The guest chooses how
/// small the segments are, and whoever segments it works for each.
pub(super) fn on_wire(header: [u8; VNET_HEADER_BYTES], frame_bytes: u32) -> (u64, u64) {
    let fields = Fields::read(header);
    let headers_bytes = match fields.segmentation {
        TCP4 => TCP4_HEADERS_BYTES,
        TCP6 => TCP6_HEADERS_BYTES,
        _ => return (1, frame_bytes.into()),
    };
    let payload_bytes = frame_bytes.saturating_sub(headers_bytes);
    let frames = payload_bytes.div_ceil(u32::from(fields.segment_bytes).max(1)).max(1);
    let more_bytes = u64::from(frames.saturating_sub(1)).saturating_mul(headers_bytes.into());
    (frames.into(), more_bytes.saturating_add(frame_bytes.into()))
}

/// Whether a packet for a guest may be longer than its MTU: one that the guest takes for several may.
pub(super) fn is_segmented(header: [u8; VNET_HEADER_BYTES]) -> bool {
    Fields::read(header).segmentation != WHOLE
}

/// The header to give a guest that agreed to `features`, for a packet that lies in `buffers`; or nothing when the
/// packet needs work that this guest does not do, as one may that the tap held since an earlier driver.
pub(super) fn to_guest(
    header: [u8; VNET_HEADER_BYTES],
    buffers: u16,
    features: u64,
) -> Option<[u8; VNET_HEADER_BYTES]> {
    let Offloads { checksum, tso4, tso6 } = offloads(features);
    let mut fields = Fields::read(header);
    fields.flags &= if checksum { NEEDS_CHECKSUM | CHECKSUM_VALID } else { NEEDS_CHECKSUM };
    let is_allowed = match fields.segmentation {
        WHOLE => true,
        TCP4 => tso4,
        TCP6 => tso6,
        _ => false,
    };
    let needs_checksum = fields.flags & NEEDS_CHECKSUM != 0;
    let is_finished = checksum || !needs_checksum;
    // Segments to be made have checksums to be made (section 5.1.6.4.1).
    let is_whole = fields.segmentation == WHOLE || (needs_checksum && fields.segment_bytes != 0);
    (is_allowed && is_finished && is_whole).then(|| fields.write(buffers))
}
