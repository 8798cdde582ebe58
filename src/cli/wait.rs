//! What follows a request that started long work: name the operation, or wait for its end with a progress bar.
use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use model::OperationId;
use model::operation::{Accepted, Operation, OperationState};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::Context;
use crate::client::Answer;
use crate::error::Error;
use crate::interrupt::{BeforeEnd, before_end};
use crate::output::{self, Row};
use crate::{limits, operation};

/// Ends a command that started long work. With `--wait` the resource is read again and printed as it stands
/// then; without, it is printed as accepted. `kind` is the noun in its path; where the work `deletes`
/// it, the operation is printed, and of names the resource's.
pub(crate) async fn finish<T: Row + DeserializeOwned>(
    context: &Context,
    answer: &Answer,
    kind: &str,
    deletes: bool,
) -> Result<(), Error> {
    let accepted: Accepted<T> = answer.json()?;
    if !context.wait {
        return match (&accepted.resource, context.format) {
            (_, output::Format::Json) => output::json(
                &serde_json::from_slice::<serde_json::Value>(&answer.body).map_err(Error::Answer)?,
            ),
            (Some(resource), _) => {
                eprintln!("operation {} has begun", accepted.operation.id);
                output::one(context.format, resource)
            }
            (None, _) => operation::show(context, &accepted.operation).await,
        };
    }
    let ended = until_end(context, &accepted.operation).await?;
    operation::into_result(&ended)?;
    let id = match (&accepted.resource, deletes) {
        (Some(_), false) => resource_id(answer)?,
        // Its name is what a script goes on with, gone or not, as without `--wait`.
        (Some(resource), true) if context.format == output::Format::Name => {
            return output::one(context.format, resource);
        }
        _ => return operation::show(context, &ended).await,
    };
    let resource: T = context.client.get(&format!("/v1/{kind}/{id}")).await?;
    output::one(context.format, &resource)
}

fn resource_id(answer: &Answer) -> Result<String, Error> {
    let document: serde_json::Value = answer.json()?;
    Ok(document["resource"]["id"].as_str().unwrap_or_default().to_owned())
}

/// Waits for an operation's end. Ctrl-C leaves the operation running and says so.
pub(crate) async fn until_end(context: &Context, operation: &Operation) -> Result<Operation, Error> {
    let _running = say_they_go_on(vec![operation.id]);
    until(context, operation, Instant::now() + context.wait_timeout).await
}

/// Has a signal say how to go on waiting for these.
pub(crate) fn say_they_go_on(operations: Vec<OperationId>) -> BeforeEnd {
    before_end(move || {
        let mut stderr = std::io::stderr().lock();
        // Behind a bar, or what the terminal shows of Ctrl-C. Nobody is left to tell of an error.
        let _ = if stderr.is_terminal() { writeln!(stderr) } else { Ok(()) };
        for id in operations {
            let _ = writeln!(stderr, "toft: operation {id} goes on: toft operation wait {id}");
        }
    })
}

/// As [`until_end`], with an end of the patience that several waits share, and silent about signals.
pub(crate) async fn until(
    context: &Context,
    operation: &Operation,
    deadline: Instant,
) -> Result<Operation, Error> {
    let bar = progress_bar(&operation.kind);
    let mut latest = operation.clone();
    let mut lost_at = None;
    while !latest.state.is_final() {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            bar.abandon();
            return Err(Error::WaitTimeout {
                operation: latest.id.to_string(),
                seconds: context.wait_timeout.as_secs(),
            });
        }
        show(&bar, &latest);
        // Progress moves between polls, so a terminal asks more often than a script.
        let poll_s = if bar.is_hidden() { limits::POLL_S } else { 1 };
        let poll_s = poll_s.min(rest.as_secs().max(1));
        match context.client.get(&format!("/v1/operations/{}?wait={poll_s}s", latest.id)).await {
            Ok(found) => (latest, lost_at) = (found, None),
            // An operation outlives its daemon.
            Err(cause) if cause.is_without_daemon() => {
                let lost_at = lost_at.get_or_insert_with(|| {
                    bar.suspend(|| eprintln!("toft: {}; waiting for it to come back", cause.chain()));
                    Instant::now()
                });
                if lost_at.elapsed() >= limits::RETURN_TIMEOUT {
                    bar.abandon();
                    return Err(Error::WaitLost { operation: latest.id.to_string(), cause: Box::new(cause) });
                }
                tokio::time::sleep(limits::RETURN_PAUSE.min(rest)).await;
            }
            Err(cause) => return Err(cause),
        }
    }
    match latest.state {
        OperationState::Succeeded => bar.finish_and_clear(),
        _ => bar.abandon(),
    }
    Ok(latest)
}

fn progress_bar(kind: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(100);
    let template = "{prefix} {wide_bar} {percent:>3}% {msg} {elapsed}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(kind.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A bar for bytes that go by; hidden where nobody looks. A length that is not known is counted only.
pub(crate) fn transfer_bar(what: &str, length_bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match length_bytes {
        Some(length) => (ProgressBar::new(length), "{wide_bar} {bytes} of {total_bytes} {bytes_per_sec}"),
        None => (ProgressBar::no_length(), "{bytes} {bytes_per_sec}"),
    };
    if let Ok(style) = ProgressStyle::with_template(&format!("{what} {template}")) {
        bar.set_style(style);
    }
    bar
}

fn show(bar: &ProgressBar, operation: &Operation) {
    let progress = &operation.progress;
    bar.set_position(u64::from(progress.percent));
    let phase = progress.phase.replace('_', " ");
    let gone = match (progress.bytes_done, progress.bytes_total) {
        (Some(done), Some(total)) => format!("{phase} {} of {}", output::bytes(done), output::bytes(total)),
        (Some(done), None) => format!("{phase} {}", output::bytes(done)),
        _ => phase,
    };
    bar.set_message(gone + &operation::expected(progress));
}
