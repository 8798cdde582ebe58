//! `toft server migrate`: what a move to another host would bring, and what is in its way.
use std::net::SocketAddr;

use clap::Args;
use model::migration::{MigrateServer, MigrationPlan};

use crate::Context;
use crate::error::Error;
use crate::output::{self, Format};
use crate::target;

/// `toft server migrate`.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// Name or id.
    server: String,
    /// Address and port at which the target waits for other hosts.
    #[arg(long, value_name = "ADDRESS:PORT")]
    target: SocketAddr,
    /// The target's ticket, which `toft host ticket` made there. Other users of this machine see a flag.
    #[arg(long, env = "TOFT_MIGRATION_TICKET", hide_env_values = true)]
    ticket: String,
    /// Say what would be moved and what is in the way, and move nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Migrate {
    /// Asks the source, which asks the target.
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "servers", &self.server).await?;
        let spec = MigrateServer { target: self.target, ticket: self.ticket };
        let body = serde_json::to_vec(&spec).map_err(Error::Answer)?;
        let query = if self.dry_run { "?dry_run=true" } else { "" };
        let path = format!("/v1/servers/{id}/actions/migrate{query}");
        let plan: MigrationPlan = context.client.send("POST", &path, Some(body), &[]).await?.json()?;
        match context.format {
            Format::Json => output::json(&plan),
            Format::Name => output::print_text(&format!("{}\n", plan.target)),
            Format::Table => output::print_text(&plan_text(&plan)),
        }
    }
}

fn plan_text(plan: &MigrationPlan) -> String {
    let mut text = format!(
        "target   {}, toftd {}\nmemory   {}\ndisks    {} written\n",
        plan.target,
        plan.target_version,
        output::bytes(plan.memory_bytes),
        output::bytes(plan.disk_bytes)
    );
    for obstacle in &plan.blocked_by {
        text.push_str(&format!("blocked  {}: {}\n", output::word(&obstacle.code), obstacle.detail));
    }
    text
}
