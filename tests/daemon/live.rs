//! Servers that move while they run, between two real daemons that share nothing, with a guest that counts alike in its memory
//! and on its disk. Whatever is killed or cut wherever: never do two guests go on, one does in the end, and what it was told is
//! written is there.
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};

use crate::api::{Answer, text};
use crate::daemon::{MEMORY_BYTES, Orders, Stage, wait_for};
use crate::moves::{Hosts, NEAR, PORT, asked};
use crate::world::inside;

pub(crate) const IMAGE: &str = "ledger";

/// What a guest has counted: last number, lines that fit, and how often it booted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Count {
    pub(crate) boots: usize,
    pub(crate) last: u64,
}

/// The whole lines in the ring of a server's console on a host, whether the daemon there lives or not.
pub(crate) fn console(stage: &Stage, server: &str) -> String {
    let path = stage.scratch("state/servers").join(server).join("console.ring");
    let ring = std::fs::File::open(path).and_then(wire::console::Ring::open);
    let Ok(piece) = ring.and_then(|mut ring| ring.read(0, 8 << 20)) else { return String::new() };
    let log = String::from_utf8_lossy(&piece.data).into_owned();
    // The last line may be half written.
    log.rsplit_once('\n').map_or(String::new(), |(whole, _)| whole.to_owned())
}

/// What is on a server's console, counted.
pub(crate) fn count(stage: &Stage, server: &str) -> Count {
    let log = console(stage, server);
    assert!(!log.contains("FAILED") && !log.contains("broken"), "{log}");
    let mut now = (0, 0);
    let entries = log.lines().filter_map(|line| {
        let (number, ns) = line.trim().strip_prefix("probe: ledger ")?.split_once(" ns=")?;
        Some((number.parse::<u64>().ok()?, ns.parse::<u64>().ok()?))
    });
    let mut last = 0;
    for (number, ns) in entries {
        // A guest that boots anew counts anew; else both only grow, and none is left out.
        if number > 1 {
            assert!(ns >= now.1 && (last == 0 || number == last + 1), "{number} after {last}: {log}");
        }
        (last, now) = (number, (number, ns));
    }
    Count { boots: log.matches("probe: hello").count(), last }
}

async fn ledger_hosts() -> Hosts {
    hosts_of("ledger=20").await
}

async fn hosts_of(words: &str) -> Hosts {
    let hosts = Hosts::new().await;
    for (stage, _) in hosts.sides() {
        stage.import_another(IMAGE, words).await;
    }
    hosts
}

/// Makes a server that counts.
pub(crate) async fn counting(stage: &Stage, name: &str) -> String {
    counting_as(stage, name, json!({})).await
}

async fn counting_as(stage: &Stage, name: &str, more: Value) -> String {
    let mut spec = json!({ "name": name, "image": IMAGE, "memory_bytes": MEMORY_BYTES });
    for (member, value) in more.as_object().into_iter().flatten() {
        spec[member] = value.clone();
    }
    let accepted = stage.call(Method::POST, "/v1/servers", &format!("make-{name}"), Some(spec)).await;
    stage.succeeded(&accepted.operation()).await.unwrap();
    let id = text(&accepted.body["resource"]["id"]);
    stage.knows(&id);
    let counts = async || (count(stage, &id).last > 3).then_some(());
    wait_for("a ledger", counts).await.unwrap();
    id
}

pub(crate) async fn goes_on(stage: &Stage, server: &str, from: Count, what: &str) {
    let further = async || {
        let now = count(stage, server);
        (now.boots > from.boots || now.last > from.last + 3).then_some(())
    };
    wait_for(&format!("the guest to go on: {what}"), further).await.unwrap();
}

async fn there_and_back() {
    let hosts = ledger_hosts().await;
    let server = counting(&hosts.source, "web1").await;
    let path = format!("/v1/servers/{server}");
    let first = hosts.source.api().get(&path).await;
    let mut ends = hosts.sides();
    for hop in 0..4 {
        let [(source, _), (target, address)] = ends;
        target.knows(&server);
        // One that is paused goes as it is.
        let is_paused = hop == 2;
        if is_paused {
            let answer = source.call(Method::POST, &format!("{path}/actions/pause"), "pause", None).await;
            source.succeeded(&answer.operation()).await.unwrap();
        }
        let before = count(source, &server);
        let mut body = hosts.body_to(target, address).await;
        body["downtime_ms"] = json!(100);
        let plan = asked(source, &server, "?dry_run=true", &body).await;
        assert_eq!(plan.body["blocked_by"], json!([]), "{}", plan.body);
        let began = Instant::now();
        let moved = asked(source, &server, "", &body).await;
        assert_eq!(moved.status, 202, "{}", moved.body);
        if let Err(why) = source.succeeded(&moved.operation()).await {
            // Whoever ended it says why, in whichever log.
            let _ =
                wait_for("the other end's word", async || target.log().contains("not served").then_some(()))
                    .await;
            panic!("{why}\nsource: {}\ntarget: {}", source.log(), target.log());
        }
        println!("hop {hop}: moved in {:?}", began.elapsed());
        for line in source.log().lines().filter(|line| line.contains("stood still")) {
            println!("{line}");
        }
        assert_eq!(source.api().read(&path).await.unwrap().status, 404);
        if is_paused {
            assert_eq!(target.api().get(&path).await["state"], "paused");
            assert_eq!(count(target, &server).last, before.last);
            let answer = target.call(Method::POST, &format!("{path}/actions/resume"), "resume", None).await;
            target.succeeded(&answer.operation()).await.unwrap();
        }
        goes_on(target, &server, before, "after its move").await;
        assert_eq!(count(target, &server).boots, 1);
        // Of a guest that has sent nothing: its host has.
        let side = if address == NEAR { 0 } else { 1 };
        let mac = text(&first["nics"][0]["mac"]);
        let known = async || hosts.run_at(side, &["bridge", "fdb", "show"]).contains(&mac).then_some(());
        wait_for("its network to be told where it is", known).await.unwrap();
        let here = target.api().get(&path).await;
        for same in ["id", "name", "memory_bytes", "created_at", "started_at", "state", "volumes"] {
            assert_eq!(here[same], first[same], "{same}");
        }
        ends.reverse();
    }
    hosts.close().await;
}

#[test]
fn a_server_that_runs_moves_and_its_guest_notices_nothing() {
    inside("live::a_server_that_runs_moves_and_its_guest_notices_nothing", there_and_back());
}

/// Bytes of a disk that takes some seconds at the least bandwidth.
const SLOW_BYTES: usize = 24 << 20;

/// Begins a move that takes half a minute, of a server that runs. Answers server and operation.
async fn slow_move(hosts: &Hosts) -> (String, String) {
    let wanted = json!({ "disk_bytes": SLOW_BYTES + (8 << 20) });
    let server = counting_as(&hosts.source, "web1", wanted).await;
    hosts.target.knows(&server);
    let volume =
        text(&hosts.source.api().get(&format!("/v1/servers/{server}")).await["volumes"][0]["volume_id"]);
    let disk = hosts.source.scratch("state/volumes").join(format!("{volume}.raw"));
    let disk = std::fs::File::options().write(true).open(disk).expect("its disk");
    // Where its guest does not write.
    disk.write_all_at(&vec![7; SLOW_BYTES], 8 << 20).expect("a disk that can be written");
    let mut slow = hosts.body().await;
    slow["bandwidth_bytes_per_s"] = json!(1 << 20);
    let moved = asked(&hosts.source, &server, "", &slow).await;
    assert_eq!(moved.status, 202, "{}", moved.body);
    (server, moved.operation())
}

/// A move that tells how far it is, and is cancelled.
async fn calls_off() {
    let hosts = ledger_hosts().await;
    let (server, operation) = slow_move(&hosts).await;
    let path = format!("/v1/operations/{operation}");
    let mut seen = Vec::new();
    let grown = async || {
        let progress = hosts.source.api().get(&path).await["progress"].clone();
        let number = |name: &str| progress[name].as_u64().unwrap_or_default();
        if progress["phase"] == "copying" {
            let (done, total) = (number("bytes_done"), number("bytes_total"));
            assert!(total > MEMORY_BYTES && done < total, "{progress}");
            seen.push((done, number("percent")));
            seen.dedup();
        }
        let expected = ["bytes_per_s", "remaining_s", "throttle_percent"];
        (seen.len() > 3 && expected.iter().all(|name| progress[name].is_u64())).then_some(())
    };
    wait_for("the first round to get somewhere", grown).await.unwrap();
    assert!(seen.is_sorted() && seen.iter().all(|(_, percent)| (1..40).contains(percent)), "{seen:?}");
    let cancel = hosts.source.api().call(Method::DELETE, &path, None, None).await.expect("an answer");
    assert!(cancel.is_ok(), "{}", cancel.body);
    assert_eq!(hosts.source.finished(&operation).await.unwrap()["state"], "cancelled");
    let from = count(&hosts.source, &server);
    goes_on(&hosts.source, &server, from, "after its move was cancelled").await;
    assert_eq!(count(&hosts.source, &server).boots, 1);
    let gone = async || hosts.states(&server).await[1].is_none().then_some(());
    wait_for("the target to have nothing of it", gone).await.unwrap();
    hosts.close().await;
}

#[test]
fn a_move_tells_how_far_it_is_and_can_be_called_off() {
    inside("live::a_move_tells_how_far_it_is_and_can_be_called_off", calls_off());
}

/// A move whose bounds are changed as it goes: its VMM sends at once as fast as it may now.
async fn hurries() {
    let hosts = ledger_hosts().await;
    let (server, operation) = slow_move(&hosts).await;
    let path = format!("/v1/operations/{operation}");
    // What is skipped at the beginning goes in no time; of the rest no page is.
    let held = async || {
        let progress = hosts.source.api().get(&path).await["progress"].clone();
        let number = |name: &str| progress[name].as_u64();
        let left = number("bytes_total")? - number("bytes_done")?;
        (number("bytes_per_s")? <= 2 << 20 && left <= 32 << 20).then_some(left >> 20)
    };
    let left_s = wait_for("its bandwidth to hold it back", held).await.unwrap();
    assert!(left_s > 15, "{left_s} MiB are left, which nobody would want to hurry");
    let limit = format!("/v1/servers/{server}/actions/limit-migration");
    let begun = Instant::now();
    let hurried =
        hosts.source.api().call(Method::POST, &limit, None, Some(json!({}))).await.expect("an answer");
    assert_eq!(hurried.body["state"], "moving", "{}", hurried.body);
    assert_eq!(hosts.source.finished(&operation).await.unwrap()["state"], "succeeded");
    assert!(begun.elapsed() < Duration::from_secs(left_s), "it took as long as it would have: {left_s} s");
    let from = count(&hosts.target, &server);
    goes_on(&hosts.target, &server, from, "after its move was hurried").await;
    assert_eq!(count(&hosts.target, &server).boots, 1);
    hosts.close().await;
}

#[test]
fn a_move_goes_as_fast_as_is_asked_for_meanwhile() {
    inside("live::a_move_goes_as_fast_as_is_asked_for_meanwhile", hurries());
}

/// Points of a move at the source's daemon, and at the target's.
const POINTS: [&[&str]; 2] = [
    &[
        "move.accepted:1",
        "move.joined:1",
        "move.begun:1",
        "move.sending:1",
        "move.heard:1",
        "move.promised:1",
        "move.decided:1",
        "move.said:1",
        "move.heard:2",
        "move.decided:2",
    ],
    &[
        "move.recorded:1",
        "server.arrival_prepared:1",
        "move.awaited:1",
        "move.receiving:1",
        "move.arrived:1",
        "move.decided:1",
        "move.said:1",
        "move.heard:1",
        "move.decided:2",
        "server.reclaimed:1",
        "move.run:1",
        "move.said:2",
    ],
];

/// The same of a move that owes memory, from the commit on.
const POINTS_OF_OWING: [&[&str]; 2] = [
    &["move.promised:1", "move.decided:1", "move.said:1", "move.heard:2", "move.decided:2", RECONNECTED],
    &[
        "move.heard:1",
        "move.decided:2",
        "server.reclaimed:1",
        "move.run:1",
        "move.said:2",
        RECONNECTED,
        "move.whole:1",
    ],
];

/// From these on either end may be the one that has it.
const PROMISES: [&str; 2] = ["move.promised:1", "move.arrived:1"];

/// Comes only when the connections are cut while memory is owed.
const RECONNECTED: &str = "move.reconnected:1";

/// A guest that rewrites memory with each count, and how fast that goes: some of it is owed for a second and more.
const OWING_WORDS: &str = "ledger=20,6";
const OWING_BYTES_PER_S: u64 = 4 << 20;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// The daemon at whose point it is.
    Daemon,
    SourceVmm,
    TargetVmm,
    /// The host of that daemon: it and its VMM of the server.
    Host,
    /// Every connection between the two.
    Link,
}

/// Modes of moves.
const ALL_FIRST: &str = "pre_copy";
const OWING: &str = "post_copy";

/// What must never be: neither host's.
const BOTH: usize = 2;

/// How the two guests of a server stand: which of the hosts' has been seen to count.
struct Witness {
    seen: [Count; 2],
    /// The guest at the target has gone on from what the source's had counted.
    has_crossed: bool,
}

impl Witness {
    fn new(hosts: &Hosts, server: &str) -> Witness {
        Witness { seen: [count(&hosts.source, server), Count::default()], has_crossed: false }
    }

    /// Looks at both. Says what must never be.
    fn look(&mut self, hosts: &Hosts, server: &str) -> Result<(), String> {
        let target = count(&hosts.target, server);
        let source = count(&hosts.source, server);
        let arrived = self.seen[1];
        // What came over the stream is in the ring before the machine runs.
        let target_ran = arrived.last > 0 && target > arrived;
        let source_ran = source > self.seen[0];
        if source_ran && self.has_crossed {
            return Err(format!("the source counts on: {source:?} after {:?}; target {target:?}", self.seen));
        }
        self.has_crossed |= target_ran && target.last > source.last;
        self.seen = [source.max(self.seen[0]), target];
        Ok(())
    }
}

/// Each host answers what comes of the other's connections with a reset, so that whoever sends finds them gone.
fn cut(hosts: &Hosts) {
    for (side, what) in ["sport", "dport"].into_iter().enumerate() {
        let nft = |words: &[&str]| hosts.run_at(side, &[&["nft"][..], words].concat());
        nft(&["add", "table", "inet", "cut"]);
        nft(&["add", "chain", "inet", "cut", "in", "{ type filter hook input priority 0; }"]);
        let port = PORT.to_string();
        let rule = ["add", "rule", "inet", "cut", "in", "tcp", what, &port];
        // Its own resets go through on the other side.
        let reset = "tcp flags & rst == 0 counter reject with tcp reset".split(' ').collect::<Vec<_>>();
        nft(&[&rule[..], &reset].concat());
    }
}

/// Whether this host has a connection of the daemons'.
fn is_connected(hosts: &Hosts, side: usize) -> bool {
    let port = format!(":{PORT:04X}");
    // Of each its number, both ends, and its state, of which 01 is established (proc(5)).
    hosts.run_at(side, &["cat", "/proc/net/tcp"]).lines().any(|line| {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            [_, near, far, "01", ..] => near.ends_with(&port) || far.ends_with(&port),
            _ => false,
        }
    })
}

/// Once one that sent has noticed, and every connection has lost an end. Whoever goes on sends, if only that it closes.
async fn mend(hosts: &Hosts) -> Result<(), String> {
    let is_answered =
        |side| !hosts.run_at(side, &["nft", "list", "chain", "inet", "cut", "in"]).contains("packets 0 ");
    let noticed = async || {
        let is_cut = (0..2).any(is_answered) && !(0..2).all(|side| is_connected(hosts, side));
        is_cut.then_some(())
    };
    wait_for("the cut to be noticed", noticed).await?;
    for side in 0..2 {
        hosts.run_at(side, &["nft", "delete", "table", "inet", "cut"]);
    }
    Ok(())
}

fn kill_vmm(stage: &Stage, name: &str) {
    if let Some(pid) = vmm_of(stage, name) {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("a VMM that can be killed");
    }
}

/// The VMM of a server on this host: the labels of both hosts' are the same, the files that they have open are not.
fn vmm_of(stage: &Stage, name: &str) -> Option<i32> {
    let state = stage.scratch("state");
    let pids = std::fs::read_dir("/proc")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.into_iter().find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let is_its = line.contains("machine --label ") && line.contains(name);
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        let mut links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        is_its && links.any(|link| link.starts_with(&state))
    })
}

/// Waits until the source has heard what became of every move before: what it asks again is decided at points of the same names.
async fn none_is_asked_about(hosts: &Hosts) -> Result<(), String> {
    let database = hosts.source.scratch("state/toft.db");
    let left = async || {
        let opened = Connection::open_with_flags(&database, OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
        let count = "SELECT count(*) FROM moves WHERE body ->> 'side' = 'source'";
        opened.query_row(count, [], |row| row.get::<_, u64>(0)).ok().filter(|left| *left == 0)
    };
    wait_for("the end of earlier moves", left).await.map(drop)
}

/// Waits until the machine of a move runs at the target, and some of its memory is still here.
async fn until_it_owes(hosts: &Hosts, moved: &Answer) -> Result<(), String> {
    let path = format!("/v1/operations/{}", moved.operation());
    let owes =
        async || (hosts.source.api().get(&path).await["progress"]["phase"] == "sending_owed").then_some(());
    wait_for("memory that is owed", owes).await
}

/// One move with one fault at one point of one daemon. Answers where the server is then.
async fn falls_on_its_feet(
    hosts: &Hosts,
    (side, point): (usize, &str),
    fault: Fault,
    (name, mode): (&str, &str),
    late_commits: bool,
) -> Result<usize, String> {
    let server = counting(&hosts.source, name).await;
    hosts.target.knows(&server);
    none_is_asked_about(hosts).await?;
    let (stage, address) = hosts.sides()[side];
    stage.kill().await;
    let flags = vec!["--migration-listen".to_owned(), format!("{address}:{PORT}")];
    let at = Some(point.to_owned());
    let orders = match fault {
        Fault::Daemon | Fault::Host => Orders { flags, die_at: at, late_commits, ..Orders::default() },
        _ => Orders { flags, hold_at: at, ..Orders::default() },
    };
    if let Err(status) = stage.open(orders).await {
        return Err(format!("the daemon ended with {status}:\n{}", stage.log()));
    }
    let mut witness = Witness::new(hosts, &server);
    let mut body = hosts.body().await;
    body["mode"] = json!(mode);
    if mode == OWING {
        body["bandwidth_bytes_per_s"] = json!(OWING_BYTES_PER_S);
    }
    let moved = asked(&hosts.source, &server, "", &body).await;
    if moved.status != 202 {
        return Err(format!("{}", moved.body));
    }
    if point == RECONNECTED {
        until_it_owes(hosts, &moved).await?;
        cut(hosts);
        mend(hosts).await?;
    }
    let mut broken = Ok(());
    let reached = async || {
        broken = broken.clone().and_then(|()| witness.look(hosts, &server));
        match fault {
            Fault::Daemon | Fault::Host => stage.ended().map(drop),
            _ => stage.is_held().then_some(()),
        }
    };
    wait_for(&format!("{point} of {side}"), reached).await?;
    match fault {
        Fault::Daemon => {}
        Fault::Host => kill_vmm(stage, name),
        Fault::SourceVmm => kill_vmm(&hosts.source, name),
        Fault::TargetVmm => kill_vmm(&hosts.target, name),
        Fault::Link => cut(hosts),
    }
    match fault {
        Fault::Daemon | Fault::Host => hosts.open(stage, address).await,
        _ => stage.release(),
    }
    if fault == Fault::Link {
        mend(hosts).await?;
    }
    let one = async || {
        broken = broken.clone().and_then(|()| witness.look(hosts, &server));
        match hosts.states(&server).await {
            [Some(state), None] if state == "running" => Some(0),
            [None, Some(state)] if state == "running" => Some(1),
            [Some(source), Some(target)] if source == "running" && target == "running" => Some(BOTH),
            _ => None,
        }
    };
    let at = match wait_for("one host that has it", one).await {
        Ok(at) => at,
        Err(late) => {
            let states = hosts.states(&server).await;
            let (source, target) = (hosts.source.log(), hosts.target.log());
            return Err(format!("{late}: {states:?}\nsource: {source}\ntarget: {target}"));
        }
    };
    if at == BOTH {
        return Err("both hosts run it".to_owned());
    }
    let from = count(hosts.sides()[at].0, &server);
    goes_on(hosts.sides()[at].0, &server, from, &format!("{fault:?} at {point} of {side}")).await;
    witness.look(hosts, &server)?;
    broken?;
    let may_boot = matches!(fault, Fault::SourceVmm | Fault::TargetVmm | Fault::Host);
    let boots = count(hosts.sides()[at].0, &server).boots;
    if boots != 1 && !may_boot {
        return Err(format!("it booted {boots} times"));
    }
    let operation = hosts.source.finished(&moved.operation()).await?;
    if (operation["state"] == "succeeded") != (at == 1) {
        return Err(format!("it is at host {at}: {operation}"));
    }
    let (stage, _) = hosts.sides()[at];
    let gone =
        stage.call(Method::DELETE, &format!("/v1/servers/{server}"), &format!("end-{server}"), None).await;
    stage.succeeded(&gone.operation()).await?;
    Ok(at)
}

async fn sweep(fault: Fault, mode: &str) {
    let is_owing = mode == OWING;
    let hosts = if is_owing { hosts_of(OWING_WORDS).await } else { ledger_hosts().await };
    // One whose VMM is killed is started again.
    let mut outcomes = BTreeMap::new();
    let all = if is_owing { POINTS_OF_OWING } else { POINTS };
    for (side, points) in all.into_iter().enumerate() {
        // Before a move is promised a host that dies takes no more with it than its VMM.
        let is_early = |point: &&&str| fault == Fault::Host && !PROMISES.contains(point);
        for (number, point) in points.iter().skip_while(is_early).enumerate() {
            let name = format!("web-{side}-{number}");
            let (stage, address) = hosts.sides()[side];
            match falls_on_its_feet(&hosts, (side, point), fault, (&name, mode), false).await {
                Ok(at) => outcomes.insert(format!("{fault:?} {side} {point}"), at),
                Err(why) => panic!("{fault:?} at {point} of {side}: {why}\n{outcomes:#?}"),
            };
            stage.kill().await;
            hosts.open(stage, address).await;
        }
    }
    println!("{outcomes:#?}");
    let at_target = outcomes.values().filter(|at| **at == 1).count();
    assert!(at_target > 2 && (is_owing || at_target < outcomes.len() - 2), "{outcomes:?}");
    hosts.close().await;
}

#[test]
fn a_daemon_that_is_killed_at_any_phase_leaves_one_guest_that_goes_on() {
    inside(
        "live::a_daemon_that_is_killed_at_any_phase_leaves_one_guest_that_goes_on",
        sweep(Fault::Daemon, ALL_FIRST),
    );
}

#[test]
fn a_source_vmm_that_is_killed_at_any_phase_leaves_one_guest() {
    inside(
        "live::a_source_vmm_that_is_killed_at_any_phase_leaves_one_guest",
        sweep(Fault::SourceVmm, ALL_FIRST),
    );
}

#[test]
fn a_target_vmm_that_is_killed_at_any_phase_leaves_one_guest() {
    inside(
        "live::a_target_vmm_that_is_killed_at_any_phase_leaves_one_guest",
        sweep(Fault::TargetVmm, ALL_FIRST),
    );
}

#[test]
fn a_host_that_dies_once_a_move_is_promised_leaves_one_guest() {
    let name = "live::a_host_that_dies_once_a_move_is_promised_leaves_one_guest";
    inside(name, sweep(Fault::Host, ALL_FIRST));
}

#[test]
fn connections_that_are_cut_at_any_phase_leave_one_guest_that_goes_on() {
    inside(
        "live::connections_that_are_cut_at_any_phase_leave_one_guest_that_goes_on",
        sweep(Fault::Link, ALL_FIRST),
    );
}

#[test]
fn a_daemon_that_is_killed_while_memory_is_owed_leaves_one_guest_that_goes_on() {
    let name = "live::a_daemon_that_is_killed_while_memory_is_owed_leaves_one_guest_that_goes_on";
    inside(name, sweep(Fault::Daemon, OWING));
}

#[test]
fn a_source_vmm_that_is_killed_while_memory_is_owed_leaves_one_guest() {
    let name = "live::a_source_vmm_that_is_killed_while_memory_is_owed_leaves_one_guest";
    inside(name, sweep(Fault::SourceVmm, OWING));
}

#[test]
fn a_target_vmm_that_is_killed_while_memory_is_owed_leaves_one_guest() {
    let name = "live::a_target_vmm_that_is_killed_while_memory_is_owed_leaves_one_guest";
    inside(name, sweep(Fault::TargetVmm, OWING));
}

#[test]
fn connections_that_are_cut_while_memory_is_owed_leave_one_guest_that_goes_on() {
    let name = "live::connections_that_are_cut_while_memory_is_owed_leave_one_guest_that_goes_on";
    inside(name, sweep(Fault::Link, OWING));
}

/// A daemon whose commits come after what is to follow them gives a machine away without having said so to its records: it
/// has it back when it starts again, and the target has it too.
async fn a_broken_rule() {
    let hosts = ledger_hosts().await;
    let outcome =
        falls_on_its_feet(&hosts, (0, "move.said:1"), Fault::Daemon, ("web1", ALL_FIRST), true).await;
    let why = outcome.expect_err("the sweep did not notice that two guests went on");
    assert!(why.starts_with("both hosts run it") || why.starts_with("the source counts on"), "{why}");
    hosts.close().await;
}

#[test]
fn a_commit_that_comes_too_late_is_caught_by_the_sweep() {
    inside("live::a_commit_that_comes_too_late_is_caught_by_the_sweep", a_broken_rule());
}

/// A machine that lacks memory takes no order for which all is needed, and can be started anew without the host that has it.
async fn without_its_source() {
    let hosts = hosts_of(OWING_WORDS).await;
    let server = counting(&hosts.source, "web1").await;
    hosts.target.knows(&server);
    let mut body = hosts.body().await;
    (body["mode"], body["bandwidth_bytes_per_s"]) = (json!(OWING), json!(OWING_BYTES_PER_S));
    let moved = asked(&hosts.source, &server, "", &body).await;
    until_it_owes(&hosts, &moved).await.unwrap();
    hosts.source.kill().await;
    kill_vmm(&hosts.source, "web1");
    let owed = async || {
        let metrics = hosts.target.api().get(&format!("/v1/servers/{server}/metrics")).await;
        metrics["memory_owed_bytes"].as_u64().expect("how much is owed")
    };
    assert!(owed().await > 0);
    let order = async |action: &str, body: Option<Value>| {
        let path = format!("/v1/servers/{server}/actions/{action}");
        let answer = hosts.target.call(Method::POST, &path, action, body).await;
        hosts.target.finished(&answer.operation()).await.unwrap()
    };
    let no_grace = Some(json!({ "grace_s": 0 }));
    for (action, body) in [
        ("pause", None),
        ("reboot", no_grace.clone()),
        ("hibernate", None),
        ("upgrade-vmm", None),
        ("clone", Some(json!({ "name": "twin" }))),
    ] {
        let refused = order(action, body).await;
        assert!(refused["error"]["detail"].to_string().contains("still on its way"), "{action}: {refused}");
        let runs = async || (hosts.states(&server).await[1].as_deref() == Some("running")).then_some(());
        wait_for(&format!("the guest to go on after {action}"), runs).await.unwrap();
    }
    let before = count(&hosts.target, &server);
    for (action, body) in [("stop", no_grace), ("start", None)] {
        let done = order(action, body).await;
        assert_eq!(done["state"], "succeeded", "{done}");
    }
    assert_eq!(owed().await, 0);
    goes_on(&hosts.target, &server, before, "from its disks").await;
    hosts.open(&hosts.source, NEAR).await;
    let one = async || (hosts.states(&server).await == [None, Some("running".to_owned())]).then_some(());
    wait_for("the source to hear of it", one).await.unwrap();
    hosts.close().await;
}

#[test]
fn a_machine_that_lacks_memory_is_started_anew_when_its_source_is_gone() {
    inside("live::a_machine_that_lacks_memory_is_started_anew_when_its_source_is_gone", without_its_source());
}
