//! What follows when a daemon has started and looked for the machine of a server that it has a record of. Pure; part of `step`.
use model::Code;
use wire::control::MachineState;

use super::end::End;
use super::step::Stepping;
use super::{Phase, Push, Then, Trouble, Verdict};

/// What a starting daemon found of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The process answers.
    Alive(MachineState),
    /// The process lives and does not answer.
    Mute,
    /// It has ended.
    Gone(End),
}

impl Stepping {
    pub(super) fn found(&mut self, phase: Phase, found: Found) {
        match (phase, found) {
            // A process that was lost before it was recorded has no machine; the work starts another.
            (Phase::Starting { vmm: None }, _) => {}
            // Its volumes may be gone, too, if it did not come to run.
            (Phase::Starting { .. }, Found::Gone(_)) if !self.life.unflushed.is_empty() => {
                self.life.phase = Phase::Creating { start: true };
            }
            (Phase::Starting { .. }, Found::Gone(_)) => self.life.begin_run(),
            // It was built, and has not begun.
            (Phase::Starting { .. }, Found::Alive(MachineState::Paused)) if self.life.saved.is_none() => {}
            (phase, Found::Gone(end)) => self.machine_ended(phase, end),
            (_, Found::Alive(MachineState::Exiting) | Found::Mute) => {}
            // What its VMM was told to build of a memory it could not, and there is nothing else that the server is to go on from.
            (Phase::Resuming { vmm }, Found::Alive(MachineState::Shell)) if self.is_being_created() => {
                let detail = "the machine could not be built as it was saved".to_owned();
                let then = Then::Fail(Trouble { code: Code::MachineFailed, detail });
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push: Push::Force, then };
            }
            (
                Phase::Starting { vmm: Some(vmm) },
                Found::Alive(MachineState::Running | MachineState::Paused),
            ) => {
                if self.life.saved.is_some() {
                    self.restored(vmm)
                } else {
                    self.booted(vmm)
                }
            }
            (Phase::Running { vmm }, Found::Alive(MachineState::Paused)) => {
                self.life.phase = Phase::Resuming { vmm };
            }
            (Phase::Paused { vmm }, Found::Alive(MachineState::Running)) => {
                self.life.phase = Phase::Pausing { vmm };
            }
            (
                Phase::Snapshotting { vmm: Some(vmm), .. } | Phase::Restoring { vmm: Some(vmm), .. },
                Found::Alive(MachineState::Shell),
            ) => {
                let detail = "the machine is gone".to_owned();
                self.end_job(Verdict::Failed(Trouble { code: Code::MachineFailed, detail }));
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push: Push::Force, then: Then::Start };
            }
            (
                Phase::Running { vmm }
                | Phase::Pausing { vmm }
                | Phase::Paused { vmm }
                | Phase::Resuming { vmm }
                | Phase::Hibernating { vmm, .. }
                | Phase::Settling { vmm, .. }
                | Phase::Resetting { vmm, .. },
                Found::Alive(MachineState::Shell),
            ) => {
                self.life.phase = Phase::Stopping { vmm: Some(vmm), push: Push::Force, then: Then::Start };
            }
            (_, Found::Alive(_)) => {}
        }
    }
}
