//! The tables, one migration after the other. `user_version` counts those that were done.
//! A migration that has been released is never changed; the next one changes what it made.
use rusqlite::{Connection, TransactionBehavior};

use crate::error::{Error, Result};
use crate::{
    events, idempotency, images, migration, network, operations, servers, snapshots, tokens, volumes,
};

/// Each migration is what every noun contributes to it.
const MIGRATIONS: &[&[&str]] = &[
    &[
        events::TABLES,
        operations::TABLES,
        idempotency::TABLES,
        tokens::TABLES,
        images::TABLES,
        volumes::TABLES,
        network::TABLES,
        servers::TABLES,
    ],
    &[servers::TICKET_HOLDERS],
    &[network::LATEST, servers::HELD_INDEX],
    &[snapshots::TABLES],
    &[migration::TABLES],
    &[servers::moving::TABLES],
    // No table: snapshots may lie with others from here on, which an earlier daemon would take for whole, and directories that
    // have no record are needed, which it would remove.
    &[],
    // No table: volumes may be overlays from here on, whose records an earlier daemon cannot read.
    &[],
];

pub(super) fn migrate(writer: &mut Connection) -> Result<()> {
    let done: usize = writer.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if done > MIGRATIONS.len() {
        return Err(Error::new(
            model::Code::HostUnprepared,
            format!(
                "the state directory was written by a later version (its tables are version {done}, this daemon \
                 knows {}); install that version again",
                MIGRATIONS.len()
            ),
        ));
    }
    for (at, migration) in MIGRATIONS.iter().enumerate().skip(done) {
        let tx = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for tables in *migration {
            tx.execute_batch(tables)?;
        }
        tx.pragma_update(None, "user_version", at + 1)?;
        tx.commit()?;
    }
    Ok(())
}
