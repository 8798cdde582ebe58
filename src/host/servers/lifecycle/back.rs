//! What a server goes back to when work on it has ended, or is not wanted any more. Pure.
use model::server::Wanted;

use super::{Back, Life, Phase};
use crate::vmms::ProcessId;

impl Life {
    /// What a server without a machine is to be: a memory that was saved is not given up.
    pub(super) fn wanted_at_rest(&self) -> Wanted {
        if self.saved.is_some() { Wanted::Hibernated } else { Wanted::Stopped }
    }

    /// Goes back to what the server did before. Its machine may have been parked for the moment.
    pub(super) fn give_up_snapshotting(&mut self, vmm: Option<ProcessId>, back: Back) {
        self.phase = match (vmm, back) {
            (Some(vmm), Back::Running) => Phase::Resuming { vmm },
            (Some(vmm), _) => Phase::Pausing { vmm },
            (None, back) => Phase::at_rest(back),
        };
    }

    /// What it did went on.
    pub(super) fn give_up_restoring(&mut self, vmm: Option<ProcessId>, back: Back) {
        self.phase = match (vmm, back) {
            (Some(vmm), Back::Running) => Phase::Running { vmm },
            (Some(vmm), _) => Phase::Paused { vmm },
            (None, back) => Phase::at_rest(back),
        };
    }

    /// Goes back to what the machine did before.
    pub(super) fn give_up_hibernating(&mut self, vmm: ProcessId, was_paused: bool) {
        (self.phase, self.wanted) = match was_paused {
            true => (Phase::Pausing { vmm }, Wanted::Paused),
            false => (Phase::Resuming { vmm }, Wanted::Running),
        };
    }

    /// It did on what it did.
    pub(super) fn give_up_settling(&mut self, vmm: ProcessId, was_paused: bool) {
        self.phase = Phase::with_machine(vmm, was_paused);
    }
}

impl Phase {
    /// With a machine that does as before.
    pub(super) fn with_machine(vmm: ProcessId, is_paused: bool) -> Phase {
        if is_paused { Phase::Paused { vmm } } else { Phase::Running { vmm } }
    }
}
