//! Moving servers between hosts: who this host is, who may ask it, what is in the way of a move, and the move. It knows no
//! HTTP; what the daemons say to each other is `wire::peer`, whose the server is meanwhile `servers::moving`. Called by
//! the facade.
//!
//! ```text
//!  source: plan ─▶ offer ─▶ ask ══ TLS, both sides show a certificate ══▶ target: ticket ─▶ judge ─▶ verdict
//!          carry ═══════════ record, files, and who has it ══════════════▶         take
//!          live ═════════════ streams between two VMMs ══════════════════▶         live
//! ```
//! The target knows the source by the ticket it presents, the source the target by the fingerprint in that ticket.
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::migration::{
    CreateMigrationTicket, LimitMigration, MigrateServer, MigrationOwner, MigrationPlan, MigrationTicket,
    SettleMigration,
};
use model::operation::Accepted;
use model::server::Server;
use model::{Code, FieldError, ServerId, Time};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use uuid::Uuid;
use wire::migration::SendLimits;
use wire::peer::Obstacle;

use crate::call::{Answer, Call};
use crate::core::Shared;
use crate::cpu::Processor;
use crate::error::{Error, Result};
use crate::idempotency;
use crate::servers::Servers;
use crate::servers::capacity::Capacity;
use crate::servers::moving::plan::{Event, Owner, Phase, Side};
use crate::servers::moving::{self, Move};
use crate::servers::record::ServerRecord;
use crate::store::{Tx, records};
use crate::vmms::Launch;
use crate::volumes::Volumes;

mod bounds;
mod carry;
mod identity;
pub mod limits;
mod link;
mod live;
mod outlook;
mod source;
mod strangers;
mod streams;
mod take;
mod talks;
mod target;
mod ticket;

use bounds::Bounds;
use identity::Identity;
use streams::Joining;
use talks::Talks;
use ticket::Ticket;

pub(crate) const TABLES: &str = ticket::TABLES;

/// Moves between hosts, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Migrations {
    core: Shared,
    servers: Servers,
    volumes: Volumes,
    capacity: Capacity,
    launcher: Arc<dyn Launch>,
    identity: Identity,
    listening: Arc<Mutex<Option<Listening>>>,
    /// Servers that something comes for: a second try waits until the first one has let go of its files.
    taking: Arc<Mutex<BTreeSet<ServerId>>>,
    /// Streams that machines which come wait for.
    joining: Arc<Joining>,
    /// Places of servers that come at once.
    coming: Arc<Semaphore>,
    /// What guests see of this host's processor.
    processor: Processor,
    /// Hosts that it talks with.
    talks: Talks,
    /// How moves from here go.
    bounds: Bounds,
    /// What is carried away from here; ends with the daemon.
    carried: Arc<Mutex<JoinSet<()>>>,
}

struct Listening {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Migrations {
    pub(crate) async fn new(
        core: Shared,
        servers: Servers,
        volumes: Volumes,
        capacity: Capacity,
        launcher: Arc<dyn Launch>,
        processor: Processor,
    ) -> Result<Migrations> {
        let identity = core.store.write(Identity::of_host).await?;
        let (listening, taking, joining, talks, bounds, carried) = Default::default();
        let coming = Arc::new(Semaphore::new(limits::MOVES_MAX));
        Ok(Migrations {
            core,
            servers,
            volumes,
            capacity,
            launcher,
            identity,
            listening,
            taking,
            joining,
            coming,
            processor,
            talks,
            bounds,
            carried,
        })
    }

    /// Takes up what an earlier daemon left unfinished: what was not given away returns, what was not all here is dropped,
    /// and whoever cannot know is asked or waited for.
    pub(crate) async fn recover(&self) -> Result<()> {
        let restart = |tx: &Tx<'_>| {
            let all = moving::all(tx)?;
            for held in &all {
                let detail = "the daemon ended in the middle of the move; ask for it again".to_owned();
                let trouble = crate::servers::lifecycle::Trouble { code: Code::Draining, detail };
                moving::give(tx, held.id, Event::Restarted, Some(trouble))?;
            }
            Ok(all)
        };
        for held in self.core.store.write(restart).await? {
            if held.side == Side::Source {
                self.carried().spawn(self.clone().see_to(held.id));
            }
        }
        Ok(())
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
        let mut carried = std::mem::take(&mut *self.carried());
        carried.shutdown().await;
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
        asked_bounds(&spec)?;
        let processor = self.processor.known().await;
        let dirs = self.core.dirs.clone();
        let offer =
            self.core.store.read(move |connection| source::offer(connection, &dirs, id, processor)).await?;
        let ticket: Ticket = spec.ticket.parse()?;
        source::ask(&self.identity, spec.target, ticket, offer, spec.mode).await
    }

    /// Moves a server with its disks, and with its machine if it has one. Fails with `migration_blocked`, which names everything that is in the way.
    /// The operation succeeds when the target has the server and nothing of it is left here.
    pub async fn migrate(
        &self,
        call: &Call,
        id: ServerId,
        spec: MigrateServer,
    ) -> Result<Answer<Accepted<Server>>> {
        let bounds = asked_bounds(&spec)?;
        let ticket: Ticket = spec.ticket.parse()?;
        let asked = call.clone();
        // The ticket was used up by the first call with this key.
        let earlier = self.core.store.read(move |connection| idempotency::replay(connection, &asked)).await?;
        if let Some(body) = earlier {
            return Ok(Answer { body, replayed: true });
        }
        let processor = self.processor.known().await;
        let dirs = self.core.dirs.clone();
        let offer =
            self.core.store.read(move |connection| source::offer(connection, &dirs, id, processor)).await?;
        let plan = source::ask(&self.identity, spec.target, ticket.clone(), offer.clone(), spec.mode).await?;
        if !plan.blocked_by.is_empty() {
            return Err(blocked(&plan));
        }
        let begun = Move {
            id: Uuid::now_v7(),
            server: id,
            side: Side::Source,
            phase: Phase::Copy,
            peer: ticket.host,
            peer_name: plan.target.chars().take(limits::HOST_CHARS_MAX).collect(),
            address: Some(spec.target),
            streams: Some(live::memory_streams()),
        };
        let (conditions, capacity, kept) = (call.clone(), self.capacity, begun.clone());
        let depart = move |tx: &Tx<'_>| {
            let record: ServerRecord = records::one(tx, id.0)?;
            conditions.check_match(record.generation)?;
            let (operation, record) = moving::depart(tx, capacity, record, &kept, &conditions.actor)?;
            Ok(Accepted { operation, resource: Some(Servers::shown(tx, &record)?) })
        };
        let answer = self.core.mutate(call, depart).await?;
        if !answer.replayed {
            self.servers.wake(id);
            let mut carried = self.carried();
            while carried.try_join_next().is_some() {}
            self.bounds.begin(begun.id, Some(bounds));
            carried.spawn(self.clone().carry(begun, ticket, spec, offer));
        }
        Ok(answer)
    }

    /// Replaces the bounds of a move that is under way from here. Fails with `wrong_state` where none has anything to send.
    pub async fn limit(&self, call: &Call, id: ServerId, spec: LimitMigration) -> Result<Answer<Server>> {
        let limits = bounds::asked(spec)?;
        let (conditions, bounds) = (call.clone(), self.bounds.clone());
        let limit = move |tx: &Tx<'_>| {
            let record: ServerRecord = records::one(tx, id.0)?;
            conditions.check_match(record.generation)?;
            moving::limited(tx, &record, bounds::words(limits), &conditions.actor)?;
            // Whoever hears that it is done finds it so; a move for which it was not recorded is at worst as fast as was asked.
            if !moving::of_server(tx, id)?.is_some_and(|held| bounds.change(held.id, limits)) {
                return Err(moving::not_sent(&record));
            }
            Servers::shown(tx, &record)
        };
        self.core.mutate(call, limit).await
    }

    /// Takes the operator's word for which host has a server that is in doubt, and how that is known; one that comes, in doubt or
    /// not, can be left to the other host. Fails with `wrong_state` when it is not in doubt.
    pub async fn settle(&self, call: &Call, id: ServerId, spec: SettleMigration) -> Result<Answer<Server>> {
        let SettleMigration { owner, proof } = spec;
        if !limits::PROOF_CHARS.contains(&proof.chars().count()) {
            let detail = format!(
                "must say in {} to {} characters how it is known what the other host has and does",
                limits::PROOF_CHARS.start(),
                limits::PROOF_CHARS.end()
            );
            return Err(Error::invalid("/proof", "length", detail));
        }
        let owner = match owner {
            MigrationOwner::Here => Owner::Here,
            MigrationOwner::There => Owner::There,
        };
        let is_elsewhere = owner == Owner::Here && self.servers.has_left(id).await;
        let conditions = call.clone();
        let settle = move |tx: &Tx<'_>| {
            let record: ServerRecord = records::one(tx, id.0)?;
            conditions.check_match(record.generation)?;
            if is_elsewhere {
                let detail = "the server's VMM here has heard that the machine runs at the other host; settle it with the \
                              owner `there`";
                return Err(Error::new(Code::WrongState, detail)
                    .with_actions(Servers::shown(tx, &record)?.allowed_actions));
            }
            moving::settle(tx, &record, owner, &proof, &conditions.actor)?;
            let record: ServerRecord = records::one(tx, id.0)?;
            Servers::shown(tx, &record)
        };
        let answer = self.core.mutate(call, settle).await?;
        self.servers.wake(id);
        Ok(answer)
    }

    fn carried(&self) -> std::sync::MutexGuard<'_, JoinSet<()>> {
        self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listening(&self) -> std::sync::MutexGuard<'_, Option<Listening>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bounds that a move is asked for with.
fn asked_bounds(spec: &MigrateServer) -> Result<SendLimits> {
    let MigrateServer { bandwidth_bytes_per_s, downtime_ms, .. } = *spec;
    bounds::asked(LimitMigration { bandwidth_bytes_per_s, downtime_ms })
}

fn blocked(plan: &MigrationPlan) -> Error {
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
    Error { errors, ..Error::new(Code::MigrationBlocked, detail) }
}

/// Everything that is in the way, in one text.
fn obstacles_text(obstacles: &[Obstacle]) -> String {
    let all: Vec<&str> = obstacles.iter().map(|obstacle| obstacle.detail.as_str()).collect();
    all.join("; ")
}

/// What other hosts call this one, for people.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().chars().take(limits::HOST_CHARS_MAX).collect()
}

/// A word of an enumeration as it stands in JSON.
fn wire_word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(any(test, fuzzing))]
pub use take::fuzz::carried;

#[cfg(test)]
mod tests;
