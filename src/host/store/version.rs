//! Which state the records are in, without reading them: what was made of the records may be used again while
//! their version is the same. It sees commits of every process, so a token that `toftd token` revokes is worthless
//! with the next request. `Store` calls it.
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::lock;
use crate::error::Result;

/// A state of the records: equal versions of one [`Watcher`], equal records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(i64);

/// A connection of its own that never writes, so that every commit is somebody else's.
pub(super) struct Watcher(Mutex<Connection>);

impl Watcher {
    pub(super) fn open(path: &Path) -> Result<Watcher> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        // Whoever asks is not to wait: then there is no version.
        connection.busy_timeout(Duration::ZERO)?;
        Ok(Watcher(Mutex::new(connection)))
    }

    /// The version, in a few microseconds and without reading the disk; none while it cannot be told.
    pub(super) fn look(&self) -> Option<Version> {
        let connection = lock(&self.0);
        let mut statement = connection.prepare_cached("PRAGMA data_version").ok()?;
        statement.query_row([], |row| row.get(0)).ok().map(Version)
    }
}
