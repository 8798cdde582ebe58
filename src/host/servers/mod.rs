//! Servers: what a customer creates. The facade checks and records; an actor per server does the work.
//! It knows no HTTP; it reaches VMMs only through `vmms`.
use model::operation::Accepted;
use model::page::{ListQuery, Page};
use model::server::{
    ConsoleToken, CreateConsoleToken, CreateServer, DeleteServer, PatchServer, Server, ServerAction,
    ServerMetrics, ServerPlan,
};
use model::{Code, ServerId};

use crate::call::{Answer, Call};
use crate::core::Shared;
use crate::error::{Error, Result};

pub(crate) const TABLES: &str = concat!(
    crate::table!("servers"),
    "ALTER TABLE servers ADD COLUMN external_ref TEXT;
     CREATE UNIQUE INDEX servers_by_external_ref ON servers (external_ref);
     CREATE TABLE console_tokens (hash TEXT PRIMARY KEY, server TEXT NOT NULL, read_only INTEGER NOT NULL,
        position INTEGER, expires_ms INTEGER NOT NULL) STRICT;"
);

/// Servers, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Servers {
    core: Shared,
}

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
    /// Whether [`ConsoleStream::write`] is refused.
    pub read_only: bool,
    /// Which server.
    pub server: ServerId,
}

impl ConsoleStream {
    /// The next piece of output: at least one byte, as soon as there is one; `None` when the server is gone.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<ConsolePiece>> {
        Err(unbuilt())
    }

    /// A keyboard for this console that can be used beside [`ConsoleStream::next`].
    pub fn keyboard(&self) -> Keyboard {
        Keyboard { server: self.server }
    }
}

/// Types on a console.
pub struct Keyboard {
    server: ServerId,
}

impl Keyboard {
    /// Types; returns when the guest's serial port has taken all of it. Fails with `forbidden` when the console
    /// is read-only, `wrong_state` when no machine runs.
    pub async fn write(&self, data: &[u8]) -> Result<()> {
        let _ = (self.server, data);
        Err(unbuilt())
    }
}

fn unbuilt() -> Error {
    Error::new(Code::HostUnprepared, "servers are not built yet")
}

impl Servers {
    pub(crate) fn new(core: Shared) -> Servers {
        Servers { core }
    }

    /// Accepts a new server.
    pub async fn create(&self, call: &Call, spec: CreateServer) -> Result<Answer<Accepted<Server>>> {
        let _ = (&self.core, call, spec);
        Err(unbuilt())
    }

    /// What `create` would do; changes nothing.
    pub async fn plan(&self, call: &Call, spec: CreateServer) -> Result<ServerPlan> {
        let _ = (call, spec);
        Err(unbuilt())
    }

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Server>> {
        let _ = query;
        Err(unbuilt())
    }

    /// The server.
    pub async fn one(&self, id: ServerId) -> Result<Server> {
        let _ = id;
        Err(unbuilt())
    }

    /// Changes what can be changed.
    pub async fn patch(&self, call: &Call, id: ServerId, patch: PatchServer) -> Result<Answer<Server>> {
        let _ = (call, id, patch);
        Err(unbuilt())
    }

    /// Deletes it, whatever it does. `resource` of the answer is the server as it is being deleted.
    pub async fn delete(
        &self,
        call: &Call,
        id: ServerId,
        how: DeleteServer,
    ) -> Result<Answer<Accepted<Server>>> {
        let _ = (call, id, how);
        Err(unbuilt())
    }

    /// Starts, stops, reboots, pauses or resumes it. What is done already succeeds at once; what is being done is
    /// answered with the operation that does it.
    pub async fn act(
        &self,
        call: &Call,
        id: ServerId,
        action: ServerAction,
    ) -> Result<Answer<Accepted<Server>>> {
        let _ = (call, id, action);
        Err(unbuilt())
    }

    /// A piece of the console's output: from position `from`, else the last `tail_bytes`.
    pub async fn console_log(
        &self,
        id: ServerId,
        from: Option<u64>,
        tail_bytes: usize,
    ) -> Result<ConsolePiece> {
        let _ = (id, from, tail_bytes);
        Err(unbuilt())
    }

    /// Makes a one-use ticket to the console. Its url is `/v1/servers/{id}/console?token={secret}`.
    pub async fn console_token(
        &self,
        call: &Call,
        id: ServerId,
        spec: CreateConsoleToken,
    ) -> Result<Answer<ConsoleToken>> {
        let _ = (call, id, spec);
        Err(unbuilt())
    }

    /// Opens the console of server `id` with a ticket, which is worth nothing afterwards. Fails with
    /// `unauthenticated`, or `too_many` when too many read it already.
    pub async fn console_open(&self, id: ServerId, secret: &str) -> Result<ConsoleStream> {
        let _ = (id, secret);
        Err(unbuilt())
    }

    /// Counters of its machine. Fails with `wrong_state` when none runs.
    pub async fn metrics(&self, id: ServerId) -> Result<ServerMetrics> {
        let _ = id;
        Err(unbuilt())
    }
}

/// What servers have of the host.
#[derive(Debug, Clone, Default)]
pub struct Usage {
    /// Memory promised to servers that run or are about to, in bytes.
    pub memory_used_bytes: u64,
    /// Memory that servers may have in all, in bytes.
    pub memory_total_bytes: u64,
    /// Virtual CPUs of those servers.
    pub vcpus_used: u32,
    /// Servers by state.
    pub by_state: std::collections::BTreeMap<String, u32>,
}

impl Servers {
    /// What servers have of the host.
    pub async fn usage(&self) -> Result<Usage> {
        Err(unbuilt())
    }
}

/// For `volumes`: whether a server has no machine, so that its volumes can be changed. True when there is none.
pub(crate) fn is_off(connection: &rusqlite::Connection, id: ServerId) -> Result<bool> {
    let _ = (connection, id);
    Err(unbuilt())
}
