//! The table against a model of two VMMs, the stream between them and a daemon: every order of their steps, with either VMM dead,
//! the daemon gone and one that answers nothing at every point. Never do both run the machine, and it lives wherever one of them
//! could have kept it.
use std::collections::{HashSet, VecDeque};

use super::*;

/// What a source does, as `vmm`'s phase table has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Source {
    Runs,
    /// A handover was begun; the guest runs still.
    Begun,
    /// It stands still, and what it is has been sent.
    Sent,
    Commit,
    Moved,
    /// It runs on, after it has said so.
    Returned,
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Target {
    Shell,
    Waits,
    Ready,
    /// It has said so and does not run yet.
    Release,
    Moved,
    Dropped,
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Word {
    State,
    Ready,
    Commit,
    Released,
    Refused,
    Abort,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    target: Target,
    source_in_doubt: bool,
    target_in_doubt: bool,
    to_target: Vec<Word>,
    to_source: Vec<Word>,
    /// Whether the target has ever run the machine.
    target_ran: bool,
    has_told: bool,
    has_aborted: bool,
    /// Whether a daemon that had waited long enough has ended the target.
    has_killed: bool,
    /// What they have said to whoever listens, before they did it.
    source_said: bool,
    target_said: bool,
    /// Whether the daemon that is there has heard everything that could matter of each.
    hears_source: bool,
    hears_target: bool,
    patience: Patience,
    /// What it has seen, of one after the other, and is about to act on.
    seen: (Option<Old>, Option<Next>),
    crashes: u8,
    deaths: u8,
    mutes: u8,
    /// What it came to.
    end: Option<Deed>,
}

/// What the model may do.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    crashes: u8,
    deaths: u8,
    mutes: u8,
    longest: Patience,
}

type Rule = fn(Old, Next, Patience) -> Deed;

impl World {
    fn new() -> World {
        World {
            source: Source::Runs,
            target: Target::Shell,
            source_in_doubt: false,
            target_in_doubt: false,
            to_target: Vec::new(),
            to_source: Vec::new(),
            target_ran: false,
            has_told: false,
            has_aborted: false,
            has_killed: false,
            source_said: false,
            target_said: false,
            hears_source: false,
            hears_target: false,
            patience: Patience::Fresh,
            seen: (None, None),
            crashes: 0,
            deaths: 0,
            mutes: 0,
            end: None,
        }
    }

    fn source_runs(&self) -> bool {
        matches!(self.source, Source::Runs | Source::Begun | Source::Returned)
    }

    fn target_runs(&self) -> bool {
        self.target == Target::Moved
    }

    fn last(heard: bool, said: bool) -> Last {
        if heard && !said { Last::Silent } else { Last::Unheard }
    }

    /// Looking at one that has not come to run the machine is to hear it from then on.
    fn look_at_source(&mut self) {
        self.hears_source |= matches!(self.source, Source::Begun | Source::Sent | Source::Commit);
        self.seen.0 = Some(self.views().0);
    }

    fn look_at_target(&mut self) {
        self.hears_target |= matches!(self.target, Target::Shell | Target::Waits | Target::Ready);
        self.seen.1 = Some(self.views().1);
    }

    fn views(&self) -> (Old, Next) {
        let old = match self.source {
            Source::Runs | Source::Returned => Old::Keeps,
            Source::Begun | Source::Sent => Old::Gives,
            Source::Commit => Old::Gave { in_doubt: self.source_in_doubt },
            Source::Moved => Old::Rid,
            Source::Dead => Old::Dead(World::last(self.hears_source, self.source_said)),
        };
        let next = match self.target {
            Target::Shell => Next::Shell,
            Target::Waits => Next::Builds,
            Target::Ready => Next::Ready { in_doubt: self.target_in_doubt },
            Target::Release => Next::Takes,
            Target::Moved => Next::Has,
            Target::Dropped => Next::Dropped,
            Target::Dead => Next::Dead(World::last(self.hears_target, self.target_said)),
        };
        (old, next)
    }

    fn with(&self, change: impl FnOnce(&mut World)) -> World {
        let mut world = self.clone();
        change(&mut world);
        world
    }

    fn release(&mut self) {
        (self.target, self.target_said) = (Target::Release, true);
    }

    fn give_back(&mut self) {
        (self.source, self.source_said) = (Source::Returned, true);
    }

    /// What the VMMs may do next.
    fn vmms(&self, all: &mut Vec<World>) {
        match self.source {
            Source::Begun => all.push(self.with(|it| {
                it.source = Source::Sent;
                it.to_target.push(Word::State);
            })),
            // It runs for a moment before the target is told.
            Source::Returned if !self.has_aborted => all.push(self.with(|it| {
                it.has_aborted = true;
                it.to_target.push(Word::Abort);
            })),
            // It fails, or its guest ends the standstill.
            Source::Sent => all.push(self.with(World::give_back)),
            _ => {}
        }
        match self.target {
            Target::Release => {
                all.push(self.with(|it| (it.target, it.target_ran) = (Target::Moved, true)));
                all.push(self.with(|it| {
                    it.target = Target::Dropped;
                    it.to_source.push(Word::Refused);
                }));
            }
            // It runs for a moment before the source is told.
            Target::Moved if !self.has_told => all.push(self.with(|it| {
                it.has_told = true;
                it.to_source.push(Word::Released);
            })),
            Target::Waits => all.push(self.with(|it| {
                it.target = Target::Dropped;
                it.to_source.push(Word::Refused);
            })),
            _ => {}
        }
        if self.target != Target::Dead && !self.to_target.is_empty() {
            all.push(self.with(|it| {
                let word = it.to_target.remove(0);
                match (it.target, word) {
                    (Target::Waits, Word::State) => {
                        it.target = Target::Ready;
                        it.to_source.push(Word::Ready);
                    }
                    (Target::Waits | Target::Ready, Word::Abort) => it.target = Target::Dropped,
                    (Target::Ready, Word::Commit) => it.release(),
                    _ => {}
                }
            }));
        }
        if self.source != Source::Dead && !self.to_source.is_empty() {
            all.push(self.with(|it| {
                let word = it.to_source.remove(0);
                match (it.source, word) {
                    (Source::Sent, Word::Ready) => {
                        it.source = Source::Commit;
                        it.to_target.push(Word::Commit);
                    }
                    (Source::Begun | Source::Sent | Source::Commit, Word::Refused) => it.give_back(),
                    (Source::Commit, Word::Released) => it.source = Source::Moved,
                    _ => {}
                }
            }));
        }
        // A link that is broken is found so when all that came over it is read.
        if self.source == Source::Dead && self.to_target.is_empty() {
            match self.target {
                Target::Waits => all.push(self.with(|it| it.target = Target::Dropped)),
                Target::Ready if !self.target_in_doubt => all.push(self.with(|it| it.target_in_doubt = true)),
                _ => {}
            }
        }
        if matches!(self.target, Target::Dead | Target::Dropped) && self.to_source.is_empty() {
            match self.source {
                Source::Begun | Source::Sent => all.push(self.with(World::give_back)),
                Source::Commit if !self.source_in_doubt => {
                    all.push(self.with(|it| it.source_in_doubt = true))
                }
                _ => {}
            }
        }
    }

    fn kill_source(&mut self) {
        self.source = Source::Dead;
    }

    fn kill_target(&mut self) {
        self.target = Target::Dead;
    }

    /// What the daemon may do next.
    fn daemon(&self, rule: Rule, bounds: Bounds, all: &mut Vec<World>) {
        let (Some(old), Some(next)) = self.seen else {
            let may_be_mute = self.mutes < bounds.mutes;
            if self.seen.0.is_none() {
                all.push(self.with(World::look_at_source));
                if may_be_mute && self.source != Source::Dead {
                    let said = if self.hears_source && self.source_said { Old::Keeps } else { Old::Mute };
                    all.push(self.with(|it| (it.seen.0, it.mutes) = (Some(said), it.mutes + 1)));
                }
            }
            if self.seen.1.is_none() {
                all.push(self.with(World::look_at_target));
                if may_be_mute && self.target != Target::Dead {
                    let said = if self.hears_target && self.target_said { Next::Takes } else { Next::Mute };
                    all.push(self.with(|it| (it.seen.1, it.mutes) = (Some(said), it.mutes + 1)));
                }
            }
            return;
        };
        let deed = rule(old, next, self.patience);
        all.push(self.with(|it| {
            it.seen = (None, None);
            match deed {
                Deed::Begin => {
                    (it.hears_source, it.hears_target) = (true, true);
                    it.patience = it.patience.max(Patience::Waits);
                    // Either may have died meanwhile, and is told nothing then.
                    if it.target == Target::Shell {
                        it.target = Target::Waits;
                        if it.source == Source::Runs {
                            it.source = Source::Begun;
                        }
                    }
                }
                Deed::Wait => {}
                Deed::Cancel if matches!(it.source, Source::Begun | Source::Sent) => it.give_back(),
                Deed::Cancel => {}
                Deed::Refuse if matches!(it.target, Target::Waits | Target::Ready) => {
                    it.target = Target::Dropped;
                    it.to_source.push(Word::Refused);
                }
                Deed::Refuse => {}
                Deed::KillNext => {
                    it.has_killed = true;
                    it.kill_target();
                }
                Deed::SettleOld if it.source == Source::Commit && it.source_in_doubt => {
                    (it.source, it.source_said) = (Source::Returned, true);
                }
                Deed::SettleNext if it.target == Target::Ready && it.target_in_doubt => it.release(),
                Deed::SettleOld | Deed::SettleNext => {}
                Deed::Taken => {
                    it.kill_source();
                    it.end = Some(deed);
                }
                Deed::Kept => {
                    it.kill_target();
                    // What it waits for, if it does, never comes, and it is told so.
                    if matches!(it.source, Source::Begun | Source::Sent | Source::Commit) {
                        (it.source, it.source_said) = (Source::Returned, true);
                    }
                    it.end = Some(deed);
                }
                Deed::Ended => it.end = Some(deed),
            }
        }));
    }

    fn nexts(&self, rule: Rule, bounds: Bounds) -> Vec<World> {
        let mut all = Vec::new();
        if self.end.is_some() {
            return all;
        }
        self.vmms(&mut all);
        self.daemon(rule, bounds, &mut all);
        if self.deaths < bounds.deaths {
            if self.source != Source::Dead {
                all.push(self.with(|it| {
                    it.deaths += 1;
                    it.kill_source();
                }));
            }
            if self.target != Target::Dead {
                all.push(self.with(|it| {
                    it.deaths += 1;
                    it.kill_target();
                }));
            }
        }
        if self.crashes < bounds.crashes {
            all.push(self.with(|it| {
                it.crashes += 1;
                (it.hears_source, it.hears_target) = (false, false);
                (it.seen, it.patience) = ((None, None), Patience::Fresh);
            }));
        }
        let later = match self.patience {
            Patience::Fresh | Patience::Waits => Patience::Ending,
            _ => Patience::Over,
        };
        if self.patience < later && later <= bounds.longest {
            all.push(self.with(|it| it.patience = later));
        }
        all
    }

    /// What must hold. Says what does not.
    fn check(&self) -> Result<(), &'static str> {
        if self.source_runs() && self.target_runs() {
            return Err("two run the machine");
        }
        if self.target_ran && self.source_said {
            return Err("one goes on behind the other");
        }
        // A daemon that has heard whoever is dead, and had time, loses no machine that one of them could go on with.
        let has_heard = (self.hears_source || self.source != Source::Dead)
            && (self.hears_target || self.target != Target::Dead);
        let is_certain = has_heard && self.mutes == 0 && !self.has_killed && self.patience < Patience::Over;
        match self.end {
            Some(Deed::Taken) if self.deaths == 0 && !self.target_runs() && is_certain => {
                Err("taken by one that does not run it")
            }
            Some(Deed::Kept) if self.deaths == 0 && !self.source_runs() && is_certain => {
                Err("kept by one that does not run it")
            }
            Some(Deed::Ended)
                if self.deaths == 0
                    && !self.has_killed
                    && self.mutes == 0
                    && self.patience < Patience::Over =>
            {
                Err("given up with both alive")
            }
            Some(Deed::Ended) if is_certain => {
                let is_kept = self.source != Source::Dead && !self.target_said;
                let is_taken = !self.source_said
                    && matches!(self.target, Target::Ready | Target::Release | Target::Moved);
                match is_kept || is_taken {
                    true => Err("given up although one could go on with it"),
                    false => Ok(()),
                }
            }
            // Whoever runs the machine for certain is never ended for the other's death, whatever was missed.
            Some(Deed::Ended) if self.mutes == 0 && self.patience < Patience::Over && self.target_runs() => {
                Err("given up under one that runs it")
            }
            _ => Ok(()),
        }
    }
}

/// Walks everything that can happen. Answers how many worlds there are, or the first that must not be.
fn walk(rule: Rule, bounds: Bounds) -> Result<usize, (World, &'static str)> {
    let mut known = HashSet::from([World::new()]);
    let mut left = VecDeque::from([World::new()]);
    while let Some(world) = left.pop_front() {
        world.check().map_err(|what| (world.clone(), what))?;
        let nexts = world.nexts(rule, bounds);
        // Something can be done until it is over: a daemon that only waits is not the end of it.
        for next in nexts {
            if known.insert(next.clone()) {
                left.push_back(next);
            }
        }
    }
    // With time, everything comes to an end.
    let ended = known.iter().filter(|world| world.end.is_some()).count();
    assert!(ended > 0, "nothing ever ends");
    Ok(known.len())
}

#[test]
fn never_do_two_run_it_and_it_lives_where_one_could_keep_it() {
    for (crashes, deaths, mutes, longest) in [
        (0, 0, 0, Patience::Waits),
        (0, 1, 0, Patience::Ending),
        (1, 1, 0, Patience::Over),
        (0, 2, 0, Patience::Over),
        (1, 2, 1, Patience::Over),
    ] {
        let bounds = Bounds { crashes, deaths, mutes, longest };
        match walk(decide, bounds) {
            Ok(count) => println!("{bounds:?}: {count} worlds"),
            Err((world, what)) => panic!("{what}: {world:?}"),
        }
    }
}

/// From every world that can be reached, a daemon that has run out of patience comes to an end while nobody else moves.
#[test]
fn it_always_comes_to_an_end() {
    let bounds = Bounds { crashes: 1, deaths: 1, mutes: 0, longest: Patience::Over };
    let mut known = HashSet::from([World::new()]);
    let mut left = VecDeque::from([World::new()]);
    while let Some(world) = left.pop_front() {
        let mut alone = World { patience: Patience::Over, ..world.clone() };
        let still = Bounds { crashes: 0, deaths: 0, mutes: 0, longest: Patience::Over };
        for _ in 0..40 {
            if alone.end.is_some() {
                break;
            }
            let mut all = Vec::new();
            alone.vmms(&mut all);
            if all.is_empty() {
                alone.daemon(decide, still, &mut all);
            }
            alone = all.swap_remove(0);
        }
        assert!(alone.end.is_some(), "{world:?}\nends as {alone:?}");
        for next in world.nexts(decide, bounds) {
            if known.insert(next.clone()) {
                left.push_back(next);
            }
        }
    }
}

/// Each of these mistakes is found by the walk.
#[test]
fn a_wrong_rule_is_found() {
    let rules: [(&str, Rule); 6] = [
        ("a dead target never ran it", |old, next, patience| match (old, next) {
            (Old::Gave { in_doubt: true }, Next::Dead(_)) => Deed::SettleOld,
            _ => decide(old, next, patience),
        }),
        ("a dead source never went on", |old, next, patience| match (old, next) {
            (Old::Dead(_), Next::Ready { in_doubt: true }) => Deed::SettleNext,
            (Old::Dead(_), Next::Ready { .. }) => Deed::Wait,
            _ => decide(old, next, patience),
        }),
        ("whoever is about to run it has it", |old, next, patience| match next {
            Next::Takes => Deed::Taken,
            _ => decide(old, next, patience),
        }),
        ("a death is the end", |old, next, patience| match (old, next) {
            (Old::Gave { .. }, Next::Dead(_)) => Deed::Ended,
            _ => decide(old, next, patience),
        }),
        ("a target that is ready has it", |old, next, patience| match next {
            Next::Ready { .. } => Deed::Taken,
            _ => decide(old, next, patience),
        }),
        ("a source that gives keeps", |old, next, patience| match old {
            Old::Gives => Deed::Kept,
            _ => decide(old, next, patience),
        }),
    ];
    for (what, rule) in rules {
        let bounds = Bounds { crashes: 1, deaths: 2, mutes: 0, longest: Patience::Ending };
        assert!(walk(rule, bounds).is_err(), "not found: {what}");
    }
}
