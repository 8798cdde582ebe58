//! Processors: what hosts can show, what several have in common, and which one a new or changed server is to have.
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use model::cpu::{ComputeCpuBaseline, CpuBaseline, HostCpu};
use model::server::CpuTemplate;
use serde::Deserialize;

use crate::Context;
use crate::error::Error;
use crate::output::{self, Format};
use crate::target;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Cpu {
    /// Every feature of this host.
    Host,
    /// The x86-64-v2 level.
    #[value(name = "x86_64_v2")]
    V2,
    /// The x86-64-v3 level.
    #[value(name = "x86_64_v3")]
    V3,
}

/// Which CPU a guest is to see.
#[derive(Debug, Args)]
pub(crate) struct Choice {
    /// Which CPU the guest sees; a new server sees that of the host when nothing is said.
    #[arg(long, value_enum, conflicts_with = "cpu_baseline_file")]
    cpu: Option<Cpu>,
    /// File with what several hosts' CPUs have in common, as `toft host cpu-baseline` prints it with --output json.
    #[arg(long, value_name = "FILE")]
    cpu_baseline_file: Option<PathBuf>,
}

impl Choice {
    /// What was chosen, if anything was.
    pub(crate) fn template(&self) -> Result<Option<CpuTemplate>, Error> {
        if let Some(file) = &self.cpu_baseline_file {
            return Ok(Some(read::<Chosen>(file, "toft host cpu-baseline")?.cpu));
        }
        Ok(self.cpu.map(|cpu| match cpu {
            Cpu::Host => CpuTemplate::Host,
            Cpu::V2 => CpuTemplate::X86_64V2,
            Cpu::V3 => CpuTemplate::X86_64V3,
        }))
    }
}

/// What is needed of a baseline.
#[derive(Debug, Deserialize)]
struct Chosen {
    cpu: CpuTemplate,
}

/// `toft host cpu-baseline`.
#[derive(Debug, Args)]
pub(crate) struct Baseline {
    /// A file for each host, with what `toft --output json host cpu` prints there.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

impl Baseline {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let hosts =
            self.files.iter().map(|file| read(file, "toft host cpu")).collect::<Result<Vec<HostCpu>, _>>()?;
        let body = serde_json::to_vec(&ComputeCpuBaseline { hosts }).map_err(Error::Answer)?;
        let answer = context.client.send("POST", "/v1/host/actions/cpu-baseline", Some(body), &[]).await?;
        let made: CpuBaseline = answer.json()?;
        match context.format {
            Format::Json => output::json(&made),
            Format::Name => output::print_text(&format!("{}\n", listed(common(&made.cpu)))),
            Format::Table => output::print_text(&baseline(&made)),
        }
    }
}

/// `toft host cpu`.
pub(crate) async fn show(context: &Context) -> Result<(), Error> {
    let cpu: HostCpu = context.client.get("/v1/host/cpu").await?;
    match context.format {
        Format::Json => output::json(&cpu),
        Format::Name => output::print_text(&format!("{}\n", listed(&cpu.features))),
        Format::Table => output::print_text(&format!(
            "host         {}\ncpu          {}, {}\nfeatures     {}\nprotections  {}\n",
            cpu.name,
            cpu.vendor,
            cpu.model,
            listed(&cpu.features),
            listed(&cpu.protections)
        )),
    }
}

/// A baseline for people, and what each host gives up for it.
fn baseline(made: &CpuBaseline) -> String {
    let common = common(&made.cpu);
    let mut text = format!("vendor       {}\nfeatures     {}\n", made.vendor, listed(common));
    for host in &made.hidden {
        let names = if host.features.is_empty() { "nothing".to_owned() } else { listed(&host.features) };
        text.push_str(&format!("hidden       of {}: {names}\n", host.host));
        if !host.protections.is_empty() {
            text.push_str(&format!(
                "warning      guests on {} do without these protections: {}\n",
                host.host,
                listed(&host.protections)
            ));
        }
    }
    text
}

fn common(cpu: &CpuTemplate) -> &BTreeSet<String> {
    static NONE: BTreeSet<String> = BTreeSet::new();
    match cpu {
        CpuTemplate::Features(names) => names,
        CpuTemplate::Host | CpuTemplate::X86_64V2 | CpuTemplate::X86_64V3 => &NONE,
    }
}

fn listed(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
}

fn read<T: for<'de> Deserialize<'de>>(file: &Path, command: &str) -> Result<T, Error> {
    serde_json::from_str(&target::read_text(file)?).map_err(|cause| {
        Error::Usage(format!("{} is not what `{command}` prints with --output json: {cause}", file.display()))
    })
}
