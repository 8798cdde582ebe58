//! `/v1/networks`.
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use model::NetworkId;
use model::network::{CreateNetwork, Network, NetworkPlan, PatchNetwork};
use model::operation::Accepted;
use model::page::Page;

use crate::answer;
use crate::call::{Json, Mutation, Patch, Removable};
use crate::error::Failure;
use crate::page::Fields;
use crate::path::Id;
use crate::query::{CreateParameters, ListParameters, NoParameters, OneParameters, Query};
use crate::routes::Api;

/// Lists networks.
#[utoipa::path(get, path = "/v1/networks", tag = "networks", operation_id = "list_networks",
    params(ListParameters), responses((status = 200, description = "One page.", body = Page<Network>)))]
pub(crate) async fn list(
    State(api): State<Api>,
    Query(parameters): Query<ListParameters>,
) -> Result<Response, Failure> {
    let (query, fields) = parameters.checked()?;
    let fields = Fields::of::<Network>(fields.as_deref())?;
    answer::page(&api.host.networks().list(query).await?, fields.as_ref())
}

/// Creates a network.
#[utoipa::path(post, path = "/v1/networks", tag = "networks", operation_id = "create_network",
    params(CreateParameters), request_body = CreateNetwork,
    responses(
        (status = 200, description = "With `dry_run`: what would be made.", body = NetworkPlan),
        (status = 201, description = "With `Prefer: wait`: it is made.", body = Accepted<Network>),
        (status = 202, description = "It is being made.", body = Accepted<Network>),
    ))]
pub(crate) async fn create(
    State(api): State<Api>,
    Query(parameters): Query<CreateParameters>,
    Mutation { call, body: Json(spec), wait }: Mutation<Json<CreateNetwork>>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    if parameters.dry_run == Some(true) {
        return answer::plain(&host.networks().plan(spec).await?);
    }
    let made = answer::undisturbed(async move { Ok(host.networks().create(&call, spec).await?) }).await?;
    answer::accepted(&api, made, wait, StatusCode::CREATED, |network| fresh(&api, network)).await
}

/// Reads a network.
#[utoipa::path(get, path = "/v1/networks/{id}", tag = "networks", operation_id = "read_network",
    params(("id" = NetworkId, Path, description = "The network."), OneParameters),
    responses((status = 200, description = "The network.", body = Network)))]
pub(crate) async fn one(
    State(api): State<Api>,
    Id(id): Id<NetworkId>,
    Query(parameters): Query<OneParameters>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    answer::one(&api.host.networks().one(id).await?, parameters.fields.as_deref(), &headers)
}

impl Removable for PatchNetwork {
    const DEFAULTS: &'static [(&'static str, &'static str)] = &[];
}

/// Changes a network by an RFC 7396 merge patch: its name, its labels.
#[utoipa::path(patch, path = "/v1/networks/{id}", tag = "networks", operation_id = "update_network",
    params(("id" = NetworkId, Path, description = "The network.")),
    request_body(content((PatchNetwork = "application/merge-patch+json"), (PatchNetwork = "application/json"))),
    responses((status = 200, description = "The network as changed.", body = Network)))]
pub(crate) async fn patch(
    State(api): State<Api>,
    Id(id): Id<NetworkId>,
    _: Query<NoParameters>,
    Mutation { call, body: Patch(patch), .. }: Mutation<Patch<PatchNetwork>>,
) -> Result<Response, Failure> {
    let changed =
        answer::undisturbed(async move { Ok(api.host.networks().patch(&call, id, patch).await?) }).await?;
    answer::changed(&changed)
}

/// Deletes a network that no server is on.
#[utoipa::path(delete, path = "/v1/networks/{id}", tag = "networks", operation_id = "delete_network",
    params(("id" = NetworkId, Path, description = "The network.")),
    responses(
        (status = 200, description = "With `Prefer: wait`: it is deleted.", body = Accepted<Network>),
        (status = 202, description = "It is being deleted.", body = Accepted<Network>),
    ))]
pub(crate) async fn delete(
    State(api): State<Api>,
    Id(id): Id<NetworkId>,
    _: Query<NoParameters>,
    Mutation { call, wait, .. }: Mutation<()>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    let deleted = answer::undisturbed(async move { Ok(host.networks().delete(&call, id).await?) }).await?;
    answer::accepted(&api, deleted, wait, StatusCode::OK, answer::gone).await
}

/// The network as it is at the end of the work.
async fn fresh(api: &Api, network: Network) -> Option<Network> {
    api.host.networks().one(network.id).await.ok()
}
