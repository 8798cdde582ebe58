//! What the host is, has and lacks: `GET /v1` and `GET /v1/host`. It looks and changes nothing.
//! Called by the facade.
use std::sync::Arc;

use model::Code;
use model::host::{About, HostReport, KvmProbe};

use crate::core::Shared;
use crate::error::{Error, Result};
use crate::network::Networks;
use crate::servers::Servers;
use crate::vmms::Launch;

/// Looks at the host. Cheap to clone.
#[derive(Clone)]
pub struct Report {
    core: Shared,
    servers: Servers,
    networks: Networks,
    launcher: Arc<dyn Launch>,
}

fn unbuilt() -> Error {
    Error::new(Code::HostUnprepared, "reports are not built yet")
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
        let _ = (&self.core, &self.servers, &self.networks, &self.launcher);
        Err(unbuilt())
    }

    /// Answer to `GET /v1/host`.
    pub async fn host(&self) -> Result<HostReport> {
        Err(unbuilt())
    }

    /// Tries KVM with a small guest and remembers what came of it.
    pub async fn probe_kvm(&self) -> Result<KvmProbe> {
        Err(unbuilt())
    }
}
