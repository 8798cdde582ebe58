//! The disks of a snapshot. Where the file system shares blocks, sharing them takes a moment, in which the machine stands still. Where
//! not, the VMM of a machine that runs copies them as they are at that moment while its guest runs on; of one that does not run
//! anyway, and of a VMM that cannot, the daemon copies them. `snapshot` says when the moment is.
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use model::Code;
use model::volume::FillMethod;
use wire::control::{Command, PROTOCOL_COPIES, Reply};
use wire::copies::{CopyReport, CopySpec, CopyStatus, DiskCopy};
use wire::machine::FdIndex;

use super::effects::Doing;
use super::limits;
use super::telling::{Moved, Part};
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::snapshots::disk_name;
use crate::vmms::Link;
use crate::volumes::Volumes;
use crate::volumes::layers::Layers;

/// What is told of it.
pub(super) const PART: Part = ("copying_disks", 10, 40);

/// The disks, before the moment.
pub(super) enum Disks {
    /// They are copied, or shared, as the machine stands still.
    Still(Vec<Layers>),
    /// Its VMM copies them into these.
    Kept(Vec<File>),
}

/// The disks, behind the moment.
pub(super) enum Copied {
    All,
    /// Its VMM is at it.
    UnderWay,
}

impl Doing {
    /// Opens the disks, and does what can be done before the moment, after which the machine is to run on if it `runs`.
    pub(super) async fn disks_ahead(&self, link: &Link, directory: &Path, runs: bool) -> Result<Disks> {
        if runs && !self.workshop.volumes.shares_blocks() && link.protocol() >= PROTOCOL_COPIES {
            let mut files = Vec::new();
            for (index, disk) in self.record.disks.iter().enumerate() {
                let size_bytes = self.size_of(disk.volume_id).await?;
                let place = directory.join(disk_name(index));
                files.push(blocking(move || Volumes::hole(&place, size_bytes)).await?);
            }
            self.workshop.core.checkpoint("server.snapshot_disks_made")?;
            return Ok(Disks::Kept(files));
        }
        let mut files = Vec::new();
        for (index, disk) in self.record.disks.iter().enumerate() {
            let file = self.workshop.volumes.look(disk.volume_id).await?;
            let twin =
                file.own.try_clone().map_err(|cause| Error::file("a volume cannot be opened", cause))?;
            Volumes::share_ahead(twin, directory.join(disk_name(index))).await?;
            files.push(file);
        }
        Ok(Disks::Still(files))
    }

    /// What of the disks belongs to the moment. The machine is parked.
    pub(super) async fn copy_now(
        &self,
        link: &Link,
        directory: &Path,
        disks: Disks,
    ) -> Result<(Vec<FillMethod>, Copied)> {
        let files = match disks {
            Disks::Still(files) => return Ok((self.copy_disks(directory, files).await?, Copied::All)),
            Disks::Kept(files) => files,
        };
        if files.is_empty() {
            return Ok((Vec::new(), Copied::All));
        }
        let of = |at| DiskCopy { disk: at, file: FdIndex(at) };
        let descriptors: Vec<_> = files.iter().map(File::as_fd).collect();
        let spec = CopySpec { disks: (0..).map(of).take(files.len()).collect() };
        link.ask(Command::CopyDisks(spec), &descriptors, limits::PAUSE).await?;
        self.workshop.core.checkpoint("server.snapshot_disks_begun")?;
        Ok((vec![FillMethod::SparseCopy; files.len()], Copied::UnderWay))
    }

    /// Waits until the VMM has copied what it was told to copy; what it says of that, if it was. How far that is nobody is told but in a
    /// part of its own.
    pub(super) async fn end_of_copy(
        &self,
        link: &Link,
        copied: Copied,
        part: Option<Part>,
    ) -> Result<Option<CopyReport>> {
        if matches!(copied, Copied::All) {
            return Ok(None);
        }
        let mut told = Instant::now();
        loop {
            let status = match link.ask(Command::CopyStatus, &[], limits::COMMAND).await? {
                Reply::Copy(status) => status,
                other => return Err(unexpected(&other)),
            };
            match status {
                CopyStatus::Copied(report) => {
                    self.workshop.core.checkpoint("server.snapshot_disks_copied")?;
                    return Ok(Some(report));
                }
                CopyStatus::Copying { done_bytes, total_bytes } => {
                    if let Some(part) = part {
                        self.tell_at_times(&mut told, part, done_bytes, total_bytes).await?;
                    }
                }
                CopyStatus::Failed { detail } => {
                    let detail =
                        format!("the disks of server {} could not be copied: {detail}", self.record.name);
                    return Err(self.full_or("snapshots", Code::MachineFailed, detail));
                }
                CopyStatus::None => return Err(unexpected(&status)),
            }
            self.check_wanted()?;
            tokio::time::sleep(limits::SAVE_LOOK).await;
        }
    }

    /// Nothing is to be kept for a snapshot that nobody takes any more.
    pub(super) async fn give_up_copy(link: &Link) -> Result<()> {
        if link.protocol() >= PROTOCOL_COPIES {
            link.order(Command::CancelCopy, limits::PAUSE).await?;
        }
        Ok(())
    }

    /// Copies or shares every disk, to which nobody writes. Stops when nobody wants it any more.
    pub(super) async fn copy_disks(&self, directory: &Path, files: Vec<Layers>) -> Result<Vec<FillMethod>> {
        let moved = Moved::default();
        let copying = async {
            let mut methods = Vec::new();
            for (index, (file, disk)) in files.into_iter().zip(&self.record.disks).enumerate() {
                let size_bytes = self.size_of(disk.volume_id).await?;
                let place = directory.join(disk_name(index));
                let stopped = || self.is_stopped();
                let note = |done: u64, total: u64| moved.note(done, total);
                methods.push(Volumes::copy(file, place, size_bytes, &stopped, &note).await?);
                self.workshop.core.checkpoint("server.snapshot_disk_copied")?;
            }
            Ok(methods)
        };
        self.telling(PART, &moved, copying).await
    }

    async fn size_of(&self, volume: model::VolumeId) -> Result<u64> {
        self.workshop.core.store.read(move |all| Ok(Volumes::find(all, volume)?.size_bytes)).await
    }
}

fn unexpected(answer: &impl std::fmt::Debug) -> Error {
    Error::new(Code::MachineFailed, format!("the VMM says of disks it was to copy: {answer:?}"))
}
