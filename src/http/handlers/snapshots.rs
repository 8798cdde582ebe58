//! `/v1/snapshots`, and the action on a server that takes one.
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::Response;
use model::operation::Accepted;
use model::page::Page;
use model::snapshot::{CreateSnapshot, PatchSnapshot, Snapshot};
use model::{ServerId, SnapshotId};

use crate::answer;
use crate::call::{Mutation, Optional, Patch, Removable};
use crate::error::Failure;
use crate::page::Fields;
use crate::path::Id;
use crate::query::{ListParameters, NoParameters, OneParameters, Query};
use crate::routes::Api;

/// Takes a snapshot of a server: of its disks, and with `memory` of its memory at the same moment. A server that runs
/// stands still while its disks are copied, for no more than some milliseconds where the file system can share blocks;
/// `paused_ms` of the snapshot says how long it was.
#[utoipa::path(post, path = "/v1/servers/{id}/actions/snapshot", tag = "snapshots",
    operation_id = "snapshot_server",
    params(("id" = ServerId, Path, description = "The server.")),
    request_body = Option<CreateSnapshot>,
    responses(
        (status = 201, description = "With `Prefer: wait`: it is taken.", body = Accepted<Snapshot>),
        (status = 202, description = "It is being taken.", body = Accepted<Snapshot>),
    ))]
pub(crate) async fn take(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
    Mutation { call, body: Optional(spec), wait }: Mutation<Optional<CreateSnapshot>>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    let taken =
        answer::undisturbed(async move { Ok(host.servers().snapshot(&call, id, spec).await?) }).await?;
    answer::accepted(&api, taken, wait, StatusCode::CREATED, |snapshot| fresh(&api, snapshot)).await
}

/// Lists snapshots.
#[utoipa::path(get, path = "/v1/snapshots", tag = "snapshots", operation_id = "list_snapshots",
    params(ListParameters),
    responses((status = 200, description = "One page.", body = Page<Snapshot>)))]
pub(crate) async fn list(
    State(api): State<Api>,
    Query(parameters): Query<ListParameters>,
) -> Result<Response, Failure> {
    let (query, fields) = parameters.checked()?;
    let fields = Fields::of::<Snapshot>(fields.as_deref())?;
    answer::page(&api.host.snapshots().list(query).await?, fields.as_ref())
}

/// Reads a snapshot.
#[utoipa::path(get, path = "/v1/snapshots/{id}", tag = "snapshots", operation_id = "read_snapshot",
    params(("id" = SnapshotId, Path, description = "The snapshot."), OneParameters),
    responses((status = 200, description = "The snapshot.", body = Snapshot)))]
pub(crate) async fn one(
    State(api): State<Api>,
    uri: Uri,
    Id(id): Id<SnapshotId>,
    Query(parameters): Query<OneParameters>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let write =
        async { answer::written_one(&api.host.snapshots().one(id).await?, parameters.fields.as_deref()) };
    answer::kept(&api, &uri, &headers, write).await
}

impl Removable for PatchSnapshot {
    const DEFAULTS: &'static [(&'static str, &'static str)] =
        &[("description", "\"\""), ("expires_at", "null")];
}

/// Changes a snapshot by an RFC 7396 merge patch: its name, words, labels and expiry.
#[utoipa::path(patch, path = "/v1/snapshots/{id}", tag = "snapshots", operation_id = "update_snapshot",
    params(("id" = SnapshotId, Path, description = "The snapshot.")),
    request_body(content((PatchSnapshot = "application/merge-patch+json"), (PatchSnapshot = "application/json"))),
    responses((status = 200, description = "The snapshot as changed.", body = Snapshot)))]
pub(crate) async fn patch(
    State(api): State<Api>,
    Id(id): Id<SnapshotId>,
    _: Query<NoParameters>,
    Mutation { call, body: Patch(patch), .. }: Mutation<Patch<PatchSnapshot>>,
) -> Result<Response, Failure> {
    let changed =
        answer::undisturbed(async move { Ok(api.host.snapshots().patch(&call, id, patch).await?) }).await?;
    answer::changed(&changed)
}

/// Deletes a snapshot.
#[utoipa::path(delete, path = "/v1/snapshots/{id}", tag = "snapshots", operation_id = "delete_snapshot",
    params(("id" = SnapshotId, Path, description = "The snapshot.")),
    responses(
        (status = 200, description = "With `Prefer: wait`: it is deleted.", body = Accepted<Snapshot>),
        (status = 202, description = "It is being deleted.", body = Accepted<Snapshot>),
    ))]
pub(crate) async fn delete(
    State(api): State<Api>,
    Id(id): Id<SnapshotId>,
    _: Query<NoParameters>,
    Mutation { call, wait, .. }: Mutation<()>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    let deleted = answer::undisturbed(async move { Ok(host.snapshots().delete(&call, id).await?) }).await?;
    answer::accepted(&api, deleted, wait, StatusCode::OK, answer::gone).await
}

/// The snapshot as it is at the end of the work.
async fn fresh(api: &Api, snapshot: Snapshot) -> Option<Snapshot> {
    api.host.snapshots().one(snapshot.id).await.ok()
}
