//! Records with an id, a name and labels, kept as one JSON document each: the shape of every noun's table.
//! It knows no noun; each implements [`Record`] and keeps further tables of its own where it needs them.
//!
//! A table is `(id TEXT PRIMARY KEY, name TEXT UNIQUE, labels TEXT, body TEXT)`, made with [`table!`](crate::table).
//! Ids are UUIDv7, so the order of ids is the order of creation.
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use model::page::{ListQuery, Page, Sort};
use model::{Code, EventId, Labels, Name};
use rusqlite::{Connection, OptionalExtension, ToSql, params};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::{Tx, selector};
use crate::error::{Error, Result};

/// The SQL of a table of records.
#[macro_export]
macro_rules! table {
    ($name:literal) => {
        concat!(
            "CREATE TABLE ",
            $name,
            " (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, labels TEXT NOT NULL, body TEXT NOT NULL) STRICT;"
        )
    };
}

/// Something kept in a table of its own.
pub trait Record: Serialize + DeserializeOwned + Send + 'static {
    /// The table.
    const TABLE: &'static str;
    /// The noun for people, such as `server`.
    const NOUN: &'static str;
    /// Whether its table has a column `external_ref`.
    const HAS_EXTERNAL_REF: bool = false;
    /// Where in its body the id of its server is, if its list can be narrowed to one.
    const SERVER_ID: Option<&'static str> = None;
    /// Its identity.
    fn id(&self) -> Uuid;
    /// Its unique name.
    fn name(&self) -> &Name;
    /// Its labels.
    fn labels(&self) -> &Labels;
    /// Called before it is saved again: count the generation up and set the time.
    fn touch(&mut self);
}

/// Adds a record. Fails with `already_exists` when its name is taken.
pub fn insert<R: Record>(tx: &Tx<'_>, record: &R) -> Result<()> {
    let sql = format!("INSERT INTO {} (id, name, labels, body) VALUES (?1, ?2, ?3, ?4)", R::TABLE);
    tx.prepare_cached(&sql)?
        .execute(params![
            record.id().to_string(),
            record.name().as_str(),
            serde_json::to_string(record.labels())?,
            serde_json::to_string(record)?
        ])
        .map_err(|cause| name_taken::<R>(cause, record.name()))?;
    Ok(())
}

/// Touches and saves a record that exists. Fails with `already_exists` when its new name is taken.
pub fn save<R: Record>(tx: &Tx<'_>, record: &mut R) -> Result<()> {
    record.touch();
    let (id, labels, body) =
        (record.id().to_string(), serde_json::to_string(record.labels())?, serde_json::to_string(record)?);
    let values = params![id, record.name().as_str(), labels, body];
    // With the name among what is set SQLite writes its index anew, which is a page of the disk more for each commit.
    let sql = format!("UPDATE {} SET labels = ?3, body = ?4 WHERE id = ?1 AND name = ?2", R::TABLE);
    if tx.prepare_cached(&sql)?.execute(values)? > 0 {
        return Ok(());
    }
    let sql = format!("UPDATE {} SET name = ?2, labels = ?3, body = ?4 WHERE id = ?1", R::TABLE);
    let renamed =
        tx.prepare_cached(&sql)?.execute(values).map_err(|cause| name_taken::<R>(cause, record.name()))?;
    if renamed == 0 {
        return Err(Error::not_found(R::NOUN, record.id()));
    }
    Ok(())
}

/// Removes a record; true when there was one.
pub fn remove<R: Record>(tx: &Tx<'_>, id: Uuid) -> Result<bool> {
    let sql = format!("DELETE FROM {} WHERE id = ?1", R::TABLE);
    Ok(tx.prepare_cached(&sql)?.execute([id.to_string()])? > 0)
}

/// The record of this id, if there is one.
pub fn find<R: Record>(connection: &Connection, id: Uuid) -> Result<Option<R>> {
    let sql = format!("SELECT body FROM {} WHERE id = ?1", R::TABLE);
    let body: Option<String> =
        connection.prepare_cached(&sql)?.query_row([id.to_string()], |row| row.get(0)).optional()?;
    body.map(|body| serde_json::from_str(&body).map_err(Error::from)).transpose()
}

/// The record of this id. Fails with `not_found`.
pub fn one<R: Record>(connection: &Connection, id: Uuid) -> Result<R> {
    find(connection, id)?.ok_or_else(|| Error::not_found(R::NOUN, id))
}

/// The record of this id or name, if there is one.
pub fn resolve<R: Record>(connection: &Connection, id_or_name: &str) -> Result<Option<R>> {
    if let Ok(id) = Uuid::parse_str(id_or_name)
        && let Some(record) = find(connection, id)?
    {
        return Ok(Some(record));
    }
    let sql = format!("SELECT body FROM {} WHERE name = ?1", R::TABLE);
    let body: Option<String> =
        connection.prepare_cached(&sql)?.query_row([id_or_name], |row| row.get(0)).optional()?;
    body.map(|body| serde_json::from_str(&body).map_err(Error::from)).transpose()
}

/// Every record, oldest first.
pub fn all<R: Record>(connection: &Connection) -> Result<Vec<R>> {
    let sql = format!("SELECT body FROM {} ORDER BY id", R::TABLE);
    let mut statement = connection.prepare_cached(&sql)?;
    let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
    rows.map(|body| Ok(serde_json::from_str(&body?)?)).collect()
}

/// One page of records. Fails with `invalid_request` when the limit, the cursor or the selector is not valid.
pub fn page<R: Record>(connection: &Connection, query: &ListQuery) -> Result<Page<R>> {
    let limit = limit(query)?;
    let (key, descending) = match query.sort {
        Sort::CreatedAt => ("id", false),
        Sort::CreatedAtDescending => ("id", true),
        Sort::Name => ("name", false),
        Sort::NameDescending => ("name", true),
    };
    let (compare, order) = if descending { ("<", "DESC") } else { (">", "ASC") };
    let mut terms = vec!["1".to_owned()];
    let mut values: Vec<Box<dyn ToSql>> = Vec::new();
    if let Some(cursor) = &query.cursor {
        terms.push(format!("{key} {compare} ?"));
        values.push(Box::new(open_cursor(cursor, query.sort)?));
    }
    if let Some(name) = &query.name {
        terms.push("name = ?".to_owned());
        values.push(Box::new(name.clone()));
    }
    if let Some(reference) = &query.external_ref {
        if !R::HAS_EXTERNAL_REF {
            return Err(bad_parameter("external_ref", format!("a {} has none", R::NOUN)));
        }
        terms.push("external_ref = ?".to_owned());
        values.push(Box::new(reference.clone()));
    }
    if let (Some(id), Some(at)) = (query.server_id, R::SERVER_ID) {
        terms.push(format!("json_extract(body, '{at}') = ?"));
        values.push(Box::new(id.to_string()));
    }
    if let Some(text) = &query.label_selector {
        for term in selector::parse(text).map_err(|detail| bad_parameter("label_selector", detail))? {
            terms.push(term.sql().to_owned());
            values.extend(term.values().map(|value| Box::new(value.to_owned()) as Box<dyn ToSql>));
        }
    }
    let sql = format!(
        "SELECT {key}, body FROM {} WHERE {} ORDER BY {key} {order} LIMIT {}",
        R::TABLE,
        terms.join(" AND "),
        limit + 1
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let rows = statement.query_map(rusqlite::params_from_iter(values.iter()), |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;
    let mut found: Vec<(String, String)> = rows.collect::<rusqlite::Result<_>>()?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_cursor = found.last().filter(|_| more).map(|(last, _)| cursor(last, query.sort));
    let items = found.iter().map(|(_, body)| Ok(serde_json::from_str(body)?)).collect::<Result<_>>()?;
    Ok(Page { items, next_cursor, watch_cursor: watch_cursor(connection)? })
}

fn limit(query: &ListQuery) -> Result<u32> {
    let most = model::limits::PAGE_ITEMS_MAX;
    match query.limit.unwrap_or(model::limits::PAGE_ITEMS_DEFAULT) {
        limit if (1..=most).contains(&limit) => Ok(limit),
        _ => Err(bad_parameter("limit", format!("must be between 1 and {most}"))),
    }
}

/// Limit, position and direction of a list that has no order but that of creation.
pub(crate) fn by_creation(query: &ListQuery) -> Result<(u32, Option<String>, bool)> {
    let descending = match query.sort {
        Sort::CreatedAt => false,
        Sort::CreatedAtDescending => true,
        Sort::Name | Sort::NameDescending => {
            return Err(bad_parameter("sort", "must be created_at or -created_at".to_owned()));
        }
    };
    let after = query.cursor.as_ref().map(|cursor| open_cursor(cursor, query.sort)).transpose()?;
    Ok((limit(query)?, after, descending))
}

/// Limit, position and direction of a list that has no order but that of names.
pub(crate) fn by_name(query: &ListQuery) -> Result<(u32, Option<String>, bool)> {
    let descending = match query.sort {
        Sort::Name => false,
        Sort::NameDescending => true,
        Sort::CreatedAt | Sort::CreatedAtDescending => {
            return Err(bad_parameter("sort", "must be name or -name".to_owned()));
        }
    };
    let after = query.cursor.as_ref().map(|cursor| open_cursor(cursor, query.sort)).transpose()?;
    Ok((limit(query)?, after, descending))
}

/// Position of the last event in this view of the records.
pub fn watch_cursor(connection: &Connection) -> Result<EventId> {
    Ok(EventId(connection.query_row("SELECT coalesce(max(id), 0) FROM events", [], |row| row.get(0))?))
}

/// A cursor is opaque to callers so that its content can change; it carries the order it belongs to.
pub(crate) fn cursor(last: &str, sort: Sort) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}{last}", sort_mark(sort)))
}

/// What [`cursor`] made, for the same order.
pub(crate) fn open_cursor(cursor: &str, sort: Sort) -> Result<String> {
    let refused = || bad_parameter("cursor", "is not a next_cursor of this list in this order".to_owned());
    let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| refused())?;
    let text = String::from_utf8(bytes).map_err(|_| refused())?;
    text.strip_prefix(sort_mark(sort)).map(str::to_owned).ok_or_else(refused)
}

fn sort_mark(sort: Sort) -> char {
    match sort {
        Sort::CreatedAt => 'c',
        Sort::CreatedAtDescending => 'C',
        Sort::Name => 'n',
        Sort::NameDescending => 'N',
    }
}

/// A query parameter is not valid.
pub fn bad_parameter(name: &str, detail: String) -> Error {
    let mut error = Error::invalid(name, "invalid", detail);
    error.code = Code::InvalidRequest;
    error
}

fn name_taken<R: Record>(cause: rusqlite::Error, name: &Name) -> Error {
    if cause.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation) {
        return Error::new(
            Code::AlreadyExists,
            format!("another {} has the name {name} already; choose another name", R::NOUN),
        );
    }
    Error::from(cause)
}
