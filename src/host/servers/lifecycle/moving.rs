//! What a move to another host is to a server's life. Pure: which host has the server is decided in `servers::moving`,
//! which saves what is answered here in the transaction of its own phase.
use model::server::{StateReason, Wanted};

use super::{Back, Life, Phase, Push, Saved, SavedOf, Step, Then, Verdict};

impl Life {
    /// A server that comes from another host, where it was like this. `run` is the number of its latest machine, which
    /// started at `booted_ms` if it comes along, and `saved` what comes of its memory.
    pub(crate) fn arriving(back: Back, run: u64, booted_ms: Option<i64>, saved: Option<Saved>) -> Life {
        let wanted = match (&back, saved) {
            (Back::Running, _) => Wanted::Running,
            (Back::Paused, _) => Wanted::Paused,
            (_, Some(_)) => Wanted::Hibernated,
            (_, None) => Wanted::Stopped,
        };
        Life {
            phase: Phase::Arriving { vmm: None, doubt: None, back },
            wanted,
            job: None,
            run,
            booted_ms,
            failures: 0,
            awaits: None,
            saved,
            unflushed: Vec::new(),
            shares: None,
            overlaid: false,
            clash: None,
        }
    }

    /// Whether its memory is on the disk in files of its own, which can go with it.
    pub(crate) fn has_own_memory(&self) -> bool {
        self.saved.is_some_and(|saved| saved.of == SavedOf::Hibernation)
    }

    /// The other host may have it from now on, and is not in doubt; nothing when it does not move.
    pub(crate) fn given_away(&self) -> Option<Step> {
        let Phase::Moving { vmm, back, .. } = &self.phase else { return None };
        Some(self.at(Phase::Moving { vmm: vmm.clone(), given: true, doubt: None, back: back.clone() }))
    }

    /// Which host has it cannot be known.
    pub(crate) fn doubted(&self, why: StateReason) -> Option<Step> {
        let phase = match &self.phase {
            Phase::Moving { vmm, given, back, .. } => {
                Phase::Moving { vmm: vmm.clone(), given: *given, doubt: Some(why), back: back.clone() }
            }
            Phase::Arriving { vmm, back, .. } => {
                Phase::Arriving { vmm: vmm.clone(), doubt: Some(why), back: back.clone() }
            }
            _ => return None,
        };
        Some(self.at(phase))
    }

    /// Another host has it too, which is shown whatever it does here.
    pub(crate) fn clashed(&self, why: StateReason) -> Step {
        let mut step = self.at(match &self.phase {
            Phase::Stopped { .. } | Phase::Failed { .. } => Phase::Failed { why: why.clone() },
            phase => phase.clone(),
        });
        step.life.clash = Some(why);
        step
    }

    /// It is this host's, and does what it did. Its VMM is told so by the work of the phase.
    pub(crate) fn kept(&self, verdict: Verdict) -> Option<Step> {
        let (Phase::Moving { vmm, back, .. } | Phase::Arriving { vmm, back, .. }) = &self.phase else {
            return None;
        };
        let mut step = self.at(match (vmm.clone(), back) {
            (Some(vmm), Back::Running) => Phase::Resuming { vmm },
            (Some(vmm), Back::Paused) => Phase::Pausing { vmm },
            (_, back) => Phase::at_rest(back.clone()),
        });
        if let Some(job) = step.life.job.take() {
            step.ended.push((job.id, verdict));
        }
        Some(step)
    }

    /// It is the other host's: what this one has of it goes, its VMM first, and the move has succeeded when that is gone.
    pub(crate) fn left(&self) -> Option<Step> {
        let (Phase::Moving { vmm, .. } | Phase::Arriving { vmm, .. }) = &self.phase else { return None };
        let (keep_volumes, verdict) = (false, Verdict::Succeeded);
        let mut step = self.at(match vmm.clone() {
            Some(vmm) => Phase::Stopping {
                vmm: Some(vmm),
                push: Push::Force,
                then: Then::Delete { keep_volumes, verdict },
            },
            None => Phase::Deleting { keep_volumes, verdict },
        });
        (step.life.wanted, step.life.saved) = (Wanted::Deleted, None);
        Some(step)
    }

    fn at(&self, phase: Phase) -> Step {
        Step { life: Life { phase, ..self.clone() }, ended: Vec::new(), gone: false }
    }
}

impl Phase {
    /// Whether it is on its way from here or to here.
    pub(crate) fn is_moving(&self) -> bool {
        matches!(self, Phase::Moving { .. } | Phase::Arriving { .. })
    }

    /// Whether it is on its way with a machine that is paused.
    pub(crate) fn is_moving_paused(&self) -> bool {
        matches!(self, Phase::Moving { back: Back::Paused, .. } | Phase::Arriving { back: Back::Paused, .. })
    }

    /// Whether it comes from another host.
    pub(crate) fn is_arriving(&self) -> bool {
        matches!(self, Phase::Arriving { .. })
    }

    /// Whether it is on its way and nobody here can know which host has it.
    pub(crate) fn is_in_doubt(&self) -> bool {
        matches!(self, Phase::Moving { doubt: Some(_), .. } | Phase::Arriving { doubt: Some(_), .. })
    }
}
