//! Saves what a step of the life leads to: record, operations, events, all in one transaction.
//! It touches nothing but records. The facade calls it for asks, actors call it for everything else.
use model::event::EventData;
use model::operation::{Operation, Progress, Resource};
use model::server::{Restart, StateReason};
use model::{Code, OperationId, ServerId, Time};

use super::capacity::Capacity;
use super::lifecycle::{Ask, Asked, Event, JobKind, Phase, Push, Return, Step, Trouble, Verdict, step};
use super::record::{self, ServerRecord};
use super::{clone, console, isolation, moving, restore, view};
use crate::call::Actor;
use crate::config::Dirs;
use crate::error::{Error, Result};
use crate::events;
use crate::network::Networks;
use crate::operations::{self, NewOperation, Outcome};
use crate::snapshots::Snapshots;
use crate::store::{Tx, records};
use crate::volumes::Volumes;

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Error {
        Error::new(trouble.code, trouble.detail)
    }
}

impl From<&Error> for Trouble {
    fn from(error: &Error) -> Trouble {
        Trouble { code: error.code, detail: error.detail.clone() }
    }
}

/// Applies an event to a server; `run` is the number of the machine it is about. An event about an earlier
/// machine is stale. Answers the record, or nothing when the server is no more.
pub(super) fn event(
    tx: &Tx<'_>,
    capacity: Capacity,
    id: ServerId,
    run: u64,
    event: Event,
    dirs: &Dirs,
) -> Result<Option<ServerRecord>> {
    if let Event::Made { volumes, vmm: None, .. } = &event {
        volumes.iter().try_for_each(|filled| Volumes::complete(tx, filled, dirs))?;
    }
    let Some(mut record) = records::find::<ServerRecord>(tx, id.0)? else { return Ok(None) };
    if record.life.run != run {
        return Ok(Some(record));
    }
    if let Event::SnapshotTaken(snapshot, taken) = &event
        && record.life.phase.snapshot() == Some(*snapshot)
    {
        Snapshots::complete(tx, *snapshot, taken)?;
    }
    if let Event::TakenBack(snapshot, _) = &event
        && record.life.phase.returns_to() == Some(*snapshot)
    {
        restore::taken_back(tx, &mut record, *snapshot)?;
    }
    match (&record.life.phase, &event) {
        // Not its own yet.
        (Phase::Upgrading { .. }, Event::Spawned(_)) => {}
        (Phase::Upgrading { next: Some(next), .. }, Event::HandedOver) => {
            (record.sandbox, record.vmm_build) = (next.sandbox, next.build.clone());
            let text =
                format!("its machine runs in build {} of the VMM", next.build.as_deref().unwrap_or("?"));
            guest_event(tx, &record, "server.upgraded", text, &Actor::Host)?;
        }
        (_, Event::Made { vmm: Some(spawned), .. } | Event::Spawned(spawned)) => {
            (record.sandbox, record.vmm_build) = (spawned.sandbox, spawned.build.clone());
            record.cage = spawned.cage.clone();
        }
        _ => {}
    }
    let came_back = match &event {
        Event::TakenBack(snapshot, Some(_)) if record.life.phase.returns_to() == Some(*snapshot) => {
            Some(*snapshot)
        }
        _ => None,
    };
    let mut next = step(&record.life, event, record.context());
    if begins_run(&record, &next) {
        let mut admitted = record.clone();
        match capacity.admit(tx, &mut admitted) {
            Ok(()) => record.held = admitted.held,
            Err(cause) => {
                let failed = step(&next.life, Event::StartFailed(Trouble::from(&cause)), record.context());
                next = Step { ended: [next.ended, failed.ended].concat(), ..failed };
            }
        }
    }
    if let Some(snapshot) = came_back {
        restore::goes_on(tx, &mut record, snapshot)?;
    }
    if let Some(snapshot) = next.life.shares.filter(|_| record.life.shares.is_none()) {
        record.held.below = isolation::below(tx, snapshot)?.unwrap_or_default();
    }
    if next.life.unflushed.is_empty() {
        record.life.unflushed.iter().try_for_each(|filled| Volumes::complete(tx, filled, dirs))?;
    }
    save(tx, record, next, &Actor::Host)
}

/// Asks a server for something on behalf of a caller. Answers the operation that brings it about.
pub(super) fn ask(
    tx: &Tx<'_>,
    capacity: Capacity,
    mut record: ServerRecord,
    ask: Ask,
    actor: &Actor,
    before_start: impl FnOnce(&ServerRecord) -> Result<()>,
) -> Result<(Operation, ServerRecord)> {
    let id = OperationId::new();
    let asked = record.life.ask(ask, id, record.context()).map_err(|_| refusal(&record, ask))?;
    let resource = Resource::Server(record.id);
    let mut resources = vec![resource];
    resources.extend(record.disks.iter().map(|disk| Resource::Volume(disk.volume_id)));
    if let Ask::Snapshot { id, .. } | Ask::Restore { to: Return { snapshot: id, .. } } = ask {
        resources.push(Resource::Snapshot(id));
    }
    let new = NewOperation { kind: ask.job_kind().operation_kind(), resources, actor, cancellable: false };
    let (operation, next) = match asked {
        Asked::Joined(operation, next) => (operation, next),
        Asked::Done(next) => (operations::accept_as(tx, id, new)?.id, next),
        Asked::Began(next) => {
            let keeps_memory =
                ask == Ask::Hibernate || ask == Ask::Migrate && record.life.phase.vmm().is_some();
            if keeps_memory && record.is_changed() {
                let detail = format!(
                    "server {} gets other CPUs or memory at its next start, into which this memory would not fit: \
                     reboot it first, or change it back",
                    record.name
                );
                return Err(Error::new(Code::WrongState, detail).with_actions(view::allowed_actions(&record)));
            }
            if begins_run(&record, &next) {
                before_start(&record)?;
                capacity.admit(tx, &mut record)?;
            }
            (operations::accept_as(tx, id, new)?.id, next)
        }
    };
    let gone = || Error::not_found("server", id);
    let record = save(tx, record, next, actor)?.ok_or_else(gone)?;
    Ok((operations::one(tx, operation)?, record))
}

/// Asks to cancel an operation on a server.
pub(super) fn cancel(tx: &Tx<'_>, id: ServerId, operation: OperationId) -> Result<()> {
    let record: ServerRecord = records::one(tx, id.0)?;
    let next = record.life.cancel(operation).map_err(|_| {
        Error::new(Code::WrongState, "the operation can no longer be cancelled safely")
            .with_operation(operation)
    })?;
    if record.life.phase.is_moving() {
        moving::cancel(tx, id)?;
    }
    save(tx, record, next, &Actor::Host).map(drop)
}

fn refusal(record: &ServerRecord, ask: Ask) -> Error {
    let verb = ask.job_kind().operation_kind().trim_start_matches("server.");
    let actions = view::allowed_actions(record);
    let state = view::state_text(record);
    let detail = match actions.as_slice() {
        _ if record.life.phase.is_upgrading() => format!(
            "the machine of server {} is going to another VMM, which is over in a moment: it cannot {verb} before",
            record.name
        ),
        // One that moves keeps it until that is over.
        some if record.life.saved.is_some()
            && matches!(ask, Ask::Stop { .. })
            && some.iter().any(|action| action == "stop") =>
        {
            format!(
                "server {} is {state}, and what it has in memory would be lost: a stop with no grace (`grace_s` 0) throws \
                 it away, and the next start begins from its disk",
                record.name
            )
        }
        [] => format!(
            "server {} is {state}: it cannot {verb} now, and nothing else can be asked of it",
            record.name
        ),
        some => format!(
            "server {} is {state}: it cannot {verb} now; possible are {}",
            record.name,
            some.join(", ")
        ),
    };
    let operation_id = record.life.job.map(|job| job.id);
    Error { operation_id, ..Error::new(Code::WrongState, detail).with_actions(actions) }
}

fn begins_run(record: &ServerRecord, next: &Step) -> bool {
    next.life.run != record.life.run
        && matches!(next.life.phase, Phase::Starting { .. } | Phase::Resuming { .. })
}

/// Writes a step down.
pub(super) fn save(
    tx: &Tx<'_>,
    mut record: ServerRecord,
    next: Step,
    actor: &Actor,
) -> Result<Option<ServerRecord>> {
    if let Some(snapshot) = record.life.phase.snapshot()
        && next.life.phase.snapshot() != Some(snapshot)
    {
        let why = next.ended.iter().find_map(|(_, verdict)| match verdict {
            Verdict::Failed(trouble) => Some(trouble),
            _ => None,
        });
        clone::settle(tx, snapshot, why)?;
        Snapshots::settle(tx, snapshot)?;
    }
    for (id, verdict) in next.ended {
        operations::finish(tx, id, outcome(verdict))?;
    }
    if next.gone {
        return forget(tx, &record).map(|()| None);
    }
    if next.life == record.life {
        return Ok(Some(record));
    }
    let before = (record.life.phase.state(), record.life.phase.why().cloned());
    record.life = next.life;
    if let Some(booted_ms) = record.life.booted_ms {
        record.started_at = Some(Time::from_unix_ms(booted_ms));
    }
    record::save(tx, &mut record)?;
    if before != (record.life.phase.state(), record.life.phase.why().cloned()) {
        announce(tx, &record, "server.state_changed", Some(actor))?;
    }
    report_progress(tx, &record)?;
    Ok(Some(record))
}

/// Appends an event about a server.
pub(super) fn announce(tx: &Tx<'_>, record: &ServerRecord, kind: &str, actor: Option<&Actor>) -> Result<()> {
    let data = EventData {
        resource: Some(Resource::Server(record.id)),
        generation: Some(record.generation),
        state: Some(view::state_text(record)),
        reason: record.life.phase.why().map(|why| reason(why, view::restart(&record.life))),
        operation_id: record.life.job.map(|job| job.id),
        actor: actor.map(Actor::to_string),
    };
    events::append(tx, kind, data).map(drop)
}

/// Why a server is where it is, and when its policy starts it again.
fn reason(why: &StateReason, restart: Option<Restart>) -> String {
    match restart {
        Some(Restart { attempt, at: Some(at) }) => {
            format!("{}; restart {attempt} in a row is due at {at}", why.detail)
        }
        _ => why.detail.clone(),
    }
}

/// Appends an event that the guest caused.
pub(super) fn guest_event(
    tx: &Tx<'_>,
    record: &ServerRecord,
    kind: &str,
    reason: String,
    actor: &Actor,
) -> Result<()> {
    let data = EventData {
        resource: Some(Resource::Server(record.id)),
        state: Some(view::state_text(record)),
        reason: Some(reason),
        actor: Some(actor.to_string()),
        ..EventData::default()
    };
    events::append(tx, kind, data).map(drop)
}

/// Appends an event about the server's console: who did it is kept for those who ask later.
pub(super) fn console_event(tx: &Tx<'_>, record: &ServerRecord, kind: &str, actor: String) -> Result<()> {
    let data = EventData {
        resource: Some(Resource::Server(record.id)),
        state: Some(view::state_text(record)),
        actor: Some(actor),
        ..EventData::default()
    };
    events::append(tx, kind, data).map(drop)
}

/// The server is no more: what only its record kept goes with it.
fn forget(tx: &Tx<'_>, record: &ServerRecord) -> Result<()> {
    Networks::release(tx, record.id)?;
    for disk in &record.disks {
        Volumes::detach(tx, disk.volume_id)?;
    }
    console::revoke(tx, record.id)?;
    records::remove::<ServerRecord>(tx, record.id.0)?;
    announce(tx, record, "server.deleted", None)
}

fn report_progress(tx: &Tx<'_>, record: &ServerRecord) -> Result<()> {
    let Some(job) = record.life.job else { return Ok(()) };
    let (phase, percent) = match &record.life.phase {
        Phase::Creating { .. } => ("filling_volumes", 1),
        Phase::Starting { vmm: None } => ("starting_vmm", 70),
        Phase::Starting { vmm: Some(_) } => ("booting", 80),
        Phase::Pausing { .. } => ("pausing", 10),
        Phase::Resuming { .. } => ("resuming", 10),
        Phase::Hibernating { .. } => ("pausing", 5),
        Phase::Snapshotting { .. } | Phase::Restoring { .. } => ("copying", 1),
        Phase::Returning { .. } => ("taking_back", 65),
        Phase::Moving { given: false, .. } => ("preparing", 1),
        Phase::Moving { given: true, .. } => ("handing_over", 90),
        Phase::Resetting { .. } => ("resetting", 10),
        Phase::Settling { .. } => ("settling_memory", 1),
        Phase::Upgrading { next: None, .. } => ("starting_vmm", 40),
        Phase::Upgrading { next: Some(_), .. } => ("handing_over", 50),
        Phase::Retiring { .. } => ("ending_vmm", 80),
        // What another host has runs there.
        Phase::Stopping { .. } | Phase::Releasing { .. } if job.kind == JobKind::Migrate => ("removing", 91),
        Phase::Stopping { push: Push::Button { .. }, .. } => ("waiting_for_guest", 10),
        Phase::Stopping { push: Push::Force, .. } => ("forcing_off", 40),
        Phase::Releasing { .. } => ("releasing", 60),
        Phase::Deleting { .. } => ("removing", 92),
        Phase::Waiting { .. } => ("waiting", 60),
        Phase::Stopped { .. }
        | Phase::Arriving { .. }
        | Phase::Hibernated { .. }
        | Phase::Running { .. }
        | Phase::Paused { .. }
        | Phase::Failed { .. } => {
            return Ok(());
        }
    };
    let progress = Progress { phase: phase.to_owned(), percent, ..Progress::default() };
    operations::report(tx, job.id, progress, record.life.cancel(job.id).is_ok())
}

fn outcome(verdict: Verdict) -> Outcome {
    match verdict {
        Verdict::Succeeded => Outcome::Succeeded,
        Verdict::Failed(trouble) => Outcome::Failed(trouble.into()),
        Verdict::Cancelled(why) => Outcome::Cancelled(why),
    }
}
