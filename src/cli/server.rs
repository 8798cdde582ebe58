//! `toft server …`
use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use model::console::{ConsoleReader, ConsoleReaders};
use model::limits::GRACE_S_MAX;
use model::server::{
    CacheMode, CreateNic, CreateServer, Isolation, NicLimits, PatchServer, RestartPolicy, Server,
    ServerIsolation, ServerMetrics, ServerPlan,
};
use model::snapshot::RestoreServer;
use model::{ConsoleReaderId, Labels, Name};

use crate::bulk::Which;
use crate::error::Error;
use crate::migrate::{Limit, Migrate, Settle};
use crate::output::{self, Format, Row};
use crate::rates::{Limits, NewLimits};
use crate::target::{self, ListOptions};
use crate::{Context, bulk, console, cpu, wait};

/// What can be done with servers.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Create a server and start it.
    Create(Box<Create>),
    /// List servers.
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        options: ListOptions,
        /// Only the server with this reference.
        #[arg(long)]
        external_ref: Option<String>,
    },
    /// Show one server.
    Show {
        /// Name or id.
        server: String,
    },
    /// Change a server. CPUs, memory and CPU template take effect at its next start.
    Update(Box<Update>),
    /// Delete a server with its root volume.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id.
        server: String,
        /// Keep the root volume.
        #[arg(long)]
        keep_volumes: bool,
    },
    /// Start a server.
    Start(Which),
    /// Press the power button; after the grace, force it off.
    Stop(Stop),
    /// Shut down and start again; with --grace-s 0, press reset.
    Reboot(Stop),
    /// Park a running server.
    Pause(Which),
    /// Let a paused server run again.
    Resume(Which),
    /// Save its memory to the disk and end its machine; a start goes on where it was.
    Hibernate(Which),
    /// Give a server memory and disks of its own while it runs, in place of what it shares with the snapshot it goes on from.
    SettleMemory {
        /// Name or id.
        server: String,
    },
    /// Give a running server a new VMM under its feet; its guest stands still for some milliseconds.
    UpgradeVmm {
        /// Name or id.
        server: String,
    },
    /// Move a server to another host, as it runs, or off or hibernated.
    Migrate(Migrate),
    /// Make it what a snapshot of it shows. What it has in memory and on its disks since then is lost.
    Restore {
        /// Name or id.
        server: String,
        /// Snapshot's name or id.
        snapshot: String,
        /// End its machine for it, if it has one, or throw its hibernated memory away.
        #[arg(long)]
        stop: bool,
    },
    /// Make servers that go on from what it is now, memory and disk; it runs on.
    Clone(bulk::Clones),
    /// Change how fast a server that is on its way goes, and how long its guest may stand still.
    LimitMigration(Limit),
    /// Settle which host has a server that is in doubt. Look at the other host first.
    SettleMigration(Settle),
    /// Print the console's log.
    ConsoleLog {
        /// Name or id.
        server: String,
        /// Only the last bytes.
        #[arg(long, value_parser = target::size)]
        tail: Option<u64>,
    },
    /// Open the console. Ctrl-] leaves it.
    Console(console::Options),
    /// List who has the console open.
    ConsoleReaders {
        /// Name or id.
        server: String,
    },
    /// Put readers of the console out; tickets that nobody has used yet are worth nothing afterwards.
    ConsoleKick {
        /// Name or id.
        server: String,
        /// Only this reader's id; everyone when absent.
        #[arg(long)]
        reader: Option<ConsoleReaderId>,
    },
    /// Print counters.
    Metrics {
        /// Name or id.
        server: String,
    },
    /// Say what keeps its machine apart from the host, as found on the running process.
    Isolation {
        /// Name or id.
        server: String,
    },
}

/// `toft server create`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("origin").required(true)))]
pub(crate) struct Create {
    /// Unique name, also the host name.
    name: Name,
    /// Image's name or id.
    #[arg(long, group = "origin")]
    image: Option<String>,
    /// Snapshot's name or id: its disk, in place of the image's.
    #[arg(long, group = "origin")]
    snapshot: Option<String>,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    vcpus: u8,
    /// Memory, such as 1G.
    #[arg(long, value_parser = target::size)]
    memory: Option<u64>,
    /// Size of the root volume, such as 10G; the image's own when absent.
    #[arg(long, value_parser = target::size)]
    disk: Option<u64>,
    /// Network's name or id, or NETWORK=ADDRESS; may be given more than once.
    #[arg(long, conflicts_with = "no_network")]
    network: Vec<String>,
    /// Give it no interface.
    #[arg(long)]
    no_network: bool,
    #[command(flatten)]
    cpu: cpu::Choice,
    /// What a completed write of the root volume promises.
    #[arg(long, value_enum, default_value_t = Cache::Writeback)]
    cache: Cache,
    #[command(flatten)]
    limits: Limits,
    /// File with ssh public keys; may be given more than once.
    #[arg(long)]
    ssh_key_file: Vec<PathBuf>,
    /// File with cloud-init user data.
    #[arg(long)]
    user_data_file: Option<PathBuf>,
    /// What happens when its machine ends unasked.
    #[arg(long, value_enum, default_value_t = Restart::OnFailure)]
    restart: Restart,
    /// What its machine must be kept apart by.
    #[arg(long, value_enum, default_value_t = Walls::Standard)]
    isolation: Walls,
    /// Only make it.
    #[arg(long)]
    no_start: bool,
    /// A line for people.
    #[arg(long, default_value = "")]
    description: String,
    /// KEY=VALUE; may be given more than once.
    #[arg(long, value_parser = target::label)]
    label: Vec<(String, String)>,
    /// Your own unique reference.
    #[arg(long)]
    external_ref: Option<String>,
    /// Say what would be made, and make nothing.
    #[arg(long)]
    dry_run: bool,
}

/// `toft server update`.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// Name or id.
    server: String,
    /// New name.
    #[arg(long)]
    name: Option<Name>,
    /// New description.
    #[arg(long)]
    description: Option<String>,
    /// KEY=VALUE to set, KEY- to remove; may be given more than once.
    #[arg(long, value_parser = target::label_change)]
    label: Vec<(String, Option<String>)>,
    /// Virtual CPUs.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=32))]
    vcpus: Option<u8>,
    /// Memory, such as 1G.
    #[arg(long, value_parser = target::size)]
    memory: Option<u64>,
    #[command(flatten)]
    cpu: cpu::Choice,
    /// What happens when its machine ends unasked.
    #[arg(long, value_enum)]
    restart: Option<Restart>,
    /// What the next machine must be kept apart by.
    #[arg(long, value_enum)]
    isolation: Option<Walls>,
    /// Your own unique reference; an empty one removes it.
    #[arg(long)]
    external_ref: Option<String>,
    #[command(flatten)]
    limits: NewLimits,
    /// Only if the server is still at this generation.
    #[arg(long)]
    if_generation: Option<u64>,
}

/// `toft server stop` and `reboot`.
#[derive(Debug, Args)]
pub(crate) struct Stop {
    #[command(flatten)]
    which: Which,
    /// Seconds the guest has to shut down; 0 forces at once.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=GRACE_S_MAX))]
    grace_s: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Cache {
    /// Durable after the guest's flush.
    Writeback,
    /// Durable when it completes.
    Writethrough,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Restart {
    /// Stay as it ended.
    Never,
    /// Start again after a failure.
    OnFailure,
    /// Start again after any end that was not asked for.
    Always,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Walls {
    /// Every wall that this host can build.
    Standard,
    /// Every wall there is, or it is not started.
    Strict,
}

impl From<Walls> for Isolation {
    fn from(walls: Walls) -> Isolation {
        match walls {
            Walls::Standard => Isolation::Standard,
            Walls::Strict => Isolation::Strict,
        }
    }
}

impl From<Restart> for RestartPolicy {
    fn from(restart: Restart) -> RestartPolicy {
        match restart {
            Restart::Never => RestartPolicy::Never,
            Restart::OnFailure => RestartPolicy::OnFailure,
            Restart::Always => RestartPolicy::Always,
        }
    }
}

impl Verb {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Verb::Create(create) => create.run(context).await,
            Verb::List { options, external_ref } => {
                let parameters = [("external_ref", external_ref.as_deref())];
                let servers: Vec<Server> =
                    target::list_with(&context.client, "servers", &options, &parameters).await?;
                output::many(context.format, &servers)
            }
            Verb::Show { server } => {
                let id = target::resolve(&context.client, "servers", &server).await?;
                let server: Server = context.client.get(&format!("/v1/servers/{id}")).await?;
                output::one(context.format, &server)
            }
            Verb::Update(update) => update.run(context).await,
            Verb::Delete { server, keep_volumes } => {
                let id = target::resolve(&context.client, "servers", &server).await?;
                let query = if keep_volumes { "?keep_volumes=true" } else { "" };
                let answer =
                    context.client.send("DELETE", &format!("/v1/servers/{id}{query}"), None, &[]).await?;
                wait::finish::<Server>(context, &answer, "servers", true).await
            }
            Verb::Start(which) => bulk::act(context, &which, "start", None).await,
            Verb::Stop(stop) => bulk::act(context, &stop.which, "stop", Some(stop.grace_s)).await,
            Verb::Reboot(stop) => bulk::act(context, &stop.which, "reboot", Some(stop.grace_s)).await,
            Verb::Pause(which) => bulk::act(context, &which, "pause", None).await,
            Verb::Resume(which) => bulk::act(context, &which, "resume", None).await,
            Verb::Hibernate(which) => bulk::act(context, &which, "hibernate", None).await,
            Verb::SettleMemory { server } => bulk::one(context, &server, "settle-memory").await,
            Verb::UpgradeVmm { server } => bulk::one(context, &server, "upgrade-vmm").await,
            Verb::Migrate(migrate) => migrate.run(context).await,
            Verb::Restore { server, snapshot, stop } => {
                let id = target::resolve(&context.client, "servers", &server).await?;
                let body = serde_json::to_vec(&RestoreServer { snapshot, stop }).map_err(Error::Answer)?;
                let path = format!("/v1/servers/{id}/actions/restore");
                let answer = context.client.send("POST", &path, Some(body), &[]).await?;
                wait::finish::<Server>(context, &answer, "servers", false).await
            }
            Verb::Clone(clones) => clones.run(context, "servers").await,
            Verb::LimitMigration(limit) => limit.run(context).await,
            Verb::SettleMigration(settle) => settle.run(context).await,
            Verb::ConsoleLog { server, tail } => {
                let id = target::resolve(&context.client, "servers", &server).await?;
                let query = tail.map(|bytes| format!("?tail_bytes={bytes}")).unwrap_or_default();
                let path = format!("/v1/servers/{id}/console-log{query}");
                let answer = context.client.send("GET", &path, None, &[]).await?;
                output::print_bytes(&answer.body)
            }
            Verb::Console(options) => console::run(context, &options).await,
            Verb::ConsoleReaders { server } => {
                let id = target::resolve(&context.client, "servers", &server).await?;
                let path = format!("/v1/servers/{id}/console-readers");
                output::many(context.format, &context.client.get::<ConsoleReaders>(&path).await?.items)
            }
            Verb::ConsoleKick { server, reader } => {
                let id = target::resolve(&context.client, "servers", &server).await?;
                let query = reader.map(|reader| format!("?reader={reader}")).unwrap_or_default();
                let path = format!("/v1/servers/{id}/console-readers{query}");
                let answer = context.client.send("DELETE", &path, None, &[]).await?;
                output::many(context.format, &answer.json::<ConsoleReaders>()?.items)
            }
            Verb::Isolation { server } => {
                let id = target::resolve(&context.client, "servers", &server).await?;
                let found: ServerIsolation =
                    context.client.get(&format!("/v1/servers/{id}/isolation")).await?;
                match context.format {
                    Format::Json => output::json(&found),
                    _ => output::print_text(&isolation_text(&found)),
                }
            }
            Verb::Metrics { server } => {
                let id = target::resolve(&context.client, "servers", &server).await?;
                let metrics: ServerMetrics = context.client.get(&format!("/v1/servers/{id}/metrics")).await?;
                match context.format {
                    Format::Json => output::json(&metrics),
                    _ => output::print_text(&metrics_text(&metrics)),
                }
            }
        }
    }
}

impl Create {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let dry_run = self.dry_run;
        let body = serde_json::to_vec(&self.into_request()?).map_err(Error::Answer)?;
        if dry_run {
            let answer = context.client.send("POST", "/v1/servers?dry_run=true", Some(body), &[]).await?;
            let plan: ServerPlan = answer.json()?;
            output::plan(context.format, &plan, &plan.server, &plan.steps)?;
            if context.format == Format::Table {
                let left = output::bytes(plan.memory_bytes_left);
                output::print_text(&format!("memory left afterwards: {left}\n"))?;
            }
            return Ok(());
        }
        let answer = context.client.send("POST", "/v1/servers", Some(body), &[]).await?;
        wait::finish::<Server>(context, &answer, "servers", false).await
    }

    fn into_request(self) -> Result<CreateServer, Error> {
        let limits = self.limits.nic();
        let nics = match (self.no_network, self.network.as_slice()) {
            (true, _) => Some(Vec::new()),
            (false, []) if limits == NicLimits::default() => None,
            (false, []) => Some(vec![CreateNic { limits, ..CreateNic::default() }]),
            (false, all) => Some(all.iter().map(|text| nic(text, limits)).collect::<Result<_, _>>()?),
        };
        let mut ssh_keys = Vec::new();
        for file in &self.ssh_key_file {
            let text = target::read_text(file)?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            ssh_keys.extend(lines.map(str::to_owned));
        }
        Ok(CreateServer {
            name: self.name,
            image: self.image,
            snapshot: self.snapshot,
            vcpus: self.vcpus,
            memory_bytes: self.memory,
            disk_bytes: self.disk,
            cache: match self.cache {
                Cache::Writeback => CacheMode::Writeback,
                Cache::Writethrough => CacheMode::Writethrough,
            },
            disk_limits: self.limits.disk(),
            nics,
            cpu: self.cpu.template()?.unwrap_or_default(),
            ssh_keys,
            user_data: self.user_data_file.as_deref().map(target::read_text).transpose()?,
            restart_policy: self.restart.into(),
            isolation: self.isolation.into(),
            start: !self.no_start,
            description: self.description,
            labels: target::labels(&self.label)?,
            external_ref: self.external_ref,
        })
    }
}

fn nic(text: &str, limits: NicLimits) -> Result<CreateNic, Error> {
    let (network, ipv4) = match text.split_once('=') {
        Some((network, address)) => {
            let address = address.parse().map_err(|_| {
                Error::Usage(format!("{address:?} is not an IPv4 address; use NETWORK or NETWORK=ADDRESS"))
            })?;
            (network, Some(address))
        }
        None => (text, None),
    };
    Ok(CreateNic { network: Some(network.to_owned()), ipv4, limits })
}

impl Update {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let id = target::resolve(&context.client, "servers", &self.server).await?;
        let (mut nic_limits, mut generation) = (None, self.if_generation);
        if self.limits.has_nics() {
            // Limits of an interface are sent whole, so they must still be those that were read.
            let server: Server = context.client.get(&format!("/v1/servers/{id}")).await?;
            nic_limits = Some(self.limits.nics(&server.nics));
            generation = generation.or(Some(server.generation));
        }
        let patch = PatchServer {
            name: self.name,
            description: self.description,
            labels: (!self.label.is_empty()).then(|| self.label.into_iter().collect()),
            vcpus: self.vcpus,
            memory_bytes: self.memory,
            cpu: self.cpu.template()?,
            restart_policy: self.restart.map(RestartPolicy::from),
            isolation: self.isolation.map(Isolation::from),
            external_ref: self.external_ref.map(|text| (!text.is_empty()).then_some(text)),
            disk_limits: self.limits.disk(),
            nic_limits,
        };
        let body = serde_json::to_vec(&patch).map_err(Error::Answer)?;
        let etag = generation.map(|generation| format!("\"{generation}\""));
        let headers: Vec<(&str, &str)> = etag.iter().map(|etag| ("if-match", etag.as_str())).collect();
        let answer = context.client.send("PATCH", &format!("/v1/servers/{id}"), Some(body), &headers).await?;
        output::one(context.format, &answer.json::<Server>()?)
    }
}

impl Row for Server {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "STATE", "VCPUS", "MEMORY", "DISK", "ADDRESS", "CREATED", "LABELS", "ID", "REASON"];

    fn cells(&self) -> Vec<String> {
        let disk: u64 = self.volumes.iter().map(|volume| volume.size_bytes).sum();
        let addresses: Vec<String> = self.nics.iter().map(|nic| nic.ipv4.to_string()).collect();
        vec![
            self.name.to_string(),
            output::word(&self.state),
            self.vcpus.to_string(),
            output::bytes(self.memory_bytes),
            if self.volumes.is_empty() { "-".to_owned() } else { output::bytes(disk) },
            addresses.join(","),
            output::time(self.created_at),
            labels_text(&self.labels),
            self.id.to_string(),
            reason_text(self),
        ]
    }

    fn name(&self) -> String {
        self.name.to_string()
    }
}

impl Row for ConsoleReader {
    const COLUMNS: &'static [&'static str] = &["ID", "OPENED BY", "SINCE", "MAY TYPE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.opened_by.clone(),
            output::time(self.opened_at),
            if self.read_only { "no" } else { "yes" }.to_owned(),
        ]
    }

    fn name(&self) -> String {
        self.id.to_string()
    }
}

/// Why a server is in its state, and when it is started again.
fn reason_text(server: &Server) -> String {
    let why = server.state_reason.as_ref().map(|reason| reason.detail.clone()).unwrap_or_default();
    match server.restart {
        Some(model::server::Restart { attempt, at: Some(at) }) => {
            format!("{why}; restart {attempt} in a row at {}", output::time(at))
        }
        _ => match &server.machine {
            Some(now) if why.is_empty() => format!(
                "runs with {} vCPUs and {} until its next start",
                now.vcpus,
                output::bytes(now.memory_bytes)
            ),
            _ => why,
        },
    }
}

/// Labels as they are typed.
pub(crate) fn labels_text(labels: &Labels) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

fn isolation_text(found: &ServerIsolation) -> String {
    let mut text = String::new();
    for item in &found.items {
        let stands = if item.stands { "stands " } else { "MISSING" };
        text.push_str(&format!("{:<16} {stands}  {}\n", item.name, item.detail));
    }
    let standing = found.items.iter().filter(|item| item.stands).count();
    text.push_str(&format!("{standing} of {} walls stand\n", found.items.len()));
    text
}

fn metrics_text(metrics: &ServerMetrics) -> String {
    let mut text = format!(
        "running        {} s, {} resets\n\
         memory         {} resident, {} shared, {} in the balloon, {} reported free\n",
        metrics.running_ms / 1000,
        metrics.resets,
        output::bytes(metrics.memory_resident_bytes),
        output::bytes(metrics.memory_shared_bytes),
        output::bytes(metrics.balloon_bytes),
        output::bytes(metrics.reported_bytes),
    );
    if let Some(owed) = metrics.memory_owed_bytes.filter(|bytes| *bytes > 0) {
        let owed = output::bytes(owed);
        text.push_str(&format!("memory owed    {owed} by the host that it has moved from\n"));
    }
    for (at, (cpu_ms, exits)) in metrics.vcpu_cpu_ms.iter().zip(&metrics.vcpu_exits).enumerate() {
        text.push_str(&format!("vcpu {at:<9} {:.1} s of CPU, {exits} exits\n", *cpu_ms as f64 / 1000.0));
    }
    for (at, disk) in metrics.disks.iter().enumerate() {
        text.push_str(&format!(
            "disk {at:<9} {} reads ({}), {} writes ({}), {} flushes, {} errors, throttled {} times\n",
            disk.reads,
            output::bytes(disk.read_bytes),
            disk.writes,
            output::bytes(disk.written_bytes),
            disk.flushes,
            disk.errors,
            disk.throttled,
        ));
    }
    for (at, nic) in metrics.nics.iter().enumerate() {
        text.push_str(&format!(
            "nic {at:<10} received {} packets ({}), sent {} ({}), dropped {} in and {} out\n",
            nic.rx_packets,
            output::bytes(nic.rx_bytes),
            nic.tx_packets,
            output::bytes(nic.tx_bytes),
            nic.rx_dropped,
            nic.tx_dropped,
        ));
    }
    if metrics.device_faults > 0 {
        text.push_str(&format!("the guest broke device rules {} times\n", metrics.device_faults));
    }
    text
}
