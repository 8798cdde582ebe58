//! What every mutating request carries besides its body: caller, idempotency key, If-Match, Prefer. Handlers
//! take a `Mutation` and hand its `Call` to the host. Nothing here is specific to a resource.
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, header};
use bytes::Bytes;
use host::{Actor, Call, Idempotency};
use model::Code;
use model::limits::{IDEMPOTENCY_KEY_CHARS_MAX, WAIT_S_MAX};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::body;
use crate::edge::RequestId;
use crate::error::Failure;
use crate::json;

pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const PREFER: HeaderName = HeaderName::from_static("prefer");

/// A mutating request with its body read.
pub(crate) struct Mutation<B> {
    /// Who calls and under which conditions.
    pub(crate) call: Call,
    /// The body.
    pub(crate) body: B,
    /// How long the caller would rather wait for the end than be told to come back.
    pub(crate) wait: Option<Duration>,
}

/// A kind of request body.
pub(crate) trait RequestBody: Sized {
    /// Reads it.
    fn read(headers: &HeaderMap, bytes: &Bytes) -> Result<Self, Failure>;
}

/// A JSON body that must be there.
pub(crate) struct Json<T>(pub(crate) T);

/// A JSON body that may be left out.
pub(crate) struct Optional<T>(pub(crate) T);

/// An RFC 7396 merge patch.
pub(crate) struct Patch<T>(pub(crate) T);

/// What the members of a merge patch become when they are null.
pub(crate) trait Removable {
    /// Names that null takes back to a default, with that default as JSON.
    const DEFAULTS: &'static [(&'static str, &'static str)];
}

impl RequestBody for () {
    fn read(_: &HeaderMap, _: &Bytes) -> Result<(), Failure> {
        Ok(())
    }
}

impl<T: DeserializeOwned> RequestBody for Json<T> {
    fn read(headers: &HeaderMap, bytes: &Bytes) -> Result<Json<T>, Failure> {
        body::expect_type(headers, &["application/json"])?;
        body::parse(bytes).map(Json)
    }
}

impl<T: DeserializeOwned + Default> RequestBody for Optional<T> {
    fn read(headers: &HeaderMap, bytes: &Bytes) -> Result<Optional<T>, Failure> {
        if bytes.is_empty() {
            return Ok(Optional(T::default()));
        }
        body::expect_type(headers, &["application/json"])?;
        body::parse(bytes).map(Optional)
    }
}

impl<T: DeserializeOwned + Removable> RequestBody for Patch<T> {
    fn read(headers: &HeaderMap, bytes: &Bytes) -> Result<Patch<T>, Failure> {
        body::expect_type(headers, &["application/merge-patch+json", "application/json"])?;
        let mut json = body::read_json(bytes)?;
        if let json::Json::Object(members) = &mut json {
            for (name, value) in members.iter_mut().filter(|(_, value)| *value == json::Json::Null) {
                *value = default_of::<T>(name)?;
            }
        }
        body::typed(json).map(Patch)
    }
}

/// What null takes this member of a merge patch back to.
fn default_of<T: Removable>(name: &str) -> Result<json::Json, Failure> {
    let default = T::DEFAULTS.iter().find(|(removable, _)| *removable == name);
    let pointer = format!("/{}", json::escape(name));
    let detail = "it cannot be removed; send a value or leave it out";
    let refused = || {
        Failure::new(Code::Invalid, format!("{pointer}: {detail}")).field(&pointer, "not_removable", detail)
    };
    let (_, default) = default.ok_or_else(refused)?;
    serde_json::from_str(default).map_err(|_| refused())
}

impl<S: Sync, B: RequestBody> FromRequest<S> for Mutation<B> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Mutation<B>, Failure> {
        let (parts, body) = request.into_parts();
        let bytes = body::read(&parts.headers, body).await?;
        let (call, wait) = call(&parts, &bytes)?;
        let body = B::read(&parts.headers, &bytes)?;
        Ok(Mutation { call, body, wait })
    }
}

/// A mutating request whose body is read elsewhere, as a stream.
pub(crate) struct Head {
    /// Who calls and under which conditions.
    pub(crate) call: Call,
    /// How long the caller would rather wait for the end than be told to come back.
    pub(crate) wait: Option<Duration>,
}

impl<S: Sync> FromRequestParts<S> for Head {
    type Rejection = Failure;

    /// The fingerprint of a streamed body is its declared length: hashing it would mean holding it.
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Head, Failure> {
        let length = parts.headers.get(header::CONTENT_LENGTH).map(|v| v.as_bytes().to_vec());
        let (call, wait) = call(parts, &length.unwrap_or_default())?;
        Ok(Head { call, wait })
    }
}

fn call(parts: &Parts, body: &[u8]) -> Result<(Call, Option<Duration>), Failure> {
    let missing = || Failure::new(Code::Unauthenticated, "the request has no identity");
    let actor = parts.extensions.get::<Actor>().cloned().ok_or_else(missing)?;
    let request_id = parts.extensions.get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
    let idempotency = match text(&parts.headers, &IDEMPOTENCY_KEY)? {
        Some(key) => Some(Idempotency { key: checked_key(key)?, fingerprint: fingerprint(parts, body) }),
        None => None,
    };
    let if_match = text(&parts.headers, &header::IF_MATCH)?.map(checked_tags).transpose()?;
    let wait = text(&parts.headers, &PREFER)?.and_then(wait);
    Ok((Call { actor, request_id, idempotency, if_match }, wait))
}

/// The header's text, when it is there once and is text.
fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Failure> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Failure::parameter(name.as_str(), "repeated", "send this header once"));
    }
    let text = value.to_str();
    text.map(Some).map_err(|_| Failure::parameter(name.as_str(), "not_valid", "use visible ASCII characters"))
}

fn checked_key(key: &str) -> Result<String, Failure> {
    if key.is_empty() || key.len() > IDEMPOTENCY_KEY_CHARS_MAX || !key.bytes().all(|b| b.is_ascii_graphic()) {
        let detail = format!("use 1 to {IDEMPOTENCY_KEY_CHARS_MAX} visible ASCII characters, such as a UUID");
        return Err(Failure::parameter(IDEMPOTENCY_KEY.as_str(), "not_valid", detail));
    }
    Ok(key.to_owned())
}

/// `*` or strong entity tags. A weak tag can never match (RFC 9110, section 13.1.1), so it is a mistake.
fn checked_tags(text: &str) -> Result<String, Failure> {
    let sound = |tag: &str| {
        let inner = tag.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        inner.is_some_and(|inner| !inner.contains('"'))
    };
    if text.trim() == "*" || text.split(',').map(str::trim).all(sound) {
        return Ok(text.to_owned());
    }
    let detail = "send the ETag as it was received, with its quotes, or *";
    Err(Failure::parameter(header::IF_MATCH.as_str(), "not_valid", detail))
}

/// `wait` of a Prefer header (RFC 7240, section 4.3), in seconds. A preference that makes no sense is ignored,
/// as that RFC wants, and a long one is shortened.
fn wait(prefer: &str) -> Option<Duration> {
    let seconds = prefer.split([',', ';']).find_map(|preference| {
        let (name, value) = preference.split_once('=')?;
        name.trim().eq_ignore_ascii_case("wait").then(|| value.trim().parse::<u64>().ok())?
    })?;
    Some(Duration::from_secs(seconds.min(WAIT_S_MAX)))
}

/// SHA-256 of method, path, query and body, each with its length so that none can pass for part of another.
fn fingerprint(parts: &Parts, body: &[u8]) -> String {
    let mut hash = Sha256::new();
    let query = parts.uri.query().unwrap_or_default();
    for part in [parts.method.as_str().as_bytes(), parts.uri.path().as_bytes(), query.as_bytes(), body] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        use std::fmt::Write;
        let _ = write!(text, "{byte:02x}");
        text
    })
}
