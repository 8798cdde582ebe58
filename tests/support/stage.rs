//! A host on fakes: a state directory of its own, fake VMMs, fake plumbing, one small image to make servers of.
//! Included by `#[path]` beside `fake_vmm` in tests of `host` and the rooms above; it needs no privilege.
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use host::network::testing::FakePlumbing;
use host::{Call, Checkpoint, Config, Host, Idempotency};
use model::image::{ImportImage, ImportSource};
use model::operation::{Operation, OperationState};
use model::server::{CreateServer, Server};
use model::{OperationId, ServerId};
use sha2::{Digest, Sha256};

use crate::fake_vmm::FakeLaunch;

/// Longest wait for something that should happen at once. Shorter than a conversation of hosts may be silent, which would hide one that
/// waits for nothing.
pub const SOON: Duration = Duration::from_secs(20);

/// Bytes of the image's disk.
pub const DISK_BYTES: u64 = 1 << 20;

/// What outlives a daemon: its directory, the VMMs, the host's network.
pub struct Stage {
    directory: tempfile::TempDir,
    /// Starts VMMs.
    pub launch: FakeLaunch,
    /// Makes networks.
    pub plumbing: Arc<FakePlumbing>,
    /// Memory that servers may have in all, in bytes.
    pub memory_bytes: u64,
    /// VMMs that daemons keep ready.
    pub warm_shells: usize,
}

impl Default for Stage {
    fn default() -> Stage {
        Stage::new()
    }
}

impl Stage {
    /// An empty state directory on a host that can do everything. The import directory holds the image `tiny`.
    pub fn new() -> Stage {
        let directory = tempfile::tempdir().expect("a temporary directory");
        write_image(&directory.path().join("images-to-import/tiny"));
        Stage {
            directory,
            launch: FakeLaunch::default(),
            plumbing: Arc::new(FakePlumbing::new()),
            memory_bytes: 4 << 30,
            warm_shells: 0,
        }
    }

    /// The state directory.
    pub fn state_dir(&self) -> std::path::PathBuf {
        self.directory.path().join("state")
    }

    /// What a daemon here is configured with.
    pub fn config(&self) -> Config {
        let mut config = Config::new(self.state_dir());
        config.import_dir = Some(self.directory.path().join("images-to-import"));
        config.memory_bytes = Some(self.memory_bytes);
        config.warm_shells = self.warm_shells;
        config
    }

    /// A daemon on this stage.
    pub async fn open(&self) -> Host {
        self.open_with(self.config()).await.expect("the host opens")
    }

    /// A daemon that is told at each checkpoint whether to live.
    pub async fn open_watched(&self, checkpoint: Arc<dyn Checkpoint>) -> host::Result<Host> {
        self.open_with(Config { checkpoint, ..self.config() }).await
    }

    /// A daemon with this configuration.
    pub async fn open_with(&self, config: Config) -> host::Result<Host> {
        Host::open(config, Arc::new(self.launch.clone()), self.plumbing.clone()).await
    }

    /// A daemon with the image `tiny` imported.
    pub async fn open_with_image(&self) -> Host {
        let host = self.open().await;
        import(&host).await;
        host
    }
}

/// Imports the image `tiny` and waits for it.
pub async fn import(host: &Host) {
    let spec = ImportImage {
        name: "tiny".parse().expect("a name"),
        source: ImportSource::ImportDirectory("tiny".to_owned()),
        sha256: None,
        labels: Default::default(),
    };
    let accepted = host.images().import(&Call::by_host(), spec).await.expect("the import is accepted");
    succeeded(host, accepted.body.operation.id).await;
}

/// A request for a server of this name.
pub fn server(name: &str) -> CreateServer {
    let json = serde_json::json!({ "name": name, "image": "tiny", "memory_bytes": 128 << 20 });
    serde_json::from_value(json).expect("a request")
}

/// A call with an idempotency key.
pub fn keyed(key: &str) -> Call {
    let idempotency = Idempotency { key: key.to_owned(), fingerprint: key.to_owned() };
    Call { idempotency: Some(idempotency), ..Call::by_host() }
}

/// Waits for the end of an operation.
pub async fn ended(host: &Host, id: OperationId) -> Operation {
    let operation = host.operations().one(id, Some(SOON)).await.expect("the operation is there");
    assert!(operation.state.is_final(), "{operation:?} should have ended");
    operation
}

/// Waits for an operation to succeed.
pub async fn succeeded(host: &Host, id: OperationId) -> Operation {
    let operation = ended(host, id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{:?}", operation.error);
    operation
}

/// Makes a server and waits until it runs, or is there if it is not to be started.
pub async fn created(host: &Host, spec: CreateServer) -> Server {
    let accepted = host.servers().create(&Call::by_host(), spec).await.expect("the server is accepted");
    succeeded(host, accepted.body.operation.id).await;
    let id = accepted.body.resource.expect("a server").id;
    host.servers().one(id).await.expect("the server is there")
}

/// Waits until a server is as wanted.
pub async fn until(host: &Host, id: ServerId, wanted: impl Fn(&Server) -> bool) -> Server {
    let waiting = async {
        let mut events = host.events().follow(None).await.expect("the log can be followed");
        loop {
            let server = host.servers().one(id).await.expect("the server is there");
            if wanted(&server) {
                return server;
            }
            events.next().await.expect("the log goes on");
        }
    };
    match tokio::time::timeout(SOON, waiting).await {
        Ok(server) => server,
        Err(_) => panic!("still not as wanted: {:?}", host.servers().one(id).await),
    }
}

fn write_image(directory: &Path) {
    std::fs::create_dir_all(directory).expect("the import directory");
    let part = |name: &str, bytes: &[u8]| {
        std::fs::write(directory.join(name), bytes).expect("an image's file");
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let mut disk = vec![0; DISK_BYTES as usize];
    disk[..4].copy_from_slice(b"disk");
    let manifest = serde_json::json!({
        "format_version": 1,
        "name": "tiny",
        "title": "A test image",
        "architecture": "x86_64",
        "disk": { "file": "root.raw", "format": "raw", "size_bytes": DISK_BYTES, "sha256": part("root.raw", &disk) },
        "kernel": { "file": "kernel", "sha256": part("kernel", b"a kernel") },
        "initrd": { "file": "initrd", "sha256": part("initrd", b"an initrd") },
        "cmdline": "console=ttyS0",
        "min_memory_bytes": 64 << 20,
        "min_disk_bytes": DISK_BYTES,
        "default_user": "root",
    });
    std::fs::write(directory.join("image.json"), manifest.to_string()).expect("the manifest");
}
