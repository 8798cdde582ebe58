//! Every order of everything that can happen to two ends, walked through: words delivered or cut off with the link, each
//! end killed, cancelled or failing between any two effects, and somebody who settles by what can be seen.
use std::collections::{HashSet, VecDeque};

use super::*;

type Table = fn(Side, Course, Phase, Event) -> Option<(Phase, &'static [Effect])>;

const SIDES: [Side; 2] = [Side::Source, Side::Target];

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct End {
    phase: Phase,
    alive: bool,
    to_do: VecDeque<Effect>,
    /// Work of which the end is to be told.
    working: bool,
    lost: bool,
    runs: bool,
    ever_ran: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    ends: [End; 2],
    linked: bool,
    course: Course,
    /// Both ends are held at `ready` by somebody who sees both.
    held: bool,
    /// To the source, to the target.
    in_flight: [VecDeque<Said>; 2],
    /// What may still go wrong, so that the walk ends.
    kills: u8,
    cuts: u8,
    cancels: u8,
    failures: u8,
}

impl World {
    fn new(course: Course, held: bool) -> World {
        let end = |runs| End {
            phase: Phase::Greet,
            alive: true,
            to_do: VecDeque::new(),
            working: false,
            lost: false,
            runs,
            ever_ran: false,
        };
        let mut ends = [end(true), end(false)];
        ends[1].working = true;
        World {
            ends,
            linked: true,
            course,
            held,
            in_flight: [VecDeque::new(), VecDeque::new()],
            kills: 1,
            cuts: 1,
            cancels: 2,
            failures: 2,
        }
    }

    fn give(&mut self, table: Table, at: usize, event: Event) {
        if let Some((next, effects)) = table(SIDES[at], self.course, self.ends[at].phase, event) {
            let end = &mut self.ends[at];
            (end.phase, end.working) = (next, false);
            end.to_do.extend(effects);
        }
    }

    fn act(&mut self, at: usize) {
        let Some(effect) = self.ends[at].to_do.pop_front() else { return };
        match effect {
            Effect::Say(said) if self.linked => self.in_flight[1 - at].push_back(said),
            Effect::SendState if self.linked => self.in_flight[1 - at].push_back(Said::State),
            _ => {}
        }
        let end = &mut self.ends[at];
        match effect {
            Effect::Pause | Effect::Drop => end.runs = false,
            Effect::Run | Effect::Resume => (end.runs, end.ever_ran) = (true, true),
            _ => {}
        }
        end.working = !matches!(effect, Effect::Say(_) | Effect::Resume | Effect::Drop);
    }

    fn cut(&mut self) {
        self.linked = false;
        self.ends.iter_mut().for_each(|end| end.lost = end.alive);
    }

    /// What somebody who sees both ends may say to one. He does not guess: only what holds for good.
    fn verdict(&self, at: usize) -> Option<Owner> {
        let (end, other) = (&self.ends[at], &self.ends[1 - at]);
        // Held, an end waits for its word with the link whole, too.
        let still_arrives = !self.held && (end.lost || !self.in_flight[at].is_empty() || self.linked);
        if !end.alive || still_arrives || !in_doubt(SIDES[at], end.phase) {
            return None;
        }
        match SIDES[at] {
            Side::Source if other.ever_ran => Some(Owner::There),
            Side::Source if !other.alive || other.phase == Phase::Dropped => Some(Owner::Here),
            Side::Source => None,
            // The source may be about to be told.
            Side::Target
                if self.held
                    && other.alive
                    && !matches!(other.phase, Phase::Commit | Phase::Moved | Phase::Returned) =>
            {
                None
            }
            Side::Target if !other.alive => Some(Owner::Here),
            Side::Target if matches!(other.phase, Phase::Commit | Phase::Moved) => Some(Owner::Here),
            Side::Target => Some(Owner::There),
        }
    }

    fn next(&self, table: Table) -> Vec<World> {
        let mut all = Vec::new();
        let mut add = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            all.push(world);
        };
        for at in 0..2 {
            let end = &self.ends[at];
            if !end.alive {
                continue;
            }
            if self.kills > 0 {
                add(&|world| {
                    world.kills -= 1;
                    world.cut();
                    let end = &mut world.ends[at];
                    (end.alive, end.runs, end.working, end.lost) = (false, false, false, false);
                    end.to_do.clear();
                    world.in_flight[at].clear();
                });
            }
            if self.cancels > 0 {
                add(&|world| {
                    world.cancels -= 1;
                    world.give(table, at, Event::Cancel);
                });
            }
            // All that was owed has come, which it does from a source that still has it.
            let [source, target] = &self.ends;
            let comes = self.linked && source.alive && !target.working && target.to_do.is_empty();
            if at == 1 && target.phase == Phase::Owing && comes {
                add(&|world| world.give(table, 1, Event::Done));
            }
            // A word is heard between any two effects.
            if !self.in_flight[at].is_empty() {
                add(&|world| {
                    let said = world.in_flight[at].pop_front().expect("looked at above");
                    // As the lock around the table does.
                    let is_promised = world.held && world.ends[at].phase == Phase::Commit;
                    if !(world.held && said == Said::Ready || is_promised && said == Said::Refused) {
                        world.give(table, at, Event::Heard(said));
                    }
                });
            }
            // What arrived before the link broke is read first, or is lost with it.
            if end.lost {
                add(&|world| {
                    world.in_flight[at].clear();
                    world.ends[at].lost = false;
                    world.give(table, at, Event::Lost);
                });
            }
            if !end.to_do.is_empty() {
                add(&|world| world.act(at));
                // A machine that cannot be let run has not run.
                if end.to_do.front() == Some(&Effect::Run) && self.failures > 0 {
                    add(&|world| {
                        world.failures -= 1;
                        world.ends[at].to_do.pop_front();
                        world.give(table, at, Event::Failed);
                    });
                }
            } else if end.working {
                add(&|world| {
                    world.ends[at].working = false;
                    world.give(table, at, Event::Done);
                });
                if self.failures > 0 && end.phase != Phase::Release {
                    add(&|world| {
                        world.failures -= 1;
                        world.ends[at].working = false;
                        world.give(table, at, Event::Failed);
                    });
                }
            }
            if let Some(owner) = self.verdict(at) {
                add(&|world| world.give(table, at, Event::Settled(owner)));
            }
        }
        let [source, target] = &self.ends;
        let can_commit =
            source.alive && source.phase == Phase::Ready && target.alive && target.phase == Phase::Ready;
        if self.held && can_commit {
            add(&|world| world.give(table, 0, Event::Commit));
        }
        // Streams in the place of those that broke, when both ends say what they are for.
        let are_owing = self.ends.iter().all(|end| end.alive && end.phase == Phase::Owing);
        if !self.linked && are_owing {
            add(&|world| {
                world.linked = true;
                world.in_flight.iter_mut().for_each(VecDeque::clear);
                world.ends.iter_mut().for_each(|end| end.lost = false);
            });
        }
        if self.cuts > 0 && self.linked {
            add(&|world| {
                world.cuts -= 1;
                world.cut();
            });
        }
        // What changes nothing does not happen.
        all.retain(|next| next != self);
        all
    }

    /// What must never be seen.
    fn broken(&self) -> Option<&'static str> {
        let [source, target] = &self.ends;
        if source.runs && target.runs {
            return Some("both run");
        }
        if source.runs && target.ever_ran {
            return Some("the source runs on after the target has run");
        }
        let needs = target.alive && matches!(target.phase, Phase::Ready | Phase::Release | Phase::Owing);
        if self.course == Course::Owing && needs && source.alive && source.phase == Phase::Moved {
            return Some("the source has let go of what it owes");
        }
        None
    }

    /// What must not be the end of it. Whether anything can still happen but faults is the caller's to know.
    fn unfinished(&self) -> Option<&'static str> {
        let [source, target] = &self.ends;
        match (source.alive, target.alive) {
            (true, true) if source.runs == target.runs => Some("not exactly one runs"),
            (true, true) if target.phase == Phase::Owing => Some("what is owed does not come"),
            (true, false) if !source.runs && !target.ever_ran => Some("the source does not run on"),
            (false, true) if target.phase == Phase::Ready => Some("the target is left in doubt"),
            (false, true) if target.phase == Phase::Release && !target.runs => Some("the target waits"),
            _ => None,
        }
    }
}

/// Walks every world; answers how many there are, or what went wrong in one of them.
fn walk(table: Table, course: Course, held: bool) -> Result<usize, String> {
    let mut seen = HashSet::from([World::new(course, held)]);
    let mut open = vec![World::new(course, held)];
    while let Some(world) = open.pop() {
        if let Some(what) = world.broken() {
            return Err(format!("{what}: {world:?}"));
        }
        // Without further faults, does it end well?
        let calm = World { kills: 0, cuts: 0, cancels: 0, failures: 0, ..world.clone() };
        let ahead = calm.next(table);
        if ahead.is_empty()
            && let Some(what) = calm.unfinished()
        {
            return Err(format!("{what}: {world:?}"));
        }
        for next in world.next(table).into_iter().chain(ahead) {
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    Ok(seen.len())
}

#[test]
fn never_two_and_one_in_the_end_whatever_breaks() {
    for course in [Course::Copied, Course::Owing] {
        for held in [false, true] {
            let worlds = walk(step, course, held).unwrap();
            println!("{worlds} worlds, {course:?}, held: {held}");
            assert!(worlds > 1_000);
        }
    }
}

/// A table with one mistake, in front of the real one.
macro_rules! mistaken {
    ($pattern:pat => $answer:expr) => {
        |side, course, phase, event| match (side, phase, event) {
            $pattern => $answer,
            _ => step(side, course, phase, event),
        }
    };
}

#[test]
fn every_broken_commit_rule_is_caught() {
    use Side::{Source, Target};
    let mistakes: [(&str, Table); 9] = [
        ("the source resumes when the link breaks after its commit", {
            mistaken!((Source, Phase::Commit, Event::Lost) => Some((Phase::Returned, &[Effect::Resume])))
        }),
        ("the source may be cancelled after its commit", {
            mistaken!((Source, Phase::Commit, Event::Cancel) => Some((Phase::Returned, &[Effect::Resume])))
        }),
        ("the target runs as soon as it could", {
            mistaken!((Target, Phase::State, Event::Done) => {
                Some((Phase::Release, &[Effect::Say(Said::Ready), Effect::Run]))
            })
        }),
        ("the target runs when the link breaks before the commit", {
            mistaken!((Target, Phase::Ready, Event::Lost) => Some((Phase::Release, &[Effect::Run])))
        }),
        ("the source commits without having heard that the target is ready", {
            mistaken!((Source, Phase::State, Event::Done) => {
                Some((Phase::Commit, &[Effect::Say(Said::Commit)]))
            })
        }),
        ("the source does not hear a refusal after its commit", {
            mistaken!((Source, Phase::Commit, Event::Heard(Said::Refused)) => None)
        }),
        ("the source stays paused when the last round fails", {
            mistaken!((Source, Phase::LastRound, Event::Failed) => {
                Some((Phase::Returned, &[Effect::Say(Said::Abort)]))
            })
        }),
        ("the target refuses when it already has the machine", {
            mistaken!((Target, Phase::Release, Event::Cancel) => {
                Some((Phase::Dropped, &[Effect::Say(Said::Refused)]))
            })
        }),
        ("the target says that it has the machine before it runs, and then refuses", {
            mistaken!((Target, Phase::Ready, Event::Heard(Said::Commit)) => {
                Some((Phase::Release, &[Effect::Say(Said::Released), Effect::Run]))
            })
        }),
    ];
    for (what, table) in mistakes {
        for course in [Course::Copied, Course::Owing] {
            assert!(walk(table, course, false).is_err(), "not caught: {what}, {course:?}");
        }
    }
}

#[test]
fn every_broken_rule_of_ends_that_are_held_is_caught() {
    use Side::{Source, Target};
    let mistakes: [(&str, Table); 3] = [
        ("the source resumes when the link breaks after it was told to give up", {
            mistaken!((Source, Phase::Commit, Event::Lost) => Some((Phase::Returned, &[Effect::Resume])))
        }),
        ("the source runs on when it is told to give up", {
            mistaken!((Source, Phase::Ready, Event::Commit) => Some((Phase::Commit, &[Effect::Resume])))
        }),
        ("the target runs before it is told", {
            mistaken!((Target, Phase::State, Event::Done) => Some((Phase::Release, &[Effect::Run])))
        }),
    ];
    for (what, table) in mistakes {
        for course in [Course::Copied, Course::Owing] {
            assert!(walk(table, course, true).is_err(), "not caught: {what}, {course:?}");
        }
    }
}

#[test]
fn every_broken_rule_of_what_is_owed_is_caught() {
    use Side::{Source, Target};
    let mistakes: [(&str, Table); 5] = [
        ("the source lets go of memory as soon as the target runs", {
            mistaken!((Source, Phase::Commit, Event::Heard(Said::Released)) => Some((Phase::Moved, &[])))
        }),
        ("the source takes a link that broke for the end of it", {
            mistaken!((Source, Phase::Owing, Event::Lost) => Some((Phase::Moved, &[])))
        }),
        ("the source runs on when it is cancelled while it owes", {
            mistaken!((Source, Phase::Owing, Event::Cancel) => Some((Phase::Returned, &[Effect::Resume])))
        }),
        ("the target does not care for what is owed", {
            mistaken!((Target, Phase::Owing, Event::Done) => None)
        }),
        ("the source runs on when the link breaks while it owes", {
            mistaken!((Source, Phase::Owing, Event::Lost) => Some((Phase::Returned, &[Effect::Resume])))
        }),
    ];
    for (what, table) in mistakes {
        for held in [false, true] {
            assert!(walk(table, Course::Owing, held).is_err(), "not caught: {what}, held: {held}");
        }
    }
}
