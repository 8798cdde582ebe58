//! What each end of a move does next: one pure table for both. Nothing here touches a machine or a stream. Whoever
//! learns of an event asks it under one lock, and only then carries out the effects, in order.
//!
//! The source gives the machine up when it enters `commit`; the target has it when it enters `release`. In between
//! nobody runs it. A source in `commit` takes it back only on the target's refusal, a target in `ready` runs it only on
//! the source's commit. When the link breaks there, both stay paused, in doubt, until somebody who can see the other end
//! settles it.
//!
//! Ends that are *held* go on from `ready` only when they are told from outside: the words of `commit` are not theirs then, a
//! source enters it by [`Event::Commit`], and a target has the machine by [`Event::Settled`]. Until it is told, a source may
//! return by itself; from then on it does not.
//!
//! Where some of memory is *owed* as the machine begins to run at the target, both go through `owing`: whose the machine is is no
//! question there, and a link that breaks decides nothing. The source keeps memory until the target says that it has all of it.
use wire::migration::{Owner, Phase, Side};

/// Whether the target's machine has all of its memory when it begins to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Course {
    Copied,
    Owing,
}

/// What happens to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// The work of the last effects is done.
    Done,
    /// That work failed, or the machine came to an end in it.
    Failed,
    /// Somebody wants the move no more.
    Cancel,
    /// The other end says something.
    Heard(Said),
    /// A stream is gone.
    Lost,
    /// Whoever holds the source at `ready` has it give the machine up.
    Commit,
    /// Somebody who can see the other end says which has the machine.
    Settled(Owner),
}

/// What the ends say to each other, as far as it decides anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Said {
    Prepared,
    State,
    Ready,
    Commit,
    Released,
    Abort,
    Refused,
    Whole,
}

/// What an end does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    /// Say it, if there is a link.
    Say(Said),
    /// Copy memory while the guest runs.
    CopyRounds,
    /// Stop the guest.
    Pause,
    /// Copy what is left.
    CopyRest,
    /// Send processors and devices.
    SendState,
    /// Build the machine from what came; it stays paused.
    Build,
    /// Let the target's machine run.
    Run,
    /// Let the source's machine run again.
    Resume,
    /// Take the target's machine apart.
    Drop,
}

/// Whether nobody can know at this end which one has the machine, once the link is lost.
pub(crate) fn in_doubt(side: Side, phase: Phase) -> bool {
    matches!((side, phase), (Side::Source, Phase::Commit) | (Side::Target, Phase::Ready))
}

/// The next phase of an end and what to do in it. Nothing when the event means nothing in this phase: words come late, and
/// everything may be said twice.
pub(crate) fn step(
    side: Side,
    course: Course,
    phase: Phase,
    event: Event,
) -> Option<(Phase, &'static [Effect])> {
    match side {
        Side::Source => source(course, phase, event),
        Side::Target => target(course, phase, event),
    }
}

/// What follows when the target has the machine.
fn given(course: Course) -> Phase {
    match course {
        Course::Copied => Phase::Moved,
        Course::Owing => Phase::Owing,
    }
}

fn source(course: Course, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
    use Effect::{CopyRest, CopyRounds, Pause, Resume, Say, SendState};
    use Event::{Cancel, Commit, Done, Failed, Heard, Lost, Settled};
    Some(match (phase, event) {
        (Phase::Greet, Heard(Said::Prepared)) => (Phase::Rounds, &[CopyRounds]),
        (Phase::Rounds, Done) => (Phase::Pause, &[Pause]),
        (Phase::Pause, Done) => (Phase::LastRound, &[CopyRest]),
        (Phase::LastRound, Done) => (Phase::State, &[SendState]),
        (Phase::State, Done) => (Phase::Ready, &[]),
        (Phase::State | Phase::Ready, Heard(Said::Ready)) => (Phase::Commit, &[Say(Said::Commit)]),
        // The target is told by whoever holds it.
        (Phase::Ready, Commit) => (Phase::Commit, &[]),
        (
            Phase::Greet | Phase::Rounds | Phase::Pause | Phase::LastRound | Phase::State | Phase::Ready,
            Failed | Cancel | Lost | Heard(Said::Refused) | Settled(Owner::Here),
        ) => (Phase::Returned, &[Resume, Say(Said::Abort)]),

        (Phase::Commit, Heard(Said::Released) | Settled(Owner::There)) => (given(course), &[]),
        (Phase::Commit, Heard(Said::Refused) | Settled(Owner::Here)) => (Phase::Returned, &[Resume]),

        (Phase::Owing, Heard(Said::Whole)) => (Phase::Moved, &[]),

        (Phase::Returned, Heard(Said::Prepared | Said::Ready)) => (Phase::Returned, &[Say(Said::Abort)]),
        _ => return None,
    })
}

fn target(course: Course, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
    use Effect::{Build, Drop, Run, Say};
    use Event::{Cancel, Done, Failed, Heard, Lost, Settled};
    Some(match (phase, event) {
        (Phase::Greet, Done) => (Phase::Rounds, &[Say(Said::Prepared)]),
        (Phase::Rounds, Heard(Said::State)) => (Phase::State, &[Build]),
        (Phase::State, Done) => (Phase::Ready, &[Say(Said::Ready)]),
        (
            Phase::Greet | Phase::Rounds | Phase::State,
            Failed | Cancel | Lost | Heard(Said::Abort) | Settled(Owner::There),
        ) => (Phase::Dropped, &[Drop, Say(Said::Refused)]),

        (Phase::Ready, Heard(Said::Commit) | Settled(Owner::Here)) => (Phase::Release, &[Run]),
        (Phase::Ready, Heard(Said::Abort) | Settled(Owner::There)) => (Phase::Dropped, &[Drop]),
        (Phase::Ready, Failed | Cancel) => (Phase::Dropped, &[Drop, Say(Said::Refused)]),

        (Phase::Release, Done) => (given(course), &[Say(Said::Released)]),
        (Phase::Release, Failed) => (Phase::Dropped, &[Drop, Say(Said::Refused)]),

        (Phase::Owing, Done) => (Phase::Moved, &[Say(Said::Whole)]),
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
