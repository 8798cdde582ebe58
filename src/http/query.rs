//! Query parameters: typed, with unknown and repeated names refused. Handlers take `Query<T>`; the shared
//! parameters of lists and of single reads are here too.
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use model::limits::{EXTERNAL_REF_CHARS_MAX, LABEL_CHARS_MAX, LABELS_MAX, PAGE_ITEMS_MAX, WAIT_S_MAX};
use model::page::{ListQuery, Sort};
use model::{Code, Name, ServerId};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::time::Duration;
use utoipa::IntoParams;

use crate::body::mistake;
use crate::error::Failure;
use crate::limits::QUERY_BYTES_MAX;

/// The query string as `T`, whose derive must deny unknown fields.
pub(crate) struct Query<T>(pub(crate) T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Query<T>, Failure> {
        parse(parts.uri.query().unwrap_or_default()).map(Query)
    }
}

/// Reads a query string.
pub(crate) fn parse<T: DeserializeOwned>(query: &str) -> Result<T, Failure> {
    if query.len() > QUERY_BYTES_MAX {
        let detail = format!("the query string has {} bytes, {QUERY_BYTES_MAX} are allowed", query.len());
        return Err(Failure::new(Code::InvalidRequest, detail));
    }
    let deserializer = serde_urlencoded::Deserializer::new(form_urlencoded::parse(query.as_bytes()));
    serde_path_to_error::deserialize(deserializer).map_err(|cause| {
        let path = cause.path().to_string();
        let detail = cause.inner().to_string();
        let (kind, member) = mistake(&detail);
        let name = member.unwrap_or(if path == "." { "query" } else { path.as_str() });
        Failure::parameter(name, kind, detail.as_str())
    })
}

/// Parameters of every list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListParameters {
    /// Most items of the page.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<u32>,
    /// `next_cursor` of the page before. Keep the other parameters as they were.
    #[param(pattern = "^[A-Za-z0-9_=.:-]{1,512}$")]
    cursor: Option<String>,
    /// Order.
    #[param(inline)]
    sort: Option<Sort>,
    /// Only the resource of this name.
    #[param(inline)]
    name: Option<Name>,
    /// Comma-separated terms that must all hold: `key=value`, `key!=value`, `key`, `!key`.
    #[param(
        pattern = "^(!?[A-Za-z0-9._/-]{1,63}|[A-Za-z0-9._/-]{1,63}!?=[A-Za-z0-9._/-]{0,63})(,(!?[A-Za-z0-9._/-]{1,63}|[A-Za-z0-9._/-]{1,63}!?=[A-Za-z0-9._/-]{0,63})){0,31}$"
    )]
    label_selector: Option<String>,
    /// Comma-separated names of the top-level fields to answer with.
    #[param(pattern = "^[a-z0-9_]+(,[a-z0-9_]+)*$")]
    fields: Option<String>,
}

impl ListParameters {
    /// What to ask the host for, and which fields to answer with.
    pub(crate) fn checked(self) -> Result<(ListQuery, Option<String>), Failure> {
        if let Some(limit) = self.limit
            && !(1..=PAGE_ITEMS_MAX).contains(&limit)
        {
            return Err(Failure::parameter("limit", "out_of_range", format!("use 1 to {PAGE_ITEMS_MAX}")));
        }
        if let Some(cursor) = &self.cursor {
            let sound = |b: u8| b.is_ascii_alphanumeric() || b"_=.:-".contains(&b);
            if cursor.is_empty() || cursor.len() > 512 || !cursor.bytes().all(sound) {
                return Err(Failure::parameter("cursor", "not_valid", "send next_cursor of the page before"));
            }
        }
        if let Some(selector) = &self.label_selector {
            check_selector(selector)?;
        }
        let query = ListQuery {
            limit: self.limit,
            cursor: self.cursor,
            sort: self.sort.unwrap_or_default(),
            name: self.name.map(String::from),
            label_selector: self.label_selector,
            ..ListQuery::default()
        };
        Ok((query, self.fields))
    }
}

/// Parameters of the list of servers: those of every list, and what only servers have.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ServerListParameters {
    /// Most items of the page.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<u32>,
    /// `next_cursor` of the page before. Keep the other parameters as they were.
    #[param(pattern = "^[A-Za-z0-9_=.:-]{1,512}$")]
    cursor: Option<String>,
    /// Order.
    #[param(inline)]
    sort: Option<Sort>,
    /// Only the resource of this name.
    #[param(inline)]
    name: Option<Name>,
    /// Only the server with this reference.
    #[param(min_length = 1, max_length = 128)]
    external_ref: Option<String>,
    /// Comma-separated terms that must all hold: `key=value`, `key!=value`, `key`, `!key`.
    #[param(
        pattern = "^(!?[A-Za-z0-9._/-]{1,63}|[A-Za-z0-9._/-]{1,63}!?=[A-Za-z0-9._/-]{0,63})(,(!?[A-Za-z0-9._/-]{1,63}|[A-Za-z0-9._/-]{1,63}!?=[A-Za-z0-9._/-]{0,63})){0,31}$"
    )]
    label_selector: Option<String>,
    /// Comma-separated names of the top-level fields to answer with.
    #[param(pattern = "^[a-z0-9_]+(,[a-z0-9_]+)*$")]
    fields: Option<String>,
}

impl ServerListParameters {
    /// What to ask the host for, and which fields to answer with.
    pub(crate) fn checked(self) -> Result<(ListQuery, Option<String>), Failure> {
        let ServerListParameters { limit, cursor, sort, name, external_ref, label_selector, fields } = self;
        let sound = |reference: &String| (1..=EXTERNAL_REF_CHARS_MAX).contains(&reference.chars().count());
        if !external_ref.as_ref().is_none_or(sound) {
            let detail = format!("a reference has 1 to {EXTERNAL_REF_CHARS_MAX} characters");
            return Err(Failure::parameter("external_ref", "out_of_range", detail));
        }
        let (query, fields) =
            ListParameters { limit, cursor, sort, name, label_selector, fields }.checked()?;
        Ok((ListQuery { external_ref, ..query }, fields))
    }
}

/// Parameters of the list of snapshots: those of every list, and whose they are.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct SnapshotListParameters {
    /// Most items of the page.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<u32>,
    /// `next_cursor` of the page before. Keep the other parameters as they were.
    #[param(pattern = "^[A-Za-z0-9_=.:-]{1,512}$")]
    cursor: Option<String>,
    /// Order.
    #[param(inline)]
    sort: Option<Sort>,
    /// Only the resource of this name.
    #[param(inline)]
    name: Option<Name>,
    /// Only snapshots of the server of this id, which may be gone.
    #[param(value_type = Option<String>, format = Uuid)]
    server_id: Option<ServerId>,
    /// Comma-separated terms that must all hold: `key=value`, `key!=value`, `key`, `!key`.
    #[param(
        pattern = "^(!?[A-Za-z0-9._/-]{1,63}|[A-Za-z0-9._/-]{1,63}!?=[A-Za-z0-9._/-]{0,63})(,(!?[A-Za-z0-9._/-]{1,63}|[A-Za-z0-9._/-]{1,63}!?=[A-Za-z0-9._/-]{0,63})){0,31}$"
    )]
    label_selector: Option<String>,
    /// Comma-separated names of the top-level fields to answer with.
    #[param(pattern = "^[a-z0-9_]+(,[a-z0-9_]+)*$")]
    fields: Option<String>,
}

impl SnapshotListParameters {
    /// What to ask the host for, and which fields to answer with.
    pub(crate) fn checked(self) -> Result<(ListQuery, Option<String>), Failure> {
        let SnapshotListParameters { limit, cursor, sort, name, server_id, label_selector, fields } = self;
        let (query, fields) =
            ListParameters { limit, cursor, sort, name, label_selector, fields }.checked()?;
        Ok((ListQuery { server_id, ..query }, fields))
    }
}

/// Refuses a selector that cannot match by its form.
pub(crate) fn check_selector(selector: &str) -> Result<(), Failure> {
    let sound = |text: &str| {
        text.len() <= LABEL_CHARS_MAX
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b))
    };
    let key_sound = |key: &str| !key.is_empty() && sound(key);
    for (index, term) in selector.split(',').enumerate() {
        let good = match term.split_once("!=").or_else(|| term.split_once('=')) {
            Some((key, value)) => key_sound(key) && sound(value),
            None => key_sound(term.strip_prefix('!').unwrap_or(term)),
        };
        if !good || index >= LABELS_MAX {
            let detail = format!(
                "use up to {LABELS_MAX} comma-separated terms of the forms key=value, key!=value, key, !key"
            );
            return Err(Failure::parameter("label_selector", "not_valid", detail));
        }
    }
    Ok(())
}

/// Parameter of what can be planned before it is made.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct CreateParameters {
    /// Answer what would be made, or the problem it would fail with, and make nothing.
    pub(crate) dry_run: Option<bool>,
}

/// Parameter of every read of one resource.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct OneParameters {
    /// Comma-separated names of the top-level fields to answer with.
    #[param(pattern = "^[a-z0-9_]+(,[a-z0-9_]+)*$")]
    pub(crate) fields: Option<String>,
}

/// For paths without parameters: any is refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoParameters {}

/// A wait such as `30s`.
pub(crate) fn wait(text: &str) -> Result<Duration, Failure> {
    text.strip_suffix('s')
        .filter(|digits| digits.len() <= 2 && digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok())
        .filter(|seconds| *seconds <= WAIT_S_MAX)
        .map(Duration::from_secs)
        .ok_or_else(|| Failure::parameter("wait", "not_valid", format!("use 0s to {WAIT_S_MAX}s")))
}

/// Parameters of the list of operations, which are in the order of time and have neither names nor labels.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct HistoryParameters {
    /// Most items of the page.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<u32>,
    /// `next_cursor` of the page before. Keep the other parameters as they were.
    #[param(pattern = "^[A-Za-z0-9_=.:-]{1,512}$")]
    cursor: Option<String>,
    /// Order.
    #[param(inline)]
    sort: Option<Age>,
    /// Only operations on the resource of this id, whatever it is.
    #[param(value_type = Option<String>, format = Uuid)]
    resource_id: Option<uuid::Uuid>,
    /// Comma-separated names of the top-level fields to answer with.
    #[param(pattern = "^[a-z0-9_]+(,[a-z0-9_]+)*$")]
    fields: Option<String>,
}

/// Order by time.
#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
pub(crate) enum Age {
    /// Oldest first.
    #[serde(rename = "created_at")]
    OldestFirst,
    /// Newest first.
    #[serde(rename = "-created_at")]
    NewestFirst,
}

impl HistoryParameters {
    /// What to ask the host for, and which fields to answer with.
    pub(crate) fn checked(self) -> Result<(ListQuery, Option<String>), Failure> {
        let sort = match self.sort {
            Some(Age::NewestFirst) => Sort::CreatedAtDescending,
            Some(Age::OldestFirst) | None => Sort::CreatedAt,
        };
        let HistoryParameters { limit, cursor, fields, resource_id, .. } = self;
        let (query, fields) =
            ListParameters { limit, cursor, sort: Some(sort), fields, ..ListParameters::default() }
                .checked()?;
        Ok((ListQuery { resource_id, ..query }, fields))
    }
}

/// Parameters of lists of things that have nothing but a name.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct NameParameters {
    /// Most items of the page.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<u32>,
    /// `next_cursor` of the page before. Keep the other parameters as they were.
    #[param(pattern = "^[A-Za-z0-9_=.:-]{1,512}$")]
    cursor: Option<String>,
    /// Order.
    #[param(inline)]
    sort: Option<ByName>,
    /// Comma-separated names of the top-level fields to answer with.
    #[param(pattern = "^[a-z0-9_]+(,[a-z0-9_]+)*$")]
    fields: Option<String>,
}

/// Order by name.
#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
pub(crate) enum ByName {
    /// Forwards.
    #[serde(rename = "name")]
    Forwards,
    /// Backwards.
    #[serde(rename = "-name")]
    Backwards,
}

impl NameParameters {
    /// What to ask the host for, and which fields to answer with.
    pub(crate) fn checked(self) -> Result<(ListQuery, Option<String>), Failure> {
        let sort = match self.sort {
            Some(ByName::Backwards) => Sort::NameDescending,
            Some(ByName::Forwards) | None => Sort::Name,
        };
        let NameParameters { limit, cursor, fields, .. } = self;
        ListParameters { limit, cursor, sort: Some(sort), fields, ..ListParameters::default() }.checked()
    }
}
