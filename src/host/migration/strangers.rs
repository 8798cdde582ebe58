//! Connections of other hosts that have not shown yet what they are for. Each costs a handshake and one short frame, and
//! when there are too many the oldest of them ends: one that something is to come over shows it within a few round trips,
//! and who only connects keeps nobody out.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::{AbortHandle, JoinSet};

use super::limits;

/// All of them. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Strangers(Arc<Mutex<All>>);

#[derive(Default)]
struct All {
    /// In the order in which they came.
    conversations: BTreeMap<u64, AbortHandle>,
    came: u64,
}

/// One of them, until it is dropped.
pub(super) struct Stranger {
    strangers: Strangers,
    number: u64,
}

impl Strangers {
    /// Begins one more conversation among `conversations`.
    pub(super) fn serve<C>(&self, conversations: &mut JoinSet<()>, converse: impl FnOnce(Stranger) -> C)
    where
        C: Future<Output = ()> + Send + 'static,
    {
        // Held until it is known, so that none is forgotten before.
        let mut all = self.all();
        while all.conversations.len() >= limits::STRANGERS_MAX
            && let Some((_, oldest)) = all.conversations.pop_first()
        {
            tracing::debug!("a connection that has shown nothing is closed; too many are there");
            oldest.abort();
        }
        all.came = all.came.wrapping_add(1);
        let number = all.came;
        let task = conversations.spawn(converse(Stranger { strangers: self.clone(), number }));
        all.conversations.insert(number, task);
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.strangers.all().conversations.remove(&self.number);
    }
}
