//! Request bodies: bounded in bytes and time, of the right content type, parsed with the place of the mistake
//! named. Nothing here knows what a body is for. Called by `call`, which every mutating handler takes.
use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use model::Code;
use model::limits::BODY_BYTES_MAX;
use serde::de::DeserializeOwned;

use crate::error::Failure;
use crate::json::{Json, escape};
use crate::limits::BODY_READ_MAX;

/// Reads a whole body, at most [`BODY_BYTES_MAX`] bytes.
pub(crate) async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, Failure> {
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > BODY_BYTES_MAX) {
        return Err(too_large());
    }
    let collected = tokio::time::timeout(BODY_READ_MAX, Limited::new(body, BODY_BYTES_MAX).collect()).await;
    match collected {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(cause)) if cause.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(cause)) => {
            Err(Failure::new(Code::InvalidRequest, format!("the body broke off: {cause}; send it whole")))
        }
        Err(_) => {
            let detail = format!("the body did not arrive within {} s", BODY_READ_MAX.as_secs());
            Err(Failure::new(Code::Timeout, detail))
        }
    }
}

fn too_large() -> Failure {
    Failure::new(Code::BodyTooLarge, format!("the body is longer than {BODY_BYTES_MAX} bytes"))
}

/// Parses JSON as `T`.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    typed(read_json(bytes)?)
}

/// Reads JSON in which no name comes twice.
pub(crate) fn read_json(bytes: &[u8]) -> Result<Json, Failure> {
    if bytes.is_empty() {
        return Err(Failure::new(Code::InvalidRequest, "the body is empty; send a JSON object"));
    }
    let json: Json = serde_json::from_slice(bytes).map_err(|cause| {
        let detail = format!("the body is not valid JSON: {cause}");
        Failure::new(Code::InvalidRequest, detail.clone()).field("", "not_json", detail)
    })?;
    match json.repeated() {
        Some(pointer) => {
            let detail = "the name comes twice in its object; send it once";
            Err(Failure::new(Code::Invalid, format!("{pointer}: {detail}"))
                .field(&pointer, "repeated", detail))
        }
        None => Ok(json),
    }
}

/// Takes JSON for a `T`, or says where it is none.
pub(crate) fn typed<T: DeserializeOwned>(json: Json) -> Result<T, Failure> {
    serde_path_to_error::deserialize(json).map_err(|cause| {
        let pointer = pointer(cause.path());
        let detail = cause.inner().to_string();
        let (kind, member) = mistake(&detail);
        let pointer = match member.filter(|_| kind != "unknown_field") {
            Some(member) => format!("{pointer}/{}", escape(member)),
            None => pointer,
        };
        Failure::new(Code::Invalid, format!("{}: {detail}", shown(&pointer))).field(
            &pointer,
            kind,
            detail.as_str(),
        )
    })
}

/// Refuses a body of another content type. Parameters such as `charset` do not matter: JSON is UTF-8.
pub(crate) fn expect_type(headers: &HeaderMap, allowed: &[&str]) -> Result<(), Failure> {
    let sent = content_type(headers);
    if sent.as_deref().is_some_and(|sent| allowed.contains(&sent)) {
        return Ok(());
    }
    let said = sent.map_or_else(|| "no Content-Type".to_owned(), |sent| format!("Content-Type {sent:?}"));
    let detail = format!("the request has {said}; this path takes {}", allowed.join(" or "));
    Err(Failure::new(Code::UnsupportedMediaType, detail))
}

/// The content type without its parameters, in lower case.
pub(crate) fn content_type(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

/// The JSON pointer (RFC 6901) of a place in the body; the whole body is the empty pointer.
fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut pointer = String::new();
    for segment in path.iter() {
        let name = match segment {
            Segment::Seq { index } => index.to_string(),
            Segment::Map { key } => escape(key),
            Segment::Enum { variant } => variant.clone(),
            Segment::Unknown => continue,
        };
        pointer.push('/');
        pointer.push_str(&name);
    }
    pointer
}

/// What kind of mistake serde's words tell of, and the member they name. The path of a missing or repeated
/// member ends at its parent, that of an unknown one at itself.
pub(crate) fn mistake(detail: &str) -> (&'static str, Option<&str>) {
    for (words, kind) in [
        ("missing field `", "missing"),
        ("duplicate field `", "repeated"),
        ("unknown field `", "unknown_field"),
    ] {
        if let Some(rest) = detail.strip_prefix(words) {
            return (kind, rest.split('`').next());
        }
    }
    ("not_valid", None)
}

fn shown(pointer: &str) -> &str {
    if pointer.is_empty() { "body" } else { pointer }
}
