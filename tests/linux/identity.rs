//! Clones of a Debian server whose guests become servers of their own, by the hook that our image carries.
use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use crate::ssh::{self, Ssh};
use crate::toft::{Daemon, wait_for};

/// Longest time for a boot, in the lab on a machine that has other work.
const BOOT: Duration = Duration::from_secs(360);

/// Longest time for a hook that ends by itself after 300 s, and for what leads to it.
const HOOK: Duration = Duration::from_secs(420);

/// Draws random numbers of both kinds all the time, from before the moment that the clones go on from, and keeps them in memory.
const DRAWER: &str = "python3 -c '
import os, time
with open(\"/dev/shm/drawn\", \"w\", buffering=1) as drawn, open(\"/dev/urandom\", \"rb\", buffering=0) as urandom:
    while True:
        print(time.monotonic_ns(), urandom.read(16).hex(), os.getrandom(16).hex(), file=drawn)
        time.sleep(0.05)
'";

/// How many of the numbers last drawn are looked at.
const LATEST: usize = 20;

/// What must be no two servers', as one says it of itself.
fn own(ssh: &Ssh) -> BTreeSet<String> {
    let ask = "hostname; cat /etc/machine-id; cut -d' ' -f2 /etc/ssh/ssh_host_*_key.pub; cat /sys/class/net/eth0/address
        ip -4 -o address show dev eth0 | tr -s ' ' | cut -d' ' -f4; cat /var/lib/cloud/data/instance-id";
    let said = wait_for("what it is", BOOT, || ssh.run(ask));
    let own: BTreeSet<String> = said.lines().map(str::to_owned).collect();
    assert_eq!(own.len(), 7, "{said}");
    own
}

/// The numbers it drew last.
fn drawn(ssh: &Ssh) -> BTreeSet<String> {
    let lines = ssh.run(&format!("tail -n {LATEST} /dev/shm/drawn | cut -d' ' -f2-")).unwrap();
    let numbers: BTreeSet<String> = lines.split_whitespace().map(str::to_owned).collect();
    assert_eq!(numbers.len(), 2 * LATEST, "{lines}");
    numbers
}

/// What a server offers whoever connects, which needs no login.
fn offered_key(address: &str) -> String {
    let scan = || {
        let output =
            Command::new("ssh-keyscan").args(["-t", "ed25519", "-T", "10", address]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.split_whitespace().nth(2).map(str::to_owned)
    };
    wait_for("a host key", Duration::from_secs(60), scan)
}

fn clones_become_servers_of_their_own(image: &str, has_vmgenid: bool) {
    let daemon = Daemon::start();
    daemon.import(image);
    let (key, public) = ssh::make_key(daemon.scratch());
    let user_data = daemon.scratch().join("user-data");
    std::fs::write(&user_data, "#cloud-config\nruncmd:\n- echo ran >> /var/of-the-user-data\n").unwrap();
    let create = ["--wait", "server", "create", "web1", "--image", image];
    let shape = ["--vcpus", "1", "--memory", "512M", "--disk", "1536M", "--ssh-key-file", &public];
    let more = ["--user-data-file", user_data.to_str().unwrap(), "--restart", "never"];
    daemon.run(&[&create[..], &shape, &more].concat());
    let user = daemon.json(&["image", "show", image])["default_user"].as_str().unwrap().to_owned();
    let address = |name: &str| {
        let server = daemon.json(&["server", "show", name]);
        server["nics"][0]["ipv4"].as_str().unwrap().to_owned()
    };
    let ssh = |name: &str| Ssh { from: &[], key: key.clone(), target: format!("{user}@{}", address(name)) };
    let first = ssh("web1");
    wait_for("ssh", BOOT, || first.run("true"));
    wait_for("the end of the boot", BOOT, || first.run("cloud-init status --wait > /dev/null; echo done"));
    first.run(&format!("(nohup {DRAWER} > /dev/null 2>&1 < /dev/null &)")).unwrap();
    wait_for("numbers", BOOT, || first.run("grep -qs . /dev/shm/drawn"));

    daemon.run(&["--wait", "server", "clone", "web1", "--name", "twin", "--count", "2"]);
    let names = ["web1", "twin-1", "twin-2"];
    for name in &names[1..] {
        let id = daemon.json(&["server", "show", name])["id"].as_str().unwrap().to_owned();
        daemon.wait_for_console(name, &format!("toft: identity renewed {id}"), HOOK);
        wait_for("word of it", Duration::from_secs(20), || {
            (daemon.json(&["server", "show", name])["identity"] == "renewed").then_some(())
        });
    }

    // Nothing that one is or draws is another's.
    let (mut all, mut seen) = (BTreeSet::new(), 0);
    for name in names {
        let ssh = ssh(name);
        let own = own(&ssh);
        assert!(own.contains(name) && own.contains(&format!("{}/24", address(name))), "{own:?}");
        let key = offered_key(&address(name));
        assert!(own.contains(&key), "{name} offers {key} and has {own:?}");
        for word in own.into_iter().chain(drawn(&ssh)) {
            seen += 1;
            assert!(all.insert(word.clone()), "{name} has {word} of another");
        }
    }
    println!("{seen} words of {} servers, no two the same", names.len());

    // What vmgenid is for, in the kernel's own words (drivers/char/random.c).
    for name in names {
        let log = ssh(name).run("sudo dmesg").expect("the kernel's log");
        let was_told = log.contains("crng reseeded due to virtual machine fork");
        assert_eq!(was_told, has_vmgenid && name != names[0], "{name}: {log}");
    }
    if has_vmgenid {
        return;
    }

    // The power button. What it wrote is there when it starts again, and that boot is not taken for a first one.
    let twin = ssh("twin-1");
    let before = own(&twin);
    twin.run("echo kept | sudo tee /var/kept && sudo sync").unwrap();
    daemon.run(&["--wait", "server", "stop", "twin-1", "--grace-s", "180"]);
    assert_eq!(daemon.json(&["server", "show", "twin-1"])["state"], "stopped");
    assert!(daemon.console("twin-1").contains("Power down"), "it was forced off");
    daemon.run(&["--wait", "server", "start", "twin-1"]);
    assert_eq!(wait_for("ssh after the start", BOOT, || twin.run("cat /var/kept")), "kept");
    wait_for("the end of the boot", BOOT, || twin.run("cloud-init status --wait > /dev/null; echo done"));
    assert_eq!(twin.run("cat /var/of-the-user-data").unwrap(), "ran");
    assert_eq!(own(&twin), before);
    assert_eq!(daemon.json(&["server", "show", "twin-1"])["identity"], "renewed");
}

/// Its kernel knows nothing of vmgenid.
#[test]
fn clones_of_a_debian_server_become_servers_of_their_own() {
    clones_become_servers_of_their_own("debian-12", false);
}

/// Its kernel is told by vmgenid before the hook is.
#[test]
fn clones_of_a_server_with_the_generic_kernel_become_servers_of_their_own() {
    clones_become_servers_of_their_own("debian-12-generic", true);
}
