//! `/v1/operations`.
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use model::OperationId;
use model::operation::Operation;
use model::page::Page;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::answer;
use crate::call::Mutation;
use crate::error::Failure;
use crate::page::Fields;
use crate::path::Id;
use crate::query::{self, HistoryParameters, NoParameters, Query};
use crate::routes::Api;

/// Lists operations.
#[utoipa::path(get, path = "/v1/operations", tag = "operations", operation_id = "list_operations",
    params(HistoryParameters), responses((status = 200, description = "One page.", body = Page<Operation>)))]
pub(crate) async fn list(
    State(api): State<Api>,
    Query(parameters): Query<HistoryParameters>,
) -> Result<Response, Failure> {
    let (query, fields) = parameters.checked()?;
    let fields = Fields::of::<Operation>(fields.as_deref())?;
    answer::page(&api.host.operations().list(query).await?, fields.as_ref())
}

/// How to read an operation.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WaitParameters {
    /// Answer when the operation has ended, or after so many seconds: `0s` to `60s`.
    #[param(pattern = "^([0-9]|[1-5][0-9]|60)s$", example = "30s")]
    wait: Option<String>,
    /// Comma-separated names of the top-level fields to answer with.
    #[param(pattern = "^[a-z0-9_]+(,[a-z0-9_]+)*$")]
    fields: Option<String>,
}

/// Reads an operation, waiting for its end where asked to.
#[utoipa::path(get, path = "/v1/operations/{id}", tag = "operations", operation_id = "read_operation",
    params(("id" = OperationId, Path, description = "The operation."), WaitParameters),
    responses((status = 200, description = "The operation.", body = Operation)))]
pub(crate) async fn one(
    State(api): State<Api>,
    Id(id): Id<OperationId>,
    Query(parameters): Query<WaitParameters>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let wait = parameters.wait.as_deref().map(query::wait).transpose()?;
    answer::one(&api.wait_for(id, wait).await?, parameters.fields.as_deref(), &headers)
}

/// Asks an operation to end; what it had begun is undone.
#[utoipa::path(delete, path = "/v1/operations/{id}", tag = "operations", operation_id = "cancel_operation",
    params(("id" = OperationId, Path, description = "The operation.")),
    responses((status = 200, description = "The operation, which ends soon.", body = Operation)))]
pub(crate) async fn cancel(
    State(api): State<Api>,
    Id(id): Id<OperationId>,
    _: Query<NoParameters>,
    Mutation { call, .. }: Mutation<()>,
) -> Result<Response, Failure> {
    let asked =
        answer::undisturbed(async move { Ok(api.host.operations().cancel(&call, id).await?) }).await?;
    answer::changed(&asked)
}
