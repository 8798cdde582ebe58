//! Consoles: the ring is read by position, by any number of readers, whether a machine runs or not; the VMM only
//! wakes them. Tickets are worth one opening within a minute and are kept hashed.
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use model::console::{ConsoleToken, CreateConsoleToken};
use model::{Code, ServerId, Time};
use rusqlite::{OptionalExtension, params};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use wire::console::Ring;
use wire::control::{Command, Reply};

use super::effects::open_ring;
use super::limits;
use super::readers::{Kicked, Place};
use super::registry::Entry;
use crate::call::Actor;
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::store::Tx;
use crate::tokens;

/// A piece of console output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsolePiece {
    /// Position of the first byte, counted from the console's first.
    pub start: u64,
    /// The bytes.
    pub data: Vec<u8>,
    /// Bytes the console has written in all.
    pub written: u64,
}

/// An open console: output to follow and a keyboard. Reading and writing go on side by side.
pub struct ConsoleStream {
    /// Whether [`Keyboard::write`] is refused.
    pub read_only: bool,
    /// Which server.
    pub server: ServerId,
    output: Output,
    place: Place,
}

/// The output of a console, followed from a position.
pub(super) struct Output {
    entry: Arc<Entry>,
    ring: Arc<Mutex<Ring>>,
    position: u64,
    wake: watch::Receiver<u64>,
}

/// Types on a console.
#[derive(Clone)]
pub struct Keyboard {
    entry: Arc<Entry>,
    read_only: bool,
}

/// What a ticket is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) read_only: bool,
    /// Who made it.
    pub(super) actor: String,
    pub(super) from: Option<u64>,
}

impl ConsoleStream {
    pub(super) async fn open(
        entry: Arc<Entry>,
        path: &Path,
        place: Place,
        ticket: Ticket,
    ) -> Result<ConsoleStream> {
        place.seat(ticket.read_only, ticket.actor);
        let server = entry.id;
        let output = Output::open(entry, path, ticket.from.unwrap_or_default()).await?;
        Ok(ConsoleStream { read_only: ticket.read_only, server, output, place })
    }

    /// The next piece of output: at least one byte, as soon as there is one; `None` when the server is gone. A
    /// start beyond the end of the piece before it means that output was overwritten in between. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<ConsolePiece>> {
        self.output.next().await
    }

    /// Ends when this reader is to leave. Reading and typing do not look at it.
    pub fn kicked(&self) -> Kicked {
        self.place.kicked()
    }

    /// A keyboard for this console that can be used beside [`ConsoleStream::next`].
    pub fn keyboard(&self) -> Keyboard {
        Keyboard { entry: self.output.entry.clone(), read_only: self.read_only }
    }
}

impl Output {
    pub(super) async fn open(entry: Arc<Entry>, path: &Path, position: u64) -> Result<Output> {
        let ring = Arc::new(Mutex::new(open(path).await?));
        let wake = entry.console.subscribe();
        Ok(Output { entry, ring, position, wake })
    }

    /// As [`ConsoleStream::next`].
    pub(super) async fn next(&mut self) -> Result<Option<ConsolePiece>> {
        loop {
            self.wake.borrow_and_update();
            let piece = read(self.ring.clone(), self.position, limits::CONSOLE_PIECE_BYTES).await?;
            if !piece.data.is_empty() {
                self.position = piece.start + piece.data.len() as u64;
                return Ok(Some(piece));
            }
            if self.entry.gone.load(Ordering::SeqCst) {
                return Ok(None);
            }
            // A position beyond the end would never be reached by what comes next.
            self.position = self.position.min(piece.written);
            self.ask_for_word().await;
            if self.wake.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    /// Without a connection there is nothing to wait for: a new one wakes every reader.
    async fn ask_for_word(&self) {
        if !self.entry.is_linked() {
            return;
        }
        let asked = async {
            let link = self.entry.link(limits::COMMAND).await?;
            link.order(Command::WatchConsole { seen: self.position }, limits::COMMAND).await
        };
        if let Err(cause) = asked.await {
            tracing::debug!(server = %self.entry.id, "its console cannot be watched: {cause}");
        }
    }
}

impl Keyboard {
    /// Types; returns when the guest's serial port has taken all of it. Fails with `forbidden` when the console
    /// is read-only, `wrong_state` when no machine runs, `timeout` when the guest takes nothing.
    pub async fn write(&self, data: &[u8]) -> Result<()> {
        if self.read_only {
            return Err(Error::new(Code::Forbidden, "this console was opened to look only"));
        }
        let mut rest = data;
        let mut stuck_at = Instant::now() + limits::CONSOLE_STUCK;
        while !rest.is_empty() {
            let piece = &rest[..rest.len().min(wire::limits::CONSOLE_INPUT_BYTES_MAX)];
            let command = Command::ConsoleInput { data_base64: STANDARD.encode(piece) };
            if self.entry.machine().is_none() {
                return Err(Error::new(Code::WrongState, "no machine runs; start the server first"));
            }
            let link = self.entry.link(limits::COMMAND).await.map_err(Error::from)?;
            let taken = match link.ask(command, &[], limits::COMMAND).await.map_err(Error::from)? {
                Reply::Taken { bytes } => usize::try_from(bytes).unwrap_or(usize::MAX).min(piece.len()),
                other => {
                    return Err(Error::new(
                        Code::MachineFailed,
                        format!("typing was answered with {other:?}"),
                    ));
                }
            };
            rest = &rest[taken..];
            if taken > 0 {
                stuck_at = Instant::now() + limits::CONSOLE_STUCK;
            } else if Instant::now() >= stuck_at {
                return Err(Error::new(Code::Timeout, "the guest does not read its serial port"));
            }
            if !rest.is_empty() {
                tokio::time::sleep(limits::CONSOLE_FULL).await;
            }
        }
        Ok(())
    }
}

/// A piece of the ring at `path`, from position `from`, else its last `tail_bytes`. Nothing while there is no
/// ring yet.
pub(super) async fn log(path: &Path, from: Option<u64>, tail_bytes: usize) -> Result<ConsolePiece> {
    if !path.exists() {
        return Ok(ConsolePiece { start: 0, data: Vec::new(), written: 0 });
    }
    let ring = open(path).await?;
    let length = match from {
        Some(_) => limits::CONSOLE_LOG_BYTES_MAX,
        None => tail_bytes.min(limits::CONSOLE_LOG_BYTES_MAX),
    };
    let from = from.unwrap_or_else(|| ring.written().saturating_sub(length as u64));
    read(Arc::new(Mutex::new(ring)), from, length).await
}

async fn open(path: &Path) -> Result<Ring> {
    let path = path.to_owned();
    blocking(move || {
        Ring::open(open_ring(&path)?)
            .map_err(|cause| Error::file("the console's output cannot be read", cause))
    })
    .await
}

async fn read(ring: Arc<Mutex<Ring>>, from: u64, length_max: usize) -> Result<ConsolePiece> {
    blocking(move || {
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = ring
            .read(from, length_max)
            .map_err(|cause| Error::file("the console's output cannot be read", cause))?;
        Ok(ConsolePiece { start: piece.start, data: piece.data, written: ring.written() })
    })
    .await
}

/// What is kept of a ticket for a repeated call: enough to know its secret by.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Issued {
    hash: String,
    expires_at: Time,
}

impl Issued {
    /// Whether it is the ticket with this secret.
    pub(super) fn is_of(&self, secret: &str) -> bool {
        self.hash == tokens::hash(secret)
    }

    /// What its holder is told.
    pub(super) fn token(&self, id: ServerId, secret: &str) -> ConsoleToken {
        ConsoleToken { url: format!("/v1/servers/{id}/console?token={secret}"), expires_at: self.expires_at }
    }
}

/// Makes a ticket with this secret.
pub(super) fn issue(
    tx: &Tx<'_>,
    id: ServerId,
    spec: CreateConsoleToken,
    actor: &Actor,
    secret: &str,
) -> Result<Issued> {
    let now = Time::now();
    let lifetime_ms = i64::try_from(limits::CONSOLE_TOKEN.as_millis()).unwrap_or_default();
    let expires_at = Time::from_unix_ms(now.unix_ms() + lifetime_ms);
    tx.execute("DELETE FROM console_tokens WHERE expires_ms < ?1", [now.unix_ms()])?;
    let live: usize =
        tx.query_row("SELECT count(*) FROM console_tokens WHERE server = ?1", [id.to_string()], |row| {
            row.get(0)
        })?;
    if live >= limits::CONSOLE_TOKENS_MAX {
        return Err(Error::new(Code::TooMany, format!("{live} tickets are open; use them or wait a minute")));
    }
    let issued = Issued { hash: tokens::hash(secret), expires_at };
    tx.execute(
        "INSERT INTO console_tokens (hash, server, read_only, position, expires_ms, actor)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            issued.hash,
            id.to_string(),
            spec.read_only,
            spec.from,
            expires_at.unix_ms(),
            actor.to_string()
        ],
    )?;
    Ok(issued)
}

/// Makes a ticket worth nothing. Repeatable.
pub(super) fn withdraw(tx: &Tx<'_>, issued: &Issued) -> Result<()> {
    tx.execute("DELETE FROM console_tokens WHERE hash = ?1", [&issued.hash])?;
    Ok(())
}

/// Makes every ticket of a server that nobody has taken yet worth nothing.
pub(super) fn revoke(tx: &Tx<'_>, id: ServerId) -> Result<()> {
    tx.execute("DELETE FROM console_tokens WHERE server = ?1", [id.to_string()])?;
    Ok(())
}

/// Takes a ticket; it is worth nothing afterwards. Fails with `unauthenticated`.
pub(super) fn redeem(tx: &Tx<'_>, id: ServerId, secret: &str) -> Result<Ticket> {
    let taken = tx
        .prepare_cached(
            "DELETE FROM console_tokens WHERE hash = ?1 AND server = ?2 AND expires_ms >= ?3
             RETURNING read_only, position, actor",
        )?
        .query_row(params![tokens::hash(secret), id.to_string(), Time::now().unix_ms()], |row| {
            Ok(Ticket { read_only: row.get(0)?, from: row.get(1)?, actor: row.get(2)? })
        })
        .optional()?;
    taken.ok_or_else(|| {
        Error::new(
            Code::Unauthenticated,
            "the ticket is unknown, used or expired; make a new one with POST …/console-tokens",
        )
    })
}
