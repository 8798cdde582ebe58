//! What follows when work is done, a machine ends or time passes; what a starting daemon finds is in `found`. Pure.
//! An event that does not belong to the phase is stale and changes nothing.
use model::Code;
use model::limits::GRACE_S_MAX;
use model::server::{RestartPolicy, StateReason, Wanted};
use model::volume::FillMethod;
use model::{OperationId, SnapshotId, Time};
use serde::{Deserialize, Serialize};
use wire::control::Sandbox;

use super::end::{End, EndKind};
use super::found::Found;
use super::{Back, Context, JobKind, Life, Phase, Push, Return, Saved, Step, Then, Trouble, Verdict};
use crate::servers::limits;
use crate::snapshots::Taken;
use crate::vmms::ProcessId;
use crate::volumes::Filled;

/// The longest grace that can be asked for, in milliseconds.
const GRACE_MS_MAX: i64 = GRACE_S_MAX as i64 * 1000;

/// A VMM process that was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawned {
    /// Which.
    pub vmm: ProcessId,
    /// What it closed behind itself, in its own words, when it answered. There is no guest yet.
    pub sandbox: Option<Sandbox>,
    /// Name of its control groups where that is not the server's id.
    pub cage: Option<String>,
    /// Which build of the VMM it is.
    pub build: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Directory and volumes are there.
    Made {
        /// Volumes that were filled, and flushed unless a VMM was started meanwhile.
        volumes: Vec<Filled>,
        /// The VMM of the first machine, where one was started meanwhile.
        vmm: Option<Spawned>,
        /// Whether that has been told to build the machine as it was saved, which stays parked.
        restores: bool,
    },
    /// They could not be made.
    MakeFailed(Trouble),
    /// A VMM process was started.
    Spawned(Spawned),
    /// Its vCPUs run, and its volumes outlived a loss of power before.
    Booted,
    /// No process, or no machine in it.
    StartFailed(Trouble),
    /// vCPUs are parked.
    Paused,
    /// They run on.
    PauseFailed(Trouble),
    /// vCPUs run, and its volumes outlived a loss of power before.
    Resumed,
    /// They are parked still.
    ResumeFailed(Trouble),
    /// There is no machine in the VMM that could run here.
    NotHere(End),
    /// The machine is as it was saved, and parked.
    Restored,
    /// The machine is saved, and parked for good.
    Saved(Saved),
    /// It could not be saved.
    SaveFailed(Trouble),
    /// The snapshot is complete, and the machine does what it did before.
    SnapshotTaken(SnapshotId, Taken),
    /// There is nothing of the snapshot; the machine may be parked.
    SnapshotFailed(SnapshotId, Trouble),
    /// A snapshot lies beside what the server has, for this operation.
    CopiedBack(OperationId),
    /// Nothing of it does.
    CopyBackFailed(OperationId, Trouble),
    /// The snapshot is in the place of what the server had, with its memory where it has one.
    TakenBack(SnapshotId, Option<Saved>),
    /// The machine was reset so often before.
    ResetsCounted(u64),
    /// The machine was built again.
    WasReset,
    /// It was not.
    ResetFailed(Trouble),
    /// All memory of the machine is its own and all of its disks are, for this operation, or its VMM does not know whose they are.
    Settled(OperationId),
    /// Some of it is not.
    SettleFailed(OperationId, Trouble),
    /// The VMM that is to have the machine has it.
    HandedOver,
    /// It has it not and never will; the machine runs on where it was.
    HandOverFailed(Trouble),
    /// The other VMM has ended.
    Retired,
    /// The power button was pressed.
    Pressed,
    /// It cannot be pressed.
    PressFailed,
    /// The machine has ended.
    Ended(End),
    /// Taps and sockets were given back.
    Released {
        /// Whether its volumes outlive a loss of power.
        flushed: bool,
        /// Whether a memory that was saved, or what was copied of a snapshot, is there still.
        kept: bool,
    },
    /// Nothing is left.
    Purged,
    /// [`Life::deadline_ms`] has come.
    DeadlinePassed,
    /// A daemon has started and looked for the machine of a phase that should have one.
    Found(Found),
}

/// The next life after `event`.
pub fn step(life: &Life, event: Event, context: Context) -> Step {
    let mut stepping = Stepping { life: life.clone(), ended: Vec::new(), gone: false, context };
    stepping.take(event);
    Step { life: stepping.life, ended: stepping.ended, gone: stepping.gone }
}

impl Phase {
    /// Without a machine, as before.
    pub(super) fn at_rest(back: Back) -> Phase {
        match back {
            Back::Stopped { why } => Phase::Stopped { why },
            Back::Failed { why } => Phase::Failed { why },
            Back::Hibernated { why } => Phase::Hibernated { why },
            // Those have a machine.
            Back::Running | Back::Paused => Phase::Stopped { why: None },
            Back::Ended(end) => Phase::Releasing { then: Then::Decide(end) },
        }
    }
}

impl Life {
    /// Goes to the start of a new machine.
    pub(super) fn begin_run(&mut self) {
        self.run += 1;
        self.booted_ms = None;
        self.clash = None;
        self.shares = None;
        self.phase = Phase::Starting { vmm: None };
    }
}

pub(super) struct Stepping {
    pub(super) life: Life,
    ended: Vec<(OperationId, Verdict)>,
    gone: bool,
    context: Context,
}

impl Stepping {
    fn take(&mut self, event: Event) {
        let phase = self.life.phase.clone();
        if let (Phase::Creating { .. }, Event::Made { volumes, .. }) = (&phase, &event) {
            self.life.overlaid = volumes.iter().any(|filled| filled.method == FillMethod::Overlay);
        }
        match (phase, event) {
            (Phase::Creating { start: true }, Event::Made { volumes, vmm: spawned, restores }) => {
                self.life.begin_run();
                self.life.unflushed = if spawned.is_some() { volumes } else { Vec::new() };
                match spawned.map(|spawned| spawned.vmm) {
                    // It was stopped meanwhile, and started again without the memory that its machine was built of.
                    Some(vmm) if restores && self.life.saved.is_none() => {
                        let (vmm, push, then) = (Some(vmm), Push::Force, Then::Start);
                        self.life.phase = Phase::Stopping { vmm, push, then };
                    }
                    Some(vmm) if restores => self.restored(vmm),
                    vmm => self.life.phase = Phase::Starting { vmm },
                }
            }
            // It was stopped before it had begun.
            (Phase::Creating { start: false }, Event::Made { volumes, vmm: Some(spawned), .. }) => {
                self.life.unflushed = volumes;
                let (vmm, push, then) = (Some(spawned.vmm), Push::Force, Then::Stop);
                self.life.phase = Phase::Stopping { vmm, push, then };
            }
            (Phase::Creating { start: false }, Event::Made { vmm: None, .. }) => {
                self.life.unflushed.clear();
                self.life.phase = Phase::Stopped { why: None };
                self.end_job(Verdict::Succeeded);
            }
            (Phase::Creating { .. }, Event::MakeFailed(trouble)) => {
                self.delete(false, Verdict::Failed(trouble));
            }
            (Phase::Starting { .. }, Event::Spawned(Spawned { vmm, .. })) => {
                self.life.phase = Phase::Starting { vmm: Some(vmm) };
            }
            (Phase::Stopping { push, then, .. }, Event::Spawned(Spawned { vmm, .. })) => {
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push, then };
            }
            (Phase::Arriving { vmm: None, doubt, back }, Event::Spawned(Spawned { vmm, .. })) => {
                self.life.phase = Phase::Arriving { vmm: Some(vmm), doubt, back };
            }
            // Whoever waits for the machine sees it, and the move comes to nothing.
            (Phase::Arriving { vmm: None, doubt, .. }, Event::StartFailed(trouble)) => {
                let why = StateReason {
                    code: trouble.code.as_str(),
                    detail: trouble.detail,
                    at: Time::from_unix_ms(self.context.now_ms),
                };
                self.life.phase = Phase::Arriving { vmm: None, doubt, back: Back::Failed { why } };
            }
            (Phase::Starting { vmm: Some(vmm) }, Event::Booted) => self.booted(vmm),
            (Phase::Starting { vmm: Some(vmm) }, Event::Restored) => self.restored(vmm),
            (Phase::Hibernating { vmm, .. }, Event::Saved(saved)) => {
                self.life.saved = Some(saved);
                let then = Then::Hibernate;
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push: Push::Force, then };
            }
            (Phase::Hibernating { vmm, was_paused }, Event::SaveFailed(trouble)) => {
                self.end_job(Verdict::Failed(trouble));
                self.life.give_up_hibernating(vmm, was_paused);
            }
            (Phase::Snapshotting { vmm, snapshot, back, .. }, Event::SnapshotTaken(id, _))
                if id == snapshot =>
            {
                self.life.phase = match (vmm, back) {
                    (Some(vmm), Back::Running) => Phase::Running { vmm },
                    (Some(vmm), _) => Phase::Paused { vmm },
                    (None, back) => Phase::at_rest(back),
                };
                self.end_job(Verdict::Succeeded);
            }
            (Phase::Snapshotting { vmm, snapshot, back, .. }, Event::SnapshotFailed(id, trouble))
                if id == snapshot =>
            {
                self.end_job(Verdict::Failed(trouble));
                self.life.give_up_snapshotting(vmm, back);
            }
            (Phase::Restoring { vmm, to, back }, Event::CopiedBack(id)) if self.is_for(id) => {
                self.copied_back(vmm, to, &back);
            }
            (Phase::Restoring { vmm, back, .. }, Event::CopyBackFailed(id, trouble)) if self.is_for(id) => {
                self.end_job(Verdict::Failed(trouble));
                self.life.give_up_restoring(vmm, back);
            }
            (Phase::Returning { to, start }, Event::TakenBack(id, saved)) if id == to.snapshot => {
                self.life.saved = saved;
                // What has taken the places of its disks is whole.
                self.life.overlaid = false;
                self.life.failures = 0;
                if start {
                    self.life.begin_run();
                } else {
                    self.life.phase = Phase::Stopped { why: None };
                    self.end_job(Verdict::Succeeded);
                }
            }
            (Phase::Starting { vmm }, Event::StartFailed(trouble)) => {
                let then = Then::Fail(trouble);
                self.life.phase = Phase::Stopping { vmm, push: Push::Force, then };
            }
            (Phase::Pausing { vmm }, Event::Paused) => {
                self.life.phase = Phase::Paused { vmm };
                self.end_job(Verdict::Succeeded);
            }
            (Phase::Pausing { vmm }, Event::PauseFailed(trouble)) => {
                self.life.phase = Phase::Running { vmm };
                self.life.wanted = Wanted::Running;
                self.end_job(Verdict::Failed(trouble));
            }
            (Phase::Resetting { vmm, resets: None }, Event::ResetsCounted(resets)) => {
                self.life.phase = Phase::Resetting { vmm, resets: Some(resets) };
            }
            (Phase::Resuming { vmm }, Event::Resumed) => {
                self.life.unflushed.clear();
                self.life.phase = Phase::Running { vmm };
                self.end_job(Verdict::Succeeded);
            }
            (Phase::Resetting { vmm, .. }, Event::WasReset) => {
                // With the old machine went its memory.
                self.life.shares = None;
                self.life.phase = Phase::Running { vmm };
                self.end_job(Verdict::Succeeded);
            }
            // What was to be made goes on from somebody's memory, and has not begun to.
            (Phase::Resuming { vmm }, Event::ResumeFailed(trouble) | Event::StartFailed(trouble))
                if self.is_being_created() =>
            {
                let then = Then::Fail(trouble);
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push: Push::Force, then };
            }
            (Phase::Resuming { vmm }, Event::ResumeFailed(trouble)) => {
                self.life.phase = Phase::Paused { vmm };
                self.life.wanted = Wanted::Paused;
                self.end_job(Verdict::Failed(trouble));
            }
            (Phase::Resuming { vmm } | Phase::Pausing { vmm }, Event::NotHere(end)) => {
                let then = Then::Decide(end);
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push: Push::Force, then };
            }
            (Phase::Resetting { vmm, .. }, Event::ResetFailed(trouble)) => {
                self.life.phase = Phase::Running { vmm };
                self.end_job(Verdict::Failed(trouble));
            }
            (Phase::Settling { vmm, upgrade: true, was_paused }, Event::Settled(id)) if self.is_for(id) => {
                self.life.phase = Phase::Upgrading { vmm, next: None, was_paused };
            }
            (Phase::Settling { vmm, was_paused, .. }, Event::Settled(id)) if self.is_for(id) => {
                self.life.give_up_settling(vmm, was_paused);
                self.end_job(Verdict::Succeeded);
            }
            (Phase::Settling { vmm, was_paused, .. }, Event::SettleFailed(id, trouble))
                if self.is_for(id) =>
            {
                self.life.give_up_settling(vmm, was_paused);
                self.end_job(Verdict::Failed(trouble));
            }
            (Phase::Upgrading { vmm, next: None, was_paused }, Event::Spawned(next)) => {
                self.life.phase = Phase::Upgrading { vmm, next: Some(next), was_paused };
            }
            (Phase::Upgrading { vmm: other, next: Some(next), was_paused }, Event::HandedOver) => {
                self.life.phase = Phase::Retiring { vmm: next.vmm, other, failed: None, was_paused };
            }
            (Phase::Upgrading { vmm, next: Some(next), was_paused }, Event::HandOverFailed(trouble)) => {
                let failed = Some(trouble);
                self.life.phase = Phase::Retiring { vmm, other: next.vmm, failed, was_paused };
            }
            (Phase::Upgrading { vmm, next: None, was_paused }, Event::HandOverFailed(trouble)) => {
                self.life.phase = Phase::with_machine(vmm, was_paused);
                self.end_job(Verdict::Failed(trouble));
            }
            (Phase::Retiring { vmm, failed, was_paused, .. }, Event::Retired) => {
                self.life.phase = Phase::with_machine(vmm, was_paused);
                self.end_job(failed.map_or(Verdict::Succeeded, Verdict::Failed));
            }
            (Phase::Stopping { vmm, push: Push::Button { deadline_ms, .. }, then }, Event::Pressed) => {
                let push = Push::Button { deadline_ms, pressed: true };
                self.life.phase = Phase::Stopping { vmm, push, then };
            }
            (Phase::Stopping { vmm, then, .. }, Event::PressFailed) => {
                self.life.phase = Phase::Stopping { vmm, push: Push::Force, then };
            }
            (
                Phase::Stopping { vmm, push: Push::Button { deadline_ms, .. }, then },
                Event::DeadlinePassed,
            ) if self.is_due(deadline_ms, GRACE_MS_MAX) => {
                self.life.phase = Phase::Stopping { vmm, push: Push::Force, then };
            }
            (Phase::Waiting { until_ms, .. }, Event::DeadlinePassed)
                if self.is_due(until_ms, limits::RESTART_PAUSE_MS_MAX) =>
            {
                self.life.begin_run();
            }
            (Phase::Running { .. }, Event::DeadlinePassed)
                if self.life.sound_ms().is_some_and(|at_ms| self.context.now_ms >= at_ms) =>
            {
                self.life.failures = 0;
            }
            (phase, Event::Ended(end)) => self.machine_ended(phase, end),
            // Somebody wants to keep what nobody wanted when the work began.
            (Phase::Releasing { then }, Event::Released { flushed: false, .. })
                if !self.life.unflushed.is_empty() && then.keeps_volumes() => {}
            // Or gives up what somebody wanted to keep then.
            (Phase::Releasing { then }, Event::Released { kept: true, .. })
                if self.life.saved.is_none() && !matches!(then, Then::Return { .. }) => {}
            (Phase::Releasing { then }, Event::Released { flushed, .. }) => {
                if flushed {
                    self.life.unflushed.clear();
                }
                self.released(then);
            }
            (Phase::Deleting { verdict, .. }, Event::Purged) => {
                self.end_job(verdict);
                self.gone = true;
            }
            (phase, Event::Found(found)) => self.found(phase, found),
            _ => {}
        }
    }

    /// Whether a time has come that was never further away than this. When it is, the clock was set back meanwhile,
    /// and nobody should wait for what it has to make up.
    fn is_due(&self, at_ms: i64, furthest_ms: i64) -> bool {
        let left_ms = at_ms.saturating_sub(self.context.now_ms);
        left_ms <= 0 || left_ms > furthest_ms
    }

    /// Whether this is the operation that it works for, and not an earlier one.
    fn is_for(&self, id: OperationId) -> bool {
        self.life.job.is_some_and(|job| job.id == id)
    }

    pub(super) fn is_being_created(&self) -> bool {
        self.life.job.is_some_and(|job| job.kind == JobKind::Create)
    }

    pub(super) fn booted(&mut self, vmm: ProcessId) {
        self.life.unflushed.clear();
        self.life.booted_ms = Some(self.context.now_ms);
        // A host restart took a paused machine away; the one that replaces it is parked as well.
        self.life.phase = match self.life.wanted {
            Wanted::Paused => Phase::Pausing { vmm },
            _ => Phase::Running { vmm },
        };
        self.end_job(Verdict::Succeeded);
    }

    /// The memory is used up before a vCPU runs: a daemon that follows one that died here finds a parked machine, or one that is
    /// about to be, and lets it run.
    pub(super) fn restored(&mut self, vmm: ProcessId) {
        // What hibernated is copied.
        self.life.shares = self.life.saved.take().and_then(|saved| saved.of.snapshot());
        self.life.booted_ms = Some(self.context.now_ms);
        self.life.phase = Phase::Resuming { vmm };
    }

    /// The machine that there is ends now, and a memory that was saved is of no use with other disks.
    fn copied_back(&mut self, vmm: Option<ProcessId>, to: Return, back: &Back) {
        let start = to.memory || vmm.is_some() && *back != Back::Paused;
        self.life.saved = None;
        self.life.wanted = if start { Wanted::Running } else { Wanted::Stopped };
        self.life.phase = match vmm {
            Some(_) => Phase::Stopping { vmm, push: Push::Force, then: Then::Return { to, start } },
            None => Phase::Returning { to, start },
        };
    }

    fn ended_at_start(&mut self, end: End) {
        let trouble = Trouble { code: Code::MachineFailed, detail: end.detail };
        self.life.phase = Phase::Releasing { then: Then::Fail(trouble) };
    }

    pub(super) fn machine_ended(&mut self, phase: Phase, end: End) {
        if let Phase::Hibernating { was_paused, .. } = &phase {
            self.life.wanted = if *was_paused { Wanted::Paused } else { Wanted::Running };
        }
        match phase {
            Phase::Starting { .. } => self.ended_at_start(end),
            Phase::Resuming { .. } if self.is_being_created() => self.ended_at_start(end),
            Phase::Running { .. }
            | Phase::Pausing { .. }
            | Phase::Paused { .. }
            | Phase::Resuming { .. }
            | Phase::Hibernating { .. }
            | Phase::Snapshotting { vmm: Some(_), .. }
            | Phase::Restoring { vmm: Some(_), .. }
            | Phase::Settling { .. }
            | Phase::Upgrading { .. }
            | Phase::Retiring { .. }
            | Phase::Resetting { .. } => {
                let trouble = Trouble {
                    code: Code::MachineFailed,
                    detail: format!("the machine ended meanwhile: {}", end.detail),
                };
                self.end_job(Verdict::Failed(trouble));
                self.life.phase = Phase::Releasing { then: Then::Decide(end) };
            }
            Phase::Stopping { then, .. } => self.life.phase = Phase::Releasing { then },
            // Whose the server is, and so what follows, the move decides.
            Phase::Moving { vmm: Some(_), given, doubt, .. } => {
                self.life.phase = Phase::Moving { vmm: None, given, doubt, back: Back::Ended(end) };
            }
            Phase::Arriving { vmm: Some(_), doubt, .. } => {
                self.life.phase = Phase::Arriving { vmm: None, doubt, back: Back::Ended(end) };
            }
            _ => {}
        }
    }

    fn released(&mut self, then: Then) {
        match then {
            Then::Stop | Then::Hibernate => {
                self.life.phase = match then {
                    Then::Hibernate => Phase::Hibernated { why: None },
                    _ => Phase::Stopped { why: None },
                };
                self.life.wanted = self.life.wanted_at_rest();
                let cancelled = self.life.job.is_some_and(|job| job.kind == JobKind::Start);
                self.end_job(if cancelled {
                    Verdict::Cancelled("cancelled".to_owned())
                } else {
                    Verdict::Succeeded
                });
            }
            Then::Start => self.life.begin_run(),
            Then::Return { to, start } => self.life.phase = Phase::Returning { to, start },
            Then::Decide(end) => self.decide(end),
            Then::Fail(trouble) => self.start_failed(trouble),
            Then::Delete { keep_volumes, verdict } => self.delete(keep_volumes, verdict),
        }
    }

    /// A machine ended unasked: the policy decides.
    fn decide(&mut self, end: End) {
        if end.kind == EndKind::HostRestarted {
            self.life.failures = 0;
            return self.life.begin_run();
        }
        let restarts = match self.context.policy {
            // Its disk is the other host's, and what is here is old.
            _ if end.kind == EndKind::WentElsewhere => false,
            RestartPolicy::Never => false,
            RestartPolicy::OnFailure => end.is_failure(),
            RestartPolicy::Always => true,
        };
        if restarts {
            self.wait(end.reason());
        } else {
            self.life.wanted = Wanted::Stopped;
            self.life.phase = match end.is_failure() {
                true => Phase::Failed { why: end.reason() },
                false => Phase::Stopped { why: Some(end.reason()) },
            };
        }
    }

    /// A machine could not be started. What an operation had begun is undone; an automatic start is tried again
    /// as the policy says.
    fn start_failed(&mut self, trouble: Trouble) {
        let why = StateReason {
            code: trouble.code.as_str(),
            detail: trouble.detail.clone(),
            at: Time::from_unix_ms(self.context.now_ms),
        };
        match self.life.job.map(|job| job.kind) {
            Some(JobKind::Create) => return self.delete(false, Verdict::Failed(trouble)),
            // A server whose disks are those of a snapshot already keeps its memory too, to be started later.
            Some(JobKind::Start | JobKind::Restore) => {
                self.life.wanted = self.life.wanted_at_rest();
                self.life.phase = match self.life.saved {
                    Some(_) => Phase::Hibernated { why: Some(why) },
                    None => Phase::Stopped { why: Some(why) },
                };
            }
            _ if self.context.policy == RestartPolicy::Never => {
                self.life.wanted = Wanted::Stopped;
                self.life.phase = Phase::Failed { why };
            }
            _ => self.wait(why),
        }
        self.end_job(Verdict::Failed(trouble));
    }

    fn wait(&mut self, why: StateReason) {
        let ran_ms = self.life.booted_ms.map_or(0, |booted_ms| self.context.now_ms - booted_ms);
        if ran_ms >= limits::STABLE_MS {
            self.life.failures = 0;
        }
        let pause_ms = limits::RESTART_PAUSE_MS
            .saturating_mul(1 << self.life.failures.min(16))
            .min(limits::RESTART_PAUSE_MS_MAX);
        self.life.failures = self.life.failures.saturating_add(1);
        self.life.phase = Phase::Waiting { until_ms: self.context.now_ms.saturating_add(pause_ms), why };
    }

    fn delete(&mut self, keep_volumes: bool, verdict: Verdict) {
        self.life.wanted = Wanted::Deleted;
        self.life.phase = Phase::Deleting { keep_volumes, verdict };
    }

    pub(super) fn end_job(&mut self, verdict: Verdict) {
        if let Some(job) = self.life.job.take() {
            self.ended.push((job.id, verdict));
        }
    }
}
