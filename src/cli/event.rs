//! `toft event …`: the log as lines. NDJSON from the daemon becomes a table or stays JSON.
use clap::{Args, Subcommand};
use http_body_util::BodyExt;
use model::event::Event;

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
        let mut pending = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame =
                frame.map_err(|cause| Error::Http { endpoint: path.clone(), cause: Box::new(cause) })?;
            let Ok(data) = frame.into_data() else { continue };
            pending.extend_from_slice(&data);
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                print(context.format, &line)?;
            }
            if pending.len() > EVENT_LINE_BYTES_MAX {
                return Err(Error::Usage("the daemon sent an event without an end".to_owned()));
            }
        }
        Ok(())
    }
}

fn print(format: Format, line: &[u8]) -> Result<(), Error> {
    // An empty line only shows that the daemon is alive.
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(());
    }
    if format == Format::Json {
        return output::print_bytes(line);
    }
    let event: Event = serde_json::from_slice(line).map_err(Error::Answer)?;
    if format == Format::Name {
        return output::print_text(&format!("{}\n", event.id.0));
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
    output::print_text(&format!("{}\n", text.trim_end()))
}
