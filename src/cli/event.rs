//! `toft event …`: the log as lines. NDJSON from the daemon becomes a table or stays JSON.
use clap::{Args, Subcommand};
use http_body_util::BodyExt;
use model::event::Event;
use serde_json::Value;

use crate::Context;
use crate::error::Error;
use crate::limits::EVENT_LINE_BYTES_MAX;
use crate::output::{self, Format};

/// What can be done with events.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Print events that have happened.
    #[command(visible_alias = "ls")]
    List(Options),
    /// Print events as they happen, until interrupted.
    #[command(visible_alias = "watch")]
    Follow(Options),
}

/// Where to begin.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only events after this position. When absent, `list` begins with the oldest and `follow` now.
    #[arg(long)]
    after: Option<u64>,
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let (options, follow) = match self {
            Verb::List(options) => (options, false),
            Verb::Follow(options) => (options, true),
        };
        let mut path = format!("/v1/events?format=ndjson&follow={follow}");
        if let Some(after) = options.after {
            path.push_str(&format!("&after={after}"));
        }
        let mut body = context.client.stream(&path, &[("accept", "application/x-ndjson")]).await?;
        let (mut pending, mut last) = (Vec::new(), options.after);
        while let Some(frame) = body.frame().await {
            let frame =
                frame.map_err(|cause| Error::Http { endpoint: path.clone(), cause: Box::new(cause) })?;
            let Ok(data) = frame.into_data() else { continue };
            pending.extend_from_slice(&data);
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                last = print(context.format, &line)?.or(last);
            }
            if pending.len() > EVENT_LINE_BYTES_MAX {
                return Err(Error::Usage("the daemon sent an event without an end".to_owned()));
            }
        }
        match follow {
            true => Err(Error::Ended(last)),
            false => Ok(()),
        }
    }
}

/// Prints an event, and answers its position. Fails with what the daemon says in the place of one, where it cannot go on.
fn print(format: Format, line: &[u8]) -> Result<Option<u64>, Error> {
    // An empty line only shows that the daemon is alive.
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    let told: Value = serde_json::from_slice(line).map_err(Error::Answer)?;
    let id = told["id"].as_u64();
    if id.is_none() && told["code"].is_string() {
        return Err(Error::Problem(serde_json::from_value(told).map_err(Error::Answer)?));
    }
    if format == Format::Json {
        output::print_bytes(line)?;
        return Ok(id);
    }
    let event: Event = serde_json::from_value(told).map_err(Error::Answer)?;
    if format == Format::Name {
        output::print_text(&format!("{}\n", event.id.0))?;
        return Ok(id);
    }
    let state = event.data.state.as_deref().unwrap_or_default();
    let reason = event.data.reason.as_deref().unwrap_or_default();
    let text = format!(
        "{:>6}  {}  {:<24} {}  {state} {reason}",
        event.id.0,
        output::time(event.time),
        event.kind,
        event.subject
    );
    output::print_text(&format!("{}\n", text.trim_end()))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_daemon_says_in_the_place_of_an_event_is_why_it_ends() {
        let problem = br#"{"type":"about:blank#cursor_expired","title":"t","status":410,"code":"cursor_expired",
            "detail":"list the resources and follow from their watch_cursor","instance":"/v1/events","request_id":"r",
            "retryable":false}"#;
        for format in [Format::Json, Format::Name, Format::Table] {
            let ended = print(format, problem).unwrap_err();
            assert!(
                matches!(&ended, Error::Problem(told) if told.detail.contains("watch_cursor")),
                "{ended:?}"
            );
            assert_eq!(print(format, b" \n").unwrap(), None);
        }
        assert_eq!(Error::Ended(Some(7)).exit_code(), 5);
        assert!(Error::Ended(Some(7)).report().contains("toft event follow --after 7"));
    }
}
