//! `toft operation …`
use std::collections::BTreeMap;

use clap::Subcommand;
use model::operation::{Operation, OperationState, Progress, Resource};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Error;
use crate::output::{self, Format, Row};
use crate::{Context, target, wait};

/// What can be done with operations.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List operations, also those that have ended.
    #[command(visible_alias = "ls")]
    List {
        /// Only those on this resource: its id, or a server's name.
        #[arg(long)]
        resource: Option<String>,
        /// Order: created_at or -created_at.
        #[arg(long, allow_hyphen_values = true, default_value = "-created_at")]
        sort: String,
        /// At most this many; all when absent.
        #[arg(long)]
        limit: Option<usize>,
    },
    /// Show one operation.
    Show {
        /// Its id.
        id: uuid::Uuid,
    },
    /// Wait until it ends; fails as it failed.
    Wait {
        /// Its id.
        id: uuid::Uuid,
    },
    /// Stop it, if it can still be stopped; what it had begun is undone.
    Cancel {
        /// Its id.
        id: uuid::Uuid,
    },
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Verb::List { resource, sort, limit } => {
                let resource = match resource {
                    Some(resource) => Some(target::resolve(&context.client, "servers", &resource).await?),
                    None => None,
                };
                let parameters = [("resource_id", resource.as_deref()), ("sort", Some(&*sort))];
                let operations: Vec<Operation> =
                    target::pages(&context.client, "operations", &parameters, limit).await?;
                output::many(context.format, &lines(context, operations).await?)
            }
            Verb::Show { id } => {
                show(context, &context.client.get(&format!("/v1/operations/{id}")).await?).await
            }
            Verb::Wait { id } => {
                let operation: Operation = context.client.get(&format!("/v1/operations/{id}")).await?;
                let ended = wait::until_end(context, &operation).await?;
                show(context, &ended).await?;
                into_result(&ended)
            }
            Verb::Cancel { id } => {
                let path = format!("/v1/operations/{id}");
                show(context, &context.client.send("DELETE", &path, None, &[]).await?.json()?).await
            }
        }
    }
}

/// Prints one, with all of what went wrong.
pub(crate) async fn show(context: &Context, operation: &Operation) -> Result<(), Error> {
    let mut lines = lines(context, vec![operation.clone()]).await?;
    for line in &mut lines {
        if let Some(problem) = &line.operation.error {
            line.error = format!("{}: {}", line.error, problem.detail);
        }
    }
    lines.iter().try_for_each(|line| output::one(context.format, line))
}

/// What a person wants to read of an operation; in JSON it is the operation.
#[derive(Serialize)]
#[serde(transparent)]
struct Line {
    operation: Operation,
    #[serde(skip)]
    resource: String,
    #[serde(skip)]
    error: String,
}

/// Names what they work on; an id remains of what is gone.
async fn lines(context: &Context, operations: Vec<Operation>) -> Result<Vec<Line>, Error> {
    #[derive(Deserialize)]
    struct Named {
        id: Uuid,
        name: String,
    }
    let mut names: BTreeMap<&str, BTreeMap<Uuid, String>> = BTreeMap::new();
    let mut lines = Vec::new();
    for operation in operations {
        let mut resource = String::new();
        if let (Some(first), Format::Table) = (operation.resources.first(), context.format) {
            let (kind, id) = kind_and_id(*first);
            if !names.contains_key(kind) {
                let fields = [("fields", Some("id,name"))];
                let named: Vec<Named> =
                    target::pages(&context.client, &format!("{kind}s"), &fields, None).await?;
                names.insert(kind, named.into_iter().map(|one| (one.id, one.name)).collect());
            }
            let name = names[kind].get(&id).cloned().unwrap_or_else(|| id.to_string());
            resource = format!("{kind} {name}");
        }
        let error = operation.error.as_ref().map(|problem| problem.code.as_str()).unwrap_or_default();
        lines.push(Line { operation, resource, error });
    }
    Ok(lines)
}

fn kind_and_id(resource: Resource) -> (&'static str, Uuid) {
    match resource {
        Resource::Server(id) => ("server", id.0),
        Resource::Image(id) => ("image", id.0),
        Resource::Volume(id) => ("volume", id.0),
        Resource::Network(id) => ("network", id.0),
        Resource::Snapshot(id) => ("snapshot", id.0),
    }
}

/// The error of an operation that did not succeed.
pub(crate) fn into_result(operation: &Operation) -> Result<(), Error> {
    match (&operation.state, &operation.error) {
        (_, Some(problem)) => Err(Error::Problem(problem.clone())),
        (OperationState::Cancelled, None) => Err(Error::Cancelled { operation: operation.id.to_string() }),
        _ => Ok(()),
    }
}

/// What is expected of work under way, to be put behind how far it is; nothing where nothing is known.
pub(crate) fn expected(progress: &Progress) -> String {
    let figures = [
        progress.bytes_per_s.map(|rate| format!("{}/s", output::bytes(rate))),
        progress.remaining_s.map(|seconds| format!("{} left", output::seconds(seconds))),
        progress.expected_downtime_ms.map(|ms| format!("would stand still {ms} ms")),
        // Most guests are never held back.
        progress
            .throttle_percent
            .filter(|percent| *percent > 0)
            .map(|percent| format!("held back {percent}%")),
    ];
    figures.into_iter().flatten().map(|figure| format!(", {figure}")).collect()
}

impl Row for Line {
    const COLUMNS: &'static [&'static str] =
        &["ID", "KIND", "RESOURCE", "STATE", "PROGRESS", "CREATED", "ERROR"];

    fn cells(&self) -> Vec<String> {
        let Operation { id, kind, state, progress, created_at, .. } = &self.operation;
        let shown = format!("{}% {}", progress.percent, progress.phase);
        vec![
            id.to_string(),
            kind.clone(),
            self.resource.clone(),
            output::word(state),
            shown.trim_end().to_owned() + &expected(progress),
            output::time(*created_at),
            self.error.clone(),
        ]
    }

    fn name(&self) -> String {
        self.operation.id.to_string()
    }
}
