//! Opens the host: the lock, the records, what was left unfinished. Then hands out the facades.
//! Called once by `src/bin/toftd.rs`, and by tests.
use std::fs::{File, TryLockError};
use std::sync::Arc;
use std::time::Instant;

use crate::call::{Answer, Call};
use crate::config::{Config, Dirs};
use crate::core::{Core, Shared};
use crate::cpu::{self, Processor};
use crate::error::{Error, Result};
use crate::events::{self, Events};
use crate::images::Images;
use crate::limits;
use crate::migration::Migrations;
use crate::network::{Networks, Plumbing};
use crate::operations::{Cancel, Operations};
use crate::report::Report;
use crate::servers::Servers;
use crate::servers::capacity::Capacity;
use crate::servers::registry::Workshop;
use crate::snapshots::Snapshots;
use crate::store::{Store, Tx, Version};
use crate::tokens::Tokens;
use crate::vmms::{Launch, Shells};
use crate::volumes::Volumes;
use model::cpu::{ComputeCpuBaseline, CpuBaseline};
use model::host::{About, HostReport, KvmProbe};
use model::operation::{Operation, Resource};

/// The host. Cheap to clone.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    /// Held while the host is open.
    _lock: File,
    core: Shared,
    servers: Servers,
    images: Images,
    volumes: Volumes,
    snapshots: Snapshots,
    networks: Networks,
    operations: Operations,
    tokens: Tokens,
    migrations: Migrations,
    processor: Processor,
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
        let lock = lock(&dirs).await?;
        let store = Store::open(&dirs.database(), config.checkpoint.clone()).await?;
        #[cfg(debug_assertions)]
        if config.late_commits {
            store.commit_late();
        }
        store.write(events::identify).await?;
        let capacity = Capacity::of_host(config.memory_bytes)?;
        let core = Arc::new(Core::new(config, dirs, store)?);
        let images = Images::new(core.clone());
        let volumes = Volumes::new(core.clone(), images.clone());
        let snapshots = Snapshots::new(core.clone(), capacity.memory_bytes);
        let networks = Networks::new(core.clone(), plumbing);
        let processor = Processor::new(launcher.clone());
        let servers = Servers::new(Workshop {
            core: core.clone(),
            images: images.clone(),
            volumes: volumes.clone(),
            snapshots: snapshots.clone(),
            networks: networks.clone(),
            launcher: launcher.clone(),
            shells: Shells::new(launcher.clone(), core.dirs.shells(), core.config.warm_shells),
            processor: processor.clone(),
            capacity,
        });
        let cancels =
            Cancels { images: images.clone(), servers: servers.clone(), snapshots: snapshots.clone() };
        let operations = Operations::new(core.clone(), Arc::new(cancels));
        let tokens = Tokens::new(&core);
        let migrations = Migrations::new(
            core.clone(),
            servers.clone(),
            volumes.clone(),
            capacity,
            launcher.clone(),
            processor.clone(),
        )
        .await?;
        let report = Report::new(core.clone(), servers.clone(), networks.clone(), launcher);
        images.recover().await?;
        volumes.recover().await?;
        networks.recover().await?;
        snapshots.recover(servers.snapshots_under_way().await?).await?;
        migrations.recover().await?;
        servers.recover().await?;
        Ok(Host {
            inner: Arc::new(Inner {
                _lock: lock,
                core,
                servers,
                images,
                volumes,
                snapshots,
                networks,
                operations,
                tokens,
                migrations,
                processor,
                report,
            }),
        })
    }

    /// Stops working; servers run on. Everything that was promised is in the records.
    pub async fn close(&self) {
        self.inner.migrations.close().await;
        self.inner.servers.close().await;
        self.inner.snapshots.close().await;
        self.inner.networks.close().await;
        self.inner.core.store.close().await;
    }

    /// What every noun shares, for tests of it.
    #[cfg(test)]
    pub(crate) fn core(&self) -> &Shared {
        &self.inner.core
    }

    /// The records, for tests of what is kept.
    #[cfg(test)]
    pub(crate) fn store(&self) -> &Store {
        &self.inner.core.store
    }

    /// Whether a test's checkpoint decided that this daemon is dead.
    pub fn is_dead(&self) -> bool {
        self.inner.core.store.is_dead()
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

    /// Snapshots.
    pub fn snapshots(&self) -> &Snapshots {
        &self.inner.snapshots
    }

    /// Networks.
    pub fn networks(&self) -> &Networks {
        &self.inner.networks
    }

    /// Operations.
    pub fn operations(&self) -> &Operations {
        &self.inner.operations
    }

    /// Moves between hosts.
    pub fn migrations(&self) -> &Migrations {
        &self.inner.migrations
    }

    /// The event log.
    pub fn events(&self) -> Events {
        Events::new(self.inner.core.clone())
    }

    /// Access tokens.
    pub fn tokens(&self) -> &Tokens {
        &self.inner.tokens
    }

    /// The state the records are in: while it is the same, so are the servers, images and operations they hold.
    /// None when it cannot be told.
    pub fn version(&self) -> Option<Version> {
        self.inner.core.store.version()
    }

    /// Answer to `GET /v1`.
    pub async fn about(&self) -> Result<About> {
        self.inner.report.about().await
    }

    /// Answer to `GET /v1/host`.
    pub async fn report(&self) -> Result<HostReport> {
        self.inner.report.host().await
    }

    /// What guests see of the host's processor.
    pub fn processor(&self) -> &Processor {
        &self.inner.processor
    }

    /// What guests of all these hosts can see. Fails with `invalid`.
    pub async fn cpu_baseline(&self, call: &Call, asked: ComputeCpuBaseline) -> Result<Answer<CpuBaseline>> {
        self.inner.core.once(call, async { cpu::baseline(asked) }).await
    }

    /// Tries KVM with a small guest. Fails with `idempotency_running` while a call with the same key does.
    pub async fn probe_kvm(&self, call: &Call) -> Result<Answer<KvmProbe>> {
        self.inner.core.once(call, self.inner.report.probe_kvm()).await
    }
}

/// Sends a cancelled operation to whoever works on its first resource.
struct Cancels {
    images: Images,
    servers: Servers,
    snapshots: Snapshots,
}

impl Cancel for Cancels {
    fn ask(&self, tx: &Tx<'_>, operation: &Operation) -> Result<()> {
        match operation.resources.first() {
            Some(Resource::Image(id)) => Images::cancel(tx, *id, operation),
            Some(Resource::Server(id)) => Servers::cancel(tx, *id, operation.id),
            // The mark in the operation is all there is: the import reads it in its last transaction.
            Some(Resource::Snapshot(_)) => Ok(()),
            _ => Err(Error::new(model::Code::WrongState, "this operation cannot be cancelled")),
        }
    }

    fn wake(&self, operation: &Operation) {
        match operation.resources.first() {
            Some(Resource::Image(id)) => self.images.wake(*id),
            Some(Resource::Server(id)) => self.servers.wake(*id),
            Some(Resource::Snapshot(id)) => self.snapshots.wake(*id),
            _ => {}
        }
    }
}

/// Two daemons in one state directory would undo each other's work.
async fn lock(dirs: &Dirs) -> Result<File> {
    let path = dirs.run().join("lock");
    let failed = |cause| Error::file(format!("cannot lock {}", path.display()), cause);
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    let end = Instant::now() + limits::LOCK;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                tokio::time::sleep(limits::LOCK_AGAIN).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(
                    model::Code::HostUnprepared,
                    format!(
                        "another toftd uses {}; stop it, or choose another --state-dir",
                        dirs.root().display()
                    ),
                ));
            }
            Err(TryLockError::Error(cause)) => return Err(failed(cause)),
        }
    }
}
