//! Long work as stored rows: progress, end, cancel, wait. It does none of the work; whoever does writes here,
//! in the transaction that makes the work's result true.
use std::time::Duration;

use model::event::EventData;
use model::operation::{Operation, OperationState, Progress, Resource};
use model::page::{ListQuery, Page};
use model::{Code, OperationId, Time};
use rusqlite::{Connection, OptionalExtension, params};

use crate::call::{Actor, Answer, Call};
use crate::core::Shared;
use crate::error::{Error, Result};
use crate::events;
use crate::limits;
use crate::store::{Tx, records};

pub(crate) const TABLES: &str = "
CREATE TABLE operations (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, cancel_asked INTEGER NOT NULL DEFAULT 0, created_ms INTEGER NOT NULL,
    body TEXT NOT NULL) STRICT;
CREATE INDEX operations_by_state ON operations (state);
CREATE INDEX operations_by_age ON operations (created_ms);
";

/// Removes operations that have ended long ago: by their age, since by state it would look at all there are. The sign keeps that
/// index out (sqlite.org/optoverview.html, "Disqualifying WHERE Clause Terms Using Unary '+'").
const FORGET: &str =
    "DELETE FROM operations WHERE created_ms < ?1 AND +state IN ('succeeded', 'failed', 'cancelled')";

/// A new operation to accept.
#[derive(Debug, Clone)]
pub struct NewOperation<'a> {
    /// What it does, such as `server.create`.
    pub kind: &'a str,
    /// What it works on.
    pub resources: Vec<Resource>,
    /// Who asked.
    pub actor: &'a Actor,
    /// Whether it can be cancelled before it ends.
    pub cancellable: bool,
}

/// How an operation ends.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Done.
    Succeeded,
    /// It failed and is undone.
    Failed(Error),
    /// It was asked to end and is undone; the sentence says by what.
    Cancelled(String),
}

/// Accepts an operation, with its event, in the caller's transaction.
pub fn accept(tx: &Tx<'_>, new: NewOperation<'_>) -> Result<Operation> {
    accept_as(tx, OperationId::new(), new)
}

/// As [`accept`], under an identity that was chosen before.
pub fn accept_as(tx: &Tx<'_>, id: OperationId, new: NewOperation<'_>) -> Result<Operation> {
    let operation = Operation {
        id,
        kind: new.kind.to_owned(),
        state: OperationState::Pending,
        progress: Progress::default(),
        resources: new.resources,
        generation: 1,
        created_at: Time::now(),
        finished_at: None,
        cancellable: new.cancellable,
        error: None,
        parent_id: None,
    };
    tx.prepare_cached("INSERT INTO operations (id, state, created_ms, body) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![
            operation.id.to_string(),
            state_text(operation.state),
            operation.created_at.unix_ms(),
            serde_json::to_string(&operation)?
        ])?;
    let oldest = operation.created_at.unix_ms() - limits::OPERATIONS_KEPT.as_millis() as i64;
    tx.prepare_cached(FORGET)?.execute([oldest])?;
    announce(tx, &operation, "operation.accepted", Some(new.actor))?;
    Ok(operation)
}

/// The operation. Fails with `not_found`.
pub fn one(connection: &Connection, id: OperationId) -> Result<Operation> {
    let body: Option<String> = connection
        .prepare_cached("SELECT body FROM operations WHERE id = ?1")?
        .query_row([id.to_string()], |row| row.get(0))
        .optional()?;
    let body = body.ok_or_else(|| Error::not_found("operation", id))?;
    Ok(serde_json::from_str(&body)?)
}

/// Reports where it is. Percent never falls; an operation that has ended is left alone.
pub fn progress(tx: &Tx<'_>, id: OperationId, progress: Progress) -> Result<()> {
    advance(tx, one(tx, id)?, progress)
}

/// As [`progress`], with whether it can still be cancelled.
pub fn report(tx: &Tx<'_>, id: OperationId, progress: Progress, cancellable: bool) -> Result<()> {
    advance(tx, Operation { cancellable, ..one(tx, id)? }, progress)
}

fn advance(tx: &Tx<'_>, mut operation: Operation, progress: Progress) -> Result<()> {
    if operation.state.is_final() {
        return Ok(());
    }
    let percent = progress.percent.clamp(operation.progress.percent, 100);
    operation.progress = Progress { percent, ..progress };
    operation.state = OperationState::Running;
    save(tx, &mut operation)
}

/// Ends it, with its event. The first end stands.
pub fn finish(tx: &Tx<'_>, id: OperationId, outcome: Outcome) -> Result<()> {
    let mut operation = one(tx, id)?;
    if operation.state.is_final() {
        return Ok(());
    }
    operation.finished_at = Some(Time::now());
    operation.cancellable = false;
    // What was expected is of no use to anybody who reads of the end.
    let Progress { phase, percent, bytes_done, bytes_total, .. } = operation.progress;
    operation.progress = Progress { phase, percent, bytes_done, bytes_total, ..Progress::default() };
    let (state, kind) = match outcome {
        Outcome::Succeeded => {
            operation.progress.percent = 100;
            (OperationState::Succeeded, "operation.succeeded")
        }
        Outcome::Failed(cause) => {
            tracing::warn!(operation = %id, kind = operation.kind, "failed: {}", cause.chain());
            operation.error =
                Some(Box::new(cause.with_operation(id).to_problem(&format!("/v1/operations/{id}"), "")));
            (OperationState::Failed, "operation.failed")
        }
        Outcome::Cancelled(why) => {
            operation.progress.phase = why;
            (OperationState::Cancelled, "operation.cancelled")
        }
    };
    operation.state = state;
    save(tx, &mut operation)?;
    announce(tx, &operation, kind, None)
}

/// Every operation that has not ended, oldest first: what a starting daemon has to take up again.
pub fn unfinished(connection: &Connection) -> Result<Vec<Operation>> {
    let mut statement = connection
        .prepare_cached("SELECT body FROM operations WHERE state IN ('pending', 'running') ORDER BY id")?;
    let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
    rows.map(|body| Ok(serde_json::from_str(&body?)?)).collect()
}

/// Whether somebody asked to cancel it. Long effects look between their steps.
pub fn is_cancel_asked(connection: &Connection, id: OperationId) -> Result<bool> {
    let asked: Option<bool> = connection
        .prepare_cached("SELECT cancel_asked FROM operations WHERE id = ?1")?
        .query_row([id.to_string()], |row| row.get(0))
        .optional()?;
    Ok(asked.unwrap_or(false))
}

fn save(tx: &Tx<'_>, operation: &mut Operation) -> Result<()> {
    operation.generation += 1;
    let (id, body) = (operation.id.to_string(), serde_json::to_string(&operation)?);
    let values = params![id, state_text(operation.state), body];
    // Most of the time it is a matter of progress, and the index of states has not to be written.
    let same = "UPDATE operations SET body = ?3 WHERE id = ?1 AND state = ?2";
    if tx.prepare_cached(same)?.execute(values)? == 0 {
        tx.prepare_cached("UPDATE operations SET state = ?2, body = ?3 WHERE id = ?1")?.execute(values)?;
    }
    tx.operation_changed(operation.id);
    Ok(())
}

fn announce(tx: &Tx<'_>, operation: &Operation, kind: &str, actor: Option<&Actor>) -> Result<()> {
    let data = EventData {
        resource: operation.resources.first().copied(),
        generation: None,
        state: Some(state_text(operation.state).to_owned()),
        reason: operation.error.as_ref().map(|problem| problem.detail.clone()),
        operation_id: Some(operation.id),
        actor: actor.map(Actor::to_string),
    };
    events::append(tx, kind, data)?;
    tx.operation_changed(operation.id);
    Ok(())
}

fn state_text(state: OperationState) -> &'static str {
    match state {
        OperationState::Pending => "pending",
        OperationState::Running => "running",
        OperationState::Succeeded => "succeeded",
        OperationState::Failed => "failed",
        OperationState::Cancelled => "cancelled",
    }
}

/// Operations, for callers.
#[derive(Clone)]
pub struct Operations {
    core: Shared,
    canceller: std::sync::Arc<dyn Cancel>,
}

/// Tells whoever does the work that it was asked to stop. Implemented where the actors are known.
pub trait Cancel: Send + Sync {
    /// In the transaction that marked the operation: change what must change at once.
    fn ask(&self, tx: &Tx<'_>, operation: &Operation) -> Result<()>;
    /// After the commit: wake the worker.
    fn wake(&self, operation: &Operation);
}

impl Operations {
    pub(crate) fn new(core: Shared, canceller: std::sync::Arc<dyn Cancel>) -> Operations {
        Operations { core, canceller }
    }

    /// One page of operations.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Operation>> {
        self.core.store.read(move |connection| page(connection, &query)).await
    }

    /// The operation; with `wait`, as soon as it has ended or that time is over.
    pub async fn one(&self, id: OperationId, wait: Option<Duration>) -> Result<Operation> {
        let most = Duration::from_secs(model::limits::WAIT_S_MAX);
        let deadline = tokio::time::Instant::now() + wait.unwrap_or_default().min(most);
        let mut changed = self.core.store.signals().operation(id);
        loop {
            let found = self.core.store.read(move |connection| one(connection, id)).await?;
            if found.state.is_final() || wait.is_none() {
                return Ok(found);
            }
            match tokio::time::timeout_at(deadline, changed.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Ok(found),
            }
        }
    }

    /// Asks it to stop. Fails with `wrong_state` when it has ended or cannot be stopped safely any more.
    pub async fn cancel(&self, call: &Call, id: OperationId) -> Result<Answer<Operation>> {
        let canceller = self.canceller.clone();
        let conditions = call.clone();
        let answer = self
            .core
            .mutate(call, move |tx| {
                let operation = one(tx, id)?;
                conditions.check_match(operation.generation)?;
                if !operation.cancellable {
                    let state = state_text(operation.state);
                    return Err(Error::new(
                        Code::WrongState,
                        format!("operation {id} is {state} and can no longer be cancelled"),
                    )
                    .with_operation(id));
                }
                tx.execute("UPDATE operations SET cancel_asked = 1 WHERE id = ?1", [id.to_string()])?;
                canceller.ask(tx, &operation)?;
                one(tx, id)
            })
            .await?;
        self.canceller.wake(&answer.body);
        Ok(answer)
    }
}

/// Whether an operation works on the resource of the second parameter; any does when that is null.
const ON: &str = "(?2 IS NULL OR EXISTS (SELECT 1 FROM json_each(operations.body, '$.resources')
    WHERE json_extract(value, '$.id') = ?2))";

/// Operations are in the order of their ids and have no names or labels; they are found by what they work on.
fn page(connection: &Connection, query: &ListQuery) -> Result<Page<Operation>> {
    if query.label_selector.is_some() || query.name.is_some() {
        return Err(records::bad_parameter(
            "label_selector",
            "operations have no names or labels".to_owned(),
        ));
    }
    let (limit, after, descending) = records::by_creation(query)?;
    let (compare, order) = if descending { ("<", "DESC") } else { (">", "ASC") };
    let after = after.unwrap_or_else(|| if descending { "~".to_owned() } else { String::new() });
    let sql = format!(
        "SELECT body FROM operations WHERE id {compare} ?1 AND {ON} ORDER BY id {order} LIMIT {}",
        limit + 1
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let resource = query.resource_id.map(|id| id.to_string());
    let rows = statement.query_map(params![after, resource], |row| row.get::<_, String>(0))?;
    let mut items: Vec<Operation> =
        rows.map(|body| Ok(serde_json::from_str(&body?)?)).collect::<Result<_>>()?;
    let more = items.len() > limit as usize;
    items.truncate(limit as usize);
    let next_cursor =
        items.last().filter(|_| more).map(|last| records::cursor(&last.id.to_string(), query.sort));
    Ok(Page { items, next_cursor, watch_cursor: records::watch_cursor(connection)? })
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::{FORGET, TABLES};

    #[test]
    fn what_is_forgotten_is_found_by_its_age() {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(TABLES).unwrap();
        let plan: String = connection
            .query_row(&format!("EXPLAIN QUERY PLAN {FORGET}"), [0], |row| row.get("detail"))
            .unwrap();
        assert!(plan.contains("operations_by_age (created_ms<?)"), "{plan}");
    }
}
