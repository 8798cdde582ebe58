//! The small guest: a stock kernel that reaches its prompt in seconds.
use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::toft::{Daemon, wait_for};

const READY: &str = "tiny: ready";

fn boot(daemon: &Daemon, name: &str, more: &[&str]) {
    daemon.run(&[&["--wait", "server", "create", name, "--image", "tiny"], more].concat());
}

/// How long the way to the prompt may take. Whoever knows that the machine is busy says more in `TOFT_PROMPT_S_MAX`.
fn prompt_max() -> Duration {
    let seconds = std::env::var("TOFT_PROMPT_S_MAX").map_or(30, |text| text.parse().unwrap());
    Duration::from_secs(seconds)
}

fn user_data(daemon: &Daemon, script: &str) -> String {
    let path = daemon.scratch().join("user-data");
    std::fs::write(&path, script).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn it_reaches_its_prompt_and_powers_off() {
    let daemon = Daemon::start();
    daemon.import("tiny");
    let begun = Instant::now();
    boot(&daemon, "tiny1", &["--isolation", "strict"]);
    daemon.wait_for_console("tiny1", READY, Duration::from_secs(180));
    let took = begun.elapsed();
    println!("create to prompt: {:.1} s", took.as_secs_f64());
    assert!(took <= prompt_max(), "more than {} s", prompt_max().as_secs());
    // With its disk and its interface in use, as they are not when a strict server is judged before its start.
    let walls = daemon.json(&["server", "isolation", "tiny1"]);
    assert_eq!(
        (walls["complete"].as_bool(), walls["items"].as_array().map(Vec::len)),
        (Some(true), Some(17)),
        "{walls}"
    );
    daemon.run(&["--wait", "server", "stop", "tiny1", "--grace-s", "60"]);
    let server = daemon.json(&["server", "show", "tiny1"]);
    assert_eq!(server["state"], "stopped");
    // The power button worked, or the reason would be that it was forced.
    assert!(daemon.console("tiny1").contains("Power down"), "{}", daemon.console("tiny1"));
}

#[test]
fn four_virtual_cpus_are_four_cpus_in_the_guest() {
    let daemon = Daemon::start();
    daemon.import("tiny");
    let script = user_data(&daemon, "#!/bin/sh\necho \"cpus: $(grep -c ^processor /proc/cpuinfo).\"\n");
    // An emulated host with two processors needs long for eight.
    let counts: &[&str] = if std::env::var_os("TOFT_LONG").is_some() { &["4", "8"] } else { &["4"] };
    for count in counts {
        let name = format!("smp{count}");
        boot(&daemon, &name, &["--vcpus", count, "--user-data-file", &script]);
        daemon.wait_for_console(&name, &format!("cpus: {count}."), Duration::from_secs(240));
        daemon.run(&["--wait", "server", "delete", &name]);
    }
}

#[test]
fn a_guest_that_reboots_finds_a_fresh_machine() {
    let daemon = Daemon::start();
    daemon.import("tiny");
    boot(&daemon, "again", &[]);
    daemon.wait_for_console("again", READY, Duration::from_secs(180));
    // From within: Linux resets the machine its own way.
    let mut typing = daemon.command(&["console", "--no-replay", "again"]);
    let mut typing = typing.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    writeln!(typing.stdin.as_mut().unwrap(), "reboot").unwrap();
    wait_for_boots(&daemon, 2);
    let _ = typing.kill();
    typing.wait().unwrap();
    assert_eq!(daemon.json(&["server", "metrics", "again"])["resets"], 1);
    // From without: the power button first, so that the guest ends in order, and then another machine.
    daemon.run(&["--wait", "server", "reboot", "again", "--grace-s", "60"]);
    wait_for_boots(&daemon, 3);
    assert_eq!(daemon.json(&["server", "show", "again"])["state"], "running");
}

/// Waits until the server has reached its prompt so many times.
fn wait_for_boots(daemon: &Daemon, boots: usize) {
    wait_for("another prompt", Duration::from_secs(180), || {
        (daemon.console("again").matches(READY).count() >= boots).then_some(())
    });
}

#[test]
fn a_daemon_that_is_killed_finds_its_server_running() {
    let mut daemon = Daemon::start();
    daemon.import("tiny");
    boot(&daemon, "survivor", &[]);
    daemon.wait_for_console("survivor", READY, Duration::from_secs(120));
    let before = daemon.json(&["server", "metrics", "survivor"]);
    daemon.die_and_start_again();
    let server = wait_for("adoption", Duration::from_secs(30), || {
        Some(daemon.json(&["server", "show", "survivor"])).filter(|server| server["state"] == "running")
    });
    let after = daemon.json(&["server", "metrics", "survivor"]);
    // The same machine: its time went on, its boots did not.
    assert!(after["running_ms"].as_u64() > before["running_ms"].as_u64(), "{before} {after}");
    assert_eq!(after["resets"], 0);
    assert_eq!(daemon.console("survivor").matches(READY).count(), 1);
    daemon.run(&["--wait", "server", "stop", "survivor", "--grace-s", "60"]);
    assert_eq!(server["wanted"], "running");
}

#[test]
fn two_readers_of_one_console_see_the_same_bytes() {
    let daemon = Daemon::start();
    daemon.import("tiny");
    boot(&daemon, "talker", &[]);
    let reader = |name: &str| {
        let path = daemon.scratch().join(name);
        let output = std::fs::File::create(&path).unwrap();
        let child = daemon
            .command(&["console", "--read-only", "talker"])
            .stdin(Stdio::null())
            .stdout(output)
            .spawn()
            .unwrap();
        (child, path)
    };
    let readers = [reader("first"), reader("second")];
    daemon.wait_for_console("talker", READY, Duration::from_secs(120));
    daemon.run(&["--wait", "server", "stop", "talker", "--grace-s", "60"]);
    let seen = readers.map(|(mut child, path)| {
        // The stream ends with the machine; a reader that is still there is told to go.
        let read = || Some(std::fs::read(&path).unwrap()).filter(|seen| find(seen, b"Power down"));
        let seen = wait_for("the end of the console", Duration::from_secs(30), read);
        let _ = child.kill();
        child.wait().unwrap();
        seen
    });
    assert_eq!(seen[0], seen[1]);
}

fn find(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[test]
fn a_paused_server_stands_still_and_its_clocks_go_on_right() {
    let daemon = Daemon::start();
    daemon.import("tiny");
    let script = user_data(
        &daemon,
        "#!/bin/sh\nwhile :; do echo \"clock: $(date +%s) $(cut -d' ' -f1 /proc/uptime)\"; sleep 1; done &\n",
    );
    boot(&daemon, "sleeper", &["--user-data-file", &script]);
    daemon.wait_for_console("sleeper", "clock: ", Duration::from_secs(120));
    daemon.run(&["--wait", "server", "pause", "sleeper"]);
    let before = clocks(&daemon.console("sleeper"));
    let paused = Instant::now();
    wait_for("five seconds", Duration::from_secs(10), || {
        (paused.elapsed() > Duration::from_secs(5)).then_some(())
    });
    assert_eq!(clocks(&daemon.console("sleeper")), before, "a paused guest printed");
    daemon.run(&["--wait", "server", "resume", "sleeper"]);
    let after = wait_for("clocks after the pause", Duration::from_secs(60), || {
        Some(clocks(&daemon.console("sleeper"))).filter(|clocks| clocks.len() >= before.len() + 3)
    });
    for pair in after.windows(2) {
        assert!(pair[1].0 >= pair[0].0 && pair[1].1 >= pair[0].1, "a clock stepped back: {pair:?}");
    }
}

/// Each line `clock: <seconds of the day> <seconds up>` of a console.
fn clocks(log: &str) -> Vec<(u64, f64)> {
    let lines = log.lines().filter_map(|line| line.split_once("clock: ")).map(|(_, rest)| rest.trim());
    lines
        .filter_map(|rest| rest.split_once(' '))
        .filter_map(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
        .collect()
}
