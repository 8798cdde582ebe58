//! Tells a network that a machine is now behind another port: a gratuitous ARP request (RFC 5227, section 3), sent as if by the
//! machine itself. Switches learn where its hardware address is, neighbours where its address is. Every interface has an
//! address, so there is no need of RARP, which guests may not send. It knows no bridges: whoever has the tap calls it.
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use super::mac::Mac;

const BROADCAST: [u8; 6] = [0xff; 6];

const ARP: u16 = 0x0806;

/// Operation of an ARP request.
const REQUEST: u16 = 1;

/// Length of an Ethernet frame that carries less, without its checksum.
const FRAME_BYTES_MIN: usize = 60;

/// Sends it through a tap with a virtio header. Fails with `InvalidData` for what is no hardware address.
pub(crate) fn announce(tap: &impl AsFd, mac: &str, ipv4: Ipv4Addr) -> io::Result<()> {
    let mac: Mac = mac.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let packet = [&[0; sys::tap::VNET_HEADER_BYTES][..], &frame(mac.0, ipv4)].concat();
    rustix::io::write(tap, &packet)?;
    Ok(())
}

/// One frame: asks for its own address, so that everybody hears and nobody answers.
fn frame(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = [&BROADCAST[..], &mac, &ARP.to_be_bytes()].concat();
    // Ethernet, IPv4, and the lengths of their addresses.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(REQUEST.to_be_bytes());
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame.resize(FRAME_BYTES_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_asks_for_its_own_address_and_says_where_it_is() {
        let (mac, address) = ([2, 0, 0, 0, 0, 7], Ipv4Addr::new(10, 0, 0, 9));
        let arp = frame(mac, address);
        assert_eq!(arp.len(), 60);
        assert_eq!(arp[..14], [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 7, 8, 6]);
        assert_eq!(arp[14..22], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(arp[22..42], [2, 0, 0, 0, 0, 7, 10, 0, 0, 9, 0, 0, 0, 0, 0, 0, 10, 0, 0, 9]);
    }
}
