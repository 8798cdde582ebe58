//! Making a new server: its directory and volumes, and where it is started at once, beside them a VMM with its machine, which
//! stands still until all of that is recorded. Called by `effects`.
use std::sync::atomic::Ordering;

use futures_util::future;
use model::server::{Isolation, ServerNic};
use model::{Code, VolumeId};
use tokio::sync::oneshot;

use super::effects::{Doing, Needs};
use super::lifecycle::{Event, Phase, Trouble};
use super::machine::{Building, Prepared};
use super::telling::Moved;
use super::{limits, machine};
use crate::core::in_place;
use crate::error::{Error, Result};
use crate::network::Networks;
use crate::volumes::{Content, Durability, Fill, Filled, Volumes};

impl Doing {
    pub(super) async fn make(&self) -> Result<Event> {
        let Needs { cell, copied_bytes } = self.needs().await?;
        let is_started = matches!(self.record.life.phase, Phase::Creating { start: true });
        // A VMM that is started at once must not have long to wait for its disk: it ends by itself when nobody comes.
        let is_quick = is_started && copied_bytes <= limits::QUICK_FILL_BYTES_MAX;
        let made = async {
            if !is_quick {
                self.make_directory().await?;
                // A daemon may have died here before the start was called off.
                self.undo_vmm().await?;
                let volumes = self.fill(Durability::Power, Vec::new()).await?;
                return Ok(Event::Made { volumes, vmm: None, restores: false });
            }
            // Only the machine needs both. It runs when both are recorded and the volumes are flushed, neither of which waits for the other.
            self.entry.take_errands();
            let disks = &self.record.disks;
            let (placed, filled): (Vec<_>, Vec<_>) = disks.iter().map(|_| oneshot::channel()).unzip();
            let starting = async {
                let filled = async {
                    let unfilled = |_| Error::new(Code::Draining, "the volumes were not filled");
                    future::try_join_all(filled).await.map(|_| Content::Filled).map_err(unfilled)
                };
                let vmm = self.vmm(cell, filled).await?;
                self.begin_introduction();
                self.restore_early().await.map(|restores| (vmm, restores))
            };
            let filling = async {
                let filled = self.fill(Durability::Pending, placed).await;
                filled.inspect(|volumes| self.begin_flush(volumes))
            };
            let (volumes, started) = tokio::join!(filling, starting);
            let (volumes, (vmm, restores)) = (volumes?, started?);
            Ok(Event::Made { volumes, vmm: Some(vmm), restores })
        };
        let outcome = made.await;
        if outcome.is_err() && !self.workshop.core.store.is_dead() {
            self.undo_vmm().await?;
        }
        // Stopped because nobody wants it: what event it is matters no more, and it is no trouble.
        if self.stop.load(Ordering::SeqCst) && !self.workshop.core.store.is_dead() {
            let detail = "the work was stopped".to_owned();
            return Ok(Event::MakeFailed(Trouble { code: Code::Draining, detail }));
        }
        self.final_or(outcome, Event::MakeFailed)
    }

    pub(super) async fn make_directory(&self) -> Result<()> {
        let directory = self.workshop.core.dirs.server(self.record.id);
        in_place(move || machine::make_directory(&directory)).await?;
        self.workshop.core.checkpoint("server.directory_made")
    }

    /// A volume that was filled before, and is there still: its machine may have run since.
    async fn kept(&self, id: VolumeId) -> Result<Option<Filled>> {
        match self.record.life.unflushed.iter().find(|filled| filled.id == id) {
            Some(filled) if self.workshop.volumes.flush(*filled).await? => Ok(Some(*filled)),
            _ => Ok(None),
        }
    }

    /// Fills the volumes; of each, `placed` is told when its file is whole. Repeatable.
    pub(super) async fn fill(
        &self,
        durability: Durability,
        placed: Vec<oneshot::Sender<()>>,
    ) -> Result<Vec<Filled>> {
        let (moved, mut placed) = (Moved::default(), placed.into_iter());
        let filling = async {
            let mut volumes = Vec::new();
            for disk in &self.record.disks {
                let stopped = || self.stop.load(Ordering::SeqCst);
                let note = |done: u64, total: u64| moved.note(done, total);
                match self.kept(disk.volume_id).await? {
                    Some(filled) => volumes.push(filled),
                    None => {
                        let how = Fill { durability, is_clone: self.record.is_clone() };
                        let fill = self.workshop.volumes.fill(disk.volume_id, how, &stopped, &note);
                        volumes.extend(fill.await?);
                    }
                }
                if let Some(placed) = placed.next() {
                    // Whoever waited may have failed.
                    let _ = placed.send(());
                }
                self.workshop.core.checkpoint("server.volume_filled")?;
            }
            Ok(volumes)
        };
        self.telling(("filling_volumes", 1, 59), &moved, filling).await
    }

    /// Waits for what was begun before the VMM was recorded. One that a daemon which died had begun is done again: the volumes that the
    /// server was made with are flushed, and its networks know the machine. Repeatable.
    pub(super) async fn end_errands(&self) -> Result<()> {
        let mut errands = self.entry.take_errands();
        if errands.is_empty() {
            flush(&self.workshop.volumes, &self.record.life.unflushed).await?;
            return introduce(&self.workshop.networks, &self.record.nics).await;
        }
        while let Some(ended) = errands.join_next().await {
            let ended = ended.map_err(|cause| Error::internal("what a machine waits for ended badly", cause));
            ended??;
        }
        Ok(())
    }

    /// Has the networks know the machine before it runs, while somebody waits for something else.
    pub(super) fn begin_introduction(&self) {
        let (networks, nics) = (self.workshop.networks.clone(), self.record.nics.clone());
        self.entry.begin_errand(async move { introduce(&networks, &nics).await });
    }

    fn begin_flush(&self, filled: &[Filled]) {
        let (volumes, filled) = (self.workshop.volumes.clone(), filled.to_vec());
        self.entry.begin_errand(async move { flush(&volumes, &filled).await });
    }

    /// Has the VMM of a server that goes on from a memory begin with that, while all of it is recorded. What it makes stays parked. The
    /// record says that the memory is used up, so it must not be written before the VMM was told: a daemon that dies in between would leave
    /// a server that has neither. Of a strict one the walls are looked at first, which its record has to name.
    async fn restore_early(&self) -> Result<bool> {
        let (Some(saved), Isolation::Standard) = (self.record.life.saved, self.record.isolation) else {
            return Ok(false);
        };
        let Some(Prepared { of, description }) = self.entry.take_prepared() else { return Ok(false) };
        let begun = async {
            let link = self.entry.link(limits::BOOT).await?;
            self.begin_restore(&link, description, saved).await
        };
        match begun.await {
            Ok(asked) => self.entry.keep_building(Building::new(of, asked)),
            Err(cause) => self.or_end(Err(cause)).await?,
        }
        self.workshop.core.checkpoint("server.restoring")?;
        Ok(true)
    }
}

/// Has volumes that are whole outlive a loss of power.
pub(super) async fn flush(volumes: &Volumes, filled: &[Filled]) -> Result<()> {
    for filled in filled {
        if !volumes.flush(*filled).await? {
            let detail = format!("the file of volume {}, or what it was made from, is gone", filled.id);
            return Err(Error::new(Code::Internal, detail));
        }
    }
    Ok(())
}

/// Has its networks know a machine. Repeatable.
pub(super) async fn introduce(networks: &Networks, nics: &[ServerNic]) -> Result<()> {
    for nic in nics {
        networks.introduce(nic).await?;
    }
    Ok(())
}
