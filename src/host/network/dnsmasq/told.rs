//! What a dnsmasq that runs knows, as far as this daemon has told it. Pure: it decides what can be added to that without
//! having all of it read again. The daemon that told it keeps it; one that is started tells everything once.
use std::collections::{BTreeMap, HashSet};
use std::net::Ipv4Addr;

use model::Name;

use crate::network::mac::Mac;
use crate::network::plumbing::Port;

/// What one dnsmasq was told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::network) struct Told {
    /// Interfaces that it knows, by address.
    known: BTreeMap<Ipv4Addr, Port>,
    macs: HashSet<Mac>,
    names: HashSet<Name>,
    /// Who had which address since it was started: it refuses an address that it has leased to another.
    given: BTreeMap<Ipv4Addr, Mac>,
}

/// What one interface more is to a dnsmasq.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It knows it.
    Known,
    /// Nothing that it knows speaks against it, so it can be added.
    Added,
    /// It knows something else of its address, its hardware address or its name, which has to go.
    Contradicted,
}

impl Told {
    /// One that was told exactly these, when these had addresses before.
    pub(super) fn exactly(ports: &[Port], given: BTreeMap<Ipv4Addr, Mac>) -> Told {
        let mut told = Told { given, ..Told::default() };
        ports.iter().for_each(|port| told.add(port));
        told
    }

    /// Those of these that it does not know; nothing when it knows anything else than the others.
    pub(super) fn lacks(&self, ports: &[Port]) -> Option<Vec<Port>> {
        let (known, lacking): (Vec<&Port>, Vec<&Port>) =
            ports.iter().partition(|port| self.known.get(&port.ipv4) == Some(port));
        (known.len() == self.known.len()).then(|| lacking.into_iter().cloned().collect())
    }

    /// What this interface is to it.
    pub(super) fn weigh(&self, port: &Port) -> News {
        let had_another = self.given.get(&port.ipv4).is_some_and(|mac| *mac != port.mac);
        match self.known.get(&port.ipv4) {
            Some(known) if known == port => News::Known,
            // A server with several interfaces has its name on each: that is told with all others.
            None if !had_another && !self.macs.contains(&port.mac) && !self.names.contains(&port.name) => {
                News::Added
            }
            _ => News::Contradicted,
        }
    }

    /// It was told of this one, too.
    pub(super) fn add(&mut self, port: &Port) {
        self.macs.insert(port.mac);
        self.names.insert(port.name.clone());
        self.given.insert(port.ipv4, port.mac);
        self.known.insert(port.ipv4, port.clone());
    }

    /// Whether this address was somebody's since it was started.
    pub(super) fn was_given(&self, ipv4: Ipv4Addr) -> bool {
        self.given.contains_key(&ipv4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(last: u8, mac: u8, name: &str) -> Port {
        let network = model::NetworkId(uuid::Uuid::nil());
        let mac = Mac([0x52, 0x54, 0, 0, 0, mac]);
        Port { network, mac, ipv4: [10, 77, 0, last].into(), name: name.parse().unwrap() }
    }

    #[test]
    fn only_what_contradicts_nothing_is_added() {
        let given = BTreeMap::from([([10, 77, 0, 9].into(), Mac([0x52, 0x54, 0, 0, 0, 9]))]);
        let told = Told::exactly(&[port(2, 2, "web1"), port(3, 3, "web2")], given);
        let cases = [
            (port(2, 2, "web1"), News::Known),
            (port(4, 4, "web3"), News::Added),
            // One that had the address before may still think that it has it.
            (port(9, 4, "web3"), News::Contradicted),
            (port(9, 9, "web3"), News::Added),
            (port(2, 4, "web3"), News::Contradicted),
            (port(2, 2, "web3"), News::Contradicted),
            (port(4, 2, "web3"), News::Contradicted),
            (port(4, 4, "web2"), News::Contradicted),
        ];
        for (port, news) in cases {
            assert_eq!(told.weigh(&port), news, "{port:?}");
        }
    }

    #[test]
    fn what_was_added_is_known_and_its_address_was_given() {
        let (one, two) = (port(2, 2, "web1"), port(3, 3, "web2"));
        let mut told = Told::exactly(std::slice::from_ref(&one), BTreeMap::new());
        assert_eq!(told.lacks(&[two.clone(), one.clone()]), Some(vec![two.clone()]));
        assert!(!told.was_given(two.ipv4));
        told.add(&two);
        assert_eq!(told.weigh(&two), News::Known);
        assert_eq!(told.lacks(&[two.clone(), one.clone()]), Some(vec![]));
        // One that has gone, and one that was renamed.
        assert_eq!(told.lacks(std::slice::from_ref(&one)), None);
        assert_eq!(told.lacks(&[one, port(3, 3, "web3")]), None);
        assert!(told.was_given(two.ipv4));
    }
}
