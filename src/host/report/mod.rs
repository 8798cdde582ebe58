//! What the host is, has and lacks: `GET /v1` and `GET /v1/host`. It looks and changes nothing but the record of
//! the last KVM probe. Called by the facade.
use std::path::Path;
use std::sync::Arc;

use model::Time;
use model::host::{About, Capacity, Check, CheckStatus, CpuCapacity, Health, HostReport, KvmProbe};
use rusqlite::{Connection, OptionalExtension};
use wire::launch::{KvmReport, LinuxSupport};

use crate::core::Shared;
use crate::cpu;
use crate::error::{Error, Result};
use crate::network::mac::BRIDGE_PREFIX;
use crate::network::{Networks, firewall};
use crate::servers::Servers;
use crate::vmms::Launch;
use crate::volumes::space;

mod checks;

use checks::System;

/// Key in the table `host` under which the last probe of KVM is kept.
const KVM_PROBE: &str = "kvm_probe";

/// What this daemon can do, for clients that have to know before they ask.
const CAPABILITIES: [&str; 10] = [
    "console_streams",
    "dry_run",
    "event_stream",
    "idempotency_keys",
    "image_catalogue",
    "image_upload",
    "isolated_networks",
    "migration_preflight",
    "nat_networks",
    "rate_limits",
];

/// Looks at the host. Cheap to clone.
#[derive(Clone)]
pub struct Report {
    core: Shared,
    servers: Servers,
    networks: Networks,
    launcher: Arc<dyn Launch>,
}

impl Report {
    pub(crate) fn new(
        core: Shared,
        servers: Servers,
        networks: Networks,
        launcher: Arc<dyn Launch>,
    ) -> Report {
        Report { core, servers, networks, launcher }
    }

    /// Answer to `GET /v1`.
    pub async fn about(&self) -> Result<About> {
        let (probe, checks) = self.look().await?;
        drop(probe);
        Ok(About {
            product: "toft".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api: "v1".to_owned(),
            capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
            health: health(&checks),
        })
    }

    /// Answer to `GET /v1/host`.
    pub async fn host(&self) -> Result<HostReport> {
        let (kvm, checks) = self.look().await?;
        let usage = self.servers.usage().await?;
        let directory = self.core.dirs.root();
        let space = space::look(directory)
            .map_err(|cause| Error::file(format!("cannot look at {}", directory.display()), cause))?;
        let system = rustix::system::uname();
        Ok(HostReport {
            name: system.nodename().to_string_lossy().into_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm_build: self.launcher.build().await.ok(),
            kernel: system.release().to_string_lossy().into_owned(),
            health: health(&checks),
            started_at: self.core.started_at,
            cpus: CpuCapacity {
                model: cpu::model(),
                total: std::thread::available_parallelism().map_or(1, |count| count.get() as u32),
                used: usage.vcpus_used,
            },
            memory: Capacity {
                total_bytes: usage.memory_total_bytes,
                used_bytes: usage.memory_used_bytes,
                free_bytes: usage.memory_total_bytes.saturating_sub(usage.memory_used_bytes),
            },
            storage: Capacity {
                total_bytes: space.total_bytes,
                used_bytes: space.used_bytes,
                free_bytes: space.free_bytes,
            },
            servers: usage.by_state,
            kvm,
            checks,
        })
    }

    /// Tries KVM with a small guest and remembers what came of it.
    pub async fn probe_kvm(&self) -> Result<KvmProbe> {
        let probe = judge(self.launcher.probe().await?);
        let text = serde_json::to_string(&probe)?;
        self.core
            .store
            .write(move |tx| {
                tx.execute("INSERT OR REPLACE INTO host (key, value) VALUES (?1, ?2)", [KVM_PROBE, &text])?;
                Ok(())
            })
            .await?;
        Ok(probe)
    }

    async fn look(&self) -> Result<(Option<KvmProbe>, Vec<Check>)> {
        let probe = self.core.store.read(last_probe).await?;
        let launchable = self.launcher.check();
        let volumes = self.core.dirs.root().join("volumes");
        let troubles = self.networks.troubles();
        let mut checks = vec![kvm_check(launchable, probe.as_ref())];
        checks.extend(probe.as_ref().map(features_check));
        checks.extend(probe.as_ref().and_then(|probe| probe.landlock_abi).map(landlock_check));
        let looked = tokio::task::spawn_blocking(move || System::new(Path::new("/")).checks(&volumes)).await;
        checks.extend(looked.map_err(|cause| Error::internal("looking at the host ended badly", cause))?);
        checks.push(networks_check(troubles.values()));
        checks.push(firewall_check(
            firewall::droppers().await.map(|chains| chains.iter().map(firewall::Chain::words).collect()),
        ));
        Ok((probe, checks))
    }
}

/// The worst check decides.
fn health(checks: &[Check]) -> Health {
    let any = |status| checks.iter().any(|check| check.status == status);
    if any(CheckStatus::Failed) {
        Health::Failing
    } else if any(CheckStatus::Degraded) {
        Health::Degraded
    } else {
        Health::Ok
    }
}

fn last_probe(connection: &Connection) -> Result<Option<KvmProbe>> {
    let text: Option<String> = connection
        .query_row("SELECT value FROM host WHERE key = ?1", [KVM_PROBE], |row| row.get(0))
        .optional()?;
    Ok(text.map(|text| serde_json::from_str(&text)).transpose()?)
}

/// Extensions that servers can do without, and what is lost then.
const WANTED: &[(&str, &str)] = &[
    ("KVMCLOCK_CTRL", "a guest that was paused may report a stuck processor"),
    ("STEAL_TIME", "guests cannot tell time that others took from being slow themselves"),
    ("TSC_DEADLINE_TIMER", "timers of guests cost more exits"),
    ("GET_TSC_KHZ", "guests must measure the speed of their clock, which takes longer and drifts"),
    ("TSC_CONTROL", "a saved server can only go on where the clock runs at the same speed"),
    ("XSAVE2", "a processor's state may be too large to be saved"),
];

fn judge(report: KvmReport) -> KvmProbe {
    let works = report.missing.is_empty();
    let (linux_guests, detail) = match report.linux {
        LinuxSupport::Yes => (works, None),
        LinuxSupport::No(why) => (false, Some(why)),
    };
    KvmProbe {
        works,
        linux_guests,
        detail,
        missing: report.missing,
        absent: report
            .extensions
            .into_iter()
            .filter(|(name, value)| *value <= 0 && WANTED.iter().any(|(wanted, _)| wanted == name))
            .map(|(name, _)| name)
            .collect(),
        landlock_abi: Some(report.landlock_abi),
        kernel_mode_ips: report.kernel_mode_ips,
        exit_ns: report.exit_ns,
        at: Time::now(),
    }
}

fn kvm_check(launchable: Result<()>, probe: Option<&KvmProbe>) -> Check {
    let (status, detail) = match (launchable, probe) {
        (Err(cause), _) => (CheckStatus::Failed, cause.detail),
        (Ok(()), None) => {
            (CheckStatus::Ok, "KVM can be opened; `toft host check` tries a small guest on it".to_owned())
        }
        (Ok(()), Some(probe)) if !probe.works => {
            let detail = format!(
                "KVM lacks {}; use a newer kernel, or a machine whose hypervisor offers them",
                probe.missing.join(", ")
            );
            (CheckStatus::Failed, detail)
        }
        (Ok(()), Some(probe)) if !probe.linux_guests => {
            let why = probe.detail.as_deref().unwrap_or("see `kvm`");
            let detail = format!(
                "only small test guests can run here: {why}; use a machine with VT-x or SVM, or nested virtualisation"
            );
            (CheckStatus::Degraded, detail)
        }
        (Ok(()), Some(_)) => (CheckStatus::Ok, "a small guest ran".to_owned()),
    };
    Check { name: "kvm".to_owned(), status, detail }
}

fn features_check(probe: &KvmProbe) -> Check {
    let lost: Vec<String> = WANTED
        .iter()
        .filter(|(name, _)| probe.absent.iter().any(|absent| absent == name))
        .map(|(name, lost)| format!("without {name} {lost}"))
        .collect();
    let (status, detail) = match lost.is_empty() {
        true => (CheckStatus::Ok, "KVM has everything that servers can use".to_owned()),
        false => (CheckStatus::Degraded, format!("{}; a newer kernel may have it", lost.join("; "))),
    };
    Check { name: "kvm_features".to_owned(), status, detail }
}

fn landlock_check(abi: u32) -> Check {
    let (status, detail) = match abi {
        0 => (
            CheckStatus::Degraded,
            "the kernel has no Landlock, or it is switched off, so one wall around each VMM is missing and servers \
             with strict isolation are refused; add landlock to the kernel parameter lsm="
                .to_owned(),
        ),
        abi => (CheckStatus::Ok, format!("Landlock can be put around each VMM (interface {abi})")),
    };
    Check { name: "landlock".to_owned(), status, detail }
}

fn networks_check<'a>(troubles: impl Iterator<Item = &'a String>) -> Check {
    let mut troubles: Vec<&str> = troubles.map(String::as_str).collect();
    troubles.dedup();
    let (status, detail) = match troubles.is_empty() {
        true => (CheckStatus::Ok, "every network is in place".to_owned()),
        false => (CheckStatus::Degraded, troubles.join("; ")),
    };
    Check { name: "networks".to_owned(), status, detail }
}

/// `droppers` are the chains of others that drop what passes through the host.
fn firewall_check(droppers: std::result::Result<Vec<String>, String>) -> Check {
    let (status, detail) = match droppers {
        Err(why) => (CheckStatus::Degraded, format!("the host's firewall cannot be looked at: {why}")),
        Ok(chains) if chains.is_empty() => {
            (CheckStatus::Ok, "no other firewall drops what servers send and get".to_owned())
        }
        Ok(chains) => {
            let first = chains.first().map_or("", String::as_str);
            let detail = format!(
                "packets of servers are dropped by {}, whatever Toft's own rules say; let them through there, as with `nft \
                 insert rule {first} iifname \"{BRIDGE_PREFIX}*\" accept` and the same with oifname",
                chains.join(" and by ")
            );
            (CheckStatus::Degraded, detail)
        }
    };
    Check { name: "firewall".to_owned(), status, detail }
}

#[cfg(test)]
mod tests;
