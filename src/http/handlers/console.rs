//! A server's console: its log, tickets to it, and the WebSocket that a ticket opens.
use axum::extract::State;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use model::console::{ConsoleReaders, ConsoleToken, CreateConsoleToken};
use model::{Code, ConsoleReaderId, ServerId};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::answer;
use crate::call::{Mutation, Optional};
use crate::error::Failure;
use crate::limits::{CONSOLE_INPUT_BYTES_MAX, CONSOLE_LOG_BYTES_MAX};
use crate::path::Id;
use crate::query::{NoParameters, Query};
use crate::routes::{Api, Slot};

/// Position of the first byte of the answer.
const START: HeaderName = HeaderName::from_static("toft-console-start");
/// Position after its last byte: send it as `from` to read on.
const NEXT: HeaderName = HeaderName::from_static("toft-console-next");
/// Bytes the console has written in all.
const WRITTEN: HeaderName = HeaderName::from_static("toft-console-written");

/// Which part of the log.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct LogParameters {
    /// Position of the first byte wanted; not with `tail_bytes`.
    from: Option<u64>,
    /// The last so many bytes; as many as are kept, up to 1 MiB, when neither is given.
    #[param(minimum = 0, maximum = 1048576)]
    tail_bytes: Option<usize>,
}

/// Reads the console's log: the bytes as the guest wrote them.
#[utoipa::path(get, path = "/v1/servers/{id}/console-log", tag = "servers", operation_id = "read_console_log",
    params(("id" = ServerId, Path, description = "The server."), LogParameters),
    responses((status = 200, description = "The bytes.", body = String, content_type = "text/plain",
        headers(
            ("Toft-Console-Start" = u64, description = "Position of the first byte."),
            ("Toft-Console-Next" = u64, description = "Position after the last byte: send it as `from` to read on."),
            ("Toft-Console-Written" = u64, description = "Bytes the console has written in all."),
        ))))]
pub(crate) async fn log(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    Query(parameters): Query<LogParameters>,
) -> Result<Response, Failure> {
    if parameters.from.is_some() && parameters.tail_bytes.is_some() {
        return Err(Failure::parameter("tail_bytes", "conflict", "give either from or tail_bytes"));
    }
    let tail_bytes = parameters.tail_bytes.unwrap_or(CONSOLE_LOG_BYTES_MAX);
    if tail_bytes > CONSOLE_LOG_BYTES_MAX {
        let detail = format!("use at most {CONSOLE_LOG_BYTES_MAX}; read longer logs in pieces with from");
        return Err(Failure::parameter("tail_bytes", "out_of_range", detail));
    }
    let piece = api.host.servers().console_log(id, parameters.from, tail_bytes).await?;
    let next = piece.start.saturating_add(piece.data.len() as u64);
    let mut response = piece.data.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(START, HeaderValue::from(piece.start));
    headers.insert(NEXT, HeaderValue::from(next));
    headers.insert(WRITTEN, HeaderValue::from(piece.written));
    Ok(response)
}

/// Makes a ticket to the console: a URL that works once, within a minute.
#[utoipa::path(post, path = "/v1/servers/{id}/console-tokens", tag = "servers",
    operation_id = "create_console_token", params(("id" = ServerId, Path, description = "The server.")),
    request_body = Option<CreateConsoleToken>,
    responses((status = 201, description = "The ticket.", body = ConsoleToken)))]
pub(crate) async fn token(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
    Mutation { call, body: Optional(mut spec), .. }: Mutation<Optional<CreateConsoleToken>>,
) -> Result<Response, Failure> {
    // Any position beyond the end means "nothing that is there already"; records hold 63 bits of it.
    spec.from = spec.from.map(|position| position.min(i64::MAX as u64));
    let made =
        answer::undisturbed(async move { Ok(api.host.servers().console_token(&call, id, spec).await?) })
            .await?;
    answer::made(&made, &made.body.url)
}

/// Lists who has the console open.
#[utoipa::path(get, path = "/v1/servers/{id}/console-readers", tag = "servers",
    operation_id = "list_console_readers", params(("id" = ServerId, Path, description = "The server.")),
    responses((status = 200, description = "The readers, in the order they came.", body = ConsoleReaders)))]
pub(crate) async fn readers(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    _: Query<NoParameters>,
) -> Result<Response, Failure> {
    answer::plain(&api.host.servers().console_readers(id).await?)
}

/// Whom to put out.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct KickParameters {
    /// Only this reader; everyone when absent.
    #[param(value_type = Option<uuid::Uuid>)]
    reader: Option<ConsoleReaderId>,
}

/// Puts readers of the console out, and makes tickets that nobody has used yet worth nothing.
#[utoipa::path(delete, path = "/v1/servers/{id}/console-readers", tag = "servers",
    operation_id = "kick_console_readers",
    params(("id" = ServerId, Path, description = "The server."), KickParameters),
    responses((status = 200, description = "Who was put out.", body = ConsoleReaders)))]
pub(crate) async fn kick(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    Query(parameters): Query<KickParameters>,
    Mutation { call, .. }: Mutation<()>,
) -> Result<Response, Failure> {
    let kicked = answer::undisturbed(async move {
        Ok(api.host.servers().console_kick(&call, id, parameters.reader).await?)
    })
    .await?;
    answer::done(&kicked)
}

/// The ticket.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct OpenParameters {
    /// The ticket's secret.
    token: String,
}

/// Opens the console as a WebSocket. Output comes as binary frames, from the ticket's position on; what is sent,
/// in frames of either kind, is typed. A text frame `{"gap_bytes": n}` tells of output that was overwritten before
/// it could be sent; `{"refused": code}` of typing that was not taken.
#[utoipa::path(get, path = "/v1/servers/{id}/console", tag = "servers", operation_id = "open_console",
    params(("id" = ServerId, Path, description = "The server."), OpenParameters),
    security(()),
    responses((status = 101, description = "The WebSocket is open.")))]
pub(crate) async fn open(
    State(api): State<Api>,
    Id(id): Id<ServerId>,
    Query(parameters): Query<OpenParameters>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Failure> {
    // Before the ticket is taken: a mistaken request must not cost it.
    let upgrade = upgrade.map_err(|cause| {
        Failure::new(Code::InvalidRequest, format!("this path speaks WebSocket (RFC 6455) only: {cause}"))
            .header(header::UPGRADE, HeaderValue::from_static("websocket"))
    })?;
    let place = api.take(Slot::Console)?;
    let console = api.host.servers().console_open(id, &parameters.token).await?;
    let closing = api.closing.clone();
    let mut response = upgrade
        .max_message_size(CONSOLE_INPUT_BYTES_MAX)
        .max_frame_size(CONSOLE_INPUT_BYTES_MAX)
        .on_upgrade(move |socket| crate::console::serve(socket, console, closing, place));
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(Failure::from(response.status()));
    }
    // The ticket is in the URL; no page may pass the URL on.
    response.headers_mut().insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Ok(response)
}
