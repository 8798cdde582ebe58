//! Servers that move to another host or come from one: the records of moves, and what each of their phases is to the
//! server's own record, in one transaction. `plan` decides; what goes over the network is `migration`'s.
use std::net::SocketAddr;

use model::event::EventData;
use model::operation::{Operation, Resource};
use model::server::StateReason;
use model::volume::Volume;
use model::{Code, ServerId, Time};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use wire::peer::Saying;
use wire::saved::Digest;

use super::capacity::Capacity;
use super::lifecycle::{Ask, Trouble, Verdict};
use super::record::{self, ServerRecord};
use super::{advance, limits};
use crate::call::Actor;
use crate::error::{Error, Result};
use crate::events;
use crate::network::{Networks, Reservation};
use crate::store::{Tx, records};
use crate::volumes::Volumes;

pub(crate) mod parcel;
pub(crate) mod plan;

use plan::{Effect, Event, Phase, Side};

pub(crate) const TABLES: &str = "
CREATE TABLE moves (id TEXT PRIMARY KEY, server TEXT NOT NULL, ended_ms INTEGER, body TEXT NOT NULL) STRICT;
CREATE INDEX moves_by_server ON moves (server);
";

/// A move, as one of its ends keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Move {
    /// Names it at both ends.
    pub(crate) id: Uuid,
    /// What moves.
    pub(crate) server: ServerId,
    /// Which end this is.
    pub(crate) side: Side,
    /// How far it is.
    pub(crate) phase: Phase,
    /// By what the other host is known.
    pub(crate) peer: Digest,
    /// The other host's name, for people.
    pub(crate) peer_name: String,
    /// Where it waits, if it is the target.
    pub(crate) address: Option<SocketAddr>,
    /// How many streams the memory of its machine takes: the source chose so many when it began, and the VMMs take no other number
    /// when they go on. Nothing at the target, and in records from before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) streams: Option<u16>,
}

/// What an event came to.
#[derive(Debug)]
pub(crate) struct Given {
    /// The move from now on.
    pub(crate) now: Move,
    /// What is left to do, in order; what concerns records is done.
    pub(crate) effects: &'static [Effect],
}

/// Begins a move away. Fails with `wrong_state` unless the server is off, hibernated, paused or runs.
pub(crate) fn depart(
    tx: &Tx<'_>,
    capacity: Capacity,
    record: ServerRecord,
    begun: &Move,
    actor: &Actor,
) -> Result<(Operation, ServerRecord)> {
    let (operation, record) = advance::ask(tx, capacity, record, Ask::Migrate, actor, |_| Ok(()))?;
    insert(tx, begun)?;
    Ok((operation, record))
}

/// Begins a move here: the server has its name, addresses and volumes from now on, and nothing that runs.
pub(crate) fn arrive(tx: &Tx<'_>, begun: &Move, record: &ServerRecord, volumes: &[Volume]) -> Result<()> {
    for volume in volumes {
        Volumes::adopt(tx, volume)?;
    }
    for nic in &record.nics {
        let reservation = Reservation {
            server: record.id,
            name: &record.name,
            index: nic.index,
            mac: &nic.mac,
            ipv4: Some(nic.ipv4),
        };
        Networks::reserve(tx, nic.network_id, reservation)?;
    }
    record::insert(tx, record)?;
    insert(tx, begun)?;
    announce(tx, record, "server.arriving", format!("it comes from host {}", begun.peer_name), &Actor::Host)
}

fn insert(tx: &Tx<'_>, begun: &Move) -> Result<()> {
    let oldest_ms = Time::now().unix_ms().saturating_sub(limits::MOVES_KEPT_MS);
    tx.execute("DELETE FROM moves WHERE ended_ms < ?1", [oldest_ms])?;
    tx.execute(
        "INSERT INTO moves (id, server, body) VALUES (?1, ?2, ?3)",
        params![begun.id.to_string(), begun.server.to_string(), serde_json::to_string(begun)?],
    )?;
    Ok(())
}

/// The move of this name.
pub(crate) fn find(connection: &Connection, id: Uuid) -> Result<Option<Move>> {
    let body: Option<String> = connection
        .query_row("SELECT body FROM moves WHERE id = ?1", [id.to_string()], |row| row.get(0))
        .optional()?;
    Ok(body.map(|body| serde_json::from_str(&body)).transpose()?)
}

/// Every move that there is a record of.
pub(crate) fn all(connection: &Connection) -> Result<Vec<Move>> {
    let mut statement = connection.prepare("SELECT body FROM moves ORDER BY id")?;
    let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
    rows.map(|body| Ok(serde_json::from_str(&body?)?)).collect()
}

/// The move that a server is in, if any.
pub(crate) fn of_server(connection: &Connection, server: ServerId) -> Result<Option<Move>> {
    let body: Option<String> = connection
        .query_row(
            "SELECT body FROM moves WHERE server = ?1 AND ended_ms IS NULL ORDER BY id DESC LIMIT 1",
            [server.to_string()],
            |row| row.get(0),
        )
        .optional()?;
    Ok(body.map(|body| serde_json::from_str(&body)).transpose()?)
}

/// Whether its server has not come here by another move that was begun after this one. Its own name says nothing of that: the other
/// host chose it. A move from here is none: what the server is owed, it is owed by whoever sent it.
pub(crate) fn is_latest(connection: &Connection, id: Uuid) -> Result<bool> {
    let latest: Option<String> = connection
        .query_row(
            "SELECT id FROM moves WHERE server = (SELECT server FROM moves WHERE id = ?1)
             AND json_extract(body, '$.side') = 'target' ORDER BY rowid DESC LIMIT 1",
            [id.to_string()],
            |row| row.get(0),
        )
        .optional()?;
    Ok(latest == Some(id.to_string()))
}

/// Tells a move of an event: its next phase is saved with all that it is to the server. Nothing when there is no such
/// move, or the event means nothing to it. `trouble` says why, where an operation fails by it.
pub(crate) fn give(tx: &Tx<'_>, id: Uuid, event: Event, trouble: Option<Trouble>) -> Result<Option<Given>> {
    let Some(mut held) = find(tx, id)? else { return Ok(None) };
    let Some((next, effects)) = plan::step(held.side, held.phase, event) else { return Ok(None) };
    let before = held.phase;
    held.phase = next;
    let is_ended = matches!(next, Phase::Moved | Phase::Returned | Phase::Dropped);
    let ended_ms = is_ended.then(|| Time::now().unix_ms());
    tx.execute(
        "UPDATE moves SET body = ?2, ended_ms = coalesce(ended_ms, ?3) WHERE id = ?1",
        params![id.to_string(), serde_json::to_string(&held)?, ended_ms],
    )?;
    if before != next && (held.side, next) == (Side::Target, Phase::Ready) {
        for disk in records::one::<ServerRecord>(tx, held.server.0)?.disks {
            Volumes::arrived(tx, disk.volume_id)?;
        }
    }
    // Who says that it runs there, and owes nothing but memory, is not in doubt.
    let is_known = event == Event::Heard(Saying::Holding);
    if next == Phase::Commit && (before != next || is_known) {
        with_server(tx, &held, |record| {
            let is_news = before != next || record.life.phase.is_in_doubt();
            if is_news { record.life.given_away() } else { None }
        })?;
    }
    for effect in effects {
        match effect {
            Effect::Keep => keep(tx, &held, trouble.clone())?,
            Effect::Remove => remove(tx, &held)?,
            Effect::Doubt => {
                let why = doubt(&held);
                with_server(tx, &held, |record| match record.life.phase.is_in_doubt() {
                    true => None,
                    false => record.life.doubted(why),
                })?;
            }
            Effect::Clash => clash(tx, &held)?,
            Effect::Forget => {
                tx.execute("DELETE FROM moves WHERE id = ?1", [id.to_string()])?;
            }
            Effect::Say(_) | Effect::Reconnect => {}
        }
    }
    Ok(Some(Given { now: held, effects }))
}

/// In the transaction that cancels the operation of a move, before the server's own life is told.
pub(super) fn cancel(tx: &Tx<'_>, server: ServerId) -> Result<()> {
    let Some(mut held) = of_server(tx, server)? else { return Ok(()) };
    let Some((next, _)) = plan::step(held.side, held.phase, Event::Cancel) else { return Ok(()) };
    held.phase = next;
    tx.execute(
        "UPDATE moves SET body = ?2, ended_ms = ?3 WHERE id = ?1",
        params![held.id.to_string(), serde_json::to_string(&held)?, Time::now().unix_ms()],
    )?;
    Ok(())
}

/// Takes the operator's word for which host has the server. Fails with `wrong_state` when it is not in doubt; one that is still
/// on its way here can always be sent back.
pub(crate) fn settle(
    tx: &Tx<'_>,
    record: &ServerRecord,
    owner: plan::Owner,
    proof: &str,
    actor: &Actor,
) -> Result<Given> {
    let not_in_doubt = || {
        let detail = format!("server {} is not in doubt; there is nothing to settle", record.name);
        Error::new(Code::WrongState, detail).with_actions(super::view::allowed_actions(record))
    };
    let is_sent_back = owner == plan::Owner::There && record.life.phase.is_arriving();
    if !record.life.phase.is_in_doubt() && !is_sent_back {
        return Err(not_in_doubt());
    }
    let held = of_server(tx, record.id)?.ok_or_else(not_in_doubt)?;
    let said = match owner {
        plan::Owner::Here => "this host",
        plan::Owner::There => "the other host",
    };
    announce(tx, record, "server.migration_settled", format!("{said} has it: {proof}"), actor)?;
    let detail = format!("the operator settled that the server stays here: {proof}");
    let trouble = Trouble { code: Code::HostUnreachable, detail };
    give(tx, held.id, Event::Settled(owner), Some(trouble))?.ok_or_else(not_in_doubt)
}

/// Writes down that a move goes within other bounds from now on.
pub(crate) fn limited(tx: &Tx<'_>, record: &ServerRecord, words: String, actor: &Actor) -> Result<()> {
    announce(tx, record, "server.migration_limited", words, actor)
}

/// Nothing of this server is being sent.
pub(crate) fn not_sent(record: &ServerRecord) -> Error {
    let detail =
        format!("server {} is not on its way from this host; give `migrate` its bounds", record.name);
    Error::new(Code::WrongState, detail).with_actions(super::view::allowed_actions(record))
}

fn keep(tx: &Tx<'_>, held: &Move, trouble: Option<Trouble>) -> Result<()> {
    let verdict = match trouble {
        Some(trouble) => Verdict::Failed(trouble),
        None => Verdict::Failed(Trouble {
            code: Code::HostUnreachable,
            detail: format!("host {} did not take the server", held.peer_name),
        }),
    };
    let kept = with_server(tx, held, |record| record.life.kept(verdict))?;
    match (held.side, kept) {
        (Side::Target, Some(record)) => {
            let reason = format!("it came from host {}", held.peer_name);
            announce(tx, &record, "server.arrived", reason, &Actor::Host)
        }
        _ => Ok(()),
    }
}

fn remove(tx: &Tx<'_>, held: &Move) -> Result<()> {
    let left = with_server(tx, held, |record| record.life.left())?;
    match (held.side, left) {
        (Side::Source, Some(record)) => {
            let reason = format!("host {} has it", held.peer_name);
            announce(tx, &record, "server.moved", reason, &Actor::Host)
        }
        _ => Ok(()),
    }
}

fn clash(tx: &Tx<'_>, held: &Move) -> Result<()> {
    let is_off = records::find::<ServerRecord>(tx, held.server.0)?.is_none_or(|record| record.life.is_off());
    let advice = match is_off {
        true => "Delete it on one of the two hosts before it is started on both",
        false => {
            "Both may run it now, each on a disk of its own: find out which one is to stay, and stop and delete it on the \
             other host"
        }
    };
    let detail = format!(
        "host {} has it too, and may run it: it was settled against what was so. {advice}",
        held.peer_name
    );
    tracing::error!(server = %held.server, "{detail}");
    let why = StateReason { code: "two_owners".to_owned(), detail: detail.clone(), at: Time::now() };
    with_server(tx, held, |record| Some(record.life.clashed(why)))?;
    match records::find::<ServerRecord>(tx, held.server.0)? {
        Some(record) => announce(tx, &record, "server.two_owners", detail, &Actor::Host),
        None => Ok(()),
    }
}

/// Changes the life of the server that moves, where that is something to it. Answers what it is then.
fn with_server(
    tx: &Tx<'_>,
    held: &Move,
    change: impl FnOnce(&ServerRecord) -> Option<super::lifecycle::Step>,
) -> Result<Option<ServerRecord>> {
    let Some(record) = records::find::<ServerRecord>(tx, held.server.0)? else { return Ok(None) };
    match change(&record) {
        Some(next) => advance::save(tx, record, next, &Actor::Host),
        None => Ok(None),
    }
}

fn doubt(held: &Move) -> StateReason {
    let detail = match held.side {
        Side::Source => format!(
            "host {} may have it, and does not answer; it is asked again until it does. If it never will, settle it \
             with proof: that it took the server, or that it is off for good and never did",
            held.peer_name
        ),
        Side::Target => format!(
            "host {} may have it still, and has not said; it is for that host to connect again. If it never will, settle \
             it with proof: that it gave the server away, or that it goes on there",
            held.peer_name
        ),
    };
    StateReason { code: "in_doubt".to_owned(), detail, at: Time::now() }
}

fn announce(tx: &Tx<'_>, record: &ServerRecord, kind: &str, reason: String, actor: &Actor) -> Result<()> {
    let data = EventData {
        resource: Some(Resource::Server(record.id)),
        generation: Some(record.generation),
        state: Some(super::view::state_text(record)),
        reason: Some(reason),
        operation_id: record.life.job.map(|job| job.id),
        actor: Some(actor.to_string()),
    };
    events::append(tx, kind, data).map(drop)
}
