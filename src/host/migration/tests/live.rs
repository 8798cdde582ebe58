//! Servers that move while they run, between two hosts in one process whose VMMs are fakes: with either daemon or either VMM
//! dead at every point, and the connections cut. A guest that two VMMs run at the same time is a violation that the fakes see.
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use model::migration::{MigrationOwner, SettleMigration};
use model::operation::OperationState;
use model::server::{RestartPolicy, Server, ServerState};
use wire::control::MachineState;

use super::cuts::cable;
use super::moves::{DieAt, Ground, again, forgotten, gone, has, listening, waited};
use super::*;
use crate::servers::lifecycle;
use crate::{Checkpoint, Fate};

#[tokio::test]
async fn a_server_that_runs_moves_with_all_it_has_and_back_again() {
    let ground = Ground::with(ServerState::Running).await;
    let mut hosts = [ground.stages[0].open().await, ground.stages[1].open().await];
    let id = ground.server;
    let descend = move |tx: &Tx<'_>| {
        let mut record: ServerRecord = records::one(tx, id.0)?;
        record.descent = 3;
        records::save(tx, &mut record)
    };
    hosts[0].store().write(descend).await.unwrap();
    let first = has(&hosts[0], id).await.unwrap();
    let volume = first.volumes[0].volume_id;
    let bytes = std::fs::read(ground.disk(0, volume)).unwrap();
    for hop in 0..2 {
        let [source, target] = &hosts;
        let address = listening(target).await;
        let made = ticket(target, None).await.unwrap().ticket;
        let plan = source.migrations().plan(id, spec(address, made.clone())).await.unwrap();
        assert!(plan.blocked_by.is_empty(), "{plan:?}");
        let call = stage::keyed(&format!("hop {hop}"));
        let moved = source.migrations().migrate(&call, id, spec(address, made)).await.unwrap();
        stage::succeeded(source, moved.body.operation.id).await;
        assert!(has(source, id).await.is_none() && !ground.disk(hop, volume).exists());
        let here = stage::until(target, id, |server| server.state == ServerState::Running).await;
        let Server { image_id, nics, generation, updated_at, allowed_actions, .. } = here.clone();
        let same = Server { image_id, nics, generation, updated_at, allowed_actions, ..first.clone() };
        assert_eq!(here, same);
        // By which the size of the seed goes that its guest knows.
        let record: ServerRecord =
            target.store().read(move |connection| records::one(connection, id.0)).await.unwrap();
        assert_eq!(record.descent, 3);
        assert!(std::fs::read(ground.disk(1 - hop, volume)).unwrap() == bytes, "its disk is another");
        let vmm = ground.stages[1 - hop].launch.only();
        assert_eq!(vmm.state(), MachineState::Running);
        waited("the source's VMM to end", async || ground.stages[hop].launch.alive().is_empty()).await;
        assert_eq!(
            (
                target.servers().usage().await.unwrap().vcpus_used > 0,
                source.servers().usage().await.unwrap().vcpus_used
            ),
            (true, 0)
        );
        hosts.reverse();
    }
    // It is a server like any other.
    for action in [model::server::ServerAction::Pause, model::server::ServerAction::Resume] {
        let done = hosts[0].servers().act(&Call::by_host(), id, action).await.unwrap();
        stage::succeeded(&hosts[0], done.body.operation.id).await;
    }
    no_violations(&ground);
    for host in hosts {
        host.close().await;
    }
}

async fn restarting(host: &Host, id: ServerId, policy: RestartPolicy) {
    let patch =
        model::server::PatchServer { restart_policy: Some(policy), ..model::server::PatchServer::default() };
    host.servers().patch(&Call::by_host(), id, patch).await.unwrap();
}

pub(super) fn no_violations(ground: &Ground) {
    for stage in &ground.stages {
        assert_eq!(stage.launch.violations(), Vec::<String>::new());
    }
}

/// Kills a VMM when a daemon reaches one of its points, once it is armed.
struct KillAt {
    number: u32,
    armed: AtomicBool,
    passed: AtomicU32,
    has_killed: AtomicBool,
    vmms: crate::fake_vmm::FakeLaunch,
}

impl Checkpoint for KillAt {
    fn reached(&self, _: &'static str) -> Fate {
        if self.armed.load(Ordering::SeqCst) && self.passed.fetch_add(1, Ordering::SeqCst) + 1 == self.number
        {
            for vmm in self.vmms.alive() {
                vmm.kill();
                self.has_killed.store(true, Ordering::SeqCst);
            }
        }
        Fate::Live
    }
}

/// Whether a host has one VMM, whose guest does what it did.
fn goes_on(ground: &Ground, at: usize) -> bool {
    let alive = ground.stages[at].launch.alive();
    let state = match ground.state {
        ServerState::Paused => MachineState::Paused,
        _ => MachineState::Running,
    };
    alive.len() == 1 && alive[0].state() == state
}

/// In the end one host has the server, whole and alone, and it does there what it did. Answers which.
async fn comes_to_rest(ground: &Ground, hosts: &[Host], what: &str) -> usize {
    let id = ground.server;
    let mut last = String::new();
    let rest = tokio::time::timeout(SOON, async {
        loop {
            let states = [has(&hosts[0], id).await, has(&hosts[1], id).await];
            let at = match &states {
                [Some(server), None] if server.state == ground.state => Some(0),
                [None, Some(server)] if server.state == ground.state => Some(1),
                _ => None,
            };
            // The death of a VMM may not be noticed yet, and one that died is followed by another.
            if let Some(at) = at.filter(|at| goes_on(ground, *at)) {
                return at;
            }
            last =
                format!("{:?}", states.map(|state| state.map(|server| (server.state, server.state_reason))));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let Ok(at) = rest.await else { panic!("{what}: it does not come to rest: {last}") };
    forgotten(&hosts[0]).await;
    let volume = has(&hosts[at], id).await.unwrap().volumes[0].volume_id;
    let bytes = std::fs::read(ground.disk(at, volume)).unwrap();
    assert!(bytes.starts_with(b"disk") && bytes.len() as u64 == stage::DISK_BYTES, "{what}");
    assert!(!ground.disk(1 - at, volume).exists(), "{what}: a disk is left over");
    waited("the other's VMM to end", async || ground.stages[1 - at].launch.alive().is_empty()).await;
    // It may have died when all was over.
    waited(&format!("the guest to go on: {what}"), async || goes_on(ground, at)).await;
    no_violations(ground);
    at
}

/// One move in which the daemon `victim` dies at its checkpoint `number`, and comes back. Answers whether it died, and which
/// host had the server then.
async fn survives(state: ServerState, victim: usize, number: u32) -> Option<usize> {
    let ground = Ground::with(state).await;
    let id = ground.server;
    let death = Arc::new(DieAt { number, ..DieAt::default() });
    let open = async |at: usize| match at == victim {
        true => ground.stages[at].open_watched(death.clone()).await.unwrap(),
        false => ground.stages[at].open().await,
    };
    let mut hosts = vec![open(0).await, open(1).await];
    let address = listening(&hosts[1]).await;
    let made = ticket(&hosts[1], None).await.unwrap().ticket;
    stage::until(&hosts[0], id, |server| server.state == state).await;
    death.armed.store(true, Ordering::SeqCst);
    let call = stage::keyed("move");
    let moved = hosts[0].migrations().migrate(&call, id, spec(address, made)).await;
    let end = tokio::time::Instant::now() + SOON;
    while !hosts[victim].is_dead() && moved.is_ok() {
        let rows = hosts[0].store().read(moving::all).await.map(|all| all.len());
        if matches!(rows, Ok(0)) && has(&hosts[0], id).await.is_none() {
            break;
        }
        assert!(tokio::time::Instant::now() < end, "{victim} {number}: neither dead nor over");
        tokio::task::yield_now().await;
    }
    death.armed.store(false, Ordering::SeqCst);
    let died = hosts[victim].is_dead();
    if died {
        again(&ground, &mut hosts, victim, address).await;
    }
    let what = format!("daemon {victim} at its point {number}");
    let at = comes_to_rest(&ground, &hosts, &what).await;
    if let Ok(moved) = moved {
        let operation = stage::ended(&hosts[0], moved.body.operation.id).await;
        assert_eq!(operation.state == OperationState::Succeeded, at == 1, "{what}: {operation:?}");
    }
    // However often it came back: no VMM has died, so the guest has not told it by itself.
    if at == 1 {
        waited(&format!("its network to be told: {what}"), async || is_announced(&ground)).await;
    }
    for host in hosts {
        host.close().await;
    }
    died.then_some(at)
}

pub(super) async fn sweep_daemons(state: ServerState, victim: usize) {
    let mut found = [0, 0];
    let mut number = 1;
    while let Some(at) = survives(state, victim, number).await {
        found[at] += 1;
        number += 1;
    }
    println!("daemon {victim} died at {} points: {found:?} times the server was at host 0, 1", number - 1);
    assert!(number > 12 && found[0] > 3 && found[1] > 3, "{found:?}");
}

#[tokio::test]
async fn wherever_the_source_dies_one_machine_runs() {
    sweep_daemons(ServerState::Running, 0).await;
}

#[tokio::test]
async fn wherever_the_target_dies_one_machine_runs() {
    sweep_daemons(ServerState::Running, 1).await;
}

/// One move in which the VMM of `victim` dies as the daemon `watched` reaches its checkpoint `number`.
async fn survives_without(state: ServerState, victim: usize, watched: usize, number: u32) -> (bool, usize) {
    let ground = Ground::with(state).await;
    let id = ground.server;
    let death = Arc::new(KillAt {
        number,
        armed: AtomicBool::new(false),
        passed: AtomicU32::new(0),
        has_killed: AtomicBool::new(false),
        vmms: ground.stages[victim].launch.clone(),
    });
    let open = async |at: usize| match at == watched {
        true => ground.stages[at].open_watched(death.clone()).await.unwrap(),
        false => ground.stages[at].open().await,
    };
    let hosts = [open(0).await, open(1).await];
    restarting(&hosts[0], id, RestartPolicy::Always).await;
    stage::until(&hosts[0], id, |server| server.state == state).await;
    let address = listening(&hosts[1]).await;
    let made = ticket(&hosts[1], None).await.unwrap().ticket;
    death.armed.store(true, Ordering::SeqCst);
    let moved = hosts[0].migrations().migrate(&Call::by_host(), id, spec(address, made)).await;
    let what = format!("the VMM of {victim} as daemon {watched} is at its point {number}");
    if let Ok(moved) = &moved {
        stage::ended(&hosts[0], moved.body.operation.id).await;
    }
    let at = comes_to_rest(&ground, &hosts, &what).await;
    death.armed.store(false, Ordering::SeqCst);
    for host in hosts {
        host.close().await;
    }
    // Beyond the last point of the move nothing is reached.
    (death.passed.load(Ordering::SeqCst) >= number, at)
}

pub(super) async fn sweep_vmms(state: ServerState, victim: usize) {
    for watched in [0, 1] {
        let (mut number, mut found) = (1, [0, 0]);
        loop {
            let (is_reached, at) = survives_without(state, victim, watched, number).await;
            found[at] += 1;
            if !is_reached {
                break;
            }
            number += 1;
        }
        println!("VMM {victim}, daemon {watched}: {} points, at host 0, 1: {found:?}", number - 1);
        assert!(number > 12, "{number}");
    }
}

#[tokio::test]
async fn wherever_the_sources_vmm_dies_one_machine_runs() {
    sweep_vmms(ServerState::Running, 0).await;
}

#[tokio::test]
async fn wherever_the_targets_vmm_dies_one_machine_runs() {
    sweep_vmms(ServerState::Running, 1).await;
}

/// Whether the target's network was told where the machine is.
fn is_announced(ground: &Ground) -> bool {
    let scene = ground.stages[1].plumbing.scene();
    !scene.taps.is_empty()
        && scene.taps.iter().all(|(tap, port)| {
            let mut packet = [0; 72];
            let is_there = scene.sent[tap].read_exact_at(&mut packet, 0).is_ok();
            let frame = &packet[sys::tap::VNET_HEADER_BYTES..];
            is_there
                && frame[6..12] == port.mac.0
                && frame[12..14] == [8, 6]
                && frame[28..32] == port.ipv4.octets()
        })
}

/// One move over a cable whose connection `number` is cut. Answers where the server is then.
async fn moved_over(number: usize, is_to_source: bool, most: u64) -> usize {
    let ground = Ground::with(ServerState::Running).await;
    let hosts = [ground.stages[0].open().await, ground.stages[1].open().await];
    stage::until(&hosts[0], ground.server, |server| server.state == ServerState::Running).await;
    let (address, passing) = cable(listening(&hosts[1]).await, number, is_to_source, most).await;
    let made = ticket(&hosts[1], None).await.unwrap().ticket;
    let asked = hosts[0].migrations().migrate(&Call::by_host(), ground.server, spec(address, made)).await;
    let operation = asked.unwrap().body.operation.id;
    let what = format!("connection {number} cut after {most}");
    let at = comes_to_rest(&ground, &hosts, &what).await;
    let operation = stage::ended(&hosts[0], operation).await;
    assert_eq!(operation.state == OperationState::Succeeded, at == 1, "{what}: {operation:?}");
    if at == 1 {
        waited(&format!("its network to be told: {what}"), async || is_announced(&ground)).await;
    }
    passing.abort();
    for host in hosts {
        host.close().await;
    }
    at
}

#[tokio::test]
async fn wherever_a_connection_is_cut_one_machine_runs() {
    // That of the daemons, the first of memory, and that of the disk.
    let of_disk = 2 + usize::from(super::super::live::memory_streams());
    for (number, step) in [(1, 397), (2, 1500), (of_disk, 300_000)] {
        for is_to_source in [false, true] {
            let (mut cuts, mut in_a_row, mut found) = (0, 0, [0, 0]);
            while in_a_row < 3 && cuts < 24 {
                let at = moved_over(number, is_to_source, cuts * step).await;
                found[at] += 1;
                in_a_row = if at == 1 { in_a_row + 1 } else { 0 };
                cuts += 1;
            }
            println!(
                "connection {number}, to the source: {is_to_source}: {cuts} cuts, at host 0, 1: {found:?}"
            );
            assert!(found[0] > 0 && found[1] > 0, "{number} {is_to_source}: {found:?}");
        }
    }
}

/// Stops a daemon at points until it may go on.
struct HoldAt {
    points: &'static [&'static str],
    reached: tokio::sync::mpsc::UnboundedSender<&'static str>,
    go: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Checkpoint for HoldAt {
    fn reached(&self, point: &'static str) -> Fate {
        if self.points.contains(&point) {
            let _ = self.reached.send(point);
            // Or nobody holds it any more.
            let _ = tokio::task::block_in_place(|| self.go.lock().unwrap().recv());
        }
        Fate::Live
    }
}

/// One move that is cancelled when the source has reached a point, and goes on when the target has got as far as this.
async fn cancelled_at(points: &'static [&'static str], target_phase: Option<Phase>) {
    let ground = Ground::with(ServerState::Running).await;
    let (reached, mut held) = tokio::sync::mpsc::unbounded_channel();
    let (go, waiting) = std::sync::mpsc::channel();
    let hold = Arc::new(HoldAt { points, reached, go: std::sync::Mutex::new(waiting) });
    let source = ground.stages[0].open_watched(hold).await.unwrap();
    let target = ground.stages[1].open().await;
    let id = ground.server;
    stage::until(&source, id, |server| server.state == ServerState::Running).await;
    let address = listening(&target).await;
    let made = ticket(&target, None).await.unwrap().ticket;
    let moved = source.migrations().migrate(&Call::by_host(), id, spec(address, made)).await.unwrap();
    let operation = moved.body.operation.id;
    for point in points {
        assert_eq!(held.recv().await, Some(*point));
        if *point == points[0] {
            source.operations().cancel(&Call::by_host(), operation).await.unwrap();
            stage::until(&source, id, |server| server.state == ServerState::Running).await;
        } else if let Some(phase) = target_phase {
            let has_come = async || {
                let all = target.store().read(moving::all).await.unwrap();
                all.iter().any(|held| held.phase == phase)
            };
            waited("the target to get so far", has_come).await;
        }
        go.send(()).unwrap();
    }
    drop(go);
    assert_eq!(stage::ended(&source, operation).await.state, OperationState::Cancelled);
    gone(&target, id).await;
    forgotten(&source).await;
    let vmm = ground.stages[0].launch.only();
    waited(&format!("the guest to run: {points:?}"), async || vmm.state() == MachineState::Running).await;
    let here = stage::until(&source, id, |server| server.state == ServerState::Running).await;
    assert!(here.allowed_actions.contains(&"migrate".to_owned()), "{here:?}");
    assert!(ground.stages[1].launch.alive().is_empty());
    no_violations(&ground);
    source.close().await;
    target.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_move_that_is_cancelled_at_any_time_leaves_the_machine_running_where_it_was() {
    for point in
        [&["move.accepted"], &["move.joined"], &["move.sending"], &["move.heard"], &["move.promised"]]
    {
        cancelled_at(point, None).await;
    }
    // The machine is begun to be sent when the actor has looked, and stands still before anybody looks again.
    cancelled_at(&["move.begun", "move.sending"], Some(Phase::Ready)).await;
}

#[tokio::test]
async fn only_the_host_of_a_move_joins_it_and_each_stream_once() {
    let ground = Ground::new().await;
    let target = ground.stages[1].open().await;
    let address = listening(&target).await;
    let stages = [Stage::new(), Stage::new()];
    let (source, stranger) = (stages[0].open().await, stages[1].open().await);
    let begun = Move {
        id: Uuid::now_v7(),
        server: ground.server,
        side: Side::Target,
        phase: Phase::Copy,
        peer: source.migrations().identity.fingerprint(),
        peer_name: "source".to_owned(),
        address: None,
        streams: None,
    };
    let awaited = target.migrations().await_streams(&begun, 2);
    let fingerprint = target.migrations().identity.fingerprint();
    let joins = async |host: &Host, id: Uuid, stream: u16| {
        let identity = &host.migrations().identity;
        let mut link = source::connect(identity, address, fingerprint).await.unwrap();
        link.send(&wire::peer::Message::Join { transfer: id.to_string(), stream }).await.unwrap();
        let answer = link.message(SOON).await.unwrap();
        (matches!(answer, wire::peer::Message::Say(wire::peer::Saying::Copying)), link)
    };
    let mut held = Vec::new();
    for (host, id, stream, is_let_in) in [
        (&stranger, begun.id, 0, false),
        (&source, Uuid::now_v7(), 0, false),
        (&source, begun.id, 2, false),
        (&source, begun.id, 0, true),
        (&source, begun.id, 0, false),
        (&source, begun.id, 1, true),
    ] {
        let (was_let_in, link) = joins(host, id, stream).await;
        assert_eq!(was_let_in, is_let_in, "{stream}");
        held.push(link);
    }
    let (streams, _pumps) = awaited.all(1).await.unwrap();
    assert_eq!((streams.sockets.len(), streams.of_memory), (2, 1));
    // Nobody waits any more.
    assert!(!joins(&source, begun.id, 0).await.0);
    for host in [source, stranger, target] {
        host.close().await;
    }
}

/// Pulls the cable when a daemon reaches a point.
struct PullAt {
    point: &'static str,
    cable: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Checkpoint for PullAt {
    fn reached(&self, point: &'static str) -> Fate {
        if point == self.point
            && let Some(cable) = self.cable.lock().unwrap().take()
        {
            cable.abort();
        }
        Fate::Live
    }
}

/// Two hosts that are both in doubt about a machine that moved, of which the source has said *commit* to nobody.
async fn both_in_doubt(ground: &Ground) -> [Host; 2] {
    let pull = Arc::new(PullAt { point: "move.decided", cable: std::sync::Mutex::default() });
    let source = ground.stages[0].open_watched(pull.clone()).await.unwrap();
    let target = ground.stages[1].open().await;
    let id = ground.server;
    stage::until(&source, id, |server| server.state == ServerState::Running).await;
    let (address, passing) = cable(listening(&target).await, usize::MAX, false, 0).await;
    *pull.cable.lock().unwrap() = Some(passing);
    let made = ticket(&target, None).await.unwrap().ticket;
    source.migrations().migrate(&Call::by_host(), id, spec(address, made)).await.unwrap();
    for host in [&source, &target] {
        stage::until(host, id, |server| server.state == ServerState::InDoubt).await;
    }
    [source, target]
}

fn vouched(owner: MigrationOwner) -> SettleMigration {
    SettleMigration { owner, proof: "both hosts were looked at".to_owned() }
}

#[tokio::test]
async fn what_the_sources_vmm_knows_counts_more_than_what_an_operator_says() {
    let ground = Ground::with(ServerState::Running).await;
    let [source, target] = both_in_doubt(&ground).await;
    let id = ground.server;
    // The target is not asked any more, and its VMM is let run.
    let here = target.migrations().settle(&Call::by_host(), id, vouched(MigrationOwner::Here)).await;
    here.unwrap();
    stage::until(&target, id, |server| server.state == ServerState::Running).await;
    ground.stages[0].launch.only().hears_that_it_runs_there();
    let refused = source.migrations().settle(&Call::by_host(), id, vouched(MigrationOwner::Here)).await;
    // Or it was asked once more meanwhile, and has gone.
    assert!(matches!(refused.unwrap_err().code, Code::WrongState | Code::NotFound));
    gone(&source, id).await;
    no_violations(&ground);
    source.close().await;
    target.close().await;
}

#[tokio::test]
async fn a_server_that_runs_on_both_hosts_says_so_while_it_runs() {
    let ground = Ground::with(ServerState::Running).await;
    let [source, target] = both_in_doubt(&ground).await;
    let id = ground.server;
    for host in [&target, &source] {
        host.migrations().settle(&Call::by_host(), id, vouched(MigrationOwner::Here)).await.unwrap();
        stage::until(host, id, |server| server.state == ServerState::Running).await;
    }
    // The cable is there again.
    let address = target.migrations().listen(address_of(&source, id).await).await.unwrap();
    let clashed = |server: &Server| server.state_reason.as_ref().is_some_and(|why| why.code == "two_owners");
    let both = stage::until(&source, id, clashed).await;
    assert_eq!(both.state, ServerState::Running, "{address}");
    assert!(both.state_reason.unwrap().detail.contains("may run it now"));
    source.close().await;
    target.close().await;
}

/// Where the source of a move looks for the target.
async fn address_of(source: &Host, id: ServerId) -> SocketAddr {
    let all = source.store().read(moving::all).await.unwrap();
    all.iter().find(|held| held.server == id).and_then(|held| held.address).expect("a move from here")
}

#[tokio::test]
async fn a_machine_that_went_elsewhere_is_not_started_again_here_whatever_the_policy() {
    let ground = Ground::with(ServerState::Running).await;
    let id = ground.server;
    let host = ground.stages[0].open().await;
    restarting(&host, id, RestartPolicy::Always).await;
    host.close().await;
    drop(host);
    let [source, target] = both_in_doubt(&ground).await;
    // The operator is believed, and only then the word comes.
    source.migrations().settle(&Call::by_host(), id, vouched(MigrationOwner::Here)).await.unwrap();
    stage::until(&source, id, |server| server.state == ServerState::Running).await;
    ground.stages[0].launch.only().hears_that_it_runs_there();
    let again = move |tx: &Tx<'_>| {
        let mut record: ServerRecord = records::one(tx, id.0)?;
        let lifecycle::Phase::Running { vmm } = record.life.phase.clone() else {
            panic!("{:?}", record.life)
        };
        record.life.phase = lifecycle::Phase::Resuming { vmm };
        records::save(tx, &mut record)
    };
    source.store().write(again).await.unwrap();
    source.servers().wake(id);
    let failed = stage::until(&source, id, |server| server.state == ServerState::Failed).await;
    assert_eq!(failed.state_reason.unwrap().code, "two_owners");
    source.close().await;
    target.close().await;
}

#[tokio::test]
async fn a_machine_that_came_and_cannot_run_is_started_anew_as_after_a_failure() {
    for (policy, state) in
        [(RestartPolicy::OnFailure, ServerState::Running), (RestartPolicy::Never, ServerState::Failed)]
    {
        let ground = Ground::with(ServerState::Running).await;
        let (source, target) = (ground.stages[0].open().await, ground.stages[1].open().await);
        let id = ground.server;
        restarting(&source, id, policy).await;
        stage::until(&source, id, |server| server.state == ServerState::Running).await;
        ground.stages[1].launch.set_guest(crate::fake_vmm::Guest::CannotArrive);
        let address = listening(&target).await;
        let made = ticket(&target, None).await.unwrap().ticket;
        let moved = source.migrations().migrate(&Call::by_host(), id, spec(address, made)).await.unwrap();
        stage::succeeded(&source, moved.body.operation.id).await;
        gone(&source, id).await;
        let came = |server: &Server| match state {
            ServerState::Running => {
                server.state == state && ground.stages[1].launch.only().state() == MachineState::Running
            }
            _ => server.state == state,
        };
        let here = stage::until(&target, id, came).await;
        if state == ServerState::Failed {
            assert_eq!(here.state_reason.unwrap().code, "did_not_arrive");
        }
        no_violations(&ground);
        source.close().await;
        target.close().await;
    }
}
