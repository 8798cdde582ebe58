//! The lifecycle against a small world and an oracle: whatever is asked in whatever order, and wherever the daemon
//! dies in between, the server ends where the last accepted ask points, and each operation ends once.
use std::collections::{BTreeMap, BTreeSet};

use model::server::ServerState;
use proptest::prelude::*;
use wire::control::MachineState;
use wire::launch::ExitStatus;
use wire::saved::Digest;
use wire::will::{Reason, Will};

use super::*;
use crate::snapshots::Taken;

mod clones;
mod restarts;
mod world;

use world::{Disk, World};

/// What happens to a server in a test.
#[derive(Debug, Clone, Copy)]
enum Happening {
    Ask(Ask),
    /// The actor does the next piece of work and saves its event.
    Work,
    /// Somebody asks while the actor does the work, once or twice; it is done all the same.
    AskMeanwhile(Ask, Option<Ask>),
    /// The actor does the work, and the daemon dies before the event is saved.
    WorkAndDie,
    Die,
    /// The host loses power as the server is being made.
    LosePower,
    /// Time passes beyond every deadline.
    Wait,
    /// The other host has taken it, or will never.
    MoveEnds {
        taken: bool,
    },
}

struct Test {
    world: World,
    life: Option<Life>,
    /// Operations by number, with how often they ended.
    operations: BTreeMap<OperationId, u32>,
    /// Snapshots on record by their operations, and whether they are complete.
    recorded: BTreeMap<SnapshotId, (OperationId, bool)>,
    /// Operations that were to take one.
    taken_by: Vec<OperationId>,
    /// Operations that succeeded.
    succeeded: BTreeSet<OperationId>,
    oracle: ServerState,
}

impl Test {
    fn save(&mut self, next: Step) {
        if let Some(left) = self.life.as_ref().and_then(|life| life.phase.snapshot())
            && next.life.phase.snapshot() != Some(left)
        {
            // What is not complete is forgotten, and tidied up when the work on it has ended.
            self.recorded.retain(|id, (_, is_complete)| *id != left || *is_complete);
        }
        for (id, verdict) in next.ended {
            if verdict == Verdict::Succeeded {
                self.succeeded.insert(id);
            }
            *self.operations.get_mut(&id).expect("an operation that was accepted") += 1;
        }
        self.life = Some(next.life).filter(|_| !next.gone);
    }

    fn event(&mut self, event: Event) {
        let Some(life) = &self.life else { return };
        if let Event::SnapshotTaken(id, _) = &event
            && life.phase.snapshot() == Some(*id)
            && let Some((_, is_complete)) = self.recorded.get_mut(id)
        {
            *is_complete = true;
        }
        let next = step(life, event, self.world.context());
        self.save(next);
        self.world.snapshots.retain(|id| self.recorded.contains_key(id));
    }

    fn happen(&mut self, happening: Happening) {
        let Some(life) = self.life.clone() else { return };
        match happening {
            Happening::Ask(ask) => self.ask(&life, ask),
            Happening::Work | Happening::WorkAndDie => {
                let Some(work) = life.work() else { return };
                let event = self.world.perform(&life);
                match happening {
                    Happening::Work => self.event(event),
                    _ => {
                        if matches!(work, Work::Snapshot { .. }) {
                            // It died in the moment that is copied.
                            self.world.turn(MachineState::Paused, Event::Paused);
                        }
                        self.die()
                    }
                }
            }
            Happening::AskMeanwhile(ask, another) => {
                if life.work().is_none() {
                    return;
                }
                let event = self.world.perform(&life);
                self.ask(&life, ask);
                if let (Some(ask), Some(life)) = (another, self.life.clone()) {
                    self.ask(&life, ask);
                }
                if self.life.as_ref().is_some_and(|now| now.run == life.run) {
                    self.event(event);
                }
            }
            Happening::Die => self.die(),
            Happening::LosePower => {
                let is_being_made =
                    !life.unflushed.is_empty() || matches!(life.phase, Phase::Creating { .. });
                if is_being_made {
                    if matches!(life.phase, Phase::Resuming { .. }) {
                        // A memory that may be used up is nothing to go on from.
                        self.oracle = ServerState::Deleting;
                    }
                    (self.world.machine, self.world.is_unbegun) = (None, false);
                    if self.world.disk == Disk::Whole {
                        self.world.disk = Disk::Unfit;
                    }
                    self.die();
                }
            }
            Happening::Wait => {
                self.world.now_ms += 10_000_000;
                self.event(Event::DeadlinePassed);
            }
            Happening::MoveEnds { taken: true } => {
                let Some(given) = life.given_away() else { return };
                assert!(life.job.is_none_or(|job| given.life.cancel(job.id).is_err()), "taken back");
                self.oracle = ServerState::Deleting;
                self.save(given.life.left().expect("a server that moves"));
            }
            Happening::MoveEnds { taken: false } => {
                let detail = "it was refused".to_owned();
                let verdict = Verdict::Failed(Trouble { code: Code::MigrationBlocked, detail });
                if let Some(kept) = life.kept(verdict) {
                    self.save(kept);
                }
            }
        }
    }

    /// The next daemon reads the record and looks at the world.
    fn die(&mut self) {
        let found = self.life.as_ref().and_then(|life| self.world.look(life));
        if let Some(found) = found {
            self.event(found);
        }
    }

    fn ask(&mut self, life: &Life, ask: Ask) {
        let id = OperationId::new();
        match life.ask(ask, id, self.world.context()) {
            Ok(Asked::Began(next) | Asked::Done(next)) => {
                self.operations.insert(id, 0);
                if let Ask::Snapshot { id: snapshot, .. } = ask {
                    self.recorded.insert(snapshot, (id, false));
                    self.taken_by.push(id);
                }
                self.save(next);
            }
            Ok(Asked::Joined(joined, next)) => {
                assert!(self.operations.contains_key(&joined));
                self.save(next);
            }
            Err(Refused) => return,
        }
        // The oracle: the last ask that was accepted says where it ends.
        self.oracle = match ask {
            // It goes back to what it was.
            Ask::Snapshot { .. } | Ask::Migrate | Ask::SettleMemory | Ask::Upgrade => self.oracle,
            Ask::Restore { to } => match life.phase {
                _ if to.memory => ServerState::Running,
                Phase::Running { .. } => ServerState::Running,
                _ => ServerState::Stopped,
            },
            Ask::Start | Ask::Resume | Ask::Reboot { .. } => ServerState::Running,
            Ask::Stop { .. } => ServerState::Stopped,
            Ask::Pause => ServerState::Paused,
            Ask::Hibernate => ServerState::Hibernated,
            Ask::Delete { .. } => ServerState::Deleting,
        };
    }

    fn settle(&mut self) {
        for _ in 0..50 {
            self.happen(Happening::Work);
            self.happen(Happening::MoveEnds { taken: false });
            if self.life.as_ref().is_some_and(|life| life.work().is_none()) {
                self.happen(Happening::Wait);
            }
        }
    }
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let grace = prop_oneof![Just(0), Just(1000), Just(60_000)];
    let ask = prop_oneof![
        3 => Just(Ask::Start),
        3 => grace.clone().prop_map(|grace_ms| Ask::Stop { grace_ms }),
        2 => grace.prop_map(|grace_ms| Ask::Reboot { grace_ms }),
        2 => Just(Ask::Pause),
        2 => Just(Ask::Resume),
        3 => Just(Ask::Hibernate),
        3 => any::<bool>().prop_map(|memory| Ask::Snapshot { id: SnapshotId::new(), memory }),
        3 => any::<bool>()
            .prop_map(|memory| Ask::Restore { to: Return { snapshot: SnapshotId::new(), memory } }),
        3 => Just(Ask::Migrate),
        3 => Just(Ask::Upgrade),
        2 => Just(Ask::SettleMemory),
        1 => any::<bool>().prop_map(|keep_volumes| Ask::Delete { keep_volumes }),
    ];
    // Above all what takes back itself.
    let another = prop_oneof![Just(None), Just(Some(Ask::Start)), ask.clone().prop_map(Some)];
    let meanwhile = (ask.clone(), another).prop_map(|(ask, another)| Happening::AskMeanwhile(ask, another));
    let happening = prop_oneof![
        4 => ask.prop_map(Happening::Ask),
        2 => meanwhile,
        6 => Just(Happening::Work),
        1 => Just(Happening::WorkAndDie),
        1 => Just(Happening::Die),
        1 => Just(Happening::LosePower),
        1 => Just(Happening::Wait),
        1 => any::<bool>().prop_map(|taken| Happening::MoveEnds { taken }),
    ];
    prop::collection::vec(happening, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn a_server_ends_where_the_last_accepted_ask_points(start: bool, clone: bool, made in 0..2u32, happenings in happenings()) {
        let create = OperationId::new();
        let start = start || clone;
        let of = SavedOf::Clone { snapshot: SnapshotId::new() };
        let saved = clone.then_some(Saved { root: Digest([0; 32]), stored_bytes: 1, of });
        let mut test = Test {
            world: World { saved, made, ..World::default() },
            life: Some(Life { saved, ..Life::new(create, start) }),
            operations: BTreeMap::from([(create, 0)]),
            recorded: BTreeMap::new(),
            taken_by: Vec::new(),
            succeeded: BTreeSet::new(),
            oracle: if start { ServerState::Running } else { ServerState::Stopped },
        };
        for happening in happenings {
            test.happen(happening);
        }
        test.settle();
        let state = test.life.as_ref().map_or(ServerState::Deleting, |life| life.phase.state());
        prop_assert_eq!(state, test.oracle);
        let taken = test.taken_by.iter().filter(|operation| test.succeeded.contains(operation)).count();
        prop_assert_eq!(taken, test.recorded.len());
        let machine = test.world.machine.as_ref().map(|(_, state)| *state);
        let wanted = match state {
            ServerState::Running => Some(MachineState::Running),
            ServerState::Paused => Some(MachineState::Paused),
            _ => None,
        };
        prop_assert_eq!(machine, wanted);
        // What a machine went on from is known, and it went on from what is known.
        let shares = test.life.as_ref().and_then(|life| life.shares);
        prop_assert!(machine.is_none() || shares == test.world.shares, "{shares:?}");
        let overlaid = test.life.as_ref().map(|life| life.overlaid);
        prop_assert!(overlaid.is_none_or(|overlaid| overlaid == test.world.is_over), "{overlaid:?}");
        prop_assert_eq!(test.world.other, None);
        // What is at rest would outlive a loss of power.
        prop_assert!(test.life.is_none() || test.world.disk == Disk::Flushed);
        prop_assert!(test.life.as_ref().is_none_or(|life| life.unflushed.is_empty()));
        // A memory is on the disk exactly while it is the server's; a snapshot's is not its clones'.
        let saved = test.world.saved.filter(|saved| saved.of.snapshot().is_none() || state == ServerState::Hibernated);
        prop_assert_eq!(saved.is_some(), state == ServerState::Hibernated);
        prop_assert_eq!(test.life.as_ref().and_then(|life| life.saved), saved);
        prop_assert!(test.operations.values().all(|ends| *ends == 1), "{:?}", test.operations);
        prop_assert!(test.life.is_none_or(|life| life.job.is_none()));
        // There is a snapshot exactly for each operation that took one, and it is complete.
        for (id, (operation, is_complete)) in &test.recorded {
            prop_assert!(*is_complete && test.world.snapshots.contains(id));
            prop_assert!(test.succeeded.contains(operation), "{:?}", test.succeeded);
        }
    }
}

fn vmm() -> ProcessId {
    ProcessId { pid: 1, start_ticks: 1, boot_id: "boot".to_owned() }
}

fn life(phase: Phase) -> Life {
    Life {
        phase,
        wanted: Wanted::Running,
        job: None,
        run: 1,
        booted_ms: Some(0),
        failures: 0,
        awaits: None,
        saved: None,
        unflushed: Vec::new(),
        shares: None,
        overlaid: false,
        clash: None,
    }
}

fn ended(reason: Reason) -> Event {
    Event::Ended(End::of(Some(Will { reason, at_unix_ms: 5 }), None, 0, 5))
}

#[test]
fn the_grace_ends_in_force_and_not_before() {
    let context = Context { now_ms: 1000, policy: RestartPolicy::Never };
    let asked =
        life(Phase::Running { vmm: vmm() }).ask(Ask::Stop { grace_ms: 500 }, OperationId::new(), context);
    let Ok(Asked::Began(stopping)) = asked else { panic!("{asked:?}") };
    assert_eq!(stopping.life.work(), Some(Work::Press));
    let pressed = step(&stopping.life, Event::Pressed, context).life;
    assert_eq!(pressed.work(), None);
    let early = step(&pressed, Event::DeadlinePassed, Context { now_ms: 1499, ..context }).life;
    assert_eq!(early.work(), None);
    let late = step(&pressed, Event::DeadlinePassed, Context { now_ms: 1500, ..context }).life;
    assert_eq!(late.work(), Some(Work::Kill));
}

#[test]
fn a_save_that_comes_to_nothing_leaves_the_machine_as_it_was() {
    let context = Context { now_ms: 0, policy: RestartPolicy::Never };
    for (phase, back) in [
        (Phase::Running { vmm: vmm() }, Phase::Resuming { vmm: vmm() }),
        (Phase::Paused { vmm: vmm() }, Phase::Pausing { vmm: vmm() }),
    ] {
        let operation = OperationId::new();
        let Ok(Asked::Began(saving)) = life(phase).ask(Ask::Hibernate, operation, context) else { panic!() };
        assert_eq!(saving.life.work(), Some(Work::Save));
        let trouble = Trouble { code: Code::DiskFull, detail: "no room".to_owned() };
        let failed = step(&saving.life, Event::SaveFailed(trouble.clone()), context);
        assert_eq!((&failed.life.phase, failed.ended), (&back, vec![(operation, Verdict::Failed(trouble))]));
        let cancelled = saving.life.cancel(operation).unwrap();
        assert_eq!((cancelled.life.phase, cancelled.ended.len(), cancelled.life.saved), (back, 1, None));
    }
}

#[test]
fn what_comes_of_a_restore_that_was_given_up_is_nothing_to_the_next_one() {
    let context = Context { now_ms: 0, policy: RestartPolicy::Never };
    let to = Return { snapshot: SnapshotId::new(), memory: true };
    let trouble = Trouble { code: Code::Draining, detail: "it was stopped, as was asked".to_owned() };
    let restoring = |life: &Life| {
        let job = OperationId::new();
        let Ok(Asked::Began(next)) = life.ask(Ask::Restore { to }, job, context) else { panic!("{life:?}") };
        (job, next.life)
    };
    for phase in [Phase::Running { vmm: vmm() }, Phase::Stopped { why: None }] {
        let (first, given_up) = restoring(&life(phase));
        let (second, again) = restoring(&given_up.cancel(first).unwrap().life);
        assert_ne!(again.work(), given_up.work(), "who works for the first one is to stop");
        for stale in [Event::CopyBackFailed(first, trouble.clone()), Event::CopiedBack(first)] {
            assert_eq!(step(&again, stale, context).life, again);
        }
        let failed = step(&again, Event::CopyBackFailed(second, trouble.clone()), context);
        assert_eq!(failed.ended, vec![(second, Verdict::Failed(trouble.clone()))]);
        assert_ne!(step(&again, Event::CopiedBack(second), context).life, again);
    }
}

#[test]
fn a_memory_is_thrown_away_by_force_only() {
    let context = Context { now_ms: 0, policy: RestartPolicy::Never };
    let saved = Some(Saved { root: Digest([7; 32]), stored_bytes: 1, of: SavedOf::Hibernation });
    let asleep = Life { saved, wanted: Wanted::Hibernated, ..life(Phase::Hibernated { why: None }) };
    assert_eq!(asleep.ask(Ask::Stop { grace_ms: 1000 }, OperationId::new(), context), Err(Refused));
    // Which is among what can be asked all the same.
    assert_eq!(asleep.allowed_actions(context), ["start", "stop", "restore", "migrate", "delete"]);
    let Ok(Asked::Began(stopping)) = asleep.ask(Ask::Stop { grace_ms: 0 }, OperationId::new(), context)
    else {
        panic!()
    };
    assert_eq!(
        stopping.life.work(),
        Some(Work::Release { keep_saved: false, keep_copied: false, flush: false })
    );
    // A start that fails before a vCPU ran has used nothing up.
    let Ok(Asked::Began(starting)) = asleep.ask(Ask::Start, OperationId::new(), context) else { panic!() };
    let trouble = Trouble { code: Code::MachineFailed, detail: "no".to_owned() };
    let failing = step(&starting.life, Event::StartFailed(trouble), context).life;
    let ended = step(&failing, Event::Ended(End::host_restarted(0)), context).life;
    assert_eq!(ended.work(), Some(Work::Release { keep_saved: true, keep_copied: false, flush: false }));
    let back = step(&ended, Event::Released { flushed: false, kept: true }, context).life;
    assert_eq!(
        (back.phase.state(), back.wanted, back.saved),
        (ServerState::Hibernated, Wanted::Hibernated, saved)
    );
    assert!(back.phase.why().is_some() && !back.holds_memory() && !back.is_off());
}

#[test]
fn what_is_given_up_as_it_is_released_is_removed_all_the_same() {
    let context = Context { now_ms: 0, policy: RestartPolicy::Never };
    let saved = Some(Saved { root: Digest([7; 32]), stored_bytes: 1, of: SavedOf::Hibernation });
    let to = Return { snapshot: SnapshotId::new(), memory: false };
    let thens = [(saved, Then::Hibernate), (None, Then::Return { to, start: true })];
    for (saved, then) in thens {
        let releasing = Life { saved, ..life(Phase::Releasing { then }) };
        let stop = Ask::Stop { grace_ms: 0 };
        let Ok(Asked::Began(stopping)) = releasing.ask(stop, OperationId::new(), context) else { panic!() };
        // The work that had begun before comes to its end.
        let again = step(&stopping.life, Event::Released { flushed: false, kept: true }, context).life;
        let work = Work::Release { keep_saved: false, keep_copied: false, flush: false };
        assert_eq!(again.work(), Some(work));
        let stopped = step(&again, Event::Released { flushed: false, kept: false }, context).life;
        assert_eq!(stopped.phase, Phase::Stopped { why: None });
    }
}

#[test]
fn what_is_saved_is_read_back() {
    let phases = [
        Phase::Creating { start: true },
        Phase::Starting { vmm: Some(vmm()) },
        Phase::Stopping {
            vmm: None,
            push: Push::Button { deadline_ms: 3, pressed: true },
            then: Then::Fail(Trouble { code: Code::NoCapacity, detail: "no".to_owned() }),
        },
        Phase::Releasing { then: Then::Decide(End::host_restarted(7)) },
        Phase::Upgrading {
            vmm: vmm(),
            next: Some(Spawned { vmm: vmm(), sandbox: None, cage: None, build: Some("b".to_owned()) }),
            was_paused: true,
        },
        Phase::Deleting { keep_volumes: true, verdict: Verdict::Cancelled("by hand".to_owned()) },
    ];
    for phase in phases {
        let before = life(phase);
        let text = serde_json::to_string(&before).unwrap();
        assert_eq!(serde_json::from_str::<Life>(&text).unwrap(), before);
    }
}

#[test]
fn the_reset_button_is_pressed_once_however_many_daemons_die_behind_it() {
    let mut world = World { resets: 7, ..World::default() };
    let mut life = life(Phase::Resetting { vmm: vmm(), resets: None });
    let counted = world.perform(&life);
    life = step(&life, counted, world.context()).life;
    for _ in 0..3 {
        // The daemon dies before it can record that the machine was reset.
        let _ = world.perform(&life);
    }
    let reset = world.perform(&life);
    assert_eq!(step(&life, reset, world.context()).life.phase, Phase::Running { vmm: vmm() });
    assert_eq!(world.resets, 8);
}

#[test]
fn a_process_that_was_never_recorded_never_runs_a_machine() {
    let starting = life(Phase::Starting { vmm: None });
    let context = Context { now_ms: 0, policy: RestartPolicy::Never };
    assert_eq!(starting.work(), Some(Work::Spawn));
    // Booted can only follow a process that was recorded.
    assert_eq!(step(&starting, Event::Booted, context).life, starting);
}

#[test]
fn a_machine_that_the_kernel_ended_for_want_of_memory_says_so() {
    let killed = Some(ExitStatus::Signal(9));
    let will = Will { reason: Reason::PoweredOff, at_unix_ms: 5 };
    for (will, status, oom_kills, kind) in [
        (None, killed, 1, EndKind::OutOfMemory),
        (None, None, 1, EndKind::OutOfMemory),
        (None, killed, 0, EndKind::VmmKilled),
        (None, None, 0, EndKind::Vanished),
        // Another signal is another reason, whatever was counted before.
        (None, Some(ExitStatus::Signal(11)), 1, EndKind::VmmKilled),
        (Some(will), killed, 1, EndKind::GuestPoweredOff),
    ] {
        let end = End::of(will, status, oom_kills, 5);
        assert_eq!(end.kind, kind, "{status:?}, {oom_kills}");
        assert_eq!(end.is_failure(), kind != EndKind::GuestPoweredOff);
    }
}
