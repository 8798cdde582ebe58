//! Servers: what a customer creates. The facade checks and records; an actor per server does the work.
//! It knows no HTTP; it reaches VMMs only through `vmms`.
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use model::console::{ConsoleReader, ConsoleReaders, ConsoleToken, CreateConsoleToken};
use model::operation::{Accepted, Operation};
use model::page::{ListQuery, Page};
use model::server::{
    CreateServer, DeleteServer, PatchServer, Server, ServerAction, ServerIsolation, ServerPlan, StopServer,
};
use model::snapshot::{CreateSnapshot, Snapshot};
use model::{Code, ConsoleReaderId, OperationId, ServerId, SnapshotId, VolumeId};
use rusqlite::Connection;

use crate::call::{Actor, Answer, Call, Idempotency};
use crate::error::{Error, Result};
use crate::idempotency;
use crate::store::{Tx, records};
use crate::tokens;
use crate::vmms::Process;

mod actor;
mod advance;
mod bulk;
pub mod capacity;
mod clone;
mod console;
mod copies;
mod create;
mod effects;
mod identity;
mod isolation;
pub mod lifecycle;
pub mod limits;
pub(crate) mod live;
mod machine;
mod make;
mod metrics;
pub(crate) mod moving;
mod pace;
mod patch;
mod readers;
pub mod record;
mod recover;
pub mod registry;
mod restore;
pub(crate) mod saved;
mod settle;
mod snapshot;
mod telling;
mod upgrade;
mod view;

pub(crate) use clone::users_of_snapshot;
use console::Issued;
pub use console::{ConsolePiece, ConsoleStream, Keyboard};
use lifecycle::{Ask, Phase};
pub(crate) use machine::make_directory;
pub use readers::Kicked;
use record::ServerRecord;
pub(crate) use record::{HELD_INDEX, TABLES, TICKET_HOLDERS};
use registry::{Registry, Workshop};

/// Servers, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Servers {
    registry: Arc<Registry>,
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
    pub by_state: BTreeMap<String, u32>,
}

impl Servers {
    pub(crate) fn new(workshop: Workshop) -> Servers {
        Servers { registry: Arc::new(Registry::new(Arc::new(workshop))) }
    }

    /// Starts an actor for every server; each finds its machine again or takes up its work.
    pub(crate) async fn recover(&self) -> Result<()> {
        let all: Vec<ServerRecord> = self.workshop().core.store.read(records::all).await?;
        let cages = all.iter().filter_map(|record| record.cage.clone()).collect();
        self.workshop().shells.recover(cages).await?;
        for record in all {
            self.registry.poke(record.id);
        }
        Ok(())
    }

    /// Snapshots that are being taken; whoever takes them takes them up again.
    pub(crate) async fn snapshots_under_way(&self) -> Result<BTreeSet<SnapshotId>> {
        let all: Vec<ServerRecord> = self.workshop().core.store.read(records::all).await?;
        Ok(all.iter().filter_map(|record| record.life.phase.snapshot()).collect())
    }

    /// Takes a snapshot of it. A server that runs stands still for a moment, and runs on.
    pub async fn snapshot(
        &self,
        call: &Call,
        id: ServerId,
        spec: CreateSnapshot,
    ) -> Result<Answer<Accepted<Snapshot>>> {
        if spec.memory {
            // What its guest was shown goes with its memory.
            self.workshop().processor.known().await;
        }
        let accept = move |tx: &Tx<'_>, workshop: &Workshop, record, actor: &Actor| {
            snapshot::accept(tx, workshop, record, spec, actor)
        };
        self.change(call, id, accept).await
    }

    /// Ends every actor, and VMMs that wait for a server; machines run on.
    pub(crate) async fn close(&self) {
        self.registry.close().await;
        // The next daemon ends those of one that died.
        if !self.workshop().core.store.is_dead() {
            self.workshop().shells.close().await;
        }
    }

    /// Accepts a new server. With `start`, the operation succeeds when its vCPUs run; when it fails, nothing of
    /// the server is left.
    pub async fn create(&self, call: &Call, spec: CreateServer) -> Result<Answer<Accepted<Server>>> {
        self.workshop().processor.check(Some(&spec.cpu)).await?;
        let (workshop, actor) = (self.workshop().clone(), call.actor.clone());
        let is_started = spec.start;
        let answer = self
            .workshop()
            .core
            .mutate(call, move |tx| {
                let (operation, record) = create::server(tx, &workshop, spec, &actor)?;
                Ok(Accepted { operation, resource: Some(view::server(tx, &record)?) })
            })
            .await?;
        // A machine that is started is made known before it runs.
        if !is_started {
            self.workshop().networks.wake();
        }
        self.poke(&answer);
        Ok(answer)
    }

    /// What `create` would do; changes nothing. Fails as `create` would.
    pub async fn plan(&self, call: &Call, spec: CreateServer) -> Result<ServerPlan> {
        self.workshop().processor.check(Some(&spec.cpu)).await?;
        let (workshop, actor) = (self.workshop().clone(), call.actor.clone());
        self.workshop()
            .core
            .store
            .rehearse(move |tx| {
                let (_, record) = create::server(tx, &workshop, spec, &actor)?;
                let server = view::server(tx, &record)?;
                let (held, _) = record::held(tx, None)?;
                let memory_bytes_left = workshop.capacity.memory_bytes.saturating_sub(held);
                Ok(ServerPlan { steps: steps(&server, &record), server, memory_bytes_left })
            })
            .await
    }

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Server>> {
        self.workshop()
            .core
            .store
            .read(move |connection| {
                let page: Page<ServerRecord> = records::page(connection, &query)?;
                let items = page.items.iter().map(|record| view::server(connection, record));
                Ok(Page {
                    items: items.collect::<Result<_>>()?,
                    next_cursor: page.next_cursor,
                    watch_cursor: page.watch_cursor,
                })
            })
            .await
    }

    /// The server.
    pub async fn one(&self, id: ServerId) -> Result<Server> {
        let store = &self.workshop().core.store;
        store.read(move |connection| view::server(connection, &records::one(connection, id.0)?)).await
    }

    /// Changes what can be changed: names, words and limits at once, CPUs and memory at the next start.
    pub async fn patch(&self, call: &Call, id: ServerId, patch: PatchServer) -> Result<Answer<Server>> {
        self.workshop().processor.check(patch.cpu.as_ref()).await?;
        let conditions = call.clone();
        let (limits_disk, limits_nics) = (patch.disk_limits.is_some(), patch.nic_limits.is_some());
        let answer = self
            .workshop()
            .core
            .mutate(call, move |tx| {
                let mut record: ServerRecord = records::one(tx, id.0)?;
                conditions.check_match(record.generation)?;
                patch::apply(tx, &mut record, patch)?;
                record::save(tx, &mut record)?;
                record::refer(tx, &record)?;
                advance::announce(tx, &record, "server.updated", Some(&conditions.actor))?;
                view::server(tx, &record)
            })
            .await?;
        self.workshop().networks.wake();
        if (limits_disk || limits_nics)
            && let Some(entry) = self.registry.find(id)
        {
            let record = self
                .workshop()
                .core
                .store
                .read(move |connection| records::one::<ServerRecord>(connection, id.0))
                .await?;
            // They are recorded and in force from the next start at the latest.
            if limits_disk && let Err(cause) = entry.limit_disk(&record).await {
                tracing::warn!(server = %id, "its disk's limits are not in force: {cause}");
            }
            if limits_nics && let Err(cause) = entry.limit_nics(&record).await {
                tracing::warn!(server = %id, "its interfaces' limits are not in force: {cause}");
            }
        }
        self.registry.poke(id);
        Ok(answer)
    }

    /// Deletes it, whatever it does. `resource` of the answer is the server as it is being deleted.
    pub async fn delete(
        &self,
        call: &Call,
        id: ServerId,
        how: DeleteServer,
    ) -> Result<Answer<Accepted<Server>>> {
        self.ask(call, id, Ask::Delete { keep_volumes: how.keep_volumes }).await
    }

    /// Starts, stops, reboots, pauses or resumes it. What is done already succeeds at once; what is being done is
    /// answered with the operation that does it; what makes no sense fails with `wrong_state`.
    pub async fn act(
        &self,
        call: &Call,
        id: ServerId,
        action: ServerAction,
    ) -> Result<Answer<Accepted<Server>>> {
        self.ask(call, id, asked(action)?).await
    }

    async fn ask(&self, call: &Call, id: ServerId, ask: Ask) -> Result<Answer<Accepted<Server>>> {
        let accept = move |tx: &Tx<'_>, workshop: &Workshop, record, actor: &Actor| {
            let (operation, record) = ask_one(tx, workshop, record, ask, actor)?;
            Ok(Accepted { operation, resource: Some(view::server(tx, &record)?) })
        };
        self.change(call, id, accept).await
    }

    /// Accepts work on a server whose version is the caller's, and has its actor look at what is to be done.
    async fn change<T, F>(&self, call: &Call, id: ServerId, accept: F) -> Result<Answer<T>>
    where
        T: serde::Serialize + serde::de::DeserializeOwned + Send + 'static,
        F: FnOnce(&Tx<'_>, &Workshop, ServerRecord, &Actor) -> Result<T> + Send + 'static,
    {
        let (workshop, conditions) = (self.workshop().clone(), call.clone());
        let change = move |tx: &Tx<'_>| {
            let record: ServerRecord = records::one(tx, id.0)?;
            conditions.check_match(record.generation)?;
            accept(tx, &workshop, record, &conditions.actor)
        };
        let answer = self.workshop().core.mutate(call, change).await?;
        if !answer.replayed {
            self.wake(id);
        }
        Ok(answer)
    }

    /// A piece of the console's output: from position `from`, else the last `tail_bytes`.
    pub async fn console_log(
        &self,
        id: ServerId,
        from: Option<u64>,
        tail_bytes: usize,
    ) -> Result<ConsolePiece> {
        self.one(id).await?;
        console::log(&self.ring(id), from, tail_bytes).await
    }

    /// Makes a one-use ticket to the console. Its url is `/v1/servers/{id}/console?token={secret}`. The secret is
    /// never kept in readable form: a repeated call is told it again while this daemon runs; after that it makes
    /// another, and the first is worth nothing.
    pub async fn console_token(
        &self,
        call: &Call,
        id: ServerId,
        spec: CreateConsoleToken,
    ) -> Result<Answer<ConsoleToken>> {
        let core = &self.workshop().core;
        core.underway.refuse(call)?;
        let call = call.clone();
        let secret = match &call.idempotency {
            Some(Idempotency { key, fingerprint }) => {
                core.secrets.secret(&["console", &call.actor.to_string(), key, fingerprint])
            }
            None => tokens::random_hex()?,
        };
        let issue = move |tx: &Tx<'_>| {
            if let Some(earlier) = idempotency::replay::<Issued>(tx, &call)? {
                if earlier.is_of(&secret) {
                    return Ok(Answer { body: earlier.token(id, &secret), replayed: true });
                }
                console::withdraw(tx, &earlier)?;
            }
            let record: ServerRecord = records::one(tx, id.0)?;
            call.check_match(record.generation)?;
            let actor = &call.actor;
            advance::console_event(tx, &record, "server.console_token_created", actor.to_string())?;
            let issued = console::issue(tx, id, spec, actor, &secret)?;
            idempotency::keep(tx, &call, &issued)?;
            Ok(Answer { body: issued.token(id, &secret), replayed: false })
        };
        core.store.write(issue).await
    }

    /// Opens the console of server `id` with a ticket, which is worth nothing afterwards. Fails with
    /// `unauthenticated`, or `too_many` when too many read it already.
    pub async fn console_open(&self, id: ServerId, secret: &str) -> Result<ConsoleStream> {
        let entry = self.registry.find(id).ok_or_else(|| Error::not_found("server", id))?;
        let place = entry.readers.enter()?;
        let secret = secret.to_owned();
        let ticket = self
            .workshop()
            .core
            .store
            .write(move |tx| {
                let ticket = console::redeem(tx, id, &secret)?;
                let record: ServerRecord = records::one(tx, id.0)?;
                advance::console_event(tx, &record, "server.console_opened", ticket.actor.clone())?;
                Ok(ticket)
            })
            .await?;
        ConsoleStream::open(entry, &self.ring(id), place, ticket).await
    }

    /// Who has the console of server `id` open.
    pub async fn console_readers(&self, id: ServerId) -> Result<ConsoleReaders> {
        self.one(id).await?;
        Ok(ConsoleReaders { items: self.readers(id) })
    }

    /// Puts a reader of the console out, or all of them, and makes tickets that nobody has taken yet worth nothing.
    /// Answers who read. Fails with `not_found` when there is no such reader.
    pub async fn console_kick(
        &self,
        call: &Call,
        id: ServerId,
        only: Option<ConsoleReaderId>,
    ) -> Result<Answer<ConsoleReaders>> {
        let (servers, conditions) = (self.clone(), call.clone());
        let answer = self
            .workshop()
            .core
            .mutate(call, move |tx| {
                let record: ServerRecord = records::one(tx, id.0)?;
                conditions.check_match(record.generation)?;
                let mut items = servers.readers(id);
                if let Some(only) = only {
                    items.retain(|reader| reader.id == only);
                    if items.is_empty() {
                        return Err(Error::not_found("console reader", only));
                    }
                }
                console::revoke(tx, id)?;
                advance::console_event(tx, &record, "server.console_kicked", conditions.actor.to_string())?;
                Ok(ConsoleReaders { items })
            })
            .await?;
        // Readers go with the daemon: one that dies here has put out everyone.
        if let (false, Some(entry)) = (answer.replayed, self.registry.find(id)) {
            entry.readers.kick(only);
        }
        Ok(answer)
    }

    fn readers(&self, id: ServerId) -> Vec<ConsoleReader> {
        self.registry.find(id).map(|entry| entry.readers.list()).unwrap_or_default()
    }

    /// What keeps its machine apart, as found on the running process. Fails with `wrong_state` when none runs.
    pub async fn isolation(&self, id: ServerId) -> Result<ServerIsolation> {
        let (entry, _) = self.machine(id, "look at").await?;
        let record: ServerRecord =
            self.workshop().core.store.read(move |connection| records::one(connection, id.0)).await?;
        let found = isolation::examine(self.workshop(), &entry, &record).await?;
        Ok(isolation::shown(record.isolation, found))
    }

    /// The machine of a server. Fails with `wrong_state` when there is none to do this with.
    async fn machine(&self, id: ServerId, verb: &str) -> Result<(Arc<registry::Entry>, Arc<dyn Process>)> {
        let server = self.one(id).await?;
        let found = self.registry.find(id).and_then(|entry| {
            let process = entry.machine()?.process;
            Some((entry, process))
        });
        found.ok_or_else(|| {
            let detail = format!("server {} has no machine to {verb}", server.name);
            Error::new(Code::WrongState, detail).with_actions(server.allowed_actions)
        })
    }

    /// What servers have of the host.
    pub async fn usage(&self) -> Result<Usage> {
        let memory_total_bytes = self.workshop().capacity.memory_bytes;
        self.workshop()
            .core
            .store
            .read(move |connection| {
                let (memory_used_bytes, vcpus_used) = record::held(connection, None)?;
                let mut by_state = BTreeMap::new();
                for record in records::all::<ServerRecord>(connection)? {
                    *by_state.entry(view::state_text(&record)).or_default() += 1;
                }
                Ok(Usage { memory_used_bytes, memory_total_bytes, vcpus_used, by_state })
            })
            .await
    }

    /// In the transaction that cancels an operation on a server.
    pub(crate) fn cancel(tx: &Tx<'_>, id: ServerId, operation: OperationId) -> Result<()> {
        advance::cancel(tx, id, operation)
    }

    /// After that transaction.
    pub(crate) fn wake(&self, id: ServerId) {
        self.registry.poke(id);
        // It may have been given up before its actor knew of it.
        self.workshop().snapshots.may_have_ended();
    }

    /// After the transaction in which a server came from another host.
    pub(crate) fn arrived(&self, id: ServerId) {
        self.workshop().networks.wake();
        self.registry.poke(id);
    }

    /// After a transaction about a server, for a caller who is answered with it.
    pub(crate) fn shown(connection: &Connection, record: &ServerRecord) -> Result<Server> {
        view::server(connection, record)
    }

    fn poke(&self, answer: &Answer<Accepted<Server>>) {
        if let (false, Some(server)) = (answer.replayed, &answer.body.resource) {
            self.registry.poke(server.id);
        }
    }

    fn workshop(&self) -> &Arc<Workshop> {
        self.registry.workshop()
    }

    fn ring(&self, id: ServerId) -> PathBuf {
        self.workshop().core.dirs.server(id).join("console.ring")
    }
}

/// Accepts one ask, if the host can do what it takes.
fn ask_one(
    tx: &Tx<'_>,
    workshop: &Workshop,
    record: ServerRecord,
    ask: Ask,
    actor: &Actor,
) -> Result<(Operation, ServerRecord)> {
    let before_start = |record: &ServerRecord| create::before_start(workshop, record);
    let is_saved = matches!(record.life.phase, Phase::Hibernating { .. });
    let asked = advance::ask(tx, workshop.capacity, record, ask, actor, before_start)?;
    if !is_saved && matches!(asked.1.life.phase, Phase::Hibernating { .. }) {
        saved::check_room(workshop, &asked.1)?;
    }
    Ok(asked)
}

/// For `volumes`: fails while the server moves to another host, or comes from one.
pub(crate) fn check_not_moving(connection: &Connection, id: ServerId) -> Result<()> {
    match records::find::<ServerRecord>(connection, id.0)? {
        Some(record) if record.life.phase.is_moving() => {
            let detail =
                format!("server {} is moving to another host; wait until it has arrived", record.name);
            Err(Error::new(Code::WrongState, detail).with_actions(view::allowed_actions(&record)))
        }
        _ => Ok(()),
    }
}

/// For `volumes`: what can be asked of a server that has a machine, so that its volumes cannot be changed. None when
/// it is off or there is none.
pub(crate) fn actions_unless_off(connection: &Connection, id: ServerId) -> Result<Option<Vec<String>>> {
    let record: Option<ServerRecord> = records::find(connection, id.0)?;
    Ok(record.filter(|record| !record.life.is_off()).map(|record| view::allowed_actions(&record)))
}

/// For `volumes`: those beside which a copy lies that takes their place.
pub(crate) fn returning_volumes(connection: &Connection) -> Result<BTreeSet<VolumeId>> {
    let all: Vec<ServerRecord> = records::all(connection)?;
    let returning = all.iter().filter(|record| record.life.phase.returns_to().is_some());
    Ok(returning.flat_map(|record| &record.disks).map(|disk| disk.volume_id).collect())
}

fn asked(action: ServerAction) -> Result<Ask> {
    Ok(match action {
        ServerAction::Start => Ask::Start,
        ServerAction::Stop(how) => Ask::Stop { grace_ms: grace_ms(how)? },
        ServerAction::Reboot(how) => Ask::Reboot { grace_ms: grace_ms(how)? },
        ServerAction::Pause => Ask::Pause,
        ServerAction::Resume => Ask::Resume,
        ServerAction::Hibernate => Ask::Hibernate,
        ServerAction::SettleMemory => Ask::SettleMemory,
        ServerAction::UpgradeVmm => Ask::Upgrade,
    })
}

fn grace_ms(how: StopServer) -> Result<i64> {
    let most = model::limits::GRACE_S_MAX;
    if how.grace_s > most {
        return Err(Error::invalid("/grace_s", "out_of_range", format!("must be at most {most}")));
    }
    Ok(i64::try_from(how.grace_s).unwrap_or_default() * 1000)
}

/// What creating it would do, for people.
fn steps(server: &Server, record: &ServerRecord) -> Vec<String> {
    let mut steps = Vec::new();
    for volume in &server.volumes {
        steps.push(format!(
            "make a root volume of {} bytes from image {}",
            volume.size_bytes, server.image_id
        ));
    }
    for nic in &server.nics {
        steps.push(format!("reserve {} ({}) on network {}", nic.ipv4, nic.mac, nic.network_id));
    }
    if record.life.holds_memory() {
        steps.push(format!("reserve {} bytes of memory", record.held.memory_bytes));
        steps.push(format!("start a machine with {} virtual CPUs", server.vcpus));
    }
    steps
}

#[cfg(test)]
mod tests;
