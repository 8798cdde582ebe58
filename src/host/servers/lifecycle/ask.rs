//! What callers may ask of a server in each phase, and what that changes. Pure.
//! What is so already is done at once; what is being done is joined; what makes no sense is refused.
use model::server::Wanted;
use model::{OperationId, SnapshotId};

use super::{Back, Context, Job, JobKind, Life, Phase, Push, Return, Step, Then, Verdict};

/// Something a caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Run.
    Start,
    /// Be off; the guest has so long to shut down by itself.
    Stop {
        /// In milliseconds; 0 forces at once.
        grace_ms: i64,
    },
    /// Start afresh; the guest has so long to shut down by itself.
    Reboot {
        /// In milliseconds; 0 presses the reset button.
        grace_ms: i64,
    },
    /// Park the vCPUs.
    Pause,
    /// Let them run.
    Resume,
    /// Have the memory on the disk and no machine.
    Hibernate,
    /// Have a copy made of what it is.
    Snapshot {
        /// The snapshot to take.
        id: SnapshotId,
        /// Whether memory is copied too, which takes a machine.
        memory: bool,
    },
    /// Be what a snapshot shows. A machine ends for it, and a memory that was saved is lost.
    Restore {
        /// Which.
        to: Return,
    },
    /// Be another host's.
    Migrate,
    /// Have memory of its own.
    SettleMemory,
    /// Run on in a new VMM.
    Upgrade,
    /// Be no more.
    Delete {
        /// Whether its volumes stay.
        keep_volumes: bool,
    },
}

/// What asking comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// The new operation has begun.
    Began(Step),
    /// It is so already: the new operation has succeeded.
    Done(Step),
    /// Another operation is bringing it about.
    Joined(OperationId, Step),
}

/// It makes no sense in this phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

/// Every ask by the name of its action, as in `allowed_actions`.
pub const ACTIONS: [(&str, Ask); 13] = [
    ("start", Ask::Start),
    ("stop", Ask::Stop { grace_ms: 1000 }),
    ("reboot", Ask::Reboot { grace_ms: 1000 }),
    ("pause", Ask::Pause),
    ("resume", Ask::Resume),
    ("hibernate", Ask::Hibernate),
    ("snapshot", Ask::Snapshot { id: SnapshotId(uuid::Uuid::nil()), memory: false }),
    // A snapshot is what it begins with.
    ("clone", Ask::Snapshot { id: SnapshotId(uuid::Uuid::nil()), memory: true }),
    ("restore", Ask::Restore { to: Return { snapshot: SnapshotId(uuid::Uuid::nil()), memory: false } }),
    ("migrate", Ask::Migrate),
    ("settle-memory", Ask::SettleMemory),
    ("upgrade-vmm", Ask::Upgrade),
    ("delete", Ask::Delete { keep_volumes: false }),
];

impl Ask {
    /// The kind of operation that carries it out.
    pub fn job_kind(self) -> JobKind {
        match self {
            Ask::Start => JobKind::Start,
            Ask::Stop { .. } => JobKind::Stop,
            Ask::Reboot { .. } => JobKind::Reboot,
            Ask::Pause => JobKind::Pause,
            Ask::Resume => JobKind::Resume,
            Ask::Hibernate => JobKind::Hibernate,
            Ask::Snapshot { .. } => JobKind::Snapshot,
            Ask::Restore { .. } => JobKind::Restore,
            Ask::Migrate => JobKind::Migrate,
            Ask::SettleMemory => JobKind::SettleMemory,
            Ask::Upgrade => JobKind::Upgrade,
            Ask::Delete { .. } => JobKind::Delete,
        }
    }
}

impl Life {
    /// Actions that would change something now.
    pub fn allowed_actions(&self, context: Context) -> Vec<&'static str> {
        let begins =
            |ask| matches!(self.ask(ask, OperationId(uuid::Uuid::nil()), context), Ok(Asked::Began(_)));
        let changes = |ask: Ask| match ask {
            // Its VMM is asked all the same when somebody wants it: a record may know less.
            Ask::SettleMemory if self.shares.is_none() && !self.overlaid => false,
            // Only one with no grace throws a memory away.
            Ask::Stop { .. } if self.saved.is_some() => begins(Ask::Stop { grace_ms: 0 }),
            _ => begins(ask),
        };
        ACTIONS.into_iter().filter(|(_, ask)| changes(*ask)).map(|(name, _)| name).collect()
    }

    /// Asks for something on behalf of the new operation `id`.
    pub fn ask(&self, ask: Ask, id: OperationId, context: Context) -> Result<Asked, Refused> {
        let asking = Asking { life: self.clone(), new: Job { id, kind: ask.job_kind() }, ended: Vec::new() };
        match ask {
            Ask::Start => asking.start(),
            Ask::Stop { grace_ms } => asking.stop(push(grace_ms, context)),
            Ask::Reboot { grace_ms } => asking.reboot(push(grace_ms, context)),
            Ask::Pause => asking.pause(),
            Ask::Resume => asking.resume(),
            Ask::Hibernate => asking.hibernate(),
            Ask::Snapshot { id, memory } => asking.snapshot(id, memory),
            Ask::Restore { to } => asking.restore(to),
            Ask::Migrate => asking.migrate(),
            Ask::SettleMemory => asking.settle_memory(),
            Ask::Upgrade => asking.upgrade(),
            Ask::Delete { keep_volumes } => asking.delete(keep_volumes),
        }
    }

    /// Asks to cancel operation `id`. Refused when that is not safe any more.
    pub fn cancel(&self, id: OperationId) -> Result<Step, Refused> {
        let mut life = self.clone();
        let job = life.job.filter(|job| job.id == id).ok_or(Refused)?;
        let undone = || Verdict::Cancelled("cancelled".to_owned());
        life.phase = match (job.kind, life.phase.clone()) {
            (JobKind::Create, Phase::Creating { .. }) => {
                Phase::Deleting { keep_volumes: false, verdict: undone() }
            }
            (JobKind::Create, Phase::Starting { vmm }) => Phase::Stopping {
                vmm,
                push: Push::Force,
                then: Then::Delete { keep_volumes: false, verdict: undone() },
            },
            (JobKind::Start, Phase::Starting { vmm }) => {
                let then = if life.saved.is_some() { Then::Hibernate } else { Then::Stop };
                Phase::Stopping { vmm, push: Push::Force, then }
            }
            (JobKind::Hibernate, Phase::Hibernating { vmm, was_paused }) => {
                life.job = None;
                life.give_up_hibernating(vmm, was_paused);
                return Ok(Step { life, ended: vec![(id, undone())], gone: false });
            }
            (JobKind::Snapshot, Phase::Snapshotting { vmm, back, .. }) => {
                life.job = None;
                life.give_up_snapshotting(vmm, back);
                return Ok(Step { life, ended: vec![(id, undone())], gone: false });
            }
            (JobKind::Restore, Phase::Restoring { vmm, back, .. }) => {
                life.job = None;
                life.give_up_restoring(vmm, back);
                return Ok(Step { life, ended: vec![(id, undone())], gone: false });
            }
            (JobKind::SettleMemory | JobKind::Upgrade, Phase::Settling { vmm, was_paused, .. }) => {
                life.job = None;
                life.give_up_settling(vmm, was_paused);
                return Ok(Step { life, ended: vec![(id, undone())], gone: false });
            }
            (JobKind::Migrate, Phase::Moving { given: false, .. }) => {
                return life.kept(undone()).ok_or(Refused);
            }
            _ => return Err(Refused),
        };
        life.wanted = match job.kind {
            JobKind::Create => Wanted::Deleted,
            _ => life.wanted_at_rest(),
        };
        Ok(Step { life, ended: Vec::new(), gone: false })
    }
}

fn push(grace_ms: i64, context: Context) -> Push {
    match grace_ms {
        ..=0 => Push::Force,
        _ => Push::Button { deadline_ms: context.now_ms.saturating_add(grace_ms), pressed: false },
    }
}

/// The harder of two pushes.
fn harder(one: Push, other: Push) -> Push {
    match (one, other) {
        (
            Push::Button { deadline_ms, pressed },
            Push::Button { deadline_ms: deadline_too_ms, pressed: pressed_too },
        ) => Push::Button { deadline_ms: deadline_ms.min(deadline_too_ms), pressed: pressed || pressed_too },
        _ => Push::Force,
    }
}

struct Asking {
    life: Life,
    new: Job,
    ended: Vec<(OperationId, Verdict)>,
}

impl Asking {
    fn start(mut self) -> Result<Asked, Refused> {
        match &mut self.life.phase {
            Phase::Creating { start } => {
                *start = true;
                self.life.wanted = Wanted::Running;
                self.join()
            }
            Phase::Stopped { .. }
            | Phase::Hibernated { .. }
            | Phase::Failed { .. }
            | Phase::Waiting { .. } => {
                self.life.failures = 0;
                self.life.begin_run();
                self.begin(Wanted::Running)
            }
            Phase::Starting { .. } if self.life.job.is_some() => self.join(),
            Phase::Starting { .. } => self.begin(Wanted::Running),
            Phase::Running { .. }
            | Phase::Settling { was_paused: false, .. }
            | Phase::Upgrading { was_paused: false, .. }
            | Phase::Retiring { was_paused: false, .. }
            | Phase::Snapshotting { back: Back::Running, .. }
            | Phase::Restoring { back: Back::Running, .. } => self.done(),
            _ => Err(Refused),
        }
    }

    fn stop(mut self, push: Push) -> Result<Asked, Refused> {
        let phase = self.life.phase.clone();
        if phase.is_moving() {
            // A memory that is on its way is not here to be given up.
            return Err(Refused);
        }
        // A clone that is not made yet is made without its memory.
        if self.life.saved.take().is_some() && !matches!(phase, Phase::Creating { .. }) {
            return self.discard(phase, push);
        }
        match phase {
            Phase::Creating { .. } => {
                self.life.phase = Phase::Creating { start: false };
                self.life.wanted = Wanted::Stopped;
                self.join()
            }
            Phase::Stopped { .. } | Phase::Snapshotting { back: Back::Stopped { .. }, .. } => self.done(),
            Phase::Snapshotting { vmm: None, snapshot, memory, .. } => {
                let back = Back::Stopped { why: None };
                self.life.phase = Phase::Snapshotting { vmm: None, snapshot, memory, back };
                self.life.wanted = Wanted::Stopped;
                self.done()
            }
            Phase::Failed { .. } | Phase::Waiting { .. } => {
                self.life.phase = Phase::Stopped { why: None };
                self.life.wanted = Wanted::Stopped;
                self.interrupt();
                self.done()
            }
            Phase::Starting { vmm } => {
                // The guest is not up yet, so there is nobody to press a button for.
                self.life.phase = Phase::Stopping { vmm, push: Push::Force, then: Then::Stop };
                self.interrupt();
                self.begin(Wanted::Stopped)
            }
            Phase::Running { vmm }
            | Phase::Pausing { vmm }
            | Phase::Paused { vmm }
            | Phase::Resuming { vmm }
            | Phase::Hibernating { vmm, .. }
            | Phase::Snapshotting { vmm: Some(vmm), .. }
            | Phase::Restoring { vmm: Some(vmm), .. }
            | Phase::Settling { vmm, .. }
            | Phase::Resetting { vmm, .. } => {
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push, then: Then::Stop };
                self.interrupt();
                self.begin(Wanted::Stopped)
            }
            Phase::Stopping { vmm, push: held, then } => {
                self.life.phase = Phase::Stopping { vmm, push: harder(held, push), then: Then::Stop };
                self.stop_instead(then)
            }
            Phase::Releasing { then } => {
                self.life.phase = Phase::Releasing { then: Then::Stop };
                self.stop_instead(then)
            }
            // It was off, and stays so.
            Phase::Restoring { vmm: None, .. } => {
                self.life.phase = Phase::Stopped { why: None };
                self.life.wanted = Wanted::Stopped;
                self.interrupt();
                self.done()
            }
            // Files take their places, which is over in a moment; what moves was refused before.
            Phase::Returning { .. } | Phase::Moving { .. } | Phase::Arriving { .. } => Err(Refused),
            // Without a memory that was saved there is no such phase.
            Phase::Hibernated { .. } | Phase::Deleting { .. } => Err(Refused),
            // Two processes, one of which has the machine: it is over in a moment.
            Phase::Upgrading { .. } | Phase::Retiring { .. } => Err(Refused),
        }
    }

    /// No guest can shut down by itself here: only force ends what there is, and that is the memory.
    fn discard(mut self, phase: Phase, push: Push) -> Result<Asked, Refused> {
        if push != Push::Force {
            return Err(Refused);
        }
        let then = Then::Stop;
        self.life.phase = match phase {
            Phase::Starting { vmm } | Phase::Stopping { vmm, .. } => Phase::Stopping { vmm, push, then },
            _ => Phase::Releasing { then },
        };
        self.interrupt();
        self.begin(Wanted::Stopped)
    }

    /// The machine ends anyway; what was to follow it becomes a stop.
    fn stop_instead(mut self, then: Then) -> Result<Asked, Refused> {
        match then {
            Then::Stop if self.life.job.is_some_and(|job| job.kind == JobKind::Stop) => self.join(),
            Then::Stop | Then::Start | Then::Hibernate | Then::Return { .. } | Then::Decide(_) => {
                self.interrupt();
                self.begin(Wanted::Stopped)
            }
            Then::Fail(_) if self.life.job.is_some_and(|job| job.kind == JobKind::Create) => Err(Refused),
            Then::Fail(trouble) => {
                if let Some(job) = self.life.job.take() {
                    self.ended.push((job.id, Verdict::Failed(trouble)));
                }
                self.begin(Wanted::Stopped)
            }
            Then::Delete { .. } => Err(Refused),
        }
    }

    fn reboot(mut self, push: Push) -> Result<Asked, Refused> {
        let phase = self.life.phase.clone();
        match phase {
            Phase::Running { vmm } if push == Push::Force => {
                self.life.phase = Phase::Resetting { vmm, resets: None };
                self.begin(Wanted::Running)
            }
            Phase::Running { vmm } | Phase::Paused { vmm } => {
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push, then: Then::Start };
                self.begin(Wanted::Running)
            }
            // A guest that hangs is not to wait for minutes. The machine gives up the old memory with all that is done to it.
            Phase::Settling { vmm, was_paused: false, .. } if push == Push::Force => {
                self.life.phase = Phase::Resetting { vmm, resets: None };
                self.begin(Wanted::Running)
            }
            Phase::Settling { vmm, .. } => {
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push, then: Then::Start };
                self.begin(Wanted::Running)
            }
            Phase::Resetting { .. } if self.life.job.is_some() => self.join(),
            Phase::Stopping { vmm, push: held, then: Then::Start } if self.life.job.is_some() => {
                self.life.phase = Phase::Stopping { vmm, push: harder(held, push), then: Then::Start };
                self.join()
            }
            _ => Err(Refused),
        }
    }

    fn pause(mut self) -> Result<Asked, Refused> {
        match self.life.phase.clone() {
            Phase::Running { vmm } => {
                self.life.phase = Phase::Pausing { vmm };
                self.begin(Wanted::Paused)
            }
            Phase::Pausing { .. } if self.life.job.is_some() => self.join(),
            Phase::Pausing { .. } => self.begin(Wanted::Paused),
            Phase::Paused { .. }
            | Phase::Settling { was_paused: true, .. }
            | Phase::Upgrading { was_paused: true, .. }
            | Phase::Retiring { was_paused: true, .. }
            | Phase::Snapshotting { back: Back::Paused, .. } => self.done(),
            _ => Err(Refused),
        }
    }

    fn resume(mut self) -> Result<Asked, Refused> {
        match self.life.phase.clone() {
            Phase::Paused { vmm } => {
                self.life.phase = Phase::Resuming { vmm };
                self.begin(Wanted::Running)
            }
            Phase::Resuming { .. } if self.life.job.is_some() => self.join(),
            Phase::Resuming { .. } => self.begin(Wanted::Running),
            Phase::Running { .. }
            | Phase::Settling { was_paused: false, .. }
            | Phase::Snapshotting { back: Back::Running, .. } => self.done(),
            _ => Err(Refused),
        }
    }

    fn hibernate(mut self) -> Result<Asked, Refused> {
        match self.life.phase.clone() {
            Phase::Running { vmm } => {
                self.life.phase = Phase::Hibernating { vmm, was_paused: false };
                self.begin(Wanted::Hibernated)
            }
            Phase::Paused { vmm } => {
                self.life.phase = Phase::Hibernating { vmm, was_paused: true };
                self.begin(Wanted::Hibernated)
            }
            Phase::Hibernating { .. }
            | Phase::Stopping { then: Then::Hibernate, .. }
            | Phase::Releasing { then: Then::Hibernate }
                if self.life.job.is_some_and(|job| job.kind == JobKind::Hibernate) =>
            {
                self.join()
            }
            Phase::Hibernated { .. } => self.done(),
            _ => Err(Refused),
        }
    }

    fn snapshot(mut self, snapshot: SnapshotId, memory: bool) -> Result<Asked, Refused> {
        let wanted = self.life.wanted;
        let (vmm, back) = match self.life.phase.clone() {
            Phase::Running { vmm } => (Some(vmm), Back::Running),
            Phase::Paused { vmm } => (Some(vmm), Back::Paused),
            Phase::Stopped { why } if self.life.saved.is_none() => (None, Back::Stopped { why }),
            Phase::Failed { why } if self.life.saved.is_none() => (None, Back::Failed { why }),
            _ => return Err(Refused),
        };
        if memory && vmm.is_none() {
            return Err(Refused);
        }
        self.life.phase = Phase::Snapshotting { vmm, snapshot, memory, back };
        self.begin(wanted)
    }

    fn restore(mut self, to: Return) -> Result<Asked, Refused> {
        let wanted = self.life.wanted;
        let (vmm, back) = match self.life.phase.clone() {
            Phase::Running { vmm } => (Some(vmm), Back::Running),
            Phase::Paused { vmm } => (Some(vmm), Back::Paused),
            Phase::Stopped { why } => (None, Back::Stopped { why }),
            Phase::Failed { why } => (None, Back::Failed { why }),
            Phase::Hibernated { why } => (None, Back::Hibernated { why }),
            _ => return Err(Refused),
        };
        self.life.phase = Phase::Restoring { vmm, to, back };
        self.begin(wanted)
    }

    fn migrate(mut self) -> Result<Asked, Refused> {
        let wanted = self.life.wanted;
        let (vmm, back) = match self.life.phase.clone() {
            Phase::Running { vmm } => (Some(vmm), Back::Running),
            Phase::Paused { vmm } => (Some(vmm), Back::Paused),
            Phase::Hibernated { why } if self.life.has_own_memory() => (None, Back::Hibernated { why }),
            _ if self.life.saved.is_some() => return Err(Refused),
            Phase::Stopped { why } => (None, Back::Stopped { why }),
            Phase::Failed { why } => (None, Back::Failed { why }),
            _ => return Err(Refused),
        };
        self.life.phase = Phase::Moving { vmm, given: false, doubt: None, back };
        self.begin(wanted)
    }

    fn settle_memory(mut self) -> Result<Asked, Refused> {
        let wanted = self.life.wanted;
        let (vmm, was_paused) = match self.life.phase.clone() {
            Phase::Running { vmm } => (vmm, false),
            Phase::Paused { vmm } => (vmm, true),
            Phase::Settling { upgrade: false, .. } => return self.join(),
            _ => return Err(Refused),
        };
        self.life.phase = Phase::Settling { vmm, was_paused, upgrade: false };
        self.begin(wanted)
    }

    fn upgrade(mut self) -> Result<Asked, Refused> {
        let wanted = self.life.wanted;
        let (vmm, was_paused) = match self.life.phase.clone() {
            Phase::Running { vmm } => (vmm, false),
            Phase::Paused { vmm } => (vmm, true),
            Phase::Settling { vmm, was_paused, upgrade: false } => (vmm, was_paused),
            Phase::Settling { .. } | Phase::Upgrading { .. } | Phase::Retiring { .. } => return self.join(),
            _ => return Err(Refused),
        };
        // Memory that is somebody else's, too, cannot be handed over.
        self.life.phase = Phase::Settling { vmm, was_paused, upgrade: true };
        self.begin(wanted)
    }

    fn delete(mut self, keep_volumes: bool) -> Result<Asked, Refused> {
        let verdict = Verdict::Succeeded;
        let then = Then::Delete { keep_volumes, verdict: verdict.clone() };
        let deleting = self.life.job.is_some_and(|job| job.kind == JobKind::Delete);
        let phase = self.life.phase.clone();
        self.life.phase = match phase {
            _ if deleting => return self.join(),
            // What is removed here may be all there is of it, or may be half of what goes on elsewhere.
            Phase::Moving { .. } | Phase::Arriving { .. } => return Err(Refused),
            // Which process has the machine is known in a moment.
            Phase::Upgrading { .. } | Phase::Retiring { .. } => return Err(Refused),
            // Its machine may have run on what is kept.
            Phase::Creating { .. } if keep_volumes && !self.life.unflushed.is_empty() => {
                Phase::Stopping { vmm: None, push: Push::Force, then }
            }
            // A volume that is not filled is no volume to keep.
            Phase::Creating { .. } => Phase::Deleting { keep_volumes: false, verdict },
            Phase::Stopped { .. }
            | Phase::Hibernated { .. }
            | Phase::Snapshotting { vmm: None, .. }
            | Phase::Restoring { vmm: None, .. }
            | Phase::Returning { .. }
            | Phase::Failed { .. }
            | Phase::Waiting { .. } => Phase::Deleting { keep_volumes, verdict },
            // A create is being undone: its own verdict stands, and this operation sees the server go.
            Phase::Deleting { keep_volumes, verdict: held } => {
                self.end_job(held);
                Phase::Deleting { keep_volumes, verdict }
            }
            Phase::Releasing { then: held } => {
                self.end_held(held);
                Phase::Releasing { then }
            }
            Phase::Stopping { vmm, then: held, .. } => {
                self.end_held(held);
                Phase::Stopping { vmm, push: Push::Force, then }
            }
            Phase::Starting { vmm } => Phase::Stopping { vmm, push: Push::Force, then },
            Phase::Running { vmm }
            | Phase::Pausing { vmm }
            | Phase::Paused { vmm }
            | Phase::Resuming { vmm }
            | Phase::Hibernating { vmm, .. }
            | Phase::Snapshotting { vmm: Some(vmm), .. }
            | Phase::Restoring { vmm: Some(vmm), .. }
            | Phase::Settling { vmm, .. }
            | Phase::Resetting { vmm, .. } => Phase::Stopping { vmm: Some(vmm), push: Push::Force, then },
        };
        self.life.saved = None;
        self.interrupt();
        self.begin(Wanted::Deleted)
    }

    fn end_held(&mut self, then: Then) {
        match then {
            Then::Fail(trouble) => self.end_job(Verdict::Failed(trouble)),
            Then::Delete { verdict, .. } => self.end_job(verdict),
            Then::Stop | Then::Start | Then::Hibernate | Then::Return { .. } | Then::Decide(_) => {}
        }
    }

    fn end_job(&mut self, verdict: Verdict) {
        if let Some(job) = self.life.job.take() {
            self.ended.push((job.id, verdict));
        }
    }

    /// Ends the operation in progress because another takes its place.
    fn interrupt(&mut self) {
        let by = self.new.kind.operation_kind();
        let verdict = match self.life.job {
            // The server it was to create is there; that it is not started is what the caller asked for.
            Some(Job { kind: JobKind::Create, .. }) if self.new.kind == JobKind::Stop => Verdict::Succeeded,
            _ => Verdict::Cancelled(format!("superseded by {by}")),
        };
        self.end_job(verdict);
    }

    fn begin(mut self, wanted: Wanted) -> Result<Asked, Refused> {
        self.interrupt();
        self.life.wanted = wanted;
        self.life.job = Some(self.new);
        Ok(Asked::Began(self.step()))
    }

    fn done(mut self) -> Result<Asked, Refused> {
        self.ended.push((self.new.id, Verdict::Succeeded));
        Ok(Asked::Done(self.step()))
    }

    fn join(self) -> Result<Asked, Refused> {
        Ok(Asked::Joined(self.life.job.ok_or(Refused)?.id, self.step()))
    }

    fn step(self) -> Step {
        Step { life: self.life, ended: self.ended, gone: false }
    }
}
