//! The event log as an endless body: Server-Sent Events or NDJSON, with heartbeats. Holds one batch of events
//! for one reader; a slow reader is waited for, and told when the log has moved past it.
use std::pin::Pin;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::unfold;
use host::events::{Events, Follower};
use model::EventId;
use model::event::Event;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::closing::Closing;
use crate::error::Failure;
use crate::limits::{EVENTS_BATCH, HEARTBEAT};

/// How events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// `text/event-stream`, for browsers and panels.
    Sse,
    /// One JSON document a line, for shells.
    Ndjson,
}

impl Format {
    fn content_type(self) -> &'static str {
        match self {
            Format::Sse => "text/event-stream",
            Format::Ndjson => "application/x-ndjson",
        }
    }

    /// What shows that the daemon is alive and is no event: a comment, an empty line.
    fn heartbeat(self) -> Bytes {
        Bytes::from_static(match self {
            Format::Sse => b": alive\n\n",
            Format::Ndjson => b"\n",
        })
    }

    /// A batch of events. JSON has no line breaks outside strings and none unescaped inside.
    fn events(self, events: &[Event]) -> Bytes {
        let mut text = String::new();
        for event in events {
            let json = serde_json::to_string(event).unwrap_or_default();
            match self {
                Format::Sse => {
                    text.push_str(&format!("id: {}\nevent: {}\ndata: {json}\n\n", event.id.0, event.kind));
                }
                Format::Ndjson => {
                    text.push_str(&json);
                    text.push('\n');
                }
            }
        }
        Bytes::from(text)
    }

    /// The end of a stream that cannot go on. In SSE a named event, so that no reader takes it for one of the
    /// log; in NDJSON a document with `type` and `code` but no `id`.
    fn end(self, failure: &Failure, instance: &str, request_id: &str) -> Bytes {
        let json = serde_json::to_string(&failure.problem(instance, request_id)).unwrap_or_default();
        Bytes::from(match self {
            Format::Sse => format!("event: problem\ndata: {json}\n\n"),
            Format::Ndjson => format!("{json}\n"),
        })
    }
}

/// Who reads, for the problem that may end the stream.
pub(crate) struct Reader {
    /// How events are written.
    pub(crate) format: Format,
    /// Path of the request.
    pub(crate) instance: String,
    /// Id of the request.
    pub(crate) request_id: String,
    /// The place among the streams, free again when the stream ends.
    pub(crate) _place: OwnedSemaphorePermit,
}

/// Streams what follows, until the reader goes or the daemon closes.
pub(crate) fn follow(reader: Reader, follower: Follower, closing: Closing) -> Response {
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let format = reader.format;
    let state = Some(Following { reader, follower, closing, heartbeat });
    response(format, unfold(state, |state| async move { state?.next().await }))
}

struct Following {
    reader: Reader,
    follower: Follower,
    closing: Closing,
    heartbeat: Interval,
}

type Step = Option<(Result<Bytes, std::convert::Infallible>, Option<Following>)>;

impl Following {
    async fn next(mut self) -> Step {
        let format = self.reader.format;
        tokio::select! {
            biased;
            () = self.closing.ordered() => None,
            events = self.follower.next() => Some(match events {
                Ok(events) => (Ok(format.events(&events)), Some(self)),
                Err(error) => {
                    let end = format.end(&error.into(), &self.reader.instance, &self.reader.request_id);
                    (Ok(end), None)
                }
            }),
            // The first tick comes at once, so that a reader's library sees the stream open before any event.
            _ = self.heartbeat.tick() => Some((Ok(format.heartbeat()), Some(self))),
        }
    }
}

/// Streams what is there after `after`, then ends.
pub(crate) async fn replay(reader: Reader, events: Events, after: EventId) -> Result<Response, Failure> {
    let first = events.page(after, EVENTS_BATCH).await?;
    let format = reader.format;
    let state = Some(Replaying { reader, events, batch: first });
    Ok(response(format, unfold(state, |state| async move { state?.next().await })))
}

struct Replaying {
    reader: Reader,
    events: Events,
    batch: Vec<Event>,
}

impl Replaying {
    async fn next(mut self) -> Option<(Result<Bytes, std::convert::Infallible>, Option<Replaying>)> {
        let last = self.batch.last()?.id;
        let format = self.reader.format;
        let written = format.events(&self.batch);
        if self.batch.len() < EVENTS_BATCH as usize {
            return Some((Ok(written), None));
        }
        match self.events.page(last, EVENTS_BATCH).await {
            Ok(batch) => {
                self.batch = batch;
                Some((Ok(written), Some(self)))
            }
            Err(error) => {
                let end = format.end(&error.into(), &self.reader.instance, &self.reader.request_id);
                Some((Ok([written, end].concat().into()), None))
            }
        }
    }
}

fn response(
    format: Format,
    stream: impl Stream<Item = Result<Bytes, std::convert::Infallible>> + Send + 'static,
) -> Response {
    let stream: Pin<Box<dyn Stream<Item = _> + Send>> = Box::pin(stream);
    let mut response = Body::from_stream(stream).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    // Proxies that gather an answer before they pass it on would hold events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
