//! `/v1/host`, and the tickets it gives to other hosts.
use axum::extract::State;
use axum::response::Response;
use model::cpu::{ComputeCpuBaseline, CpuBaseline, HostCpu};
use model::host::{HostReport, KvmProbe};
use model::migration::{CreateMigrationTicket, MigrationTicket};

use super::servers::Nothing;
use crate::answer;
use crate::call::{Json, Mutation, Optional};
use crate::error::Failure;
use crate::query::{NoParameters, Query};
use crate::routes::Api;

/// What the host has, what servers use of it, and what is wrong.
#[utoipa::path(get, path = "/v1/host", tag = "host", operation_id = "read_host",
    responses((status = 200, description = "The host.", body = HostReport)))]
pub(crate) async fn report(State(api): State<Api>, _: Query<NoParameters>) -> Result<Response, Failure> {
    answer::plain(&api.host.report().await?)
}

/// Tries KVM with a small guest.
#[utoipa::path(post, path = "/v1/host/actions/probe", tag = "host", operation_id = "probe_host",
    request_body = Option<Nothing>,
    responses((status = 200, description = "What came of it.", body = KvmProbe)))]
pub(crate) async fn probe(
    State(api): State<Api>,
    _: Query<NoParameters>,
    Mutation { call, body: Optional(Nothing {}), .. }: Mutation<Optional<Nothing>>,
) -> Result<Response, Failure> {
    let probed = answer::undisturbed(async move { Ok(api.host.probe_kvm(&call).await?) }).await?;
    answer::done(&probed)
}

/// What processor guests can see here: what a server with the cpu `host` sees, by Toft's own names.
#[utoipa::path(get, path = "/v1/host/cpu", tag = "host", operation_id = "read_host_cpu",
    responses((status = 200, description = "The processor.", body = HostCpu)))]
pub(crate) async fn cpu(State(api): State<Api>, _: Query<NoParameters>) -> Result<Response, Failure> {
    answer::plain(&api.host.processor().shown().await?)
}

/// Computes what several hosts' processors have in common, as a `cpu` for servers that are to move between them while they run. It
/// keeps nothing.
#[utoipa::path(post, path = "/v1/host/actions/cpu-baseline", tag = "host", operation_id = "compute_cpu_baseline",
    request_body = ComputeCpuBaseline,
    responses((status = 200, description = "The baseline.", body = CpuBaseline)))]
pub(crate) async fn baseline(
    State(api): State<Api>,
    _: Query<NoParameters>,
    Mutation { call, body: Json(asked), .. }: Mutation<Json<ComputeCpuBaseline>>,
) -> Result<Response, Failure> {
    answer::done(&api.host.cpu_baseline(&call, asked).await?)
}

/// Makes a ticket with which another host can ask to bring a server here. It belongs to the first host that presents
/// it, and is shown here only.
#[utoipa::path(post, path = "/v1/migration-tickets", tag = "host", operation_id = "create_migration_ticket",
    request_body = Option<CreateMigrationTicket>,
    responses((status = 200, description = "The ticket.", body = MigrationTicket)))]
pub(crate) async fn ticket(
    State(api): State<Api>,
    _: Query<NoParameters>,
    Mutation { call, body: Optional(spec), .. }: Mutation<Optional<CreateMigrationTicket>>,
) -> Result<Response, Failure> {
    let made =
        answer::undisturbed(async move { Ok(api.host.migrations().ticket(&call, spec).await?) }).await?;
    answer::done(&made)
}
