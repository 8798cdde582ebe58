//! Tickets: made by the target, given to the source by whoever asks for the move. A ticket names its host by
//! fingerprint, so that the source knows the target, and holds a secret, so that the target knows the source. Secrets
//! are kept hashed; each belongs to the first host that presents it.
use std::str::FromStr;

use model::{Code, Time};
use rusqlite::params;
use wire::saved::Digest;

use super::limits;
use crate::error::{Error, Result};
use crate::store::Tx;
use crate::tokens;

pub(super) const TABLES: &str = "
CREATE TABLE migration_tickets (hash TEXT PRIMARY KEY, source TEXT, expires_ms INTEGER NOT NULL) STRICT;
";

/// A ticket as it is handed around: `<fingerprint>.<secret>`, both 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ticket {
    /// The host that made it.
    pub(super) host: Digest,
    /// What that host recognises.
    pub(super) secret: String,
}

impl std::fmt::Display for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.host, self.secret)
    }
}

impl FromStr for Ticket {
    type Err = Error;

    fn from_str(text: &str) -> Result<Ticket> {
        let parsed = text.split_once('.').and_then(|(host, secret)| {
            let secret: Digest = secret.parse().ok()?;
            Some(Ticket { host: host.parse().ok()?, secret: secret.to_string() })
        });
        parsed.ok_or_else(|| {
            let detail = "this is no ticket; make one on the target with `toft host ticket`";
            Error::invalid("/ticket", "not_valid", detail)
        })
    }
}

/// Makes a ticket that is good until `expires_at`.
pub(super) fn issue(tx: &Tx<'_>, host: Digest, expires_at: Time) -> Result<Ticket> {
    tx.execute("DELETE FROM migration_tickets WHERE expires_ms <= ?1", [Time::now().unix_ms()])?;
    let count: u32 = tx.query_row("SELECT count(*) FROM migration_tickets", [], |row| row.get(0))?;
    if count >= limits::TICKETS_MAX {
        let detail =
            format!("{count} migration tickets are good already; use one, or wait until some expire");
        return Err(Error::new(Code::TooMany, detail));
    }
    let ticket = Ticket { host, secret: tokens::random_hex()? };
    tx.execute(
        "INSERT INTO migration_tickets (hash, expires_ms) VALUES (?1, ?2)",
        params![tokens::hash(&ticket.secret), expires_at.unix_ms()],
    )?;
    Ok(ticket)
}

/// Uses up a ticket that its host has presented: it is for one move.
pub(super) fn redeem(tx: &Tx<'_>, secret: &str, source: Digest) -> Result<()> {
    let changed = tx.execute(
        "DELETE FROM migration_tickets WHERE hash = ?1 AND source = ?2",
        params![tokens::hash(secret), source.to_string()],
    )?;
    match changed {
        0 => Err(Error::new(Code::Unauthenticated, "the ticket was used for another move; make a new one")),
        _ => Ok(()),
    }
}

/// Takes a ticket from the host of this fingerprint, whose it is from now on. Repeatable by that host.
pub(super) fn present(tx: &Tx<'_>, secret: &str, source: Digest) -> Result<()> {
    let changed = tx.execute(
        "UPDATE migration_tickets SET source = ?2
         WHERE hash = ?1 AND expires_ms > ?3 AND (source IS NULL OR source = ?2)",
        params![tokens::hash(secret), source.to_string(), Time::now().unix_ms()],
    )?;
    match changed {
        0 => Err(Error::new(
            Code::Unauthenticated,
            "the ticket is unknown, has expired, or was presented by another host before; make a new one",
        )),
        _ => Ok(()),
    }
}
