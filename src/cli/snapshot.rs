//! `toft snapshot …`
use clap::{Args, Subcommand};
use model::snapshot::{CreateSnapshot, PatchSnapshot, Snapshot};
use model::{Name, Time};

use crate::error::Error;
use crate::output::{self, Row};
use crate::server::labels_text;
use crate::target::{self, ListOptions};
use crate::{Context, wait};

/// What can be done with snapshots.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Take a snapshot of a server. One that runs stands still while its disks are copied.
    Create(Create),
    /// List snapshots.
    #[command(visible_alias = "ls")]
    List(ListOptions),
    /// Show one snapshot.
    Show {
        /// Name or id.
        snapshot: String,
    },
    /// Change a snapshot's name, words, labels or expiry.
    Update(Update),
    /// Delete a snapshot.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id.
        snapshot: String,
    },
}

/// `toft snapshot create`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Server's name or id.
    server: String,
    /// Unique name; made of the server's when absent.
    #[arg(long)]
    name: Option<Name>,
    /// Save the memory too, of a server that runs or is paused.
    #[arg(long)]
    memory: bool,
    /// When to delete it by itself, such as 2031-01-31T12:00:00Z.
    #[arg(long, value_parser = target::time)]
    expires_at: Option<Time>,
    /// A line for people.
    #[arg(long, default_value = "")]
    description: String,
    /// KEY=VALUE; may be given more than once.
    #[arg(long, value_parser = target::label)]
    label: Vec<(String, String)>,
}

/// `toft snapshot update`.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// Name or id.
    snapshot: String,
    /// New name.
    #[arg(long)]
    name: Option<Name>,
    /// New description.
    #[arg(long)]
    description: Option<String>,
    /// KEY=VALUE to set, KEY- to remove; may be given more than once.
    #[arg(long, value_parser = target::label_change)]
    label: Vec<(String, Option<String>)>,
    /// When to delete it by itself, such as 2031-01-31T12:00:00Z.
    #[arg(long, value_parser = target::time, conflicts_with = "never_expires")]
    expires_at: Option<Time>,
    /// Never delete it by itself.
    #[arg(long)]
    never_expires: bool,
    /// Only if the snapshot is still at this generation.
    #[arg(long)]
    if_generation: Option<u64>,
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Verb::Create(create) => create.run(context).await,
            Verb::List(options) => {
                let snapshots: Vec<Snapshot> = target::list(&context.client, "snapshots", &options).await?;
                output::many(context.format, &snapshots)
            }
            Verb::Show { snapshot } => {
                let id = target::resolve(&context.client, "snapshots", &snapshot).await?;
                let snapshot: Snapshot = context.client.get(&format!("/v1/snapshots/{id}")).await?;
                output::one(context.format, &snapshot)
            }
            Verb::Update(update) => update.run(context).await,
            Verb::Delete { snapshot } => {
                let id = target::resolve(&context.client, "snapshots", &snapshot).await?;
                let answer = context.client.send("DELETE", &format!("/v1/snapshots/{id}"), None, &[]).await?;
                wait::finish::<Snapshot>(context, &answer, "snapshots", true).await
            }
        }
    }
}

impl Create {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "servers", &self.server).await?;
        let spec = CreateSnapshot {
            name: self.name,
            memory: self.memory,
            expires_at: self.expires_at,
            description: self.description,
            labels: target::labels(&self.label)?,
        };
        let body = serde_json::to_vec(&spec).map_err(Error::Answer)?;
        let path = format!("/v1/servers/{id}/actions/snapshot");
        let answer = context.client.send("POST", &path, Some(body), &[]).await?;
        wait::finish::<Snapshot>(context, &answer, "snapshots", false).await
    }
}

impl Update {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "snapshots", &self.snapshot).await?;
        let patch = PatchSnapshot {
            name: self.name,
            description: self.description,
            labels: (!self.label.is_empty()).then(|| self.label.into_iter().collect()),
            expires_at: match self.never_expires {
                true => Some(None),
                false => self.expires_at.map(Some),
            },
        };
        let body = serde_json::to_vec(&patch).map_err(Error::Answer)?;
        let etag = self.if_generation.map(|generation| format!("\"{generation}\""));
        let headers: Vec<(&str, &str)> = etag.iter().map(|etag| ("if-match", etag.as_str())).collect();
        let answer =
            context.client.send("PATCH", &format!("/v1/snapshots/{id}"), Some(body), &headers).await?;
        output::one(context.format, &answer.json::<Snapshot>()?)
    }
}

impl Row for Snapshot {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "STATE", "SERVER", "MEMORY", "DISK", "STORED", "TAKEN", "EXPIRES", "LABELS", "ID"];

    fn cells(&self) -> Vec<String> {
        let disk: u64 = self.volumes.iter().map(|volume| volume.size_bytes).sum();
        vec![
            self.name.to_string(),
            output::word(&self.state),
            self.server_name.to_string(),
            if self.memory { output::bytes(self.memory_bytes) } else { "-".to_owned() },
            if self.volumes.is_empty() { "-".to_owned() } else { output::bytes(disk) },
            output::bytes(self.stored_bytes),
            self.taken_at.map(output::time).unwrap_or_default(),
            self.expires_at.map(output::time).unwrap_or_default(),
            labels_text(&self.labels),
            self.id.to_string(),
        ]
    }

    fn name(&self) -> String {
        self.name.to_string()
    }
}
