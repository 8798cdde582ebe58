//! Which of two VMMs of this host has a machine that goes from one to the other, and what is to be done about it: one pure table of
//! what both say, or cannot say any more. It is asked again after everything that it has had done, by whichever daemon is there.
//!
//! The VMMs decide between themselves who has the machine (`vmm`'s phase table), and no daemon is in the way of that. Their words
//! are enough unless one dies between *ready* and the other's answer. What it could have done then is known to who was
//! connected until its end: it says that its machine runs before it does.

/// What is known of a VMM that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Last {
    /// Somebody listened from before the handover until its end, and it never said that it went on with the machine.
    Silent,
    /// It may have gone on with it.
    Unheard,
}

/// The VMM that has the machine at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Old {
    /// It has the machine, and no handover is under way.
    Keeps,
    /// One is, and it has not given the machine up.
    Gives,
    /// It has given the machine up and has not heard that the other one has it.
    Gave {
        /// Nor will it: its link is broken.
        in_doubt: bool,
    },
    /// It knows that the other one has the machine.
    Rid,
    /// It lives and does not answer.
    Mute,
    Dead(Last),
}

/// The VMM that is to have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Next {
    /// It was told of no machine.
    Shell,
    /// It builds the machine.
    Builds,
    /// It could run the machine, and waits for the old one's word.
    Ready {
        /// Which does not come: its link is broken.
        in_doubt: bool,
    },
    /// It was told that it has the machine, and is about to let it run, or to find that it cannot.
    Takes,
    /// It has the machine.
    Has,
    /// It has not, and never will.
    Dropped,
    /// It lives and does not answer.
    Mute,
    Dead(Last),
}

/// How long it has gone on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Patience {
    /// No handover was begun by this daemon.
    Fresh,
    /// One was, and has time.
    Waits,
    /// It should have ended, and is to be given up.
    Ending,
    /// That should have worked.
    Over,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Deed {
    /// Have the old one hand over and the next one take.
    Begin,
    /// Look again when one of them has said more.
    Wait,
    /// Tell the old one to give it up.
    Cancel,
    /// Tell the next one not to take it.
    Refuse,
    /// End the next one.
    KillNext,
    /// Tell the old one that it has the machine.
    SettleOld,
    /// Tell the next one that it has.
    SettleNext,
    /// The next one has it: end the old one.
    Taken,
    /// The old one has it: end the next one.
    Kept,
    /// Nobody has it, or it cannot be known who had it last: end both.
    Ended,
}

/// What is to be done as things stand.
pub(super) fn decide(old: Old, next: Next, patience: Patience) -> Deed {
    use Patience::{Ending, Fresh, Over, Waits};
    let waits = |then: Deed| if patience == Over { then } else { Deed::Wait };
    match (old, next) {
        (_, Next::Has) => Deed::Taken,
        (_, Next::Takes) => waits(Deed::Taken),
        (Old::Rid, Next::Dead(_) | Next::Dropped) => Deed::Ended,
        // It was told so by the next one.
        (Old::Rid, _) => Deed::Taken,

        (Old::Keeps, Next::Shell) if patience == Fresh => Deed::Begin,
        // Nobody runs it without the word of one that has given it up.
        (Old::Keeps, _) => Deed::Kept,

        (Old::Gives, _) => match patience {
            Fresh | Waits => Deed::Wait,
            // Where the next one may have run, the old one is asked once more: it refuses when it has given the machine up.
            Ending => Deed::Cancel,
            Over if matches!(next, Next::Dead(Last::Unheard)) => Deed::Cancel,
            Over => unheard(next),
        },

        (Old::Gave { in_doubt: true }, Next::Dead(Last::Silent) | Next::Dropped) => Deed::SettleOld,
        // What it read last may be the word that the machine is its own.
        (Old::Gave { .. }, Next::Dead(Last::Silent) | Next::Dropped) => waits(Deed::Ended),
        (Old::Gave { .. }, Next::Dead(Last::Unheard)) => Deed::Ended,
        (Old::Gave { .. }, Next::Ready { in_doubt: true }) => Deed::SettleNext,
        // A word that it may heed or not; to end it could be to end the machine.
        (Old::Gave { .. }, Next::Ready { .. } | Next::Builds) if patience == Ending => Deed::Refuse,
        (Old::Gave { .. }, _) => waits(Deed::KillNext),

        // The last word of the old one is read before its link is found broken.
        (Old::Dead(Last::Silent), Next::Ready { in_doubt: true }) => Deed::SettleNext,
        (Old::Dead(Last::Silent), Next::Ready { .. }) => waits(Deed::Ended),
        // It may take the machine still, by the last word of the old one.
        (Old::Dead(Last::Unheard), Next::Ready { in_doubt: false }) => waits(Deed::Ended),
        (Old::Dead(_), Next::Builds | Next::Mute) => waits(Deed::Ended),
        (Old::Dead(_), _) => Deed::Ended,

        (Old::Mute, _) => waits(unheard(next)),
    }
}

/// What becomes of a machine whose old VMM says nothing of use.
fn unheard(next: Next) -> Deed {
    match next {
        Next::Dead(Last::Silent) | Next::Dropped | Next::Shell => Deed::Kept,
        Next::Dead(Last::Unheard) => Deed::Ended,
        _ => Deed::KillNext,
    }
}

#[cfg(test)]
mod tests;
