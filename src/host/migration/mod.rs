//! Moving servers between hosts: who this host is, who may ask it, and what is in the way of a move. It knows no HTTP;
//! what the daemons say to each other is `wire::peer`. Called by the facade.
//!
//! ```text
//!  source: plan ─▶ offer ─▶ ask ══ TLS, both sides show a certificate ══▶ target: ticket ─▶ judge ─▶ verdict
//! ```
//! The target knows the source by the ticket it presents, the source the target by the fingerprint in that ticket.
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::migration::{CreateMigrationTicket, MigrateServer, MigrationPlan, MigrationTicket};
use model::{Code, FieldError, ServerId, Time};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::call::{Answer, Call};
use crate::core::Shared;
use crate::error::{Error, Result};
use crate::servers::capacity::Capacity;
use crate::vmms::Launch;

mod cpu;
mod identity;
pub mod limits;
mod link;
mod source;
mod target;
mod ticket;

use cpu::Cpu;
use identity::Identity;
use ticket::Ticket;

pub(crate) const TABLES: &str = ticket::TABLES;

/// Moves between hosts, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Migrations {
    core: Shared,
    capacity: Capacity,
    launcher: Arc<dyn Launch>,
    identity: Identity,
    listening: Arc<Mutex<Option<Listening>>>,
}

struct Listening {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Migrations {
    pub(crate) async fn new(
        core: Shared,
        capacity: Capacity,
        launcher: Arc<dyn Launch>,
    ) -> Result<Migrations> {
        let identity = core.store.write(Identity::of_host).await?;
        Ok(Migrations { core, capacity, launcher, identity, listening: Arc::default() })
    }

    /// Waits for other hosts at `address` until the host closes, and answers where: with port 0 the kernel chooses one.
    /// Fails with `host_unprepared` when the address cannot be had.
    pub async fn listen(&self, address: SocketAddr) -> Result<SocketAddr> {
        let acceptor = TlsAcceptor::from(Arc::new(self.identity.as_target()?));
        let bound =
            TcpListener::bind(address).await.and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (address, listener) = bound.map_err(|cause| {
            let detail =
                format!("other hosts cannot be waited for at {address}; choose another --migration-listen");
            Error::new(Code::HostUnprepared, detail).caused_by(cause)
        })?;
        let task = tokio::spawn(target::listen(self.clone(), listener, acceptor));
        if let Some(before) = self.listening().replace(Listening { address, task }) {
            before.task.abort();
        }
        Ok(address)
    }

    /// Waits no longer; conversations end.
    pub(crate) async fn close(&self) {
        let listening = self.listening().take();
        if let Some(Listening { task, .. }) = listening {
            task.abort();
            let _ = task.await;
        }
    }

    /// Makes a ticket for another host. It is never kept in readable form, so a repeated call makes another.
    pub async fn ticket(&self, call: &Call, spec: CreateMigrationTicket) -> Result<Answer<MigrationTicket>> {
        // Nothing of a ticket is worth keeping with the key, least of all its secret.
        let _ = call;
        let lifetime_s = spec.lifetime_s.unwrap_or(limits::TICKET_S);
        if !(1..=limits::TICKET_S_MAX).contains(&lifetime_s) {
            let detail = format!("must be 1 to {}", limits::TICKET_S_MAX);
            return Err(Error::invalid("/lifetime_s", "out_of_range", detail));
        }
        let target = self.listening().as_ref().map(|listening| listening.address).ok_or_else(|| {
            let detail =
                "this host does not wait for other hosts; start toftd with --migration-listen ADDRESS:PORT";
            Error::new(Code::HostUnprepared, detail)
        })?;
        let lifetime_ms = Duration::from_secs(lifetime_s).as_millis() as i64;
        let expires_at = Time::from_unix_ms(Time::now().unix_ms().saturating_add(lifetime_ms));
        let fingerprint = self.identity.fingerprint();
        let ticket = self.core.store.write(move |tx| ticket::issue(tx, fingerprint, expires_at)).await?;
        let body = MigrationTicket {
            ticket: ticket.to_string(),
            target,
            fingerprint: fingerprint.to_string(),
            expires_at,
        };
        Ok(Answer { body, replayed: false })
    }

    /// What a move would bring, and everything that is in its way on either host; changes nothing but that the ticket
    /// belongs to this host from then on.
    pub async fn plan(&self, id: ServerId, spec: MigrateServer) -> Result<MigrationPlan> {
        let cpu = Cpu::of_host()?;
        let dirs = self.core.dirs.clone();
        let offer = self.core.store.read(move |connection| source::offer(connection, &dirs, id, cpu)).await?;
        let ticket: Ticket = spec.ticket.parse()?;
        source::ask(&self.identity, spec.target, ticket, offer).await
    }

    /// Moves a server. Fails with `migration_blocked`, which names everything that is in the way.
    pub async fn migrate(&self, id: ServerId, spec: MigrateServer) -> Result<Infallible> {
        let plan = self.plan(id, spec).await?;
        let errors = plan.blocked_by.iter().map(|obstacle| FieldError {
            pointer: String::new(),
            code: wire_word(&obstacle.code),
            detail: obstacle.detail.clone(),
        });
        let errors: Vec<FieldError> = errors.collect();
        let detail = match errors.as_slice() {
            [one] => one.detail.clone(),
            more => format!("{} things are in the way; see `errors`", more.len()),
        };
        Err(Error { errors, ..Error::new(Code::MigrationBlocked, detail) })
    }

    fn listening(&self) -> std::sync::MutexGuard<'_, Option<Listening>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A word of an enumeration as it stands in JSON.
fn wire_word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests;
