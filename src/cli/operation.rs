//! `toft operation …`
use clap::Subcommand;
use model::operation::{Operation, OperationState, Progress};

use crate::error::Error;
use crate::output::{self, Row};
use crate::{Context, target, wait};

/// What can be done with operations.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List operations, also those that have ended.
    #[command(visible_alias = "ls")]
    List {
        /// Only those on the resource of this id.
        #[arg(long)]
        resource: Option<uuid::Uuid>,
        /// Order: created_at or -created_at.
        #[arg(long, allow_hyphen_values = true)]
        sort: Option<String>,
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
                let resource = resource.map(|id| id.to_string());
                let parameters = [("resource_id", resource.as_deref()), ("sort", sort.as_deref())];
                let operations: Vec<Operation> =
                    target::pages(&context.client, "operations", &parameters, limit).await?;
                output::many(context.format, &operations)
            }
            Verb::Show { id } => {
                let operation: Operation = context.client.get(&format!("/v1/operations/{id}")).await?;
                output::one(context.format, &operation)
            }
            Verb::Wait { id } => {
                let operation: Operation = context.client.get(&format!("/v1/operations/{id}")).await?;
                let ended = wait::until_end(context, &operation).await?;
                output::one(context.format, &ended)?;
                into_result(&ended)
            }
            Verb::Cancel { id } => {
                let path = format!("/v1/operations/{id}");
                let operation: Operation = context.client.send("DELETE", &path, None, &[]).await?.json()?;
                output::one(context.format, &operation)
            }
        }
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

impl Row for Operation {
    const COLUMNS: &'static [&'static str] = &["ID", "KIND", "STATE", "PROGRESS", "CREATED", "ERROR"];

    fn cells(&self) -> Vec<String> {
        let progress = format!("{}% {}", self.progress.percent, self.progress.phase);
        let progress = progress.trim_end().to_owned() + &expected(&self.progress);
        let error = self.error.as_ref().map(|problem| problem.code.as_str()).unwrap_or_default();
        vec![
            self.id.to_string(),
            self.kind.clone(),
            output::word(&self.state),
            progress,
            output::time(self.created_at),
            error,
        ]
    }

    fn name(&self) -> String {
        self.id.to_string()
    }
}
