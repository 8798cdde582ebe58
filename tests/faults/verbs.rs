//! Every verb of the command line on the real daemon: exit codes, and what each form of output holds.
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use serde_json::Value;

use crate::images;
use crate::stage::{Said, Stage, wait_for};
use crate::world;

/// Remembers which verbs were used, so that a new one cannot be forgotten here.
struct Cli<'s> {
    stage: &'s Stage,
    used: RefCell<BTreeSet<String>>,
}

impl Cli<'_> {
    fn note(&self, arguments: &[&str]) {
        let mut words = arguments.iter().filter(|word| !word.starts_with('-'));
        let pair = (words.next().unwrap(), words.next().map_or("", |word| *word));
        self.used.borrow_mut().insert(format!("{} {}", pair.0, pair.1));
    }

    fn ok(&self, arguments: &[&str]) -> String {
        self.note(arguments);
        self.stage.ok(arguments)
    }

    fn json(&self, arguments: &[&str]) -> Value {
        self.note(arguments);
        self.stage.json(arguments)
    }

    fn fails(&self, arguments: &[&str], exit: i32) -> Said {
        let said = self.stage.toft(arguments);
        assert_eq!(said.code, exit, "toft {arguments:?}: {said:?}");
        assert!(said.err.starts_with("toft: ") || exit == 2, "{said:?}");
        said
    }

    /// A list or a single thing in its three forms: JSON with this name, a line for the name, a table with a head.
    fn three_forms(&self, arguments: &[&str], name: &str, head: &str) {
        let json = self.json(arguments);
        let items = json.as_array().cloned().unwrap_or_else(|| vec![json.clone()]);
        let named = |item: &Value| item["name"].as_str().or(item["id"].as_str()) == Some(name);
        assert!(items.iter().any(named), "{json}");
        let names = self.ok(&[&["-o", "name"], arguments].concat());
        assert!(names.lines().any(|line| line == name), "{names}");
        assert_eq!(names.lines().count(), items.len(), "{names}");
        let table = self.ok(&[&["-o", "table"], arguments].concat());
        assert!(table.contains(head) && table.contains(name), "{table}");
    }

    /// Nouns and verbs as the help tells them, without those that were used.
    fn unused(&self) -> Vec<String> {
        let words = |help: &str| -> Vec<String> {
            let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
            let lines = commands.take_while(|line| !line.is_empty());
            let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
            names.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
        };
        let mut all = Vec::new();
        for noun in words(&self.stage.ok(&["--help"])).into_iter().filter(|noun| noun != "help") {
            let verbs = words(&self.stage.ok(&[&noun, "--help"]));
            all.extend(verbs.iter().filter(|verb| *verb != "help").map(|verb| format!("{noun} {verb}")));
            if verbs.is_empty() {
                all.push(noun);
            }
        }
        assert!(all.len() > 30, "the help cannot be read: {all:?}");
        let used = self.used.borrow();
        let is_used = |command: &String| used.iter().any(|line| line.starts_with(command.as_str()));
        all.into_iter().filter(|command| !is_used(command)).collect()
    }
}

#[test]
fn every_verb_does_its_work_on_the_real_daemon() {
    world::inside("verbs::every_verb_does_its_work_on_the_real_daemon", async {
        let mut stage = Stage::new();
        catalogue(&stage);
        let recipes = stage.path("guest-images");
        stage.flags(&["--guest-images", recipes.to_str().unwrap(), "--listen", "127.0.0.1:7700"]);
        stage.flags(&["--migration-listen", "127.0.0.1:7701"]);
        images::write(&stage.path("import/reader"), "serial=600000 beat=100");
        stage.start();
        let cli = Cli { stage: &stage, used: RefCell::default() };
        the_host(&cli);
        bring_images(&cli);
        networks(&cli);
        servers(&cli);
        many_servers(&cli);
        moves(&cli);
        consoles(&cli);
        snapshots(&cli);
        volumes(&cli);
        operations_and_events(&cli);
        tokens(&stage);
        without_a_daemon(&cli);
        let unused = cli.unused();
        assert!(unused.is_empty(), "not tried: {unused:?}");
        stage.stop();
    });
}

/// A catalogue of one recipe, built by copying.
fn catalogue(stage: &Stage) {
    let recipes = stage.path("guest-images");
    std::fs::create_dir_all(&recipes).unwrap();
    let entry = "[probe]\ntitle = \"The probe guest\"\ndescription = \"Bare\"\n";
    std::fs::write(recipes.join("catalogue.toml"), entry).unwrap();
    let from = stage.path("import/counter");
    let script = format!("#!/bin/sh\necho 'progress: copy 50' >&2\nexec cp -r '{}' \"$3\"\n", from.display());
    let build = recipes.join("build");
    std::fs::write(&build, script).unwrap();
    std::fs::set_permissions(build, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

fn the_host(cli: &Cli<'_>) {
    let about = cli.json(&["host", "about"]);
    assert_eq!(about["api"], "v1");
    assert!(cli.ok(&["host", "about"]).contains("API v1"));
    let report = cli.json(&["host", "check"]);
    assert_eq!(report["kvm"]["works"], true, "{report}");
    assert!(report["checks"].as_array().unwrap().len() > 5);
    assert!(cli.ok(&["host", "check"]).contains("kvm"));
    assert!(cli.ok(&["host", "show"]).contains("memory"));
    assert_eq!(cli.json(&["api", "GET", "/v1"]), about);
    assert!(cli.ok(&["completion", "bash"]).contains("complete -F _toft"));
    assert!(cli.ok(&["completion", "zsh"]).contains("#compdef toft"));
    let cpu = cli.json(&["host", "cpu"]);
    assert!(cpu["features"].as_array().unwrap().contains(&"lm".into()), "{cpu}");
    assert!(cli.ok(&["host", "cpu"]).contains("protections  "));
    let mut other = cpu.clone();
    let features = other["features"].as_array_mut().unwrap();
    let at = features.iter().position(|name| name.as_str().unwrap().starts_with("kvm_")).unwrap();
    let hidden = features.remove(at);
    (other["name"], other["protections"]) = ("other".into(), serde_json::json!([]));
    let (here, there) = (cli.stage.path("here.json"), cli.stage.path("there.json"));
    std::fs::write(&here, cpu.to_string()).unwrap();
    std::fs::write(&there, other.to_string()).unwrap();
    let files = [here.to_str().unwrap(), there.to_str().unwrap()];
    let made = cli.json(&["host", "cpu-baseline", files[0], files[1]]);
    assert_eq!(made["hidden"][0]["features"], serde_json::json!([hidden]), "{made}");
    let text = cli.ok(&["-o", "table", "host", "cpu-baseline", files[0], files[1]]);
    assert!(text.contains("hidden       of other: nothing"), "{text}");
    assert!(!cli.ok(&["-o", "name", "host", "cpu-baseline", files[0]]).is_empty());
    cli.fails(&["host", "cpu-baseline", "/nonexistent"], 2);
    std::fs::write(cli.stage.path("common.json"), made.to_string()).unwrap();
    let shown = cli.stage.toft(&["--show-http", "host", "about"]);
    assert!(shown.err.contains("curl") && shown.err.contains("200"), "{shown:?}");
}

fn bring_images(cli: &Cli<'_>) {
    cli.three_forms(&["image", "catalogue"], "probe", "TITLE");
    let image = cli.json(&["--wait", "image", "import", "counter", "--from", "counter", "--label", "a=b"]);
    assert_eq!((image["state"].as_str(), image["labels"]["a"].as_str()), (Some("ready"), Some("b")));
    let accepted = cli.json(&["image", "import", "recipe", "--catalogue", "probe"]);
    let operation = accepted["operation"]["id"].as_str().unwrap();
    assert_eq!(cli.json(&["operation", "wait", operation])["state"], "succeeded");
    let (reader, bundle) = (cli.stage.path("import/reader"), cli.stage.path("reader.tar"));
    images::bundle(&reader, &bundle);
    let sum = images::sum(&bundle);
    let bundle = bundle.to_str().unwrap();
    assert_eq!(
        cli.ok(&["--output=name", "--wait", "image", "upload", "reader", bundle, "--sha256", &sum]),
        "reader\n"
    );
    cli.three_forms(&["image", "list"], "counter", "NAME");
    cli.three_forms(&["image", "show", "reader"], "reader", "NAME");
    assert_eq!(cli.json(&["image", "list", "-l", "a=b"]).as_array().unwrap().len(), 1);
    let plan = cli.json(&["image", "import", "planned", "--from", "counter", "--dry-run"]);
    assert_eq!(plan["image"]["name"], "planned");
    cli.fails(&["image", "import", "counter", "--from", "counter", "--dry-run"], 4);
    cli.fails(&["image", "show", "planned"], 3);
    let update = ["image", "update", "recipe", "--name", "dish", "--description", "d", "--label", "c=d"];
    let image = cli.json(&update);
    assert_eq!((image["description"].as_str(), image["labels"]["c"].as_str()), (Some("d"), Some("d")));
    cli.ok(&["image", "update", "dish", "--name", "recipe"]);
    cli.ok(&["--wait", "image", "delete", "recipe"]);
    cli.fails(&["image", "show", "recipe"], 3);
    let seen = on_a_terminal(cli, "--wait image import recipe --catalogue probe");
    assert!(seen.contains("image.import") && seen.contains("% ") && seen.contains("ready"), "{seen:?}");
    cli.ok(&["--wait", "image", "delete", "recipe"]);
    cli.fails(&["image", "import", "x", "--from", "nothing"], 2);
    cli.fails(&["image", "import", "counter", "--from", "counter"], 4);
    cli.fails(&["image", "upload", "x", "/nonexistent"], 2);
}

/// A host may ask itself, and is in its own way.
fn moves(cli: &Cli<'_>) {
    let made = cli.json(&["host", "ticket", "--lifetime-s", "60"]);
    assert_eq!(made["target"], "127.0.0.1:7701");
    let ticket = cli.ok(&["-o", "name", "host", "ticket"]);
    assert!(cli.ok(&["-o", "table", "host", "ticket"]).contains("target   127.0.0.1:7701"));
    let target = ["--target", "127.0.0.1:7701", "--ticket", ticket.trim()];
    let dry = [&["server", "migrate", "www", "--dry-run"], &target[..]].concat();
    cli.note(&dry);
    // A script that goes on only where nothing is in the way goes no further.
    let planned = |form| cli.fails(&[&["-o", form], &dry[..]].concat(), 4).out;
    let plan: Value = serde_json::from_str(&planned("json")).unwrap();
    let codes: Vec<&str> =
        plan["blocked_by"].as_array().unwrap().iter().filter_map(|one| one["code"].as_str()).collect();
    assert!(codes.contains(&"name") && codes.contains(&"network"), "{plan}");
    assert!(planned("table").contains("blocked  name: the target has"));
    assert!(!planned("name").is_empty());
    let said = cli.fails(&[&["server", "migrate", "www"], &target[..]].concat(), 4);
    assert!(said.err.contains("the target has a server"), "{said:?}");
    cli.fails(&["server", "migrate", "www", "--target", "127.0.0.1:7701", "--ticket", "x"], 2);
    let settle = ["server", "settle-migration", "www", "--owner", "here", "--proof", "I have looked at both"];
    let limit = ["server", "limit-migration", "www", "--bandwidth", "100M", "--downtime-ms", "100"];
    for (verb, refusal) in [(&settle[..], "not in doubt"), (&limit, "not on its way from this host")] {
        cli.note(verb);
        assert!(cli.fails(verb, 4).err.contains(refusal));
    }
    cli.fails(&["server", "settle-migration", "www", "--owner", "nobody", "--proof", "x"], 2);
    cli.fails(&["server", "migrate", "www", "--target", "127.0.0.1:1", "--ticket", ticket.trim()], 5);
}

/// What a person sees of a command.
fn on_a_terminal(cli: &Cli<'_>, arguments: &str) -> String {
    let toft = cli.stage.command(&[]);
    let line = format!("{} {arguments}", toft.get_program().to_str().unwrap());
    let mut script = std::process::Command::new("script");
    script.args(["-qefc", &line, "/dev/null"]).stdin(Stdio::null()).env("TERM", "xterm");
    script.envs(toft.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = script.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn networks(cli: &Cli<'_>) {
    let plan = cli.json(&["network", "create", "inner", "--cidr", "10.99.0.0/24", "--dry-run"]);
    assert_eq!(plan["network"]["ipv4_cidr"], "10.99.0.0/24");
    assert!(cli.ok(&["-o", "table", "network", "create", "inner", "--dry-run"]).contains("would:\n"));
    cli.fails(&["network", "show", "inner"], 3);
    let network =
        cli.json(&["--wait", "network", "create", "inner", "--cidr", "10.99.0.0/24", "--kind", "isolated"]);
    assert_eq!((network["state"].as_str(), network["kind"].as_str()), (Some("ready"), Some("isolated")));
    cli.three_forms(&["network", "list"], "inner", "CIDR");
    cli.three_forms(&["network", "show", "inner"], "inner", "CIDR");
    cli.ok(&["network", "update", "inner", "--name", "inside", "--label", "tier=back"]);
    assert_eq!(cli.json(&["network", "show", "inside"])["labels"]["tier"], "back");
    cli.fails(&["network", "create", "inside"], 4);
    cli.fails(&["network", "create", "bad", "--cidr", "10.99.0.0/40"], 2);
}

fn servers(cli: &Cli<'_>) {
    let plan = cli.json(&["server", "create", "web", "--image", "counter", "--dry-run"]);
    assert_eq!(plan["server"]["name"], "web");
    assert_eq!(cli.json(&["server", "list"]).as_array().unwrap().len(), 0, "a plan made something");
    let create = ["--wait", "server", "create", "web", "--image", "counter", "--memory", "64M"];
    let more = ["--network", "inside=10.99.0.7", "--label", "tier=front", "--external-ref", "order-1"];
    let limits =
        ["--disk-bandwidth", "100M:1G", "--disk-operations", "5000", "--nic-tx-packets", "90000:180000"];
    let server = cli.json(&[&create[..], &more, &limits].concat());
    let limits = (&server["volumes"][0]["limits"], &server["nics"][0]["limits"]);
    assert_eq!(limits.0["bandwidth_bytes"], serde_json::json!({ "per_second": 100 << 20, "burst": 1 << 30 }));
    assert_eq!(limits.0["operations"]["per_second"], 5000);
    assert_eq!(limits.1["tx_packets"], serde_json::json!({ "per_second": 90000, "burst": 180_000 }));
    assert_eq!((server["state"].as_str(), server["wanted"].as_str()), (Some("running"), Some("running")));
    assert_eq!(server["nics"][0]["ipv4"], "10.99.0.7");
    let changed =
        cli.json(&["server", "update", "web", "--disk-operations", "none", "--nic-rx-bandwidth", "1M:2M"]);
    let limits = (&changed["volumes"][0]["limits"], &changed["nics"][0]["limits"]);
    assert_eq!(
        (limits.0["bandwidth_bytes"]["burst"].as_u64(), limits.0.get("operations")),
        (Some(1 << 30), None)
    );
    assert_eq!(limits.1["rx_bytes"], serde_json::json!({ "per_second": 1 << 20, "burst": 2 << 20 }));
    assert_eq!(limits.1["tx_packets"]["per_second"], 90000);
    let id = server["id"].as_str().unwrap();
    cli.three_forms(&["server", "list"], "web", "STATE");
    cli.three_forms(&["server", "show", id], "web", "STATE");
    cli.stage.console("web", "probe: beat 2");
    let tail = cli.ok(&["server", "console-log", "web", "--tail", "16"]);
    assert!(tail.len() <= 16 && !tail.is_empty(), "{tail:?}");
    assert!(cli.json(&["server", "metrics", "web"])["vcpu_exits"][0].as_u64() > Some(0));
    assert!(cli.ok(&["server", "metrics", "web"]).contains("vcpu 0"));
    assert!(cli.ok(&["server", "isolation", "web"]).contains("no_new_privs     stands"));
    assert_eq!(cli.json(&["--wait", "server", "start", "web"])["state"], "running");
    cli.fails(&["network", "delete", "inside"], 4);
    cli.fails(&["image", "delete", "counter"], 4);
    assert_eq!(cli.json(&["--wait", "server", "pause", "web"])["state"], "paused");
    assert_eq!(cli.json(&["--wait", "server", "resume", "web"])["state"], "running");
    let upgraded = cli.json(&["--wait", "server", "upgrade-vmm", "web"]);
    assert_eq!((&upgraded["state"], &upgraded["vmm_build"]), (&"running".into(), &server["vmm_build"]));
    let planned = cli.json(&["host", "upgrade", "--dry-run"]);
    assert_eq!(planned[0]["outcome"], "current", "{planned}");
    assert!(cli.ok(&["host", "upgrade"]).contains("current"));
    cli.fails(&["host", "upgrade", "--canary", "web"], 2);
    assert_eq!(cli.json(&["--wait", "server", "hibernate", "web"])["state"], "hibernated");
    let beats = |log: &str| log.matches("probe: beat ").count();
    let before = beats(&cli.stage.console("web", "hello"));
    assert_eq!(cli.json(&["--wait", "server", "start", "web"])["state"], "running");
    // The guest goes on counting, and has not started afresh.
    wait_for("the guest after it was hibernated", || {
        let log = cli.stage.console("web", "hello");
        (beats(&log) > before && log.matches("probe: hello").count() == 1).then_some(())
    });
    assert_eq!(cli.json(&["--wait", "server", "reboot", "web", "--grace-s", "0"])["state"], "running");
    wait_for("the guest after a reset", || {
        (cli.stage.console("web", "hello").matches("probe: hello").count() == 2).then_some(())
    });
    // Only a guest that beats again hears the button.
    wait_for("a beat after the reset", || {
        let log = cli.stage.console("web", "hello");
        log.rsplit("probe: hello").next().is_some_and(|boot| boot.contains("probe: beat 1")).then_some(())
    });
    assert_eq!(cli.json(&["--wait", "server", "reboot", "web"])["state"], "running");
    let log = cli.stage.console("web", "hello");
    assert!(log.contains("probe: beat ok"), "the button was not pressed: {log}");
    let updated =
        cli.json(&["server", "update", "web", "--name", "www", "--label", "tier-", "--description", "x"]);
    assert_eq!((updated["name"].as_str(), updated["labels"]["tier"].as_str()), (Some("www"), None));
    let stale = updated["generation"].as_u64().unwrap() - 1;
    cli.fails(&["server", "update", "www", "--vcpus", "2", "--if-generation", &stale.to_string()], 4);
    wait_for("a guest that can see its button", || {
        (cli.stage.console("www", "hello").matches("probe: hello").count() >= 3).then_some(())
    });
    let stopped = cli.json(&["--wait", "server", "stop", "www"]);
    assert_eq!(stopped["state"], "stopped");
    cli.fails(&["server", "pause", "www"], 4);
    cli.ok(&["server", "update", "www", "--vcpus", "2"]);
    assert_eq!(cli.json(&["--wait", "server", "start", "www"])["vcpus"], 2);
    assert_eq!(cli.json(&["--wait", "server", "stop", "www", "--grace-s", "0"])["state"], "stopped");
    cli.fails(&["server", "create", "www", "--image", "counter"], 4);
    cli.fails(&["server", "create", "b", "--image", "nothing"], 2);
    cli.fails(&["server", "create", "b", "--image", "counter", "--memory", "1M"], 2);
    cli.fails(&["server", "create", "b", "--image", "counter", "--memory", "900G"], 6);
    cli.fails(&["server", "create", "B_", "--image", "counter"], 2);
    cli.fails(&["server", "frobnicate"], 2);
    cli.fails(&["server", "show", "nothing"], 3);
    let late = ["--wait", "--wait-timeout-s", "0", "server", "start", "www"];
    cli.fails(&late, 7);
    wait_for("the server all the same", || {
        (cli.json(&["server", "show", "www"])["state"] == "running").then_some(())
    });
}

/// One action on every server with some labels. `www` runs before and after.
fn many_servers(cli: &Cli<'_>) {
    let update = ["server", "update", "www", "--label", "env=test", "--external-ref", "order-2"];
    assert_eq!(cli.json(&update)["external_ref"], "order-2");
    assert_eq!(cli.json(&["server", "list", "--external-ref", "order-2"]).as_array().unwrap().len(), 1);
    assert_eq!(cli.json(&["server", "list", "--external-ref", "order-1"]).as_array().unwrap().len(), 0);
    cli.json(&["--wait", "server", "create", "other", "--image", "counter", "--memory", "64M", "--no-start"]);
    let stopped = cli.json(&["--wait", "server", "stop", "-l", "env=test", "--grace-s", "0"]);
    assert_eq!(stopped.as_array().unwrap().len(), 1, "{stopped}");
    assert_eq!(
        (&stopped[0]["name"], &stopped[0]["operation"]["state"]),
        (&"www".into(), &"succeeded".into())
    );
    let refused = cli.fails(&["server", "pause", "--selector", "env=test"], 4);
    assert!(refused.out.contains("refused") && refused.err.contains("start"), "{refused:?}");
    assert!(cli.ok(&["-o", "table", "--wait", "server", "start", "-l", "env"]).contains("succeeded"));
    assert_eq!(cli.json(&["server", "show", "www"])["state"], "running");
    assert_eq!(cli.json(&["server", "show", "other"])["state"], "stopped");
    let none = cli.fails(&["-o", "json", "server", "stop", "-l", "env=none"], 3);
    assert!(none.out == "[]\n" && none.err.contains("no server has the labels \"env=none\""), "{none:?}");
    for wrong in [&["www", "-l", "env=test"][..], &["-l", ""], &["-l", "a b"], &[]] {
        cli.fails(&[&["server", "stop"], wrong].concat(), 2);
    }
    assert_eq!(cli.json(&["server", "update", "www", "--external-ref", ""])["external_ref"], Value::Null);
    cli.ok(&["--wait", "server", "delete", "other"]);
}

fn consoles(cli: &Cli<'_>) {
    let create =
        ["--wait", "server", "create", "reader", "--image", "reader", "--memory", "64M", "--no-network"];
    let baseline = |name: &str| {
        let file = cli.stage.path(name);
        [&create[..], &["--cpu-baseline-file", file.to_str().unwrap()]].concat().join("\n")
    };
    let said = cli.fails(&baseline("here.json").split('\n').collect::<Vec<_>>(), 2);
    assert!(said.err.contains("is not what `toft host cpu-baseline` prints"), "{said:?}");
    std::fs::write(cli.stage.path("more.json"), r#"{"cpu": {"features": ["lm", "warp_drive"]}}"#).unwrap();
    let said = cli.fails(&baseline("more.json").split('\n').collect::<Vec<_>>(), 2);
    assert!(said.err.contains("cannot show warp_drive"), "{said:?}");
    let reader = cli.json(&baseline("common.json").split('\n').collect::<Vec<_>>());
    let common = std::fs::read_to_string(cli.stage.path("common.json")).unwrap();
    assert_eq!(reader["cpu"], serde_json::from_str::<serde_json::Value>(&common).unwrap()["cpu"]);
    cli.stage.console("reader", "serial waiting");
    for (line, arguments) in
        [("typed", &["console", "reader"][..]), ("again", &["server", "console", "reader", "--no-replay"])]
    {
        cli.note(arguments);
        let mut command = cli.stage.command(arguments);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Ctrl-] at the end leaves.
        child.stdin.take().unwrap().write_all(format!("{line}\r\n\x1d").as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    cli.stage.console("reader", "serial got typed");
    // A reader stays when the machine has ended, because another may follow.
    let mut command = cli.stage.command(&["console", "--read-only", "reader"]);
    let mut follow = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("serial got typed")));
    // The daemon may not have seen yet that the one before has left.
    let readers = wait_for("one reader", || {
        let readers = cli.json(&["server", "console-readers", "reader"]);
        (readers[0]["read_only"] == true && readers[1].is_null()).then_some(readers)
    });
    let reader = readers[0]["id"].as_str().unwrap();
    cli.three_forms(&["server", "console-readers", "reader"], reader, "OPENED BY");
    cli.fails(&["server", "console-kick", "reader", "--reader", &server_id(cli, "reader")], 3);
    assert!(cli.ok(&["server", "console-kick", "reader"]).contains(reader));
    assert_eq!(follow.wait().unwrap().code(), Some(1), "a reader who was put out is told");
    assert_eq!(cli.json(&["server", "console-readers", "reader"]).as_array().unwrap().len(), 0);
    cli.ok(&["--wait", "server", "stop", "reader", "--grace-s", "0"]);
}

fn server_id(cli: &Cli<'_>, name: &str) -> String {
    cli.json(&["server", "show", name])["id"].as_str().unwrap().to_owned()
}

fn snapshots(cli: &Cli<'_>) {
    let taken =
        cli.json(&["--wait", "snapshot", "create", "www", "--name", "both", "--memory", "--label", "a=b"]);
    assert_eq!((taken["state"].as_str(), taken["memory"].as_bool()), (Some("ready"), Some(true)), "{taken}");
    assert_eq!(cli.json(&["server", "show", "www"])["state"], "running");
    cli.three_forms(&["snapshot", "list"], "both", "STORED");
    cli.three_forms(&["snapshot", "show", "both"], "both", "STORED");
    let at = "2999-01-31T12:00:00Z";
    let updated =
        cli.json(&["snapshot", "update", "both", "--name", "kept", "--label", "a-", "--expires-at", at]);
    assert_eq!((updated["name"].as_str(), updated["labels"]["a"].as_str()), (Some("kept"), None));
    assert_eq!(updated["expires_at"], "2999-01-31T12:00:00.000Z");
    assert_eq!(cli.json(&["snapshot", "update", "kept", "--never-expires"])["expires_at"], Value::Null);
    cli.fails(&["snapshot", "update", "kept", "--expires-at", "soon"], 2);
    cli.fails(&["snapshot", "update", "kept", "--expires-at", "2001-01-31T12:00:00Z"], 2);
    cli.fails(&["snapshot", "create", "www", "--name", "kept"], 4);
    cli.fails(&["snapshot", "create", "reader", "--memory"], 4);
    cli.fails(&["snapshot", "create", "nothing"], 3);
    let cloned = cli.json(&["--wait", "snapshot", "clone", "kept", "--name", "twin", "--count", "2"]);
    assert_eq!(cloned[1]["operation"]["state"], "succeeded", "{cloned}");
    for name in ["twin-1", "twin-2"] {
        assert_eq!(cli.json(&["server", "show", name])["identity"], "unchanged");
        cli.ok(&["--wait", "server", "delete", name]);
    }
    cli.fails(&["snapshot", "clone", "kept", "--name", "twin", "--count", "101"], 2);
    let cloned = cli.json(&["--wait", "server", "clone", "www", "--name", "fork"]);
    assert_eq!(cloned[0]["operation"]["state"], "succeeded", "{cloned}");
    let settled = cli.json(&["--wait", "server", "settle-memory", "fork"]);
    assert_eq!((&settled["state"], &settled["shares_memory_of"]), (&"running".into(), &Value::Null));
    assert_eq!(cli.json(&["server", "metrics", "fork"])["memory_shared_bytes"], 0);
    assert_eq!(cli.json(&["server", "show", "www"])["state"], "running");
    cli.ok(&["--wait", "server", "delete", "fork"]);
    cli.fails(&["server", "clone", "reader", "--name", "fork"], 4);
    // What it has in memory since is not lost by mistake.
    cli.fails(&["server", "restore", "www", "kept"], 4);
    cli.fails(&["server", "restore", "reader", "kept"], 2);
    cli.fails(&["server", "restore", "www", "nothing", "--stop"], 2);
    assert_eq!(cli.json(&["--wait", "server", "restore", "www", "kept", "--stop"])["state"], "running");
    let create =
        ["--wait", "server", "create", "again", "--snapshot", "kept", "--memory", "64M", "--no-network"];
    assert_eq!(cli.json(&create)["state"], "running");
    cli.fails(&["server", "create", "more", "--snapshot", "kept", "--image", "counter"], 2);
    cli.fails(&["server", "create", "more"], 2);
    cli.ok(&["--wait", "server", "delete", "again"]);
    let place = cli.stage.path("kept.toftsnap");
    let file = place.to_str().unwrap();
    cli.ok(&["snapshot", "export", "kept", file]);
    cli.fails(&["snapshot", "export", "kept", file], 2);
    cli.fails(&["snapshot", "export", "nothing", "-"], 3);
    let twin = cli.json(&["--wait", "snapshot", "import", file, "--name", "twin"]);
    assert_eq!((twin["state"].as_str(), &twin["taken_at"]), (Some("ready"), &taken["taken_at"]), "{twin}");
    // Memory that came in was compared as it came, and is shared as any other.
    cli.ok(&["--wait", "snapshot", "clone", "twin", "--name", "afar"]);
    assert_eq!(cli.json(&["server", "show", "afar"])["state"], "running");
    cli.ok(&["--wait", "server", "delete", "afar"]);
    cli.fails(&["snapshot", "import", file], 4);
    std::fs::write(file, &std::fs::read(file).unwrap()[..10]).unwrap();
    cli.fails(&["snapshot", "import", file, "--name", "cut"], 2);
    cli.fails(&["snapshot", "import", "/nowhere", "--name", "cut"], 2);
    std::fs::remove_file(file).unwrap();
    cli.ok(&["--wait", "snapshot", "delete", "twin"]);
    let create = ["--wait", "snapshot", "create", "www", "--name", "later", "--memory", "--incremental"];
    let later = cli.json(&create);
    assert_eq!(later["parent_id"], cli.json(&["snapshot", "show", "kept"])["id"], "{later}");
    assert!(later["inherited_bytes"].as_u64() > Some(0), "{later}");
    cli.three_forms(&["snapshot", "list"], "later", "INHERITED");
    cli.three_forms(&["snapshot", "show", "later"], "later", "PARENT");
    cli.ok(&["--wait", "snapshot", "delete", "kept"]);
    cli.fails(&["snapshot", "show", "kept"], 3);
    // It is whole still: for those that go on from it, and for those far away.
    cli.ok(&["--wait", "snapshot", "clone", "later", "--name", "chained"]);
    assert_eq!(cli.json(&["server", "show", "chained"])["state"], "running");
    cli.ok(&["--wait", "server", "delete", "chained"]);
    cli.ok(&["snapshot", "export", "later", file]);
    let far = cli.json(&["--wait", "snapshot", "import", file, "--name", "far"]);
    assert_eq!((&far["parent_id"], far["inherited_bytes"].as_u64()), (&Value::Null, Some(0)), "{far}");
    std::fs::remove_file(file).unwrap();
    for name in ["later", "far"] {
        cli.ok(&["--wait", "snapshot", "delete", name]);
    }
}

fn volumes(cli: &Cli<'_>) {
    let server = cli.json(&["server", "show", "reader"]);
    let volume = cli.json(&["volume", "show", server["volumes"][0]["volume_id"].as_str().unwrap()]);
    let volume = volume["name"].as_str().unwrap().to_owned();
    cli.three_forms(&["volume", "list"], &volume, "SIZE");
    cli.three_forms(&["volume", "show", &volume], &volume, "SIZE");
    assert_eq!(cli.json(&["volume", "resize", &volume, "4M"])["size_bytes"], 4 << 20);
    cli.fails(&["volume", "resize", &volume, "1M"], 2);
    let changed = cli.json(&["volume", "update", &volume, "--name", "kept", "--label", "of=reader"]);
    assert_eq!((changed["name"].as_str(), changed["labels"]["of"].as_str()), (Some("kept"), Some("reader")));
    let volume = "kept";
    cli.fails(&["volume", "delete", volume], 4);
    cli.ok(&["--wait", "server", "delete", "reader", "--keep-volumes"]);
    cli.fails(&["server", "show", "reader"], 3);
    cli.ok(&["--wait", "volume", "delete", volume]);
    cli.fails(&["volume", "show", volume], 3);
    cli.ok(&["--wait", "server", "delete", "www"]);
    assert_eq!(cli.json(&["volume", "list"]).as_array().unwrap().len(), 0);
    cli.ok(&["--wait", "network", "delete", "inside"]);
}

fn operations_and_events(cli: &Cli<'_>) {
    let operations = cli.json(&["operation", "list", "--sort", "-created_at"]);
    let last = operations[0]["id"].as_str().unwrap();
    cli.three_forms(&["operation", "list"], last, "KIND");
    cli.three_forms(&["operation", "show", last], last, "KIND");
    let resource = operations[0]["resources"][0]["id"].as_str().unwrap();
    let found = cli.json(&["operation", "list", "--resource", resource]);
    assert!(found.as_array().unwrap().iter().any(|operation| operation["id"] == last), "{found}");
    cli.fails(&["operation", "list", "-l", "a=b"], 2);
    cli.note(&["operation", "cancel"]);
    cli.fails(&["operation", "cancel", last], 4);
    cli.fails(&["operation", "show", "00000000-0000-0000-0000-000000000000"], 3);
    let failed = operations.as_array().unwrap().iter().find(|one| one["state"] == "failed");
    assert!(failed.is_none(), "an operation failed: {failed:?}");
    let events = cli.ok(&["--output=json", "event", "list"]);
    let events: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let deleted = |event: &Value| event["type"].as_str() == Some("server.deleted");
    assert!(events.iter().any(deleted), "{events:?}");
    let newest = cli.ok(&["--output=name", "event", "list"]).lines().last().unwrap().to_owned();
    assert_eq!(cli.ok(&["event", "list", "--after", &newest]), "");
    cli.note(&["event", "follow"]);
    let before = (newest.parse::<u64>().unwrap() - 1).to_string();
    let mut command = cli.stage.command(&["-o", "name", "event", "follow", "--after", &before]);
    let mut follow = command.stdout(Stdio::piped()).spawn().unwrap();
    let line = BufReader::new(follow.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    assert_eq!(line, newest);
    follow.kill().unwrap();
    follow.wait().unwrap();
}

fn tokens(stage: &Stage) {
    let toftd = |arguments: &[&str]| {
        let mut command = stage.daemon_command();
        // Flags of a daemon that serves do not go with a command that does not.
        let program = command.get_program().to_owned();
        command = std::process::Command::new(program);
        Said::of(command.arg("--state-dir").arg(stage.path("state")).args(arguments))
    };
    let over_tcp = |token: &str| {
        let endpoint = ["--endpoint", "http://127.0.0.1:7700", "--token", token, "host", "about"];
        stage.toft(&endpoint)
    };
    let made = toftd(&["token", "create", "panel"]);
    assert_eq!(made.code, 0, "{made:?}");
    let secret = made.out.trim().to_owned();
    assert_eq!(over_tcp(&secret).code, 0);
    let listed = toftd(&["token", "list"]);
    assert!(listed.out.contains("panel") && !listed.out.contains(&secret), "{listed:?}");
    assert!(listed.out.starts_with("ID  "), "{listed:?}");
    let id = listed.out.lines().nth(1).unwrap().split_whitespace().next().unwrap();
    assert_eq!(toftd(&["token", "revoke", id]).code, 0);
    let refused = over_tcp(&secret);
    assert!(refused.code == 1 && refused.err.contains("unauthenticated"), "{refused:?}");

    let lasting = |at: &str| toftd(&["token", "create", "for-a-while", "--expires-at", at]);
    let made = lasting("2999-12-31T00:00:00Z");
    assert_eq!((made.code, over_tcp(made.out.trim()).code), (0, 0), "{made:?}");
    let listed = toftd(&["token", "list"]).out;
    assert!(listed.trim_end().ends_with("for-a-while  2999-12-31T00:00:00.000Z"), "{listed}");
    let refused = lasting("2020-01-31T00:00:00Z");
    assert!(refused.code == 2 && refused.err.contains("still to come"), "{refused:?}");
    let refused = lasting("tomorrow");
    assert!(refused.code == 2 && refused.err.contains("2031-01-31T12:00:00Z"), "{refused:?}");
}

fn without_a_daemon(cli: &Cli<'_>) {
    let said = cli.fails(&["--endpoint", "unix:/nonexistent", "server", "list"], 5);
    assert!(said.err.contains("is toftd running?"), "{said:?}");
    cli.note(&["run"]);
    let machine = cli.stage.path("machine.json");
    let kernel = cli.stage.path("import/counter/kernel");
    let document = serde_json::json!({
        "memory_bytes": 64 << 20, "kernel": kernel, "cmdline": "mem",
    });
    std::fs::write(&machine, document.to_string()).unwrap();
    let said = cli.stage.toft(&["run", machine.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.out.contains("probe: done failed=0"), "{said:?}");
}
