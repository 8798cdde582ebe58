//! A server's memory on the disk: saved when it hibernates, given back when it starts. Two files in the server's
//! directory, which are whole before they have their names. What is in them is the VMM's business; `lifecycle` says
//! when they are worth something.
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use model::{Code, ServerId, SnapshotId};
use sys::beneath::Access;
use wire::control::{Command, Reply};
use wire::saved::{
    Clock, Counters, Digest, Identity, LowerFiles, MemoryUse, RestoreSpec, SaveReport, SaveSpec, SaveStatus,
    Then,
};

use super::effects::Doing;
use super::lifecycle::{Event, JobKind, Phase, Saved, SavedOf, Trouble};
use super::limits;
use super::machine::{self, Description};
use super::record::ServerRecord;
use super::registry::{Entry, Workshop};
use crate::core::{blocking, in_place};
use crate::error::{Error, Result};
use crate::snapshots::{self, SnapshotRecord, chain};
use crate::store::records;
use crate::vmms::Link;
use crate::vmms::link::Asked;
use crate::volumes::space;

pub(crate) const STATE: &str = "saved.state";
pub(crate) const MEMORY: &str = "saved.memory";

/// What whoever cannot have a memory back can do.
const LOST: &str = "; if its memory cannot be had again, a stop with no grace (`grace_s` 0) throws it away, and the next \
                    start begins from its disk";

/// Fails with `disk_full` when all of a machine's memory would not fit. How much of it was ever written is not known before it is
/// saved, and what is written until the disk is full is taken from other guests' disks.
pub(super) fn check_room(workshop: &Workshop, record: &ServerRecord) -> Result<()> {
    space::check(&workshop.core.dirs.server(record.id), record.held.memory_bytes, 0)
}

impl Doing {
    /// Parks the machine and saves it. What fails leaves no files and no save under way; the machine is there still, parked.
    pub(super) async fn save(&self) -> Result<Event> {
        match self.try_save().await {
            Ok(saved) => Ok(Event::Saved(saved)),
            // The next daemon begins anew.
            Err(cause) if cause.code == Code::Draining || self.workshop.core.store.is_dead() => Err(cause),
            Err(cause) => {
                if !self.stop.load(Ordering::SeqCst) {
                    tracing::warn!(server = %self.record.id, "it cannot be saved: {}", cause.chain());
                }
                self.give_up_save(limits::PAUSE).await;
                discard_or_warn(&self.workshop, self.record.id).await;
                self.workshop.core.checkpoint("server.save_undone")?;
                Ok(Event::SaveFailed(Trouble::from(&cause)))
            }
        }
    }

    /// No memory is to be protected, and no machine to stand still, for a save that nobody wants. A VMM that cannot be told so has
    /// ended or is about to.
    pub(super) async fn give_up_save(&self, patience: Duration) {
        if self.entry.machine().is_some()
            && let Ok(link) = self.entry.link(limits::COMMAND).await
        {
            let _ = link.order(Command::CancelSave, patience).await;
            let _ = Doing::give_up_copy(&link).await;
        }
    }

    async fn try_save(&self) -> Result<Saved> {
        let link = self.entry.link(limits::COMMAND).await?;
        link.park(limits::PAUSE).await?;
        self.workshop.core.checkpoint("server.parked")?;
        // One that a daemon began that has died: its files are not ours.
        link.order(Command::CancelSave, limits::COMMAND).await?;
        let directory = self.workshop.core.dirs.server(self.record.id);
        let (state, memory) = {
            let directory = directory.clone();
            blocking(move || Ok((fresh(&directory, STATE)?, fresh(&directory, MEMORY)?))).await?
        };
        let (first, second) = (wire::machine::FdIndex(0), wire::machine::FdIndex(1));
        let indices = SaveSpec { state: first, memory: second, base: None, live: None };
        link.ask(Command::Save(indices), &[state.as_fd(), memory.as_fd()], limits::PAUSE).await?;
        let report = self.follow(&link).await?;
        self.workshop.core.checkpoint("server.saved")?;
        blocking(move || keep(&directory)).await?;
        self.workshop.core.checkpoint("server.saved_kept")?;
        let stored_bytes = report.state_bytes.saturating_add(report.memory_bytes);
        Ok(Saved { root: report.root, stored_bytes, of: SavedOf::Hibernation })
    }

    /// Waits for the end of the copying, telling how far it is. Nobody else may want the machine meanwhile; when
    /// somebody does, the copying is given up.
    async fn follow(&self, link: &Link) -> Result<SaveReport> {
        let mut told = Instant::now();
        loop {
            tokio::time::sleep(limits::SAVE_LOOK).await;
            if self.stop.load(Ordering::SeqCst) {
                return Err(Error::new(Code::WrongState, "the save was given up"));
            }
            match link.ask(Command::SaveStatus, &[], limits::COMMAND).await? {
                Reply::Save(SaveStatus::Saved(report)) => return Ok(report),
                Reply::Save(SaveStatus::Failed { detail }) => {
                    let detail =
                        format!("the memory of server {} could not be saved: {detail}", self.record.name);
                    return Err(Error::new(Code::MachineFailed, detail));
                }
                Reply::Save(SaveStatus::Copying { done_bytes, total_bytes }) => {
                    self.tell_at_times(&mut told, ("saving_memory", 10, 70), done_bytes, total_bytes).await?;
                }
                other => {
                    let detail = format!("the VMM says of a save it was asked for: {other:?}");
                    return Err(Error::new(Code::MachineFailed, detail));
                }
            }
        }
    }

    /// Builds the machine as it was saved, and leaves it parked: the memory is used up only when that is recorded.
    pub(super) async fn restore(&self, saved: Saved) -> Result<()> {
        match machine::ready(&self.workshop, &self.entry, &self.record).await? {
            Some((link, description)) => {
                let restored =
                    async { Ok(self.begin_restore(&link, description, saved).await?.done().await?) };
                restored.await.map_err(|mut cause: Error| {
                    // One that is only being made comes to nothing.
                    let stays = self.record.life.job.is_none_or(|job| job.kind != JobKind::Create);
                    if stays && matches!(cause.code, Code::MachineFailed | Code::Internal) {
                        cause.detail.push_str(LOST);
                    }
                    cause
                })
            }
            None => Ok(()),
        }
    }

    /// Has a VMM that has no machine begin to do that.
    pub(super) async fn begin_restore(
        &self,
        link: &Link,
        Description { spec, mut descriptors }: Description,
        saved: Saved,
    ) -> Result<Asked> {
        machine::check_build(link, &spec)?;
        let (directory, names) = match saved.of {
            SavedOf::Hibernation => (self.workshop.core.dirs.server(self.record.id), [STATE, MEMORY]),
            SavedOf::Snapshot { id } | SavedOf::Clone { snapshot: id } => {
                (self.workshop.snapshots.directory(id), [snapshots::STATE, snapshots::MEMORY])
            }
        };
        let [state, memory] = names.map(|name| directory.join(name));
        let (state, memory) = in_place(move || Ok((kept(&state)?, kept(&memory)?))).await?;
        let below = self.below(saved.of.snapshot()).await?;
        let timeout = limits::BOOT + limits::restoring(spec.memory_bytes);
        let restore = RestoreSpec {
            machine: spec,
            state: descriptors.add(state),
            root: saved.root,
            memory: descriptors.add(memory),
            lower: below.map(|Below { runs, digest, files }| LowerFiles {
                runs: descriptors.add(runs),
                digest,
                files: files.into_iter().map(|file| descriptors.add(file)).collect(),
            }),
            how: match saved.of {
                // Into memory of its own, every part compared with what was saved: it may have come from another host,
                // which may have been taken over.
                SavedOf::Hibernation => MemoryUse::Copy,
                // The files of a snapshot never change, and are read as they are used.
                SavedOf::Snapshot { .. } | SavedOf::Clone { .. } => MemoryUse::Private,
            },
            clock: Clock::Advance,
            counters: match saved.of {
                SavedOf::Hibernation => Counters::Continue,
                // What was counted then has been counted on since.
                SavedOf::Snapshot { .. } | SavedOf::Clone { .. } => Counters::Fresh,
            },
            identity: match saved.of {
                SavedOf::Hibernation => Identity::Same,
                // Random numbers that the guest drew after that moment must not be drawn again.
                SavedOf::Snapshot { .. } | SavedOf::Clone { .. } => Identity::New,
            },
            then: Then::Stay,
        };
        restore
            .check(descriptors.0.len())
            .map_err(|cause| Error::internal(format!("the machine cannot be described: {cause}"), cause))?;
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.0.iter().map(AsFd::as_fd).collect();
        Ok(link.send(Command::Restore(Box::new(restore)), &borrowed, timeout).await?)
    }
}

/// What of a snapshot's memory lies with earlier ones.
struct Below {
    runs: File,
    digest: Digest,
    files: Vec<File>,
}

impl Doing {
    async fn below(&self, snapshot: Option<SnapshotId>) -> Result<Option<Below>> {
        let Some(id) = snapshot else { return Ok(None) };
        let find = move |connection: &rusqlite::Connection| records::one::<SnapshotRecord>(connection, id.0);
        let (record, dirs) = (self.workshop.core.store.glance(find).await?, self.workshop.core.dirs.clone());
        let Some(listed) = record.chain.of(snapshots::MEMORY).cloned() else { return Ok(None) };
        let open = move || {
            let runs = chain::open_in(&dirs, id, &chain::list_name(snapshots::MEMORY))?;
            let files = listed.below.iter().map(|below| chain::open_in(&dirs, *below, snapshots::MEMORY));
            Ok(Below { runs, digest: listed.digest, files: files.collect::<std::io::Result<_>>()? })
        };
        let failed = move |cause| Error::file(format!("the memory of snapshot {id} cannot be opened"), cause);
        in_place(move || open().map_err(failed)).await.map(Some)
    }
}

/// Has a machine that was found again give up a save that a daemon began, and that somebody has cancelled since: it could not
/// run on meanwhile, and what is written would stay as long as it is paused. Who saves it or takes a snapshot does so anyway.
pub(super) async fn give_up_unwanted(workshop: &Workshop, entry: &Entry, record: &ServerRecord) {
    let may_have_been_saved =
        matches!(record.life.phase, Phase::Pausing { .. } | Phase::Resuming { .. } | Phase::Stopping { .. });
    if !may_have_been_saved {
        return;
    }
    if let Ok(link) = entry.link(limits::COMMAND).await {
        // One that has no machine saves none.
        let _ = link.order(Command::CancelSave, limits::PAUSE).await;
        let _ = Doing::give_up_copy(&link).await;
    }
    // What lets it run removes them, too.
    if matches!(record.life.phase, Phase::Pausing { .. }) {
        discard_or_warn(workshop, record.id).await;
    }
}

/// Files that cannot be removed are in nobody's way: a machine that stands still for them would be worse.
async fn discard_or_warn(workshop: &Workshop, id: ServerId) {
    let directory = workshop.core.dirs.server(id);
    if let Err(cause) = blocking(move || discard(&directory)).await {
        tracing::warn!(server = %id, "what was saved of it stays: {}", cause.chain());
    }
}

/// Removes what was saved. Repeatable.
pub(super) fn discard(directory: &Path) -> Result<()> {
    for name in [STATE, MEMORY] {
        machine::remove_file(&directory.join(name))?;
        machine::remove_file(&unfinished(directory, name))?;
    }
    Ok(())
}

fn unfinished(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.new"))
}

fn fresh(directory: &Path, name: &str) -> Result<File> {
    machine::fresh_file(&unfinished(directory, name))
}

fn kept(path: &Path) -> Result<File> {
    machine::open_own(path, Access::Read).map_err(|cause| {
        Error::file(format!("the memory that was saved cannot be opened: {}", path.display()), cause)
    })
}

/// Gives both files their names, for good.
fn keep(directory: &Path) -> Result<()> {
    let failed =
        |cause| Error::file(format!("what was saved in {} cannot be kept", directory.display()), cause);
    for name in [STATE, MEMORY] {
        std::fs::rename(unfinished(directory, name), directory.join(name)).map_err(failed)?;
    }
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}
