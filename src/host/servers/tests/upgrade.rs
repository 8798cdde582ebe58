//! Servers whose machine gets another VMM while it runs, on fakes: with the daemon or either VMM dead at every point. A guest
//! that two VMMs run at the same time is a violation that the fakes see.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use model::operation::{Operation, OperationState};
use model::server::{PatchServer, RestartPolicy, Server, ServerAction, ServerState};
use model::snapshot::CreateClones;
use model::{Code, EventId, Labels, ServerId};
use wire::control::MachineState;
use wire::migration::{Phase, Side};

use super::snapshot::named;
use super::stop;
use crate::fake_vmm::{Death, Guest};
use crate::servers::lifecycle;
use crate::servers::record::{self, ServerRecord};
use crate::stage::{SOON, Stage, created, ended, keyed, server, succeeded, until};
use crate::store::{Tx, records};
use crate::{Call, Checkpoint, Fate, Host};

const UPGRADE: ServerAction = ServerAction::UpgradeVmm;

pub(super) async fn upgraded(host: &Host, id: ServerId) -> Operation {
    let asked = host.servers().act(&Call::by_host(), id, UPGRADE).await.unwrap();
    ended(host, asked.body.operation.id).await
}

#[tokio::test]
async fn a_machine_goes_on_in_a_new_vmm_and_is_a_server_like_any_other() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let mut last = stage.launch.only();
    for hop in 0..3 {
        let build = format!("build-{hop}");
        stage.launch.set_build(&build);
        let operation = upgraded(&host, id).await;
        assert_eq!(operation.state, OperationState::Succeeded, "{:?}", operation.error);
        let here = host.servers().one(id).await.unwrap();
        assert_eq!((here.state, here.vmm_build.as_deref()), (ServerState::Running, Some(&*build)));
        let vmm = stage.launch.only();
        assert!(vmm.pid != last.pid && vmm.cage == last.cage && vmm.state() == MachineState::Running);
        vmm.print("still here\r\n");
        last = vmm;
    }
    assert_eq!(host.report().await.unwrap().vmm_build.as_deref(), Some("build-2"));
    let events = host.events().page(EventId(0), 1000).await.unwrap();
    let told: Vec<_> = events.iter().filter(|event| event.kind == "server.upgraded").collect();
    assert_eq!(told.len(), 3);
    assert!(told[2].data.reason.as_deref().is_some_and(|reason| reason.contains("build-2")), "{told:?}");
    let directory = stage.state_dir().join("servers").join(id.to_string());
    assert!(!directory.join("next.sock").exists() && !directory.join("next-will.json").exists());
    assert_eq!(stage.plumbing.scene().taps.len(), 1);
    for action in [ServerAction::Pause, ServerAction::Resume, ServerAction::Hibernate, super::START, stop(30)]
    {
        let done = host.servers().act(&Call::by_host(), id, action).await.unwrap();
        succeeded(&host, done.body.operation.id).await;
    }
    assert_eq!(host.servers().one(id).await.unwrap().vmm_build, None);
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
}

#[tokio::test]
async fn what_cannot_be_handed_over_says_why_and_runs_on() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    stage.launch.set_guest(Guest::CannotHandOver);
    let id = created(&host, server("web1")).await.id;
    let vmm = stage.launch.only();
    let operation = upgraded(&host, id).await;
    let problem = operation.error.unwrap();
    assert!(problem.code == Code::WrongState && problem.detail.contains("cannot be handed"), "{problem:?}");
    assert_eq!((stage.launch.only().pid, vmm.state()), (vmm.pid, MachineState::Running));
    // Only a machine that is there goes over.
    let done = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
    succeeded(&host, done.body.operation.id).await;
    let refused = host.servers().act(&Call::by_host(), id, UPGRADE).await.unwrap_err();
    assert!(refused.code == Code::WrongState && refused.detail.contains("stopped"), "{}", refused.detail);
    assert!(!refused.allowed_actions.unwrap().contains(&"upgrade-vmm".to_owned()));
    host.close().await;
}

#[tokio::test]
async fn one_that_is_paused_goes_over_and_stays_so() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let done = host.servers().act(&Call::by_host(), id, ServerAction::Pause).await.unwrap();
    succeeded(&host, done.body.operation.id).await;
    let mut last = stage.launch.only();
    for refuses in [false, true, false] {
        stage.launch.set_guest(if refuses { Guest::CannotBoot } else { Guest::Obeys });
        let operation = upgraded(&host, id).await;
        assert_eq!(operation.state == OperationState::Failed, refuses, "{operation:?}");
        let (here, vmm) = (host.servers().one(id).await.unwrap(), stage.launch.only());
        assert_eq!((here.state, vmm.state()), (ServerState::Paused, MachineState::Paused));
        assert_eq!(vmm.pid == last.pid, refuses);
        assert!(here.allowed_actions.contains(&"resume".to_owned()), "{here:?}");
        last = vmm;
    }
    let done = host.servers().act(&Call::by_host(), id, ServerAction::Resume).await.unwrap();
    succeeded(&host, done.body.operation.id).await;
    assert_eq!(stage.launch.only().state(), MachineState::Running);
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
}

#[tokio::test]
async fn a_new_vmm_that_is_no_good_is_sent_away_and_the_next_one_tried() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let vmm = stage.launch.only();
    stage.launch.set_guest(Guest::CannotBoot);
    let problem = upgraded(&host, id).await.error.unwrap();
    assert!(problem.detail.contains("stays in its old VMM"), "{problem:?}");
    assert!(problem.detail.contains("no space left"), "{problem:?}");
    stage.launch.set_guest(Guest::Obeys);
    stage.launch.set_trouble(Some(crate::Error::new(Code::KvmUnavailable, "load the kvm module")));
    assert_eq!(upgraded(&host, id).await.error.unwrap().code, Code::KvmUnavailable);
    stage.launch.set_trouble(None);
    assert_eq!((stage.launch.only().pid, vmm.state()), (vmm.pid, MachineState::Running));
    let directory = stage.state_dir().join("servers").join(id.to_string());
    assert!(!directory.join("next.sock").exists() && !directory.join("next-will.json").exists());
    // The machine of now goes over, not that of the next start.
    let more = PatchServer { vcpus: Some(2), ..PatchServer::default() };
    host.servers().patch(&Call::by_host(), id, more).await.unwrap();
    let call = keyed("again");
    let asked = host.servers().act(&call, id, UPGRADE).await.unwrap();
    let again = host.servers().act(&call, id, UPGRADE).await.unwrap();
    assert!(again.replayed && again.body.operation.id == asked.body.operation.id);
    succeeded(&host, asked.body.operation.id).await;
    assert_ne!(stage.launch.only().pid, vmm.pid);
    assert_eq!(stage.launch.only().spec().unwrap().vcpus, 1);
    assert_eq!(stage.launch.violations(), Vec::<String>::new());
    host.close().await;
}

/// In the end one VMM runs one guest, and nothing of another is left.
async fn comes_to_rest(stage: &Stage, host: &Host, id: ServerId, what: &str) -> Server {
    let mut last = String::new();
    let rest = tokio::time::timeout(SOON, async {
        loop {
            let found = host.servers().one(id).await.unwrap();
            let alive = stage.launch.alive();
            let state = (alive.len() == 1).then(|| alive[0].state());
            let is_at_rest = matches!(
                (found.state, state),
                (ServerState::Running, Some(MachineState::Running))
                    | (ServerState::Paused, Some(MachineState::Paused))
            );
            if is_at_rest && found.operation_id.is_none() {
                return found;
            }
            last = format!("{found:?}, {} VMMs", alive.len());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    });
    let Ok(found) = rest.await else { panic!("{what}: it does not come to rest: {last}") };
    assert_eq!(stage.launch.violations(), Vec::<String>::new(), "{what}");
    let directory = stage.state_dir().join("servers").join(id.to_string());
    assert!(!directory.join("next.sock").exists() && !directory.join("next-will.json").exists(), "{what}");
    found
}

/// Dies, or has VMMs killed, at a checkpoint of this number once it is armed.
#[derive(Default)]
struct StrikeAt {
    number: u32,
    /// The old and the new VMM, those that live then; the daemon when neither.
    victims: (bool, bool),
    old: std::sync::Mutex<Option<i32>>,
    armed: AtomicBool,
    passed: AtomicU32,
    launch: std::sync::Mutex<Option<crate::fake_vmm::FakeLaunch>>,
}

impl Checkpoint for StrikeAt {
    fn reached(&self, _: &'static str) -> Fate {
        if !self.armed.load(Ordering::SeqCst) || self.passed.fetch_add(1, Ordering::SeqCst) + 1 != self.number
        {
            return Fate::Live;
        }
        if self.victims == (false, false) {
            return Fate::Die;
        }
        let old = *self.old.lock().unwrap();
        if let Some(launch) = &*self.launch.lock().unwrap() {
            for vmm in launch.alive() {
                let is_old = Some(vmm.pid) == old;
                if is_old && self.victims.0 || !is_old && self.victims.1 {
                    vmm.kill();
                }
            }
        }
        Fate::Live
    }
}

/// One upgrade of a server in this state with one strike. Answers whether it was struck, and whether the machine lived.
async fn survives(
    state: ServerState,
    number: u32,
    victims: (bool, bool),
    death: Option<Death>,
) -> (bool, bool) {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("web1");
    spec.restart_policy = RestartPolicy::Always;
    let id = created(&host, spec).await.id;
    if state == ServerState::Paused {
        let done = host.servers().act(&Call::by_host(), id, ServerAction::Pause).await.unwrap();
        succeeded(&host, done.body.operation.id).await;
    }
    survives_of(&stage, host, id, number, victims, death).await
}

/// Strikes these at every point. Answers how many points there are, and at how many the machine lived.
async fn sweep(state: ServerState, victims: (bool, bool)) -> (u32, u32) {
    let (mut number, mut lived_count) = (1, 0);
    loop {
        let (struck, lived) = survives(state, number, victims, None).await;
        lived_count += u32::from(lived);
        if !struck {
            break;
        }
        number += 1;
    }
    println!("{state:?}, {victims:?}: {} points, the machine lived at {lived_count}", number - 1);
    assert!(number > 10, "only {number} points");
    (number - 1, lived_count)
}

/// The same of a server that is there, the only one.
pub(super) async fn survives_of(
    stage: &Stage,
    host: Host,
    id: ServerId,
    number: u32,
    victims: (bool, bool),
    death: Option<Death>,
) -> (bool, bool) {
    let before = host.servers().one(id).await.unwrap().state;
    host.close().await;
    drop(host);
    let old = stage.launch.only();
    let strike = Arc::new(StrikeAt { number, victims, ..StrikeAt::default() });
    *strike.old.lock().unwrap() = Some(old.pid);
    *strike.launch.lock().unwrap() = Some(stage.launch.clone());
    let mut host = stage.open_watched(strike.clone()).await.unwrap();
    until(&host, id, |server| server.state == before).await;
    stage.launch.set_death(death);
    strike.armed.store(true, Ordering::SeqCst);
    let what = format!("{victims:?} at point {number}, {death:?}");
    let call = keyed("upgrade");
    let asked = host.servers().act(&call, id, UPGRADE).await;
    let end = tokio::time::Instant::now() + SOON;
    if let Ok(asked) = &asked {
        while !host.is_dead() {
            match host
                .operations()
                .one(asked.body.operation.id, Some(std::time::Duration::from_millis(20)))
                .await
            {
                Ok(operation) if operation.state.is_final() => break,
                _ => assert!(tokio::time::Instant::now() < end, "{what}: neither dead nor over"),
            }
        }
    }
    strike.armed.store(false, Ordering::SeqCst);
    stage.launch.set_death(None);
    let died = host.is_dead();
    if died {
        host.close().await;
        drop(host);
        host = stage.open().await;
    }
    let struck = died || strike.passed.load(Ordering::SeqCst) >= number;
    let here = comes_to_rest(stage, &host, id, &what).await;
    let only = stage.launch.only();
    let is_new = only.pid != old.pid;
    let lived = !is_new || !only.has_booted();
    assert!(!lived || here.state == before, "{what}: {before:?} became {here:?}");
    if let Ok(asked) = asked {
        let operation = ended(&host, asked.body.operation.id).await;
        let has_succeeded = operation.state == OperationState::Succeeded;
        assert!(!has_succeeded || is_new, "{what}: {operation:?}");
        assert!(has_succeeded || !is_new || !lived, "{what}: {operation:?}");
        // A machine that nobody killed is not lost.
        assert!(lived || victims != (false, false) || death.is_some(), "{what}: {operation:?}, {here:?}");
    }
    host.close().await;
    (struck, lived)
}

#[tokio::test]
async fn wherever_the_daemon_dies_the_machine_lives_in_one_vmm() {
    let (points, lived_count) = sweep(ServerState::Running, (false, false)).await;
    assert_eq!(lived_count, points + 1, "and once when nobody dies");
}

#[tokio::test]
async fn wherever_the_daemon_or_a_vmm_dies_one_that_is_paused_stays_so() {
    let (points, lived_count) = sweep(ServerState::Paused, (false, false)).await;
    assert_eq!(lived_count, points + 1, "and once when nobody dies");
    for victims in [(true, false), (false, true)] {
        let (_, lived_count) = sweep(ServerState::Paused, victims).await;
        assert!(lived_count > 3, "{victims:?}: it lived at {lived_count} only");
    }
    for (side, phase) in [(Side::Source, Phase::Commit), (Side::Target, Phase::Ready)] {
        let death = Some((side, phase, false));
        let (_, lived) = survives(ServerState::Paused, u32::MAX, (true, true), death).await;
        assert!(lived, "{side:?} dead at {phase:?}");
    }
}

#[tokio::test]
async fn wherever_a_vmm_dies_there_is_one_machine() {
    for victims in [(true, false), (false, true), (true, true)] {
        let (_, lived_count) = sweep(ServerState::Running, victims).await;
        // Whoever dies alone takes the machine along only while it has it.
        assert!(lived_count > 3 || victims == (true, true), "{victims:?}: it lived at {lived_count} only");
    }
}

/// The machine is lost only when the one that has it dies: whoever listened knows whether the other has run.
#[tokio::test]
async fn a_vmm_that_dies_in_any_phase_costs_the_machine_only_if_it_had_it() {
    for (death, lives) in [
        ((Side::Source, Phase::Ready, false), true),
        ((Side::Source, Phase::Commit, false), true),
        ((Side::Source, Phase::Commit, true), true),
        ((Side::Source, Phase::Moved, false), true),
        ((Side::Source, Phase::Moved, true), true),
        ((Side::Target, Phase::Ready, false), true),
        ((Side::Target, Phase::Ready, true), true),
        ((Side::Target, Phase::Release, false), true),
        ((Side::Target, Phase::Release, true), false),
        ((Side::Target, Phase::Moved, false), false),
        ((Side::Target, Phase::Moved, true), false),
    ] {
        let (_, lived) = survives(ServerState::Running, u32::MAX, (true, true), Some(death)).await;
        assert_eq!(lived, lives, "{death:?}");
    }
}

/// A second death, of the daemon, takes what it knew along: then only one thing is sure, that there are not two.
#[tokio::test]
async fn a_vmm_and_the_daemon_that_die_leave_one_machine() {
    let phases = [Phase::Ready, Phase::Commit, Phase::Moved, Phase::Release];
    for side in [Side::Source, Side::Target] {
        for phase in phases {
            for number in 3..9 {
                let _ =
                    survives(ServerState::Running, number, (false, false), Some((side, phase, false))).await;
            }
        }
    }
}

#[tokio::test]
async fn whoever_wants_its_memory_in_between_is_told_that_it_has_a_machine() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    // As it is between two pieces of work.
    let between = move |tx: &Tx<'_>| {
        let mut record: ServerRecord = records::one(tx, id.0)?;
        let vmm = record.life.phase.vmm().expect("a machine").clone();
        record.life.phase = lifecycle::Phase::Upgrading { vmm, next: None, was_paused: false };
        record::save(tx, &mut record)
    };
    host.store().write(between).await.unwrap();
    let clones = CreateClones { name: "twin".parse().unwrap(), count: 1, labels: Labels::default() };
    let refused = [
        host.servers().snapshot(&Call::by_host(), id, named("now", true)).await.unwrap_err(),
        host.servers().clone_server(&Call::by_host(), id, clones).await.unwrap_err(),
    ];
    for cause in refused {
        assert_eq!(cause.code, Code::WrongState);
        assert!(cause.detail.contains("going to another VMM"), "{}", cause.detail);
    }
    host.close().await;
}
