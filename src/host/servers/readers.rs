//! Who has a server's console open, so that they can be counted, named and put out. It knows no ring and no socket:
//! a reader holds a place and leaves when the place is taken from it.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::console::ConsoleReader;
use model::{Code, ConsoleReaderId, Time};
use tokio::sync::watch;

use super::limits;
use crate::error::{Error, Result};

/// The readers of one console.
#[derive(Default)]
pub struct Readers {
    places: Mutex<BTreeMap<ConsoleReaderId, Held>>,
}

struct Held {
    /// Absent until the ticket was taken.
    reader: Option<ConsoleReader>,
    /// Dropped to put the reader out.
    _stay: watch::Sender<()>,
}

/// One reader's place, given back when dropped.
pub(super) struct Place {
    readers: Arc<Readers>,
    id: ConsoleReaderId,
    kicked: Kicked,
}

/// Ends when a reader is to leave.
#[derive(Clone)]
pub struct Kicked(watch::Receiver<()>);

impl Kicked {
    /// Waits until the reader was put out. Cancel-safe.
    pub async fn wait(&mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

impl Readers {
    /// Takes a place before a ticket is looked at: whoever kicks after the ticket was taken finds the place, whoever
    /// kicks before has made the ticket worth nothing. Fails with `too_many`.
    pub(super) fn enter(self: &Arc<Readers>) -> Result<Place> {
        let mut places = self.places();
        if places.len() >= limits::CONSOLE_READERS_MAX {
            let most = limits::CONSOLE_READERS_MAX;
            let detail = format!("{most} readers have this console open; close one, or kick one");
            return Err(Error::new(Code::TooMany, detail));
        }
        let id = ConsoleReaderId::new();
        let (stay, kicked) = watch::channel(());
        places.insert(id, Held { reader: None, _stay: stay });
        Ok(Place { readers: self.clone(), id, kicked: Kicked(kicked) })
    }

    /// Those that read now, in the order they came.
    pub(super) fn list(&self) -> Vec<ConsoleReader> {
        self.places().values().filter_map(|held| held.reader.clone()).collect()
    }

    /// Puts out `only`, or everyone, those that are just coming in among them.
    pub(super) fn kick(&self, only: Option<ConsoleReaderId>) {
        self.places().retain(|id, _| only.is_some_and(|only| only != *id));
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<ConsoleReaderId, Held>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// The ticket was good: the reader is seen from now on.
    pub(super) fn seat(&self, read_only: bool, opened_by: String) {
        if let Some(held) = self.readers.places().get_mut(&self.id) {
            held.reader = Some(ConsoleReader { id: self.id, read_only, opened_by, opened_at: Time::now() });
        }
    }

    pub(super) fn kicked(&self) -> Kicked {
        self.kicked.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.readers.places().remove(&self.id);
    }
}
