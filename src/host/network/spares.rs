//! Taps that lie on their bridges before anybody asks, one for each network: all that is left to do when a server's interface is
//! plugged in is to bring it up. A tap is named after its interface's hardware address, so that address is chosen before there is a
//! server, and promised to the next one that is made and starts at once. It knows no rules. `HostPlumbing` uses it.
//!
//! One that waits is down, so it carries nothing. It lasts as long as this process has it open. An address is promised once: the one
//! that was may have moved to another host with it, or be gone, and what is still in force for it is not for another.
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use model::NetworkId;
use sys::tap::Tap;

use super::limits;
use super::links::{self, Links};
use super::mac::Mac;
use super::plumbing::{PlumbingError, Segment};

/// Networks whose next interface is expected.
#[derive(Debug, Default)]
pub(super) struct Spares(Mutex<BTreeMap<NetworkId, Next>>);

/// The next new interface of a network.
#[derive(Debug)]
struct Next {
    mac: Mac,
    /// Once somebody was told: how often another was expected since.
    promised: Option<u32>,
    /// Its tap, once it is made.
    waiting: Option<Spare>,
}

#[derive(Debug)]
pub(super) struct Spare {
    pub(super) tap: Tap,
    /// The kernel gives no other device its number while it lives.
    pub(super) index: u32,
}

impl Next {
    fn new() -> Next {
        Next { mac: Mac::random(), promised: None, waiting: None }
    }
}

impl Spares {
    /// Hardware address of the network's next interface. None where none is expected, or it is promised already.
    pub(super) fn promise(&self, network: NetworkId) -> Option<Mac> {
        let mut all = self.all();
        let next = all.get_mut(&network).filter(|next| next.promised.is_none())?;
        next.promised = Some(0);
        Some(next.mac)
    }

    /// Nobody was recorded with it: it is promised to whoever comes next.
    pub(super) fn take_back(&self, network: NetworkId, mac: Mac) {
        if let Some(next) = self.all().get_mut(&network).filter(|next| next.mac == mac) {
            next.promised = None;
        }
    }

    /// Whether this interface is the network's next; if so, whether its tap is there.
    pub(super) fn is_next(&self, network: NetworkId, mac: Mac) -> Option<bool> {
        self.all().get(&network).filter(|next| next.mac == mac).map(|next| next.waiting.is_some())
    }

    /// Another interface is expected. If the next was promised long ago and never plugged in, another is; this answers the tap that has
    /// waited for nothing.
    pub(super) fn pass(&self, network: NetworkId) -> Option<Spare> {
        let mut all = self.all();
        let next = all.entry(network).or_insert_with(Next::new);
        let passed = next.promised.as_mut()?;
        *passed += 1;
        if *passed < limits::PASSED_MAX {
            return None;
        }
        std::mem::replace(next, Next::new()).waiting
    }

    /// Makes the tap of the network's next interface unless it is there. Nobody else does meanwhile, and nobody takes it. Where that
    /// fails the next time is with another address: a server that runs may have had this one all along.
    pub(super) fn make(&self, links: &Links, segment: &Segment) -> Result<(), PlumbingError> {
        let mac = match self.all().get(&segment.id) {
            Some(Next { mac, waiting: None, .. }) => *mac,
            _ => return Ok(()),
        };
        let name = mac.tap_name();
        let made =
            links::make_tap(&name).and_then(|tap| Ok(Spare { tap, index: links.join(&name, segment)? }));
        let mut all = self.all();
        match made {
            Ok(spare) => {
                if let Some(next) = all.get_mut(&segment.id) {
                    next.waiting = Some(spare);
                }
                Ok(())
            }
            Err(cause) => {
                all.remove(&segment.id);
                Err(cause)
            }
        }
    }

    /// Takes the tap that is there for this interface, if it was the network's next: another is from now on.
    pub(super) fn take(&self, network: NetworkId, mac: Mac) -> Option<Spare> {
        let mut all = self.all();
        let next = all.get_mut(&network).filter(|next| next.mac == mac)?;
        std::mem::replace(next, Next::new()).waiting
    }

    /// Takes the tap of this network away; no interface is expected any more.
    pub(super) fn forget(&self, network: NetworkId) -> Option<Spare> {
        self.all().remove(&network)?.waiting
    }

    #[cfg(test)]
    pub(super) fn waiting(&self, network: NetworkId) -> Option<u32> {
        self.all().get(&network)?.waiting.as_ref().map(|spare| spare.index)
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<NetworkId, Next>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
