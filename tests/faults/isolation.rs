//! What keeps a server apart, as the daemon reports it of the running process, and the memory that is its own.
use std::path::{Path, PathBuf};

use nix::libc;
use serde_json::Value;

use crate::images;
use crate::stage::{Stage, wait_for};
use crate::world;

/// The walls that a server is without here, with the reasons that the report gives.
fn lacks(stage: &Stage, server: &str) -> Vec<(String, String)> {
    let report = stage.json(&["server", "isolation", server]);
    let items = report["items"].as_array().unwrap();
    assert_eq!(items.len(), 17, "{report}");
    let lacks: Vec<(String, String)> = items
        .iter()
        .filter(|item| item["stands"] == false)
        .map(|item| (item["name"].as_str().unwrap().to_owned(), item["detail"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(report["complete"], lacks.is_empty());
    lacks
}

/// What this kernel cannot do, which no test can mend.
fn kernel_lacks(wall: &str) -> bool {
    const VERSION: libc::c_int = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the kernel reads nothing and answers the version of its interface.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, VERSION) };
    wall == "landlock" && version <= 0
}

#[test]
fn every_wall_that_the_kernel_can_build_is_found_on_the_running_process() {
    world::inside("isolation::every_wall_that_the_kernel_can_build_is_found_on_the_running_process", async {
        let mut stage = Stage::new();
        stage.start();
        stage.import("counter");
        let empty = stage.look();
        stage.ok(&["--wait", "server", "create", "one", "--image", "counter", "--memory", "64M"]);
        stage.ok(&["--wait", "server", "create", "two", "--image", "counter", "--memory", "64M"]);
        for server in ["one", "two"] {
            stage.console(server, "beat 1");
            let lacks = lacks(&stage, server);
            for (wall, why) in &lacks {
                assert!(kernel_lacks(wall), "{wall}: {why}");
                println!("skipped: {wall} is not in this kernel, so it is not found on a VMM");
            }
        }
        let text = stage.ok(&["server", "isolation", "one"]);
        assert!(text.contains("seccomp") && text.contains("walls stand"), "{text}");
        for server in ["one", "two"] {
            stage.ok(&["--wait", "server", "delete", server]);
        }
        stage.same_as(&empty, "two servers");
        stage.stop();
    });
}

#[test]
fn walls_are_found_while_devices_are_at_work() {
    world::inside("isolation::walls_are_found_while_devices_are_at_work", async {
        let mut stage = Stage::new();
        // Threads and timers come with a device's driver and go with it.
        for (name, words) in [("disk", "blkbench=4,4096,600000"), ("net", "netsink=600000")] {
            images::write(&stage.path("import").join(name), words);
        }
        stage.start();
        for name in ["disk", "net"] {
            stage.import(name);
            let create = ["--wait", "server", "create", name, "--image", name, "--memory", "64M"];
            stage.ok(&[&create[..], &["--disk-bandwidth", "64M"]].concat());
        }
        wait_for("the disk at work", || {
            (stage.json(&["server", "metrics", "disk"])["disks"][0]["reads"].as_u64() > Some(0)).then_some(())
        });
        stage.console("net", "netsink ready");
        for name in ["disk", "net"] {
            for (wall, why) in lacks(&stage, name) {
                assert!(kernel_lacks(&wall), "{name}: {wall}: {why}");
                println!("skipped: {wall} is not in this kernel, so it is not found on a VMM");
            }
            stage.ok(&["--wait", "server", "delete", name]);
        }
        stage.stop();
    });
}

#[test]
fn a_strict_server_starts_with_every_wall_or_not_at_all() {
    world::inside("isolation::a_strict_server_starts_with_every_wall_or_not_at_all", async {
        let mut stage = Stage::new();
        stage.start();
        stage.import("counter");
        let (start, stop) =
            (["--wait", "server", "start", "s"], ["--wait", "server", "stop", "s", "--grace-s", "0"]);
        stage.ok(&["--wait", "server", "create", "s", "--image", "counter", "--memory", "64M"]);
        let lacking = lacks(&stage, "s");
        stage.ok(&stop);
        stage.ok(&["server", "update", "s", "--isolation", "strict"]);
        let off = stage.look();
        if lacking.is_empty() {
            stage.ok(&start);
            assert_eq!(lacks(&stage, "s"), []);
            stage.ok(&stop);
        } else {
            let words: Vec<&str> = lacking.iter().map(|(wall, _)| wall.as_str()).collect();
            stage.fails(
                &start,
                1,
                "host_unprepared",
                &[&words[..], &["strict isolation", "host check"]].concat(),
            );
            stage.same_as(&off, "a start that was refused");
        }
        // Without control groups no strict server starts on any kernel.
        stage.stop();
        for mount in groups_mounted() {
            let status = std::process::Command::new("umount").arg("-l").arg(&mount).status().unwrap();
            assert!(status.success(), "{}", mount.display());
        }
        stage.start();
        stage.fails(&start, 1, "host_unprepared", &["cgroup_memory", "cgroup_cpu", "cgroup_pids"]);
        stage.ok(&["server", "update", "s", "--isolation", "standard"]);
        stage.ok(&start);
        let walls: Vec<String> = lacks(&stage, "s").into_iter().map(|(wall, _)| wall).collect();
        assert!(
            walls.ends_with(&["cgroup_cpu".into(), "cgroup_memory".into(), "cgroup_pids".into()]),
            "{walls:?}"
        );
        stage.ok(&["--wait", "server", "delete", "s"]);
        stage.stop();
    });
}

/// Where hierarchies of control groups are mounted, the innermost first. The mounts of a test are its own.
fn groups_mounted() -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let is_group = |line: &&str| line.contains(" - cgroup ") || line.contains(" - cgroup2 ");
    let mut points: Vec<PathBuf> = mounts
        .lines()
        .filter(is_group)
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .collect();
    points.sort();
    points.reverse();
    points
}

/// The file that limits a server's memory.
fn memory_limit(id: &str) -> Option<PathBuf> {
    let parent = std::env::var("TOFT_CGROUP").unwrap();
    let files = [
        format!("/sys/fs/cgroup/memory/{parent}/{id}/memory.limit_in_bytes"),
        format!("/sys/fs/cgroup/{parent}/{id}/memory.max"),
    ];
    files.into_iter().map(PathBuf::from).find(|file| file.exists())
}

fn used_bytes(limit: &Path) -> u64 {
    let used = ["memory.usage_in_bytes", "memory.current"].map(|name| limit.with_file_name(name));
    let text = used.iter().find_map(|file| std::fs::read_to_string(file).ok()).unwrap();
    text.trim().parse().unwrap()
}

#[test]
fn guest_memory_is_its_servers_and_running_out_of_it_hits_no_other() {
    world::inside("isolation::guest_memory_is_its_servers_and_running_out_of_it_hits_no_other", async {
        let mut stage = Stage::new();
        images::write(&stage.path("import/eater"), "serial=600000 dirty=40,0,600000");
        stage.start();
        stage.import("counter");
        stage.import("eater");
        let create = |name, image| {
            let (memory, restart) = (["--memory", "64M"], ["--restart", "never"]);
            let head = ["--wait", "server", "create", name, "--image", image];
            let answer = stage.json(&[&head[..], &memory, &restart].concat());
            answer["id"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
        };
        let (_, eater) = (create("bystander", "counter"), create("eater", "eater"));
        stage.console("eater", "serial waiting");
        let Some(limit) = memory_limit(&eater) else {
            println!("skipped: memory of servers: this host has no control groups for it");
            return stage.stop();
        };
        let before = used_bytes(&limit);
        std::fs::write(&limit, (before + (16 << 20)).to_string()).unwrap();
        // What it is typed wakes the guest, which then takes 40 MiB.
        let mut console = stage.command(&["console", "eater"]);
        let mut console = console
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::io::Write::write_all(console.stdin.as_mut().unwrap(), b"go\n").unwrap();
        let failed = wait_for("the end of the eater", || {
            let server = stage.json(&["server", "show", "eater"]);
            (server["state"] == "failed").then_some(server)
        });
        let _ = console.kill();
        console.wait().unwrap();
        assert_eq!(failed["state_reason"]["code"], "out_of_memory", "{failed}");
        let bystander: Value = stage.json(&["server", "show", "bystander"]);
        assert_eq!(bystander["state"], "running");
        stage.console("bystander", "beat 5");
        for server in ["eater", "bystander"] {
            stage.ok(&["--wait", "server", "delete", server]);
        }
        stage.stop();
    });
}
