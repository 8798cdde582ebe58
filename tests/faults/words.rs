//! What the command line says to a person where something is not as they thought.
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::images;
use crate::stage::{Said, Stage, wait_for};
use crate::world;

#[test]
fn a_person_reads_what_is_wrong_and_what_to_do() {
    world::inside("words::a_person_reads_what_is_wrong_and_what_to_do", async {
        let mut stage = Stage::new();
        let broken = stage.path("import/broken");
        images::write(&broken, "");
        std::fs::write(broken.join("kernel"), [b'x'; 4096]).unwrap();
        let sum = images::sum(&broken.join("kernel"));
        images::edit(&broken, |manifest| manifest["kernel"]["sha256"] = json!(sum));
        stage.start();
        for image in ["counter", "broken"] {
            stage.import(image);
        }
        stage.ok(&[
            "server",
            "create",
            "web",
            "--image",
            "counter",
            "--memory",
            "64M",
            "--no-start",
            "--wait",
        ]);
        operations(&stage);
        tokens(&stage);
        refusals(&stage);
        uploads(&stage);
        typing(&stage);
        names(&stage);
        stage.stop();
    });
}

#[test]
fn a_wait_goes_on_with_the_next_daemon() {
    world::inside("words::a_wait_goes_on_with_the_next_daemon", async {
        let mut stage = Stage::new();
        // Its guest does not look at the button.
        images::write(&stage.path("import/deaf"), "serial=600000");
        stage.start();
        stage.import("deaf");
        stage.ok(&["--wait", "server", "create", "deaf", "--image", "deaf", "--memory", "64M"]);
        let mut command = stage.command(&["--wait", "server", "stop", "deaf", "--grace-s", "5"]);
        let mut waiting = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("the stop", || {
            (stage.json(&["server", "show", "deaf"])["state"] == "stopping").then_some(())
        });
        stage.stop();
        let mut lines = BufReader::new(waiting.stderr.take().unwrap()).lines().map(Result::unwrap);
        let told = lines.next().unwrap();
        assert!(told.ends_with("; waiting for it to come back"), "{told}");
        stage.start();
        let output = waiting.wait_with_output().unwrap();
        assert!(output.status.success(), "{:?}", lines.collect::<Vec<_>>());
        assert!(String::from_utf8(output.stdout).unwrap().contains("stopped"));
        assert_eq!(lines.next(), None);
        stage.stop();
    });
}

fn operations(stage: &Stage) {
    let create = ["--wait", "server", "create", "s", "--image", "broken", "--memory", "64M"];
    assert_ne!(stage.toft(&create).code, 0);
    let listed = stage.ok(&["operation", "list"]);
    let lines: Vec<&str> = listed.lines().collect();
    assert!(lines[0].contains("RESOURCE") && lines[1].ends_with("machine_failed"), "{listed}");
    assert!(lines[2].contains("server web"), "{listed}");
    assert_eq!(stage.ok(&["operation", "list", "--resource", "web"]).lines().count(), 2, "{listed}");
    let said = stage.toft(&["operation", "list", "--resource", "nobody"]);
    assert!(said.code == 3 && said.err.contains("no server is named \"nobody\""), "{said:?}");
    let id = lines[1].split_whitespace().next().unwrap();
    let shown = stage.ok(&["operation", "show", id]);
    let error = shown.lines().find(|line| line.starts_with("ERROR")).unwrap();
    assert!(error.contains("machine_failed: ") && error.contains("kernel"), "{shown}");
    assert_eq!(stage.json(&["operation", "show", id])["id"], id);
}

fn tokens(stage: &Stage) {
    let toftd = |state: &Path, arguments: &[&str]| {
        let mut command = Command::new(stage.daemon_command().get_program());
        Said::of(command.arg("--state-dir").arg(state).arg("token").args(arguments))
    };
    let nowhere = stage.path("nowhere");
    for arguments in [&["list"][..], &["revoke", "p1"]] {
        let said = toftd(&nowhere, arguments);
        let words = format!("no state directory of toftd at {}; name it with --state-dir", nowhere.display());
        assert!(said.code == 1 && said.err.contains(&words), "{said:?}");
        assert!(!nowhere.exists(), "it was made by {arguments:?}");
    }
    let state = stage.path("state");
    for name in ["p1", "p2", "p2"] {
        assert_eq!(toftd(&state, &["create", name]).code, 0);
    }
    assert_eq!(toftd(&state, &["revoke", "p1"]).code, 0);
    let said = toftd(&state, &["revoke", "p1"]);
    assert!(said.code == 1 && said.err.contains("no token is named \"p1\""), "{said:?}");
    let said = toftd(&state, &["revoke", "p2"]);
    assert!(said.code == 1 && said.err.contains("2 tokens are named \"p2\"; give the id"), "{said:?}");
    assert_eq!(toftd(&state, &["list"]).out.lines().count(), 3);
}

/// What a refusal advises can be done with this command line, which has no bodies and no paths.
fn refusals(stage: &Stage) {
    let web =
        ["--wait", "server", "create", "other", "--image", "counter", "--memory", "64M", "--no-network"];
    stage.ok(&web);
    stage.ok(&["--wait", "snapshot", "create", "other", "--name", "disk"]);
    for (server, count) in [("other", 2), ("web", 1)] {
        let listed = stage.ok(&["snapshot", "list", "--server", server]);
        assert_eq!(listed.lines().count(), count, "with the head: {listed}");
    }
    let new = ["--name", "new"];
    let refused: [(&[&str], i32, &str, &[&str]); 8] = [
        (
            &["image", "import", "counter", "--from", "counter"],
            4,
            "already_exists",
            &["another image has the name counter already"],
        ),
        (&["server", "clone", "web"], 4, "wrong_state", &["take a snapshot of its disks alone"]),
        (&["snapshot", "clone", "disk"], 4, "wrong_state", &["can be created with `snapshot`"]),
        (&["server", "restore", "other", "disk"], 4, "wrong_state", &["have it stopped with `stop`"]),
        (&["server", "restore", "web", "disk"], 2, "invalid", &["can be created of it with `snapshot`"]),
        (
            &["server", "create", "x", "--image", "counter", "--memory", "1"],
            2,
            "invalid",
            &["a multiple of 2 MiB between 64 MiB and 1 TiB"],
        ),
        (
            &["server", "create", "x", "--image", "nope"],
            2,
            "invalid",
            &["image nope", "see `toft image list`"],
        ),
        (
            &["server", "create", "x", "--image", "counter", "--network", "nope"],
            2,
            "invalid",
            &["see `toft network list`"],
        ),
    ];
    for (arguments, exit, code, words) in refused {
        let more = if arguments[1] == "clone" { &new[..] } else { &[] };
        let said = stage.fails(&[arguments, more].concat(), exit, code, words);
        assert!(!said.contains("/v1/") && !said.contains("true"), "{said}");
    }
}

fn uploads(stage: &Stage) {
    let directory = stage.path("import");
    let directory = directory.to_str().unwrap();
    for arguments in [["snapshot", "import", directory].as_slice(), &["image", "upload", "x", directory]] {
        let said = stage.toft(arguments);
        let words = format!("toft: cannot read {directory}: is a directory\n");
        assert_eq!((said.code, said.err), (2, words));
    }
    let (file, cut) = (stage.path("disk.toftsnap"), stage.path("cut"));
    let file = file.to_str().unwrap();
    stage.ok(&["snapshot", "export", "disk", file]);
    // What has no length before its end is sent as well.
    let mut shell = Command::new("bash");
    let toft = stage.command(&[]);
    shell.envs(toft.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.args(["-c", r#"exec "$0" --wait snapshot import <(cat "$1") --name piped"#]);
    let said = Said::of(shell.arg(toft.get_program()).arg(file));
    assert_eq!(said.code, 0, "{said:?}");
    std::fs::write(&cut, &std::fs::read(file).unwrap()[..1000]).unwrap();
    let import = ["snapshot", "import", cut.to_str().unwrap(), "--name", "cut"];
    stage.fails(&import, 2, "snapshot_corrupt", &["the stream ends in the middle"]);
}

/// Who types at a server that is off.
fn typing(stage: &Stage) {
    let mut command = stage.command(&["console", "web"]);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    let mut keyboard = child.stdin.take().unwrap();
    keyboard.write_all(b"x").unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(
        lines.find(|line| line.contains("type")).unwrap(),
        "[web does not run: what you type goes nowhere]"
    );
    keyboard.write_all(b"y\x1d").unwrap();
    assert!(child.wait().unwrap().success());
    assert!(lines.all(|line| !line.contains("type")), "it is told again");
}

/// A script gets the same name whether it waits or not.
fn names(stage: &Stage) {
    for (name, wait) in [("web", "--wait"), ("other", "--no-wait")] {
        let out = stage.ok(&["-o", "name", wait, "server", "delete", name]);
        assert_eq!(out, format!("{name}\n"), "{wait}");
    }
    assert_eq!(stage.ok(&["-o", "name", "--wait", "snapshot", "delete", "disk"]), "disk\n");
}
