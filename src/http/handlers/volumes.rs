//! `/v1/volumes`.
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use model::VolumeId;
use model::operation::Accepted;
use model::page::Page;
use model::volume::{PatchVolume, Volume};

use crate::answer;
use crate::call::{Mutation, Patch, Removable};
use crate::error::Failure;
use crate::page::Fields;
use crate::path::Id;
use crate::query::{ListParameters, NoParameters, OneParameters, Query};
use crate::routes::Api;

/// Lists volumes.
#[utoipa::path(get, path = "/v1/volumes", tag = "volumes", operation_id = "list_volumes", params(ListParameters),
    responses((status = 200, description = "One page.", body = Page<Volume>)))]
pub(crate) async fn list(
    State(api): State<Api>,
    Query(parameters): Query<ListParameters>,
) -> Result<Response, Failure> {
    let (query, fields) = parameters.checked()?;
    let fields = Fields::of::<Volume>(fields.as_deref())?;
    answer::page(&api.host.volumes().list(query).await?, fields.as_ref())
}

/// Reads a volume.
#[utoipa::path(get, path = "/v1/volumes/{id}", tag = "volumes", operation_id = "read_volume",
    params(("id" = VolumeId, Path, description = "The volume."), OneParameters),
    responses((status = 200, description = "The volume.", body = Volume)))]
pub(crate) async fn one(
    State(api): State<Api>,
    Id(id): Id<VolumeId>,
    Query(parameters): Query<OneParameters>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    answer::one(&api.host.volumes().one(id).await?, parameters.fields.as_deref(), &headers)
}

impl Removable for PatchVolume {
    const DEFAULTS: &'static [(&'static str, &'static str)] = &[];
}

/// Changes a volume by an RFC 7396 merge patch: its name, its labels, a larger size.
#[utoipa::path(patch, path = "/v1/volumes/{id}", tag = "volumes", operation_id = "update_volume",
    params(("id" = VolumeId, Path, description = "The volume.")),
    request_body(content((PatchVolume = "application/merge-patch+json"), (PatchVolume = "application/json"))),
    responses((status = 200, description = "The volume as changed.", body = Volume)))]
pub(crate) async fn patch(
    State(api): State<Api>,
    Id(id): Id<VolumeId>,
    _: Query<NoParameters>,
    Mutation { call, body: Patch(patch), .. }: Mutation<Patch<PatchVolume>>,
) -> Result<Response, Failure> {
    let changed =
        answer::undisturbed(async move { Ok(api.host.volumes().patch(&call, id, patch).await?) }).await?;
    answer::changed(&changed)
}

/// Deletes a volume that belongs to no server.
#[utoipa::path(delete, path = "/v1/volumes/{id}", tag = "volumes", operation_id = "delete_volume",
    params(("id" = VolumeId, Path, description = "The volume.")),
    responses(
        (status = 200, description = "With `Prefer: wait`: it is deleted.", body = Accepted<Volume>),
        (status = 202, description = "It is being deleted.", body = Accepted<Volume>),
    ))]
pub(crate) async fn delete(
    State(api): State<Api>,
    Id(id): Id<VolumeId>,
    _: Query<NoParameters>,
    Mutation { call, wait, .. }: Mutation<()>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    let deleted = answer::undisturbed(async move { Ok(host.volumes().delete(&call, id).await?) }).await?;
    answer::accepted(&api, deleted, wait, StatusCode::OK, answer::gone).await
}
