//! `toft host …`
use clap::Subcommand;
use model::host::{About, CheckStatus, Health, HostReport};
use model::migration::{CreateMigrationTicket, MigrationTicket};

use crate::Context;
use crate::cpu::{self, Baseline};
use crate::error::Error;
use crate::output::{self, Format};
use crate::upgrade::Upgrade;

/// What can be asked of the host.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show capacity and health.
    Show,
    /// Try KVM with a small guest and look at everything servers need; fails when servers cannot run.
    Check,
    /// Give every server that runs or is paused a new VMM where its own is of another build than the host's: one first, the others behind it.
    Upgrade(Upgrade),
    /// Make a ticket with which another host can bring a server here; it is shown once.
    Ticket {
        /// Seconds it is good for.
        #[arg(long)]
        lifetime_s: Option<u64>,
    },
    /// Show what CPU guests can see here.
    Cpu,
    /// Compute what the CPUs of several hosts have in common, for servers that are to move between them while they run.
    CpuBaseline(Baseline),
    /// Show the daemon's version and what it can do.
    About,
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Verb::Show => {
                let report: HostReport = context.client.get("/v1/host").await?;
                print(context.format, &report, false)
            }
            Verb::Check => {
                let tried = context.client.send("POST", "/v1/host/actions/probe", None, &[]).await;
                // What else is not good is told all the same, and may be why.
                let report: HostReport = context.client.get("/v1/host").await?;
                print(context.format, &report, true)?;
                tried?;
                match report.health {
                    Health::Failing => Err(Error::Guest(1)),
                    Health::Ok | Health::Degraded => Ok(()),
                }
            }
            Verb::Upgrade(upgrade) => upgrade.run(context).await,
            Verb::Ticket { lifetime_s } => {
                let body =
                    serde_json::to_vec(&CreateMigrationTicket { lifetime_s }).map_err(Error::Answer)?;
                let answer = context.client.send("POST", "/v1/migration-tickets", Some(body), &[]).await?;
                let made: MigrationTicket = answer.json()?;
                match context.format {
                    Format::Json => output::json(&made),
                    Format::Name => output::print_text(&format!("{}\n", made.ticket)),
                    Format::Table => output::print_text(&format!(
                        "ticket   {}\ntarget   {}\nexpires  {}\n",
                        made.ticket,
                        made.target,
                        output::time(made.expires_at)
                    )),
                }
            }
            Verb::Cpu => cpu::show(context).await,
            Verb::CpuBaseline(baseline) => baseline.run(context).await,
            Verb::About => {
                let about: About = context.client.get("/v1").await?;
                match context.format {
                    Format::Json => output::json(&about),
                    Format::Name => output::print_text(&format!("{}\n", about.product)),
                    Format::Table => output::print_text(&format!(
                        "{} {}, API {}, health {}\ncapabilities: {}\n",
                        about.product,
                        about.version,
                        about.api,
                        output::word(&about.health),
                        about.capabilities.join(", ")
                    )),
                }
            }
        }
    }
}

fn print(format: Format, report: &HostReport, all: bool) -> Result<(), Error> {
    match format {
        Format::Json => output::json(report),
        Format::Name => output::print_text(&format!("{}\n", report.name)),
        Format::Table => output::print_text(&text(report, all)),
    }
}

fn text(report: &HostReport, all: bool) -> String {
    let servers: Vec<String> =
        report.servers.iter().map(|(state, count)| format!("{count} {state}")).collect();
    let capacity = |capacity: &model::host::Capacity, used: &str| {
        format!(
            "{} free of {}, {} {used}",
            output::bytes(capacity.free_bytes),
            output::bytes(capacity.total_bytes),
            output::bytes(capacity.used_bytes)
        )
    };
    let mut text = format!(
        "host      {}\nhealth    {}\ntoftd     {}, since {}\nvmm       {}\nkernel    {}\ncpus      {} x {}, {} promised\n\
         memory    {}\nstorage   {}\nservers   {}\n",
        report.name,
        output::word(&report.health),
        report.version,
        output::time(report.started_at),
        report.vmm_build.as_deref().unwrap_or("cannot be started"),
        report.kernel,
        report.cpus.total,
        report.cpus.model,
        report.cpus.used,
        capacity(&report.memory, "promised"),
        capacity(&report.storage, "used"),
        if servers.is_empty() { "none".to_owned() } else { servers.join(", ") },
    );
    if let Some(kvm) = &report.kvm {
        text.push_str(&format!(
            "kvm       {}, Linux guests {}, exit {:.1} µs, kernel mode {:.1} M instructions/s\n",
            if kvm.works { "works" } else { "does not work" },
            if kvm.linux_guests { "run" } else { "do not run" },
            kvm.exit_ns as f64 / 1000.0,
            kvm.kernel_mode_ips as f64 / 1e6,
        ));
    }
    let shown: Vec<_> = report.checks.iter().filter(|check| all || check.status != CheckStatus::Ok).collect();
    let width = shown.iter().map(|check| check.name.len()).max().unwrap_or(0);
    if !shown.is_empty() {
        text.push('\n');
    }
    for check in shown {
        let status = output::word(&check.status);
        text.push_str(&format!("{status:<9} {:width$}  {}\n", check.name, check.detail));
    }
    text
}
