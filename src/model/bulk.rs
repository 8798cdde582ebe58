//! What became of each server when many were asked at once.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::operation::Operation;
use crate::problem::Problem;
use crate::{Name, ServerId};

/// Answer to `POST /v1/servers/actions/{verb}`: what was decided for each server, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BulkActions {
    /// One item a server.
    pub items: Vec<BulkAction>,
}

/// What was decided for one server: it has an operation or a problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BulkAction {
    /// The server.
    pub server_id: ServerId,
    /// Its name.
    pub name: Name,
    /// What brings it about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<Operation>,
    /// Why it was refused, as the action on this server alone would be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}
