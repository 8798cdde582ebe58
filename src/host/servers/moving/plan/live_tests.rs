//! The same table with a machine inside: two VMMs that stand still, promise, arrive, return by themselves and die, and two
//! daemons that die between any two things they do to them. Every order is walked through.
use std::collections::{HashMap, HashSet, VecDeque};

use super::*;

type Table = fn(Side, Phase, Event) -> Option<(Phase, &'static [Effect])>;

/// What the daemons do around the table. Each may be done wrongly, to see that it is found.
#[derive(Clone, Copy)]
struct Rules {
    table: Table,
    /// The source's VMM promises before its daemon saves the commit.
    promises_first: bool,
    /// The target's VMM runs only when its daemon has saved `moved`.
    runs_last: bool,
    /// A VMM that has promised returns only when it is told.
    keeps_promise: bool,
    /// A target whose VMM died before it ran takes what is given to it.
    takes_what_is_given: bool,
    /// A VMM that has promised does not mind what the other one says.
    minds_its_daemon: bool,
    /// A target says that it has a machine only when it has all of its memory.
    says_holding: bool,
    /// A source tells the target when what it owed is lost.
    tells_loss: bool,
}

const RIGHT: Rules = Rules {
    table: step,
    promises_first: true,
    runs_last: true,
    keeps_promise: true,
    takes_what_is_given: true,
    minds_its_daemon: true,
    says_holding: true,
    tells_loss: true,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Vmm {
    /// The source's before it is stopped, or after it has returned; the target's once it is let run.
    Runs,
    /// Stopped by itself, and may go on by itself.
    Still,
    /// The source's: goes on only when it is told.
    Promised,
    /// The target's: not all is here.
    Comes,
    /// The target's: could run.
    Ready,
    Dead,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct End {
    phase: Phase,
    alive: bool,
    vmm: Vmm,
    /// Its daemon knows that it is dead.
    is_seen_dead: bool,
    to_say: VecDeque<Word>,
    lost: bool,
    forgotten: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    ends: [End; 2],
    connected: bool,
    /// The VMMs' own streams, which go with the daemons' connection.
    streams: bool,
    /// The source's VMM has returned: this move takes nothing from it any more.
    returned: bool,
    /// The target's guest has run.
    has_run: bool,
    /// Some of its memory follows the machine, and is not all there.
    is_owed: bool,
    /// The source's daemon looks after what it owes, on this connection.
    is_held: bool,
    /// What was removed at the source was needed still, by no fault of its VMM's.
    is_robbed: bool,
    /// The source's daemon has had the promise, and is about to save the commit.
    is_promised: bool,
    in_flight: [VecDeque<Event>; 2],
    crashes: u8,
    cuts: u8,
    deaths: u8,
    cancels: u8,
    /// How often an operator may vouch, who has looked at the other end.
    vouches: u8,
    /// One has.
    is_vouched: bool,
}

const SIDES: [Side; 2] = [Side::Source, Side::Target];

impl World {
    fn new(faults: u8, owes: bool) -> World {
        let end = |vmm| End {
            phase: Phase::Copy,
            alive: true,
            vmm,
            is_seen_dead: false,
            to_say: VecDeque::new(),
            lost: false,
            forgotten: false,
        };
        World {
            ends: [end(Vmm::Runs), end(Vmm::Comes)],
            connected: true,
            streams: true,
            returned: false,
            has_run: false,
            is_owed: owes,
            is_held: false,
            is_robbed: false,
            is_promised: false,
            in_flight: [VecDeque::new(), VecDeque::new()],
            crashes: faults,
            cuts: faults,
            deaths: faults,
            cancels: faults.min(1),
            vouches: faults.min(1),
            is_vouched: false,
        }
    }

    fn give(&mut self, rules: Rules, at: usize, event: Event) {
        if self.ends[at].forgotten {
            if matches!((SIDES[at], event), (Side::Target, Event::Asked | Event::Heard(_))) && self.connected
            {
                self.in_flight[1 - at].push_back(Event::Heard(Word::Unknown));
            }
            return;
        }
        let is_gone = SIDES[at] == Side::Target && self.ends[at].is_seen_dead && !rules.takes_what_is_given;
        if is_gone && (self.ends[at].phase, event) == (Phase::Ready, Event::Heard(Word::Commit)) {
            self.ends[at].phase = Phase::Dropped;
            self.ends[at].to_say.push_back(Word::Dropped);
            return;
        }
        let Some((next, effects)) = (rules.table)(SIDES[at], self.ends[at].phase, event) else { return };
        self.ends[at].phase = next;
        for effect in effects {
            match effect {
                Effect::Say(word) => {
                    let is_owed = at == 1 && self.waits() && rules.says_holding;
                    self.ends[at].to_say.push_back(said(*word, is_owed));
                }
                Effect::Forget => self.ends[at].forgotten = true,
                _ => {}
            }
        }
    }

    /// Whether the target's machine, or the one that is to run there, lacks memory that the source has.
    fn waits(&self) -> bool {
        self.is_owed && self.ends[1].vmm != Vmm::Dead
    }

    /// The target's machine has all of its memory, of which its daemon tells whoever it talks with.
    fn is_whole(&mut self) {
        let tells = self.is_owed && self.connected && self.ends[1].alive;
        if tells && self.ends[1].phase == Phase::Moved {
            self.ends[1].to_say.push_back(Word::Taken);
        }
        self.is_owed = false;
    }

    fn cut(&mut self) {
        (self.connected, self.streams, self.is_held) = (false, false, false);
        self.ends.iter_mut().for_each(|end| end.lost = end.alive);
    }

    fn next(&self, rules: Rules, faults: bool) -> Vec<World> {
        let mut all = Vec::new();
        let mut add = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            all.push(world);
        };
        let [source, target] = &self.ends;
        // The VMMs by themselves.
        if self.streams && source.vmm == Vmm::Runs && !self.returned && source.phase == Phase::Copy {
            add(&|world| world.ends[0].vmm = Vmm::Still);
        }
        if self.streams && source.vmm == Vmm::Still && target.vmm == Vmm::Comes {
            add(&|world| world.ends[1].vmm = Vmm::Ready);
        }
        let may_return = source.vmm == Vmm::Still || source.vmm == Vmm::Promised && !rules.keeps_promise;
        if may_return && (faults || !self.streams) {
            add(&|world| (world.ends[0].vmm, world.returned) = (Vmm::Runs, true));
        }
        for at in 0..2 {
            let end = &self.ends[at];
            if faults && self.deaths > 0 && end.vmm != Vmm::Dead {
                add(&|world| {
                    world.deaths -= 1;
                    (world.ends[at].vmm, world.streams) = (Vmm::Dead, false);
                });
            }
            if !end.alive {
                add(&|world| {
                    let end = &mut world.ends[at];
                    (end.alive, end.lost, end.is_seen_dead) = (true, false, end.vmm == Vmm::Dead);
                    world.give(rules, at, Event::Restarted);
                });
                continue;
            }
            if faults && self.crashes > 0 {
                add(&|world| {
                    world.crashes -= 1;
                    world.cut();
                    world.is_promised &= at != 0;
                    let end = &mut world.ends[at];
                    (end.alive, end.lost) = (false, false);
                    end.to_say.clear();
                    world.in_flight[at].clear();
                });
            }
            if let Some(word) = end.to_say.front().copied() {
                add(&|world| {
                    world.ends[at].to_say.pop_front();
                    if world.connected {
                        world.in_flight[1 - at].push_back(Event::Heard(word));
                    }
                });
                continue;
            }
            if end.vmm == Vmm::Dead && !end.is_seen_dead {
                add(&|world| world.ends[at].is_seen_dead = true);
            }
            if end.is_seen_dead && end.phase == Phase::Copy {
                add(&|world| world.give(rules, at, Event::Failed));
            }
            if faults && self.cancels > 0 {
                add(&|world| {
                    world.cancels -= 1;
                    world.give(rules, at, Event::Cancel);
                });
            }
            if end.lost && !self.in_flight[at].is_empty() {
                add(&|world| world.in_flight[at].clear());
            }
            if end.lost && self.in_flight[at].is_empty() {
                add(&|world| {
                    world.ends[at].lost = false;
                    world.give(rules, at, Event::Lost);
                });
            } else if let Some(event) = self.in_flight[at].front().copied() {
                add(&|world| {
                    world.in_flight[at].pop_front();
                    world.hear(rules, at, event);
                });
            }
        }
        if source.alive && self.is_promised {
            add(&|world| {
                world.is_promised = false;
                world.give(rules, 0, Event::Heard(Word::Ready));
            });
        }
        // A move whose VMMs come to nothing fails.
        let is_over = self.returned || !self.streams;
        if source.alive && source.phase == Phase::Copy && is_over && !self.is_promised {
            add(&|world| world.give(rules, 0, Event::Failed));
        }
        if target.alive && target.phase == Phase::Copy && target.vmm == Vmm::Comes && !self.streams {
            add(&|world| world.give(rules, 1, Event::Failed));
        }
        if target.alive && target.phase == Phase::Copy && target.vmm == Vmm::Ready {
            add(&|world| world.give(rules, 1, Event::Done));
        }
        if source.alive && self.is_held && source.vmm == Vmm::Dead && rules.tells_loss {
            add(&|world| {
                world.is_held = false;
                world.ends[0].to_say.push_back(Word::Lost);
            });
        }
        // What the daemons tell the VMMs once it is saved, again until it is done.
        if source.alive && source.phase == Phase::Returned && matches!(source.vmm, Vmm::Still | Vmm::Promised)
        {
            add(&|world| (world.ends[0].vmm, world.returned) = (Vmm::Runs, true));
        }
        if source.alive && source.phase == Phase::Moved && source.vmm != Vmm::Dead {
            add(&|world| {
                world.ends[0].vmm = Vmm::Dead;
                world.is_robbed |= world.waits() && !world.is_vouched;
            });
        }
        // What is owed comes over the streams; the target's daemon tells of the end, if it is there and talks with the source.
        if self.streams && self.is_owed && target.vmm == Vmm::Runs && source.vmm != Vmm::Dead {
            add(&World::is_whole);
        }
        let may_run = target.phase == Phase::Moved || target.phase == Phase::Ready && !rules.runs_last;
        if target.alive && may_run && target.vmm == Vmm::Ready {
            add(&|world| (world.ends[1].vmm, world.has_run) = (Vmm::Runs, true));
        }
        if target.alive && target.phase == Phase::Dropped && target.vmm != Vmm::Dead {
            add(&|world| world.ends[1].vmm = Vmm::Dead);
        }
        // A machine that died is followed by another where the server is.
        if source.alive && source.phase == Phase::Returned && source.is_seen_dead && source.vmm == Vmm::Dead {
            add(&|world| world.ends[0].vmm = Vmm::Runs);
        }
        if target.alive && target.phase == Phase::Moved && target.is_seen_dead && target.vmm == Vmm::Dead {
            add(&|world| {
                (world.ends[1].vmm, world.has_run) = (Vmm::Runs, true);
                // From its disks.
                world.is_whole();
            });
        }
        if faults && self.connected && self.cuts > 0 {
            add(&|world| {
                world.cuts -= 1;
                world.cut();
            });
        }
        // Nobody vouches for a host that may still go on to something else.
        let at_source = match (source.phase, target.phase) {
            (Phase::Commit, Phase::Ready | Phase::Moved) => Some((0, Owner::There)),
            (Phase::Commit, Phase::Dropped) => Some((0, Owner::Here)),
            _ => None,
        };
        let at_target = match (source.phase, target.phase) {
            (Phase::Commit | Phase::Moved, Phase::Ready) => Some((1, Owner::Here)),
            (Phase::Returned, Phase::Ready) => Some((1, Owner::There)),
            _ => None,
        };
        if faults && self.vouches > 0 && !self.connected {
            for (at, owner) in at_source.into_iter().chain(at_target) {
                if self.ends[at].alive && self.ends[at].to_say.is_empty() {
                    add(&|world| {
                        world.vouches -= 1;
                        world.is_vouched = true;
                        world.give(rules, at, Event::Settled(owner));
                    });
                }
            }
        }
        // The target's VMM may say anything to the source's.
        if faults && self.streams && source.vmm == Vmm::Promised && !rules.minds_its_daemon {
            add(&|world| (world.ends[0].vmm, world.returned) = (Vmm::Runs, true));
        }
        let asks = matches!(source.phase, Phase::Commit | Phase::Returned | Phase::Moved);
        let is_quiet = self.ends.iter().all(|end| end.alive && !end.lost && end.to_say.is_empty());
        if !self.connected && asks && !source.forgotten && is_quiet {
            add(&|world| {
                world.connected = true;
                world.in_flight = [VecDeque::new(), VecDeque::from([Event::Asked])];
            });
        }
        all
    }

    /// A source that hears that all is there asks its VMM to promise, and saves the commit after that.
    fn hear(&mut self, rules: Rules, at: usize, event: Event) {
        match (at, event) {
            (0, Event::Heard(Word::Holding)) if self.ends[0].phase == Phase::Commit => {
                self.is_held = true;
                // New ones, in the place of those that broke.
                self.streams |= self.ends.iter().all(|end| end.vmm != Vmm::Dead);
            }
            (1, Event::Heard(Word::Lost)) if self.waits() => self.ends[1].vmm = Vmm::Dead,
            _ => {}
        }
        let is_offer = (at, event, self.ends[0].phase) == (0, Event::Heard(Word::Ready), Phase::Copy);
        if !is_offer || !rules.promises_first {
            return self.give(rules, at, event);
        }
        match self.ends[0].vmm {
            Vmm::Still => (self.ends[0].vmm, self.is_promised) = (Vmm::Promised, true),
            _ => self.give(rules, 0, Event::Failed),
        }
    }

    fn broken(&self) -> Option<&'static str> {
        let source_runs = self.ends[0].vmm == Vmm::Runs;
        match () {
            () if source_runs && self.has_run => Some("the source runs after the target has run"),
            () if self.is_robbed => Some("memory that was owed was removed"),
            () => None,
        }
    }

    fn ends_well(&self) -> bool {
        let [source, target] = &self.ends;
        match (source.phase, target.phase) {
            (Phase::Moved, Phase::Moved) => {
                target.vmm == Vmm::Runs && source.vmm == Vmm::Dead && !self.is_owed
            }
            (Phase::Returned, Phase::Dropped) => source.vmm == Vmm::Runs && target.vmm == Vmm::Dead,
            _ => false,
        }
    }
}

/// Walks everything that can happen; answers how many worlds there are, or the first that is wrong.
fn walk(rules: Rules, faults: u8, owes: bool) -> Result<usize, String> {
    let first = World::new(faults, owes);
    let mut seen = HashSet::from([first.clone()]);
    let mut ahead = vec![first];
    while let Some(world) = ahead.pop() {
        if let Some(what) = world.broken() {
            return Err(format!("{what}: {world:#?}"));
        }
        for next in world.next(rules, true) {
            if seen.insert(next.clone()) {
                ahead.push(next);
            }
        }
    }
    let mut rests = HashMap::new();
    match seen.iter().find(|world| !settles(world, rules, &mut rests)) {
        Some(world) => Err(format!("does not end well: {world:#?}")),
        None => Ok(seen.len()),
    }
}

/// Whether every order of what is left ends well, once nothing more goes wrong.
fn settles(world: &World, rules: Rules, rests: &mut HashMap<World, bool>) -> bool {
    let mut calm = world.clone();
    (calm.crashes, calm.cuts, calm.deaths, calm.cancels, calm.vouches) = (0, 0, 0, 0, 0);
    if let Some(known) = rests.get(&calm) {
        return *known;
    }
    // One that comes back to itself does not end.
    rests.insert(calm.clone(), false);
    let next = calm.next(rules, false);
    let good = match next.is_empty() {
        true => calm.ends_well(),
        false => next.iter().all(|world| settles(world, rules, rests)),
    };
    rests.insert(calm, good);
    good
}

#[test]
fn one_machine_runs_whatever_dies_and_never_two() {
    for (faults, owes) in [(0, false), (1, false), (0, true), (1, true)] {
        match walk(RIGHT, faults, owes) {
            Ok(worlds) => println!("{faults} of each fault, memory owed {owes}: {worlds} worlds"),
            Err(what) => panic!("{what}"),
        }
    }
}

#[test]
fn every_broken_rule_is_found() {
    fn takes_back(side: Side, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
        match (side, phase, event) {
            (Side::Source, Phase::Commit, Event::Restarted) => Some((Phase::Returned, &[Effect::Keep])),
            _ => step(side, phase, event),
        }
    }
    fn refuses_late(side: Side, phase: Phase, event: Event) -> Option<(Phase, &'static [Effect])> {
        match (side, phase, event) {
            (Side::Target, Phase::Moved, Event::Asked) => {
                Some((Phase::Dropped, &[Effect::Remove, Effect::Say(Word::Dropped)]))
            }
            _ => step(side, phase, event),
        }
    }
    let mistakes = [
        ("no promise before the commit", Rules { promises_first: false, ..RIGHT }),
        ("a promise that is not kept", Rules { keeps_promise: false, ..RIGHT }),
        ("a target that runs before it has it", Rules { runs_last: false, ..RIGHT }),
        ("a source that takes back what it committed", Rules { table: takes_back, ..RIGHT }),
        ("a target that refuses what it has", Rules { table: refuses_late, ..RIGHT }),
        ("a source's VMM that heeds the target's", Rules { minds_its_daemon: false, ..RIGHT }),
        // The source may have removed what it had by then, on an operator's word.
        ("a target that refuses what it is given", Rules { takes_what_is_given: false, ..RIGHT }),
    ];
    for (what, rules) in mistakes {
        assert!(walk(rules, 1, false).is_err(), "not found: {what}");
    }
    let mistakes_of_owing = [
        ("a target that says it has what it lacks", Rules { says_holding: false, ..RIGHT }),
        ("a source that does not tell what is lost", Rules { tells_loss: false, ..RIGHT }),
    ];
    for (what, rules) in mistakes_of_owing {
        assert!(walk(rules, 1, true).is_err(), "not found: {what}");
    }
}
