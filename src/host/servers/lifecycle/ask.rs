//! What callers may ask of a server in each phase, and what that changes. Pure.
//! What is so already is done at once; what is being done is joined; what makes no sense is refused.
use model::OperationId;
use model::server::Wanted;

use super::{Context, Job, JobKind, Life, Phase, Push, Step, Then, Verdict};

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
pub const ACTIONS: [(&str, Ask); 6] = [
    ("start", Ask::Start),
    ("stop", Ask::Stop { grace_ms: 1000 }),
    ("reboot", Ask::Reboot { grace_ms: 1000 }),
    ("pause", Ask::Pause),
    ("resume", Ask::Resume),
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
            Ask::Delete { .. } => JobKind::Delete,
        }
    }
}

impl Life {
    /// Actions that would change something now.
    pub fn allowed_actions(&self, context: Context) -> Vec<&'static str> {
        let changes =
            |ask: Ask| matches!(self.ask(ask, OperationId(uuid::Uuid::nil()), context), Ok(Asked::Began(_)));
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
            Ask::Delete { keep_volumes } => asking.delete(keep_volumes),
        }
    }

    /// Asks to cancel operation `id`. Refused when that is not safe any more.
    pub fn cancel(&self, id: OperationId) -> Result<Step, Refused> {
        let mut life = self.clone();
        let job = life.job.filter(|job| job.id == id).ok_or(Refused)?;
        let undone = || Verdict::Cancelled("cancelled".to_owned());
        life.phase = match (job.kind, life.phase) {
            (JobKind::Create, Phase::Creating { .. }) => {
                Phase::Deleting { keep_volumes: false, verdict: undone() }
            }
            (JobKind::Create, Phase::Starting { vmm }) => Phase::Stopping {
                vmm,
                push: Push::Force,
                then: Then::Delete { keep_volumes: false, verdict: undone() },
            },
            (JobKind::Start, Phase::Starting { vmm }) => {
                Phase::Stopping { vmm, push: Push::Force, then: Then::Stop }
            }
            _ => return Err(Refused),
        };
        life.wanted = if job.kind == JobKind::Create { Wanted::Deleted } else { Wanted::Stopped };
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
            Phase::Stopped { .. } | Phase::Failed { .. } | Phase::Waiting { .. } => {
                self.life.failures = 0;
                self.life.begin_run();
                self.begin(Wanted::Running)
            }
            Phase::Starting { .. } if self.life.job.is_some() => self.join(),
            Phase::Starting { .. } => self.begin(Wanted::Running),
            Phase::Running { .. } => self.done(),
            _ => Err(Refused),
        }
    }

    fn stop(mut self, push: Push) -> Result<Asked, Refused> {
        let phase = self.life.phase.clone();
        match phase {
            Phase::Creating { .. } => {
                self.life.phase = Phase::Creating { start: false };
                self.life.wanted = Wanted::Stopped;
                self.join()
            }
            Phase::Stopped { .. } => self.done(),
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
            Phase::Deleting { .. } => Err(Refused),
        }
    }

    /// The machine ends anyway; what was to follow it becomes a stop.
    fn stop_instead(mut self, then: Then) -> Result<Asked, Refused> {
        match then {
            Then::Stop if self.life.job.is_some_and(|job| job.kind == JobKind::Stop) => self.join(),
            Then::Stop | Then::Start | Then::Decide(_) => {
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
            Phase::Paused { .. } => self.done(),
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
            Phase::Running { .. } => self.done(),
            _ => Err(Refused),
        }
    }

    fn delete(mut self, keep_volumes: bool) -> Result<Asked, Refused> {
        let verdict = Verdict::Succeeded;
        let then = Then::Delete { keep_volumes, verdict: verdict.clone() };
        let deleting = self.life.job.is_some_and(|job| job.kind == JobKind::Delete);
        let phase = self.life.phase.clone();
        self.life.phase = match phase {
            _ if deleting => return self.join(),
            // A volume that is not filled is no volume to keep.
            Phase::Creating { .. } => Phase::Deleting { keep_volumes: false, verdict },
            Phase::Stopped { .. } | Phase::Failed { .. } | Phase::Waiting { .. } => {
                Phase::Deleting { keep_volumes, verdict }
            }
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
            | Phase::Resetting { vmm, .. } => Phase::Stopping { vmm: Some(vmm), push: Push::Force, then },
        };
        self.interrupt();
        self.begin(Wanted::Deleted)
    }

    fn end_held(&mut self, then: Then) {
        match then {
            Then::Fail(trouble) => self.end_job(Verdict::Failed(trouble)),
            Then::Delete { verdict, .. } => self.end_job(verdict),
            Then::Stop | Then::Start | Then::Decide(_) => {}
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
        let id = self.life.job.ok_or(Refused)?.id;
        Ok(Asked::Joined(id, self.step()))
    }

    fn step(self) -> Step {
        Step { life: self.life, ended: self.ended, gone: false }
    }
}
