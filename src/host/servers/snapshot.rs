//! Taking a snapshot: what is recorded when one is asked for, and the work. The files are of one moment: a machine that
//! runs is parked for it, and memory and disks (`copies`) are taken as they were then while it runs on.
//!
//! ```text
//! runs ── memory is protected ──▶ parked ──▶ runs ── disks and memory copied ──▶ flushed
//!              (with memory only)  the moment
//! ```
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use model::operation::{Accepted, Operation};
use model::snapshot::{CreateSnapshot, FullReason, Snapshot, SnapshotState, SnapshotVolume};
use model::volume::FillMethod;
use model::{Code, Name, SnapshotId, Time};
use wire::control::{Command, FaultCode, PROTOCOL_OF_BASES, Reply};
use wire::copies::CopyReport;
use wire::machine::FdIndex;
use wire::saved::{Base, Live, Moment, SaveReport, SaveSpec, SaveStatus, WriteDelay};

use super::effects::Doing;
use super::lifecycle::{Ask, Back, Event, Phase, Trouble};
use super::record::ServerRecord;
use super::registry::Workshop;
use super::settle::Own;
use super::{advance, copies, limits, machine, view};
use crate::call::Actor;
use crate::config::Dirs;
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::operations;
use crate::snapshots::{
    Chain, Delayed, MEMORY, Origin, OriginDisk, STATE, SnapshotRecord, Snapshots, Taken, chain, flush,
    make_directory,
};
use crate::store::{Tx, records};
use crate::vmms::Link;
use crate::vmms::link::AskError;
use crate::volumes::{Content, Volumes, space};

/// Where the kernel hands out descriptors that tell of accesses to memory.
pub(super) const USERFAULTFD: &str = "/dev/userfaultfd";

/// Records a snapshot and the operation that takes it.
pub(super) fn accept(
    tx: &Tx<'_>,
    workshop: &Workshop,
    server: ServerRecord,
    spec: CreateSnapshot,
    actor: &Actor,
) -> Result<Accepted<Snapshot>> {
    crate::snapshots::check_description(&spec.description)?;
    crate::snapshots::check_expiry(spec.expires_at)?;
    let record = describe(tx, workshop, SnapshotId::new(), &server, spec)?;
    let operation = begin(tx, workshop, server, &record, actor)?;
    Ok(Accepted { operation, resource: Some(record.shown) })
}

/// Records what [`describe`] has answered, and the operation that takes it.
pub(super) fn begin(
    tx: &Tx<'_>,
    workshop: &Workshop,
    server: ServerRecord,
    record: &SnapshotRecord,
    actor: &Actor,
) -> Result<Operation> {
    let (id, memory) = (record.shown.id, record.shown.memory);
    if memory && !server.life.phase.has_machine() {
        let detail = format!(
            "server {} has no machine, and so no memory to save: start it first, or take a snapshot of its disks \
             alone, with which another server can be created",
            server.name
        );
        return Err(Error::new(Code::WrongState, detail).with_actions(view::allowed_actions(&server)));
    }
    let ask = Ask::Snapshot { id, memory };
    // What an overlay has rewritten is in both of its files, and is copied once.
    let disks = server.disks.iter().zip(&record.shown.volumes);
    let disks =
        disks.map(|(disk, shown)| workshop.volumes.stored_bytes(disk.volume_id).min(shown.size_bytes));
    let disks = disks.fold(0, u64::saturating_add);
    // How much of the memory was ever written is not known before it is copied.
    let needed = disks.saturating_add(if memory { record.shown.memory_bytes } else { 0 });
    let place = workshop.core.dirs.root().join("snapshots");
    let (operation, _) = advance::ask(tx, workshop.capacity, server, ask, actor, |_| Ok(()))?;
    space::check(&place, needed, 0)?;
    Snapshots::begin(tx, record, actor)?;
    operations::one(tx, operation.id)
}

/// A snapshot of a server that is about to be taken.
pub(super) fn describe(
    tx: &Tx<'_>,
    workshop: &Workshop,
    id: SnapshotId,
    server: &ServerRecord,
    spec: CreateSnapshot,
) -> Result<SnapshotRecord> {
    let volumes = (0u8..).zip(&server.disks).map(|(index, disk)| {
        let size_bytes = Volumes::find(tx, disk.volume_id)?.size_bytes;
        Ok(SnapshotVolume { index, size_bytes, filled_by: None })
    });
    // Of a machine that runs, what it has; the record may already say what the next one gets.
    let held = Some(&server.held).filter(|_| server.life.phase.has_machine());
    let base = spec.incremental.then(|| chain::base(tx, server.id, spec.memory)).transpose()?;
    let now = Time::now();
    let shown = Snapshot {
        id,
        name: spec.name.map_or_else(|| name(&server.name, id), Ok)?,
        description: spec.description,
        labels: spec.labels,
        state: SnapshotState::Creating,
        server_id: server.id,
        server_name: server.name.clone(),
        imported: false,
        memory: spec.memory,
        vcpus: held.map_or(server.vcpus, |held| held.vcpus),
        memory_bytes: held.map_or(server.memory_bytes, |held| held.memory_bytes),
        cpu: held.and_then(|held| held.cpu.as_ref()).unwrap_or(&server.cpu).clone(),
        image_id: server.image_id,
        volumes: volumes.collect::<Result<_>>()?,
        stored_bytes: 0,
        parent_id: base.and_then(std::result::Result::ok),
        inherited_bytes: 0,
        full_because: base.and_then(std::result::Result::err),
        working_set_bytes: None,
        taken_at: None,
        paused_ms: None,
        guest_writes_delayed: None,
        guest_write_delay_us_max: None,
        guest_write_delay_us_sum: None,
        expires_at: spec.expires_at,
        generation: 1,
        created_at: now,
        updated_at: now,
    };
    let origin = Origin {
        default_user: server.default_user.clone(),
        ssh_keys: server.ssh_keys.clone(),
        user_data: server.user_data.clone(),
        restart_policy: server.restart_policy,
        isolation: server.isolation,
        nics: server.nics.clone(),
        disks: server
            .disks
            .iter()
            .map(|disk| OriginDisk { cache: disk.cache, limits: disk.limits })
            .collect(),
        descent: server.descent,
        processor: spec.memory.then(|| workshop.processor.found_out().of(&server.cpu, &server.held)),
        for_clones: false,
    };
    Ok(SnapshotRecord { shown, root: None, origin, chain: Chain::default() })
}

/// Unique, and says whose it is.
fn name(server: &Name, id: SnapshotId) -> Result<Name> {
    let digits = id.0.simple().to_string();
    let tail = format!("-{}", &digits[digits.len() - 8..]);
    let head = server.as_str();
    let head = &head[..head.len().min(model::limits::NAME_CHARS_MAX - tail.len())];
    format!("{head}{tail}").parse().map_err(|cause| Error::internal("a snapshot cannot be named", cause))
}

/// The moment, as the machine that runs sees it.
struct Stillness {
    at_ms: i64,
    paused_ms: u64,
    disks: Vec<FillMethod>,
    /// What the VMM says that has copied them as the guest ran.
    copied: Option<CopyReport>,
}

/// Where a snapshot of memory goes.
#[derive(Clone, Copy)]
struct Place<'a> {
    directory: &'a Path,
    /// One with as much memory, whose parts need not be written again.
    base: Option<&'a SnapshotRecord>,
}

impl Doing {
    /// Takes a snapshot, from the beginning. What fails leaves no files; the machine may be parked then.
    pub(super) async fn snapshot(&self, id: SnapshotId) -> Result<Event> {
        match self.try_snapshot(id).await {
            Ok(taken) => Ok(Event::SnapshotTaken(id, taken)),
            Err(cause) if self.workshop.core.store.is_dead() => Err(cause),
            Err(cause) => {
                if !self.is_stopped() {
                    tracing::warn!(server = %self.record.id, "no snapshot of it: {}", cause.chain());
                }
                self.give_up_save(limits::COMMAND).await;
                self.workshop.snapshots.remove(id).await?;
                self.workshop.core.checkpoint("server.snapshot_removed")?;
                Ok(Event::SnapshotFailed(id, Trouble::from(&cause)))
            }
        }
    }

    async fn try_snapshot(&self, id: SnapshotId) -> Result<Taken> {
        let Phase::Snapshotting { vmm, memory, back, .. } = &self.record.life.phase else {
            return Err(Error::new(Code::WrongState, "the snapshot is not wanted any more"));
        };
        let directory = self.workshop.snapshots.directory(id);
        // Whatever an earlier try has left is of another moment.
        self.workshop.snapshots.remove(id).await?;
        let made = directory.clone();
        blocking(move || make_directory(&made)).await?;
        self.workshop.core.checkpoint("server.snapshot_begun")?;
        let (memory_bytes, base, full_because) = self.base(id).await?;
        let of_memory = base.as_ref().filter(|(_, of_memory)| *of_memory).map(|(base, _)| base);
        let place = Place { directory: &directory, base: of_memory };
        let (still, report) = match (vmm, memory, back) {
            (None, ..) => (self.copy_at_rest(&directory).await?, None),
            (Some(_), false, back) => (self.copy_disks_only(&directory, back).await?, None),
            (Some(_), true, Back::Running) => self.copy_running(place).await?,
            (Some(_), true, _) => self.copy_parked(place).await?,
        };
        self.workshop.core.checkpoint("server.snapshot_copied")?;
        let chain = match base {
            None => Chain::default(),
            Some((base, of_memory)) => {
                let memory =
                    report.as_ref().filter(|_| of_memory).map(|report| (report.root, report.memory_bytes));
                let (dirs, stop, disks) =
                    (self.workshop.core.dirs.clone(), self.stop.clone(), still.disks.clone());
                let thinned = blocking(move || {
                    let fresh = chain::Fresh { id, memory_bytes, memory, disks: &disks };
                    chain::thin(&dirs, &fresh, &base, &|| stop.load(Ordering::SeqCst))
                });
                let chain = thinned.await?;
                self.workshop.core.checkpoint("server.snapshot_thinned")?;
                chain
            }
        };
        let stored_bytes = blocking(move || flush(&directory)).await?;
        self.workshop.core.checkpoint("server.snapshot_flushed")?;
        let Stillness { at_ms, paused_ms, disks, copied } = still;
        let root = report.as_ref().map(|report| report.root);
        let of_memory = report.and_then(|SaveReport { waits, delay, .. }| Some((waits, delay?)));
        let of_disks = copied.map(|CopyReport { waits, delay, .. }| (waits, delay));
        let delayed = [of_memory, of_disks].into_iter().flatten().reduce(|(one, mine), (other, theirs)| {
            let us_max = mine.us_max.max(theirs.us_max);
            (
                one.saturating_add(other),
                WriteDelay { us_max, us_sum: mine.us_sum.saturating_add(theirs.us_sum) },
            )
        });
        let delayed = delayed.map(|(writes, delay)| Delayed { writes, delay });
        Ok(Taken { at_ms, paused_ms, delayed, disks, root, stored_bytes, chain, full_because })
    }

    /// The machine's memory, and the snapshot that this one is taken on, which is there as long as this one is being taken, with
    /// whether memory can be compared with it. One that cannot be read is none.
    async fn base(
        &self,
        id: SnapshotId,
    ) -> Result<(u64, Option<(SnapshotRecord, bool)>, Option<FullReason>)> {
        let find = move |connection: &rusqlite::Connection| {
            let shown = records::one::<SnapshotRecord>(connection, id.0)?.shown;
            let base =
                shown.parent_id.map(|base| records::one::<SnapshotRecord>(connection, base.0)).transpose()?;
            Ok((shown.memory_bytes, base, shown.full_because))
        };
        let (memory_bytes, base, full_because) = self.workshop.core.store.read(find).await?;
        let Some(base) = base else { return Ok((memory_bytes, None, full_because)) };
        let dirs = self.workshop.core.dirs.clone();
        blocking(move || match chain::check(&dirs, &base, memory_bytes) {
            Ok(of_memory) => Ok((memory_bytes, Some((base, of_memory)), full_because)),
            Err(cause) => {
                tracing::warn!(snapshot = %base.shown.id, "none is taken on it, as it cannot be read: {cause}");
                Ok((memory_bytes, None, Some(FullReason::ParentUnreadable)))
            }
        })
        .await
    }

    /// Nobody writes to the disks: each is locked while it is copied, so that no machine gets it.
    async fn copy_at_rest(&self, directory: &Path) -> Result<Stillness> {
        let mut files = Vec::new();
        for disk in &self.record.disks {
            files.push(self.workshop.volumes.open(disk.volume_id, Content::Recorded).await?);
        }
        let at_ms = Time::now().unix_ms();
        let disks = self.copy_disks(directory, files).await?;
        Ok(Stillness { at_ms, paused_ms: 0, disks, copied: None })
    }

    async fn copy_disks_only(&self, directory: &Path, back: &Back) -> Result<Stillness> {
        let link = self.fresh_link().await?;
        if self.record.life.overlaid {
            // As a save would: what is read from two files must hold still.
            link.order(Command::CancelSettle, limits::PAUSE).await?;
        }
        let disks = self.disks_ahead(&link, directory, *back == Back::Running).await?;
        let moment = self.park(&link).await?;
        let (disks, copied) = self.copy_now(&link, directory, disks).await?;
        let still = self.let_go(&link, back, moment, disks).await?;
        Ok(Stillness { copied: self.end_of_copy(&link, copied, Some(copies::PART)).await?, ..still })
    }

    /// Of a machine that is parked: memory and disks are copied side by side.
    async fn copy_parked(&self, place: Place<'_>) -> Result<(Stillness, Option<SaveReport>)> {
        let directory = place.directory;
        let link = self.fresh_link().await?;
        let disks = self.disks_ahead(&link, directory, false).await?;
        let moment = self.park(&link).await?;
        self.begin_save(&link, place, None).await?;
        let copying = self.copy_now(&link, directory, disks);
        let ((disks, _), report) = tokio::try_join!(copying, self.end_of_save(&link))?;
        let still = self.let_go(&link, &Back::Paused, moment, disks).await?;
        Ok((still, Some(report)))
    }

    /// Of a machine that runs: it stands still for a moment only, where the kernel can tell of writes to memory.
    async fn copy_running(&self, place: Place<'_>) -> Result<(Stillness, Option<SaveReport>)> {
        let directory = place.directory;
        let link = self.fresh_link().await?;
        // A daemon that has died may have left it parked.
        link.order(Command::Resume, limits::PAUSE).await?;
        let device = File::options().read(true).write(true).open(USERFAULTFD).ok();
        if device.is_some() {
            // Of memory that is another file's the kernel tells no writes.
            match self.own(Own::Memory, ("settling_memory", 1, 8)).await {
                Err(cause) if self.is_stopped() || cause.code == Code::Draining => return Err(cause),
                Err(cause) => {
                    tracing::info!(server = %self.record.id, "it stands still: {}", cause.chain());
                }
                Ok(()) => self.workshop.core.checkpoint("server.snapshot_settled")?,
            }
        }
        let disks = self.disks_ahead(&link, directory, true).await?;
        let is_live = self.begin_live_save(&link, place, device).await?;
        let moment = self.park(&link).await?;
        if is_live {
            let (disks, copied) = self.copy_now(&link, directory, disks).await?;
            let still = self.let_go(&link, &Back::Running, moment, disks).await?;
            // Of one that fails the other is not waited for.
            let (copied, report) =
                tokio::try_join!(self.end_of_copy(&link, copied, None), self.end_of_save(&link))?;
            return Ok((Stillness { copied, ..still }, Some(report)));
        }
        self.begin_save(&link, place, None).await?;
        let copying = self.copy_now(&link, directory, disks);
        let ((disks, copied), report) = tokio::try_join!(copying, self.end_of_save(&link))?;
        let still = self.let_go(&link, &Back::Running, moment, disks).await?;
        let copied = self.end_of_copy(&link, copied, Some(copies::PART)).await?;
        Ok((Stillness { copied, ..still }, Some(report)))
    }

    /// A connection to a machine that saves nothing.
    async fn fresh_link(&self) -> Result<Link> {
        let link = self.entry.link(limits::COMMAND).await?;
        // What a daemon began that has died: its files are not ours.
        link.order(Command::CancelSave, limits::COMMAND).await?;
        Doing::give_up_copy(&link).await?;
        Ok(link)
    }

    async fn park(&self, link: &Link) -> Result<(Instant, i64)> {
        self.check_wanted()?;
        let began = Instant::now();
        link.park(limits::PAUSE).await?;
        let at_ms = Time::now().unix_ms();
        self.workshop.core.checkpoint("server.snapshot_parked")?;
        Ok((began, at_ms))
    }

    /// What belongs to the moment is done: a machine that ran before runs on.
    async fn let_go(
        &self,
        link: &Link,
        back: &Back,
        (began, at_ms): (Instant, i64),
        disks: Vec<FillMethod>,
    ) -> Result<Stillness> {
        if *back != Back::Running {
            return Ok(Stillness { at_ms, paused_ms: 0, disks, copied: None });
        }
        link.order(Command::Resume, limits::PAUSE).await?;
        let paused_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.workshop.core.checkpoint("server.snapshot_resumed")?;
        Ok(Stillness { at_ms, paused_ms, disks, copied: None })
    }

    /// Begins to save memory while the machine runs, and waits until the moment can come. False where this host or this
    /// memory cannot: then the machine has to stand still for it.
    async fn begin_live_save(&self, link: &Link, place: Place<'_>, device: Option<File>) -> Result<bool> {
        let Some(device) = device else { return Ok(false) };
        match self.begin_save(link, place, Some(device)).await {
            Err(cause) if cause.code == Code::MachineFailed => {
                tracing::info!(server = %self.record.id, "stands still for its memory: {}", cause.chain());
                return Ok(false);
            }
            begun => begun?,
        }
        loop {
            match self.save_status(link).await? {
                SaveStatus::Arming => tokio::time::sleep(limits::SAVE_LOOK).await,
                SaveStatus::Armed => {
                    self.workshop.core.checkpoint("server.snapshot_armed")?;
                    return Ok(true);
                }
                SaveStatus::Failed { detail } => {
                    tracing::info!(server = %self.record.id, "stands still for its memory: {detail}");
                    return Ok(false);
                }
                other => return Err(unexpected(&other)),
            }
            self.check_wanted()?;
        }
    }

    async fn begin_save(&self, link: &Link, place: Place<'_>, device: Option<File>) -> Result<()> {
        let paths = [place.directory.join(STATE), place.directory.join(MEMORY)];
        let dirs = self.workshop.core.dirs.clone();
        // A VMM of an earlier version writes all, and what the base has is given up later.
        let base = place.base.filter(|_| link.protocol() >= PROTOCOL_OF_BASES);
        let base = base.and_then(|base| Some((base.shown.id, base.root?)));
        let ([state, memory], base) = blocking(move || {
            let [state, memory] = paths;
            let base = base.map(|(id, root)| Ok::<_, Error>((open_state(&dirs, id)?, root))).transpose()?;
            Ok(([machine::fresh_file(&state)?, machine::fresh_file(&memory)?], base))
        })
        .await?;
        let mut descriptors = vec![state.as_fd(), memory.as_fd()];
        let live = device.as_ref().map(|device| {
            descriptors.push(device.as_fd());
            Live { userfaultfd: FdIndex(2), moment: Moment::Pause }
        });
        let base = base.as_ref().map(|(file, root)| {
            descriptors.push(file.as_fd());
            Base { state: FdIndex(descriptors.len() as u16 - 1), root: *root }
        });
        let spec = SaveSpec { state: FdIndex(0), memory: FdIndex(1), base, live };
        match link.ask(Command::Save(spec), &descriptors, limits::PAUSE).await {
            Ok(_) => Ok(()),
            Err(AskError::Refused(fault)) if fault.code == FaultCode::Host => {
                Err(Error::new(Code::MachineFailed, fault.detail))
            }
            Err(cause) => Err(cause.into()),
        }
    }

    /// Waits until memory is copied.
    async fn end_of_save(&self, link: &Link) -> Result<SaveReport> {
        let mut told = Instant::now();
        loop {
            match self.save_status(link).await? {
                SaveStatus::Saved(report) => return Ok(report),
                SaveStatus::Copying { done_bytes, total_bytes } => {
                    self.tell_at_times(&mut told, ("saving_memory", 50, 40), done_bytes, total_bytes).await?;
                }
                SaveStatus::Failed { detail } => {
                    let detail =
                        format!("the memory of server {} could not be saved: {detail}", self.record.name);
                    return Err(Error::new(Code::MachineFailed, detail));
                }
                other => return Err(unexpected(&other)),
            }
            self.check_wanted()?;
            tokio::time::sleep(limits::SAVE_LOOK).await;
        }
    }

    async fn save_status(&self, link: &Link) -> Result<SaveStatus> {
        match link.ask(Command::SaveStatus, &[], limits::COMMAND).await? {
            Reply::Save(status) => Ok(status),
            other => {
                let detail = format!("the VMM says of a save it was asked for: {other:?}");
                Err(Error::new(Code::MachineFailed, detail))
            }
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    pub(super) fn check_wanted(&self) -> Result<()> {
        match self.is_stopped() {
            true => Err(Error::new(Code::WrongState, "the snapshot was given up")),
            false => Ok(()),
        }
    }
}

fn open_state(dirs: &Dirs, id: SnapshotId) -> Result<File> {
    chain::open_in(dirs, id, STATE)
        .map_err(|cause| Error::file(format!("the state in snapshot {id} cannot be opened"), cause))
}

fn unexpected(status: &SaveStatus) -> Error {
    Error::new(Code::MachineFailed, format!("the VMM says of a save it was asked for: {status:?}"))
}
