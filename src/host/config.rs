//! What the operator decides, and where things lie. Plain data; `src/bin/toftd.rs` fills it from flags.
//! Nothing here touches the disk but [`Dirs::prepare`].
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::{ImageId, NetworkId, ServerId, SnapshotId, VolumeId};

use crate::core::{AlwaysLive, Checkpoint};
use crate::error::{Error, Result};
use crate::limits;

/// What the operator decides.
#[derive(Clone)]
pub struct Config {
    /// Where everything is kept.
    pub state_dir: PathBuf,
    /// Where `import_directory` sources come from; `import/` in the state directory when absent.
    pub import_dir: Option<PathBuf>,
    /// Where built guest images and the catalogue lie, each in a directory of its own.
    pub guest_images_dir: Option<PathBuf>,
    /// Memory that servers may have in all, in bytes; measured, less a reserve for the host, when absent.
    pub memory_bytes: Option<u64>,
    /// VMMs that are kept ready for servers that are started, and taps with them; 0 for none.
    pub warm_shells: usize,
    /// Told of every step that a crash could follow. Only tests set it.
    pub checkpoint: Arc<dyn Checkpoint>,
    /// Puts every commit after the effects that were to follow it: the mistake that tests of crashes must find.
    #[cfg(debug_assertions)]
    pub late_commits: bool,
}

impl Config {
    /// Defaults for this state directory.
    pub fn new(state_dir: impl Into<PathBuf>) -> Config {
        Config {
            state_dir: state_dir.into(),
            import_dir: None,
            guest_images_dir: None,
            memory_bytes: None,
            warm_shells: 0,
            checkpoint: Arc::new(AlwaysLive),
            #[cfg(debug_assertions)]
            late_commits: false,
        }
    }
}

/// Where things lie in the state directory.
#[derive(Debug, Clone)]
pub struct Dirs {
    root: PathBuf,
}

/// The database's name in the state directory.
pub(crate) const DATABASE: &str = "toft.db";

impl Dirs {
    /// Makes the directories, readable by their owner alone. Fails when the path is too long for the sockets
    /// that will lie in it.
    pub fn prepare(root: &Path) -> Result<Dirs> {
        let root = std::path::absolute(root)
            .map_err(|cause| Error::file(format!("cannot resolve {}", root.display()), cause))?;
        let dirs = Dirs { root };
        let longest = dirs.server(ServerId::new()).join("control.sock");
        if longest.as_os_str().len() >= limits::SOCKET_PATH_BYTES_MAX {
            return Err(Error::new(
                model::Code::HostUnprepared,
                format!(
                    "the state directory {} is too long: a socket in it would have {} bytes and the kernel allows \
                     {}; choose a shorter --state-dir",
                    dirs.root.display(),
                    longest.as_os_str().len(),
                    limits::SOCKET_PATH_BYTES_MAX - 1
                ),
            ));
        }
        for sub in ["", "servers", "images", "volumes", "snapshots", "networks", "import", "run"] {
            let path = dirs.root.join(sub);
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|cause| Error::file(format!("cannot make {}", path.display()), cause))?;
        }
        Ok(dirs)
    }

    /// The state directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.root.join(DATABASE)
    }

    /// The directory of a server: `control.sock`, `console.ring`, `will.json`, `vmm.log`, `seed.img`.
    pub fn server(&self, id: ServerId) -> PathBuf {
        self.root.join("servers").join(id.to_string())
    }

    /// The directories of VMMs that are kept ready, until they are a server's.
    pub fn shells(&self) -> PathBuf {
        self.root.join("shells")
    }

    /// The directory of an image: `image.json`, `root.raw`, `kernel`, `initrd`.
    pub fn image(&self, id: ImageId) -> PathBuf {
        self.root.join("images").join(id.to_string())
    }

    /// A volume's file.
    pub fn volume(&self, id: VolumeId) -> PathBuf {
        self.root.join("volumes").join(format!("{id}.raw"))
    }

    /// The directory of a snapshot: `disk0.raw`, and with memory `machine.state` and `machine.memory`.
    pub fn snapshot(&self, id: SnapshotId) -> PathBuf {
        self.root.join("snapshots").join(id.to_string())
    }

    /// The directory of a network.
    pub fn network(&self, id: NetworkId) -> PathBuf {
        self.root.join("networks").join(id.to_string())
    }

    /// The import directory inside the state directory.
    pub fn import(&self) -> PathBuf {
        self.root.join("import")
    }

    /// Sockets and locks.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }
}
