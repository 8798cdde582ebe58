//! `toft volume …`
use clap::Subcommand;
use model::Name;
use model::volume::{PatchVolume, Volume};

use crate::error::Error;
use crate::output::{self, Row};
use crate::target::{self, ListOptions};
use crate::{Context, wait};

/// What can be done with volumes.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List volumes.
    #[command(visible_alias = "ls")]
    List(ListOptions),
    /// Show one volume.
    Show {
        /// Name or id.
        volume: String,
    },
    /// Make a volume larger; its server must be stopped.
    Resize {
        /// Name or id.
        volume: String,
        /// New size, such as 20G.
        #[arg(value_parser = target::size)]
        size: u64,
    },
    /// Change a volume's name or labels.
    Update {
        /// Name or id.
        volume: String,
        /// New name.
        #[arg(long)]
        name: Option<Name>,
        /// KEY=VALUE to set, KEY- to remove; may be given more than once.
        #[arg(long, value_parser = target::label_change)]
        label: Vec<(String, Option<String>)>,
    },
    /// Delete a volume that no server uses.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id.
        volume: String,
    },
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Verb::List(options) => {
                let volumes: Vec<Volume> = target::list(&context.client, "volumes", &options).await?;
                output::many(context.format, &volumes)
            }
            Verb::Show { volume } => {
                let id = target::resolve(&context.client, "volumes", &volume).await?;
                let volume: Volume = context.client.get(&format!("/v1/volumes/{id}")).await?;
                output::one(context.format, &volume)
            }
            Verb::Resize { volume, size } => {
                change(context, &volume, PatchVolume { size_bytes: Some(size), ..PatchVolume::default() })
                    .await
            }
            Verb::Update { volume, name, label } => {
                let labels = (!label.is_empty()).then(|| label.into_iter().collect());
                change(context, &volume, PatchVolume { name, labels, ..PatchVolume::default() }).await
            }
            Verb::Delete { volume } => {
                let id = target::resolve(&context.client, "volumes", &volume).await?;
                let answer = context.client.send("DELETE", &format!("/v1/volumes/{id}"), None, &[]).await?;
                wait::finish::<Volume>(context, &answer, "volumes", true).await
            }
        }
    }
}

async fn change(context: &Context, volume: &str, patch: PatchVolume) -> Result<(), Error> {
    let id = target::resolve(&context.client, "volumes", volume).await?;
    let body = serde_json::to_vec(&patch).map_err(Error::Answer)?;
    let answer = context.client.send("PATCH", &format!("/v1/volumes/{id}"), Some(body), &[]).await?;
    output::one(context.format, &answer.json::<Volume>()?)
}

impl Row for Volume {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "STATE", "SIZE", "USED", "FORMAT", "SERVER", "CREATED", "ID"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            output::word(&self.state),
            output::bytes(self.size_bytes),
            output::bytes(self.used_bytes),
            output::word(&self.format),
            self.server_id.map(|id| id.to_string()).unwrap_or_default(),
            output::time(self.created_at),
            self.id.to_string(),
        ]
    }

    fn name(&self) -> String {
        self.name.to_string()
    }
}
