//! Twenty servers, four clients that never stop asking, three readers of the event log, and somebody who kills: the
//! daemon, its launcher, VMMs, DHCP servers, at any moment, and now and then puts a new daemon in the old one's
//! place. Afterwards each key has had one effect, each reader has seen the log, and no server is lost.
//! Half a minute, or ten with `TOFT_LONG=1`. `TOFT_SEED` repeats the order of a run.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http_body_util::BodyExt;
use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::task::spawn_local;

use crate::api::{Answer, text};
use crate::daemon::{LOOK_AGAIN, Orders, SOON, Stage, server_body, wait_for};
use crate::world::{inside, processes};

const CLIENTS: usize = 4;
const SERVERS_EACH: usize = 5;
const READERS: usize = 3;

/// A series of numbers that looks random and can be had again (SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.roll(to - from))
    }
}

/// Method, path and body.
type Request = (Method, String, Option<Value>);

/// Something a client asked for, under one key.
#[derive(Debug, Clone)]
struct Asked {
    key: String,
    verb: &'static str,
    server: String,
    request: Request,
    operation: String,
    succeeded: bool,
}

/// What all of them share.
struct Storm {
    stage: Stage,
    until: Instant,
    over: AtomicBool,
    /// When something else than the daemon was killed, and what: an operation of that time may fail.
    blows: Mutex<Vec<(Instant, String)>>,
    /// Daemons that were killed, launchers, VMMs, DHCP servers, upgrades.
    count: Mutex<BTreeMap<&'static str, u32>>,
    retries: Mutex<u32>,
}

impl Storm {
    fn count(&self, what: &'static str) {
        *lock(&self.count).entry(what).or_default() += 1;
    }

    fn struck_since(&self, begun: Instant) -> bool {
        // What a blow did may show a little later: a launcher is missed when it is next needed.
        let from = begun.checked_sub(Duration::from_secs(3)).unwrap_or(begun);
        lock(&self.blows).iter().any(|(at, _)| *at >= from)
    }

    /// Repeats a request with its key until it is answered.
    async fn insist(&self, key: &str, (method, path, body): &Request) -> Answer {
        let end = Instant::now() + SOON;
        loop {
            match self.stage.api().call(method.clone(), path, Some(key), body.clone()).await {
                Ok(answer) if answer.body["retryable"] != true => return answer,
                answer => assert!(Instant::now() < end, "{key} {path} was never answered: {answer:?}"),
            }
            *lock(&self.retries) += 1;
            tokio::time::sleep(LOOK_AGAIN * 2).await;
        }
    }

    /// Reads a document, however many daemons that takes.
    async fn read(&self, path: &str) -> Answer {
        let read = async || self.stage.api().read(path).await.ok().filter(|answer| answer.status < 500);
        wait_for(path, read).await.unwrap()
    }

    async fn finished(&self, operation: &str) -> Value {
        let end = Instant::now() + SOON * 2;
        loop {
            let answer = self.read(&format!("/v1/operations/{operation}?wait=5s")).await;
            assert_eq!(answer.status, 200, "operation {operation} was acknowledged: {}", answer.body);
            if ["succeeded", "failed", "cancelled"].contains(&text(&answer.body["state"]).as_str()) {
                return answer.body;
            }
            assert!(Instant::now() < end, "it does not end: {}", answer.body);
        }
    }
}

/// A client: asks for this and that on its own servers, and remembers what it was told.
async fn client(storm: Arc<Storm>, number: usize, mut dice: Dice) -> Vec<Asked> {
    let names: Vec<String> = (0..SERVERS_EACH).map(|one| format!("s{number}{one}")).collect();
    let mut asked = Vec::new();
    for turn in 0.. {
        if Instant::now() > storm.until {
            break;
        }
        // All are made before anything else is done to them.
        let name = match names.get(turn) {
            Some(name) => name,
            None => &names[dice.roll(names.len() as u64) as usize],
        };
        let page = storm.read(&format!("/v1/servers?name={name}")).await.body;
        let server = &page["items"][0];
        let Some((verb, request)) = choose(&mut dice, name, server) else {
            tokio::time::sleep(LOOK_AGAIN).await;
            continue;
        };
        let key = format!("c{number}-{turn}");
        let begun = Instant::now();
        let answer = storm.insist(&key, &request).await;
        if !answer.is_ok() {
            // Between the look and the request something may have happened to it.
            assert!(storm.struck_since(begun), "{key} {verb} {name} in {server}: {}", answer.body);
            assert!(["wrong_state", "not_found"].contains(&answer.code()), "{key} {verb}: {}", answer.body);
            continue;
        }
        let operation = answer.operation();
        let ended = storm.finished(&operation).await;
        let succeeded = ended["state"] == "succeeded";
        assert!(succeeded || storm.struck_since(begun), "{key} {verb} {name} failed by itself: {ended}");
        let resources = ended["resources"].as_array().cloned().unwrap_or_default();
        let server = resources.iter().find(|one| one["kind"] == "server").map(|one| text(&one["id"]));
        let server = server.expect("an operation on a server");
        storm.stage.knows(&server);
        asked.push(Asked { key, verb, server, request, operation, succeeded });
    }
    asked
}

/// What to ask for next; nothing while the server is between two states.
fn choose(dice: &mut Dice, name: &str, server: &Value) -> Option<(&'static str, Request)> {
    let Some(id) = server["id"].as_str() else {
        return Some(("create", (Method::POST, "/v1/servers".to_owned(), Some(server_body(name)))));
    };
    let act = |verb: &str, body| (Method::POST, format!("/v1/servers/{id}/actions/{verb}"), body);
    let delete = ("delete", (Method::DELETE, format!("/v1/servers/{id}"), None));
    match server["state"].as_str() {
        Some("running") => Some(match dice.roll(10) {
            0 => delete,
            1..=2 => ("stop", act("stop", Some(json!({ "grace_s": 0 })))),
            3..=5 => ("stop", act("stop", Some(json!({ "grace_s": 5 })))),
            6..=7 => ("reset", act("reboot", Some(json!({ "grace_s": 0 })))),
            _ => ("reboot", act("reboot", Some(json!({ "grace_s": 5 })))),
        }),
        Some("stopped" | "failed") => Some(match dice.roll(10) {
            0..=1 => delete,
            _ => ("start", act("start", None)),
        }),
        _ => None,
    }
}

/// A reader of the event log: reads, and goes on where it was, until there is no more to come.
async fn reader(storm: Arc<Storm>) -> Vec<Value> {
    let mut seen: Vec<Value> = Vec::new();
    loop {
        let after = seen.last().map_or(0, |event| number(&event["id"]));
        if storm.over.load(Ordering::SeqCst) && storm.stage.api().log().await.len() as u64 <= after {
            return seen;
        }
        let path = format!("/v1/events?after={after}&format=ndjson");
        let Ok(mut body) = storm.stage.api().stream(&path).await else {
            tokio::time::sleep(LOOK_AGAIN).await;
            continue;
        };
        let mut rest = Vec::new();
        // The silence of a log that has ended is no reason to wait for ever.
        while let Ok(Some(Ok(frame))) = tokio::time::timeout(Duration::from_secs(1), body.frame()).await {
            rest.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            // A line that was cut off by a death is read again by the next stream.
            let Some(whole) = rest.iter().rposition(|byte| *byte == b'\n') else { continue };
            let lines: Vec<u8> = rest.drain(..=whole).collect();
            seen.extend(crate::api::events(&lines).into_iter().filter(|event| event["id"].is_number()));
        }
    }
}

/// With VMMs that wait for a server, so that those are killed and left behind, too.
fn orders() -> Orders {
    Orders { warm_shells: 2, ..Orders::default() }
}

/// Kills, until the time is up.
async fn killer(storm: Arc<Storm>, mut dice: Dice) {
    while Instant::now() < storm.until {
        tokio::time::sleep(dice.ms(100, 1200)).await;
        match dice.roll(20) {
            0..=9 => {
                storm.count("daemons killed");
                storm.stage.kill().await;
                // Now and then the next one dies while it starts.
                while dice.roll(4) == 0 {
                    storm.count("daemons killed while starting");
                    storm.stage.start(orders());
                    tokio::time::sleep(dice.ms(1, 120)).await;
                    storm.stage.kill().await;
                }
                storm.stage.open_well_with(orders()).await;
            }
            10..=12 => {
                storm.count("daemons upgraded");
                storm.stage.end(Signal::SIGTERM).await;
                storm.stage.upgrade();
                storm.stage.open_well_with(orders()).await;
            }
            13..=15 => strike(&storm, &mut dice, "launchers killed", |line| line == "toft-vmm launcher"),
            16..=17 => strike(&storm, &mut dice, "DHCP servers killed", |line| line.contains("dnsmasq")),
            _ => strike(&storm, &mut dice, "VMMs killed", |line| mortal(line).is_some()),
        }
    }
}

/// The server of a VMM that may be killed: the first two of each client. The boots of the others can be foretold.
fn mortal(line: &str) -> Option<&str> {
    let (_, name) = line.split_once(" machine --label ")?;
    name.ends_with(['0', '1']).then_some(name)
}

/// Kills one process among those that `wanted` knows by their command line.
fn strike(storm: &Storm, dice: &mut Dice, what: &'static str, wanted: impl Fn(&str) -> bool) {
    let found: Vec<(i32, String)> = processes().into_iter().filter(|(_, line)| wanted(line)).collect();
    if found.is_empty() {
        return;
    }
    let (pid, line) = &found[dice.roll(found.len() as u64) as usize];
    // Told first: an operation may fail before this thread runs again.
    lock(&storm.blows).push((Instant::now(), line.clone()));
    if kill(Pid::from_raw(*pid), Signal::SIGKILL).is_ok() {
        storm.count(what);
    }
}

async fn storm() {
    let long = std::env::var_os("TOFT_LONG").is_some();
    let seconds = if long { 600 } else { 30 };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    let seed = std::env::var("TOFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(now);
    println!("seed {seed}; TOFT_SEED={seed} repeats the order of it");
    let stage = Stage::new();
    stage.open_well_with(orders()).await;
    stage.import().await;
    let storm = Arc::new(Storm {
        stage,
        until: Instant::now() + Duration::from_secs(seconds),
        over: AtomicBool::new(false),
        blows: Mutex::default(),
        count: Mutex::default(),
        retries: Mutex::default(),
    });
    let dice = |offset: u64| Dice(seed.wrapping_add(offset.wrapping_mul(0x1234_5678_9abc_def1)));
    let readers: Vec<_> = (0..READERS).map(|_| spawn_local(reader(storm.clone()))).collect();
    let clients: Vec<_> =
        (0..CLIENTS).map(|one| spawn_local(client(storm.clone(), one, dice(one as u64)))).collect();
    spawn_local(killer(storm.clone(), dice(99))).await.unwrap();
    let mut asked = Vec::new();
    for client in clients {
        asked.extend(client.await.unwrap());
    }
    let servers = stands_still(&storm).await;
    storm.over.store(true, Ordering::SeqCst);
    let mut seen = Vec::new();
    for reader in readers {
        seen.push(reader.await.unwrap());
    }
    each_reader_saw_the_log(&storm, &seen).await;
    each_key_had_one_effect(&storm, &asked, &servers).await;
    println!(
        "{} s: {} keys, {} of them failed under a blow, {} requests repeated, {} events, {:?}",
        seconds,
        asked.len(),
        asked.iter().filter(|one| !one.succeeded).count(),
        lock(&storm.retries),
        seen[0].len(),
        lock(&storm.count),
    );
    let storm = Arc::into_inner(storm).expect("all others have ended");
    storm.stage.close().await;
}

/// Waits until no server is on its way; answers them. Each that is to run has one VMM, and none else has any.
async fn stands_still(storm: &Storm) -> Vec<Value> {
    let end = Instant::now() + SOON * 2;
    loop {
        let servers = storm.stage.api().all("/v1/servers").await;
        let names = |state: &str| -> Vec<String> {
            let those = servers.iter().filter(|server| server["state"] == state);
            those.map(|server| text(&server["name"])).collect()
        };
        let mut running = names("running");
        running.sort();
        let still = running.len() + names("stopped").len() == servers.len()
            && servers.iter().all(|server| server["wanted"] == server["state"]);
        let mut machines: Vec<String> = processes()
            .into_iter()
            .filter_map(|(_, line)| Some(line.split_once(" machine --label ")?.1.to_owned()))
            .filter(|label| !label.starts_with("shell-"))
            .collect();
        machines.sort();
        if still && machines == running {
            return servers;
        }
        assert!(Instant::now() < end, "VMMs of {machines:?}, and still not at rest: {servers:#?}");
        tokio::time::sleep(LOOK_AGAIN * 5).await;
    }
}

/// Every reader has every event of the log once, in order.
async fn each_reader_saw_the_log(storm: &Storm, seen: &[Vec<Value>]) {
    let log = storm.stage.api().log().await;
    for events in seen {
        for (one, other) in events.iter().zip(&log) {
            assert_eq!(one, other, "a reader saw something else than the log says");
        }
        assert_eq!(events.len(), log.len(), "a reader saw more or less than the log has");
    }
    assert!(
        log.windows(2).all(|pair| number(&pair[0]["id"]) + 1 == number(&pair[1]["id"])),
        "the log has gaps"
    );
}

/// The records hold what the clients were told and nothing else, and the guests booted as often as they should.
async fn each_key_had_one_effect(storm: &Storm, asked: &[Asked], servers: &[Value]) {
    let told: BTreeSet<&str> = asked.iter().map(|one| one.operation.as_str()).collect();
    assert_eq!(told.len(), asked.len(), "two keys were answered with one operation");
    let all = storm.stage.api().all("/v1/operations").await;
    let recorded: BTreeSet<&str> = all
        .iter()
        .filter(|one| one["kind"].as_str().is_some_and(|kind| kind.starts_with("server.")))
        .filter_map(|one| one["id"].as_str())
        .collect();
    assert_eq!(recorded, told, "operations that nobody was told of, or that are forgotten");
    for one in asked {
        let again = storm.insist(&one.key, &one.request).await;
        assert!(
            again.replayed && again.operation() == one.operation,
            "{one:?} was answered with {}",
            again.body
        );
    }

    let log = storm.stage.api().log().await;
    let ids = |kind: &str| -> Vec<String> {
        let those = log.iter().filter(|event| event["type"] == kind);
        let mut ids: Vec<String> = those.map(|event| text(&event["data"]["resource"]["id"])).collect();
        ids.sort();
        ids
    };
    let mut created: Vec<String> =
        asked.iter().filter(|one| one.verb == "create").map(|one| one.server.clone()).collect();
    created.sort();
    assert_eq!(ids("server.created"), created, "servers that nobody made, or one made twice");
    let mut ended = ids("server.deleted");
    ended.extend(servers.iter().map(|server| text(&server["id"])));
    ended.sort();
    assert_eq!(ended, created, "each server is there or was deleted once");

    let struck: BTreeSet<String> =
        lock(&storm.blows).iter().filter_map(|(_, line)| mortal(line).map(str::to_owned)).collect();
    let (mut compared, mut never_seen) = (0, 0);
    for server in servers {
        let (id, name) = (text(&server["id"]), text(&server["name"]));
        let theirs: Vec<&Asked> = asked.iter().filter(|one| one.server == id).collect();
        // Nobody can say how often a machine booted that was killed from outside, or whose boot failed.
        if struck.contains(&name) || theirs.iter().any(|one| !one.succeeded) {
            continue;
        }
        let boots =
            theirs.iter().filter(|one| ["create", "start", "reboot", "reset"].contains(&one.verb)).count();
        let booted = storm.stage.beats(&id).await.1;
        // A machine that was stopped before its guest said hello is not seen; one too many always is.
        assert!(booted <= boots, "{name} booted {booted} times: {theirs:#?}");
        never_seen += boots - booted;
        compared += 1;
    }
    assert!(compared > 0, "every server was hit, and no boots were compared");
    println!(
        "{compared} servers booted as often as they were asked to; {never_seen} boots ended before a word"
    );
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn random_kills_lose_nothing_and_do_nothing_twice() {
    inside("kills::random_kills_lose_nothing_and_do_nothing_twice", storm());
}
