//! What a request ends with when it does not succeed. A `Failure` says what happened; `edge` writes it out as a
//! problem document, because only there the request's path and id are known. Every handler returns it.
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use model::{Code, FieldError, OperationId, Problem};

use crate::limits::{DETAIL_CHARS_MAX, FIELD_ERRORS_MAX, RETRY_AFTER_S};

/// Path that documents the codes; a problem's `type` is this with the code as its fragment.
pub(crate) const DOCUMENTATION: &str = "/errors";

/// A request's failure, before it is written out.
#[derive(Debug, Clone)]
pub(crate) struct Failure(Box<Parts>);

#[derive(Debug, Clone)]
struct Parts {
    code: Code,
    detail: String,
    errors: Vec<FieldError>,
    allowed_actions: Option<Vec<String>>,
    operation_id: Option<OperationId>,
    header: Option<(HeaderName, HeaderValue)>,
    /// The chain of causes, for the log alone.
    cause: Option<String>,
}

impl Failure {
    /// A failure with this code; `detail` says what happened and what to do.
    pub(crate) fn new(code: Code, detail: impl Into<String>) -> Failure {
        Failure(Box::new(Parts {
            code,
            detail: shortened(detail.into()),
            errors: Vec::new(),
            // Nothing, unless `actions` knows better.
            allowed_actions: (code == Code::WrongState).then(Vec::new),
            operation_id: None,
            header: None,
            cause: None,
        }))
    }

    /// A query parameter, header or path segment that is not valid.
    pub(crate) fn parameter(name: &str, kind: &str, detail: impl Into<String>) -> Failure {
        let detail = detail.into();
        Failure::new(Code::InvalidRequest, format!("{name}: {detail}")).field(name, kind, detail)
    }

    /// Names a field that is not valid.
    pub(crate) fn field(mut self, pointer: &str, kind: &str, detail: impl Into<String>) -> Failure {
        if self.0.errors.len() < FIELD_ERRORS_MAX {
            self.0.errors.push(FieldError {
                pointer: shortened(pointer.to_owned()),
                code: kind.to_owned(),
                detail: shortened(detail.into()),
            });
        }
        self
    }

    /// Adds a header to the response.
    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Failure {
        self.0.header = Some((name, value));
        self
    }

    /// Says what can be done now instead; with `wrong_state`.
    pub(crate) fn actions(mut self, allowed_actions: Vec<String>) -> Failure {
        self.0.allowed_actions = Some(allowed_actions);
        self
    }

    /// Names the operation that is in the way, or that failed.
    pub(crate) fn operation(mut self, id: OperationId) -> Failure {
        self.0.operation_id = Some(id);
        self
    }

    /// The failure that a stored problem tells of, such as that of an operation which the request waited for.
    pub(crate) fn from_problem(problem: Problem, operation_id: OperationId) -> Failure {
        Failure(Box::new(Parts {
            code: problem.code,
            detail: problem.detail,
            errors: problem.errors,
            allowed_actions: problem.allowed_actions,
            operation_id: Some(operation_id),
            header: None,
            cause: None,
        }))
    }

    /// What went wrong, for programs.
    pub(crate) fn code(&self) -> Code {
        self.0.code
    }

    /// The sentence with every cause, for the log.
    pub(crate) fn chain(&self) -> &str {
        self.0.cause.as_deref().unwrap_or(&self.0.detail)
    }

    /// The problem document for the request of this path and id.
    pub(crate) fn problem(&self, instance: &str, request_id: &str) -> Problem {
        let code = self.0.code;
        Problem {
            kind: format!("{DOCUMENTATION}#{}", code.as_str()),
            title: code.title().to_owned(),
            status: code.status(),
            detail: self.0.detail.clone(),
            instance: instance.to_owned(),
            code,
            request_id: request_id.to_owned(),
            retryable: code.retryable(),
            errors: self.0.errors.clone(),
            allowed_actions: self.0.allowed_actions.clone(),
            operation_id: self.0.operation_id,
        }
    }

    /// The response with its problem document.
    pub(crate) fn written(&self, instance: &str, request_id: &str) -> Response {
        let problem = self.problem(instance, request_id);
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some((name, value)) = &self.0.header {
            headers.insert(name.clone(), value.clone());
        }
        if matches!(status.as_u16(), 429 | 503) && problem.retryable {
            headers.entry(header::RETRY_AFTER).or_insert(HeaderValue::from(RETRY_AFTER_S));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"toft\""));
        }
        response
    }
}

/// Cuts what is too long to be read.
fn shortened(mut text: String) -> String {
    if let Some((at, _)) = text.char_indices().nth(DETAIL_CHARS_MAX) {
        text.truncate(at);
        text.push('…');
    }
    text
}

impl IntoResponse for Failure {
    /// A response that carries the failure for `edge` to write out.
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code().status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<host::Error> for Failure {
    fn from(error: host::Error) -> Failure {
        let cause = Some(error.chain());
        Failure(Box::new(Parts {
            code: error.code,
            detail: shortened(error.detail),
            errors: error.errors,
            allowed_actions: error.allowed_actions,
            operation_id: error.operation_id,
            header: None,
            cause,
        }))
    }
}

impl From<StatusCode> for Failure {
    /// For responses that something below the handlers made: the router, or an extractor of axum.
    fn from(status: StatusCode) -> Failure {
        match status {
            StatusCode::NOT_FOUND => Failure::new(
                Code::NotFound,
                "there is nothing at this path; GET /v1/openapi.json lists all paths",
            ),
            StatusCode::METHOD_NOT_ALLOWED => Failure::new(
                Code::MethodNotAllowed,
                "this path does not take this method; the Allow header lists those it takes",
            ),
            StatusCode::PAYLOAD_TOO_LARGE => {
                Failure::new(Code::BodyTooLarge, "the body is too long for this path")
            }
            StatusCode::UNSUPPORTED_MEDIA_TYPE => {
                Failure::new(Code::UnsupportedMediaType, "send the body as application/json")
            }
            StatusCode::UNAUTHORIZED => {
                Failure::new(Code::Unauthenticated, "send Authorization: Bearer <token>")
            }
            StatusCode::FORBIDDEN => Failure::new(Code::Forbidden, "this caller may not do this"),
            StatusCode::REQUEST_TIMEOUT => Failure::new(Code::Timeout, "the request took too long to arrive"),
            status if status.is_client_error() => {
                Failure::new(Code::InvalidRequest, "the request is not valid HTTP for this path")
            }
            _ => Failure::new(
                Code::Internal,
                "an error of ours; the daemon's log has more under this request_id",
            ),
        }
    }
}
