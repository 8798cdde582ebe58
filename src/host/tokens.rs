//! Access tokens of the API: random, stored hashed, revocable. It knows no HTTP.
//! `http` verifies with it; `toftd token` makes them.
use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use hmac::{Hmac, KeyInit, Mac};
use model::{Code, Time, TokenId};
use rusqlite::{OptionalExtension, params};
use sha2::Sha256;

use crate::call::Actor;
use crate::config::{self, Dirs};
use crate::core::{AlwaysLive, Shared};
use crate::error::{Error, Result};
use crate::limits;
use crate::store::{Store, Version};

pub(crate) const TABLES: &str = "
CREATE TABLE tokens (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, created_ms INTEGER NOT NULL,
    expires_ms INTEGER) STRICT;
";

/// An access token without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Identity.
    pub id: TokenId,
    /// What it is for, in its maker's words.
    pub name: String,
    /// When it was made.
    pub created_at: Time,
    /// When it stops working.
    pub expires_at: Option<Time>,
}

/// Access tokens.
#[derive(Clone)]
pub struct Tokens {
    store: Store,
    known: Arc<Mutex<Known>>,
}

/// Good tokens by their hashes, as of one state of the records: a caller's every request brings the same one.
#[derive(Default)]
struct Known {
    as_of: Option<Version>,
    by_hash: HashMap<String, Holder>,
}

#[derive(Clone, Copy)]
struct Holder {
    id: TokenId,
    expires_ms: Option<i64>,
}

impl Holder {
    fn is_good(&self, now_ms: i64) -> bool {
        self.expires_ms.is_none_or(|expires_ms| expires_ms > now_ms)
    }
}

impl Tokens {
    pub(crate) fn new(core: &Shared) -> Tokens {
        Tokens { store: core.store.clone(), known: Arc::default() }
    }

    /// Of a state directory, beside a daemon that may run: for `toftd token`.
    pub async fn open(state_dir: &Path) -> Result<Tokens> {
        let dirs = Dirs::prepare(state_dir)?;
        let store = Store::open(&dirs.database(), Arc::new(AlwaysLive)).await?;
        Ok(Tokens { store, known: Arc::default() })
    }

    /// The same, where a daemon has worked or a token was made before: who only reads begins nothing.
    pub async fn open_existing(state_dir: &Path) -> Result<Tokens> {
        match state_dir.join(config::DATABASE).metadata() {
            Err(cause) if cause.kind() == ErrorKind::NotFound => {
                let shown = state_dir.display();
                let detail =
                    format!("there is no state directory of toftd at {shown}; name it with --state-dir");
                Err(Error::new(Code::NotFound, detail))
            }
            _ => Tokens::open(state_dir).await,
        }
    }

    /// Who holds this secret. Fails with `unauthenticated`.
    pub async fn verify(&self, secret: &str) -> Result<Actor> {
        let (hash, now_ms) = (hash(secret), Time::now().unix_ms());
        let version = self.store.version();
        let holder = match self.known(version, &hash) {
            Some(holder) => Some(holder),
            None => self.find(&hash).await?.inspect(|holder| self.remember(version, hash, *holder)),
        };
        let id = holder.filter(|holder| holder.is_good(now_ms)).map(|holder| holder.id);
        id.map(|id| Actor::Token { id }).ok_or_else(|| {
            Error::new(
                Code::Unauthenticated,
                "the token is unknown, expired or revoked; make one with `toftd token create NAME`",
            )
        })
    }

    async fn find(&self, hash: &str) -> Result<Option<Holder>> {
        let hash = hash.to_owned();
        let look = move |connection: &rusqlite::Connection| {
            let mut statement =
                connection.prepare_cached("SELECT id, expires_ms FROM tokens WHERE hash = ?1")?;
            let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?, row.get(1)?));
            Ok(statement.query_row([hash], row).optional()?)
        };
        let found = self.store.read(look).await?;
        Ok(found.and_then(|(id, expires_ms)| Some(Holder { id: id.parse().ok()?, expires_ms })))
    }

    fn known(&self, version: Option<Version>, hash: &str) -> Option<Holder> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.by_hash.get(hash).filter(|_| version.is_some() && known.as_of == version).copied()
    }

    /// `version` is from before the token was looked up. There are as many entries at most as there are tokens.
    fn remember(&self, version: Option<Version>, hash: String, holder: Holder) {
        if version.is_none() {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_of != version {
            *known = Known { as_of: version, by_hash: HashMap::new() };
        }
        known.by_hash.insert(hash, holder);
    }

    /// Makes a token; the secret is shown here and never again.
    pub async fn create(&self, name: &str, expires_at: Option<Time>) -> Result<(Token, String)> {
        let secret = format!("toft_{}", random_hex()?);
        let token = Token { id: TokenId::new(), name: name.to_owned(), created_at: Time::now(), expires_at };
        let (row, hash) = (token.clone(), hash(&secret));
        self.store
            .write(move |tx| {
                let count: u32 = tx.query_row("SELECT count(*) FROM tokens", [], |row| row.get(0))?;
                if count >= limits::TOKENS_MAX {
                    return Err(Error::new(
                        Code::TooMany,
                        format!("there are {count} tokens already; revoke some"),
                    ));
                }
                tx.execute(
                    "INSERT INTO tokens (id, name, hash, created_ms, expires_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![
                        row.id.to_string(),
                        row.name,
                        hash,
                        row.created_at.unix_ms(),
                        row.expires_at.map(Time::unix_ms)
                    ],
                )?;
                Ok(())
            })
            .await?;
        Ok((token, secret))
    }

    /// Every token, oldest first.
    pub async fn list(&self) -> Result<Vec<Token>> {
        self.store
            .read(|connection| {
                let mut statement =
                    connection.prepare("SELECT id, name, created_ms, expires_ms FROM tokens ORDER BY id")?;
                let mut rows = statement.query([])?;
                let mut tokens = Vec::new();
                while let Some(row) = rows.next()? {
                    let id: String = row.get(0)?;
                    tokens.push(Token {
                        id: id.parse().map_err(|cause: uuid::Error| {
                            Error::internal("a token's record cannot be read", cause)
                        })?,
                        name: row.get(1)?,
                        created_at: Time::from_unix_ms(row.get(2)?),
                        expires_at: row.get::<_, Option<i64>>(3)?.map(Time::from_unix_ms),
                    });
                }
                Ok(tokens)
            })
            .await
    }

    /// Makes a token worthless. Fails with `not_found`.
    pub async fn revoke(&self, id: TokenId) -> Result<()> {
        self.store
            .write(move |tx| match tx.execute("DELETE FROM tokens WHERE id = ?1", [id.to_string()])? {
                0 => Err(Error::not_found("token", id)),
                _ => Ok(()),
            })
            .await
    }
}

/// What is stored of a secret. The secret has 256 random bits, so a plain hash cannot be searched.
pub(crate) fn hash(secret: &str) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(secret.as_bytes()))
}

/// 256 bits from the kernel, in hexadecimal.
pub(crate) fn random_hex() -> Result<String> {
    Ok(hex(&random()?))
}

fn random() -> Result<[u8; 32]> {
    use std::io::Read;
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|cause| Error::internal("the host has no random numbers", cause))?;
    Ok(bytes)
}

/// Makes secrets that can be told again to whoever repeats a call, without keeping them: each follows from what it is
/// for and from random bits that only this process knows. They end with it, and so does the telling.
pub struct Derivation([u8; 32]);

impl Derivation {
    /// With bits of its own.
    pub fn new() -> Result<Derivation> {
        random().map(Derivation)
    }

    /// 256 bits in hexadecimal, the same for the same parts: HMAC-SHA256 (RFC 2104) of the parts, each with its length
    /// so that none can pass for part of another.
    pub fn secret(&self, parts: &[&str]) -> String {
        let mut mac = self.mac();
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part.as_bytes());
        }
        hex(&mac.finalize().into_bytes())
    }

    fn mac(&self) -> Hmac<Sha256> {
        // A key that is shorter than a block of the hash is filled up with zeros.
        let mut key = [0; 64];
        key[..self.0.len()].copy_from_slice(&self.0);
        Hmac::new(&key.into())
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_secrets_are_hmac_sha256() {
        // RFC 4231, test case 1: its key is shorter, and a key is filled up with zeros.
        let mut key = [0; 32];
        key[..20].fill(0x0b);
        let mac = hex(&Derivation(key).mac().chain_update(b"Hi There").finalize().into_bytes());
        assert_eq!(mac, "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    }

    #[test]
    fn a_derived_secret_is_of_its_parts_and_its_process() {
        let one = Derivation::new().unwrap();
        assert_eq!(one.secret(&["ab", "c"]), one.secret(&["ab", "c"]));
        assert_ne!(one.secret(&["ab", "c"]), one.secret(&["a", "bc"]));
        assert_ne!(one.secret(&["ab", "c"]), Derivation::new().unwrap().secret(&["ab", "c"]));
    }
}
