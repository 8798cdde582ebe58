//! Snapshots: what servers were at a moment. Called by the facade, and by `servers`, which takes them.
//!
//! The record is committed before the first file is made, and one in state `creating` is worth nothing: a server takes
//! it from the beginning, or it is removed. The files of a `ready` one never change.
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::operation::Accepted;
use model::page::{ListQuery, Page};
use model::snapshot::{PatchSnapshot, Snapshot, SnapshotState};
use model::{Code, SnapshotId, Time};
use rusqlite::Connection;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::call::{Actor, Answer, Call};
use crate::core::{Shared, blocking};
use crate::error::{Error, Result};
use crate::labels;
use crate::store::Tx;
use crate::store::records;
use crate::volumes::files;

mod ahead;
mod bundle;
pub(crate) mod chain;
mod export;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod import;
pub mod limits;
pub(crate) mod record;
mod sweep;

pub use chain::Chain;
pub use export::Export;

pub(crate) use chain::open as open_file;
use sweep::Trimmed;

pub(crate) use record::{Delayed, Origin, OriginDisk, SnapshotRecord, TABLES, Taken};

/// Snapshots, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Snapshots {
    core: Shared,
    expiry: Arc<Expiry>,
    imports: Arc<import::AtWork>,
    ends: watch::Sender<()>,
    /// Memory that servers may have in all.
    memory_bytes: u64,
    /// Held by who takes away what nobody needs.
    sweeping: Arc<tokio::sync::Mutex<()>>,
    /// Those of which a machine is being looked at.
    observed: Arc<Mutex<BTreeSet<SnapshotId>>>,
}

/// The task that deletes what has expired.
#[derive(Default)]
struct Expiry {
    /// Some time has changed.
    changed: Notify,
    /// Deleted snapshots of which something is left that nobody needs: somebody uses it, or it could not be taken away.
    unswept: Mutex<BTreeSet<SnapshotId>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Expiry {
    fn unswept(&self) -> MutexGuard<'_, BTreeSet<SnapshotId>> {
        self.unswept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Snapshots {
    pub(crate) fn new(core: Shared, memory_bytes: u64) -> Snapshots {
        Snapshots {
            core,
            expiry: Arc::default(),
            imports: Arc::default(),
            ends: watch::Sender::new(()),
            memory_bytes,
            sweeping: Arc::default(),
            observed: Arc::default(),
        }
    }

    /// Takes up what an earlier daemon left unfinished: `taken` are those that servers are taking, and go on to take.
    /// From here on what expires is deleted.
    pub(crate) async fn recover(&self, taken: BTreeSet<SnapshotId>) -> Result<()> {
        let left_behind = move |connection: &Connection| record::left_behind(connection, &taken);
        for id in self.core.store.read(left_behind).await? {
            match self.purge(id).await {
                Err(cause) if cause.code == Code::Draining || self.core.store.is_dead() => return Err(cause),
                Err(cause) => {
                    tracing::warn!(snapshot = %id, "its deletion is tried again: {}", cause.chain());
                    self.carry_off(id);
                }
                Ok(()) => {}
            }
        }
        // With what nobody knows any more.
        self.sweep().await?;
        let snapshots = self.clone();
        let task = tokio::spawn(async move { snapshots.expire().await });
        *self.expiry.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        Ok(())
    }

    /// Ends what is done by itself.
    pub(crate) async fn close(&self) {
        let task = self.expiry.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.abort();
            // An aborted task answers an error that says so.
            let _ = task.await;
        }
    }

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Snapshot>> {
        let look = move |connection: &Connection| {
            let Page { items, next_cursor, watch_cursor } =
                records::page::<SnapshotRecord>(connection, &query)?;
            let items = items.into_iter().map(|record| record.shown).collect();
            Ok(Page { items, next_cursor, watch_cursor })
        };
        self.core.store.read(look).await
    }

    /// The snapshot.
    pub async fn one(&self, id: SnapshotId) -> Result<Snapshot> {
        let look = move |connection: &Connection| records::one::<SnapshotRecord>(connection, id.0);
        Ok(self.core.store.read(look).await?.shown)
    }

    /// Changes name, words, labels and expiry.
    pub async fn patch(&self, call: &Call, id: SnapshotId, patch: PatchSnapshot) -> Result<Answer<Snapshot>> {
        let conditions = call.clone();
        let change = move |tx: &Tx<'_>| {
            let mut record: SnapshotRecord = records::one(tx, id.0)?;
            conditions.check_match(record.shown.generation)?;
            apply(&mut record.shown, patch)?;
            record::save(tx, &mut record)?;
            record::announce(tx, &record.shown, "snapshot.updated", None, Some(&conditions.actor))?;
            Ok(record.shown)
        };
        let answer = self.core.mutate(call, change).await?;
        self.expiry.changed.notify_one();
        Ok(answer)
    }

    /// Deletes it.
    pub async fn delete(&self, call: &Call, id: SnapshotId) -> Result<Answer<Accepted<Snapshot>>> {
        let conditions = call.clone();
        let change = move |tx: &Tx<'_>| {
            let record: SnapshotRecord = records::one(tx, id.0)?;
            conditions.check_match(record.shown.generation)?;
            record::doom(tx, record, &conditions.actor, None)
        };
        let answer = self.core.mutate(call, change).await?;
        if !answer.replayed {
            self.carry_off(id);
        }
        Ok(answer)
    }

    /// Removes the files of a doomed snapshot in the background: one whose files cannot be removed holds up nothing else.
    fn carry_off(&self, id: SnapshotId) {
        let snapshots = self.clone();
        tokio::spawn(async move {
            let purged = snapshots.core.insist("the deletion of a snapshot", || snapshots.purge(id));
            if let Err(cause) = purged.await {
                tracing::warn!(snapshot = %id, "is deleted at the next start: {}", cause.chain());
            }
        });
    }

    /// Deletes what expires when its time has come, for ever.
    async fn expire(&self) {
        let mut pause = crate::limits::RETRY;
        loop {
            let expired = self.expire_now().await;
            match self.sweep_again().await.and(expired) {
                Ok(next_ms) => {
                    pause = crate::limits::RETRY;
                    let left_ms = next_ms.map(|next_ms| next_ms.saturating_sub(Time::now().unix_ms()));
                    // The clock may be set meanwhile, so it is looked at now and then.
                    let left = left_ms.map(|ms| Duration::from_millis(u64::try_from(ms).unwrap_or_default()));
                    tokio::select! {
                        () = tokio::time::sleep(left.unwrap_or(limits::CLOCK).min(limits::CLOCK)) => {}
                        () = self.expiry.changed.notified() => tokio::time::sleep(limits::LOOK_AGAIN).await,
                    }
                }
                Err(cause) if cause.code == Code::Draining || self.core.store.is_dead() => return,
                Err(cause) => {
                    tracing::warn!("snapshots that have expired are deleted later: {}", cause.chain());
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(crate::limits::RETRY_MAX);
                }
            }
        }
    }

    /// Deletes what has expired; answers when the next one does.
    async fn expire_now(&self) -> Result<Option<i64>> {
        let now_ms = Time::now().unix_ms();
        let due = self
            .core
            .store
            .read(move |connection| Ok(!record::expired(connection, now_ms)?.is_empty()))
            .await?;
        if due {
            let doom = move |tx: &Tx<'_>| {
                let expired = record::expired(tx, now_ms)?;
                let mut doomed = Vec::new();
                for record in expired {
                    let id = record.shown.id;
                    match record::doom(tx, record, &Actor::Host, Some("it has expired")) {
                        Ok(_) => doomed.push(id),
                        // It is looked at again when the clock is, and holds up no other.
                        Err(cause) if cause.code == Code::InUse => {}
                        Err(cause) => return Err(cause),
                    }
                }
                Ok(doomed)
            };
            self.core.store.write(doom).await?.into_iter().for_each(|id| self.carry_off(id));
        }
        self.core.store.read(move |connection| record::next_expiry_ms(connection, now_ms)).await
    }

    /// For `servers`: the snapshot of this id or name, which can be used. Fails with `invalid` on `/snapshot`.
    pub(crate) fn ready(connection: &Connection, id_or_name: &str) -> Result<SnapshotRecord> {
        let shown: String = id_or_name.chars().take(model::limits::NAME_CHARS_MAX).collect();
        let refused = |code: &str, detail: String| Err(Error::invalid("/snapshot", code, detail));
        let Some(record) = records::resolve::<SnapshotRecord>(connection, id_or_name)? else {
            let detail = format!("there is no snapshot {shown}; the list of snapshots has what there is");
            return refused("not_found", detail);
        };
        match record.shown.state {
            SnapshotState::Ready => Ok(record),
            SnapshotState::Creating => {
                refused("not_ready", format!("snapshot {shown} is still being taken; wait for its operation"))
            }
            SnapshotState::Deleting => refused("not_ready", format!("snapshot {shown} is being deleted")),
        }
    }

    /// For `servers`: records a snapshot that it is going to take. Fails with `already_exists` when the name is taken.
    pub(crate) fn begin(tx: &Tx<'_>, record: &SnapshotRecord, actor: &Actor) -> Result<()> {
        record::insert(tx, record, actor)
    }

    /// For `servers`: it is complete, and its files are on their medium.
    pub(crate) fn complete(tx: &Tx<'_>, id: SnapshotId, taken: &Taken) -> Result<()> {
        record::complete(tx, id, taken)
    }

    /// For `servers`: the snapshot, if there is one.
    pub(crate) fn find(connection: &Connection, id: SnapshotId) -> Result<Option<SnapshotRecord>> {
        records::find(connection, id.0)
    }

    /// For `servers` that wait for one: changes when the work on any has ended.
    pub(crate) fn ends(&self) -> watch::Receiver<()> {
        self.ends.subscribe()
    }

    /// For `servers`: has those that wait for one look whether it is taken still.
    pub(crate) fn may_have_ended(&self) {
        self.ends.send_replace(());
    }

    /// For `servers`: it is taken no more; what is not complete is forgotten.
    pub(crate) fn settle(tx: &Tx<'_>, id: SnapshotId) -> Result<()> {
        record::settle(tx, id)
    }

    /// For `servers`, after work on it has ended: removes the files if there is no record. What cannot be removed is no matter of
    /// the server's; it is tried again later. Repeatable.
    pub(crate) async fn tidy(&self, id: SnapshotId) -> Result<()> {
        // One that is complete may have an expiry, which nobody has waited for yet.
        self.expiry.changed.notify_one();
        self.may_have_ended();
        let find = move |connection: &Connection| records::find::<SnapshotRecord>(connection, id.0);
        if self.core.store.read(find).await?.is_none()
            && let Err(cause) = self.remove(id).await
        {
            tracing::warn!(snapshot = %id, "what is left of it is looked at again later: {}", cause.chain());
            self.expiry.unswept().insert(id);
        }
        Ok(())
    }

    /// For `servers`: one may have gone on from a snapshot, or is no more; it may have been the last that needed one.
    pub(crate) fn let_go(&self) {
        self.expiry.changed.notify_one();
    }

    /// Where its files lie.
    pub(crate) fn directory(&self, id: SnapshotId) -> PathBuf {
        self.core.dirs.snapshot(id)
    }

    async fn purge(&self, id: SnapshotId) -> Result<()> {
        let _turn = self.sweeping.lock().await;
        // What others need of it stays.
        if self.trim(id).await? == Trimmed::InUse {
            self.expiry.unswept().insert(id);
        }
        self.core.checkpoint("snapshot.removed")?;
        // It may have been the last to need something of others.
        let find = move |connection: &Connection| records::find::<SnapshotRecord>(connection, id.0);
        let below = self.core.store.read(find).await?.map(|record| record.chain.below()).unwrap_or_default();
        self.trim_without_record(below).await?;
        self.core.store.write(move |tx| record::forget(tx, id)).await
    }

    /// For `servers` too: removes its files. Repeatable.
    pub(crate) async fn remove(&self, id: SnapshotId) -> Result<()> {
        let directory = self.core.dirs.snapshot(id);
        blocking(move || {
            files::remove_tree(&directory)
                .map_err(|cause| Error::file(format!("cannot remove {}", directory.display()), cause))
        })
        .await
    }
}

/// For `images`: names of the snapshots that servers of this image were saved in.
pub(crate) fn users_of_image(connection: &Connection, image: model::ImageId) -> Result<Vec<String>> {
    let all: Vec<SnapshotRecord> = records::all(connection)?;
    let of_image = all.into_iter().map(|record| record.shown).filter(|shown| shown.image_id == image);
    Ok(of_image.map(|shown| shown.name.to_string()).collect())
}

/// Makes a snapshot's directory, for its owner alone.
pub(crate) fn make_directory(directory: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(directory)
        .map_err(|cause| Error::file(format!("cannot make {}", directory.display()), cause))
}

/// Puts every file of it on its medium; answers what they take of it, in bytes. A VMM wrote some of them and is to have let
/// go: from here on they never change, whoever takes it over.
pub(crate) fn flush(directory: &Path) -> Result<u64> {
    let failed = |cause| Error::file(format!("cannot flush {}", directory.display()), cause);
    let mut stored_bytes = 0u64;
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path: PathBuf = entry.map_err(failed)?.path();
        let file = File::open(&path).map_err(failed)?;
        await_last_writer(&file, &path)?;
        // Not before: nothing that is written after it would be durable.
        file.sync_all().map_err(failed)?;
        stored_bytes = stored_bytes.saturating_add(crate::volumes::used_bytes(file.metadata()));
    }
    files::sync_parent(&directory.join(STATE)).map_err(failed)?;
    files::sync_parent(directory).map_err(failed)?;
    Ok(stored_bytes)
}

/// Waits until nobody can write to a file any more. A VMM closes its files just behind its word that they are complete.
fn await_last_writer(file: &File, path: &Path) -> Result<()> {
    let end = Instant::now() + limits::LET_GO;
    loop {
        match sys::lease::is_final(file) {
            Ok(true) => return Ok(()),
            Ok(false) if Instant::now() < end => std::thread::sleep(limits::LET_GO_AGAIN),
            Ok(false) => {
                let detail = format!(
                    "the VMM does not let go of {}, which it was to write; on a network file system that gives no \
                     leases (NFS, CIFS) this is always so: keep the state directory on a local one",
                    path.display()
                );
                return Err(Error::new(Code::MachineFailed, detail));
            }
            Err(cause) => {
                // Only on a file system that has no leases.
                tracing::warn!("whether {} is final cannot be told: {cause}", path.display());
                return Ok(());
            }
        }
    }
}

/// Files of a machine's memory in a snapshot's directory.
pub(crate) const STATE: &str = "machine.state";
pub(crate) const MEMORY: &str = "machine.memory";

/// File of a disk in a snapshot's directory.
pub(crate) fn disk_name(index: usize) -> String {
    format!("disk{index}.raw")
}

/// Whether a file of a snapshot's directory is a disk.
fn is_disk(name: &str) -> bool {
    name.strip_prefix("disk").and_then(|name| name.strip_suffix(".raw")).is_some()
}

fn apply(shown: &mut Snapshot, patch: PatchSnapshot) -> Result<()> {
    if let Some(name) = patch.name {
        shown.name = name;
    }
    if let Some(description) = patch.description {
        check_description(&description)?;
        shown.description = description;
    }
    if let Some(changes) = patch.labels {
        shown.labels = labels::merge(&shown.labels, changes)?;
    }
    if let Some(expires_at) = patch.expires_at {
        check_expiry(expires_at)?;
        shown.expires_at = expires_at;
    }
    Ok(())
}

/// A time that has passed is a mistake more likely than a wish.
pub(crate) fn check_expiry(expires_at: Option<Time>) -> Result<()> {
    if expires_at.is_some_and(|time| time <= Time::now()) {
        return Err(Error::invalid("/expires_at", "has_passed", "must lie in the future"));
    }
    Ok(())
}

pub(crate) fn check_description(text: &str) -> Result<()> {
    let most = model::limits::DESCRIPTION_CHARS_MAX;
    if text.chars().count() > most {
        let detail = format!("must have at most {most} characters");
        return Err(Error::invalid("/description", "too_long", detail));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
