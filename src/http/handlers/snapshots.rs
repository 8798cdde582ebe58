//! `/v1/snapshots`, and the action on a server that takes one.
use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::unfold;
use host::snapshots::Export;
use model::operation::Accepted;
use model::page::Page;
use model::server::BulkActions;
use model::snapshot::{CreateClones, CreateSnapshot, ImportSnapshot, PatchSnapshot, Snapshot};
use model::{Name, ServerId, SnapshotId};
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use utoipa::IntoParams;

use super::bulk;
use crate::answer;
use crate::body;
use crate::call::{Head, Json, Mutation, Optional, Patch, Removable};
use crate::closing::Closing;
use crate::error::Failure;
use crate::page::Fields;
use crate::path::Id;
use crate::query::{NoParameters, OneParameters, Query, SnapshotListParameters};
use crate::routes::{Api, Slot};
use crate::upload::{self, Upload};

/// What an exported snapshot is called on the wire.
const STREAM: &str = "application/octet-stream";

/// Takes a snapshot of a server: of its disks, and with `memory` of its memory at the same moment. A server that runs
/// stands still for a few milliseconds; where the file system shares no blocks its disks are copied while it runs on.
/// `paused_ms` of the snapshot says how long it was. With `incremental` it holds only what is new since the last one.
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

/// Makes servers that go on from where a snapshot with memory was taken: each has a disk, hardware addresses, addresses
/// and a name of its own, and shares the snapshot's memory until it writes. All are recorded in one transaction: when one
/// cannot be made, none is. `identity` of each says whether its guest knows that it is another.
#[utoipa::path(post, path = "/v1/snapshots/{id}/actions/clone", tag = "snapshots",
    operation_id = "clone_snapshot",
    params(("id" = SnapshotId, Path, description = "The snapshot.")),
    request_body = CreateClones,
    responses(
        (status = 200, description = "With `Prefer: wait`: every operation has ended.", body = BulkActions),
        (status = 202, description = "The operation that makes each server.", body = BulkActions),
    ))]
pub(crate) async fn clone(
    State(api): State<Api>,
    Id(id): Id<SnapshotId>,
    _: Query<NoParameters>,
    Mutation { call, body: Json(spec), wait }: Mutation<Json<CreateClones>>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    let made =
        answer::undisturbed(async move { Ok(host.servers().clone_snapshot(&call, id, spec).await?) }).await?;
    bulk::answered(&api, made, wait).await
}

/// Makes servers that go on from what a server is now, memory and disk. A snapshot is taken of it, which is deleted when
/// nobody needs it any more; the server runs on, and its new ones are made when it is there. All are recorded in one
/// transaction with it.
#[utoipa::path(post, path = "/v1/servers/{id}/actions/clone", tag = "snapshots",
    operation_id = "clone_server",
    params(("id" = ServerId, Path, description = "The server.")),
    request_body = CreateClones,
    responses(
        (status = 200, description = "With `Prefer: wait`: every operation has ended.", body = BulkActions),
        (status = 202, description = "The operation that makes each server.", body = BulkActions),
    ))]
pub(crate) async fn clone_server(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
    Mutation { call, body: Json(spec), wait }: Mutation<Json<CreateClones>>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    let made =
        answer::undisturbed(async move { Ok(host.servers().clone_server(&call, id, spec).await?) }).await?;
    bulk::answered(&api, made, wait).await
}

/// Lists snapshots.
#[utoipa::path(get, path = "/v1/snapshots", tag = "snapshots", operation_id = "list_snapshots",
    params(SnapshotListParameters),
    responses((status = 200, description = "One page.", body = Page<Snapshot>)))]
pub(crate) async fn list(
    State(api): State<Api>,
    Query(parameters): Query<SnapshotListParameters>,
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

/// Reads a snapshot as one stream: its disks, its memory, and what its server was given, keys and user data too. To take it
/// in elsewhere its image is needed there, and with memory a network of the same name for each of its interfaces. A stream that breaks off before its `Content-Length` is worthless.
#[utoipa::path(get, path = "/v1/snapshots/{id}/export", tag = "snapshots", operation_id = "export_snapshot",
    params(("id" = SnapshotId, Path, description = "The snapshot.")),
    responses((status = 200, description = "The stream.", body = Vec<u8>,
        content_type = "application/octet-stream")))]
pub(crate) async fn export(
    State(api): State<Api>,
    Id(id): Id<SnapshotId>,
    _: Query<NoParameters>,
) -> Result<Response, Failure> {
    let place = api.take(Slot::Export)?;
    let export = api.host.snapshots().export(id).await?;
    let disposition = format!("attachment; filename=\"{}.toftsnap\"", export.name);
    let length = export.bytes;
    let state = Some(Sending { export, closing: api.closing.clone(), _place: place });
    let body = Body::from_stream(unfold(state, |state| async move { state?.next().await }));
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(STREAM));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    if let Ok(disposition) = HeaderValue::from_str(&disposition) {
        headers.insert(header::CONTENT_DISPOSITION, disposition);
    }
    Ok(response)
}

/// An export on its way to a caller.
struct Sending {
    export: Export,
    closing: Closing,
    _place: OwnedSemaphorePermit,
}

impl Sending {
    async fn next(mut self) -> Option<(std::io::Result<Bytes>, Option<Sending>)> {
        tokio::select! {
            biased;
            () = self.closing.ordered() => {
                Some((Err(std::io::Error::other("the daemon is shutting down")), None))
            }
            piece = self.export.next() => match piece? {
                Ok(piece) => Some((Ok(Bytes::from(piece)), Some(self))),
                Err(cause) => Some((Err(cause), None)),
            },
        }
    }
}

/// What a snapshot that is sent is to be called.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ImportParameters {
    /// Unique name; the one that it was exported under when absent.
    #[param(inline)]
    name: Option<Name>,
}

/// Takes in a snapshot: the stream that an export gave, of this host or another. The image its server boots from must be
/// here, and with memory a network of the same name for each of its interfaces.
#[utoipa::path(post, path = "/v1/snapshots", tag = "snapshots", operation_id = "import_snapshot",
    params(ImportParameters), request_body(content((Vec<u8> = "application/octet-stream"))),
    responses(
        (status = 201, description = "With `Prefer: wait`: it is ready.", body = Accepted<Snapshot>),
        (status = 202, description = "It has come in.", body = Accepted<Snapshot>),
    ))]
pub(crate) async fn import(
    State(api): State<Api>,
    Query(parameters): Query<ImportParameters>,
    request: Request,
) -> Result<Response, Failure> {
    body::expect_type(request.headers(), &[STREAM])?;
    let (mut parts, body) = request.into_parts();
    let Head { call, wait } = Head::from_request_parts(&mut parts, &()).await?;
    upload::check_length(&parts.headers)?;
    let place = api.take(Slot::Upload)?;
    let spec = ImportSnapshot { name: parameters.name };
    let host = api.host.clone();
    let begun = answer::undisturbed(async move {
        let begun = host.snapshots().import(&call, spec, Upload::new(body)).await?;
        drop(place);
        Ok(begun)
    })
    .await?;
    answer::uploaded(&api, begun, wait, |snapshot| fresh(&api, snapshot)).await
}

/// The snapshot as it is at the end of the work.
async fn fresh(api: &Api, snapshot: Snapshot) -> Option<Snapshot> {
    api.host.snapshots().one(snapshot.id).await.ok()
}
