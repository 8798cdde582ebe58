//! What KVM on this host can do, found by asking it and by running one tiny guest. It boots no kernel and opens
//! no image. Run as a process of its own, because a guest that misbehaves must not take the launcher along.
use std::collections::BTreeSet;
use std::io::Write;
use std::os::fd::OwnedFd;

use kvm::{Host, cpuid};
use wire::launch::{CpuReport, KvmReport, LinuxSupport, ShownCpu};
use wire::machine::CpuTemplate;

use crate::limits::LINUX_IPS_MIN;
use crate::machine::translate;
use crate::sandbox;

mod guest;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// KVM itself.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Memory for the guest.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The guest's code and tables.
    #[error("cannot put the probe's guest into its memory")]
    Prepare,
    /// The report cannot be printed.
    #[error("cannot print the report")]
    Print(#[source] std::io::Error),
}

/// Prints a report for `kvm` as one JSON document on standard output.
pub(crate) fn run(kvm: OwnedFd) -> Result<(), Error> {
    print(&Host::from_fd(kvm)?)
}

/// The same for people, who name the device.
pub(crate) fn run_path(path: &str) -> Result<(), Error> {
    print(&Host::open(path)?)
}

fn print(host: &Host) -> Result<(), Error> {
    let mut report = report(host)?;
    // Only who tries it knows: whether it is in the kernel and switched on is written down nowhere one can rely on.
    // This process has nothing left to open.
    report.landlock_abi = sandbox::forbid_files_and_network().unwrap_or(0);
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, &report).map_err(|cause| Error::Print(cause.into()))?;
    writeln!(out).map_err(Error::Print)
}

/// Looks at KVM and tries a guest on it.
fn report(host: &Host) -> Result<KvmReport, Error> {
    let offered = host.extensions();
    let missing: Vec<String> = offered
        .iter()
        .filter(|(extension, value)| extension.required && *value <= 0)
        .map(|(extension, _)| extension.name.to_owned())
        .collect();
    let extensions = offered.iter().map(|(extension, value)| (extension.name.to_owned(), *value)).collect();
    let mut report = KvmReport {
        api_version: host.api_version(),
        extensions,
        linux: LinuxSupport::No(format!("KVM lacks {}", missing.join(", "))),
        missing,
        kernel_mode_ips: 0,
        exit_ns: 0,
        landlock_abi: 0,
        tsc_khz: None,
        cpu: CpuReport::default(),
    };
    if !report.missing.is_empty() {
        return Ok(report);
    }
    report.cpu = processors(host)?;
    let findings = guest::try_out(host)?;
    report.kernel_mode_ips = findings.loop_ips;
    report.exit_ns = findings.exit_ns;
    report.tsc_khz = findings.tsc_khz;
    report.linux = judge(&findings);
    Ok(report)
}

/// What processors guests could see.
fn processors(host: &Host) -> Result<CpuReport, Error> {
    let offer = host.supported_cpuid()?;
    let one = cpuid::Processors { count: 1, tsc_deadline: host.has("TSC_DEADLINE_TIMER") };
    let owned = |names: BTreeSet<&str>| names.into_iter().map(str::to_owned).collect();
    let mut report = CpuReport { vendor: cpuid::vendor(&offer), ..CpuReport::default() };
    for template in [CpuTemplate::Host, CpuTemplate::X86_64V2, CpuTemplate::X86_64V3] {
        let Ok(entries) = cpuid::shape(&offer, &translate::template(&template), one) else {
            continue;
        };
        if template == CpuTemplate::Host {
            report.protections = owned(cpuid::protections(&entries));
        }
        report.shown.push(ShownCpu { template, features: owned(cpuid::features(&entries)) });
    }
    Ok(report)
}

fn judge(findings: &guest::Findings) -> LinuxSupport {
    if let Some(why) = &findings.cmpxchg16b {
        return LinuxSupport::No(format!("the guest's kernel mode cannot execute cmpxchg16b: {why}"));
    }
    if findings.loop_ips < LINUX_IPS_MIN {
        return LinuxSupport::No(format!(
            "guest kernel mode runs {} instructions a second, Linux needs {LINUX_IPS_MIN} to boot in reasonable time",
            findings.loop_ips
        ));
    }
    LinuxSupport::Yes
}

#[cfg(test)]
mod tests;
