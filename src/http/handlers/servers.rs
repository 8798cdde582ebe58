//! `/v1/servers`.
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::Response;
use model::ServerId;
use model::migration::{LimitMigration, MigrateServer, MigrationPlan, SettleMigration};
use model::operation::Accepted;
use model::page::Page;
use model::server::{
    CreateServer, DeleteServer, PatchServer, Server, ServerAction, ServerIsolation, ServerMetrics,
    ServerPlan, StopServer,
};
use model::snapshot::RestoreServer;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use crate::answer;
use crate::call::{Json, Mutation, Optional, Patch, Removable};
use crate::error::Failure;
use crate::page::Fields;
use crate::path::Id;
use crate::query::{CreateParameters, NoParameters, OneParameters, Query, ServerListParameters};
use crate::routes::Api;

/// Lists servers.
#[utoipa::path(get, path = "/v1/servers", tag = "servers", operation_id = "list_servers",
    params(ServerListParameters),
    responses((status = 200, description = "One page.", body = Page<Server>)))]
pub(crate) async fn list(
    State(api): State<Api>,
    uri: Uri,
    Query(parameters): Query<ServerListParameters>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let write = async {
        let (query, fields) = parameters.checked()?;
        let fields = Fields::of::<Server>(fields.as_deref())?;
        answer::written_page(&api.host.servers().list(query).await?, fields.as_ref())
    };
    answer::kept(&api, &uri, &headers, write).await
}

/// Creates a server and, unless told otherwise, starts it.
#[utoipa::path(post, path = "/v1/servers", tag = "servers", operation_id = "create_server",
    params(CreateParameters), request_body = CreateServer,
    responses(
        (status = 200, description = "With `dry_run`: what would be made.", body = ServerPlan),
        (status = 201, description = "With `Prefer: wait`: it is made.", body = Accepted<Server>),
        (status = 202, description = "It is being made.", body = Accepted<Server>),
    ))]
pub(crate) async fn create(
    State(api): State<Api>,
    Query(parameters): Query<CreateParameters>,
    Mutation { call, body: Json(spec), wait }: Mutation<Json<CreateServer>>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    if parameters.dry_run == Some(true) {
        return answer::plain(&host.servers().plan(&call, spec).await?);
    }
    let made = answer::undisturbed(async move { Ok(host.servers().create(&call, spec).await?) }).await?;
    answer::accepted(&api, made, wait, StatusCode::CREATED, |server| fresh(&api, server)).await
}

/// Reads a server.
#[utoipa::path(get, path = "/v1/servers/{id}", tag = "servers", operation_id = "read_server",
    params(("id" = ServerId, Path, description = "The server."), OneParameters),
    responses((status = 200, description = "The server.", body = Server)))]
pub(crate) async fn one(
    State(api): State<Api>,
    uri: Uri,
    Id(id): Id<ServerId>,
    Query(parameters): Query<OneParameters>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let write =
        async { answer::written_one(&api.host.servers().one(id).await?, parameters.fields.as_deref()) };
    answer::kept(&api, &uri, &headers, write).await
}

impl Removable for PatchServer {
    const DEFAULTS: &'static [(&'static str, &'static str)] = &[
        ("description", "\"\""),
        ("cpu", "\"host\""),
        ("restart_policy", "\"on_failure\""),
        ("isolation", "\"standard\""),
        ("external_ref", "null"),
        ("disk_limits", r#"{ "bandwidth_bytes": null, "operations": null }"#),
    ];
}

/// Changes a server by an RFC 7396 merge patch.
#[utoipa::path(patch, path = "/v1/servers/{id}", tag = "servers", operation_id = "update_server",
    params(("id" = ServerId, Path, description = "The server.")),
    request_body(content((PatchServer = "application/merge-patch+json"), (PatchServer = "application/json"))),
    responses((status = 200, description = "The server as changed.", body = Server)))]
pub(crate) async fn patch(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
    Mutation { call, body: Patch(patch), .. }: Mutation<Patch<PatchServer>>,
) -> Result<Response, Failure> {
    let changed =
        answer::undisturbed(async move { Ok(api.host.servers().patch(&call, id, patch).await?) }).await?;
    answer::changed(&changed)
}

/// How to delete.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct DeleteParameters {
    /// Keep its volumes.
    keep_volumes: Option<bool>,
}

/// Deletes a server, whatever it does.
#[utoipa::path(delete, path = "/v1/servers/{id}", tag = "servers", operation_id = "delete_server",
    params(("id" = ServerId, Path, description = "The server."), DeleteParameters),
    responses(
        (status = 200, description = "With `Prefer: wait`: it is deleted.", body = Accepted<Server>),
        (status = 202, description = "It is being deleted.", body = Accepted<Server>),
    ))]
pub(crate) async fn delete(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    Query(parameters): Query<DeleteParameters>,
    Mutation { call, wait, .. }: Mutation<()>,
) -> Result<Response, Failure> {
    let how = DeleteServer { keep_volumes: parameters.keep_volumes == Some(true) };
    let host = api.host.clone();
    let deleted =
        answer::undisturbed(async move { Ok(host.servers().delete(&call, id, how).await?) }).await?;
    answer::accepted(&api, deleted, wait, StatusCode::OK, answer::gone).await
}

/// Body of the actions that need none: nothing, or an empty object.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nothing {}

macro_rules! actions {
    ($($name:ident, $body:ty, $doc:literal, |$given:ident| $action:expr;)*) => {
        actions! { $($name, stringify!($name), $body, $doc, |$given| $action;)* }
    };
    ($($name:ident, $verb:expr, $body:ty, $doc:literal, |$given:ident| $action:expr;)*) => {$(
        #[doc = $doc]
        #[utoipa::path(post, path = concat!("/v1/servers/{id}/actions/", $verb), tag = "servers",
            operation_id = concat!(stringify!($name), "_server"),
            params(("id" = ServerId, Path, description = "The server.")),
            request_body = Option<$body>,
            responses(
                (status = 200, description = "With `Prefer: wait`: it is done.", body = Accepted<Server>),
                (status = 202, description = "It is being done.", body = Accepted<Server>),
            ))]
        pub(crate) async fn $name(
            State(api): State<Api>,
            Id(id): Id<ServerId>,
            _: Query<NoParameters>,
            mutation: Mutation<Optional<$body>>,
        ) -> Result<Response, Failure> {
            let Mutation { call, body: Optional($given), wait } = mutation;
            let host = api.host.clone();
            let done =
                answer::undisturbed(async move { Ok(host.servers().act(&call, id, $action).await?) }).await?;
            answer::accepted(&api, done, wait, StatusCode::OK, |server| fresh(&api, server)).await
        }
    )*};
}

actions! {
    start, Nothing, "Starts a server: builds its machine.", |_given| ServerAction::Start;
    stop, StopServer, "Stops a server: presses its power button and, after the grace, forces it off.",
        |given| ServerAction::Stop(given);
    reboot, StopServer, "Reboots a server: asks the guest to shut down, then starts it; with no grace, the reset button.",
        |given| ServerAction::Reboot(given);
    pause, Nothing, "Pauses a server: parks its vCPUs and drains its devices.", |_given| ServerAction::Pause;
    resume, Nothing, "Lets a paused server run again.", |_given| ServerAction::Resume;
    hibernate, Nothing, "Hibernates a server: saves its memory to the disk and ends its machine. A start goes on where it was, with the clock set right; a stop with no grace throws the memory away.",
        |_given| ServerAction::Hibernate;
}

actions! {
    settle_memory, "settle-memory", Nothing, "Gives a clone that runs or is paused memory and disks of its own, in place of what it shares with the snapshot that it was made from. Its guest runs on but for moments. Fails where there is no room for the disks. Of any other server it is so already.",
        |_given| ServerAction::SettleMemory;
    upgrade_vmm, "upgrade-vmm", Nothing, "Gives a server that runs or is paused a new VMM of the host's present build. Its guest stands still for some milliseconds, or stays paused; it goes on in the old one when the new one does not take it.",
        |_given| ServerAction::UpgradeVmm;
}

/// How to move.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct MigrateParameters {
    /// Answer what would be moved and what is in the way, and move nothing.
    dry_run: Option<bool>,
}

/// What `migrate` answers at once.
#[derive(Serialize, utoipa::ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "its schema is what is wanted; each part is written by itself")]
pub(crate) enum Migrated {
    /// What would be moved.
    Plan(MigrationPlan),
    /// What has moved.
    Done(Box<Accepted<Server>>),
}

/// Moves a server to another host with its disks, as it runs, hibernated or off. What is in the way on either host is told all at once.
#[utoipa::path(post, path = "/v1/servers/{id}/actions/migrate", tag = "servers", operation_id = "migrate_server",
    params(("id" = ServerId, Path, description = "The server."), MigrateParameters), request_body = MigrateServer,
    responses(
        (status = 200, description = "With `dry_run`: what would be moved and what is in the way. With `Prefer: wait`: it has moved.", body = Migrated),
        (status = 202, description = "It is moving; the operation ends when nothing is left here.",
            body = Accepted<Server>),
    ))]
pub(crate) async fn migrate(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    Query(parameters): Query<MigrateParameters>,
    Mutation { call, wait, body: Json(spec) }: Mutation<Json<MigrateServer>>,
) -> Result<Response, Failure> {
    if parameters.dry_run == Some(true) {
        return answer::plain(&api.host.migrations().plan(id, spec).await?);
    }
    let host = api.host.clone();
    let moved =
        answer::undisturbed(async move { Ok(host.migrations().migrate(&call, id, spec).await?) }).await?;
    answer::accepted(&api, moved, wait, StatusCode::OK, answer::gone).await
}

/// Changes how fast a server that is on its way from here goes, and how long its guest may stand still, in place of what `migrate` was given.
#[utoipa::path(post, path = "/v1/servers/{id}/actions/limit-migration", tag = "servers",
    operation_id = "limit_server_migration", params(("id" = ServerId, Path, description = "The server.")),
    request_body = LimitMigration,
    responses((status = 200, description = "The server, which is on its way.", body = Server)))]
pub(crate) async fn limit_migration(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
    Mutation { call, body: Json(spec), .. }: Mutation<Json<LimitMigration>>,
) -> Result<Response, Failure> {
    let limited =
        answer::undisturbed(async move { Ok(api.host.migrations().limit(&call, id, spec).await?) }).await?;
    answer::done(&limited)
}

/// Settles which host has a server that is `in_doubt`, on the operator's word. Look at the other host first.
#[utoipa::path(post, path = "/v1/servers/{id}/actions/settle-migration", tag = "servers",
    operation_id = "settle_server_migration", params(("id" = ServerId, Path, description = "The server.")),
    request_body = SettleMigration,
    responses((status = 200, description = "The server as it is here from now on.", body = Server)))]
pub(crate) async fn settle(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
    Mutation { call, body: Json(spec), .. }: Mutation<Json<SettleMigration>>,
) -> Result<Response, Failure> {
    let settled =
        answer::undisturbed(async move { Ok(api.host.migrations().settle(&call, id, spec).await?) }).await?;
    answer::done(&settled)
}

/// Makes a server what a snapshot of it shows: its disks, and where the snapshot has memory its machine, which goes on
/// where it was with the clock set right. What the server has in memory and on its disks since then is lost; take another
/// snapshot first if it may be wanted. Of disks alone, a server that ran is started afresh and any other is off.
#[utoipa::path(post, path = "/v1/servers/{id}/actions/restore", tag = "servers", operation_id = "restore_server",
    params(("id" = ServerId, Path, description = "The server.")),
    request_body = RestoreServer,
    responses(
        (status = 200, description = "With `Prefer: wait`: it is done.", body = Accepted<Server>),
        (status = 202, description = "It is being done.", body = Accepted<Server>),
    ))]
pub(crate) async fn restore(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
    Mutation { call, body: Json(spec), wait }: Mutation<Json<RestoreServer>>,
) -> Result<Response, Failure> {
    let host = api.host.clone();
    let asked =
        answer::undisturbed(async move { Ok(host.servers().restore(&call, id, spec).await?) }).await?;
    answer::accepted(&api, asked, wait, StatusCode::OK, |server| fresh(&api, server)).await
}

/// Counters of a server's machine.
#[utoipa::path(get, path = "/v1/servers/{id}/metrics", tag = "servers", operation_id = "read_server_metrics",
    params(("id" = ServerId, Path, description = "The server.")),
    responses((status = 200, description = "The counters.", body = ServerMetrics)))]
pub(crate) async fn metrics(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
) -> Result<Response, Failure> {
    answer::plain(&api.host.servers().metrics(id).await?)
}

/// What keeps a server's machine apart from the rest of the host, as found on the running process.
#[utoipa::path(get, path = "/v1/servers/{id}/isolation", tag = "servers", operation_id = "read_server_isolation",
    params(("id" = ServerId, Path, description = "The server.")),
    responses((status = 200, description = "Each wall, as found.", body = ServerIsolation)))]
pub(crate) async fn isolation(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
) -> Result<Response, Failure> {
    answer::plain(&api.host.servers().isolation(id).await?)
}

/// The server as it is at the end of the work.
async fn fresh(api: &Api, server: Server) -> Option<Server> {
    api.host.servers().one(server.id).await.ok()
}
