//! Whose a server is while it moves: one pure table for both ends. Nothing here touches records, files or connections.
//! An end asks it what follows an event, saves the phase that it answers, and only then does what it says.
//!
//! ```text
//!  source  copy ──────────── the target is ready ──▶ commit ──── it has taken it ──▶ moved
//!            └── whatever fails: returned                └── it has refused: returned
//!  target  copy ── all is here ──▶ ready ──── the source has committed ──▶ moved
//!            └── whatever fails: dropped └── the source keeps it: dropped
//! ```
//! The source lets the server go when it saves `commit`, the target takes it when it saves `moved`: in between it is
//! nobody's, and nobody runs it. A source in `commit` has it back only on the target's recorded refusal, a target in `ready`
//! takes it only on the source's recorded commit; or when the operator vouches for the other host. Until one of them
//! comes both are in doubt, and the source goes on asking.
//!
//! Inside `copy` a machine that moves alive has phases of its own, which its two VMMs decide up to their `ready`. There both
//! are held, and this table says what they do: the source's VMM promises to keep its machine standing still before *commit* is
//! saved, the target's is let run after *moved* is. What of a promise is not followed by a commit is taken back when the
//! server is kept, and a VMM that died before *moved* was saved has run nothing. A target takes what it is given all the same, and
//! boots its machine anew from the disks: the operator may have had the source remove what it had.
//!
//! A target whose machine runs while some of its memory is still owed says *holding* where it would say *taken* ([`said`]). The source
//! stays in *commit* then, with its VMM, which answers for that memory and never runs: what it removes on *taken* it must
//! still have until all of it is there.
use serde::{Deserialize, Serialize};
use wire::peer::Saying as Word;

/// Which end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Side {
    /// Where the server comes from.
    Source,
    /// Where it goes to.
    Target,
}

/// How far an end has come, as it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// What the server has goes over.
    Copy,
    /// The target has all of it on its medium, and waits for the source's word.
    Ready,
    /// The source has let go.
    Commit,
    /// The end: the server is the target's.
    Moved,
    /// The end: the server is the source's. Only the source says so.
    Returned,
    /// The end: the target does not take it, and never will. Only the target says so.
    Dropped,
}

/// Which end has the server, from where that is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// This one.
    Here,
    /// The other.
    There,
}

/// What happens to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// All that was sent is on the target's medium.
    Done,
    /// The work failed.
    Failed,
    /// Nobody wants the move any more.
    Cancel,
    /// The source: how far are you?
    Asked,
    /// The other end says something.
    Heard(Word),
    /// The connection is gone.
    Lost,
    /// The daemon started anew and found this phase in its records.
    Restarted,
    /// The operator vouches for who has the server.
    Settled(Owner),
}

/// What an end does. Each can be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    /// Say it, if there is a connection.
    Say(Word),
    /// The server is this end's, as it was before or as it has come: part of what is saved with the phase.
    Keep,
    /// Remove what this end has of it: begun in what is saved with the phase.
    Remove,
    /// Show the server as in doubt, with what the operator can do.
    Doubt,
    /// Both hosts have it: told to whoever can end one of them.
    Clash,
    /// Connect to the other end, again until it answers. Only the source can.
    Reconnect,
    /// Nothing is to be said about it any more: the record of the move goes.
    Forget,
}

/// The next phase and what to do in it; nothing when the event means nothing in this phase: words come late, and
/// everything may be said twice.
pub(crate) fn step(side: Side, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
    match side {
        Side::Source => source(phase, event),
        Side::Target => target(phase, event),
    }
}

/// The word in place of this one, of a target whose machine is owed memory or is not.
pub(crate) fn said(word: Word, is_owed: bool) -> Word {
    if word == Word::Taken && is_owed { Word::Holding } else { word }
}

fn source(phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
    use Effect::{Clash, Doubt, Forget, Keep, Reconnect, Remove, Say};
    use Event::{Cancel, Failed, Heard, Lost, Restarted, Settled};
    Some(match (phase, event) {
        (Phase::Copy, Heard(Word::Ready)) => (Phase::Commit, &[Say(Word::Commit)]),
        // What was asked before may still be on its way there, so the target is told.
        (Phase::Copy, Failed | Cancel | Lost | Restarted | Heard(Word::Dropped | Word::Unknown)) => {
            (Phase::Returned, &[Keep, Say(Word::Abort), Reconnect])
        }

        (Phase::Commit, Heard(Word::Taken)) => (Phase::Moved, &[Remove, Forget]),
        (Phase::Commit, Heard(Word::Holding)) => (Phase::Commit, &[]),
        (Phase::Commit, Heard(Word::Dropped)) => (Phase::Returned, &[Keep, Forget]),
        // The other host may come back one day, and is told then.
        (Phase::Commit, Settled(Owner::There)) => (Phase::Moved, &[Remove, Reconnect]),
        (Phase::Commit, Settled(Owner::Here)) => (Phase::Returned, &[Keep, Reconnect]),
        (Phase::Commit, Heard(Word::Ready)) => (Phase::Commit, &[Say(Word::Commit)]),
        (Phase::Commit, Lost | Failed | Restarted | Heard(Word::Unknown | Word::Copying)) => {
            (Phase::Commit, &[Doubt, Reconnect])
        }

        (Phase::Returned, Heard(Word::Ready | Word::Copying)) => (Phase::Returned, &[Say(Word::Abort)]),
        (Phase::Returned, Heard(Word::Dropped | Word::Unknown)) => (Phase::Returned, &[Forget]),
        // Somebody vouched for what was not so.
        (Phase::Returned, Heard(Word::Taken | Word::Holding)) => (Phase::Returned, &[Clash, Forget]),
        (Phase::Returned, Lost | Failed | Restarted) => (Phase::Returned, &[Reconnect]),

        // Only after an operator's word: else nothing is left to be said.
        (Phase::Moved, Heard(Word::Ready)) => (Phase::Moved, &[Say(Word::Commit)]),
        // What it owed went with it.
        (Phase::Moved, Heard(Word::Holding)) => (Phase::Moved, &[Say(Word::Lost)]),
        (Phase::Moved, Heard(Word::Taken | Word::Dropped | Word::Unknown)) => (Phase::Moved, &[Forget]),
        (Phase::Moved, Lost | Failed | Restarted) => (Phase::Moved, &[Reconnect]),
        _ => return None,
    })
}

fn target(phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
    use Effect::{Doubt, Keep, Remove, Say};
    use Event::{Asked, Cancel, Done, Failed, Heard, Lost, Restarted, Settled};
    Some(match (phase, event) {
        (Phase::Copy, Done) => (Phase::Ready, &[Say(Word::Ready)]),
        (Phase::Copy, Asked) => (Phase::Copy, &[Say(Word::Copying)]),
        (Phase::Copy, Failed | Cancel | Lost | Restarted | Heard(Word::Abort) | Settled(Owner::There)) => {
            (Phase::Dropped, &[Remove, Say(Word::Dropped)])
        }

        (Phase::Ready, Heard(Word::Commit) | Settled(Owner::Here)) => {
            (Phase::Moved, &[Keep, Say(Word::Taken)])
        }
        (Phase::Ready, Heard(Word::Abort) | Settled(Owner::There)) => {
            (Phase::Dropped, &[Remove, Say(Word::Dropped)])
        }
        (Phase::Ready, Asked) => (Phase::Ready, &[Say(Word::Ready)]),
        (Phase::Ready, Lost | Failed | Restarted) => (Phase::Ready, &[Doubt]),

        (Phase::Moved, Asked | Heard(_)) => (Phase::Moved, &[Say(Word::Taken)]),
        (Phase::Dropped, Asked | Heard(_)) => (Phase::Dropped, &[Say(Word::Dropped)]),
        _ => return None,
    })
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod live_tests;
