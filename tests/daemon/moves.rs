//! Two hosts that share nothing: each daemon has a directory, a network and control groups of its own, and between them
//! is one cable.
use std::process::{Child, Command, ExitStatus, Stdio};

use hyper::Method;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::api::{Answer, text};
use crate::daemon::{Orders, Stage, wait_for, was_killed};
use crate::live::{count, counting};
use crate::restores::{self, falls_asleep, reaches, wakes_with_the_right_time};
use crate::world::{inside, run};

pub(crate) const NEAR: &str = "192.0.2.1";
pub(crate) const FAR: &str = "192.0.2.2";
pub(crate) const PORT: u16 = 8687;

/// A source, a target, and the cable.
pub(crate) struct Hosts {
    pub(crate) source: Stage,
    pub(crate) target: Stage,
    /// A process that holds the target's network.
    holder: Child,
}

impl Hosts {
    /// Two hosts that wait for each other, both with the image.
    pub(crate) async fn new() -> Hosts {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]);
        let mut holder = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("unshare");
        let mut up = std::io::BufReader::new(holder.stdout.take().expect("its output"));
        std::io::BufRead::read_line(&mut up, &mut String::new()).expect("a network");
        let pid = holder.id().to_string();
        run("ip", &["link", "add", "near", "type", "veth", "peer", "name", "far", "netns", &pid]);
        run("ip", &["address", "add", &format!("{NEAR}/24"), "dev", "near"]);
        run("ip", &["link", "set", "near", "up"]);
        for line in
            [&["address", "add", &format!("{FAR}/24"), "dev", "far"][..], &["link", "set", "far", "up"]]
        {
            let net = format!("--net=/proc/{pid}/ns/net");
            run("nsenter", &[&[net.as_str(), "ip"], line].concat());
        }
        let (source, target) = (Stage::new(), Stage::on(Some(holder.id())));
        let hosts = Hosts { source, target, holder };
        hosts.open(&hosts.source, NEAR).await;
        hosts.open(&hosts.target, FAR).await;
        hosts.source.import().await;
        hosts.target.import().await;
        hosts
    }

    pub(crate) async fn open(&self, stage: &Stage, address: &str) {
        if let Err(status) = self.open_to_die(stage, address, None).await {
            panic!("the daemon ended with {status}:\n{}", stage.log());
        }
    }

    /// Starts a daemon that kills itself at a point, which it may come to before it answers anybody.
    async fn open_to_die(
        &self,
        stage: &Stage,
        address: &str,
        die_at: Option<String>,
    ) -> Result<(), ExitStatus> {
        let flags = vec!["--migration-listen".to_owned(), format!("{address}:{PORT}")];
        stage.open(Orders { flags, die_at, ..Orders::default() }).await
    }

    /// Runs a program in the network of a host, and answers what it says: 0 is the source's, which is the test's own.
    pub(crate) fn run_at(&self, side: usize, words: &[&str]) -> String {
        let net = format!("--net=/proc/{}/ns/net", self.holder.id());
        match side {
            0 => run(words[0], &words[1..]),
            _ => run("nsenter", &[&[net.as_str()][..], words].concat()),
        }
    }

    pub(crate) fn sides(&self) -> [(&Stage, &'static str); 2] {
        [(&self.source, NEAR), (&self.target, FAR)]
    }

    /// The state of a server on each host that has it. A daemon that is dead says nothing.
    pub(crate) async fn states(&self, server: &str) -> [Option<String>; 2] {
        let mut states = [None, None];
        for (state, (stage, _)) in states.iter_mut().zip(self.sides()) {
            let answer = stage.api().read(&format!("/v1/servers/{server}")).await;
            *state = answer.ok().filter(Answer::is_ok).map(|answer| text(&answer.body["state"]));
        }
        states
    }

    /// How many hosts would start it.
    async fn owners(&self, server: &str) -> usize {
        let states = self.states(server).await;
        states
            .iter()
            .flatten()
            .filter(|state| ["stopped", "running", "starting"].contains(&state.as_str()))
            .count()
    }

    /// What asks the source to move a server to the target.
    pub(crate) async fn body(&self) -> Value {
        self.body_to(&self.target, FAR).await
    }

    pub(crate) async fn body_to(&self, target: &Stage, address: &str) -> Value {
        let made = target.api().call(Method::POST, "/v1/migration-tickets", None, None).await;
        let made = made.expect("an answer").body;
        assert_eq!(made["target"], format!("{address}:{PORT}"));
        json!({ "target": made["target"], "ticket": made["ticket"] })
    }

    pub(crate) async fn close(mut self) {
        self.source.clear().await;
        self.target.clear().await;
        self.source.end(Signal::SIGTERM).await;
        self.target.end(Signal::SIGTERM).await;
        self.source.left_nothing().await;
        self.target.left_nothing().await;
        self.holder.kill().and_then(|()| self.holder.wait()).expect("our child");
    }
}

pub(crate) async fn asked(stage: &Stage, server: &str, query: &str, body: &Value) -> Answer {
    let path = format!("/v1/servers/{server}/actions/migrate{query}");
    stage.api().call(Method::POST, &path, None, Some(body.clone())).await.expect("an answer")
}

fn codes(list: &Value) -> Vec<String> {
    list.as_array().unwrap_or_else(|| panic!("{list}")).iter().map(|item| text(&item["code"])).collect()
}

async fn one_host_asks_another() {
    let hosts = Hosts::new().await;
    let server = hosts.source.create("web1").await;
    let body = hosts.body().await;
    let plan = asked(&hosts.source, &server, "?dry_run=true", &body).await;
    assert_eq!(plan.status, 200, "{}", plan.body);
    assert_eq!(codes(&plan.body["blocked_by"]), Vec::<String>::new(), "{}", plan.body);
    let mut cold = body.clone();
    cold["mode"] = json!("cold");
    let refused = asked(&hosts.source, &server, "", &cold).await;
    assert_eq!((refused.status, refused.code()), (409, "migration_blocked"), "{}", refused.body);
    // Whoever has stolen the ticket comes too late with it.
    let thief = hosts.target.create("other").await;
    let stolen = asked(&hosts.target, &thief, "?dry_run=true", &body).await;
    assert_eq!((stolen.status, codes(&stolen.body["errors"])), (422, vec!["refused".to_owned()]));
    // What answers there has to be who made the ticket.
    let mut elsewhere = body.clone();
    elsewhere["target"] = json!(format!("{NEAR}:{PORT}"));
    let other = asked(&hosts.source, &server, "?dry_run=true", &elsewhere).await;
    assert_eq!((other.status, codes(&other.body["errors"])), (422, vec!["other_host".to_owned()]));
    // A host knows its tickets and itself again.
    hosts.target.kill().await;
    let nobody = asked(&hosts.source, &server, "?dry_run=true", &body).await;
    assert_eq!((nobody.status, nobody.code()), (502, "host_unreachable"), "{}", nobody.body);
    hosts.open(&hosts.target, FAR).await;
    let again = asked(&hosts.source, &server, "?dry_run=true", &body).await;
    // By now the thief's own server has the address.
    assert_eq!(codes(&again.body["blocked_by"]), ["network"], "{}", again.body);
    hosts.close().await;
}

async fn act(stage: &Stage, server: &str, action: &str, body: Option<Value>) -> Value {
    let path = format!("/v1/servers/{server}/actions/{action}");
    let answer = stage.api().call(Method::POST, &path, None, body).await.expect("an answer");
    assert!(answer.is_ok(), "{action}: {}", answer.body);
    answer.body
}

/// Makes a server that has counted a little and is off.
async fn stopped(stage: &Stage, name: &str) -> String {
    let server = stage.create(name).await;
    let beats = async || Some(stage.beats(&server).await.0).filter(|beats| *beats > 2);
    wait_for("beats", beats).await.unwrap();
    let asked = act(stage, &server, "stop", Some(json!({ "grace_s": 0 }))).await;
    stage.succeeded(&text(&asked["operation"]["id"])).await.unwrap();
    server
}

async fn disk(stage: &Stage, server: &Value) -> Vec<u8> {
    let volume = text(&server["volumes"][0]["volume_id"]);
    std::fs::read(stage.scratch("state/volumes").join(format!("{volume}.raw"))).expect("its disk")
}

async fn there_and_back() {
    let hosts = Hosts::new().await;
    let server = stopped(&hosts.source, "web1").await;
    let path = format!("/v1/servers/{server}");
    let first = hosts.source.api().get(&path).await;
    let console = hosts.source.api().read(&format!("{path}/console-log")).await.unwrap().body;
    let bytes = disk(&hosts.source, &first).await;
    let mut ends = hosts.sides();
    for hop in 0..2 {
        let [(source, _), (target, address)] = ends;
        target.knows(&server);
        let body = hosts.body_to(target, address).await;
        let began = std::time::Instant::now();
        let moved = asked(source, &server, "", &body).await;
        assert_eq!(
            (moved.status, &moved.body["resource"]["state"]),
            (202, &json!("moving")),
            "{}",
            moved.body
        );
        source.succeeded(&moved.operation()).await.unwrap();
        println!("hop {hop}: moved in {:?}", began.elapsed());
        assert_eq!(source.api().read(&path).await.unwrap().status, 404);
        let here = target.api().get(&path).await;
        for same in ["id", "name", "memory_bytes", "created_at", "state", "volumes"] {
            assert_eq!(here[same], first[same], "{same}");
        }
        assert_eq!(
            (&here["nics"][0]["ipv4"], &here["nics"][0]["mac"]),
            (&first["nics"][0]["ipv4"], &first["nics"][0]["mac"])
        );
        assert!(disk(target, &here).await == bytes, "its disk is another");
        assert_eq!(target.api().read(&format!("{path}/console-log")).await.unwrap().body, console);
        ends.reverse();
    }
    // Once more, and it boots there, with its console going on.
    let body = hosts.body().await;
    let moved = asked(&hosts.source, &server, "", &body).await;
    hosts.source.succeeded(&moved.operation()).await.unwrap();
    let started = act(&hosts.target, &server, "start", None).await;
    hosts.target.succeeded(&text(&started["operation"]["id"])).await.unwrap();
    let booted = async || {
        let (beats, boots) = hosts.target.beats(&server).await;
        (beats > 2 && boots == 2).then_some(())
    };
    wait_for("a second boot", booted).await.unwrap();
    hosts.close().await;
}

#[test]
fn a_server_that_is_off_moves_there_and_back_and_boots_where_it_is() {
    inside("moves::a_server_that_is_off_moves_there_and_back_and_boots_where_it_is", there_and_back());
}

async fn with_its_memory() {
    let hosts = Hosts::new().await;
    for (stage, _) in hosts.sides() {
        stage.import_another(restores::IMAGE, "ledger=20").await;
    }
    let [server, awake] = [counting(&hosts.source, "web1").await, counting(&hosts.source, "awake").await];
    hosts.target.knows(&server);
    let mut ends = hosts.sides();
    for hop in 0..2 {
        let [(source, _), (target, address)] = ends;
        let asleep = falls_asleep(source, &server, &format!("sleep-{hop}")).await;
        let body = hosts.body_to(target, address).await;
        let moved = asked(source, &server, "", &body).await;
        assert_eq!(moved.status, 202, "{}", moved.body);
        source.succeeded(&moved.operation()).await.unwrap();
        // A second at least, by a guest that is not away.
        let last = count(&hosts.source, &awake).last;
        reaches(&hosts.source, &awake, last + 50, 0).await;
        wakes_with_the_right_time(target, &server, &asleep, &format!("wake-{hop}")).await;
        ends.reverse();
    }
    hosts.close().await;
}

#[test]
fn a_hibernated_server_moves_and_its_guest_goes_on_with_the_right_time() {
    inside("moves::a_hibernated_server_moves_and_its_guest_goes_on_with_the_right_time", with_its_memory());
}

/// Points at which the source, and the target, dies.
const DEATHS: [&[&str]; 2] = [
    &[
        "move.accepted:1",
        "move.copied:1",
        "move.heard:1",
        "move.decided:1",
        "move.said:1",
        "move.heard:2",
        "move.decided:2",
    ],
    &[
        "move.recorded:1",
        "move.filled:1",
        "move.flushed:1",
        "move.decided:1",
        "move.said:1",
        "move.heard:1",
        "move.decided:2",
        "move.run:1",
        "move.said:2",
    ],
];

/// A move that was begun, with an end that dies at a point. What is left of the move before may come to that point first, as
/// that end starts, and then nothing has been begun.
async fn begun(hosts: &Hosts, (stage, address): (&Stage, &str), point: &str, server: &str) -> Answer {
    for _ in 0..5 {
        stage.kill().await;
        if let Err(status) = hosts.open_to_die(stage, address, Some(point.to_owned())).await {
            assert!(was_killed(status), "the daemon ended with {status} before it answered");
            hosts.open(stage, address).await;
            continue;
        }
        let made = hosts.target.api().call(Method::POST, "/v1/migration-tickets", None, None).await;
        if let Ok(Answer { body: made, .. }) = made {
            let body = json!({ "target": made["target"], "ticket": made["ticket"] });
            let path = format!("/v1/servers/{server}/actions/migrate");
            match hosts.source.api().call(Method::POST, &path, None, Some(body)).await {
                Ok(moved) if moved.status != 502 => return moved,
                _ => {}
            }
        }
        let status = wait_for(&format!("an early death at {point}"), async || stage.ended()).await.unwrap();
        assert!(was_killed(status), "the daemon ended with {status} at {point}");
        hosts.open(stage, address).await;
    }
    panic!("what is left of the move before goes through {point} at every start")
}

async fn dead_at_every_phase() {
    let hosts = Hosts::new().await;
    let mut outcomes = std::collections::BTreeMap::<String, u32>::new();
    for (victim, points) in DEATHS.into_iter().enumerate() {
        for (number, point) in points.iter().enumerate() {
            let server = stopped(&hosts.source, &format!("web-{victim}-{number}")).await;
            hosts.target.knows(&server);
            let first = hosts.source.api().get(&format!("/v1/servers/{server}")).await;
            let bytes = disk(&hosts.source, &first).await;
            let (stage, address) = hosts.sides()[victim];
            let moved = begun(&hosts, (stage, address), point, &server).await;
            let died = async || {
                assert!(hosts.owners(&server).await <= 1, "{point}: both have it");
                stage.ended()
            };
            wait_for(&format!("death at {point} of {victim}"), died).await.unwrap();
            assert!(hosts.owners(&server).await <= 1, "{point}: both have it");
            hosts.open(stage, address).await;
            let one = async || {
                assert!(hosts.owners(&server).await <= 1, "{point}: both have it");
                match hosts.states(&server).await {
                    [Some(state), None] if state == "stopped" => Some(0),
                    [None, Some(state)] if state == "stopped" => Some(1),
                    _ => None,
                }
            };
            let at = match wait_for("one host that has it", one).await {
                Ok(at) => at,
                Err(late) => panic!("{late}: {victim} {point}: {:?}", hosts.states(&server).await),
            };
            let operation = hosts.source.finished(&moved.operation()).await.unwrap();
            assert_eq!(operation["state"] == "succeeded", at == 1, "{victim} {point}: {operation}");
            *outcomes.entry(format!("{victim} {point}: host {at}")).or_default() += 1;
            let (stage, _) = hosts.sides()[at];
            let here = stage.api().get(&format!("/v1/servers/{server}")).await;
            assert!(disk(stage, &here).await == bytes, "{victim} {point}: its disk is another");
            let started = act(stage, &server, "start", None).await;
            stage.succeeded(&text(&started["operation"]["id"])).await.unwrap();
            let gone = stage
                .call(Method::DELETE, &format!("/v1/servers/{server}"), &format!("end-{server}"), None)
                .await;
            stage.succeeded(&gone.operation()).await.unwrap();
        }
    }
    println!("{outcomes:#?}");
    hosts.close().await;
}

#[test]
fn whichever_daemon_is_killed_at_whatever_phase_one_host_has_the_server() {
    inside(
        "moves::whichever_daemon_is_killed_at_whatever_phase_one_host_has_the_server",
        dead_at_every_phase(),
    );
}

/// A server that the source has let go of, on its way to a target that stands still and has not heard of it.
async fn half_moved(hosts: &Hosts) -> String {
    for number in 0..20 {
        let server = stopped(&hosts.source, &format!("web-{number}")).await;
        hosts.target.knows(&server);
        hosts.target.kill().await;
        let hold_at = Some("move.said:1".to_owned());
        let flags = vec!["--migration-listen".to_owned(), format!("{FAR}:{PORT}")];
        hosts.target.open(Orders { flags, hold_at, ..Orders::default() }).await.unwrap();
        let body = hosts.body().await;
        let moved = asked(&hosts.source, &server, "", &body).await;
        let path = format!("/v1/operations/{}", moved.operation());
        let given = async || {
            let operation = hosts.source.api().get(&path).await;
            let is_given = operation["progress"]["phase"] == "handing_over" && hosts.target.is_held();
            // A thread may get a little further before the signal to stop reaches it.
            (is_given || operation["state"] == "succeeded").then_some(is_given)
        };
        if wait_for("the commit", given).await.unwrap() {
            return server;
        }
    }
    panic!("the target was never stopped in time");
}

async fn a_cable_that_is_pulled() {
    let hosts = Hosts::new().await;
    let server = half_moved(&hosts).await;
    run("ip", &["link", "set", "near", "down"]);
    for (stage, address) in hosts.sides() {
        stage.kill().await;
        hosts.open(stage, address).await;
    }
    let doubt = Some("in_doubt".to_owned());
    assert_eq!(hosts.states(&server).await, [doubt.clone(), doubt]);
    let path = format!("/v1/servers/{server}");
    // Neither starts it, however it is asked.
    for (stage, _) in hosts.sides() {
        let refused =
            stage.api().call(Method::POST, &format!("{path}/actions/start"), None, None).await.unwrap();
        assert_eq!((refused.status, refused.code()), (409, "wrong_state"), "{}", refused.body);
    }
    let shown = hosts.source.api().get(&path).await;
    assert_eq!(shown["allowed_actions"], json!(["settle-migration"]), "{shown}");
    run("ip", &["link", "set", "near", "up"]);
    let arrived = async || (hosts.states(&server).await == [None, Some("stopped".to_owned())]).then_some(());
    wait_for("its arrival", arrived).await.unwrap();
    hosts.close().await;
}

#[test]
fn a_server_in_doubt_arrives_when_the_cable_is_back() {
    inside("moves::a_server_in_doubt_arrives_when_the_cable_is_back", a_cable_that_is_pulled());
}

#[test]
fn a_host_says_what_is_in_the_way_to_whom_its_ticket_lets_in() {
    inside("moves::a_host_says_what_is_in_the_way_to_whom_its_ticket_lets_in", one_host_asks_another());
}
