//! The host's records: one SQLite database with one writer and a few readers. It knows how to commit, not what.
//! Every noun keeps its own tables through [`Tx`]; see [`records`] for the shape most of them have.
//!
//! A write is one transaction, durable when it returns (WAL, synchronous=FULL). Who waits for a change is woken
//! after the commit, never before.
use std::cell::RefCell;
use std::fs::{File, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::{Code, OperationId};
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};
use tokio::sync::Semaphore;

use crate::core::{Checkpoint, Fate, in_place};
use crate::error::{Error, Result};
use crate::limits;
use crate::volumes::space;

#[cfg(debug_assertions)]
mod late;
pub mod records;
mod schema;
pub mod selector;
pub mod signals;
mod version;

pub use signals::Signals;
pub use version::Version;
use version::Watcher;

/// The records. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
    reading: Semaphore,
    watcher: Watcher,
    signals: Signals,
    checkpoint: Arc<dyn Checkpoint>,
    dead: AtomicBool,
    closed: AtomicBool,
    /// See [`crate::Config::late_commits`].
    #[cfg(debug_assertions)]
    late: AtomicBool,
}

/// One write transaction. It is also a connection to read from.
pub struct Tx<'c> {
    transaction: Transaction<'c>,
    changes: RefCell<Changes>,
    undo: Undo,
}

#[derive(Default)]
struct Changes {
    last_event: Option<u64>,
    operations: Vec<OperationId>,
}

/// What is put back unless it is emptied before.
#[derive(Default)]
struct Undo(RefCell<Vec<Box<dyn FnOnce() + Send>>>);

impl Drop for Undo {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(|put_back| put_back());
    }
}

impl std::ops::Deref for Tx<'_> {
    type Target = Connection;
    fn deref(&self) -> &Connection {
        &self.transaction
    }
}

impl Tx<'_> {
    /// Runs a part of the change: when it fails, nothing of that part stays, and what came before does.
    pub(crate) fn attempt<T>(&self, part: impl FnOnce() -> Result<T>) -> Result<Result<T>> {
        self.execute_batch("SAVEPOINT attempt")?;
        let before = self.undo.0.borrow().len();
        let outcome = part();
        if outcome.is_err() {
            self.execute_batch("ROLLBACK TO attempt")?;
            let undone = self.undo.0.borrow_mut().split_off(before);
            undone.into_iter().for_each(|put_back| put_back());
        }
        self.execute_batch("RELEASE attempt")?;
        Ok(outcome)
    }

    /// Has something outside of the records put back that this transaction has used up, if it fails or is a rehearsal, or the
    /// attempt fails in which that was. Not when it cannot be said whether it was committed.
    pub(crate) fn unless_kept(&self, put_back: impl FnOnce() + Send + 'static) {
        self.undo.0.borrow_mut().push(Box::new(put_back));
    }

    /// Wakes whoever follows events once this is committed.
    pub(crate) fn event_written(&self, id: u64) {
        self.changes.borrow_mut().last_event = Some(id);
    }

    /// Wakes whoever waits for this operation once this is committed.
    pub(crate) fn operation_changed(&self, id: OperationId) {
        self.changes.borrow_mut().operations.push(id);
    }
}

impl Store {
    /// Opens the database, makes it if need be, and brings its tables up to date.
    pub async fn open(path: &Path, checkpoint: Arc<dyn Checkpoint>) -> Result<Store> {
        let path = path.to_owned();
        blocking(move || {
            keep_to_owner(&path)?;
            let mut writer = connect(&path)?;
            schema::migrate(&mut writer)?;
            // Without it the records are as safe.
            if let Err(cause) = lengthen_log(&path) {
                tracing::info!("the write-ahead log grows with each commit: {}", cause.chain());
            }
            let last_event =
                writer.query_row("SELECT coalesce(max(id), 0) FROM events", [], |row| row.get(0))?;
            let watcher = Watcher::open(&path)?;
            Ok(Store {
                inner: Arc::new(Inner {
                    path,
                    writer: Mutex::new(writer),
                    readers: Mutex::new(Vec::new()),
                    reading: Semaphore::new(limits::READERS_MAX),
                    watcher,
                    signals: Signals::new(last_event),
                    checkpoint,
                    dead: AtomicBool::new(false),
                    closed: AtomicBool::new(false),
                    #[cfg(debug_assertions)]
                    late: AtomicBool::new(false),
                }),
            })
        })
        .await
    }

    /// Runs `change` in one transaction and commits it; rolls back when it fails.
    pub async fn write<T, F>(&self, change: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Tx<'_>) -> Result<T> + Send + 'static,
    {
        let inner = self.inner.clone();
        in_place(move || {
            let (answer, changes) = inner.commit(change)?;
            inner.checkpoint("commit")?;
            inner.signals.publish(changes.last_event, &changes.operations);
            Ok(answer)
        })
        .await
    }

    /// Runs `change` in one transaction and takes all of it back: what it answers is what would have happened.
    pub async fn rehearse<T, F>(&self, change: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Tx<'_>) -> Result<T> + Send + 'static,
    {
        let inner = self.inner.clone();
        blocking(move || {
            let mut writer = lock(&inner.writer);
            inner.check_alive()?;
            #[cfg(debug_assertions)]
            late::catch_up(&writer)?;
            let transaction = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
            // Dropping a transaction rolls it back.
            change(&Tx { transaction, changes: RefCell::default(), undo: Undo::default() })
        })
        .await
    }

    /// Runs `look` on one consistent view of the records.
    pub async fn read<T, F>(&self, look: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let inner = self.inner.clone();
        let permit = inner.reading.acquire().await.map_err(|_| draining())?;
        let shared = self.inner.clone();
        let answer = blocking(move || {
            shared.check_alive()?;
            #[cfg(debug_assertions)]
            if shared.late.load(Ordering::SeqCst) {
                return look(&lock(&shared.writer));
            }
            let idle = lock(&shared.readers).pop();
            let mut reader = match idle {
                Some(reader) => reader,
                None => connect(&shared.path)?,
            };
            let view = reader.transaction()?;
            let answer = look(&view);
            view.finish()?;
            lock(&shared.readers).push(reader);
            answer
        })
        .await;
        drop(permit);
        answer
    }

    /// As [`Store::read`], for a few records by their keys: tens of microseconds without a wait, done by the thread that asks,
    /// since waking another takes longer and two processors have better to do. Whatever has to wait goes the other way.
    pub async fn glance<T, F>(&self, look: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Connection) -> Result<T> + Send + 'static,
    {
        match self.inner.glance(&look)? {
            Some(answer) => answer,
            None => self.read(look).await,
        }
    }

    /// The state the records are in. Take it before the records are read: what is made of them holds at least as long
    /// as this version does. None when it cannot be told, and then nothing may be kept.
    pub fn version(&self) -> Option<Version> {
        self.inner.check_alive().ok()?;
        #[cfg(debug_assertions)]
        if self.inner.late.load(Ordering::SeqCst) {
            return None;
        }
        self.inner.watcher.look()
    }

    /// Who is woken by commits.
    pub fn signals(&self) -> &Signals {
        &self.inner.signals
    }

    /// See [`crate::core::Core::checkpoint`].
    pub fn checkpoint(&self, point: &'static str) -> Result<()> {
        self.inner.checkpoint(point)
    }

    /// Whether a test decided that the process is dead.
    pub fn is_dead(&self) -> bool {
        self.inner.dead.load(Ordering::SeqCst)
    }

    /// Makes each transaction lasting only when the next one begins: what the daemon does in between comes before
    /// the commit that should have come first. Nobody but a test of crashes wants that.
    #[cfg(debug_assertions)]
    pub(crate) fn commit_late(&self) {
        self.inner.late.store(true, Ordering::SeqCst);
    }

    /// Refuses everything from now on and folds the write-ahead log into the database.
    pub async fn close(&self) {
        let inner = self.inner.clone();
        let closed = blocking(move || {
            let writer = lock(&inner.writer);
            #[cfg(debug_assertions)]
            if !inner.dead.load(Ordering::SeqCst) {
                late::catch_up(&writer)?;
            }
            inner.closed.store(true, Ordering::SeqCst);
            lock(&inner.readers).clear();
            writer.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
            Ok(())
        })
        .await;
        if let Err(cause) = closed {
            tracing::warn!("the write-ahead log stays for the next start: {}", cause.chain());
        }
    }
}

impl Inner {
    fn commit<T>(&self, change: impl FnOnce(&Tx<'_>) -> Result<T>) -> Result<(T, Changes)> {
        let mut writer = lock(&self.writer);
        self.check_alive()?;
        #[cfg(debug_assertions)]
        late::catch_up(&writer)?;
        let transaction = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let tx = Tx { transaction, changes: RefCell::default(), undo: Undo::default() };
        let answer = change(&tx)?;
        let Tx { transaction, changes, undo } = tx;
        undo.0.take();
        #[cfg(debug_assertions)]
        if self.late.load(Ordering::SeqCst) {
            late::leave_open(transaction);
            return Ok((answer, changes.into_inner()));
        }
        transaction.commit()?;
        Ok((answer, changes.into_inner()))
    }

    /// Nothing where that would have to wait: for a reader, or for whoever holds the whole database.
    fn glance<T>(&self, look: impl FnOnce(&Connection) -> Result<T>) -> Result<Option<Result<T>>> {
        self.check_alive()?;
        #[cfg(debug_assertions)]
        if self.late.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let Ok(_permit) = self.reading.try_acquire() else { return Ok(None) };
        let Some(mut reader) = lock(&self.readers).pop() else { return Ok(None) };
        reader.busy_timeout(Duration::ZERO)?;
        let view = reader.transaction()?;
        // With this the view is held, and nothing of it can be kept from us any more.
        let answer = match view.prepare_cached("SELECT 1 FROM host LIMIT 1")?.exists([]) {
            Ok(_) => Some(look(&view)),
            Err(_) => None,
        };
        view.finish()?;
        reader.busy_timeout(limits::DATABASE_BUSY)?;
        lock(&self.readers).push(reader);
        Ok(answer)
    }

    fn check_alive(&self) -> Result<()> {
        if self.dead.load(Ordering::SeqCst) || self.closed.load(Ordering::SeqCst) {
            return Err(draining());
        }
        Ok(())
    }

    fn checkpoint(&self, point: &'static str) -> Result<()> {
        self.check_alive()?;
        if self.checkpoint.reached(point) == Fate::Die {
            self.dead.store(true, Ordering::SeqCst);
        }
        self.check_alive()
    }
}

fn draining() -> Error {
    Error::new(Code::Draining, "the daemon is shutting down; try again when it has started")
}

/// A panic of another transaction has rolled that one back; the connection itself is sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the database, if there is none, for its owner alone: user data lies in it, and the directory may be open to
/// those who use the socket there. SQLite gives the files it makes beside it the same mode; those of an earlier daemon
/// are corrected. Repeatable.
fn keep_to_owner(path: &Path) -> Result<()> {
    let failed =
        |path: &Path, cause| Error::file(format!("cannot keep {} to its owner", path.display()), cause);
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(OWNER_ONLY)
        .open(path)
        .map_err(|cause| failed(path, cause))?;
    for suffix in ["", "-wal", "-shm"] {
        let path = beside(path, suffix);
        match std::fs::set_permissions(&path, Permissions::from_mode(OWNER_ONLY)) {
            Err(cause) if cause.kind() != ErrorKind::NotFound => return Err(failed(&path, cause)),
            _ => (),
        }
    }
    Ok(())
}

const OWNER_ONLY: u32 = 0o600;

/// A file of SQLite's beside the database.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Makes the write-ahead log as long as it grows between two checkpoints, with zeroes: what is committed then goes where the
/// file has room on the disk already. A file system with a journal would commit each time that the file got longer. Zeroes are
/// the end of what SQLite takes for valid, since no frame has that checksum, and it begins again at the front without
/// making the file shorter (sqlite.org/walformat.html). So records have room on a disk that is full, too, unless it is so
/// from the beginning. Appended, so that nothing another process writes meanwhile is lost. Repeatable.
fn lengthen_log(path: &Path) -> Result<()> {
    let path = beside(path, "-wal");
    let failed = |cause| Error::file(format!("cannot lengthen {}", path.display()), cause);
    let mut log = File::options().append(true).open(&path).map_err(failed)?;
    let missing = limits::LOG_BYTES.saturating_sub(log.metadata().map_err(failed)?.len());
    space::check(path.parent().unwrap_or(&path), missing, 0)?;
    io::copy(&mut io::repeat(0).take(missing), &mut log).and_then(|_| log.sync_all()).map_err(failed)
}

fn connect(path: &Path) -> Result<Connection> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(limits::DATABASE_BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "cache_size", -limits::DATABASE_CACHE_KB)?;
    connection.set_prepared_statement_cache_capacity(limits::STATEMENTS_KEPT);
    Ok(connection)
}

async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|cause| Err(Error::internal("a transaction ended badly", cause)))
}

#[cfg(test)]
mod tests;
