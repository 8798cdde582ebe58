//! What dies beside the daemon: VMMs, the launcher, DHCP servers, and the old daemon in an upgrade, each at many
//! moments of an operation. What was hit is reported with its reason and mended; what was not hit runs on.
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::task::spawn_local;

use crate::api::{Api, text};
use crate::daemon::{Orders, Stage, server_body, wait_for};
use crate::live;
use crate::world::{World, inside, processes};

/// Moments of an operation at which something is killed, in milliseconds after it was asked for. A create takes
/// some 30 to 80.
const MOMENTS_MS: [u64; 12] = [0, 1, 2, 4, 6, 9, 13, 18, 25, 35, 50, 80];

fn kill_9(pid: i32) {
    // That it has ended already is what was wanted.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

async fn stage() -> Stage {
    let stage = Stage::new();
    stage.open_well().await;
    stage.import().await;
    stage
}

async fn server(api: &Api, id: &str) -> Value {
    api.get(&format!("/v1/servers/{id}")).await
}

/// Waits until a server is in a state.
async fn until(api: &Api, id: &str, state: &str) -> Value {
    let look = async || Some(server(api, id).await).filter(|server| server["state"] == state);
    wait_for(&format!("state {state}"), look).await.unwrap()
}

async fn delete(stage: &Stage, id: &str) {
    let answer =
        stage.call(Method::DELETE, &format!("/v1/servers/{id}"), &format!("delete-{id}"), None).await;
    stage.succeeded(&answer.operation()).await.unwrap();
}

async fn killed_vmms_come_back() {
    let stage = stage().await;
    let api = stage.api();
    let (bystander, id) = (stage.create("bystander").await, stage.create("web1").await);
    let bystander_vmm = stage.vmms()["bystander"];
    let mut pauses = Vec::new();
    for _ in 0..2 {
        let vmm = stage.vmms()["web1"];
        let begun = Instant::now();
        kill_9(vmm);
        let waiting = until(&api, &id, "starting").await;
        assert_eq!(waiting["state_reason"]["code"], "vmm_killed", "{waiting}");
        assert!(text(&waiting["state_reason"]["detail"]).contains("signal 9"), "{waiting}");
        until(&api, &id, "running").await;
        pauses.push(begun.elapsed());
        assert_ne!(stage.vmms()["web1"], vmm);
    }
    let [first, second] = [Duration::from_secs(1), Duration::from_secs(2)];
    assert!(pauses[0] >= first && pauses[1] >= second, "pauses of {pauses:?} do not grow");

    // With the daemon away nobody sees the signal; that it has gone is seen all the same.
    let vmm = stage.vmms()["web1"];
    stage.kill().await;
    kill_9(vmm);
    stage.open_well().await;
    let waiting = until(&api, &id, "starting").await;
    assert_eq!(waiting["state_reason"]["code"], "vmm_vanished", "{waiting}");
    until(&api, &id, "running").await;

    // Who does not want to be restarted is not.
    let answer = stage
        .call(
            Method::PATCH,
            &format!("/v1/servers/{id}"),
            "never",
            Some(json!({ "restart_policy": "never" })),
        )
        .await;
    assert_eq!(answer.body["restart_policy"], "never");
    kill_9(stage.vmms()["web1"]);
    let failed = until(&api, &id, "failed").await;
    assert_eq!(failed["state_reason"]["code"], "vmm_killed", "{failed}");
    let events = api.log().await;
    let told = events.iter().filter(|event| {
        event["data"]["state"] == "failed" && event["data"]["resource"]["id"] == failed["id"]
    });
    assert_eq!(told.count(), 1, "a failure is told once");
    let answer =
        stage.call(Method::POST, &format!("/v1/servers/{id}/actions/start"), "start-again", None).await;
    stage.succeeded(&answer.operation()).await.unwrap();

    assert_eq!(stage.vmms()["bystander"], bystander_vmm);
    assert_eq!(stage.beats(&bystander).await.1, 1);
    stage.close().await;
}

#[test]
fn a_killed_vmm_is_reported_and_restarted_with_growing_pauses() {
    inside("deaths::a_killed_vmm_is_reported_and_restarted_with_growing_pauses", killed_vmms_come_back());
}

/// Makes a server of an image, with a policy; answers its id.
async fn create_of(stage: &Stage, image: &str, policy: &str) -> String {
    let mut body = server_body(image);
    body["image"] = json!(image);
    body["restart_policy"] = json!(policy);
    let answer = stage.call(Method::POST, "/v1/servers", &format!("create-{image}"), Some(body)).await;
    stage.succeeded(&answer.operation()).await.unwrap();
    text(&answer.body["resource"]["id"])
}

async fn ends_are_told_apart() {
    let stage = stage().await;
    let api = stage.api();
    // The guest ends after it was seen to run, or its create would have failed.
    let ends = [
        ("triples", "pause=100 triple", "failed", "triple_fault"),
        ("panics", "pause=100 panic", "failed", "guest_panicked"),
        ("leaves", "pause=100 poweroff", "stopped", "guest_powered_off"),
    ];
    for (image, words, state, code) in ends {
        stage.import_another(image, words).await;
        let id = create_of(&stage, image, "never").await;
        let ended = until(&api, &id, state).await;
        assert_eq!(ended["state_reason"]["code"], code, "{ended}");
        assert_eq!(ended["wanted"], "stopped", "{ended}");
        delete(&stage, &id).await;
    }
    assert!(stage.vmms().is_empty());
    stage.close().await;
}

#[test]
fn how_a_guest_ended_is_told() {
    inside("deaths::how_a_guest_ended_is_told", ends_are_told_apart());
}

/// A server whose guest crashes again and again is started less and less often, everybody can see when, and whoever
/// mends it begins anew.
async fn crash_loop() {
    let stage = stage().await;
    let api = stage.api();
    stage.import_another("triples", "pause=100 triple").await;
    let id = create_of(&stage, "triples", "on_failure").await;
    for attempt in 1..=3 {
        let waits = async || {
            Some(server(&api, &id).await).filter(|server| {
                server["restart"]["attempt"] == attempt && server["restart"]["at"].is_string()
            })
        };
        let waiting = wait_for(&format!("restart {attempt}"), waits).await.unwrap();
        assert_eq!(
            (text(&waiting["state"]), text(&waiting["wanted"])),
            ("starting".into(), "running".into())
        );
        assert_eq!(waiting["state_reason"]["code"], "triple_fault", "{waiting}");
        // The same in the log, for those who do not look.
        let due = format!("; restart {attempt} in a row is due at {}", text(&waiting["restart"]["at"]));
        let log = api.log().await;
        let reasons = log.iter().filter_map(|event| event["data"]["reason"].as_str());
        assert_eq!(reasons.filter(|reason| reason.ends_with(&due)).count(), 1, "{due} is told once");
    }
    // The pause is kept in the records, not in a process: the next one waits for the rest of the pause.
    let before = server(&api, &id).await;
    stage.kill().await;
    stage.open_well().await;
    assert_eq!(server(&api, &id).await["restart"], before["restart"]);
    let path = format!("/v1/servers/{id}/actions/start");
    let started = stage.call(Method::POST, &path, "at-once", None).await;
    stage.succeeded(&started.operation()).await.unwrap();
    let again = until(&api, &id, "starting").await;
    assert_eq!(again["restart"]["attempt"], 1, "whoever starts it has mended it: {again}");
    stage.close().await;
}

#[test]
fn a_server_that_crashes_again_and_again_is_started_less_and_less_often() {
    inside("deaths::a_server_that_crashes_again_and_again_is_started_less_and_less_often", crash_loop());
}

/// Something is killed at each moment of a create. The create ends, done or undone, and leaves what it should.
async fn creates_under_blows(blow: impl AsyncFn(&Stage)) {
    let stage = stage().await;
    let bystander = stage.create("bystander").await;
    let bystander_vmm = stage.vmms()["bystander"];
    let rest = stage.look();
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    for (number, moment_ms) in MOMENTS_MS.iter().enumerate() {
        let key = format!("blow-{number}");
        let answer = stage.call(Method::POST, "/v1/servers", &key, Some(server_body("web1"))).await;
        let id = text(&answer.body["resource"]["id"]);
        tokio::time::sleep(Duration::from_millis(*moment_ms)).await;
        blow(&stage).await;
        let ended = stage.finished(&answer.operation()).await.unwrap();
        let state = text(&ended["state"]);
        match state.as_str() {
            "succeeded" => {
                until(&stage.api(), &id, "running").await;
                delete(&stage, &id).await;
            }
            // Undone, with a reason that a person can read.
            _ => {
                assert_eq!(ended["error"]["code"], "machine_failed", "{ended}");
                let answer = stage.api().read(&format!("/v1/servers/{id}")).await.unwrap();
                assert_eq!(answer.status, 404, "{ended}: {}", answer.body);
            }
        }
        *ends.entry(state).or_default() += 1;
        same_but_for_processes_that_come_back(&stage, &rest).await;
        assert_eq!(stage.vmms().get("bystander"), Some(&bystander_vmm), "the bystander was hit");
    }
    println!("{} blows: {ends:?}", MOMENTS_MS.len());
    assert_eq!(stage.beats(&bystander).await.1, 1);
    stage.close().await;
}

/// A start makes what was killed come back, and leaves the rest as it was.
async fn same_but_for_processes_that_come_back(stage: &Stage, rest: &World) {
    if !processes().iter().any(|(_, line)| line.contains("dnsmasq")) {
        let id = stage.create("reviver").await;
        delete(stage, &id).await;
    }
    stage.same_as(rest).await.unwrap();
}

#[test]
fn a_vmm_may_die_at_any_moment_of_a_create() {
    let blow = async |stage: &Stage| {
        if let Some(vmm) = stage.vmms().get("web1") {
            kill_9(*vmm);
        }
    };
    inside("deaths::a_vmm_may_die_at_any_moment_of_a_create", creates_under_blows(blow));
}

#[test]
fn the_launcher_may_die_at_any_moment_of_a_create() {
    let blow = async |stage: &Stage| stage.launcher().into_iter().for_each(kill_9);
    inside("deaths::the_launcher_may_die_at_any_moment_of_a_create", creates_under_blows(blow));
}

#[test]
fn the_dhcp_server_may_die_at_any_moment_of_a_create() {
    let blow = async |_: &Stage| {
        processes().iter().filter(|(_, line)| line.contains("dnsmasq")).for_each(|(pid, _)| kill_9(*pid));
    };
    inside("deaths::the_dhcp_server_may_die_at_any_moment_of_a_create", creates_under_blows(blow));
}

#[test]
fn the_daemon_may_be_killed_at_any_moment_of_a_create() {
    let blow = async |stage: &Stage| {
        stage.kill().await;
        stage.open_well().await;
    };
    inside("deaths::the_daemon_may_be_killed_at_any_moment_of_a_create", creates_under_blows(blow));
}

/// New daemons take the place of old ones while servers are being made, and no server notices.
async fn upgrades_under_load() {
    let stage = stage().await;
    let bystander = stage.create("bystander").await;
    let bystander_vmm = stage.vmms()["bystander"];
    for round in 0..4 {
        let mut creates = Vec::new();
        for one in 0..4 {
            let (api, name) = (stage.api(), format!("web{round}{one}"));
            creates.push(spawn_local(async move {
                let again = async || {
                    let body = Some(server_body(&name));
                    let answer = api.call(Method::POST, "/v1/servers", Some(&name), body).await.ok()?;
                    answer.is_ok().then_some(answer)
                };
                wait_for("an answer to a create", again).await.unwrap()
            }));
        }
        tokio::time::sleep(Duration::from_millis(7 * round)).await;
        // As a package does it: the new program is in its place, then the old daemon is told to go, or is killed.
        stage.upgrade();
        stage.end(if round % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL }).await;
        stage.open(Orders::default()).await.unwrap();
        for create in creates {
            let answer = create.await.unwrap();
            stage.knows(&text(&answer.body["resource"]["id"]));
            stage.succeeded(&answer.operation()).await.unwrap();
        }
        let vmms = stage.vmms();
        assert_eq!(vmms.len(), 1 + 4 * (round as usize + 1), "one VMM each: {vmms:?}");
        assert_eq!(vmms["bystander"], bystander_vmm);
    }
    assert_eq!(stage.beats(&bystander).await.1, 1);
    stage.close().await;
}

#[test]
fn an_upgrade_of_the_daemon_under_load_disturbs_nobody() {
    inside("deaths::an_upgrade_of_the_daemon_under_load_disturbs_nobody", upgrades_under_load());
}

/// A line of a guest that spins and says its own clock each 20 ms.
#[derive(Debug, Clone, Copy)]
struct Tick {
    number: u64,
    ns: u64,
    /// What of its time the host's scheduler gave to others, in all.
    steal_ns: u64,
    /// Somebody paused it since the last line.
    was_paused: bool,
}

/// Reads the ring of the guest's console, for which no daemon needs to live.
fn ticks(stage: &Stage, id: &str) -> Vec<Tick> {
    let log = live::console(stage, id);
    assert!(!log.contains("FAILED") && !log.contains("broken"), "{log}");
    assert!(log.matches("probe: hello").count() <= 1, "it booted again: {log}");
    let tick = |line: &str| -> Option<Tick> {
        let mut words = line.trim().strip_prefix("probe: tick ")?.split(' ');
        let number = words.next()?.parse().ok()?;
        let value = |name: &str| words.clone().find_map(|word| word.strip_prefix(name)?.parse().ok());
        let (ns, steal_ns, paused) = (value("ns=")?, value("steal=")?, value("stopped=")?);
        Some(Tick { number, ns, steal_ns, was_paused: paused != 0 })
    };
    log.lines().filter_map(tick).collect()
}

/// How many lines more must come for a guest to have gone on: a second of its time.
const GOES_ON: u64 = 50;

/// Longest time between two lines, without what the scheduler gave to others, which on a loaded machine is most of it: left are
/// the 20 ms, and a line's way out of the guest. A guest that waits for a daemon does so for as long as there is none, which
/// `GOES_ON` tells, and one that is paused says so itself. So this can be many times what a slow machine needs.
const GAP_MAX: Duration = Duration::from_secs(1);

/// Daemons go, by themselves and killed, and other ones come: the guest counts on when there is none, and while it is adopted.
async fn without_a_pause() {
    let stage = Stage::new();
    stage.open_well().await;
    stage.import_another("ticking", "ticks=1000000,20").await;
    let id = create_of(&stage, "ticking", "never").await;
    let vmm = stage.vmms()["ticking"];
    let last = || ticks(&stage, &id).last().map_or(0, |tick| tick.number);
    let reaches = async |number: u64, what: &str| {
        wait_for(what, async || (last() >= number).then_some(())).await.unwrap();
    };
    let adoptions = || {
        let log = std::fs::read_to_string(stage.scratch("toftd.log")).unwrap_or_default();
        log.matches("adopted its machine").count()
    };
    reaches(GOES_ON, "the first lines").await;
    for (round, signal) in
        [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL].into_iter().enumerate()
    {
        stage.upgrade();
        stage.end(signal).await;
        reaches(last() + GOES_ON, "a guest that goes on without a daemon").await;
        assert_eq!(adoptions(), round);
        stage.open(Orders::default()).await.unwrap();
        wait_for("its adoption", async || (adoptions() == round + 1).then_some(())).await.unwrap();
        assert_eq!(until(&stage.api(), &id, "running").await["state_reason"], Value::Null);
        reaches(last() + GOES_ON, "a guest that goes on with the next daemon").await;
    }
    assert_eq!(stage.vmms()["ticking"], vmm);
    let all = ticks(&stage, &id);
    assert!(all.len() as u64 > 9 * GOES_ON, "{}", all.len());
    let mut longest = Duration::ZERO;
    for pair in all.windows(2) {
        let [before, after] = [pair[0], pair[1]];
        assert!(after.number == before.number + 1 && after.ns > before.ns, "{pair:?}");
        assert!(!after.was_paused, "{pair:?}");
        let lost_ns = after.steal_ns - before.steal_ns;
        longest = longest.max(Duration::from_nanos((after.ns - before.ns).saturating_sub(lost_ns)));
    }
    println!("its lines, 20 ms apart, were at most {longest:?} apart");
    assert!(longest < GAP_MAX, "{longest:?}");
    stage.close().await;
}

#[test]
fn a_guest_goes_on_while_there_is_no_daemon_and_while_it_is_adopted() {
    inside("deaths::a_guest_goes_on_while_there_is_no_daemon_and_while_it_is_adopted", without_a_pause());
}
