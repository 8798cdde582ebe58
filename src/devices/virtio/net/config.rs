//! What the guest reads in an interface's configuration space (virtio 1.2, section 5.1.4), and the features that go
//! with it. Plain data; nothing in it can be written.
use sys::tap::Offloads;
use virtio_bindings::bindings::virtio_net::*;

/// Length of the fields up to the MTU.
const CONFIG_BYTES: usize = 12;

/// A feature's bit.
pub(super) const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What is offered.
pub(super) fn features() -> u64 {
    let offered = [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_STATUS,
    ];
    offered.iter().fold(0, |set, feature| set | bit(*feature))
}

/// What a driver that agreed to `features` finishes itself. Segmentation without checksums, which a driver must not
/// agree to, counts as neither.
pub(super) fn offloads(features: u64) -> Offloads {
    let has = |feature| features & bit(feature) != 0;
    let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
    Offloads {
        checksum,
        tso4: checksum && has(VIRTIO_NET_F_GUEST_TSO4),
        tso6: checksum && has(VIRTIO_NET_F_GUEST_TSO6),
    }
}

/// The space: address, status, number of queue pairs, MTU.
pub(super) fn space(mac: [u8; 6], mtu: u16) -> [u8; CONFIG_BYTES] {
    let fields: [&[u8]; 4] =
        [&mac, &(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes(), &1_u16.to_le_bytes(), &mtu.to_le_bytes()];
    let mut space = [0; CONFIG_BYTES];
    for (to, from) in space.iter_mut().zip(fields.iter().flat_map(|field| field.iter())) {
        *to = *from;
    }
    space
}

/// Copies the part at `offset` into `data`; what lies beyond the space reads zero.
pub(super) fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let present = space.get(start..).unwrap_or_default();
    let bytes = present.iter().copied().chain(std::iter::repeat(0));
    for (to, from) in data.iter_mut().zip(bytes) {
        *to = from;
    }
}
