//! A host without servers for the tests of images, volumes and networks: records and directories in a temporary
//! place, which a test may leave as a crash would and open again.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use model::OperationId;
use model::operation::Operation;

use crate::config::{Config, Dirs};
use crate::core::{Checkpoint, Core, Fate, Shared};
use crate::operations;
use crate::store::Store;

/// Longest wait for an operation that must end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the host keeps its things.
pub(crate) struct Place {
    pub(crate) directory: tempfile::TempDir,
}

/// Dies at the n-th point that a crash could follow.
struct DieAt {
    left: AtomicUsize,
}

impl Checkpoint for DieAt {
    fn reached(&self, _point: &'static str) -> Fate {
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(1) | Err(_) => Fate::Die,
            Ok(_) => Fate::Live,
        }
    }
}

impl Place {
    pub(crate) fn new() -> Place {
        Place { directory: tempfile::Builder::new().prefix("toft").tempdir().unwrap() }
    }

    /// Opens the records; nothing is recovered yet.
    pub(crate) async fn open(&self) -> Shared {
        self.open_with(Config::new(self.directory.path())).await
    }

    /// Opens the records for a life that ends at the n-th point, counted from 1.
    pub(crate) async fn open_to_die_at(&self, point: usize) -> Shared {
        let checkpoint = Arc::new(DieAt { left: AtomicUsize::new(point) });
        self.open_with(Config { checkpoint, ..Config::new(self.directory.path()) }).await
    }

    pub(crate) async fn open_with(&self, config: Config) -> Shared {
        let dirs = Dirs::prepare(&config.state_dir).unwrap();
        let store = Store::open(&dirs.database(), config.checkpoint.clone()).await.unwrap();
        // A life that ends at its first point ends here; the identity is in the records all the same.
        let _ = store.write(crate::events::identify).await;
        Arc::new(Core::new(config, dirs, store).expect("a core"))
    }

    /// Names in a directory of the state directory, sorted.
    pub(crate) fn names(&self, sub: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path().join(sub)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Waits until the operation has ended, and answers it.
pub(crate) async fn ended(core: &Shared, id: OperationId) -> Operation {
    let mut changed = core.store.signals().operation(id);
    let wait = async {
        loop {
            let operation = core.store.read(move |connection| operations::one(connection, id)).await.unwrap();
            if operation.state.is_final() {
                return operation;
            }
            changed.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the operation did not end")
}
