//! Processors: which one a guest sees, which ones hosts could show, and what several of them have in common.
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A set of CPU features.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CpuTemplate {
    /// Every feature KVM can virtualise on this host.
    #[default]
    Host,
    /// The x86-64-v2 level.
    X86_64V2,
    /// The x86-64-v3 level.
    X86_64V3,
    /// Exactly these features, by the names of `GET /v1/host/cpu`: what several hosts have in common, so that a server that
    /// was started on one can run on all. `POST /v1/host/actions/cpu-baseline` computes it.
    Features(BTreeSet<String>),
}

/// Answer to `GET /v1/host/cpu`: what processor guests can see on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostCpu {
    /// The host's name.
    pub name: String,
    /// Vendor, as the processor names it.
    pub vendor: String,
    /// Model, as the processor names it.
    pub model: String,
    /// What a server with the cpu `host` sees, by Toft's names.
    #[schema(max_items = 512)]
    pub features: BTreeSet<String>,
    /// Those of `features` that protect a guest from its own programs or from the processor's leaks.
    #[schema(max_items = 512)]
    pub protections: BTreeSet<String>,
}

/// Body of `POST /v1/host/actions/cpu-baseline`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ComputeCpuBaseline {
    /// What each host answers to `GET /v1/host/cpu`.
    #[schema(min_items = 1, max_items = 64)]
    pub hosts: Vec<HostCpu>,
}

/// What several hosts' processors have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuBaseline {
    /// The `cpu` for servers that are to move between these hosts while they run.
    pub cpu: CpuTemplate,
    /// Vendor of all these processors.
    pub vendor: String,
    /// What each host could show and this hides, in the order of the request.
    pub hidden: Vec<HiddenFeatures>,
}

/// What of a host's processor a baseline hides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HiddenFeatures {
    /// The host's name.
    pub host: String,
    /// What guests do without.
    pub features: BTreeSet<String>,
    /// Those of `features` that would protect a guest: without the hosts that lack them it would keep them.
    pub protections: BTreeSet<String>,
}
