//! What a move to another host is to a server's life. Pure: which host has the server is decided in `servers::moving`,
//! which saves what is answered here in the transaction of its own phase.
use model::server::{StateReason, Wanted};

use super::{Back, Life, Phase, Step, Verdict};

impl Life {
    /// A server that comes from another host, where it was off like this. `run` is the number of its latest machine.
    pub(crate) fn arriving(back: Back, run: u64) -> Life {
        Life {
            phase: Phase::Arriving { doubt: None, back },
            wanted: Wanted::Stopped,
            job: None,
            run,
            booted_ms: None,
            failures: 0,
            awaits: None,
            saved: None,
        }
    }

    /// The other host may have it from now on; nothing when it does not move.
    pub(crate) fn given_away(&self) -> Option<Step> {
        let Phase::Moving { back, .. } = &self.phase else { return None };
        Some(self.at(Phase::Moving { given: true, doubt: None, back: back.clone() }))
    }

    /// Which host has it cannot be known.
    pub(crate) fn doubted(&self, why: StateReason) -> Option<Step> {
        let phase = match &self.phase {
            Phase::Moving { given, back, .. } => {
                Phase::Moving { given: *given, doubt: Some(why), back: back.clone() }
            }
            Phase::Arriving { back, .. } => Phase::Arriving { doubt: Some(why), back: back.clone() },
            _ => return None,
        };
        Some(self.at(phase))
    }

    /// Another host has it too: shown where it is off, for that is where it can still be ended in peace.
    pub(crate) fn clashed(&self, why: StateReason) -> Option<Step> {
        match self.phase {
            Phase::Stopped { .. } | Phase::Failed { .. } => Some(self.at(Phase::Failed { why })),
            _ => None,
        }
    }

    /// It is this host's, and off as it was.
    pub(crate) fn kept(&self, verdict: Verdict) -> Option<Step> {
        let (Phase::Moving { back, .. } | Phase::Arriving { back, .. }) = &self.phase else { return None };
        let mut step = self.at(Phase::at_rest(back.clone()));
        if let Some(job) = step.life.job.take() {
            step.ended.push((job.id, verdict));
        }
        Some(step)
    }

    /// It is the other host's: what this one has of it goes, and the move has succeeded when that is gone.
    pub(crate) fn left(&self) -> Option<Step> {
        let (Phase::Moving { .. } | Phase::Arriving { .. }) = &self.phase else { return None };
        let mut step = self.at(Phase::Deleting { keep_volumes: false, verdict: Verdict::Succeeded });
        step.life.wanted = Wanted::Deleted;
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

    /// Whether it is on its way and nobody here can know which host has it.
    pub(crate) fn is_in_doubt(&self) -> bool {
        matches!(self, Phase::Moving { doubt: Some(_), .. } | Phase::Arriving { doubt: Some(_), .. })
    }
}
