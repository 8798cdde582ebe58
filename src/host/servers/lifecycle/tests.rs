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

/// What happens to a server in a test.
#[derive(Debug, Clone, Copy)]
enum Happening {
    Ask(Ask),
    /// The actor does the next piece of work and saves its event.
    Work,
    /// The actor does the work, and the daemon dies before the event is saved.
    WorkAndDie,
    Die,
    /// Time passes beyond every deadline.
    Wait,
    /// The other host has taken it, or will never.
    MoveEnds {
        taken: bool,
    },
}

/// What there is besides the records.
#[derive(Debug, Default)]
struct World {
    machine: Option<(ProcessId, MachineState)>,
    /// A second VMM.
    other: Option<ProcessId>,
    /// Whether it is parked before its first instruction.
    is_unbegun: bool,
    spawned: i32,
    made: u32,
    resets: u64,
    now_ms: i64,
    /// The memory on the disk, and whether it is still that of the disks.
    saved: Option<Saved>,
    is_stale: bool,
    turns: u8,
    /// The snapshot whose files lie beside the disks.
    copied: Option<SnapshotId>,
    /// The snapshot whose files took the places of the disks last.
    taken_back: Option<SnapshotId>,
    /// Snapshots whose files are complete.
    snapshots: BTreeSet<SnapshotId>,
}

impl World {
    fn context(&self) -> Context {
        Context { now_ms: self.now_ms, policy: RestartPolicy::Always }
    }

    fn end(&self) -> End {
        End::of(Some(Will { reason: Reason::Asked, at_unix_ms: 0 }), None, 0, self.now_ms)
    }

    /// Does a piece of work as the effects do.
    fn perform(&mut self, life: &Life) -> Event {
        match life.work().expect("work to do") {
            // The VMM of one server in two is started while its disk is made.
            Work::Make if life.phase == (Phase::Creating { start: true }) => {
                self.made += 1;
                let vmm = self.made.is_multiple_of(2).then(|| self.spawn(life));
                Event::Made { volumes: Vec::new(), vmm, restores: false }
            }
            Work::Make => {
                self.dismiss_shell();
                Event::Made { volumes: Vec::new(), vmm: None, restores: false }
            }
            Work::Spawn | Work::Await => Event::Spawned(self.spawn(life)),
            Work::Snapshot { id } => {
                self.snapshots.insert(id);
                let taken = Taken {
                    at_ms: self.now_ms,
                    paused_ms: 0,
                    disks: Vec::new(),
                    root: None,
                    stored_bytes: 1,
                    chain: Default::default(),
                    full_because: None,
                };
                match &life.phase {
                    // A machine that ran runs on, whatever an earlier try has left.
                    Phase::Snapshotting { back: Back::Running, .. } => {
                        self.turn(MachineState::Running, Event::SnapshotTaken(id, taken))
                    }
                    _ => Event::SnapshotTaken(id, taken),
                }
            }
            Work::Boot { .. } | Work::Resume | Work::Pause | Work::Save if self.machine.is_none() => {
                Event::Ended(self.end())
            }
            Work::Boot { saved: None } => {
                self.is_stale = true;
                self.turn(MachineState::Running, Event::Booted)
            }
            Work::Boot { saved } => {
                assert!(saved.is_some() && saved == self.saved, "restored from what is not there");
                assert!(!self.is_stale, "restored a memory that the disks have left behind");
                self.turn(MachineState::Paused, Event::Restored)
            }
            Work::Save => {
                self.turns += 1;
                let saved =
                    Saved { root: Digest([self.turns; 32]), stored_bytes: 1, of: SavedOf::Hibernation };
                (self.saved, self.is_stale) = (Some(saved), false);
                self.turn(MachineState::Paused, Event::Saved(saved))
            }
            Work::Pause => self.turn(MachineState::Paused, Event::Paused),
            Work::Resume => {
                (self.saved, self.is_stale) = (None, true);
                self.turn(MachineState::Running, Event::Resumed)
            }
            Work::Settle { job } => {
                if self.machine.is_none() {
                    return Event::Ended(self.end());
                }
                Event::Settled(job)
            }
            Work::SpawnNext => {
                self.spawned += 1;
                let vmm = ProcessId { pid: self.spawned, start_ticks: 0, boot_id: String::new() };
                // One that was never recorded is dismissed first.
                self.other = Some(vmm.clone());
                Event::Spawned(Spawned { vmm, sandbox: None, cage: None, build: None })
            }
            Work::HandOver => {
                let Phase::Upgrading { vmm, next: Some(next), .. } = &life.phase else { panic!("{life:?}") };
                let Some((held, _)) = &mut self.machine else { return Event::Ended(self.end()) };
                let is_given = *held == next.vmm;
                if !is_given && next.vmm.pid % 3 == 0 {
                    let detail = "it was refused".to_owned();
                    return Event::HandOverFailed(Trouble { code: Code::MachineFailed, detail });
                }
                assert!(is_given || *held == *vmm && self.other == Some(next.vmm.clone()));
                (*held, self.other) = (next.vmm.clone(), Some(vmm.clone()));
                Event::HandedOver
            }
            Work::Retire => {
                let Phase::Retiring { vmm, other, .. } = &life.phase else { panic!("{life:?}") };
                let machine = self.machine.as_ref().map(|(held, _)| held);
                assert!(machine == Some(vmm) && self.other.as_ref().is_none_or(|left| left == other));
                self.other = None;
                Event::Retired
            }
            Work::CountResets => Event::ResetsCounted(self.resets),
            Work::Reset { resets } => {
                self.resets += u64::from(self.resets == resets);
                Event::WasReset
            }
            Work::Press => Event::Pressed,
            Work::Kill => {
                self.machine = None;
                Event::Ended(self.end())
            }
            Work::CopyBack { to } => {
                self.copied = Some(to.snapshot);
                Event::CopiedBack(to.snapshot)
            }
            Work::TakeBack { to } => {
                assert!(self.machine.is_none(), "disks were taken from under a machine");
                let is_again = self.taken_back == Some(to.snapshot);
                assert!(
                    self.copied.take() == Some(to.snapshot) || is_again,
                    "what takes their place is gone"
                );
                self.taken_back = Some(to.snapshot);
                let (root, of) = (Digest([0; 32]), SavedOf::Snapshot { id: to.snapshot });
                self.saved = to.memory.then_some(Saved { root, stored_bytes: 1, of });
                self.is_stale = false;
                Event::TakenBack(to.snapshot, self.saved)
            }
            Work::Release { keep_saved, keep_copied } => {
                assert!(self.machine.is_none(), "released under a machine");
                if !keep_saved {
                    self.saved = None;
                }
                if !keep_copied {
                    self.copied = None;
                }
                Event::Released
            }
            Work::Purge => {
                self.dismiss_shell();
                assert!(self.machine.is_none(), "purged under a machine");
                self.saved = None;
                Event::Purged
            }
        }
    }

    /// A VMM that was started while the disk was made, by a daemon that died before it was recorded.
    fn dismiss_shell(&mut self) {
        let is_unbegun = self.is_unbegun;
        self.machine.take_if(|(_, state)| *state == MachineState::Shell || is_unbegun);
    }

    /// One machine in two that begins with its kernel is built before its process is recorded.
    fn spawn(&mut self, life: &Life) -> Spawned {
        self.spawned += 1;
        let id = ProcessId { pid: self.spawned, start_ticks: 0, boot_id: String::new() };
        // A process that was never recorded is dismissed first.
        self.dismiss_shell();
        assert!(!matches!(self.machine, Some((_, MachineState::Running | MachineState::Paused))));
        let comes = matches!(life.phase, Phase::Arriving { .. });
        self.is_unbegun = !comes && life.saved.is_none() && self.spawned % 2 == 0;
        let state = if self.is_unbegun { MachineState::Paused } else { MachineState::Shell };
        self.machine = Some((id.clone(), state));
        Spawned { vmm: id, sandbox: None, cage: None, build: None }
    }

    fn turn(&mut self, state: MachineState, event: Event) -> Event {
        self.is_unbegun = false;
        if let Some((_, held)) = &mut self.machine {
            *held = state;
        }
        event
    }

    /// What a starting daemon finds.
    fn look(&self, life: &Life) -> Option<Event> {
        let vmm = life.phase.vmm()?;
        Some(Event::Found(match &self.machine {
            Some((id, state)) if id == vmm => Found::Alive(*state),
            _ => Found::Gone(self.end()),
        }))
    }
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
            Happening::Die => self.die(),
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
    let happening = prop_oneof![
        4 => ask.prop_map(Happening::Ask),
        6 => Just(Happening::Work),
        1 => Just(Happening::WorkAndDie),
        1 => Just(Happening::Die),
        1 => Just(Happening::Wait),
        1 => any::<bool>().prop_map(|taken| Happening::MoveEnds { taken }),
    ];
    prop::collection::vec(happening, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn a_server_ends_where_the_last_accepted_ask_points(start: bool, happenings in happenings()) {
        let create = OperationId::new();
        let mut test = Test {
            world: World::default(),
            life: Some(Life::new(create, start)),
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
        prop_assert_eq!(test.world.other, None);
        // A memory is on the disk exactly while it is the server's.
        prop_assert_eq!(test.world.saved.is_some(), state == ServerState::Hibernated);
        prop_assert_eq!(test.life.as_ref().and_then(|life| life.saved), test.world.saved);
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
        shares: None,
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
fn a_memory_is_thrown_away_by_force_only() {
    let context = Context { now_ms: 0, policy: RestartPolicy::Never };
    let saved = Some(Saved { root: Digest([7; 32]), stored_bytes: 1, of: SavedOf::Hibernation });
    let asleep = Life { saved, wanted: Wanted::Hibernated, ..life(Phase::Hibernated { why: None }) };
    assert_eq!(asleep.ask(Ask::Stop { grace_ms: 1000 }, OperationId::new(), context), Err(Refused));
    assert_eq!(asleep.allowed_actions(context), ["start", "restore", "migrate", "delete"]);
    let Ok(Asked::Began(stopping)) = asleep.ask(Ask::Stop { grace_ms: 0 }, OperationId::new(), context)
    else {
        panic!()
    };
    assert_eq!(stopping.life.work(), Some(Work::Release { keep_saved: false, keep_copied: false }));
    // A start that fails before a vCPU ran has used nothing up.
    let Ok(Asked::Began(starting)) = asleep.ask(Ask::Start, OperationId::new(), context) else { panic!() };
    let trouble = Trouble { code: Code::MachineFailed, detail: "no".to_owned() };
    let failing = step(&starting.life, Event::StartFailed(trouble), context).life;
    let ended = step(&failing, Event::Ended(End::host_restarted(0)), context).life;
    assert_eq!(ended.work(), Some(Work::Release { keep_saved: true, keep_copied: false }));
    let back = step(&ended, Event::Released, context).life;
    assert_eq!(
        (back.phase.state(), back.wanted, back.saved),
        (ServerState::Hibernated, Wanted::Hibernated, saved)
    );
    assert!(back.phase.why().is_some() && !back.holds_memory() && !back.is_off());
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
