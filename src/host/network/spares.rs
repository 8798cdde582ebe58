//! Taps that lie on their bridges before anybody asks, one for each network: all that is left to do when a server's interface is
//! plugged in is to give one its name and bring it up. It knows no rules. `HostPlumbing` uses it.
//!
//! One that waits is down, so it carries nothing, and rules know nothing of its name. It lasts as long as this process has it open.
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use model::NetworkId;
use sys::tap::Tap;

use super::links::{self, Links};
use super::mac::{BRIDGE_PREFIX, TAP_PREFIX};
use super::plumbing::{PlumbingError, Segment};

/// What waits, by network.
#[derive(Debug, Default)]
pub(super) struct Spares(Mutex<BTreeMap<NetworkId, Spare>>);

#[derive(Debug)]
pub(super) struct Spare {
    pub(super) tap: Tap,
    /// The kernel gives no other device its number while it lives.
    pub(super) index: u32,
}

impl Spares {
    /// Makes one for this network unless it has one.
    pub(super) fn make(&self, links: &Links, segment: &Segment) -> Result<(), PlumbingError> {
        if self.waiting().contains_key(&segment.id) {
            return Ok(());
        }
        let name = name(segment);
        let tap = links::make_tap(&name)?;
        let index = links.join(&name, segment)?;
        self.waiting().insert(segment.id, Spare { tap, index });
        Ok(())
    }

    /// Takes the one of this network to be used. None when there is none, or none that is still what it was made as:
    /// somebody may have taken the bridge away, and the network brought it back.
    pub(super) fn take_sound(&self, links: &Links, segment: &Segment) -> Option<Spare> {
        let spare = self.take(segment.id)?;
        match links.check_joined(spare.index, segment) {
            Ok(_) => Some(spare),
            Err(cause) => {
                tracing::info!("a tap that was ready is not used: {cause}");
                None
            }
        }
    }

    /// Takes the one of this network away.
    pub(super) fn take(&self, network: NetworkId) -> Option<Spare> {
        self.waiting().remove(&network)
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<NetworkId, Spare>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No server's tap has it, whose names end in digits only.
pub(super) fn name(segment: &Segment) -> String {
    format!("{TAP_PREFIX}-{}", segment.bridge.trim_start_matches(BRIDGE_PREFIX))
}
