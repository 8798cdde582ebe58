//! Actions on one server, or on every server with some labels.
use clap::Args;
use model::Name;
use model::limits::CLONES_MAX;
use model::server::{BulkAction, BulkActions, Server, StopServer};
use model::snapshot::CreateClones;
use tokio::time::Instant;

use crate::error::Error;
use crate::output::{self, Format, Row};
use crate::{Context, operation, target, wait};

/// Which servers an action is for.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Which {
    /// Name or id.
    server: Option<String>,
    /// Every server with these labels: key=value, key!=value, key, !key; comma-separated terms must all hold.
    /// Where there is none, the exit code is 3.
    #[arg(short = 'l', long, alias = "label-selector")]
    selector: Option<String>,
}

/// Servers to be made that go on from a memory.
#[derive(Debug, Args)]
pub(crate) struct Clones {
    /// Name or id of what they go on from.
    of: String,
    /// Name of the new server; of several, each has its number behind it.
    #[arg(long)]
    name: Name,
    /// How many servers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(CLONES_MAX)))]
    count: u16,
    /// KEY=VALUE; may be given more than once.
    #[arg(long, value_parser = target::label)]
    label: Vec<(String, String)>,
}

impl Clones {
    /// Makes them of one of these resources.
    pub(crate) async fn run(self, context: &Context, plural: &'static str) -> Result<(), Error> {
        let id = target::resolve(&context.client, plural, &self.of).await?;
        let labels = target::labels(&self.label)?;
        let spec = CreateClones { name: self.name, count: self.count, labels };
        let body = serde_json::to_vec(&spec).map_err(Error::Answer)?;
        let path = format!("/v1/{plural}/{id}/actions/clone");
        let answer = context.client.send("POST", &path, Some(body), &[]).await?.json()?;
        finish(context, answer).await
    }
}

/// Asks for the action and ends the command as [`wait::finish`] does.
pub(crate) async fn act(
    context: &Context,
    which: &Which,
    verb: &str,
    grace_s: Option<u64>,
) -> Result<(), Error> {
    let body = match grace_s {
        Some(grace_s) => Some(serde_json::to_vec(&StopServer { grace_s }).map_err(Error::Answer)?),
        None => None,
    };
    if let Some(selector) = &which.selector {
        let path = format!("/v1/servers/actions/{verb}?label_selector={}", target::percent_encode(selector));
        let answer: BulkActions = context.client.send("POST", &path, body, &[]).await?.json()?;
        if answer.items.is_empty() {
            // A mistyped label must not look like work that was done.
            if context.format == Format::Json {
                output::json(&answer.items)?;
            }
            return Err(Error::NoneSelected { selector: selector.clone() });
        }
        return finish(context, answer).await;
    }
    of_one(context, which.server.as_deref().unwrap_or_default(), verb, body).await
}

/// The same on one server, of an action that says no more.
pub(crate) async fn one(context: &Context, server: &str, verb: &str) -> Result<(), Error> {
    of_one(context, server, verb, None).await
}

async fn of_one(context: &Context, server: &str, verb: &str, body: Option<Vec<u8>>) -> Result<(), Error> {
    let id = target::resolve(&context.client, "servers", server).await?;
    let answer = context.client.send("POST", &format!("/v1/servers/{id}/actions/{verb}"), body, &[]).await?;
    wait::finish::<Server>(context, &answer, "servers", false).await
}

/// Prints what became of each server; fails with the first that went wrong.
async fn finish(context: &Context, mut answer: BulkActions) -> Result<(), Error> {
    let deadline = Instant::now() + context.wait_timeout;
    let mut wrong = None;
    let begun = answer.items.iter().filter_map(|item| item.operation.as_ref());
    let mut rest: Vec<_> = begun.filter(|operation| !operation.state.is_final()).map(|one| one.id).collect();
    for item in &mut answer.items {
        let outcome = match (&mut item.operation, &item.problem) {
            (Some(operation), _) if context.wait => {
                let _running = wait::say_they_go_on(rest.clone());
                rest.retain(|id| *id != operation.id);
                wait::until(context, operation, deadline).await.and_then(|ended| {
                    *operation = ended;
                    operation::into_result(operation)
                })
            }
            (_, Some(problem)) => Err(Error::Problem(Box::new(problem.clone()))),
            _ => Ok(()),
        };
        wrong = wrong.or(outcome.err());
    }
    output::many(context.format, &answer.items)?;
    wrong.map_or(Ok(()), Err)
}

impl Row for BulkAction {
    const COLUMNS: &'static [&'static str] = &["NAME", "OPERATION", "STATE", "PROBLEM"];

    fn cells(&self) -> Vec<String> {
        let failed = self.operation.as_ref().and_then(|operation| operation.error.as_deref());
        let problem = self.problem.as_ref().or(failed);
        vec![
            self.name.to_string(),
            self.operation.as_ref().map_or("-".to_owned(), |operation| operation.id.to_string()),
            self.operation.as_ref().map_or("refused".to_owned(), |operation| output::word(&operation.state)),
            problem.map(|problem| problem.detail.clone()).unwrap_or_default(),
        ]
    }

    fn name(&self) -> String {
        self.name.to_string()
    }
}
