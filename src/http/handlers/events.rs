//! `/v1/events`: the log of everything that happens, as a stream.
use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, Uri, header};
use axum::response::Response;
use model::EventId;
use model::event::Event;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::edge::RequestId;
use crate::error::Failure;
use crate::query::Query;
use crate::routes::{Api, Slot};
use crate::stream::{self, Format, Reader};

/// Which events, and how.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventParameters {
    /// Position to read after, such as a list's `watch_cursor`. When absent, `Last-Event-ID`; without either, from
    /// now on when following, else everything kept.
    after: Option<u64>,
    /// Stay for what comes (the default), or end after what is there.
    follow: Option<bool>,
    /// `sse` or `ndjson`; what `Accept` says when absent.
    #[param(inline)]
    format: Option<FormatName>,
}

/// How events are written.
#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FormatName {
    Sse,
    Ndjson,
}

/// Follows the event log as Server-Sent Events, or as NDJSON with `Accept: application/x-ndjson`.
///
/// Heartbeats come as SSE comments or empty lines. 410 `cursor_expired` when the position is older than the log.
#[utoipa::path(get, path = "/v1/events", tag = "events", operation_id = "follow_events",
    params(EventParameters, ("Last-Event-ID" = Option<u64>, Header, description = "Position to read after.")),
    responses((status = 200, description = "The stream.",
        content((Event = "text/event-stream"), (Event = "application/x-ndjson")))))]
pub(crate) async fn follow(
    State(api): State<Api>,
    Query(parameters): Query<EventParameters>,
    Extension(request_id): Extension<RequestId>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    // Read even where `after` wins, so that a mistake in it does not pass unseen.
    let last = last_event_id(&headers)?;
    let after = parameters.after.map(EventId).or(last).map(writable);
    let reader = Reader {
        format: format(parameters.format, &headers),
        instance: uri.path().to_owned(),
        request_id: request_id.0,
        _place: api.take(Slot::EventStream)?,
    };
    let events = api.host.events();
    if parameters.follow != Some(false) {
        let follower = events.follow(after).await?;
        return Ok(stream::follow(reader, follower, api.closing.clone()));
    }
    // The log holds at least so many events.
    let oldest = EventId(events.last().0.saturating_sub(host::limits::EVENTS_KEPT));
    stream::replay(reader, events, after.unwrap_or(oldest)).await
}

/// The nearest position that the log can hold; its integers have 63 bits. Far beyond its end is as wrong as at
/// that position.
fn writable(position: EventId) -> EventId {
    EventId(position.0.min(i64::MAX as u64))
}

/// Where a reconnecting SSE reader stopped.
fn last_event_id(headers: &HeaderMap) -> Result<Option<EventId>, Failure> {
    let Some(value) = headers.get("last-event-id") else { return Ok(None) };
    let id = value.to_str().ok().and_then(|text| text.parse().ok());
    id.map(|id| Some(EventId(id)))
        .ok_or_else(|| Failure::parameter("last-event-id", "not_valid", "send the id of the last event read"))
}

fn format(named: Option<FormatName>, headers: &HeaderMap) -> Format {
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match named {
        Some(FormatName::Sse) => Format::Sse,
        Some(FormatName::Ndjson) => Format::Ndjson,
        None if accepted.contains("application/x-ndjson") => Format::Ndjson,
        None => Format::Sse,
    }
}
