//! Answers of calls with an idempotency key, kept so that a repeated call does nothing twice.
//! It knows no noun: `Core::mutate` looks up and keeps answers in the transaction of the call itself.
use model::{Code, Time};
use rusqlite::{OptionalExtension, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::call::Call;
use crate::error::{Error, Result};
use crate::limits;
use crate::store::Tx;

pub(crate) const TABLES: &str = "
CREATE TABLE idempotency (
    actor TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, answer TEXT NOT NULL,
    created_ms INTEGER NOT NULL, PRIMARY KEY (actor, key)) STRICT;
CREATE INDEX idempotency_by_age ON idempotency (created_ms);
";

/// The stored answer of an earlier call with the same key. Fails with `idempotency_mismatch` when the key was
/// used for another request.
pub fn replay<T: DeserializeOwned>(tx: &Tx<'_>, call: &Call) -> Result<Option<T>> {
    let Some(idempotency) = &call.idempotency else { return Ok(None) };
    let stored: Option<(String, String)> = tx
        .prepare_cached("SELECT fingerprint, answer FROM idempotency WHERE actor = ?1 AND key = ?2")?
        .query_row(params![call.actor.to_string(), idempotency.key], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((fingerprint, answer)) = stored else { return Ok(None) };
    if fingerprint != idempotency.fingerprint {
        return Err(Error::new(
            Code::IdempotencyMismatch,
            format!("the key {:?} was used for another request; choose a new key", idempotency.key),
        ));
    }
    Ok(Some(serde_json::from_str(&answer)?))
}

/// Keeps the answer of this call, and forgets those that are too old.
pub fn keep<T: Serialize>(tx: &Tx<'_>, call: &Call, answer: &T) -> Result<()> {
    let Some(idempotency) = &call.idempotency else { return Ok(()) };
    let now_ms = Time::now().unix_ms();
    tx.prepare_cached("DELETE FROM idempotency WHERE created_ms < ?1")?
        .execute([now_ms - limits::IDEMPOTENCY_KEPT.as_millis() as i64])?;
    tx.prepare_cached(
        "INSERT INTO idempotency (actor, key, fingerprint, answer, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![
        call.actor.to_string(),
        idempotency.key,
        idempotency.fingerprint,
        serde_json::to_string(answer)?,
        now_ms
    ])?;
    Ok(())
}
