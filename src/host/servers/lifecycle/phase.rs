//! What a phase says of itself. Pure.
use model::SnapshotId;
use model::server::{ServerState, StateReason};

use super::{Back, Phase, Push, Then};
use crate::vmms::ProcessId;

impl Phase {
    /// What callers see of it.
    pub fn state(&self) -> ServerState {
        match self {
            Phase::Creating { .. } => ServerState::Creating,
            Phase::Stopped { .. } => ServerState::Stopped,
            Phase::Starting { .. } | Phase::Waiting { .. } => ServerState::Starting,
            Phase::Running { .. }
            | Phase::Pausing { .. }
            | Phase::Resetting { .. }
            | Phase::Settling { was_paused: false, .. }
            | Phase::Upgrading { was_paused: false, .. }
            | Phase::Retiring { was_paused: false, .. } => ServerState::Running,
            Phase::Paused { .. }
            | Phase::Settling { was_paused: true, .. }
            | Phase::Upgrading { was_paused: true, .. }
            | Phase::Retiring { was_paused: true, .. }
            | Phase::Resuming { .. }
            | Phase::Hibernating { .. } => ServerState::Paused,
            Phase::Hibernated { .. } => ServerState::Hibernated,
            phase if phase.is_in_doubt() => ServerState::InDoubt,
            Phase::Moving { .. } => ServerState::Moving,
            Phase::Arriving { .. } => ServerState::Arriving,
            Phase::Snapshotting { back, .. } | Phase::Restoring { back, .. } => match back {
                Back::Running => ServerState::Running,
                Back::Paused => ServerState::Paused,
                Back::Stopped { .. } => ServerState::Stopped,
                Back::Failed { .. } | Back::Ended(_) => ServerState::Failed,
                Back::Hibernated { .. } => ServerState::Hibernated,
            },
            Phase::Returning { .. } => ServerState::Stopping,
            Phase::Stopping { .. } => ServerState::Stopping,
            Phase::Releasing { then } => match then {
                Then::Delete { .. } => ServerState::Deleting,
                _ => ServerState::Stopping,
            },
            Phase::Deleting { .. } => ServerState::Deleting,
            Phase::Failed { .. } => ServerState::Failed,
        }
    }

    /// Why it is there, where that says more than the state.
    pub fn why(&self) -> Option<&StateReason> {
        match self {
            Phase::Stopped { why } | Phase::Hibernated { why } => why.as_ref(),
            Phase::Moving { doubt, .. } | Phase::Arriving { doubt, .. } => doubt.as_ref(),
            Phase::Snapshotting { back, .. } | Phase::Restoring { back, .. } => match back {
                Back::Stopped { why } | Back::Hibernated { why } => why.as_ref(),
                Back::Failed { why } => Some(why),
                Back::Running | Back::Paused | Back::Ended(_) => None,
            },
            Phase::Waiting { why, .. } | Phase::Failed { why } => Some(why),
            _ => None,
        }
    }

    pub(super) fn deadline_ms(&self) -> Option<i64> {
        match self {
            Phase::Stopping { push: Push::Button { deadline_ms, .. }, .. } => Some(*deadline_ms),
            Phase::Waiting { until_ms, .. } => Some(*until_ms),
            _ => None,
        }
    }

    /// The snapshot that is being taken.
    pub fn snapshot(&self) -> Option<SnapshotId> {
        match self {
            Phase::Snapshotting { snapshot, .. } => Some(*snapshot),
            _ => None,
        }
    }

    /// The snapshot that it goes back to.
    pub fn returns_to(&self) -> Option<SnapshotId> {
        match self {
            Phase::Restoring { to, .. }
            | Phase::Returning { to, .. }
            | Phase::Stopping { then: Then::Return { to, .. }, .. }
            | Phase::Releasing { then: Then::Return { to, .. } } => Some(to.snapshot),
            _ => None,
        }
    }

    /// Whether there is a machine in a process that is known.
    pub fn has_machine(&self) -> bool {
        self.vmm().is_some() || self.is_upgrading()
    }

    /// Whether its machine is going from one VMM to another, or one of the two has to go yet.
    pub fn is_upgrading(&self) -> bool {
        matches!(self, Phase::Upgrading { .. } | Phase::Retiring { .. })
    }

    /// The process it has, if it is known and there is one that is to have its machine: the end of either of two is not the
    /// machine's.
    pub fn vmm(&self) -> Option<&ProcessId> {
        match self {
            Phase::Starting { vmm }
            | Phase::Stopping { vmm, .. }
            | Phase::Snapshotting { vmm, .. }
            | Phase::Moving { vmm, .. }
            | Phase::Arriving { vmm, .. }
            | Phase::Restoring { vmm, .. } => vmm.as_ref(),
            Phase::Running { vmm }
            | Phase::Pausing { vmm }
            | Phase::Paused { vmm }
            | Phase::Resuming { vmm }
            | Phase::Hibernating { vmm, .. }
            | Phase::Settling { vmm, .. }
            | Phase::Resetting { vmm, .. } => Some(vmm),
            _ => None,
        }
    }
}
