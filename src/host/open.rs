//! Opens the host: the lock, the records, what was left unfinished. Then hands out the facades.
//! Called once by `src/bin/toftd.rs`, and by tests.
use std::sync::Arc;

use crate::call::{Answer, Call};
use crate::config::{Config, Dirs};
use crate::core::{Core, Shared};
use crate::error::{Error, Result};
use crate::events::{self, Events};
use crate::images::Images;
use crate::network::{Networks, Plumbing};
use crate::operations::{Cancel, Operations};
use crate::report::Report;
use crate::servers::Servers;
use crate::store::{Store, Tx};
use crate::tokens::Tokens;
use crate::vmms::Launch;
use crate::volumes::Volumes;
use model::host::{About, HostReport, KvmProbe};
use model::operation::{Operation, Resource};

/// The host. Cheap to clone.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    core: Shared,
    servers: Servers,
    images: Images,
    volumes: Volumes,
    networks: Networks,
    operations: Operations,
    report: Report,
}

impl Host {
    /// Opens the state directory, which nobody else may have open, and takes up what was left unfinished. Running
    /// servers are adopted. Fails with `host_unprepared`, saying what to do.
    pub async fn open(
        config: Config,
        launcher: Arc<dyn Launch>,
        plumbing: Arc<dyn Plumbing>,
    ) -> Result<Host> {
        let dirs = Dirs::prepare(&config.state_dir)?;
        let store = Store::open(&dirs.database(), config.checkpoint.clone()).await?;
        store.write(|tx| events::identify(tx)).await?;
        let core = Arc::new(Core { config, dirs, store, started_at: model::Time::now() });
        let images = Images::new(core.clone());
        let volumes = Volumes::new(core.clone(), images.clone());
        let networks = Networks::new(core.clone(), plumbing);
        let servers = Servers::new(core.clone());
        let cancels = Cancels { images: images.clone() };
        let operations = Operations::new(core.clone(), Arc::new(cancels));
        let report = Report::new(core.clone(), servers.clone(), networks.clone(), launcher);
        images.recover().await?;
        volumes.recover().await?;
        networks.recover().await?;
        Ok(Host { inner: Arc::new(Inner { core, servers, images, volumes, networks, operations, report }) })
    }

    /// Stops working; servers run on. Everything that was promised is in the records.
    pub async fn close(&self) {
        self.inner.networks.close().await;
        self.inner.core.store.close().await;
    }

    /// Servers.
    pub fn servers(&self) -> &Servers {
        &self.inner.servers
    }

    /// Images.
    pub fn images(&self) -> &Images {
        &self.inner.images
    }

    /// Volumes.
    pub fn volumes(&self) -> &Volumes {
        &self.inner.volumes
    }

    /// Networks.
    pub fn networks(&self) -> &Networks {
        &self.inner.networks
    }

    /// Operations.
    pub fn operations(&self) -> &Operations {
        &self.inner.operations
    }

    /// The event log.
    pub fn events(&self) -> Events {
        Events::new(self.inner.core.clone())
    }

    /// Access tokens.
    pub fn tokens(&self) -> Tokens {
        Tokens::new(&self.inner.core)
    }

    /// Answer to `GET /v1`.
    pub async fn about(&self) -> Result<About> {
        self.inner.report.about().await
    }

    /// Answer to `GET /v1/host`.
    pub async fn report(&self) -> Result<HostReport> {
        self.inner.report.host().await
    }

    /// Tries KVM with a small guest.
    pub async fn probe_kvm(&self, call: &Call) -> Result<Answer<KvmProbe>> {
        let _ = call;
        Ok(Answer { body: self.inner.report.probe_kvm().await?, replayed: false })
    }
}

/// Sends a cancelled operation to whoever works on its first resource.
struct Cancels {
    images: Images,
}

impl Cancel for Cancels {
    fn ask(&self, tx: &Tx<'_>, operation: &Operation) -> Result<()> {
        match operation.resources.first() {
            Some(Resource::Image(id)) => Images::cancel(tx, *id, operation),
            _ => Err(Error::new(model::Code::WrongState, "this operation cannot be cancelled")),
        }
    }

    fn wake(&self, operation: &Operation) {
        if let Some(Resource::Image(id)) = operation.resources.first() {
            self.images.wake(*id);
        }
    }
}
