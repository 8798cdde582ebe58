//! A new build of the VMM for all servers of a host, by the command line: one first, the others behind it, and nothing more when one
//! fails.
use serde_json::Value;

use crate::stage::{Stage, wait_for};
use crate::world;

/// The names of those that came out so, in the order in which they were tried.
fn with<'a>(lines: &'a Value, outcome: &str) -> Vec<&'a str> {
    let lines = lines.as_array().expect("one line a server").iter();
    lines.filter(|line| line["outcome"] == outcome).filter_map(|line| line["name"].as_str()).collect()
}

fn boots(stage: &Stage, server: &str) -> usize {
    stage.ok(&["server", "console-log", server]).matches("probe: hello").count()
}

fn beats_on(stage: &Stage, server: &str) {
    let beats = || stage.ok(&["server", "console-log", server]).matches("probe: beat ").count();
    let before = beats();
    wait_for(&format!("another beat of {server}"), || (beats() > before).then_some(()));
}

fn all_servers_of_a_host() {
    let mut stage = Stage::new();
    stage.install(None);
    stage.start();
    stage.import("counter");
    for name in ["one", "two", "three"] {
        let create =
            ["--wait", "server", "create", name, "--image", "counter", "--memory", "64M", "--no-network"];
        stage.json(&create);
        stage.console(name, "probe: beat 2");
    }
    stage.json(&["--wait", "server", "clone", "one", "--name", "fork"]);
    stage.json(&["--wait", "server", "stop", "three", "--grace-s", "0"]);
    let first = stage.json(&["host", "show"])["vmm_build"].clone();
    stage.stop();
    // The same program, installed again.
    stage.install(None);
    stage.start();
    let second = stage.json(&["host", "show"])["vmm_build"].clone();
    assert!(first.is_string() && first != second, "{first} {second}");
    let planned = stage.json(&["host", "upgrade", "--dry-run", "--canary", "one"]);
    assert_eq!(with(&planned, "planned"), ["one", "fork", "two"], "{planned}");
    assert!(planned.as_array().unwrap().iter().all(|line| line["build"] == first), "{planned}");
    // The clone is settled for it.
    assert!(stage.json(&["server", "show", "fork"])["shares_memory_of"].is_string());
    let upgraded = stage.json(&["host", "upgrade", "--canary", "one", "--watch-s", "1"]);
    assert_eq!(with(&upgraded, "upgraded"), ["one", "fork", "two"], "{upgraded}");
    assert!(stage.json(&["server", "show", "fork"])["shares_memory_of"].is_null());
    // The clone's console begins where it became one.
    for (name, booted) in [("one", 1), ("two", 1), ("fork", 0)] {
        assert_eq!(stage.json(&["server", "show", name])["vmm_build"], second);
        beats_on(&stage, name);
        assert_eq!(boots(&stage, name), booted);
    }
    stage.stop();
    // One that does not start.
    stage.install(Some("#!/bin/false\n"));
    stage.start();
    let said = stage.toft(&["-o", "json", "host", "upgrade"]);
    assert_ne!(said.code, 0, "{said:?}");
    let lines: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(with(&lines, "failed").len(), 1, "{lines}");
    assert_eq!(with(&lines, "upgraded"), Vec::<&str>::new(), "{lines}");
    for name in ["one", "two"] {
        assert_eq!(stage.json(&["server", "show", name])["state"], "running");
        beats_on(&stage, name);
        assert_eq!(boots(&stage, name), 1);
    }
    stage.stop();
}

#[test]
fn servers_get_a_new_build_one_first_and_nothing_more_when_one_fails() {
    world::inside("upgrades::servers_get_a_new_build_one_first_and_nothing_more_when_one_fails", async {
        all_servers_of_a_host();
    });
}
