//! Servers that move between two hosts in one process: with everything they have, cancelled, refused, and with either
//! daemon dead or either connection cut at every point.
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use model::OperationId;
use model::migration::{MigrationOwner, SettleMigration};
use model::operation::OperationState;
use model::server::{PatchServer, Server, ServerAction, ServerState, StopServer};
use model::volume::VolumeState;

use super::*;
use crate::{Checkpoint, Fate};

/// Two hosts, the server `web1` on the source.
pub(super) struct Ground {
    pub(super) stages: [Stage; 2],
    pub(super) server: ServerId,
    /// What it does.
    pub(super) state: ServerState,
}

impl Ground {
    pub(super) async fn new() -> Ground {
        Ground::with(ServerState::Stopped).await
    }

    /// With the server off, running or paused.
    pub(super) async fn with(state: ServerState) -> Ground {
        let start = state != ServerState::Stopped;
        let stages = [Stage::new(), Stage::new()];
        let source = stages[0].open_with_image().await;
        let mut wanted = stage::server("web1");
        (wanted.start, wanted.external_ref) = (start, Some("order-1".to_owned()));
        wanted.user_data = Some("#!/bin/sh\nexit\n".to_owned());
        wanted.labels = serde_json::from_value(serde_json::json!({ "tier": "front" })).unwrap();
        let server = stage::created(&source, wanted).await.id;
        if state == ServerState::Paused {
            let asked = source.servers().act(&Call::by_host(), server, ServerAction::Pause).await.unwrap();
            stage::succeeded(&source, asked.body.operation.id).await;
        }
        source.close().await;
        let target = stages[1].open_with_image().await;
        target.close().await;
        Ground { stages, server, state }
    }

    pub(super) fn disk(&self, at: usize, volume: model::VolumeId) -> std::path::PathBuf {
        self.stages[at].state_dir().join("volumes").join(format!("{volume}.raw"))
    }
}

pub(super) async fn listening(host: &Host) -> SocketAddr {
    host.migrations().listen("127.0.0.1:0".parse().unwrap()).await.unwrap()
}

pub(super) async fn has(host: &Host, id: ServerId) -> Option<Server> {
    host.servers().one(id).await.ok()
}

#[tokio::test]
async fn a_server_that_is_off_moves_with_all_it_has_and_back_again() {
    let ground = Ground::new().await;
    let mut hosts = [ground.stages[0].open().await, ground.stages[1].open().await];
    let id = ground.server;
    let first = has(&hosts[0], id).await.unwrap();
    let volume = first.volumes[0].volume_id;
    let ring =
        |at: usize| ground.stages[at].state_dir().join("servers").join(id.to_string()).join("console.ring");
    // What the guest has written since, with a hole after it and a word at the very end.
    let disk = std::fs::File::options().write(true).open(ground.disk(0, volume)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, b"word", stage::DISK_BYTES - 4).unwrap();
    let bytes = std::fs::read(ground.disk(0, volume)).unwrap();
    let mut console = wire::console::Ring::create(
        std::fs::File::options().read(true).write(true).create(true).truncate(true).open(ring(0)).unwrap(),
        4096,
    )
    .unwrap();
    console.append(b"once upon a time").unwrap();
    for hop in 0..2 {
        let [source, target] = &hosts;
        let (from, to) = (hop, 1 - hop);
        let address = listening(target).await;
        let made = ticket(target, None).await.unwrap().ticket;
        let call = stage::keyed(&format!("hop {hop}"));
        let spec = spec(address, made);
        let moved = source.migrations().migrate(&call, id, spec.clone()).await.unwrap();
        assert_eq!(moved.body.resource.as_ref().unwrap().state, ServerState::Moving);
        let ended = stage::succeeded(source, moved.body.operation.id).await;
        assert_eq!(ended.kind, "server.migrate");
        assert_eq!(
            (ended.progress.bytes_done, ended.progress.bytes_total.is_some()),
            (None, false),
            "{ended:?}"
        );
        // Once more with the same key: the ticket is gone, and so is the server.
        let again = source.migrations().migrate(&call, id, spec.clone()).await.unwrap();
        assert!(again.replayed && again.body == moved.body);
        assert!(
            has(source, id).await.is_none() && !ground.disk(from, volume).exists() && !ring(from).exists()
        );
        assert_eq!(source.networks().list(Default::default()).await.unwrap().items[0].addresses_used, 0);
        let here = stage::until(target, id, |server| server.state == ServerState::Stopped).await;
        let Server { image_id, nics, generation, updated_at, .. } = here.clone();
        let expected = Server { image_id, nics: nics.clone(), generation, updated_at, ..first.clone() };
        assert_eq!(here, expected);
        assert!(here.generation > first.generation);
        assert_eq!((nics[0].ipv4, &nics[0].mac), (first.nics[0].ipv4, &first.nics[0].mac));
        assert!(std::fs::read(ground.disk(to, volume)).unwrap() == bytes, "its disk is another");
        let log = target.servers().console_log(id, Some(0), 1000).await.unwrap();
        assert_eq!(log.data, b"once upon a time");
        assert_eq!(target.volumes().one(volume).await.unwrap().state, VolumeState::Ready);
        hosts.reverse();
    }
    // And it lives.
    let started = hosts[0].servers().act(&Call::by_host(), id, ServerAction::Start).await.unwrap();
    stage::succeeded(&hosts[0], started.body.operation.id).await;
    for host in hosts {
        host.close().await;
    }
}

#[tokio::test]
async fn a_ticket_is_for_one_move_and_a_server_stays_that_was_not_to_move_as_it_is() {
    let pair = Pair::new(Stage::new()).await;
    stage::import(&pair.target).await;
    let mut other = stage::server("web3");
    other.start = false;
    let off = stage::created(&pair.source, other).await.id;
    let ticket = pair.ticket().await.ticket;
    let spec = spec(pair.address, ticket);
    let migrate = async |id| pair.source.migrations().migrate(&Call::by_host(), id, spec.clone()).await;
    for (mode, id) in [(MigrationMode::Cold, pair.server), (MigrationMode::Live, off)] {
        let spec = MigrateServer { mode, ..spec.clone() };
        let refused = pair.source.migrations().migrate(&Call::by_host(), id, spec).await.unwrap_err();
        assert_eq!((refused.code, refused.errors[0].code.as_str()), (Code::MigrationBlocked, "state"));
    }
    let off = StopServer { grace_s: 0 };
    let stopped = pair.source.servers().act(&Call::by_host(), pair.server, ServerAction::Stop(off)).await;
    stage::succeeded(&pair.source, stopped.unwrap().body.operation.id).await;
    let moved = migrate(pair.server).await.unwrap();
    stage::succeeded(&pair.source, moved.body.operation.id).await;
    let mut other = stage::server("web2");
    other.start = false;
    let other = stage::created(&pair.source, other).await.id;
    let refused = migrate(other).await.unwrap_err();
    assert_eq!((refused.code, refused.errors[0].code.as_str()), (Code::Invalid, "refused"), "{refused}");
    pair.close().await;
}

#[tokio::test]
async fn a_hibernated_server_moves_with_its_memory_and_goes_on_there() {
    let pair = Pair::new(Stage::new()).await;
    stage::import(&pair.target).await;
    let act = async |host: &Host, action| {
        let asked = host.servers().act(&Call::by_host(), pair.server, action).await.unwrap();
        stage::succeeded(host, asked.body.operation.id).await;
    };
    act(&pair.source, ServerAction::Hibernate).await;
    let memory = |at: usize| {
        let directory = pair._stages[at].state_dir().join("servers").join(pair.server.to_string());
        std::fs::read(directory.join("saved.memory"))
            .ok()
            .zip(std::fs::read(directory.join("saved.state")).ok())
    };
    let saved = memory(0).expect("its memory");
    let ticket = pair.ticket().await.ticket;
    let plan = pair.plan(&ticket).await.unwrap();
    assert!(plan.blocked_by.is_empty() && plan.saved_bytes > 0, "{plan:?}");
    let call = Call::by_host();
    let moved = pair.source.migrations().migrate(&call, pair.server, spec(pair.address, ticket));
    let moved = moved.await.unwrap().body.operation.id;
    let refused = pair.source.servers().act(
        &call,
        pair.server,
        // Which elsewhere gives the memory up.
        ServerAction::Stop(StopServer { grace_s: 0 }),
    );
    let refused = refused.await.unwrap_err();
    assert!(matches!(refused.code, Code::WrongState | Code::NotFound));
    assert!(!refused.detail.contains("grace_s"), "nor does it here: {}", refused.detail);
    stage::succeeded(&pair.source, moved).await;
    let here =
        stage::until(&pair.target, pair.server, |server| server.state == ServerState::Hibernated).await;
    assert_eq!(here.wanted, model::server::Wanted::Hibernated);
    assert!(memory(1).is_some_and(|arrived| arrived == saved) && memory(0).is_none());
    act(&pair.target, ServerAction::Start).await;
    assert!(pair._stages[1].launch.only().is_restored());
    pair.close().await;
}

/// A move that is so slow that it does not end by itself: the disk is all data. Answers its operation when the target has a record
/// of the server.
pub(super) async fn slow_move(ground: &Ground, source: &Host, target: &Host) -> OperationId {
    let id = ground.server;
    let first = has(source, id).await.unwrap();
    let size = 64 << 20;
    let patch = serde_json::from_value(serde_json::json!({ "size_bytes": size })).unwrap();
    source.volumes().patch(&Call::by_host(), first.volumes[0].volume_id, patch).await.unwrap();
    std::fs::write(ground.disk(0, first.volumes[0].volume_id), vec![7; size]).unwrap();
    let address = listening(target).await;
    let made = ticket(target, None).await.unwrap().ticket;
    let slow = MigrateServer { bandwidth_bytes_per_s: Some(1 << 20), ..spec(address, made) };
    let moved = source.migrations().migrate(&Call::by_host(), id, slow).await.unwrap();
    waited("the server to come", async || has(target, id).await.is_some()).await;
    moved.body.operation.id
}

#[tokio::test]
async fn an_operator_sends_back_what_comes_and_the_source_keeps_it() {
    let ground = Ground::new().await;
    let (source, target) = (ground.stages[0].open().await, ground.stages[1].open().await);
    let id = ground.server;
    let moved = slow_move(&ground, &source, &target).await;
    let there =
        SettleMigration { owner: MigrationOwner::There, proof: "there is no room for it here".to_owned() };
    target.migrations().settle(&Call::by_host(), id, there).await.unwrap();
    gone(&target, id).await;
    let ended = stage::ended(&source, moved).await;
    assert_eq!(ended.state, OperationState::Failed);
    // In the words of the host that said so, not that a connection broke.
    let told = ended.error.unwrap();
    assert!(told.detail.contains("is not wanted here any more"), "{told:?}");
    let kept = stage::until(&source, id, |server| server.state == ServerState::Stopped).await;
    forgotten(&source).await;
    let volume = kept.volumes[0].volume_id;
    assert!(ground.disk(0, volume).exists());
    waited("its files to go", async || !ground.disk(1, volume).exists()).await;
    source.close().await;
    target.close().await;
}

#[tokio::test]
async fn while_it_moves_nothing_else_is_done_to_it_and_a_cancelled_move_leaves_it_as_it_was() {
    let ground = Ground::new().await;
    let (source, target) = (ground.stages[0].open().await, ground.stages[1].open().await);
    let id = ground.server;
    let first = has(&source, id).await.unwrap();
    let moved = slow_move(&ground, &source, &target).await;
    let arriving = has(&target, id).await.unwrap();
    assert_eq!(arriving.state, ServerState::Arriving);
    assert_eq!(arriving.allowed_actions, ["settle-migration"]);
    assert_eq!(has(&source, id).await.unwrap().allowed_actions, ["limit-migration"]);
    for host in [&source, &target] {
        for action in [ServerAction::Start, ServerAction::Stop(StopServer { grace_s: 0 })] {
            let refused = host.servers().act(&Call::by_host(), id, action).await.unwrap_err();
            assert_eq!(refused.code, Code::WrongState);
        }
        let how = model::server::DeleteServer::default();
        assert_eq!(
            host.servers().delete(&Call::by_host(), id, how).await.unwrap_err().code,
            Code::WrongState
        );
        let change = PatchServer { vcpus: Some(2), ..PatchServer::default() };
        let refused = host.servers().patch(&Call::by_host(), id, change).await.unwrap_err();
        assert_eq!(refused.code, Code::WrongState);
        let proof = "nobody is in doubt".to_owned();
        let settled = SettleMigration { owner: MigrationOwner::Here, proof };
        let refused = host.migrations().settle(&Call::by_host(), id, settled).await.unwrap_err();
        assert_eq!(refused.code, Code::WrongState);
    }
    source.operations().cancel(&Call::by_host(), moved).await.unwrap();
    let ended = stage::ended(&source, moved).await;
    assert_eq!(ended.state, OperationState::Cancelled);
    assert_eq!(has(&source, id).await.unwrap().state, ServerState::Stopped);
    gone(&target, id).await;
    forgotten(&source).await;
    assert!(!ground.disk(1, first.volumes[0].volume_id).exists());
    let started = source.servers().act(&Call::by_host(), id, ServerAction::Start).await.unwrap();
    stage::succeeded(&source, started.body.operation.id).await;
    source.close().await;
    target.close().await;
}

/// Waits until a host has no such server.
pub(super) async fn gone(host: &Host, id: ServerId) {
    waited("the server to go", async || has(host, id).await.is_none()).await;
}

/// Waits until a source has nothing more to say about any move.
pub(super) async fn forgotten(host: &Host) {
    waited("the move to be forgotten", async || {
        host.store().read(moving::all).await.is_ok_and(|all| all.iter().all(|held| held.side == Side::Target))
    })
    .await;
}

pub(super) async fn waited(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + SOON;
    while !is_so().await {
        assert!(tokio::time::Instant::now() < end, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Lets a daemon die at one of its checkpoints, once it is armed.
#[derive(Default)]
pub(super) struct DieAt {
    pub(super) number: u32,
    pub(super) armed: AtomicBool,
    pub(super) passed: AtomicU32,
}

impl Checkpoint for DieAt {
    fn reached(&self, _: &'static str) -> Fate {
        if !self.armed.load(Ordering::SeqCst) {
            return Fate::Live;
        }
        let number = self.passed.fetch_add(1, Ordering::SeqCst) + 1;
        if number == self.number { Fate::Die } else { Fate::Live }
    }
}

/// How often each end is a host that may start the server: never both, whatever has died.
pub(super) async fn owners(hosts: [&Host; 2], id: ServerId) -> usize {
    let mut count = 0;
    for host in hosts {
        let off = |server: Server| matches!(server.state, ServerState::Stopped | ServerState::Failed);
        count += usize::from(has(host, id).await.is_some_and(off));
    }
    count
}

/// Whatever has happened, in the end one host has the server, off, whole and alone, and can start it. Answers which.
pub(super) async fn comes_to_rest(ground: &Ground, hosts: &[Host], what: &str) -> usize {
    let id = ground.server;
    waited("one owner", async || {
        let count = owners([&hosts[0], &hosts[1]], id).await;
        assert!(count <= 1, "{what}: both have it");
        let [source, target] = [has(&hosts[0], id).await, has(&hosts[1], id).await];
        count == 1 && source.is_some() != target.is_some()
    })
    .await;
    forgotten(&hosts[0]).await;
    let at = usize::from(has(&hosts[1], id).await.is_some());
    let volume = has(&hosts[at], id).await.unwrap().volumes[0].volume_id;
    let bytes = std::fs::read(ground.disk(at, volume)).unwrap();
    assert!(bytes.starts_with(b"disk") && bytes.len() as u64 == stage::DISK_BYTES, "{what}");
    assert!(!ground.disk(1 - at, volume).exists(), "{what}: a disk is left over");
    let started = hosts[at].servers().act(&Call::by_host(), id, ServerAction::Start).await.unwrap();
    stage::succeeded(&hosts[at], started.body.operation.id).await;
    at
}

/// One move in which the daemon `victim` dies at its checkpoint `number`, and comes back. Answers whether it died.
/// Opens the host that has died again.
pub(super) async fn again(ground: &Ground, hosts: &mut Vec<Host>, victim: usize, address: SocketAddr) {
    let dead = hosts.remove(victim);
    dead.close().await;
    drop(dead);
    hosts.insert(victim, ground.stages[victim].open().await);
    if victim == 1 {
        hosts[1].migrations().listen(address).await.unwrap();
    }
}

async fn survives(victim: usize, number: u32) -> bool {
    let ground = Ground::new().await;
    let id = ground.server;
    let before = std::fs::read_dir(ground.stages[0].state_dir().join("volumes")).unwrap().count();
    assert_eq!(before, 1);
    let death = Arc::new(DieAt { number, ..DieAt::default() });
    let open = async |at: usize| match at == victim {
        true => ground.stages[at].open_watched(death.clone()).await.unwrap(),
        false => ground.stages[at].open().await,
    };
    let mut hosts = vec![open(0).await, open(1).await];
    let address = listening(&hosts[1]).await;
    let made = ticket(&hosts[1], None).await.unwrap().ticket;
    death.armed.store(true, Ordering::SeqCst);
    let call = stage::keyed("move");
    let moved = hosts[0].migrations().migrate(&call, id, spec(address, made.clone())).await;
    let end = tokio::time::Instant::now() + SOON;
    // Until it has died, or all is over.
    let settled = async |hosts: &[Host]| {
        let rows = hosts[0].store().read(moving::all).await.map(|all| all.len());
        let ends = owners([&hosts[0], &hosts[1]], id).await == 1 && has(&hosts[0], id).await.is_none();
        matches!(rows, Ok(0)) && ends
    };
    while !hosts[victim].is_dead() && !settled(&hosts).await {
        assert!(owners([&hosts[0], &hosts[1]], id).await <= 1, "both have it");
        if moved.is_err() {
            break;
        }
        assert!(tokio::time::Instant::now() < end, "{victim} {number}: neither dead nor over");
        tokio::task::yield_now().await;
    }
    // What follows is not of the move.
    death.armed.store(false, Ordering::SeqCst);
    let died = hosts[victim].is_dead();
    if died {
        again(&ground, &mut hosts, victim, address).await;
        assert!(owners([&hosts[0], &hosts[1]], id).await <= 1, "both have it");
    }
    let what = format!("{victim} {number}");
    let at = comes_to_rest(&ground, &hosts, &what).await;
    if let Ok(moved) = moved {
        // Under the same key it is the same move, and it has ended as it came out.
        let again = hosts[0].migrations().migrate(&call, id, spec(address, made)).await.unwrap();
        assert!(again.replayed);
        let operation = stage::ended(&hosts[0], moved.body.operation.id).await;
        assert_eq!(operation.state == OperationState::Succeeded, at == 1, "{victim} {number}: {operation:?}");
    }
    for host in hosts {
        host.close().await;
    }
    died
}

#[tokio::test]
async fn wherever_the_source_dies_one_host_has_the_server() {
    let mut number = 1;
    while survives(0, number).await {
        number += 1;
    }
    println!("the source died at {} points", number - 1);
    assert!(number > 10, "only {number} points");
}

#[tokio::test]
async fn wherever_the_target_dies_one_host_has_the_server() {
    let mut number = 1;
    while survives(1, number).await {
        number += 1;
    }
    println!("the target died at {} points", number - 1);
    assert!(number > 10, "only {number} points");
}

/// Lets a daemon stand at a checkpoint of this name until it is let go, which for the other one is a host that is gone.
struct StandAt {
    point: &'static str,
    is_there: AtomicBool,
    dies: AtomicBool,
}

impl Checkpoint for StandAt {
    fn reached(&self, point: &'static str) -> Fate {
        if point == self.point && self.dies.load(Ordering::SeqCst) {
            self.is_there.store(true, Ordering::SeqCst);
            return Fate::Die;
        }
        Fate::Live
    }
}

/// The source has committed and dies before it says so; the target has all and was not told.
async fn in_doubt() -> (Ground, [Host; 2], SocketAddr) {
    let ground = Ground::new().await;
    let death = Arc::new(StandAt {
        point: "move.decided",
        is_there: AtomicBool::new(false),
        dies: AtomicBool::new(true),
    });
    let source = ground.stages[0].open_watched(death.clone()).await.unwrap();
    let target = ground.stages[1].open().await;
    let address = listening(&target).await;
    let made = ticket(&target, None).await.unwrap().ticket;
    source.migrations().migrate(&Call::by_host(), ground.server, spec(address, made)).await.unwrap();
    waited("the commit", async || source.is_dead()).await;
    source.close().await;
    stage::until(&target, ground.server, |server| server.state == ServerState::InDoubt).await;
    (ground, [source, target], address)
}

#[tokio::test]
async fn a_target_in_doubt_takes_the_server_when_the_source_comes_back() {
    let (ground, [dead, target], _) = in_doubt().await;
    drop(dead);
    let id = ground.server;
    let doubtful = has(&target, id).await.unwrap();
    assert_eq!(doubtful.allowed_actions, ["settle-migration"]);
    assert!(doubtful.state_reason.is_some_and(|why| why.code == "in_doubt" && why.detail.contains("proof")));
    let source = ground.stages[0].open().await;
    stage::until(&target, id, |server| server.state == ServerState::Stopped).await;
    gone(&source, id).await;
    source.close().await;
    target.close().await;
}

#[tokio::test]
async fn an_operator_who_vouches_for_the_other_host_settles_it_at_either_end() {
    for (at, owner, stays) in [
        (1, MigrationOwner::Here, 1),
        (1, MigrationOwner::There, 0),
        (0, MigrationOwner::Here, 0),
        (0, MigrationOwner::There, 1),
    ] {
        let (ground, [dead, target], _) = in_doubt().await;
        drop(dead);
        let id = ground.server;
        // The other host is gone for good.
        let host = if at == 1 {
            target
        } else {
            target.close().await;
            let source = ground.stages[0].open().await;
            stage::until(&source, id, |server| server.state == ServerState::InDoubt).await;
            source
        };
        let said = |proof: &str| SettleMigration { owner, proof: proof.to_owned() };
        let refused = host.migrations().settle(&Call::by_host(), id, said("trust me")).await.unwrap_err();
        assert_eq!((refused.code, refused.errors[0].pointer.as_str()), (Code::Invalid, "/proof"));
        let proof = "the other one was scrapped";
        host.migrations().settle(&Call::by_host(), id, said(proof)).await.unwrap();
        match at == stays {
            true => {
                let server = has(&host, id).await.unwrap();
                assert_eq!(server.state, ServerState::Stopped);
                let started = host.servers().act(&Call::by_host(), id, ServerAction::Start).await.unwrap();
                stage::succeeded(&host, started.body.operation.id).await;
            }
            false => gone(&host, id).await,
        }
        host.close().await;
    }
}

/// What a host that was taken over, or anybody with a ticket, may send in place of a server.
#[tokio::test]
async fn a_target_takes_no_pieces_outside_of_a_file_and_no_more_than_it_has() {
    type Sent = (u16, u64, usize);
    let cases: [&[Sent]; 5] = [
        &[(9, 0, 10)],
        &[(0, stage::DISK_BYTES, 1)],
        &[(0, u64::MAX, 1)],
        &[(0, stage::DISK_BYTES - 5, 10)],
        &[(0, 0, 1 << 20), (0, 0, 1)],
    ];
    for pieces in cases {
        let ground = Ground::new().await;
        let (source, target) = (ground.stages[0].open().await, ground.stages[1].open().await);
        let address = listening(&target).await;
        let pair = Pair { source, target, server: ground.server, address, _stages: ground.stages };
        let mut link = taking(&pair).await;
        for (file, offset, count) in pieces {
            let piece = wire::peer::Piece { file: *file, offset: *offset, bytes: &vec![1; *count] };
            // It may be cut off before the last.
            let _ = link.send_piece(piece).await;
        }
        let _ = link.send(&wire::peer::Message::Copied).await;
        let answer = link.message(SOON).await;
        assert!(!matches!(answer, Ok(wire::peer::Message::Say(wire::peer::Saying::Ready))), "{pieces:?}");
        gone(&pair.target, pair.server).await;
        pair.close().await;
    }
}

/// A connection on which the target has begun to take the server.
async fn taking(pair: &Pair) -> link::Link<tokio_rustls::client::TlsStream<link::Wire>> {
    let ticket: Ticket = pair.ticket().await.ticket.parse().unwrap();
    let mut link =
        source::connect(&pair.source.migrations().identity, pair.address, ticket.host).await.unwrap();
    source::greet(&mut link, ticket.secret).await.unwrap();
    let (id, dirs) = (pair.server, pair.source.migrations().core.dirs.clone());
    let look = move |connection: &rusqlite::Connection| {
        let offer = source::offer(connection, &dirs, id, crate::cpu::Known::default())?;
        let record = crate::store::records::one(connection, id.0)?;
        Ok((offer, moving::parcel::Packed::of(connection, record)?))
    };
    let (offer, packed) = pair.source.store().read(look).await.unwrap();
    let record = serde_json::to_value(packed).unwrap();
    let transfer = Uuid::now_v7().to_string();
    let parcel = wire::peer::Parcel {
        transfer,
        offer,
        record,
        console_bytes: 0,
        saved: None,
        live_streams: None,
        may_owe: false,
    };
    link.send(&wire::peer::Message::Take(Box::new(parcel))).await.unwrap();
    let begun = link.message(SOON).await.unwrap();
    assert!(matches!(begun, wire::peer::Message::Say(wire::peer::Saying::Copying)), "{begun:?}");
    link
}

#[tokio::test]
async fn another_host_learns_nothing_of_a_move_that_is_not_its_own() {
    let (ground, [dead, target], address) = in_doubt().await;
    drop(dead);
    let held = target.store().read(moving::all).await.unwrap().remove(0);
    let stage = Stage::new();
    let stranger = stage.open().await;
    let fingerprint = target.migrations().identity.fingerprint();
    let mut link = source::connect(&stranger.migrations().identity, address, fingerprint).await.unwrap();
    link.send(&wire::peer::Message::Again { transfer: held.id.to_string(), streams: 1 }).await.unwrap();
    let said = link.message(SOON).await.unwrap();
    assert!(matches!(said, wire::peer::Message::Say(wire::peer::Saying::Unknown)), "{said:?}");
    let _ = link.say(wire::peer::Saying::Commit).await;
    assert_eq!(has(&target, ground.server).await.unwrap().state, ServerState::InDoubt);
    stranger.close().await;
    target.close().await;
}
