//! IPv4 ranges: reading them, their members, whether two overlap. Pure arithmetic.
//! It knows nothing of bridges or servers. `network` and its callers use it.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use super::limits::{PREFIX_CHOSEN, PREFIX_MAX, PREFIX_MIN};

/// A range of addresses whose host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    base: u32,
    prefix: u8,
}

/// The text is not a range a network can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCidr {
    /// Not `a.b.c.d/n`.
    #[error("{0:?} is not an IPv4 range such as 10.77.0.0/24")]
    Unreadable(String),
    /// Host bits are set.
    #[error("{0} is not the first address of its range; write {1}")]
    HostBits(String, Cidr),
    /// Too large or too small.
    #[error("{0} has prefix length {len}; it must be {PREFIX_MIN} to {PREFIX_MAX}", len = .0.prefix)]
    Prefix(Cidr),
    /// Not a private range.
    #[error("{0} is not inside 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16")]
    Public(Cidr),
}

impl Cidr {
    /// The range of `prefix` bits around `address`. A prefix above 32 is taken as 32.
    pub fn around(address: Ipv4Addr, prefix: u8) -> Cidr {
        let prefix = prefix.min(32);
        Cidr { base: u32::from(address) & mask(prefix), prefix }
    }

    /// Reads what a caller asks for: a private range of a size that networks may have.
    pub fn for_network(text: &str) -> Result<Cidr, BadCidr> {
        let cidr: Cidr = text.parse()?;
        if !(PREFIX_MIN..=PREFIX_MAX).contains(&cidr.prefix) {
            return Err(BadCidr::Prefix(cidr));
        }
        if !PRIVATE.iter().any(|range| range.contains_all(cidr)) {
            return Err(BadCidr::Public(cidr));
        }
        Ok(cidr)
    }

    /// Length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The network's own address, the first of the range.
    pub fn base(self) -> Ipv4Addr {
        self.base.into()
    }

    /// The mask in dotted form.
    pub fn netmask(self) -> Ipv4Addr {
        mask(self.prefix).into()
    }

    /// The last address, to which broadcasts go.
    pub fn broadcast(self) -> Ipv4Addr {
        (self.base | !mask(self.prefix)).into()
    }

    /// The host's address on the network: the first that can be used.
    pub fn gateway(self) -> Ipv4Addr {
        self.base.saturating_add(1).into()
    }

    /// Whether `address` is in the range.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix) == self.base
    }

    /// Whether every address of `other` is in this range.
    pub fn contains_all(self, other: Cidr) -> bool {
        self.prefix <= other.prefix && self.contains(other.base())
    }

    /// Whether any address is in both.
    pub fn overlaps(self, other: Cidr) -> bool {
        self.contains_all(other) || other.contains_all(self)
    }

    /// Whether a server may have `address`: in the range, and not the base, the gateway or the broadcast.
    pub fn has_place(self, address: Ipv4Addr) -> bool {
        self.contains(address) && address > self.gateway() && address < self.broadcast()
    }

    /// How many servers can have an address.
    pub fn places(self) -> u32 {
        u32::from(self.broadcast()).saturating_sub(u32::from(self.gateway())).saturating_sub(1)
    }

    /// The next address above `latest`, from the lowest on behind the last one, that a server can have and that is not
    /// taken.
    pub fn next_free<E>(
        self,
        latest: Option<Ipv4Addr>,
        mut is_taken: impl FnMut(Ipv4Addr) -> Result<bool, E>,
    ) -> Result<Option<Ipv4Addr>, E> {
        let first = u32::from(self.gateway()).saturating_add(1);
        let end = u32::from(self.broadcast());
        let begin = latest.map_or(first, |latest| u32::from(latest).saturating_add(1).clamp(first, end));
        // Every taken address can push the search on by one, so this looks at no more than one above them.
        for address in (begin..end).chain(first..begin).map(Ipv4Addr::from) {
            if !is_taken(address)? {
                return Ok(Some(address));
            }
        }
        Ok(None)
    }
}

/// The private ranges of RFC 1918.
const PRIVATE: [Cidr; 3] = [
    Cidr { base: 0x0a00_0000, prefix: 8 },
    Cidr { base: 0xac10_0000, prefix: 12 },
    Cidr { base: 0xc0a8_0000, prefix: 16 },
];

/// A free range for a network whose caller does not care: the first /24 from 10.77.0.0 on, then of the rest of
/// 10.0.0.0/8 and 192.168.0.0/16, that overlaps nothing in `taken`. 10.77 is first because home routers,
/// clusters and VPNs rarely use it.
pub fn free_range(taken: &[Cidr]) -> Option<Cidr> {
    let tens = (0u32..=255).map(|second| (second + 77) % 256);
    let tens = tens.flat_map(|second| (0u32..=255).map(move |third| 0x0a00_0000 | second << 16 | third << 8));
    let homes = (0u32..=255).map(|third| 0xc0a8_0000 | third << 8);
    tens.chain(homes)
        .map(|base| Cidr { base, prefix: PREFIX_CHOSEN })
        .find(|candidate| !taken.iter().any(|range| range.overlaps(*candidate)))
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

impl FromStr for Cidr {
    type Err = BadCidr;

    fn from_str(text: &str) -> Result<Cidr, BadCidr> {
        let shown = || text.chars().take(64).collect::<String>();
        let unreadable = || BadCidr::Unreadable(shown());
        let (address, prefix) = text.split_once('/').ok_or_else(unreadable)?;
        let address: Ipv4Addr = address.parse().map_err(|_| unreadable())?;
        if prefix.is_empty() || prefix.len() > 2 || !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(unreadable());
        }
        let prefix: u8 = prefix.parse().map_err(|_| unreadable())?;
        if prefix > 32 {
            return Err(unreadable());
        }
        let cidr = Cidr::around(address, prefix);
        if cidr.base() != address {
            return Err(BadCidr::HostBits(shown(), cidr));
        }
        Ok(cidr)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base(), self.prefix)
    }
}

#[cfg(test)]
mod tests;
