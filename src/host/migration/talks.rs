//! Conversations with hosts that have shown a ticket, or know a move's name: each host has so many at most, so that none, however
//! often it shows what it has, takes all descriptors and memory there are. Hosts are as many as an operator has made tickets for.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wire::saved::Digest;

use super::limits;

/// All of them. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Talks(Arc<Mutex<BTreeMap<Digest, usize>>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Talk {
    talks: Talks,
    host: Digest,
}

impl Talks {
    /// Begins another conversation with a host, unless it has too many.
    pub(super) fn begin(&self, host: Digest) -> Option<Talk> {
        let mut all = self.all();
        let count = all.entry(host).or_default();
        if *count >= limits::TALKS_MAX {
            return None;
        }
        *count += 1;
        Some(Talk { talks: self.clone(), host })
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<Digest, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let mut all = self.talks.all();
        if let Some(count) = all.get_mut(&self.host) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                all.remove(&self.host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_so_many_conversations_and_keeps_nobody_else_out() {
        let talks = Talks::default();
        let [one, other] = [Digest([1; 32]), Digest([2; 32])];
        let mut held: Vec<Talk> = (0..limits::TALKS_MAX).map(|_| talks.begin(one).unwrap()).collect();
        assert!(talks.begin(one).is_none());
        drop(talks.begin(other).unwrap());
        held.pop();
        held.push(talks.begin(one).unwrap());
        assert!(talks.begin(one).is_none());
        drop(held);
        assert!(talks.all().is_empty());
    }
}
