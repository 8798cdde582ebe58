//! `toft host upgrade`: servers that run or are paused get a new VMM, the host's a first one alone, the others
//! one by one behind it.
use std::time::{Duration, Instant};

use clap::Args;
use model::host::HostReport;
use model::operation::{Accepted, Operation};
use model::server::{Server, ServerState};
use model::{Code, ServerId, Time};
use serde::Serialize;

use crate::error::Error;
use crate::output::{self, Format, Row};
use crate::target::{self, ListOptions};
use crate::{Context, operation, wait};

/// `toft host upgrade`.
#[derive(Debug, Args)]
pub(crate) struct Upgrade {
    #[command(flatten)]
    options: ListOptions,
    /// Name or id of the server that goes first; the one that runs and was made last when absent.
    #[arg(long)]
    canary: Option<String>,
    /// Seconds for which the first one is watched before the others follow.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=3600))]
    watch_s: u64,
    /// Say what would be done to each server, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What becomes of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    /// Its VMM is of the host's build already.
    Current,
    /// It would be tried.
    Planned,
    /// It has a new one.
    Upgraded,
    /// It cannot get one as it is.
    Skipped,
    /// It has not got one, and nothing more was tried.
    Failed,
    /// One before it failed.
    NotTried,
}

#[derive(Debug, Serialize)]
struct Line {
    id: ServerId,
    name: String,
    /// What it ran in before.
    build: Option<String>,
    outcome: Outcome,
    /// When its machine started, which an upgrade does not change.
    #[serde(skip)]
    started_at: Option<Time>,
    /// Whether its guest can show that it goes on.
    #[serde(skip)]
    runs: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

/// How one upgrade came out.
enum Came {
    Upgraded,
    Skipped(String),
    Failed(Error),
}

fn path(id: &impl std::fmt::Display) -> String {
    format!("/v1/servers/{id}/actions/upgrade-vmm")
}

impl Upgrade {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let report: HostReport = context.client.get("/v1/host").await?;
        let no_build = || Error::Upgrade("the host cannot start VMMs; see `toft host check`".to_owned());
        let build = report.vmm_build.ok_or_else(no_build)?;
        let servers: Vec<Server> = target::list(&context.client, "servers", &self.options).await?;
        let mut lines: Vec<Line> = servers.iter().filter_map(|server| line(server, &build)).collect();
        self.put_canary_first(context, &mut lines).await?;
        if self.dry_run {
            return finish(context, &lines, None);
        }
        let count = lines.iter().filter(|line| line.outcome == Outcome::Planned).count();
        let (mut failed, mut number, mut upgraded_count) = (None, 0, 0);
        for line in lines.iter_mut().filter(|line| line.outcome == Outcome::Planned) {
            if failed.is_some() {
                line.outcome = Outcome::NotTried;
                continue;
            }
            number += 1;
            if context.format == Format::Table {
                eprintln!("{number} of {count}: {}", line.name);
            }
            let mut came = upgrade(context, line.id).await;
            if upgraded_count == 0 && number < count {
                came = self.watch(context, line, &build, came).await;
            }
            match came {
                Came::Upgraded => {
                    line.outcome = Outcome::Upgraded;
                    upgraded_count += 1;
                }
                Came::Skipped(why) => {
                    // Nobody else goes first in the place of the one that was named.
                    if number == 1 && self.canary.is_some() {
                        failed =
                            Some(Error::Upgrade(format!("server {} did not go first: {why}", line.name)));
                    }
                    (line.outcome, line.detail) = (Outcome::Skipped, Some(why));
                }
                Came::Failed(cause) => {
                    (line.outcome, line.detail) = (Outcome::Failed, Some(cause.to_string()));
                    failed = Some(cause);
                }
            }
        }
        if failed.is_none() && upgraded_count == 0 && count > 0 {
            failed = Some(Error::Upgrade("no server that was to be upgraded could be".to_owned()));
        }
        finish(context, &lines, failed)
    }

    /// The one that is to show whether the new build is any good.
    async fn put_canary_first(&self, context: &Context, lines: &mut [Line]) -> Result<(), Error> {
        // Who was made last has least to lose; one that is paused shows nothing.
        lines.sort_by_key(|line| std::cmp::Reverse((line.runs, line.id.0)));
        let Some(canary) = &self.canary else { return Ok(()) };
        let id = target::resolve(&context.client, "servers", canary).await?;
        let at = lines.iter().position(|line| line.id.to_string() == id);
        let at = at.filter(|at| lines[*at].outcome == Outcome::Planned);
        let not_it = || Error::Usage(format!("server {canary} is none that would be upgraded"));
        lines[..=at.ok_or_else(not_it)?].rotate_right(1);
        Ok(())
    }

    /// Looks whether the first one goes on in its new VMM.
    async fn watch(&self, context: &Context, line: &Line, build: &str, came: Came) -> Came {
        let Came::Upgraded = came else { return came };
        let end = Instant::now() + Duration::from_secs(self.watch_s);
        loop {
            match context.client.get::<Server>(&format!("/v1/servers/{}", line.id)).await {
                Err(cause) => return Came::Failed(cause),
                Ok(server)
                    if server.vmm_build.as_deref() != Some(build) || server.started_at != line.started_at =>
                {
                    let state = output::word(&server.state);
                    let detail =
                        format!("server {} did not go on in its new VMM: it is {state}", server.name);
                    return Came::Failed(Error::Upgrade(detail));
                }
                Ok(_) if Instant::now() >= end => return Came::Upgraded,
                Ok(_) => tokio::time::sleep(Duration::from_secs(1).min(end - Instant::now())).await,
            }
        }
    }
}

/// A server with a machine; others get the host's build when they start.
fn line(server: &Server, build: &str) -> Option<Line> {
    let can = server.allowed_actions.iter().any(|action| action == "upgrade-vmm");
    let is_current = server.vmm_build.as_deref() == Some(build);
    let has_machine = server.vmm_build.is_some()
        || matches!(server.state, ServerState::Running | ServerState::Paused | ServerState::Moving);
    let (outcome, detail) = match (is_current, can) {
        (true, _) => (Outcome::Current, None),
        (false, true) => (Outcome::Planned, None),
        (false, false) if has_machine => {
            let state = output::word(&server.state);
            (
                Outcome::Skipped,
                Some(format!(
                    "it is {state}; only a server that runs or is paused, and is at rest, can be upgraded"
                )),
            )
        }
        (false, false) => return None,
    };
    let (id, name) = (server.id, server.name.to_string());
    let (build, started_at) = (server.vmm_build.clone(), server.started_at);
    let runs = server.state == ServerState::Running;
    Some(Line { id, name, build, outcome, started_at, runs, detail })
}

async fn upgrade(context: &Context, id: ServerId) -> Came {
    let outcome = async {
        let answer = context.client.send("POST", &path(&id), None, &[]).await?;
        let accepted: Accepted<Server> = answer.json()?;
        operation::into_result(&wait::until_end(context, &accepted.operation).await?)
    };
    match outcome.await {
        Ok(()) => Came::Upgraded,
        // It does something else meanwhile, or cannot be handed over as it is, or has a disk that would not fit as a whole: whatever
        // its guest does is not to keep the others from theirs.
        Err(Error::Problem(problem))
            if matches!(problem.code, Code::WrongState | Code::NotFound | Code::DiskFull) =>
        {
            Came::Skipped(problem.detail)
        }
        // A large clone takes its time, and does not need this command any more.
        Err(cause @ Error::WaitTimeout { .. }) if is_settling(context, id).await => {
            Came::Skipped(cause.to_string())
        }
        Err(cause) => Came::Failed(cause),
    }
}

/// Whether the memory of a server is still to become its own.
async fn is_settling(context: &Context, id: ServerId) -> bool {
    let look = async {
        let server: Server = context.client.get(&format!("/v1/servers/{id}")).await?;
        let Some(operation) = server.operation_id else { return Ok(false) };
        let operation: Operation = context.client.get(&format!("/v1/operations/{operation}")).await?;
        Ok::<_, Error>(operation.progress.phase == "settling_memory")
    };
    look.await.unwrap_or(false)
}

/// Prints what became of each; fails with what went wrong.
fn finish(context: &Context, lines: &[Line], failed: Option<Error>) -> Result<(), Error> {
    output::many(context.format, lines)?;
    if context.format == Format::Table {
        let count = |outcome| lines.iter().filter(|line| line.outcome == outcome).count();
        let counts = [
            (Outcome::Planned, "to upgrade"),
            (Outcome::Upgraded, "upgraded"),
            (Outcome::Current, "current"),
            (Outcome::Skipped, "skipped"),
            (Outcome::Failed, "failed"),
            (Outcome::NotTried, "not tried"),
        ];
        let told = counts.map(|(outcome, word)| (count(outcome), word));
        let told: Vec<String> = told
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, word)| format!("{count} {word}"))
            .collect();
        eprintln!("{}", if told.is_empty() { "no server has a machine".to_owned() } else { told.join(", ") });
    }
    failed.map_or(Ok(()), Err)
}

impl Row for Line {
    const COLUMNS: &'static [&'static str] = &["NAME", "BUILD", "OUTCOME", "DETAIL"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.build.clone().unwrap_or_else(|| "-".to_owned()),
            output::word(&self.outcome).replace('_', " "),
            self.detail.clone().unwrap_or_default(),
        ]
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

#[cfg(test)]
mod tests;
