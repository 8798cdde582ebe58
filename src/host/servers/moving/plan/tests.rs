//! Every order of everything that can happen to two ends, walked through: words delivered or cut off with their
//! connection, each daemon dead between any two effects, each end failing at any time, and operators who look before they
//! vouch.
use std::collections::{HashMap, HashSet, VecDeque};

use super::*;

type Table = fn(Side, Phase, Event) -> Option<(Phase, &'static [Effect])>;

/// When the phase is written.
#[derive(Clone, Copy, PartialEq)]
enum Save {
    Before,
    /// The mistake: after the effects.
    After,
}

/// Whose the server is, as an end's records say: what it would run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Has {
    Whole,
    Part,
    Nothing,
}

/// One end: what is saved, and what lives in the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct End {
    saved: Phase,
    alive: bool,
    /// What the daemon believes; differs from `saved` only with the planted mistake.
    phase: Phase,
    to_do: VecDeque<Effect>,
    lost: bool,
    /// What it has of the server, and whether it may start it.
    has: Has,
    may_run: bool,
    forgotten: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    ends: [End; 2],
    connected: bool,
    /// Whether all was sent, on this connection.
    sent: bool,
    /// To the source, to the target.
    in_flight: [VecDeque<Event>; 2],
    /// How much may still go wrong, so that the walk ends.
    crashes: u8,
    cuts: u8,
    failures: u8,
    /// How often an operator may still vouch, who has looked at the other end.
    vouches: u8,
}

const SIDES: [Side; 2] = [Side::Source, Side::Target];

/// Whether whoever has the server may start it in this phase.
fn may_run(side: Side, phase: Phase) -> bool {
    matches!((side, phase), (Side::Source, Phase::Returned) | (Side::Target, Phase::Moved))
}

impl World {
    fn new(faults: u8) -> World {
        let end = |has| End {
            saved: Phase::Copy,
            alive: true,
            phase: Phase::Copy,
            to_do: VecDeque::new(),
            lost: false,
            has,
            may_run: false,
            forgotten: false,
        };
        World {
            ends: [end(Has::Whole), end(Has::Part)],
            connected: true,
            sent: false,
            in_flight: [VecDeque::new(), VecDeque::new()],
            crashes: faults,
            cuts: faults,
            failures: 1,
            vouches: faults.min(1),
        }
    }

    fn save(&mut self, at: usize) {
        let end = &mut self.ends[at];
        end.saved = end.phase;
        end.may_run = may_run(SIDES[at], end.saved);
    }

    fn give(&mut self, table: Table, save: Save, at: usize, event: Event) {
        if self.ends[at].forgotten {
            // There is no record: it cannot say more than that.
            if matches!((SIDES[at], event), (Side::Target, Event::Asked | Event::Heard(_))) && self.connected
            {
                self.in_flight[1 - at].push_back(Event::Heard(Word::Unknown));
            }
            return;
        }
        let Some((next, effects)) = table(SIDES[at], self.ends[at].phase, event) else { return };
        self.ends[at].phase = next;
        if save == Save::Before {
            self.save(at);
        }
        for effect in effects {
            // What is done to records is saved with the phase.
            match (save, effect) {
                (Save::After, _) | (_, Effect::Say(_)) => self.ends[at].to_do.push_back(*effect),
                (Save::Before, _) => self.act(at, *effect),
            }
        }
    }

    fn act(&mut self, at: usize, effect: Effect) {
        match effect {
            Effect::Say(word) if self.connected => self.in_flight[1 - at].push_back(Event::Heard(word)),
            Effect::Remove => self.ends[at].has = Has::Nothing,
            Effect::Keep => {
                let end = &mut self.ends[at];
                end.may_run = true;
                if end.has == Has::Part {
                    end.has = Has::Whole;
                }
            }
            Effect::Forget => self.ends[at].forgotten = true,
            _ => {}
        }
    }

    /// What arrived before may still be read, so it stays until its reader has read or lost it.
    fn cut(&mut self) {
        (self.connected, self.sent) = (false, true);
        for end in &mut self.ends {
            end.lost = end.alive;
        }
    }

    fn both_have_it(&self) -> bool {
        self.ends.iter().all(|end| end.may_run && end.has != Has::Nothing)
    }

    /// Everything that can happen next. Without faults only what must happen in the end.
    fn next(&self, table: Table, save: Save, faults: bool) -> Vec<World> {
        let mut all = Vec::new();
        let mut add = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            all.push(world);
        };
        for at in 0..2 {
            let end = &self.ends[at];
            if !end.alive {
                add(&|world| {
                    let end = &mut world.ends[at];
                    (end.alive, end.phase, end.lost) = (true, end.saved, false);
                    world.give(table, save, at, Event::Restarted);
                });
                continue;
            }
            if faults && self.crashes > 0 {
                add(&|world| {
                    world.crashes -= 1;
                    world.cut();
                    let end = &mut world.ends[at];
                    (end.alive, end.lost) = (false, false);
                    end.to_do.clear();
                    world.in_flight[at].clear();
                });
            }
            if !end.to_do.is_empty() {
                add(&|world| {
                    if let Some(effect) = world.ends[at].to_do.pop_front() {
                        world.act(at, effect);
                    }
                });
                continue;
            }
            if end.saved != end.phase {
                add(&|world| world.save(at));
                continue;
            }
            if faults && self.failures > 0 {
                for event in [Event::Failed, Event::Cancel] {
                    add(&|world| {
                        world.failures -= 1;
                        world.give(table, save, at, event);
                    });
                }
            }
            if end.lost && !self.in_flight[at].is_empty() {
                add(&|world| world.in_flight[at].clear());
            }
            if end.lost && self.in_flight[at].is_empty() {
                add(&|world| {
                    world.ends[at].lost = false;
                    world.give(table, save, at, Event::Lost);
                });
            } else if let Some(event) = self.in_flight[at].front().copied() {
                add(&|world| {
                    world.in_flight[at].pop_front();
                    world.give(table, save, at, event);
                });
            }
        }
        let [source, target] = &self.ends;
        if self.connected
            && !self.sent
            && source.phase == Phase::Copy
            && target.alive
            && target.phase == Phase::Copy
        {
            add(&|world| {
                world.sent = true;
                world.ends[1].has = Has::Whole;
                world.give(table, save, 1, Event::Done);
            });
        }
        if faults && self.connected && self.cuts > 0 {
            add(&|world| {
                world.cuts -= 1;
                world.cut();
            });
        }
        // Nobody vouches for a host that may still go on to something else.
        let owner = match (source.saved, target.saved) {
            (Phase::Commit, Phase::Ready | Phase::Moved) => Some((0, Owner::There)),
            (Phase::Commit, Phase::Dropped) => Some((0, Owner::Here)),
            _ => None,
        };
        let target_owner = match (source.saved, target.saved) {
            (Phase::Commit | Phase::Moved, Phase::Ready) => Some((1, Owner::Here)),
            (Phase::Returned, Phase::Ready) => Some((1, Owner::There)),
            _ => None,
        };
        if faults && self.vouches > 0 && !self.connected {
            for (at, owner) in owner.into_iter().chain(target_owner) {
                if self.ends[at].alive && self.ends[at].to_do.is_empty() {
                    add(&|world| {
                        world.vouches -= 1;
                        world.give(table, save, at, Event::Settled(owner));
                    });
                }
            }
        }
        // The source connects anew, and asks, for as long as it has a record.
        let asks = matches!(source.phase, Phase::Commit | Phase::Returned | Phase::Moved);
        let wants = !source.forgotten && asks;
        if !self.connected
            && wants
            && source.to_do.is_empty()
            && self.ends.iter().all(|end| end.alive && !end.lost)
        {
            add(&|world| {
                world.connected = true;
                world.in_flight = [VecDeque::new(), VecDeque::from([Event::Asked])];
            });
        }
        all
    }
}

/// Walks everything that can happen. Answers how many worlds there are, or the first in which both may run it, or one that
/// comes to rest otherwise than with exactly one that has it.
fn walk(table: Table, save: Save, faults: u8) -> Result<usize, Box<World>> {
    let first = World::new(faults);
    let mut seen = HashSet::from([first.clone()]);
    let mut ahead = vec![first];
    while let Some(world) = ahead.pop() {
        if world.both_have_it() {
            return Err(Box::new(world));
        }
        for next in world.next(table, save, true) {
            if seen.insert(next.clone()) {
                ahead.push(next);
            }
        }
    }
    // From wherever the faults left it, whatever order the rest takes.
    let mut rests: HashMap<World, bool> = HashMap::new();
    for world in &seen {
        if !settles(world, table, save, &mut rests) {
            return Err(Box::new(world.clone()));
        }
    }
    Ok(seen.len())
}

/// Whether without further faults every order ends, with exactly one end that has the server and may run it.
fn settles(world: &World, table: Table, save: Save, rests: &mut HashMap<World, bool>) -> bool {
    let mut calm = world.clone();
    (calm.crashes, calm.cuts, calm.failures, calm.vouches) = (0, 0, 0, 0);
    if let Some(known) = rests.get(&calm) {
        return *known;
    }
    // A world that comes back to itself does not end.
    rests.insert(calm.clone(), false);
    let next = calm.next(table, save, false);
    let good = if next.is_empty() {
        let [source, target] = &calm.ends;
        match (source.saved, target.saved) {
            (Phase::Moved, Phase::Moved) => target.has == Has::Whole && source.has == Has::Nothing,
            (Phase::Returned, Phase::Dropped) => source.has == Has::Whole && target.has == Has::Nothing,
            _ => false,
        }
    } else {
        next.iter().all(|world| settles(world, table, save, rests))
    };
    rests.insert(calm, good);
    good
}

#[test]
fn at_most_one_has_it_always_and_exactly_one_in_the_end() {
    for faults in 0..=2 {
        match walk(step, Save::Before, faults) {
            Ok(worlds) => println!("{faults} crashes, {faults} cuts: {worlds} worlds"),
            Err(world) => panic!("{world:#?}"),
        }
    }
}

#[test]
fn a_source_that_takes_back_what_it_committed_is_found() {
    fn broken(side: Side, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
        match (side, phase, event) {
            (Side::Source, Phase::Commit, Event::Lost | Event::Restarted) => {
                Some((Phase::Returned, &[Effect::Keep]))
            }
            _ => step(side, phase, event),
        }
    }
    let world = walk(broken, Save::Before, 1).unwrap_err();
    assert!(world.both_have_it(), "{world:#?}");
}

#[test]
fn a_target_that_takes_before_it_hears_the_commit_is_found() {
    fn broken(side: Side, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
        match (side, phase, event) {
            (Side::Target, Phase::Ready, Event::Lost) => Some((Phase::Moved, &[Effect::Keep])),
            _ => step(side, phase, event),
        }
    }
    let world = walk(broken, Save::Before, 1).unwrap_err();
    assert!(world.both_have_it(), "{world:#?}");
}

#[test]
fn a_target_that_drops_what_it_promised_is_found() {
    fn broken(side: Side, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
        match (side, phase, event) {
            (Side::Target, Phase::Ready, Event::Restarted) => {
                Some((Phase::Dropped, &[Effect::Remove, Effect::Forget]))
            }
            _ => step(side, phase, event),
        }
    }
    assert!(walk(broken, Save::Before, 1).is_err());
}

#[test]
fn an_operators_word_that_the_other_end_never_hears_is_found() {
    fn broken(side: Side, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
        match (side, phase, event) {
            (Side::Source, Phase::Commit, Event::Settled(Owner::There)) => {
                Some((Phase::Moved, &[Effect::Remove, Effect::Forget]))
            }
            _ => step(side, phase, event),
        }
    }
    let world = walk(broken, Save::Before, 1).unwrap_err();
    assert_eq!((world.ends[0].saved, world.ends[1].saved), (Phase::Moved, Phase::Ready), "{world:#?}");
}

#[test]
fn two_that_have_it_are_told() {
    let (next, effects) = step(Side::Source, Phase::Returned, Event::Heard(Word::Taken)).unwrap();
    assert_eq!((next, effects), (Phase::Returned, &[Effect::Clash, Effect::Forget][..]));
}

#[test]
fn phases_saved_after_their_effects_are_found() {
    let world = walk(step, Save::After, 1).unwrap_err();
    assert!(world.both_have_it(), "{world:#?}");
}

#[test]
fn who_is_in_doubt_is_moved_by_proof_only() {
    let unproved = [Event::Lost, Event::Restarted, Event::Cancel, Event::Failed, Event::Heard(Word::Unknown)];
    for event in unproved {
        let next = step(Side::Source, Phase::Commit, event).map(|(next, _)| next);
        assert!(next.is_none_or(|next| next == Phase::Commit), "{event:?}");
        let next = step(Side::Target, Phase::Ready, event).map(|(next, _)| next);
        assert!(next.is_none_or(|next| next == Phase::Ready), "{event:?}");
    }
    assert_eq!(step(Side::Source, Phase::Commit, Event::Settled(Owner::Here)).unwrap().0, Phase::Returned);
    assert_eq!(step(Side::Source, Phase::Commit, Event::Settled(Owner::There)).unwrap().0, Phase::Moved);
    assert_eq!(step(Side::Target, Phase::Ready, Event::Settled(Owner::Here)).unwrap().0, Phase::Moved);
    assert_eq!(step(Side::Target, Phase::Ready, Event::Settled(Owner::There)).unwrap().0, Phase::Dropped);
    for (side, phase) in
        [(Side::Source, Phase::Copy), (Side::Source, Phase::Moved), (Side::Target, Phase::Moved)]
    {
        assert_eq!(step(side, phase, Event::Settled(Owner::Here)), None);
    }
}
