//! The outermost layer of every request: gives it an id, contains panics, writes failures out as problem
//! documents and logs one line. Knows no path. `serve` puts it around the router.
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use model::Code;
use uuid::Uuid;

use crate::error::Failure;

/// Carries the id of the request, in every response.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Names a request in responses and in the log.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) String);

/// Runs the request and finishes its response.
pub(crate) async fn around(mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let request_id = Uuid::now_v7().simple().to_string();
    let method = request.method().clone();
    // Without its query, which may hold a console's token.
    let path = request.uri().path().to_owned();
    request.extensions_mut().insert(RequestId(request_id.clone()));
    let mut response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(panic) => {
            tracing::error!(request_id, %method, path, panic = panic_text(panic.as_ref()), "a handler panicked");
            panicked().into_response()
        }
    };
    let status = response.status();
    let failure = response.extensions_mut().remove::<Failure>();
    if status.is_client_error() || status.is_server_error() {
        let failure = failure.unwrap_or_else(|| Failure::from(status));
        let (code, cause) = (failure.code().as_str(), failure.chain());
        match status.as_u16() {
            500 => tracing::error!(request_id, %method, path, code, cause, "failed"),
            501.. => tracing::warn!(request_id, %method, path, code, cause, "failed"),
            _ => tracing::debug!(request_id, %method, path, code, cause, "refused"),
        }
        let allow = response.headers_mut().remove(header::ALLOW);
        response = failure.written(&path, &request_id);
        if let Some(allow) = allow {
            response.headers_mut().insert(header::ALLOW, allow);
        }
    }
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let headers = response.headers_mut();
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    // Reads change nothing, are many, and a line for each costs more than a read.
    let status = response.status();
    if method.is_safe() && status.is_success() {
        tracing::debug!(request_id, %method, path, status = status.as_u16(), elapsed_ms, "answered");
    } else {
        tracing::info!(request_id, %method, path, status = status.as_u16(), elapsed_ms, "answered");
    }
    response
}

/// The failure that a caller sees for a panic: nothing of its text, which may hold anything.
pub(crate) fn panicked() -> Failure {
    Failure::new(Code::Internal, "an error of ours; the daemon's log has more under this request_id")
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without words")
}
