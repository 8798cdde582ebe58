//! Hardware addresses of servers and names of their taps, derived from identities so that they can be known
//! before anything exists. Pure. `servers` asks for them when a server is made.

use std::fmt;
use std::str::FromStr;

use model::{NetworkId, ServerId};
use sha2::{Digest, Sha256};

use super::cidr::Cidr;
use super::limits::MAC_TRIES_MAX;

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

/// The text is not a hardware address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a hardware address such as 52:54:00:12:34:56")]
pub struct BadMac(String);

impl Mac {
    /// Addresses for interface `index` of a server, to be tried in this order: 52:54:00 and 24 bits of a digest, so
    /// that a server gets the same address in whatever order things happen.
    pub fn of_server(server: ServerId, index: u8) -> impl Iterator<Item = Mac> {
        (0..MAC_TRIES_MAX).map(move |attempt| {
            let mut digest = Sha256::new();
            digest.update(server.0.as_bytes());
            digest.update([index]);
            digest.update(attempt.to_be_bytes());
            let bytes = digest.finalize();
            let [a, b, c] = OF_SERVERS;
            Mac([a, b, c, bytes[0], bytes[1], bytes[2]])
        })
    }

    /// An address for an interface of a server that is not there yet, which another may have.
    pub fn random() -> Mac {
        let ([.., d, e, f], [a, b, c]) = (*ServerId::new().0.as_bytes(), OF_SERVERS);
        Mac([a, b, c, d, e, f])
    }

    /// Whether this is an address that a host gives a server's interface, written as it writes it. Another may name the tap of
    /// one that has the same end, and one that is written otherwise is not found among those that are taken.
    pub fn is_of_some_server(text: &str) -> bool {
        text.parse::<Mac>().is_ok_and(|mac| mac.0.starts_with(&OF_SERVERS) && mac.to_string() == text)
    }

    /// The address of a network's bridge: locally administered, and 40 bits of a digest. A bridge that has it
    /// is known to be Toft's, because address and device are made in one step.
    pub fn of_bridge(network: NetworkId) -> Mac {
        let bytes = Sha256::digest(network.0.as_bytes());
        Mac([0x02, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]])
    }

    /// The address of the bridge of a network that goes on to other hosts: the same on each of them, so that a server that moves
    /// finds its gateway where it was. As many bits as [`Mac::of_bridge`], of the range, which no other network of a host
    /// overlaps.
    pub fn of_gateway(range: Cidr) -> Mac {
        let bytes = Sha256::digest(range.to_string());
        Mac([0x02, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]])
    }

    /// Name of the tap of the interface that has this address. Servers' addresses begin alike and are unique on the host, so
    /// names are.
    pub fn tap_name(self) -> String {
        let [.., a, b, c] = self.0;
        format!("{TAP_PREFIX}{a:02x}{b:02x}{c:02x}")
    }
}

/// Every server's hardware address begins with it.
const OF_SERVERS: [u8; 3] = [0x52, 0x54, 0x00];

/// Every device's name begins with it that Toft makes.
pub const OWN_PREFIX: &str = "toft";

/// Every tap's name begins with it, and no bridge's does: the anti-spoofing rules catch taps by this prefix, so
/// that a tap they do not know passes nothing.
pub const TAP_PREFIX: &str = "tofttap";

/// Every bridge's name begins with it.
pub const BRIDGE_PREFIX: &str = "toftbr";

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Mac, BadMac> {
        let bad = || BadMac(text.chars().take(32).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Mac(bytes)) }
    }
}

#[cfg(test)]
mod tests;
