//! Errors as callers see them: RFC 9457 problem documents with a code for programs.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::OperationId;

macro_rules! codes {
    ($($(#[doc = $doc:literal])* $name:ident = $status:literal $title:literal;)*) => {
        /// What went wrong, for programs. Each has one HTTP status and one title, listed in `api/errors.md`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum Code {
            $($(#[doc = $doc])* $name,)*
        }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// The status of the response that carries it.
            pub fn status(self) -> u16 {
                match self { $(Code::$name => $status,)* }
            }

            /// One line for people, the same for every occurrence.
            pub fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)* }
            }

            /// What it means and what to do, as documented.
            pub fn meaning(self) -> &'static str {
                match self { $(Code::$name => concat!($($doc),*),)* }
            }
        }
    };
}

codes! {
    /// The request is not well-formed HTTP or JSON, or a query parameter is not valid. Correct it.
    InvalidRequest = 400 "The request cannot be read";
    /// No token, or one that is unknown, expired or revoked. Send `Authorization: Bearer <token>`.
    Unauthenticated = 401 "Authentication is needed";
    /// The caller is known but may not do this.
    Forbidden = 403 "Not allowed";
    /// There is no such resource, or it is not the caller's.
    NotFound = 404 "Not found";
    /// The path exists but not with this method; see the `Allow` header.
    MethodNotAllowed = 405 "Method not allowed";
    /// Long-polling or streaming ended without what was waited for. Ask again.
    Timeout = 408 "Timed out";
    /// The resource is not in a state that allows this; `allowed_actions` says what is.
    WrongState = 409 "Wrong state";
    /// A resource of this kind with this name or `external_ref` exists.
    AlreadyExists = 409 "Already exists";
    /// Something is in the way of moving the server; `errors` names each thing. Mend it, or choose another target.
    MigrationBlocked = 409 "The server cannot move";
    /// Something else uses the resource; `detail` names it.
    InUse = 409 "In use";
    /// A request with the same idempotency key is being carried out. Ask again.
    IdempotencyRunning = 409 "The same request is being carried out";
    /// The event cursor is older than the log. List the resources and follow from `watch_cursor`.
    CursorExpired = 410 "The cursor is too old";
    /// `If-Match` names another version. Read the resource and try again.
    StaleEtag = 412 "The resource has changed";
    /// The body is longer than allowed.
    BodyTooLarge = 413 "The body is too large";
    /// The body's `Content-Type` is not one this path takes.
    UnsupportedMediaType = 415 "Unsupported content type";
    /// Values are not valid; `errors` names each field.
    Invalid = 422 "Values are not valid";
    /// The idempotency key was used with another request. Choose a new key.
    IdempotencyMismatch = 422 "The idempotency key belongs to another request";
    /// An image is damaged or not what it says; nothing of it was kept.
    ImageCorrupt = 422 "The image is damaged";
    /// A snapshot that was sent is damaged or not what it says; nothing of it was kept.
    SnapshotCorrupt = 422 "The snapshot is damaged";
    /// Too many requests, streams or readers at once. Wait as `Retry-After` says.
    TooMany = 429 "Too many at once";
    /// A bug of ours. The daemon's log has the `request_id`.
    Internal = 500 "Internal error";
    /// The VMM refused or died; `detail` has its words.
    MachineFailed = 502 "The machine failed";
    /// Another host cannot be reached, does not speak the same protocol, or broke off; `detail` says which.
    HostUnreachable = 502 "The other host cannot be reached";
    /// The daemon is shutting down or starting. Try again.
    Draining = 503 "Not ready";
    /// KVM is missing, not permitted or not able; `detail` says what to do.
    KvmUnavailable = 503 "KVM is not available";
    /// The daemon lacks a privilege or a program that this needs; `detail` says which.
    HostUnprepared = 503 "The host is not prepared";
    /// The host's memory or CPUs do not suffice. Delete or stop servers, or ask for less.
    NoCapacity = 507 "No capacity left";
    /// The host's disk is full. Delete volumes or images, or add space.
    DiskFull = 507 "The disk is full";
    /// The network has no free address. Delete servers or make a larger network.
    NoAddress = 507 "No address left";
}

impl Code {
    /// Whether the same request may work later without being changed.
    pub fn retryable(self) -> bool {
        matches!(
            self,
            Code::Timeout
                | Code::IdempotencyRunning
                | Code::TooMany
                | Code::Internal
                | Code::MachineFailed
                | Code::HostUnreachable
                | Code::Draining
                | Code::NoCapacity
                | Code::DiskFull
                | Code::NoAddress
        )
    }

    /// The code as it stands in JSON.
    pub fn as_str(self) -> String {
        serde_json::to_value(self).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// One field that is not valid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// JSON pointer into the body, or the name of a query parameter or header.
    pub pointer: String,
    /// Kind of mistake, lower snake.
    pub code: String,
    /// What is wrong and what would be right.
    pub detail: String,
}

/// A problem document (RFC 9457), `application/problem+json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// URI reference of the documentation of `code`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code's title.
    pub title: String,
    /// The response's status.
    pub status: u16,
    /// What happened this time and what to do.
    pub detail: String,
    /// Path of the request.
    pub instance: String,
    /// For programs.
    pub code: Code,
    /// Names this request in the daemon's log.
    pub request_id: String,
    /// Whether the same request may work later.
    pub retryable: bool,
    /// Fields that are not valid.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// With `wrong_state`, and then always: what can be done now with the resource, or with the server that is in
    /// the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_actions: Option<Vec<String>>,
    /// The operation that is in the way, or that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
}
