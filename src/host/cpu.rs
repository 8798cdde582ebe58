//! What processors guests can see on this host, and what a guest from another host would miss here. What several hosts have
//! in common is computed here, too. It asks the launcher once and changes nothing.
use std::collections::BTreeSet;
use std::sync::Arc;

use model::Code;
use model::cpu::{ComputeCpuBaseline, CpuBaseline, HiddenFeatures, HostCpu};
use model::limits::BASELINE_HOSTS_MAX;
use model::server::CpuTemplate;
use tokio::sync::OnceCell;
use wire::launch::{CpuReport, KvmReport};
use wire::machine;
use wire::peer::OfferedCpu;

use crate::error::{Error, Result};
use crate::servers::record::Held;
use crate::vmms::Launch;

/// The processor of this host, which is asked for once. Cheap to clone.
#[derive(Clone)]
pub struct Processor {
    launcher: Arc<dyn Launch>,
    known: Arc<OnceCell<Known>>,
}

/// What was found out about it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    pub(crate) cpu: Cpu,
    pub(crate) clock: Clock,
}

impl Processor {
    pub(crate) fn new(launcher: Arc<dyn Launch>) -> Processor {
        Processor { launcher, known: Arc::default() }
    }

    async fn look(&self) -> Result<&Known> {
        let probe = async || {
            let report = self.launcher.probe().await?;
            if report.cpu.shown.is_empty() {
                let detail = "KVM on this host lacks what machines need; `toft host check` says what";
                return Err(Error::new(Code::KvmUnavailable, detail));
            }
            Ok(Known { clock: Clock::of(&report), cpu: Cpu(report.cpu) })
        };
        self.known.get_or_try_init(probe).await
    }

    /// What is known of it. Where nothing can be found out nothing is judged by it: the VMM does so itself.
    pub(crate) async fn known(&self) -> Known {
        match self.look().await {
            Ok(known) => known.clone(),
            Err(cause) => {
                tracing::warn!("what processor guests see here is not known: {}", cause.chain());
                Known::default()
            }
        }
    }

    /// Answer to `GET /v1/host/cpu`. Fails with `kvm_unavailable` where no machine can be built.
    pub async fn shown(&self) -> Result<HostCpu> {
        let cpu = &self.look().await?.cpu;
        let Cpu(report) = cpu;
        Ok(HostCpu {
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            vendor: report.vendor.clone(),
            model: model(),
            features: cpu.shows(&CpuTemplate::Host).cloned().unwrap_or_default(),
            protections: report.protections.clone(),
        })
    }

    /// What has been found out by now, for who cannot wait.
    pub(crate) fn found_out(&self) -> Known {
        self.known.get().cloned().unwrap_or_default()
    }

    /// Refuses a list of features of which this host cannot show all. What cannot be judged is left to the VMM.
    pub(crate) async fn check(&self, cpu: Option<&CpuTemplate>) -> Result<()> {
        let Some(cpu @ CpuTemplate::Features(names)) = cpu else { return Ok(()) };
        if let Some(detail) = template(cpu).fault() {
            return Err(Error::invalid("/cpu/features", "not_valid", detail));
        }
        let known = self.known().await;
        let Some(here) = known.cpu.shows(&CpuTemplate::Host) else { return Ok(()) };
        let lacks: Vec<&str> = names.difference(here).map(String::as_str).take(NAMED_MAX).collect();
        if lacks.is_empty() {
            return Ok(());
        }
        let detail = format!(
            "this host cannot show {}; compute the baseline again, with this host among the others",
            lacks.join(", ")
        );
        Err(Error::invalid("/cpu/features", "not_available", detail))
    }
}

impl Known {
    /// The processor with which a guest goes on that has this.
    pub(crate) fn of(&self, cpu: &CpuTemplate, held: &Held) -> OfferedCpu {
        let cpu = held.cpu.as_ref().unwrap_or(cpu);
        self.cpu.offered(cpu, held.features.clone(), held.tsc_khz.or(self.clock.khz))
    }

    /// Why a guest cannot go on here with the processor that it had.
    pub(crate) fn refuses(&self, had: &OfferedCpu) -> Option<String> {
        self.cpu.misses(had, false).or_else(|| self.clock.misfits(had.tsc_khz))
    }
}

/// The host's processor, as it names itself.
pub(crate) fn model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

/// Most features that an error names: a caller's list may be long.
const NAMED_MAX: usize = 16;

/// What guests of every one of these hosts can see. Fails with `invalid` when a running guest can never go from one to another.
pub fn baseline(asked: ComputeCpuBaseline) -> Result<CpuBaseline> {
    let hosts = asked.hosts;
    if !(1..=BASELINE_HOSTS_MAX).contains(&hosts.len()) {
        let detail = format!("must be 1 to {BASELINE_HOSTS_MAX} hosts");
        return Err(Error::invalid("/hosts", "out_of_range", detail));
    }
    for (at, host) in hosts.iter().enumerate() {
        let refuse = |field: &str, detail: String| {
            Err(Error::invalid(format!("/hosts/{at}/{field}"), "not_valid", detail))
        };
        if let Some(detail) = machine::CpuTemplate::Features(host.features.clone()).fault() {
            return refuse("features", detail);
        }
        if !host.protections.is_subset(&host.features) {
            let detail = "must be among its features; is this an answer to `GET /v1/host/cpu`?";
            return refuse("protections", detail.to_owned());
        }
    }
    let mut rest = hosts.iter();
    let first = rest.next().map(|host| (host.vendor.clone(), host.features.clone()));
    let (vendor, mut common) = first.unwrap_or_default();
    for (at, host) in (1..).zip(rest) {
        if host.vendor != vendor {
            let detail = format!(
                "is {}, and that of the first host {vendor}: no running guest can go from one to the other; make a baseline \
                 for each vendor",
                host.vendor
            );
            return Err(Error::invalid(format!("/hosts/{at}/vendor"), "other_vendor", detail));
        }
        common.retain(|name| host.features.contains(name));
    }
    if common.is_empty() {
        let detail = "these processors have nothing in common; are these answers to `GET /v1/host/cpu`?";
        return Err(Error::invalid("/hosts", "not_valid", detail));
    }
    let hidden = hosts.into_iter().map(|host| HiddenFeatures {
        features: &host.features - &common,
        protections: &host.protections - &common,
        host: host.name,
    });
    Ok(CpuBaseline { hidden: hidden.collect(), cpu: CpuTemplate::Features(common), vendor })
}

/// The same in the words that VMMs and other hosts are told.
pub(crate) fn template(cpu: &CpuTemplate) -> machine::CpuTemplate {
    match cpu {
        CpuTemplate::Host => machine::CpuTemplate::Host,
        CpuTemplate::X86_64V2 => machine::CpuTemplate::X86_64V2,
        CpuTemplate::X86_64V3 => machine::CpuTemplate::X86_64V3,
        CpuTemplate::Features(names) => machine::CpuTemplate::Features(names.clone()),
    }
}

/// A processor as KVM offers it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cpu(CpuReport);

impl Cpu {
    /// What a guest of this template is shown here; nothing when it cannot be.
    pub(crate) fn shows(&self, cpu: &CpuTemplate) -> Option<&BTreeSet<String>> {
        let template = template(cpu);
        self.0.shown.iter().find(|shown| shown.template == template).map(|shown| &shown.features)
    }

    /// What another host has to be told of it for a guest that was shown `features`, or what its template shows here.
    pub(crate) fn offered(
        &self,
        cpu: &CpuTemplate,
        features: Option<BTreeSet<String>>,
        tsc_khz: Option<u32>,
    ) -> OfferedCpu {
        let features = match (features, cpu) {
            (Some(features), _) => features,
            (None, CpuTemplate::Features(names)) => names.clone(),
            (None, cpu) => self.shows(cpu).cloned().unwrap_or_default(),
        };
        OfferedCpu { template: template(cpu), vendor: self.0.vendor.clone(), features, tsc_khz }
    }

    /// What is missing here for a guest from there: one that `begins_anew` needs what its template is, and any other what it
    /// was shown.
    pub(crate) fn misses(&self, offered: &OfferedCpu, begins_anew: bool) -> Option<String> {
        let here = self.shows(&CpuTemplate::Host)?;
        let absent = |wanted: &BTreeSet<String>| {
            wanted.difference(here).map(String::as_str).take(NAMED_MAX).collect::<Vec<_>>().join(", ")
        };
        if begins_anew {
            let lacks = match &offered.template {
                machine::CpuTemplate::Host => return None,
                machine::CpuTemplate::Features(names) => absent(names),
                level if self.0.shown.iter().any(|shown| shown.template == *level) => return None,
                _ => "a feature of that level".to_owned(),
            };
            return (!lacks.is_empty())
                .then(|| format!("this host's processor lacks {lacks}, which the server's cpu asks for"));
        }
        // Of a source that does not know its processor nothing can be said.
        if !offered.vendor.is_empty() && offered.vendor != self.0.vendor {
            return Some(format!(
                "the guest runs on a {} processor and this host has one of {}, to which no running guest can go",
                offered.vendor, self.0.vendor
            ));
        }
        let lacks = absent(&offered.features);
        (!lacks.is_empty()).then(|| format!("this host's processor lacks {lacks}, which the guest was shown"))
    }
}

/// By how many millionths two counters differ at most that are of the same speed: what Linux's KVM takes for one
/// (`tsc_tolerance_ppm`), and a VMM that restores a processor does.
const TSC_TOLERANCE_PPM: u64 = 250;

/// How fast the time stamp counter runs that guests see here. A guest measures it once and tells the time by it from then on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Clock {
    /// In thousands of ticks a second, where that is known.
    pub(crate) khz: Option<u32>,
    /// Whether the processor can show another speed.
    pub(crate) can_scale: bool,
}

impl Clock {
    pub(crate) fn of(report: &KvmReport) -> Clock {
        let can_scale = report.extensions.iter().any(|(name, value)| name == "TSC_CONTROL" && *value > 0);
        Clock { khz: report.tsc_khz, can_scale }
    }

    /// What is wrong with it for a guest whose counter ran at this speed.
    pub(crate) fn misfits(&self, guest_khz: Option<u32>) -> Option<String> {
        let (guest_khz, here_khz) = (guest_khz?, self.khz?);
        let apart = u64::from(guest_khz.abs_diff(here_khz)).saturating_mul(1_000_000);
        let is_same = apart <= u64::from(here_khz).saturating_mul(TSC_TOLERANCE_PPM);
        // One that is slower than the guest's is made to catch up by KVM; one that is faster nobody can slow down.
        (!is_same && !self.can_scale && guest_khz < here_khz).then(|| {
            format!(
                "the guest's time stamp counter runs at {guest_khz} kHz, this host's at {here_khz} kHz, and its processor \
                 cannot scale it"
            )
        })
    }
}

#[cfg(test)]
mod tests;
