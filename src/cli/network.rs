//! `toft network …`
use clap::{Args, Subcommand, ValueEnum};
use model::Name;
use model::network::{CreateNetwork, Network, NetworkKind, NetworkPlan, PatchNetwork};

use crate::error::Error;
use crate::output::{self, Row};
use crate::target::{self, ListOptions};
use crate::{Context, wait};

/// What can be done with networks.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Create a network.
    Create(Create),
    /// List networks.
    #[command(visible_alias = "ls")]
    List(ListOptions),
    /// Show one network.
    Show {
        /// Name or id.
        network: String,
    },
    /// Change a network's name or labels.
    Update {
        /// Name or id.
        network: String,
        /// New name.
        #[arg(long)]
        name: Option<Name>,
        /// KEY=VALUE to set, KEY- to remove; may be given more than once.
        #[arg(long, value_parser = target::label_change)]
        label: Vec<(String, Option<String>)>,
    },
    /// Delete a network that no server uses.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id.
        network: String,
    },
}

/// `toft network create`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Unique name.
    name: Name,
    /// Private range, such as 10.80.0.0/24; a free one when absent.
    #[arg(long)]
    cidr: Option<String>,
    /// How it reaches the world.
    #[arg(long, value_enum, default_value_t = Kind::Nat)]
    kind: Kind,
    /// Network device of this host, such as eth1, that the network has for itself, to go on to other hosts behind it.
    #[arg(long, value_name = "DEVICE")]
    host_device: Option<String>,
    /// KEY=VALUE; may be given more than once.
    #[arg(long, value_parser = target::label)]
    label: Vec<(String, String)>,
    /// Say what would be made, and make nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    /// Through the host.
    Nat,
    /// Not at all.
    Isolated,
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Verb::Create(create) => {
                let request = CreateNetwork {
                    name: create.name,
                    kind: match create.kind {
                        Kind::Nat => NetworkKind::Nat,
                        Kind::Isolated => NetworkKind::Isolated,
                    },
                    ipv4_cidr: create.cidr,
                    host_device: create.host_device,
                    labels: target::labels(&create.label)?,
                };
                let body = serde_json::to_vec(&request).map_err(Error::Answer)?;
                if create.dry_run {
                    let path = "/v1/networks?dry_run=true";
                    let plan: NetworkPlan =
                        context.client.send("POST", path, Some(body), &[]).await?.json()?;
                    return output::plan(context.format, &plan, &plan.network, &plan.steps);
                }
                let answer = context.client.send("POST", "/v1/networks", Some(body), &[]).await?;
                wait::finish::<Network>(context, &answer, "networks", false).await
            }
            Verb::List(options) => {
                let networks: Vec<Network> = target::list(&context.client, "networks", &options).await?;
                output::many(context.format, &networks)
            }
            Verb::Show { network } => {
                let id = target::resolve(&context.client, "networks", &network).await?;
                let network: Network = context.client.get(&format!("/v1/networks/{id}")).await?;
                output::one(context.format, &network)
            }
            Verb::Update { network, name, label } => {
                let id = target::resolve(&context.client, "networks", &network).await?;
                let labels = (!label.is_empty()).then(|| label.into_iter().collect());
                let body = serde_json::to_vec(&PatchNetwork { name, labels }).map_err(Error::Answer)?;
                let path = format!("/v1/networks/{id}");
                let network: Network = context.client.send("PATCH", &path, Some(body), &[]).await?.json()?;
                output::one(context.format, &network)
            }
            Verb::Delete { network } => {
                let id = target::resolve(&context.client, "networks", &network).await?;
                let answer = context.client.send("DELETE", &format!("/v1/networks/{id}"), None, &[]).await?;
                wait::finish::<Network>(context, &answer, "networks", true).await
            }
        }
    }
}

impl Row for Network {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "STATE", "KIND", "CIDR", "GATEWAY", "USED", "BRIDGE", "DEVICE", "ID", "DETAIL"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            output::word(&self.state),
            output::word(&self.kind),
            self.ipv4_cidr.clone(),
            self.ipv4_gateway.to_string(),
            format!("{} of {}", self.addresses_used, self.addresses_total),
            self.bridge.clone(),
            self.host_device.clone().unwrap_or_default(),
            self.id.to_string(),
            self.state_detail.clone().unwrap_or_default(),
        ]
    }

    fn name(&self) -> String {
        self.name.to_string()
    }
}
