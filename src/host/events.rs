//! The event log: what happened, in one order, appended in the transaction of what happened.
//! It holds the newest events; a reader that fell behind is told to list again.
use model::event::{Event, EventData};
use model::operation::Resource;
use model::{Code, EventId, Time};
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::watch;

use crate::core::Shared;
use crate::error::{Error, Result};
use crate::limits;
use crate::store::Tx;

pub(crate) const TABLES: &str = "
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, subject TEXT NOT NULL, time_ms INTEGER NOT NULL,
    data TEXT NOT NULL) STRICT;
CREATE TABLE host (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
";

/// Appends an event about `data.resource`, in the caller's transaction. `kind` is such as `server.created`.
pub fn append(tx: &Tx<'_>, kind: &str, data: EventData) -> Result<EventId> {
    let subject = data.resource.map(path).unwrap_or_else(|| "/v1/host".to_owned());
    tx.prepare_cached("INSERT INTO events (kind, subject, time_ms, data) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![kind, subject, Time::now().unix_ms(), serde_json::to_string(&data)?])?;
    let id = u64::try_from(tx.last_insert_rowid()).unwrap_or_default();
    if id.is_multiple_of(limits::EVENTS_CUT_EVERY) {
        let oldest = id.saturating_sub(limits::EVENTS_KEPT);
        tx.prepare_cached("DELETE FROM events WHERE id <= ?1")?.execute([oldest])?;
    }
    tx.event_written(id);
    Ok(EventId(id))
}

/// Path of a resource in the API.
pub fn path(resource: Resource) -> String {
    match resource {
        Resource::Server(id) => format!("/v1/servers/{id}"),
        Resource::Image(id) => format!("/v1/images/{id}"),
        Resource::Volume(id) => format!("/v1/volumes/{id}"),
        Resource::Network(id) => format!("/v1/networks/{id}"),
        Resource::Snapshot(id) => format!("/v1/snapshots/{id}"),
    }
}

/// The event log, for readers.
#[derive(Clone)]
pub struct Events {
    core: Shared,
}

impl Events {
    pub(crate) fn new(core: Shared) -> Events {
        Events { core }
    }

    /// Position of the last event.
    pub fn last(&self) -> EventId {
        EventId(*self.core.store.signals().events().borrow())
    }

    /// Events after `after`, oldest first, at most `limit`. Fails with `cursor_expired` when some of them are
    /// gone already.
    pub async fn page(&self, after: EventId, limit: u32) -> Result<Vec<Event>> {
        let limit = limit.min(limits::EVENTS_PAGE_MAX);
        self.core.store.read(move |connection| load(connection, after, limit)).await
    }

    /// Follows the log from after `after`, or from its end.
    pub async fn follow(&self, after: Option<EventId>) -> Result<Follower> {
        let wake = self.core.store.signals().events();
        let after = after.unwrap_or_else(|| self.last());
        // Fails at once, not in the middle of a stream, when the cursor is too old.
        self.page(after, 1).await?;
        Ok(Follower { events: self.clone(), wake, after })
    }
}

/// A reader of the log that waits for more.
pub struct Follower {
    events: Events,
    wake: watch::Receiver<u64>,
    after: EventId,
}

impl Follower {
    /// The next events: at least one, as soon as there is one. Cancel-safe. Fails with `cursor_expired` when the
    /// reader is slower than the log.
    pub async fn next(&mut self) -> Result<Vec<Event>> {
        loop {
            self.wake.borrow_and_update();
            let found = self.events.page(self.after, limits::EVENTS_PAGE_MAX).await?;
            if let Some(last) = found.last() {
                self.after = last.id;
                return Ok(found);
            }
            if self.wake.changed().await.is_err() {
                return Err(Error::new(Code::Draining, "the daemon is shutting down"));
            }
        }
    }
}

fn load(connection: &Connection, after: EventId, limit: u32) -> Result<Vec<Event>> {
    let (first, last): (u64, u64) =
        connection.query_row("SELECT coalesce(min(id), 0), coalesce(max(id), 0) FROM events", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    if after.0 + 1 < first || after.0 > last {
        return Err(Error::new(
            Code::CursorExpired,
            format!(
                "the log holds events {first} to {last}, not what follows {}; list the resources and follow from \
                 their watch_cursor",
                after.0
            ),
        ));
    }
    let source = source(connection)?;
    let mut statement = connection.prepare_cached(
        "SELECT id, kind, subject, time_ms, data FROM events WHERE id > ?1 ORDER BY id LIMIT ?2",
    )?;
    let mut rows = statement.query(params![after.0, limit])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(Event {
            specversion: "1.0".to_owned(),
            id: EventId(row.get(0)?),
            source: source.clone(),
            kind: row.get(1)?,
            subject: row.get(2)?,
            time: Time::from_unix_ms(row.get(3)?),
            data: serde_json::from_str(&row.get::<_, String>(4)?)?,
        });
    }
    Ok(found)
}

/// The host's identity as a URN, made on the first start.
fn source(connection: &Connection) -> Result<String> {
    let id: Option<String> =
        connection.query_row("SELECT value FROM host WHERE key = 'id'", [], |row| row.get(0)).optional()?;
    Ok(format!("urn:uuid:{}", id.unwrap_or_default()))
}

/// Gives the host its identity on the first start.
pub(crate) fn identify(tx: &Tx<'_>) -> Result<()> {
    tx.execute(
        "INSERT OR IGNORE INTO host (key, value) VALUES ('id', ?1)",
        [uuid::Uuid::now_v7().to_string()],
    )?;
    Ok(())
}
