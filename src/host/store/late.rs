//! Commits in the wrong order, for debug builds that a test told to: each transaction stays open until the next one
//! begins, so that a daemon that dies loses a commit whose effects it had begun. `Store` calls it.
use rusqlite::{Connection, DropBehavior, Transaction};

use crate::error::Result;

/// Commits what was left open, if anything was.
pub(super) fn catch_up(writer: &Connection) -> Result<()> {
    if !writer.is_autocommit() {
        writer.execute_batch("COMMIT")?;
    }
    Ok(())
}

/// Leaves a transaction for [`catch_up`], or for the end of the process, which takes it back.
pub(super) fn leave_open(mut transaction: Transaction<'_>) {
    transaction.set_drop_behavior(DropBehavior::Ignore);
}
