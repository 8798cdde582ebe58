//! The event log: one order for everything that happens, with the field names of CloudEvents 1.0.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::{EventId, OperationId};
use crate::operation::Resource;
use crate::time::Time;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Version of CloudEvents: `1.0`.
    pub specversion: String,
    /// Position in the log; send the last one read as `Last-Event-ID`.
    pub id: EventId,
    /// The host's identity as a URN.
    pub source: String,
    /// What happened, such as `server.state_changed`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Path of the resource, such as `/v1/servers/{id}`.
    pub subject: String,
    /// When.
    pub time: Time,
    /// Details by type.
    pub data: EventData,
}

/// Details of an event.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventData {
    /// What it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<Resource>,
    /// Version of the resource after the event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// State of the resource after the event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The operation that caused it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    /// Who caused it: `local:<uid>`, `token:<id>`, `guest` or `host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
}
