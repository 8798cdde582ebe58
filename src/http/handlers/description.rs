//! What the API says of itself: version and health, its OpenAPI document, its error codes.
use std::sync::LazyLock;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use model::host::About;

use crate::answer;
use crate::document;
use crate::error::Failure;
use crate::query::{NoParameters, Query};
use crate::routes::Api;

/// Version, capabilities and health.
#[utoipa::path(get, path = "/v1", tag = "host", operation_id = "about",
    responses((status = 200, description = "What this daemon is and how it does.", body = About)))]
pub(crate) async fn about(State(api): State<Api>, _: Query<NoParameters>) -> Result<Response, Failure> {
    answer::plain(&api.host.about().await?)
}

/// This API as an OpenAPI 3.1 document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "host", operation_id = "openapi",
    responses((status = 200, description = "The document.", body = serde_json::Value)))]
pub(crate) async fn openapi(_: Query<NoParameters>) -> Response {
    static TEXT: LazyLock<String> = LazyLock::new(document::openapi_json);
    text(TEXT.as_str(), "application/json")
}

/// The error codes, with what each means and what to do.
#[utoipa::path(get, path = "/errors", tag = "host", operation_id = "errors",
    responses((status = 200, description = "A table in Markdown.", body = String, content_type = "text/markdown")))]
pub(crate) async fn errors(_: Query<NoParameters>) -> Response {
    static TEXT: LazyLock<String> = LazyLock::new(document::errors_markdown);
    text(TEXT.as_str(), "text/markdown; charset=utf-8")
}

/// What every unknown path answers.
pub(crate) async fn nothing() -> Failure {
    Failure::from(StatusCode::NOT_FOUND)
}

fn text(body: &'static str, content_type: &'static str) -> Response {
    let mut response = body.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
