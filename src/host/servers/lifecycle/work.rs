//! The work of each phase, as data: what leads out of it. Pure; `effects` does it.
use super::{Back, Life, Phase, Push, Return, Saved, Then};
use model::{OperationId, SnapshotId};

/// The one piece of work that leads out of a phase. Each can be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Make the directory and fill the volumes.
    Make,
    /// Start a VMM process.
    Spawn,
    /// Make the files of a machine that comes from another host, and start a VMM for it.
    Await,
    /// Send it the machine, parked if it was saved.
    Boot {
        /// What was saved of it.
        saved: Option<Saved>,
    },
    /// Park its vCPUs.
    Pause,
    /// Let them run.
    Resume,
    /// Park them and save the machine.
    Save,
    /// Take a snapshot.
    Snapshot {
        /// Which.
        id: SnapshotId,
    },
    /// Copy a snapshot beside what it has.
    CopyBack {
        /// Which.
        to: Return,
        /// For which operation.
        job: OperationId,
    },
    /// Put what was copied in the place of what it has.
    TakeBack {
        /// Of which.
        to: Return,
    },
    /// Have all memory of the machine be its own.
    Settle {
        /// For which operation.
        job: OperationId,
    },
    /// Start a VMM process beside the one that has the machine.
    SpawnNext,
    /// Have the one give the machine to the other, and find out which has it.
    HandOver,
    /// End the one that has it not.
    Retire,
    /// Ask how often the machine was reset.
    CountResets,
    /// Build the machine again, if it was reset so often and no more.
    Reset {
        /// How often.
        resets: u64,
    },
    /// Press the power button.
    Press,
    /// End the process.
    Kill,
    /// Give taps and sockets back, and what lies beside its disks unless it is kept.
    Release {
        /// Whether the memory that was saved is.
        keep_saved: bool,
        /// Whether what was copied of a snapshot is.
        keep_copied: bool,
        /// Whether it is not known yet that its volumes outlive a loss of power, and they are to.
        flush: bool,
    },
    /// Remove everything.
    Purge,
}

impl Life {
    /// The work that leads out of its phase.
    pub fn work(&self) -> Option<Work> {
        match &self.phase {
            Phase::Creating { .. } if self.awaits.is_some() => None,
            Phase::Creating { .. } => Some(Work::Make),
            Phase::Starting { vmm: None } => Some(Work::Spawn),
            Phase::Arriving { vmm: None, back: Back::Running | Back::Paused, .. } => Some(Work::Await),
            Phase::Starting { vmm: Some(_) } => Some(Work::Boot { saved: self.saved }),
            Phase::Pausing { .. } => Some(Work::Pause),
            Phase::Resuming { .. } => Some(Work::Resume),
            Phase::Hibernating { .. } => Some(Work::Save),
            Phase::Snapshotting { snapshot, .. } => Some(Work::Snapshot { id: *snapshot }),
            Phase::Restoring { to, .. } => self.job.map(|job| Work::CopyBack { to: *to, job: job.id }),
            Phase::Returning { to, .. } => Some(Work::TakeBack { to: *to }),
            Phase::Settling { .. } => self.job.map(|job| Work::Settle { job: job.id }),
            Phase::Upgrading { next: None, .. } => Some(Work::SpawnNext),
            Phase::Upgrading { next: Some(_), .. } => Some(Work::HandOver),
            Phase::Retiring { .. } => Some(Work::Retire),
            Phase::Resetting { resets: None, .. } => Some(Work::CountResets),
            Phase::Resetting { resets: Some(resets), .. } => Some(Work::Reset { resets: *resets }),
            Phase::Stopping { push: Push::Button { pressed: false, .. }, .. } => Some(Work::Press),
            Phase::Stopping { push: Push::Force, .. } => Some(Work::Kill),
            Phase::Releasing { then } => Some(Work::Release {
                keep_saved: self.saved.is_some(),
                keep_copied: matches!(then, Then::Return { .. }),
                flush: !self.unflushed.is_empty() && then.keeps_volumes(),
            }),
            Phase::Deleting { .. } => Some(Work::Purge),
            Phase::Stopping { push: Push::Button { pressed: true, .. }, .. }
            | Phase::Stopped { .. }
            | Phase::Moving { .. }
            | Phase::Arriving { .. }
            | Phase::Hibernated { .. }
            | Phase::Running { .. }
            | Phase::Paused { .. }
            | Phase::Waiting { .. }
            | Phase::Failed { .. } => None,
        }
    }
}
