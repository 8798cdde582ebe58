//! Who waits for what: followers of the event log, long-polls on operations. Woken after commits.
//! It holds no data; a woken waiter reads the records.
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use model::OperationId;
use tokio::sync::watch;

/// Wake-ups after commits.
pub struct Signals {
    events: watch::Sender<u64>,
    operations: Mutex<HashMap<OperationId, watch::Sender<()>>>,
}

impl Signals {
    pub(super) fn new(last_event: u64) -> Signals {
        Signals { events: watch::Sender::new(last_event), operations: Mutex::default() }
    }

    pub(super) fn publish(&self, last_event: Option<u64>, operations: &[OperationId]) {
        if let Some(last) = last_event {
            // Two writers may get here in another order than they committed.
            self.events.send_if_modified(|held| {
                let later = last > *held;
                *held = last.max(*held);
                later
            });
        }
        if operations.is_empty() {
            return;
        }
        let waiting = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        for id in operations {
            if let Some(sender) = waiting.get(id) {
                sender.send_replace(());
            }
        }
    }

    /// Changes with every event; the value is the last one's id.
    pub fn events(&self) -> watch::Receiver<u64> {
        self.events.subscribe()
    }

    /// Changes whenever this operation does.
    pub fn operation(&self, id: OperationId) -> watch::Receiver<()> {
        let mut waiting = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        // Those nobody waits for any more go here, so the table is as large as the waiting are many.
        waiting.retain(|_, sender| !sender.is_closed());
        waiting.entry(id).or_insert_with(|| watch::Sender::new(())).subscribe()
    }
}
