//! The host: what it is, what it has, what is wrong with it.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::time::Time;

/// Answer to `GET /v1`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct About {
    /// `toft`.
    pub product: String,
    /// Version of the daemon.
    pub version: String,
    /// Version of the API: `v1`.
    pub api: String,
    /// What this daemon can do, lower snake; more appear with later versions.
    pub capabilities: Vec<String>,
    /// Whether everything works.
    pub health: Health,
}

/// Whether the host can do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Everything works.
    Ok,
    /// Servers run, but see `GET /v1/host` for what is wrong.
    Degraded,
    /// No server can be started.
    Failing,
}

/// Answer to `GET /v1/host`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostReport {
    /// Host name.
    pub name: String,
    /// Version of the daemon.
    pub version: String,
    /// Which build of the VMM machines get from now on; absent when none can be started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_build: Option<String>,
    /// Kernel release.
    pub kernel: String,
    /// Whether everything works.
    pub health: Health,
    /// When the daemon started.
    pub started_at: Time,
    /// CPUs.
    pub cpus: CpuCapacity,
    /// Memory.
    pub memory: Capacity,
    /// Space where volumes and images are kept.
    pub storage: Capacity,
    /// Servers by state.
    pub servers: std::collections::BTreeMap<String, u32>,
    /// What KVM can do; absent when it could not be tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kvm: Option<KvmProbe>,
    /// Each thing looked at, good or bad.
    pub checks: Vec<Check>,
}

/// CPUs of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuCapacity {
    /// Model as the processor names itself.
    pub model: String,
    /// Logical CPUs.
    pub total: u32,
    /// Virtual CPUs of running servers; may exceed `total`.
    pub used: u32,
}

/// How much there is of something, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// In all.
    pub total_bytes: u64,
    /// Memory: promised to servers. Storage: taken, by whatever there is.
    pub used_bytes: u64,
    /// Free for new ones.
    pub free_bytes: u64,
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// Name, such as `kvm`, `smt`, `ksm`, `mitigations`, `dnsmasq`.
    pub name: String,
    /// How it stands.
    pub status: CheckStatus,
    /// What was found and, where it is not good, what to do.
    pub detail: String,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckStatus {
    /// Good.
    Ok,
    /// Works, but less safe, fast or complete.
    Degraded,
    /// Servers cannot run.
    Failed,
}

/// What KVM on this host can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KvmProbe {
    /// Whether a small guest ran.
    pub works: bool,
    /// Whether a stock Linux kernel can be expected to boot.
    pub linux_guests: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Extensions without which no server can run.
    pub missing: Vec<String>,
    /// Extensions that servers can do without, and do: `checks` says what for.
    #[serde(default)]
    pub absent: Vec<String>,
    /// Version of Landlock's interface; 0 when the kernel has none, absent when it was not tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub landlock_abi: Option<u32>,
    /// Instructions per second in guest kernel mode.
    pub kernel_mode_ips: u64,
    /// Cost of one exit to the VMM and back, in nanoseconds.
    pub exit_ns: u64,
    /// When it was tried.
    pub at: Time,
}
