//! `toft server migrate` and what settles a move whose other end is gone.
use std::net::SocketAddr;

use clap::{Args, ValueEnum};
use model::migration::{
    LimitMigration, MigrateServer, MigrationMode, MigrationOwner, MigrationPlan, SettleMigration,
};
use model::server::Server;

use crate::error::Error;
use crate::output::{self, Format};
use crate::target;
use crate::{Context, wait};

/// `toft server migrate`.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// Name or id.
    server: String,
    /// Address and port at which the target waits for other hosts; no name.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = address)]
    target: SocketAddr,
    /// The target's ticket, which `toft host ticket` made there. Other users of this machine see a flag.
    #[arg(long, env = "TOFT_MIGRATION_TICKET", hide_env_values = true)]
    ticket: String,
    /// Most bytes a second that go over the network, such as 100M; 1M at the least.
    #[arg(long, value_parser = target::size)]
    bandwidth: Option<u64>,
    /// How long a guest that runs may stand still, in milliseconds: 1 to 60000, 50 when it is not said.
    #[arg(long, value_name = "MS")]
    downtime_ms: Option<u32>,
    /// How it moves.
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    mode: Mode,
    /// Say what would be moved and what is in the way, and move nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    /// With its machine if it has one, else as it is.
    Auto,
    /// Only off or hibernated.
    Cold,
    /// Only while it runs or is paused.
    Live,
    /// The same, with all of its memory before the machine or not at all.
    PreCopy,
    /// The same, and what is written while its memory is sent follows the machine.
    PostCopy,
}

impl Migrate {
    /// Asks the source, which asks the target.
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "servers", &self.server).await?;
        let spec = MigrateServer {
            target: self.target,
            ticket: self.ticket,
            mode: match self.mode {
                Mode::Auto => MigrationMode::Auto,
                Mode::Cold => MigrationMode::Cold,
                Mode::Live => MigrationMode::Live,
                Mode::PreCopy => MigrationMode::PreCopy,
                Mode::PostCopy => MigrationMode::PostCopy,
            },
            bandwidth_bytes_per_s: self.bandwidth,
            downtime_ms: self.downtime_ms,
        };
        let body = serde_json::to_vec(&spec).map_err(Error::Answer)?;
        let path = format!("/v1/servers/{id}/actions/migrate");
        if !self.dry_run {
            let answer = context.client.send("POST", &path, Some(body), &[]).await?;
            return wait::finish::<Server>(context, &answer, "servers", true).await;
        }
        let path = format!("{path}?dry_run=true");
        let plan: MigrationPlan = context.client.send("POST", &path, Some(body), &[]).await?.json()?;
        match context.format {
            Format::Json => output::json(&plan),
            Format::Name => output::print_text(&format!("{}\n", plan.target)),
            Format::Table => output::print_text(&plan_text(&plan)),
        }?;
        // A script goes no further.
        if plan.blocked_by.is_empty() { Ok(()) } else { Err(Error::Blocked(plan.target)) }
    }
}

/// A name would add whoever answers for it to those who are trusted.
fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "must be an address and a port, such as 192.0.2.7:8687, and not a name".to_owned())
}

fn plan_text(plan: &MigrationPlan) -> String {
    let mut text = format!(
        "target   {}, toftd {}\nmemory   {}\ndisks    {} written\n",
        plan.target,
        plan.target_version,
        output::bytes(plan.memory_bytes),
        output::bytes(plan.disk_bytes)
    );
    if plan.saved_bytes > 0 {
        text.push_str(&format!("saved    {}\n", output::bytes(plan.saved_bytes)));
    }
    for obstacle in &plan.blocked_by {
        text.push_str(&format!("blocked  {}: {}\n", output::word(&obstacle.code), obstacle.detail));
    }
    text
}

/// `toft server limit-migration`.
#[derive(Debug, Args)]
pub(crate) struct Limit {
    /// Name or id.
    server: String,
    /// Most bytes a second that go over the network from now on, such as 100M; 1M at the least, no bound when it is not said.
    #[arg(long, value_parser = target::size)]
    bandwidth: Option<u64>,
    /// How long a guest that runs may stand still, in milliseconds: 1 to 60000, 50 when it is not said.
    #[arg(long, value_name = "MS")]
    downtime_ms: Option<u32>,
}

impl Limit {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "servers", &self.server).await?;
        let spec = LimitMigration { bandwidth_bytes_per_s: self.bandwidth, downtime_ms: self.downtime_ms };
        let body = serde_json::to_vec(&spec).map_err(Error::Answer)?;
        let path = format!("/v1/servers/{id}/actions/limit-migration");
        let server: Server = context.client.send("POST", &path, Some(body), &[]).await?.json()?;
        output::one(context.format, &server)
    }
}

/// `toft server settle-migration`.
#[derive(Debug, Args)]
pub(crate) struct Settle {
    /// Name or id.
    server: String,
    /// Which host has it: this one, or the other.
    #[arg(long, value_enum)]
    owner: Owner,
    /// How that is known: what the other host has and does. It is kept in the event log.
    #[arg(long)]
    proof: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Owner {
    Here,
    There,
}

impl Settle {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "servers", &self.server).await?;
        let owner = match self.owner {
            Owner::Here => MigrationOwner::Here,
            Owner::There => MigrationOwner::There,
        };
        let body =
            serde_json::to_vec(&SettleMigration { owner, proof: self.proof }).map_err(Error::Answer)?;
        let path = format!("/v1/servers/{id}/actions/settle-migration");
        let server: Server = context.client.send("POST", &path, Some(body), &[]).await?.json()?;
        output::one(context.format, &server)
    }
}
