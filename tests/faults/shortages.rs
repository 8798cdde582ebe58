//! A host that lacks something a person can mend: each request that needs it is refused with words that say what to
//! do, nothing is left of it, and the same request works when it is there.
use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::images;
use crate::stage::{Said, Stage, mount_small};
use crate::world;

const CREATE: [&str; 4] = ["--wait", "server", "create", "--image"];

fn create<'a>(name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&CREATE[..], &["counter", name, "--memory", "64M"], more].concat()
}

/// Fills the file system of `directory` until so many bytes are left.
fn fill(directory: &Path, left_bytes: u64) {
    let filler = File::options().create(true).append(true).open(directory.join("filler")).unwrap();
    let free = || {
        let found = nix::sys::statvfs::statvfs(directory).unwrap();
        found.blocks_available() * found.fragment_size()
    };
    let (length, free) = (filler.metadata().unwrap().len(), free());
    let more = free.saturating_sub(left_bytes) as i64;
    nix::fcntl::fallocate(&filler, nix::fcntl::FallocateFlags::empty(), length as i64, more).unwrap();
}

/// Replaces a part of an image's directory and puts the right checksum into the manifest.
fn replace_kernel(directory: &Path, bytes: &[u8]) {
    std::fs::write(directory.join("kernel"), bytes).unwrap();
    let sum = images::sum(&directory.join("kernel"));
    images::edit(directory, |manifest| manifest["kernel"]["sha256"] = json!(sum));
}

#[test]
fn a_full_disk_refuses_what_needs_room_and_nothing_else() {
    world::inside("shortages::a_full_disk_refuses_what_needs_room_and_nothing_else", async {
        let mut stage = Stage::new();
        let state = stage.path("state");
        mount_small(&state, 96);
        // An image that fits into what is kept for the host, but not into less than that.
        let large = stage.path("import/large");
        images::write(&large, "spin");
        let noise: Vec<u8> =
            (0..12u64 << 20).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1).collect();
        std::fs::write(large.join("root.raw"), &noise).unwrap();
        let sum = images::sum(&large.join("root.raw"));
        images::edit(&large, |manifest| {
            manifest["disk"]["size_bytes"] = json!(noise.len());
            manifest["disk"]["sha256"] = json!(sum);
        });
        let bundle = stage.path("large.tar");
        images::bundle(&large, &bundle);
        let bundle = bundle.to_str().unwrap();
        stage.start();
        stage.import("counter");
        stage.ok(&create("runs", &[]));

        // Less is left than is kept for the host: nothing new is made, what runs goes on.
        fill(&state, 32 << 20);
        let before = stage.look();
        stage.fails(
            &create("late", &[]),
            6,
            "disk_full",
            &["are free", "delete volumes or images, or add space"],
        );
        stage.same_as(&before, "a server on a full disk");
        stage.fails(&["image", "upload", "large", bundle], 6, "disk_full", &["delete volumes or images"]);
        stage.same_as(&before, "an upload to a full disk");
        assert_eq!(stage.json(&["--wait", "server", "stop", "runs", "--grace-s", "0"])["state"], "stopped");
        assert_eq!(stage.json(&["--wait", "server", "start", "runs"])["state"], "running");

        // The disk fills up in the middle of an import.
        fill(&state, 6 << 20);
        let before = stage.look();
        let import = ["--wait", "image", "import", "large", "--from", "large"];
        stage.fails(&import, 6, "disk_full", &["delete volumes or images, or add space"]);
        stage.same_as(&before, "an import that filled the disk");

        // Nothing is left, but records have their room.
        fill(&state, 0);
        let words = ["delete volumes or images, or add space"];
        for refused in [&import[..], &create("late", &[])] {
            stage.fails(refused, 6, "disk_full", &words);
        }
        stage.ok(&["--wait", "network", "create", "x"]);

        // A daemon that begins on a full disk leaves what there is, and then not even the records can be written.
        images::cut(&state.join("filler"), 0);
        stage.stop();
        fill(&state, 1 << 20);
        stage.start();
        fill(&state, 0);
        let before = stage.look();
        for refused in [&import[..], &create("late", &[]), &["--wait", "network", "create", "y"]] {
            stage.fails(refused, 6, "disk_full", &words);
        }
        assert_eq!(stage.json(&["server", "show", "runs"])["state"], "running");
        images::cut(&state.join("filler"), 0);
        stage.same_as(&before, "requests on a full disk");
        stage.ok(&import);
        stage.ok(&create("late", &[]));
        stage.stop();
    });
}

#[test]
fn a_damaged_image_is_refused_by_the_part_that_is_wrong() {
    world::inside("shortages::a_damaged_image_is_refused_by_the_part_that_is_wrong", async {
        let mut stage = Stage::new();
        let spoil = |name: &str, change: &dyn Fn(&Path)| {
            let directory = stage.path("import").join(name);
            images::write(&directory, "spin");
            change(&directory);
            images::bundle(&directory, &stage.path("import").join(format!("{name}.tar")));
        };
        let cut_kernel = |directory: &Path| images::cut(&directory.join("kernel"), 1000);
        let flip = |directory: &Path| {
            std::fs::write(directory.join("root.raw"), vec![1; images::DISK_BYTES]).unwrap()
        };
        spoil("cut-kernel", &cut_kernel);
        spoil("flipped-disk", &flip);
        spoil("cut-disk", &|directory| images::cut(&directory.join("root.raw"), 512));
        spoil("wrong-sum", &|directory| {
            images::edit(directory, |manifest| manifest["kernel"]["sha256"] = json!("0".repeat(64)));
        });
        spoil("future", &|directory| {
            images::edit(directory, |manifest| manifest["format_version"] = json!(2))
        });
        spoil("no-json", &|directory| std::fs::write(directory.join("image.json"), "{").unwrap());
        spoil("cut", &|_| ());
        images::cut(&stage.path("import/cut.tar"), 600 << 10);
        std::fs::write(stage.path("import/noise.tar"), [7; 5000]).unwrap();
        std::fs::write(stage.path("import/empty.tar"), []).unwrap();
        let good = stage.path("import/good.tar");
        images::bundle(&stage.path("import/counter"), &good);
        spoil("no-kernel", &|directory| replace_kernel(directory, &[b'x'; 4096]));
        spoil("cut-elf", &|directory| {
            let elf = std::fs::read(directory.join("kernel")).unwrap();
            replace_kernel(directory, &elf[..4096]);
        });
        stage.start();
        let before = stage.look();
        let refused = [
            ("cut-kernel", "kernel"),
            ("flipped-disk", "root.raw"),
            ("cut-disk", "root.raw"),
            ("wrong-sum", "the manifest says 000"),
            ("future", "format_version"),
            ("no-json", "image.json"),
            ("cut", "ends in the middle"),
            ("noise", "tar"),
            ("empty", "empty"),
        ];
        for (name, word) in refused {
            let bundle = stage.path("import").join(format!("{name}.tar"));
            let entries = [name.to_owned(), format!("{name}.tar")];
            for entry in entries.iter().filter(|entry| stage.path("import").join(entry).exists()) {
                if entry == "cut" {
                    continue;
                }
                let import = ["--wait", "image", "import", "damaged", "--from", entry];
                stage.fails(&import, 2, "image_corrupt", &[word]);
            }
            let upload = ["image", "upload", "damaged", bundle.to_str().unwrap()];
            stage.fails(&upload, 2, "image_corrupt", &[word]);
            stage.same_as(&before, name);
        }
        let (wrong, good) = ("f".repeat(64), good.to_str().unwrap().to_owned());
        let upload = ["image", "upload", "damaged", &good, "--sha256", &wrong];
        stage.fails(&upload, 2, "image_corrupt", &["SHA-256"]);
        stage.same_as(&before, "a bundle that is not the one asked for");

        // Whole, but nothing that a machine could start: the server is undone, the image stays.
        for name in ["no-kernel", "cut-elf"] {
            stage.import(name);
            let before = stage.look();
            let create = ["--wait", "server", "create", "s", "--image", name, "--memory", "64M"];
            let said = stage.toft(&create);
            assert!(said.code != 0 && said.err.contains("kernel"), "{said:?}");
            assert!(
                said.err.contains("code machine_failed") || said.err.contains("code image_corrupt"),
                "{said:?}"
            );
            stage.same_as(&before, name);
        }
        stage.ok(&["image", "upload", "damaged", &good]);
        stage.stop();
    });
}

#[test]
fn an_empty_address_pool_refuses_the_next_server_until_one_goes() {
    world::inside("shortages::an_empty_address_pool_refuses_the_next_server_until_one_goes", async {
        let mut stage = Stage::new();
        stage.start();
        stage.import("counter");
        stage.ok(&["--wait", "network", "create", "small", "--cidr", "10.99.0.0/29"]);
        let total = stage.json(&["network", "show", "small"])["addresses_total"].as_u64().unwrap();
        assert!((1..8).contains(&total), "{total}");
        for number in 0..total {
            stage.ok(&create(&format!("s{number}"), &["--network", "small", "--no-start"]));
        }
        let before = stage.look();
        let late = create("late", &["--network", "small"]);
        stage.fails(&late, 6, "no_address", &["small", "10.99.0.0/29"]);
        stage.same_as(&before, "a server without an address");
        stage.ok(&["--wait", "server", "delete", "s0"]);
        stage.ok(&late);
        stage.stop();
    });
}

#[test]
fn a_host_without_kvm_keeps_servers_and_starts_them_when_it_has_it() {
    world::inside("shortages::a_host_without_kvm_keeps_servers_and_starts_them_when_it_has_it", async {
        let mut stage = Stage::new();
        let kvm = stage.path("kvm");
        stage.flags(&["--kvm", kvm.to_str().unwrap()]);
        stage.start();
        stage.import("counter");
        let before = stage.look();
        let words = ["cannot be opened", "kvm_intel or kvm_amd"];
        stage.fails(&create("s", &[]), 1, "kvm_unavailable", &words);
        stage.same_as(&before, "a server on a host without KVM");
        stage.fails(&["host", "check"], 1, "kvm_unavailable", &words);
        assert_eq!(stage.json(&["host", "about"])["health"], "failing");
        stage.ok(&create("s", &["--no-start"]));
        let before = stage.look();
        stage.fails(&["--wait", "server", "start", "s"], 1, "kvm_unavailable", &words);
        stage.same_as(&before, "a start on a host without KVM");
        // Something is there, but it is not KVM.
        symlink("/dev/null", &kvm).unwrap();
        let said = stage.toft(&["--wait", "server", "start", "s"]);
        assert!(
            said.err.contains("code machine_failed") || said.err.contains("code kvm_unavailable"),
            "{said:?}"
        );
        assert_eq!(stage.json(&["server", "show", "s"])["state"], "stopped");
        std::fs::remove_file(&kvm).unwrap();
        symlink("/dev/kvm", &kvm).unwrap();
        stage.ok(&["--wait", "server", "start", "s"]);
        stage.stop();
    });
}

#[test]
fn memory_is_promised_once() {
    world::inside("shortages::memory_is_promised_once", async {
        let mut stage = Stage::new();
        stage.flags(&["--memory-bytes", &(200u64 << 20).to_string()]);
        stage.start();
        stage.import("counter");
        stage.ok(&create("first", &[]));
        stage.ok(&create("second", &[]));
        stage.ok(&create("third", &["--no-start"]));
        let before = stage.look();
        let words = ["MiB are left", "stop or delete servers, or ask for less"];
        stage.fails(&create("late", &[]), 6, "no_capacity", &words);
        stage.fails(&["--wait", "server", "start", "third"], 6, "no_capacity", &words);
        stage.same_as(&before, "servers without memory");
        stage.ok(&["--wait", "server", "stop", "first", "--grace-s", "0"]);
        stage.ok(&["--wait", "server", "start", "third"]);
        stage.stop();
    });
}

#[test]
fn without_root_the_daemon_says_what_it_cannot_do() {
    world::inside("shortages::without_root_the_daemon_says_what_it_cannot_do", async {
        let mut stage = Stage::new();
        // Where the project lies, others may have no way in.
        stage.install(None);
        let as_nobody = |stage: &Stage| {
            let daemon = stage.daemon_command();
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
            command.arg(daemon.get_program()).args(daemon.get_args());
            command
        };
        // It may not make its state directory: it says which, and does not start.
        let said = Said::of(&mut as_nobody(&stage));
        assert_ne!(said.code, 0);
        let state = stage.path("state");
        assert!(said.err.contains(state.to_str().unwrap()), "{said:?}");
        assert!(said.err.contains("permission denied; the daemon needs root"), "{said:?}");
        for directory in ["state", "run"] {
            let path = stage.path(directory);
            std::fs::create_dir_all(&path).unwrap();
            std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap();
        }
        let log = File::options().create(true).append(true).open(stage.path("toftd.log")).unwrap();
        let child = as_nobody(&stage).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        stage.took(child);
        stage.import("counter");
        let before = stage.look();
        // What is said first depends on whom /dev/kvm admits; all of it names root.
        let said = stage.toft(&create("s", &[]));
        assert!(said.code == 1 && said.err.contains("root"), "{said:?}");
        assert!(
            said.err.contains("code kvm_unavailable") || said.err.contains("code host_unprepared"),
            "{said:?}"
        );
        stage.same_as(&before, "a server on a network of a daemon without root");
        let networks = stage.json(&["network", "list"]);
        assert_eq!(networks[0]["state"], "degraded", "{networks}");
        assert!(networks[0]["state_detail"].as_str().unwrap().contains("root"), "{networks}");
        // Without a network only KVM is needed, and /dev/kvm may admit everybody or not.
        let said = stage.toft(&create("alone", &["--no-network"]));
        if said.code != 0 {
            assert!(said.err.contains("kvm_unavailable") && said.err.contains("group kvm"), "{said:?}");
        }
        stage.stop();
    });
}
