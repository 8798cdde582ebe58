//! What a server does and what comes next, as data. Pure: no clock, no disk, no VMM; the actor and the facade
//! feed it and save what it answers before they touch the world.
//!
//! Each phase has one piece of work that leads out of it ([`Life::work`]), so a daemon that died
//! anywhere takes up again by doing the work of the phase it finds.
//!
//! ```text
//!  Stopped, Failed, Hibernated ──migrate──▶ Moving ──returned──▶ as before, or ──moved──▶ Deleting
//!  Arriving ──arrived──▶ as it was there, or ──dropped──▶ Deleting
//!  Running, Paused ──migrate──▶ Moving ──returned──▶ Resuming, Pausing, or ──moved──▶ Stopping, Deleting
//!  Arriving ──VMM started, machine arrived──▶ Resuming, Pausing, or ──dropped──▶ Stopping, Deleting
//!
//!  Creating ──made──▶ Stopped ◀───────────────────────────────┐
//!     │ (start)          │ start                              │ released: stop
//!     └─────made─────▶ Starting ──booted──▶ Running ──ended──▶ Releasing ──▶ Failed
//!                        ▲   │              │ ▲  │ ▲              │  ▲ │
//!                        │   │       Pausing▼ │  ▼ │Resetting     │  │ └──▶ Deleting ──purged──▶ (gone)
//!                        │   │        Paused──┘                  │  │
//!                        │   │       Resuming                    │  │
//!                        │   │     Snapshotting ──taken, failed──▶ as before; from Stopped, Failed and Paused too
//!                        │   │     Hibernating ──saved──▶ Stopping, Releasing ──▶ Hibernated ──start──▶ Starting,
//!                        │   │                                   │  │             memory restored ──▶ Resuming
//!                        │   │     Settling ──settled, failed──▶ as before; ──settled──▶ Upgrading
//!                        │   │     Upgrading ──handed over, failed──▶ Retiring ──▶ as before
//!                        │   │     Restoring ──copied──▶ (Stopping, Releasing) ──▶ Returning ──▶ Starting, Stopped
//!                        │   └─failed, stop──▶ Stopping ──ended──┼──┘
//!                        │                        ▲ stop, reboot, delete from any phase with a machine
//!                        └── Waiting ◀── released: failure, policy restarts it
//! ```
use model::server::{RestartPolicy, StateReason, Wanted};
use model::{Code, OperationId, SnapshotId};
use serde::{Deserialize, Serialize};
use wire::saved::Digest;

use super::limits;
use crate::vmms::ProcessId;
use crate::volumes::Filled;

pub mod ask;
mod back;
pub mod end;
mod found;
mod moving;
mod phase;
pub mod step;
pub mod work;

pub use ask::{Ask, Asked, Refused};
pub use end::{End, EndKind};
pub use found::Found;
pub use step::{Event, Spawned, step};
pub use work::Work;

/// All that decides what a server does next. Saved as one piece.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Where it is.
    pub phase: Phase,
    /// What it should do.
    pub wanted: Wanted,
    /// The operation it works for.
    pub job: Option<Job>,
    /// Number of the latest machine: events of earlier ones are stale.
    pub run: u64,
    /// When that machine booted, in milliseconds since the Unix epoch.
    pub booted_ms: Option<i64>,
    /// How often in a row the policy has started it again, or will next.
    pub failures: u32,
    /// A snapshot that is still being taken, from whose memory it is to go on: nothing is made before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awaits: Option<SnapshotId>,
    /// The memory of a hibernated server, until its vCPUs run again: from that moment on disks and memory differ, so
    /// it is forgotten before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<Saved>,
    /// Volumes that it is made with, from when their files are whole until it is known that they outlive a loss of power. Until then its
    /// machine does not run, so whatever of them is lost nobody has written to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unflushed: Vec<Filled>,
    /// The snapshot from whose files its machine has memory that is not settled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<SnapshotId>,
    /// Whether a disk of it may need the file that it was made from, so that there is something to settle.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overlaid: bool,
    /// That another host has the server too, until it is started here anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clash: Option<StateReason>,
}

/// A machine that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Digest by which the files are known to be the ones.
    pub root: Digest,
    /// Bytes of the disk that they take.
    pub stored_bytes: u64,
    /// What it was saved for.
    #[serde(default)]
    pub of: SavedOf,
}

/// What a machine was saved for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SavedOf {
    /// Its server hibernated: nobody else goes on from there, and it once. The files are in the server's directory.
    #[default]
    Hibernation,
    /// A snapshot of another server, whose memory whoever is cloned from it shares until it writes.
    Clone {
        /// Which.
        snapshot: SnapshotId,
    },
    /// A snapshot, from which machines go on again and again. The files are the snapshot's, which stays until then.
    Snapshot {
        /// Which.
        id: SnapshotId,
    },
}

/// An operation that the server's phases carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its identity.
    pub id: OperationId,
    /// What it is to reach.
    pub kind: JobKind,
}

/// What an operation on a server is to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// A new server, started if asked.
    Create,
    /// A running machine.
    Start,
    /// No machine.
    Stop,
    /// A machine that has started afresh.
    Reboot,
    /// Parked vCPUs.
    Pause,
    /// Running vCPUs.
    Resume,
    /// Memory on the disk and no machine.
    Hibernate,
    /// A copy of what it is.
    Snapshot,
    /// What a copy of it shows.
    Restore,
    /// To be another host's.
    Migrate,
    /// Memory of its own.
    SettleMemory,
    /// A new VMM for the machine.
    Upgrade,
    /// Nothing left.
    Delete,
}

impl JobKind {
    /// Kind of the operation, such as `server.create`.
    pub fn operation_kind(self) -> &'static str {
        match self {
            JobKind::Create => "server.create",
            JobKind::Start => "server.start",
            JobKind::Stop => "server.stop",
            JobKind::Reboot => "server.reboot",
            JobKind::Pause => "server.pause",
            JobKind::Resume => "server.resume",
            JobKind::Hibernate => "server.hibernate",
            JobKind::Snapshot => "server.snapshot",
            JobKind::Restore => "server.restore",
            JobKind::Migrate => "server.migrate",
            JobKind::SettleMemory => "server.settle_memory",
            JobKind::Upgrade => "server.upgrade",
            JobKind::Delete => "server.delete",
        }
    }
}

/// Where a server is. Data that exists only in one phase lives inside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its disk is being made; then it is started or not.
    Creating {
        /// Whether to start it.
        start: bool,
    },
    /// No machine.
    Stopped {
        /// Why, where that says more than the state.
        why: Option<StateReason>,
    },
    /// A VMM is being started (no process yet) or builds its machine.
    Starting {
        /// The process, once it is known. Only a known process lets a machine run, so one that is lost before
        /// it was recorded never writes to a disk.
        vmm: Option<ProcessId>,
    },
    /// vCPUs run.
    Running {
        /// The process.
        vmm: ProcessId,
    },
    /// vCPUs are being parked.
    Pausing {
        /// The process.
        vmm: ProcessId,
    },
    /// vCPUs are parked.
    Paused {
        /// The process.
        vmm: ProcessId,
    },
    /// vCPUs are being let go.
    Resuming {
        /// The process.
        vmm: ProcessId,
    },
    /// vCPUs are being parked and memory is being saved.
    Hibernating {
        /// The process.
        vmm: ProcessId,
        /// Whether vCPUs were parked before, and stay so if it comes to nothing.
        was_paused: bool,
    },
    /// Its disks, and its memory if asked for, are being copied. What it did goes on but for the moment that is copied.
    Snapshotting {
        /// The process, if it has a machine.
        vmm: Option<ProcessId>,
        /// The snapshot that is taken.
        snapshot: SnapshotId,
        /// Whether memory is copied too.
        memory: bool,
        /// What it goes back to.
        back: Back,
    },
    /// What it was in a snapshot is being copied beside what it is; what it does goes on.
    Restoring {
        /// The process, if it has a machine.
        vmm: Option<ProcessId>,
        /// Where it is to go back to.
        to: Return,
        /// What it does.
        back: Back,
    },
    /// No machine; what was copied takes the place of what it has.
    Returning {
        /// Where it goes back to.
        to: Return,
        /// Whether a machine follows.
        start: bool,
    },
    /// It goes to another host.
    Moving {
        /// The process, if its machine goes with it. Which VMM's the machine is, the move decides.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vmm: Option<ProcessId>,
        /// Whether that host may have it already.
        given: bool,
        /// Why nobody here can know which host has it, when that is so.
        doubt: Option<StateReason>,
        /// What it goes back to if the other host does not take it.
        back: Back,
    },
    /// It comes from another host, whose it still is.
    Arriving {
        /// The process in which its machine is to arrive, if one comes and the process is known. It runs nothing before the
        /// server is this host's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vmm: Option<ProcessId>,
        /// Why nobody here can know which host has it, when that is so.
        doubt: Option<StateReason>,
        /// What it is once it is here.
        back: Back,
    },
    /// What of its memory is a snapshot's becomes the machine's own, while it does what it did.
    Settling {
        /// The process.
        vmm: ProcessId,
        /// Whether vCPUs are parked.
        was_paused: bool,
        /// Whether it is to go to another VMM then.
        upgrade: bool,
    },
    /// Its machine, which does on what it does, is to go to another VMM of this host. Which of the two has it, they know.
    Upgrading {
        /// The process that has it, or had it.
        vmm: ProcessId,
        /// The one that is to have it, once it is known.
        next: Option<Spawned>,
        /// Whether vCPUs are parked, and stay so.
        #[serde(default)]
        was_paused: bool,
    },
    /// One VMM has the machine and another is there still.
    Retiring {
        /// The process that has it.
        vmm: ProcessId,
        /// The one that ends.
        other: ProcessId,
        /// Why the machine stayed where it was, when it did.
        failed: Option<Trouble>,
        /// Whether vCPUs are parked.
        #[serde(default)]
        was_paused: bool,
    },
    /// No machine; its memory is on the disk.
    Hibernated {
        /// Why, where that says more than the state.
        why: Option<StateReason>,
    },
    /// The reset button is being pressed.
    Resetting {
        /// The process.
        vmm: ProcessId,
        /// How often its machine had been reset before, once that is known: the button is pressed only while that
        /// is so, or a daemon that died behind the press would have another one press it again.
        #[serde(default)]
        resets: Option<u64>,
    },
    /// The machine is to end.
    Stopping {
        /// The process, if there is one.
        vmm: Option<ProcessId>,
        /// How hard.
        push: Push,
        /// What follows.
        then: Then,
    },
    /// The machine has ended; taps and sockets are being given back.
    Releasing {
        /// What follows.
        then: Then,
    },
    /// A failed server waits before it is started again.
    Waiting {
        /// Until then, in milliseconds since the Unix epoch.
        until_ms: i64,
        /// Why it failed.
        why: StateReason,
    },
    /// Everything it has is being removed.
    Deleting {
        /// Whether its volumes stay.
        keep_volumes: bool,
        /// How the job ends afterwards.
        verdict: Verdict,
    },
    /// Its machine ended badly and nothing restarts it.
    Failed {
        /// Why.
        why: StateReason,
    },
}

/// A snapshot that a server goes back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Return {
    /// Which.
    pub snapshot: SnapshotId,
    /// Whether its memory too, so that the machine of that moment goes on.
    pub memory: bool,
}

/// What a server goes back to when a snapshot of it has been taken, or has not, or when it has not moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Back {
    /// Running vCPUs.
    Running,
    /// Parked vCPUs.
    Paused,
    /// No machine.
    Stopped {
        /// Why, where that says more than the state.
        why: Option<StateReason>,
    },
    /// No machine, for a bad reason.
    Failed {
        /// Why.
        why: StateReason,
    },
    /// No machine; its memory is on the disk.
    Hibernated {
        /// Why, where that says more than the state.
        why: Option<StateReason>,
    },
    /// A machine that ended in the middle of a move: the policy decides.
    Ended(End),
}

/// How hard a machine is made to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Push {
    /// The power button; the guest has until then.
    Button {
        /// In milliseconds since the Unix epoch.
        deadline_ms: i64,
        /// Whether the button was pressed.
        pressed: bool,
    },
    /// The process is told to quit, then killed.
    Force,
}

/// What follows the end of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// The server stays off.
    Stop,
    /// The server is started again.
    Start,
    /// The server stays off and keeps its memory.
    Hibernate,
    /// The server goes back to a snapshot, and is then started or not.
    Return {
        /// Which.
        to: Return,
        /// Whether it is started.
        start: bool,
    },
    /// It ended unasked: the policy decides.
    Decide(End),
    /// It could not be started.
    Fail(Trouble),
    /// It is deleted.
    Delete {
        /// Whether its volumes stay.
        keep_volumes: bool,
        /// How the job ends.
        verdict: Verdict,
    },
}

impl Then {
    /// Whether the server or its volumes stay.
    pub(super) fn keeps_volumes(&self) -> bool {
        // What cannot be started before its volumes were flushed was only being made.
        !matches!(self, Then::Fail(_) | Then::Delete { keep_volumes: false, .. })
    }
}

/// Why something did not work, as it is saved and shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// For programs.
    pub code: Code,
    /// For people.
    pub detail: String,
}

/// How an operation ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Done.
    Succeeded,
    /// It failed and is undone.
    Failed(Trouble),
    /// Something else was asked for; the sentence says what.
    Cancelled(String),
}

/// What [`step`] answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The life from now on.
    pub life: Life,
    /// Operations that end with this step.
    pub ended: Vec<(OperationId, Verdict)>,
    /// Whether the server is no more: remove its record.
    pub gone: bool,
}

/// What a step may know besides the life.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    /// The present, in milliseconds since the Unix epoch.
    pub now_ms: i64,
    /// What to do after an unasked end.
    pub policy: RestartPolicy,
}

impl SavedOf {
    /// The snapshot that the files are of.
    pub fn snapshot(self) -> Option<SnapshotId> {
        match self {
            SavedOf::Hibernation => None,
            SavedOf::Snapshot { id } | SavedOf::Clone { snapshot: id } => Some(id),
        }
    }
}

impl Life {
    /// A server that is being created for `job`.
    pub fn new(job: OperationId, start: bool) -> Life {
        Life {
            phase: Phase::Creating { start },
            wanted: if start { Wanted::Running } else { Wanted::Stopped },
            job: Some(Job { id: job, kind: JobKind::Create }),
            run: 0,
            booted_ms: None,
            failures: 0,
            awaits: None,
            saved: None,
            unflushed: Vec::new(),
            shares: None,
            overlaid: false,
            clash: None,
        }
    }

    /// The snapshot that it waits for.
    pub fn awaited(&self) -> Option<SnapshotId> {
        self.awaits.filter(|_| matches!(self.phase, Phase::Creating { .. }))
    }

    /// What it waited for is there, and it goes on from that, unless somebody has wanted it without meanwhile.
    pub fn go_on_from(&mut self, saved: Saved) {
        self.awaits = None;
        self.saved = Some(saved).filter(|_| self.phase == Phase::Creating { start: true });
    }

    /// Whether memory is promised to it.
    pub fn holds_memory(&self) -> bool {
        match &self.phase {
            Phase::Creating { start } => *start,
            Phase::Stopped { .. }
            | Phase::Snapshotting { vmm: None, .. }
            | Phase::Restoring { vmm: None, .. }
            | Phase::Moving { vmm: None, .. }
            | Phase::Hibernated { .. }
            | Phase::Deleting { .. }
            | Phase::Failed { .. } => false,
            Phase::Returning { start, .. } => *start,
            // Before its VMM is there, too.
            Phase::Arriving { back, .. } => matches!(back, Back::Running | Back::Paused | Back::Ended(_)),
            _ => true,
        }
    }

    /// When [`Event::DeadlinePassed`] is due, in milliseconds since the Unix epoch.
    pub fn deadline_ms(&self) -> Option<i64> {
        self.phase.deadline_ms().or_else(|| self.sound_ms())
    }

    /// When the machine will have run so long that earlier failures no longer count; nothing when there are none.
    fn sound_ms(&self) -> Option<i64> {
        let running = matches!(self.phase, Phase::Running { .. });
        let booted_ms = self.booted_ms.filter(|_| running && self.failures > 0)?;
        Some(booted_ms.saturating_add(limits::STABLE_MS))
    }

    /// Whether it has no machine and none is about to be started, so that its disks can be changed. Those that belong
    /// to a memory cannot.
    pub fn is_off(&self) -> bool {
        matches!(self.phase, Phase::Stopped { .. } | Phase::Failed { .. }) && self.saved.is_none()
    }
}

#[cfg(test)]
mod tests;
