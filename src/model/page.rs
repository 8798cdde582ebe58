//! Lists: a page of items and where the next one starts. Never page numbers.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::{EventId, ServerId};

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The items, in the order asked for.
    pub items: Vec<T>,
    /// Send it as `cursor` to read on; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
    /// Follow events after this position to hear of every change since the page was made.
    pub watch_cursor: EventId,
}

/// What a list is asked for. `host` checks it; unset fields take their defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListQuery {
    /// Most items, 1 to [`crate::limits::PAGE_ITEMS_MAX`].
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    pub cursor: Option<String>,
    /// Order.
    pub sort: Sort,
    /// Only the resource of this name.
    pub name: Option<String>,
    /// Comma-separated terms that must all hold: `key=value`, `key!=value`, `key`, `!key`.
    pub label_selector: Option<String>,
    /// Only the server with this reference.
    pub external_ref: Option<String>,
    /// Only operations on the resource of this id.
    pub resource_id: Option<uuid::Uuid>,
    /// Only snapshots of this server.
    pub server_id: Option<ServerId>,
}

/// Order of a list. Ties cannot occur: ids and names are unique.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    /// Oldest first.
    #[default]
    CreatedAt,
    /// Newest first.
    #[serde(rename = "-created_at")]
    CreatedAtDescending,
    /// By name.
    Name,
    /// By name, backwards.
    #[serde(rename = "-name")]
    NameDescending,
}
