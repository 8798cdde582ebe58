//! Consoles: tickets to them, and who has one open.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::ConsoleReaderId;
use crate::time::Time;

/// Body of `POST /v1/servers/{id}/console-tokens`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateConsoleToken {
    /// Whether the holder may only look.
    #[serde(default)]
    pub read_only: bool,
    /// Position to replay from; everything still held when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
}

/// Someone who has a server's console open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleReader {
    /// Names it as long as it reads.
    pub id: ConsoleReaderId,
    /// Whether it may only look.
    pub read_only: bool,
    /// Who made the ticket that it came with, as in events: `local:{uid}` or `token:{id}`.
    pub opened_by: String,
    /// When it came.
    pub opened_at: Time,
}

/// Everyone who has a server's console open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleReaders {
    /// In the order they came.
    pub items: Vec<ConsoleReader>,
}

/// A one-use ticket to the console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleToken {
    /// Path and query of the WebSocket; prefix it with the API's scheme and host.
    pub url: String,
    /// After this it is worth nothing.
    pub expires_at: Time,
}
