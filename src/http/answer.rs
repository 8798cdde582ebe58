//! Successful answers: status, ETag, Location, replay mark, and the wait for an operation's end. Handlers call
//! it with what the host gave them.
use std::future::Future;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use host::Answer;
use model::image::Image;
use model::network::Network;
use model::operation::{Accepted, Operation, OperationState};
use model::page::Page;
use model::server::Server;
use model::snapshot::Snapshot;
use model::volume::Volume;
use model::{Code, OperationId};
use serde::Serialize;
use serde_json::Value;
use utoipa::PartialSchema;

use crate::edge::{panic_text, panicked};
use crate::error::Failure;
use crate::kept::Written;
use crate::page::{Fields, project_one, project_page};
use crate::routes::Api;

const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// A resource with a version and a path.
pub(crate) trait Resource: Serialize + PartialSchema {
    /// Its version.
    fn generation(&self) -> u64;
    /// Its path.
    fn path(&self) -> String;
    /// What can be asked of it now.
    fn actions(&self) -> Vec<String>;
    /// Whether all of its JSON is told apart by its version. Live figures are not.
    const VERSIONED_WHOLE: bool;
}

macro_rules! resources {
    ($($type:ty, $path:literal, $whole:literal, |$resource:ident| $actions:expr;)*) => {$(
        impl Resource for $type {
            const VERSIONED_WHOLE: bool = $whole;

            fn generation(&self) -> u64 {
                self.generation
            }

            fn path(&self) -> String {
                format!(concat!("/v1/", $path, "/{}"), self.id)
            }

            fn actions(&self) -> Vec<String> {
                let $resource = self;
                $actions
            }
        }
    )*};
}

resources! {
    Server, "servers", true, |server| server.allowed_actions.clone();
    Image, "images", true, |_image| Vec::new();
    // `used_bytes` moves with every write of the guest.
    Volume, "volumes", false, |_volume| Vec::new();
    Snapshot, "snapshots", true, |_snapshot| Vec::new();
    // `addresses_used` and `state` move with its servers and the host.
    Network, "networks", false, |_network| Vec::new();
    Operation, "operations", true, |_operation| Vec::new();
}

/// Answers a read of one resource, or 304 when the caller has this version.
pub(crate) fn one<T: Resource>(
    resource: &T,
    fields: Option<&str>,
    headers: &HeaderMap,
) -> Result<Response, Failure> {
    Ok(read(&written_one(resource, fields)?, headers))
}

/// Answers a list.
pub(crate) fn page<T: Serialize + PartialSchema>(
    page: &Page<T>,
    fields: Option<&Fields>,
) -> Result<Response, Failure> {
    Ok(read(&written_page(page, fields)?, &HeaderMap::new()))
}

/// Answers a read of `uri` with what was kept of it, or with what `write` makes of the records.
pub(crate) async fn kept(
    api: &Api,
    uri: &Uri,
    headers: &HeaderMap,
    write: impl Future<Output = Result<Written, Failure>>,
) -> Result<Response, Failure> {
    let path = uri.path_and_query().map_or(uri.path(), |both| both.as_str());
    let version = api.host.version();
    if let Some(written) = api.kept.find(version, path) {
        return Ok(read(&written, headers));
    }
    let written = write.await?;
    api.kept.keep(version, path, &written);
    Ok(read(&written, headers))
}

/// Writes one resource out.
pub(crate) fn written_one<T: Resource>(resource: &T, fields: Option<&str>) -> Result<Written, Failure> {
    let fields = Fields::of::<T>(fields)?;
    Ok(Written {
        body: project_one(resource, fields.as_ref()).map_err(unwritable)?,
        etag: Some(etag(resource)),
        is_versioned: T::VERSIONED_WHOLE,
    })
}

/// Writes a list out.
pub(crate) fn written_page<T: Serialize>(
    page: &Page<T>,
    fields: Option<&Fields>,
) -> Result<Written, Failure> {
    let body = project_page(page, fields).map_err(unwritable)?;
    Ok(Written { body, etag: None, is_versioned: false })
}

/// The answer to a read, or 304 when the caller has this version.
fn read(written: &Written, headers: &HeaderMap) -> Response {
    let had =
        written.etag.as_ref().filter(|_| written.is_versioned).is_some_and(|tag| has_already(headers, tag));
    let mut response = match had {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => sent(StatusCode::OK, written.body.clone()),
    };
    if let Some(tag) = &written.etag {
        response.headers_mut().insert(header::ETAG, tag.clone());
    }
    response
}

/// Answers with plain data.
pub(crate) fn plain<T: Serialize>(body: &T) -> Result<Response, Failure> {
    Ok(json(StatusCode::OK, &serde_json::to_value(body).map_err(unwritable)?))
}

/// Answers the creation of something that is no resource and lies at `location`.
pub(crate) fn made<T: Serialize>(answer: &Answer<T>, location: &str) -> Result<Response, Failure> {
    let mut response = json(StatusCode::CREATED, &serde_json::to_value(&answer.body).map_err(unwritable)?);
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, ascii(location));
    mark_replay(headers, answer.replayed);
    Ok(response)
}

/// Answers an action that is complete and has a result.
pub(crate) fn done<T: Serialize>(answer: &Answer<T>) -> Result<Response, Failure> {
    let mut response = json(StatusCode::OK, &serde_json::to_value(&answer.body).map_err(unwritable)?);
    mark_replay(response.headers_mut(), answer.replayed);
    Ok(response)
}

/// Answers what was decided for several resources; `waited` is the wait that was kept to.
pub(crate) fn decided<T: Serialize>(
    answer: &Answer<T>,
    status: StatusCode,
    waited: Option<Duration>,
) -> Result<Response, Failure> {
    let mut response = json(status, &serde_json::to_value(&answer.body).map_err(unwritable)?);
    let headers = response.headers_mut();
    if let Some(waited) = waited {
        headers.insert(PREFERENCE_APPLIED, ascii(&format!("wait={}", waited.as_secs())));
    }
    mark_replay(headers, answer.replayed);
    Ok(response)
}

/// For work that deletes: at its end there is no resource.
pub(crate) async fn gone<T>(_: T) -> Option<T> {
    None
}

/// Answers a change that is complete.
pub(crate) fn changed<T: Resource>(answer: &Answer<T>) -> Result<Response, Failure> {
    let mut response = json(StatusCode::OK, &serde_json::to_value(&answer.body).map_err(unwritable)?);
    let headers = response.headers_mut();
    headers.insert(header::ETAG, etag(&answer.body));
    mark_replay(headers, answer.replayed);
    Ok(response)
}

/// Answers the start of long work. With `wait`, answers its end if that comes in time: the status `ended` with
/// the resource as `fresh` reads it then, if it is still there, or the problem that the work ended with.
pub(crate) async fn accepted<T, F>(
    api: &Api,
    answer: Answer<Accepted<T>>,
    wait: Option<Duration>,
    ended: StatusCode,
    fresh: impl FnOnce(T) -> F,
) -> Result<Response, Failure>
where
    T: Resource,
    F: Future<Output = Option<T>>,
{
    let Answer { mut body, replayed } = answer;
    let id = body.operation.id;
    let mut status = StatusCode::ACCEPTED;
    let ended_in_time = match wait {
        // The change is made, so whatever is in the way of waiting must not look as if it were not.
        Some(wait) => api.wait_for(id, Some(wait)).await.ok().filter(|operation| operation.state.is_final()),
        None => None,
    };
    if let Some(operation) = ended_in_time {
        body.resource = match body.resource {
            Some(resource) => fresh(resource).await,
            None => None,
        };
        if operation.state != OperationState::Succeeded {
            return Err(end(operation, body.resource.map(|resource| resource.actions())));
        }
        body.operation = operation;
        status = ended;
    }
    let location = match &body.resource {
        Some(resource) if status == StatusCode::CREATED => resource.path(),
        _ => format!("/v1/operations/{id}"),
    };
    let mut response = json(status, &serde_json::to_value(&body).map_err(unwritable)?);
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, ascii(&location));
    if status != StatusCode::ACCEPTED
        && let Some(resource) = &body.resource
    {
        headers.insert(header::ETAG, etag(resource));
    }
    if let Some(wait) = wait.filter(|_| status != StatusCode::ACCEPTED) {
        headers.insert(PREFERENCE_APPLIED, ascii(&format!("wait={}", wait.as_secs())));
    }
    mark_replay(headers, replayed);
    Ok(response)
}

/// The failure that tells of an operation which ended badly; `actions` are what can be asked of its resource now.
fn end(operation: Operation, actions: Option<Vec<String>>) -> Failure {
    let id: OperationId = operation.id;
    match operation.error {
        Some(problem) => Failure::from_problem(*problem, id),
        None => Failure::new(Code::WrongState, format!("operation {id} was cancelled"))
            .actions(actions.unwrap_or_default())
            .operation(id),
    }
}

/// As [`accepted`], for what was sent with the request. It is all there, or the first request was answered with what was wrong: a
/// repeated one is, too.
pub(crate) async fn uploaded<T, F>(
    api: &Api,
    answer: Answer<Accepted<T>>,
    wait: Option<Duration>,
    fresh: impl FnOnce(T) -> F,
) -> Result<Response, Failure>
where
    T: Resource,
    F: Future<Output = Option<T>>,
{
    if answer.replayed
        && let Ok(operation) = api.wait_for(answer.body.operation.id, None).await
        && operation.state.is_final()
        && operation.state != OperationState::Succeeded
    {
        return Err(end(operation, Some(Vec::new())));
    }
    accepted(api, answer, wait, StatusCode::CREATED, fresh).await
}

/// Runs a change to its end even if the caller hangs up in the middle, so that what is committed is also acted
/// on. A panic in it is ours.
pub(crate) async fn undisturbed<T: Send + 'static>(
    change: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::spawn(change).await {
        Ok(result) => result,
        Err(ended) => {
            if let Ok(panic) = ended.try_into_panic() {
                tracing::error!(panic = panic_text(panic.as_ref()), "a change panicked");
            }
            Err(panicked())
        }
    }
}

/// A response with this JSON.
pub(crate) fn json(status: StatusCode, body: &Value) -> Response {
    sent(status, Bytes::from(body.to_string()))
}

fn sent(status: StatusCode, body: Bytes) -> Response {
    let mut response = (status, body).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn etag<T: Resource>(resource: &T) -> HeaderValue {
    ascii(&format!("\"{}\"", resource.generation()))
}

/// Whether If-None-Match names the tag; the comparison is the weak one (RFC 9110, section 13.1.2).
fn has_already(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let tag = tag.to_str().unwrap_or_default();
    headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').map(str::trim).any(|had| had == "*" || had.strip_prefix("W/").unwrap_or(had) == tag)
    })
}

fn mark_replay(headers: &mut HeaderMap, replayed: bool) {
    if replayed {
        headers.insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
}

/// Text that is made of digits, letters and punctuation by construction.
fn ascii(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

fn unwritable(cause: serde_json::Error) -> Failure {
    tracing::error!(%cause, "an answer cannot be written");
    panicked()
}
