//! What fuzzers call: bodies of every route, query strings, and the headers of requests that change something. No part
//! of the daemon. `tests/fuzz` calls it with new bytes, and the test here with the seeds kept there.
//!
//! What is taken is written again and taken again as the same; what is refused is a problem document that blames the
//! caller.
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderName, HeaderValue, header};
use host::Actor;
use model::console::CreateConsoleToken;
use model::image::{Image, ImportImage, PatchImage};
use model::migration::{CreateMigrationTicket, LimitMigration, MigrateServer, SettleMigration};
use model::network::{CreateNetwork, PatchNetwork};
use model::server::{CreateServer, PatchServer, Server, StopServer};
use model::volume::PatchVolume;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::call::{IDEMPOTENCY_KEY, Mutation, Optional, Patch, RequestBody};
use crate::error::Failure;
use crate::handlers::{bulk, console, events, images, operations, servers};
use crate::page::Fields;
use crate::query::{
    self, HistoryParameters, ListParameters, NameParameters, NoParameters, OneParameters,
    ServerListParameters, SnapshotListParameters,
};

/// Reads `data` as what its first byte says: below 0x80, since `host` has the others.
pub fn api(data: &[u8]) {
    match data.split_first() {
        Some((kind @ 0..0x40, rest)) => body(*kind, rest),
        Some((kind @ 0x40..0x70, rest)) => query_string(*kind, rest),
        Some((0x70..0x80, rest)) => request(rest),
        _ => {}
    }
}

fn body(kind: u8, text: &[u8]) {
    match kind % 11 {
        0 => json::<CreateServer>(text),
        1 => patch::<PatchServer>(text),
        2 => json::<StopServer>(text),
        3 => json::<CreateConsoleToken>(text),
        4 => json::<ImportImage>(text),
        5 => json::<CreateNetwork>(text),
        6 => patch::<PatchNetwork>(text),
        7 => {
            patch::<PatchVolume>(text);
            patch::<PatchImage>(text);
        }
        9 => json::<MigrateServer>(text),
        10 => {
            json::<CreateMigrationTicket>(text);
            json::<SettleMigration>(text);
            json::<LimitMigration>(text);
        }
        _ => drop(taken(crate::body::parse::<servers::Nothing>(text))),
    }
}

/// What was taken; a refusal is judged here.
fn taken<T>(answer: Result<T, Failure>) -> Option<T> {
    let failure = match answer {
        Ok(value) => return Some(value),
        Err(failure) => failure,
    };
    let problem = failure.problem("/v1", "a-request");
    assert!((400..500).contains(&problem.status), "a caller's mistake was told as {}", problem.status);
    let texts = problem.errors.iter().flat_map(|error| [&error.pointer, &error.detail]);
    for text in texts.chain([&problem.detail]) {
        assert!(
            text.chars().count() <= crate::limits::DETAIL_CHARS_MAX + 1,
            "a text of {} bytes",
            text.len()
        );
    }
    assert!(!problem.detail.is_empty() && problem.title == problem.code.title());
    let response = failure.written("/v1", "a-request");
    assert_eq!(response.status().as_u16(), problem.status);
    let document = serde_json::to_vec(&problem).expect("a problem can be written");
    let read: model::Problem = serde_json::from_slice(&document).expect("a problem can be read");
    assert_eq!(read, problem);
    None
}

fn json<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(text: &[u8]) {
    let Some(value) = taken(crate::body::parse::<T>(text)) else { return };
    again(&value);
    judge_names(text);
}

/// A value that was taken is taken again as it is written.
fn again<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(value: &T) {
    let written = serde_json::to_vec(value).expect("what was read can be written");
    assert_eq!(crate::body::parse::<T>(&written).ok().as_ref(), Some(value));
}

fn patch<T>(text: &[u8])
where
    T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug,
    Patch<T>: RequestBody,
{
    let mut headers = axum::http::HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/merge-patch+json"));
    let Some(Patch(value)) = taken(Patch::<T>::read(&headers, &bytes::Bytes::copy_from_slice(text))) else {
        return;
    };
    again(&value);
    judge_names(text);
}

/// A body that is taken is an object whose members all came once.
fn judge_names(text: &[u8]) {
    let value: serde_json::Value = serde_json::from_slice(text).expect("what was taken is JSON");
    assert!(value.is_object(), "a body was taken that is no object");
    assert_eq!(colons(text), members(&value), "a member came twice");
}

/// Members of every object below a value, as they were kept.
fn members(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::Object(map) => map.values().map(|value| 1 + members(value)).sum(),
        serde_json::Value::Array(items) => items.iter().map(members).sum(),
        _ => 0,
    }
}

/// Colons outside strings: members as they were written.
fn colons(text: &[u8]) -> usize {
    let (mut count, mut inside, mut escaped) = (0, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if inside => escaped = true,
            b'"' => inside = !inside,
            b':' if !inside => count += 1,
            _ => {}
        }
    }
    count
}

fn query_string(kind: u8, text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else { return };
    match kind % 12 {
        0 | 1 => {
            let list = query::parse::<ListParameters>(text).and_then(ListParameters::checked);
            let servers = query::parse::<ServerListParameters>(text).and_then(ServerListParameters::checked);
            assert!(list.is_err() || servers.is_ok(), "servers are listed like the rest");
            let _ = taken(servers);
            let snapshots = query::parse::<SnapshotListParameters>(text);
            let _ = taken(snapshots.and_then(SnapshotListParameters::checked));
            let Some((list, fields)) = taken(list) else { return };
            assert!(list.limit.is_none_or(|limit| (1..=model::limits::PAGE_ITEMS_MAX).contains(&limit)));
            assert!(list.cursor.is_none_or(|cursor| cursor.is_ascii() && (1..=512).contains(&cursor.len())));
            if let Some(selector) = &list.label_selector {
                let terms = host::store::selector::parse(selector);
                assert!(terms.is_ok(), "{selector:?} passed here and does not there: {terms:?}");
            }
            let _ = taken(Fields::of::<Server>(fields.as_deref()));
        }
        2 => {
            let _ = taken(query::parse::<HistoryParameters>(text).and_then(HistoryParameters::checked));
            let _ = taken(query::parse::<NameParameters>(text).and_then(NameParameters::checked));
            let _ = taken(query::parse::<bulk::Selection>(text));
        }
        3 => {
            let Some(one) = taken(query::parse::<OneParameters>(text)) else { return };
            let _ = taken(Fields::of::<Image>(one.fields.as_deref()));
        }
        4 => drop(taken(query::parse::<NoParameters>(text))),
        5 => drop(taken(query::parse::<console::LogParameters>(text))),
        6 => drop(taken(query::parse::<console::OpenParameters>(text))),
        7 => drop(taken(query::parse::<events::EventParameters>(text))),
        8 => drop(taken(query::parse::<images::UploadParameters>(text))),
        9 => drop(taken(query::parse::<query::CreateParameters>(text))),
        10 => drop(taken(query::parse::<operations::WaitParameters>(text))),
        _ => {
            let Some(wait) = taken(query::wait(text)) else { return };
            assert!(wait.as_secs() <= model::limits::WAIT_S_MAX);
        }
    }
}

thread_local! {
    static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
}

/// A request that changes something: header values, each up to a NUL, and its body.
fn request(data: &[u8]) {
    let mut parts = data.splitn(6, |byte| *byte == 0);
    let mut request = Request::builder().method("POST").uri("/v1/servers");
    let names: [HeaderName; 4] =
        [header::CONTENT_TYPE, IDEMPOTENCY_KEY, header::IF_MATCH, HeaderName::from_static("prefer")];
    for name in names {
        let value = parts.next().unwrap_or_default();
        if let (false, Ok(value)) = (value.is_empty(), HeaderValue::from_bytes(value)) {
            request = request.header(name, value);
        }
    }
    let twice = parts.next().is_some_and(|flag| flag == b"2");
    if twice {
        request = request.header(IDEMPOTENCY_KEY, "another");
    }
    let actor = Actor::Local { uid: 0 };
    let body = parts.next().unwrap_or_default().to_vec();
    let request = request.extension(actor).body(Body::from(body)).expect("the parts are right");
    let made = RUNTIME
        .with(|runtime| runtime.block_on(Mutation::<Optional<StopServer>>::from_request(request, &())));
    let Some(Mutation { call, body: Optional(_), wait }) = taken(made) else { return };
    if let Some(idempotency) = call.idempotency {
        let key = &idempotency.key;
        assert!((1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()));
        assert_eq!(idempotency.fingerprint.len(), 64);
    }
    assert!(wait.is_none_or(|wait| wait.as_secs() <= model::limits::WAIT_S_MAX));
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_requests_hold() {
        seeds::replay("api", super::api);
    }

    #[test]
    fn inputs_near_the_seeds_of_requests_hold() {
        seeds::vary("api", seeds::INPUTS, super::api);
    }
}
