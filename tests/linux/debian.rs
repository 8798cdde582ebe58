//! The reference guest: Debian 12 with systemd, from its first boot to its deletion: one story with one boot, because each takes two
//! minutes in the lab. A second boot of a server is part of another story that needs it: [`crate::identity`].
use std::process::Command;
use std::time::Duration;

use crate::ssh::{self, Ssh};
use crate::toft::{Daemon, wait_for};

/// Longest time for a boot, in the lab on a machine that has other work.
const BOOT: Duration = Duration::from_secs(360);

fn page(address: &str) -> Option<String> {
    let url = format!("http://{address}/");
    let output = Command::new("curl").args(["-fsS", "--max-time", "5", &url]).output().unwrap();
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Names of the host's taps and bridges that belong to servers.
fn interfaces() -> Vec<String> {
    let names = std::fs::read_dir("/sys/class/net").unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|name| name != "lo").collect()
}

#[test]
fn a_debian_server_lives_from_its_first_boot_to_its_deletion() {
    let daemon = Daemon::start();
    daemon.import("debian-12");
    let (key, public) = ssh::make_key(daemon.scratch());
    let interfaces_before = interfaces();
    let user_data = daemon.scratch().join("user-data");
    let words = "#cloud-config\nwrite_files:\n- path: /etc/of-the-customer\n  content: theirs\n";
    std::fs::write(&user_data, words).unwrap();
    let create = ["--wait", "server", "create", "web1", "--image", "debian-12"];
    // An emulated host has no more than two processors, and other work for them.
    let vcpus = std::env::var("TOFT_VCPUS").unwrap_or_else(|_| "2".to_owned());
    let shape = ["--vcpus", &vcpus, "--memory", "1G", "--disk", "3G", "--ssh-key-file", &public];
    let more = ["--user-data-file", user_data.to_str().unwrap(), "--restart", "never"];
    let created = daemon.json(&[&create[..], &shape, &more].concat());
    assert_eq!(created["state"], "running");
    let address = created["nics"][0]["ipv4"].as_str().unwrap().to_owned();
    let volume = created["volumes"][0]["volume_id"].as_str().unwrap().to_owned();
    let user = daemon.json(&["image", "show", "debian-12"])["default_user"].as_str().unwrap().to_owned();
    let ssh = Ssh { from: &[], key, target: format!("{user}@{address}") };

    // It boots, by itself, with the address it was promised.
    daemon.wait_for_console("web1", "login:", BOOT);
    let text = wait_for("the page", BOOT, || page(&address));
    assert!(text.contains("web1"), "{text}");
    assert_eq!(wait_for("ssh", BOOT, || ssh.run("hostname")), "web1");
    assert_eq!(ssh.run("nproc").unwrap(), vcpus);
    assert_eq!(ssh.run("cat /etc/of-the-customer").unwrap(), "theirs");
    // The root file system has grown to the volume's size.
    let size: u64 = ssh.run("df --output=size -B1 / | tail -n 1").unwrap().trim().parse().unwrap();
    assert!(size > 5 << 29, "the root file system has only {size} bytes");

    // Its disk is a disk.
    let fio = "sudo fio --name=verify --filename=/var/tmp/fio --size=32m --rw=randwrite --bs=4k --iodepth=16 \
               --ioengine=libaio --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=terse";
    assert!(ssh.run(fio).is_some(), "fio --verify failed\n{}", daemon.console("web1"));

    // The stock kernel's panic is told from a power-off and from a crash of the machine.
    ssh.run("sudo sh -c '(sleep 2; echo c > /proc/sysrq-trigger) > /dev/null 2>&1 &'").unwrap();
    let failed = wait_for("the panic", Duration::from_secs(120), || {
        let server = daemon.json(&["server", "show", "web1"]);
        (server["state"] == "failed").then_some(server)
    });
    assert_eq!(failed["state_reason"]["code"], "guest_panicked", "{failed}\n{}", daemon.console("web1"));

    // Its end leaves nothing.
    daemon.run(&["--wait", "server", "delete", "web1"]);
    assert_eq!(daemon.fails(&["server", "show", "web1"]).0, 3);
    assert!(!daemon.state().join(format!("volumes/{volume}.raw")).exists());
    wait_for("the tap's end", Duration::from_secs(10), || (interfaces() == interfaces_before).then_some(()));
    assert!(page(&address).is_none());
}
