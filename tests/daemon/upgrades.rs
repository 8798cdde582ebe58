//! Servers whose machines get new VMMs as they run, with the real daemon and VMMs and a guest that counts alike in its memory
//! and on its disk. Whoever is killed wherever: one machine goes on, and it is the same one unless the VMM that had it died.
use std::collections::BTreeMap;

use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::api::{Answer, text};
use crate::daemon::{Orders, Stage, wait_for};
use crate::live::{self, count, counting, goes_on};
use crate::world::{inside, processes};

async fn stage() -> Stage {
    let stage = Stage::new();
    stage.open_well().await;
    stage.import_another(live::IMAGE, "ledger=20").await;
    stage
}

async fn asked(stage: &Stage, server: &str, key: &str) -> Answer {
    let path = format!("/v1/servers/{server}/actions/upgrade-vmm");
    stage.call(Method::POST, &path, key, None).await
}

/// Repeats the request until it is answered.
async fn insisted(stage: &Stage, server: &str, key: &str) -> Answer {
    let path = format!("/v1/servers/{server}/actions/upgrade-vmm");
    let answered = async || stage.api().call(Method::POST, &path, Some(key), None).await.ok();
    wait_for("an answer", answered).await.expect("an answer")
}

/// VMMs with the label of this server.
fn vmms_of(name: &str) -> Vec<i32> {
    let wanted = format!("machine --label {name}");
    processes().into_iter().filter(|(_, line)| line.contains(&wanted)).map(|(pid, _)| pid).collect()
}

/// The longest time between two lines of a guest that writes one each 20 ms, by its own clock.
fn longest_gap_ms(stage: &Stage, server: &str) -> f64 {
    let path = stage.scratch("state/servers").join(server).join("console.ring");
    let piece = std::fs::File::open(path).and_then(wire::console::Ring::open);
    let piece = piece.and_then(|mut ring| ring.read(0, 8 << 20)).expect("its console");
    let log = String::from_utf8_lossy(&piece.data).into_owned();
    let at = |line: &str| line.trim().split_once(" ns=")?.1.parse::<u64>().ok();
    let times: Vec<u64> = log.lines().filter(|line| line.contains("probe: ledger ")).filter_map(at).collect();
    let gaps = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
    gaps.max().unwrap_or_default() as f64 / 1e6
}

async fn from_one_to_the_next() {
    let stage = stage().await;
    let server = counting(&stage, "web1").await;
    let path = format!("/v1/servers/{server}");
    let first = stage.api().get(&path).await;
    let host = stage.api().get("/v1/host").await;
    assert!(first["vmm_build"].is_string() && first["vmm_build"] == host["vmm_build"], "{first}\n{host}");
    let volume = stage.scratch("state/volumes").join(text(&first["volumes"][0]["volume_id"]) + ".raw");
    for hop in 0..4 {
        let (before, old) = (count(&stage, &server), vmms_of("web1"));
        let began = std::time::Instant::now();
        let answer = asked(&stage, &server, &format!("hop-{hop}")).await;
        stage.succeeded(&answer.operation()).await.unwrap_or_else(|why| panic!("{why}\n{}", stage.log()));
        println!("hop {hop}: {:?}", began.elapsed());
        let new = vmms_of("web1");
        assert!(new.len() == 1 && new != old, "{old:?} {new:?}");
        goes_on(&stage, &server, before, "after its upgrade").await;
        assert_eq!(count(&stage, &server).boots, 1);
        // Nobody else gets its disk, as before.
        let disk = std::fs::File::options().read(true).write(true).open(&volume).expect("its disk");
        assert!(matches!(disk.try_lock(), Err(std::fs::TryLockError::WouldBlock)), "its lock is lost");
    }
    println!("its lines, 20 ms apart, were at most {:.1} ms apart", longest_gap_ms(&stage, &server));
    assert!(longest_gap_ms(&stage, &server) < 2500.0);
    let here = stage.api().get(&path).await;
    for same in ["id", "name", "memory_bytes", "started_at", "state", "volumes", "nics", "restart"] {
        assert_eq!(here[same], first[same], "{same}");
    }
    let isolation = stage.api().get(&format!("{path}/isolation")).await;
    let lacks = |it: &Value| {
        it["items"].as_array().map(|all| all.iter().filter(|item| item["stands"] != true).count())
    };
    assert!(lacks(&isolation).is_some_and(|count| count < 5), "{isolation}");
    // It is a server like any other, under a daemon that is new as well.
    stage.kill().await;
    stage.open_well().await;
    let actions =
        ["pause", "upgrade-vmm", "resume", "hibernate", "start", "upgrade-vmm", "reboot", "upgrade-vmm"];
    let mut is_paused = false;
    for (at, action) in actions.into_iter().enumerate() {
        let body = (action == "reboot").then(|| json!({ "grace_s": 0 }));
        let key = format!("{action}-{at}");
        let answer = stage.call(Method::POST, &format!("{path}/actions/{action}"), &key, body).await;
        stage.succeeded(&answer.operation()).await.unwrap_or_else(|why| panic!("{action}: {why}"));
        is_paused = action == "pause" || is_paused && action == "upgrade-vmm";
        if is_paused {
            assert_eq!(stage.api().get(&path).await["state"], "paused", "after {action}");
        } else if action != "hibernate" {
            goes_on(&stage, &server, count(&stage, &server), action).await;
        }
    }
    assert_eq!(count(&stage, &server).boots, 2);
    stage.close().await;
}

#[test]
fn a_machine_goes_on_in_one_vmm_after_another() {
    inside("upgrades::a_machine_goes_on_in_one_vmm_after_another", from_one_to_the_next());
}

/// Points of an upgrade.
const POINTS: &[&str] = &[
    "server.socket_bound:1",
    "server.next_spawned:1",
    "server.next_receives:1",
    "server.hands_over:1",
    "server.handed_over:1",
    "server.other_ended:1",
    "server.next_moved_in:1",
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Victim {
    Daemon,
    Old,
    New,
}

/// One upgrade in which the victim dies at this point. Answers how often the guest has booted in all.
async fn survives(stage: &Stage, point: &str, victim: Victim, name: &str) -> Result<usize, String> {
    let server = counting(stage, name).await;
    let old = vmms_of(name);
    stage.kill().await;
    let at = Some(point.to_owned());
    let orders = match victim {
        Victim::Daemon => Orders { die_at: at, ..Orders::default() },
        _ => Orders { hold_at: at, ..Orders::default() },
    };
    stage.open(orders).await.map_err(|status| format!("the daemon ended with {status}"))?;
    let reached = async || match victim {
        Victim::Daemon => stage.ended().map(drop),
        _ => stage.is_held().then_some(()),
    };
    let striking = async {
        wait_for(point, reached).await?;
        for pid in vmms_of(name) {
            if victim == Victim::Old && old.contains(&pid) || victim == Victim::New && !old.contains(&pid) {
                // An error means that it has ended already.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        match victim {
            Victim::Daemon => stage.open_well().await,
            _ => stage.release(),
        }
        Ok::<(), String>(())
    };
    // The daemon may be held, or die, before it has answered.
    let (answer, struck) = tokio::join!(insisted(stage, &server, name), striking);
    struck?;
    let operation = stage.finished(&answer.operation()).await?;
    let path = format!("/v1/servers/{server}");
    let rests = async || {
        let shown = stage.api().read(&path).await.ok()?.body;
        (shown["state"] == "running" && shown["operation_id"].is_null() && vmms_of(name).len() == 1)
            .then_some(())
    };
    wait_for("one machine that runs", rests).await?;
    // What it does from here on, it does after the death: a state may be read before that is noticed.
    goes_on(stage, &server, count(stage, &server), &format!("{victim:?} at {point}")).await;
    let boots = count(stage, &server).boots;
    let is_new = vmms_of(name) != old;
    // One that has the machine may die just behind the end of the operation.
    let has_succeeded = operation["state"] == "succeeded";
    if has_succeeded && !is_new || !has_succeeded && is_new && boots == 1 {
        return Err(format!("booted {boots} times, in a new VMM: {is_new}: {operation}"));
    }
    let directory = stage.scratch("state/servers").join(&server);
    if directory.join("next.sock").exists() || directory.join("next-will.json").exists() {
        return Err("something of a second VMM is left".to_owned());
    }
    let gone = stage.call(Method::DELETE, &path, &format!("end-{server}"), None).await;
    stage.succeeded(&gone.operation()).await?;
    Ok(boots)
}

async fn sweep(victim: Victim) {
    let stage = stage().await;
    let mut outcomes = BTreeMap::new();
    for (number, point) in POINTS.iter().enumerate() {
        match survives(&stage, point, victim, &format!("web-{number}")).await {
            Ok(boots) => outcomes.insert(*point, boots),
            Err(why) => panic!("{victim:?} at {point}: {why}\n{outcomes:#?}\n{}", stage.log()),
        };
        stage.kill().await;
        stage.open_well().await;
    }
    println!("{victim:?}: {outcomes:#?}");
    for (number, point) in POINTS.iter().enumerate() {
        // Where it is not said, the two VMMs go on while one of them is being killed.
        let lives = match victim {
            Victim::Daemon => Some(true),
            Victim::Old => {
                [Some(false), Some(false), Some(false), None, Some(true), Some(true), Some(true)][number]
            }
            Victim::New => {
                [Some(true), Some(true), Some(true), None, Some(false), Some(false), Some(false)][number]
            }
        };
        assert!(
            lives.is_none_or(|lives| lives == (outcomes[point] == 1)),
            "{victim:?} at {point}: {outcomes:?}"
        );
    }
    stage.close().await;
}

#[test]
fn a_daemon_that_is_killed_at_any_point_costs_no_machine() {
    inside("upgrades::a_daemon_that_is_killed_at_any_point_costs_no_machine", sweep(Victim::Daemon));
}

#[test]
fn an_old_vmm_that_is_killed_at_any_point_leaves_one_machine() {
    inside("upgrades::an_old_vmm_that_is_killed_at_any_point_leaves_one_machine", sweep(Victim::Old));
}

#[test]
fn a_new_vmm_that_is_killed_at_any_point_leaves_one_machine() {
    inside("upgrades::a_new_vmm_that_is_killed_at_any_point_leaves_one_machine", sweep(Victim::New));
}
