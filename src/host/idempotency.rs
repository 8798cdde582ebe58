//! Answers of calls with an idempotency key, kept so that a repeated call does nothing twice.
//! It knows no noun: `Core::mutate` looks up and keeps answers in the transaction of the call itself.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::{Code, Time};
use rusqlite::{Connection, OptionalExtension, params};
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
pub fn replay<T: DeserializeOwned>(connection: &Connection, call: &Call) -> Result<Option<T>> {
    let Some(idempotency) = &call.idempotency else { return Ok(None) };
    let stored: Option<(String, String)> = connection
        .prepare_cached("SELECT fingerprint, answer FROM idempotency WHERE actor = ?1 AND key = ?2")?
        .query_row(params![call.actor.to_string(), idempotency.key], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((fingerprint, answer)) = stored else { return Ok(None) };
    if fingerprint != idempotency.fingerprint {
        return Err(mismatch(&idempotency.key));
    }
    Ok(Some(serde_json::from_str(&answer)?))
}

fn mismatch(key: &str) -> Error {
    Error::new(
        Code::IdempotencyMismatch,
        format!("the key {key:?} was used for another request; choose a new key"),
    )
}

/// Keeps the answer of this call in place of an earlier one, and forgets those that are too old.
pub fn keep<T: Serialize>(tx: &Tx<'_>, call: &Call, answer: &T) -> Result<()> {
    let Some(idempotency) = &call.idempotency else { return Ok(()) };
    let now_ms = Time::now().unix_ms();
    tx.prepare_cached("DELETE FROM idempotency WHERE created_ms < ?1")?
        .execute([now_ms - limits::IDEMPOTENCY_KEPT.as_millis() as i64])?;
    tx.prepare_cached(
        "INSERT OR REPLACE INTO idempotency (actor, key, fingerprint, answer, created_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
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

/// Calls with a key whose work is longer than one transaction, while it lasts. They end with the daemon, so nothing of
/// them is recorded. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Underway(Arc<Mutex<Keys>>);

/// Fingerprints by caller and key.
type Keys = BTreeMap<(String, String), String>;

/// A call under way; it has ended when this is dropped.
#[derive(Debug)]
pub struct Held {
    underway: Underway,
    key: Option<(String, String)>,
}

impl Underway {
    /// Takes the call's key. Fails as [`Underway::refuse`] does.
    pub fn begin(&self, call: &Call) -> Result<Held> {
        let mut keys = self.keys();
        refuse(&keys, call)?;
        let key = call.idempotency.as_ref().map(|idempotency| {
            let key = (call.actor.to_string(), idempotency.key.clone());
            keys.insert(key.clone(), idempotency.fingerprint.clone());
            key
        });
        Ok(Held { underway: self.clone(), key })
    }

    /// Fails with `idempotency_running` while a call with this key is under way, `idempotency_mismatch` when that is
    /// another request.
    pub fn refuse(&self, call: &Call) -> Result<()> {
        refuse(&self.keys(), call)
    }

    /// A panic elsewhere leaves the map whole: each change is one insert or remove.
    fn keys(&self) -> MutexGuard<'_, Keys> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refuse(keys: &Keys, call: &Call) -> Result<()> {
    let Some(idempotency) = &call.idempotency else { return Ok(()) };
    match keys.get(&(call.actor.to_string(), idempotency.key.clone())) {
        None => Ok(()),
        Some(fingerprint) if *fingerprint == idempotency.fingerprint => Err(Error::new(
            Code::IdempotencyRunning,
            format!("the request with the key {:?} is being carried out; ask again", idempotency.key),
        )),
        Some(_) => Err(mismatch(&idempotency.key)),
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            self.underway.keys().remove(key);
        }
    }
}
