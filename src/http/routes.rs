//! Every path of the API, the state its handlers share, and the layers around them. `serve` puts connections on
//! the router; `document` describes it.
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use host::Host;
use model::operation::Operation;
use model::{Code, OperationId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::closing::Closing;
use crate::error::Failure;
use crate::handlers::{
    bulk, console, description, events, host as host_paths, images, metrics, networks, operations,
};
use crate::handlers::{servers, snapshots, volumes};
use crate::kept::Kept;
use crate::limits::{CONSOLES_MAX, EVENT_STREAMS_MAX, EXPORTS_MAX, UPLOADS_MAX, WAITS_MAX};
use crate::{auth, document, edge};

/// What handlers share.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) host: Host,
    /// Becomes true when the daemon closes.
    pub(crate) closing: Closing,
    /// Answers written before.
    pub(crate) kept: Arc<Kept>,
    event_streams: Arc<Semaphore>,
    consoles: Arc<Semaphore>,
    waits: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    exports: Arc<Semaphore>,
}

/// Something of which there is a bounded number at once.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Slot {
    EventStream,
    Console,
    Upload,
    Export,
}

impl Api {
    pub(crate) fn new(host: Host, closing: Closing) -> Api {
        Api {
            host,
            closing,
            kept: Arc::default(),
            event_streams: Arc::new(Semaphore::new(EVENT_STREAMS_MAX)),
            consoles: Arc::new(Semaphore::new(CONSOLES_MAX)),
            waits: Arc::new(Semaphore::new(WAITS_MAX)),
            uploads: Arc::new(Semaphore::new(UPLOADS_MAX)),
            exports: Arc::new(Semaphore::new(EXPORTS_MAX)),
        }
    }

    /// Takes a place, or fails with `too_many`.
    pub(crate) fn take(&self, slot: Slot) -> Result<OwnedSemaphorePermit, Failure> {
        let (places, most, what) = match slot {
            Slot::EventStream => (&self.event_streams, EVENT_STREAMS_MAX, "event streams are open"),
            Slot::Console => (&self.consoles, CONSOLES_MAX, "consoles are open"),
            Slot::Upload => (&self.uploads, UPLOADS_MAX, "uploads are under way"),
            Slot::Export => (&self.exports, EXPORTS_MAX, "exports are under way"),
        };
        Arc::clone(places).try_acquire_owned().map_err(|_| full(most, what))
    }

    /// Waits until no console is open: their tasks outlive the connections they came from.
    pub(crate) async fn consoles_closed(&self) {
        let all = u32::try_from(CONSOLES_MAX).unwrap_or(u32::MAX);
        let _ = self.consoles.acquire_many(all).await;
    }

    /// Reads an operation, waiting for its end at most `wait`. Ends early when the daemon closes.
    pub(crate) async fn wait_for(
        &self,
        id: OperationId,
        wait: Option<Duration>,
    ) -> Result<Operation, Failure> {
        let operations = self.host.operations();
        if wait.is_none_or(|wait| wait.is_zero()) {
            return Ok(operations.one(id, None).await?);
        }
        let _place = self.waits.try_acquire().map_err(|_| full(WAITS_MAX, "requests wait for operations"))?;
        let mut closing = self.closing.clone();
        tokio::select! {
            operation = operations.one(id, wait) => Ok(operation?),
            () = closing.ordered() => Ok(operations.one(id, None).await?),
        }
    }
}

fn full(most: usize, what: &str) -> Failure {
    Failure::new(Code::TooMany, format!("{most} {what} already; try again when one has ended"))
}

/// The paths that need a caller's identity.
fn identified() -> OpenApiRouter<Api> {
    OpenApiRouter::default()
        .routes(routes!(description::about))
        .routes(routes!(description::openapi))
        .routes(routes!(description::errors))
        .routes(routes!(servers::list, servers::create))
        .routes(routes!(servers::one, servers::patch, servers::delete))
        .routes(routes!(servers::start))
        .routes(routes!(servers::stop))
        .routes(routes!(servers::reboot))
        .routes(routes!(servers::pause))
        .routes(routes!(servers::resume))
        .routes(routes!(servers::hibernate))
        .routes(routes!(servers::settle_memory))
        .routes(routes!(servers::upgrade_vmm))
        .routes(routes!(servers::restore))
        .routes(routes!(bulk::start))
        .routes(routes!(bulk::stop))
        .routes(routes!(bulk::reboot))
        .routes(routes!(bulk::pause))
        .routes(routes!(bulk::resume))
        .routes(routes!(bulk::hibernate))
        .routes(routes!(snapshots::take))
        .routes(routes!(servers::migrate))
        .routes(routes!(servers::limit_migration))
        .routes(routes!(servers::settle))
        .routes(routes!(servers::metrics))
        .routes(routes!(servers::isolation))
        .routes(routes!(console::log))
        .routes(routes!(console::token))
        .routes(routes!(console::readers, console::kick))
        .routes(routes!(images::list, images::create))
        .routes(routes!(images::catalogue))
        .routes(routes!(images::one, images::patch, images::delete))
        .routes(routes!(volumes::list))
        .routes(routes!(volumes::one, volumes::patch, volumes::delete))
        .routes(routes!(snapshots::list, snapshots::import))
        .routes(routes!(snapshots::one, snapshots::patch, snapshots::delete))
        .routes(routes!(snapshots::export))
        .routes(routes!(snapshots::clone))
        .routes(routes!(snapshots::clone_server))
        .routes(routes!(networks::list, networks::create))
        .routes(routes!(networks::one, networks::patch, networks::delete))
        .routes(routes!(operations::list))
        .routes(routes!(operations::one, operations::cancel))
        .routes(routes!(events::follow))
        .routes(routes!(host_paths::report))
        .routes(routes!(host_paths::probe))
        .routes(routes!(host_paths::cpu))
        .routes(routes!(host_paths::baseline))
        .routes(routes!(host_paths::ticket))
        .routes(routes!(metrics::scrape))
}

/// The paths that carry their own ticket.
fn ticketed() -> OpenApiRouter<Api> {
    OpenApiRouter::default().routes(routes!(console::open))
}

/// The OpenAPI document of every path, as generated.
pub(crate) fn described() -> utoipa::openapi::OpenApi {
    OpenApiRouter::with_openapi(document::base()).merge(identified()).merge(ticketed()).into_openapi()
}

/// Every path with the layers around it.
pub(crate) fn router(api: Api) -> Router {
    let identify = from_fn_with_state(api.clone(), auth::identify);
    let (identified, _) = identified().split_for_parts();
    let (ticketed, _) = ticketed().split_for_parts();
    identified
        .fallback(description::nothing)
        .layer(identify)
        .merge(ticketed)
        .layer(from_fn(edge::around))
        .with_state(api)
}
