//! Power cuts of a host whose guests write: `scripts/lab --restarts` starts this test again after each, on the same
//! disks. What a guest was told is written must be there; file systems must need no repair; the daemon must start and
//! run what was wanted. `TOFT_LONG=1` cuts ten times, else once.
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::toft::{Daemon, directory, wait_for, wait_for_quietly};

/// Records that the guest must have been told of before the next cut.
const RECORDS: u64 = 40;

/// How often a guest that says nothing is reset.
const RESETS: usize = 4;

const DISK_BYTES: u64 = 64 << 20;

/// The guest looks at what it finds, then writes one record after the other, and says of each when it is safe.
const GUEST: &str = "#!/bin/sh
log=/mnt/log
touch $log
echo \"log: begins $(cat /proc/sys/kernel/random/boot_id)\"
n=$(wc -l < $log)
if seq 1 $n | cmp -s - $log; then echo \"log: intact $n\"; else echo \"log: broken $n\"; fi
while :; do
  n=$((n + 1))
  echo $n | dd of=$log oflag=append conv=notrunc,fsync 2> /dev/null && echo \"log: safe $n\"
done
";

/// What is kept over cuts, each file written and synced whole.
struct Notes(PathBuf);

impl Notes {
    fn write(&self, name: &str, value: impl std::fmt::Display) {
        let fresh = self.0.join(format!("{name}.new"));
        let mut file = File::create(&fresh).unwrap();
        write!(file, "{value}").unwrap();
        file.sync_all().unwrap();
        fs::rename(fresh, self.0.join(name)).unwrap();
        File::open(&self.0).unwrap().sync_all().unwrap();
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap_or_default()
    }

    fn number(&self, name: &str) -> u64 {
        self.text(name).parse().unwrap_or_default()
    }
}

fn command(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// An image of the small guest's with a disk that has a file system.
fn write_image(images: &Path) {
    let (tiny, image) = (directory("TOFT_IMAGES").join("tiny"), images.join("writer"));
    fs::create_dir_all(&image).unwrap();
    for file in ["vmlinuz", "initrd"] {
        fs::copy(tiny.join(file), image.join(file)).unwrap();
    }
    let disk = image.join("root.raw");
    File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    command("mke2fs", &["-q", "-t", "ext4", "-F", disk.to_str().unwrap()]);
    let mut manifest: Value = serde_json::from_slice(&fs::read(tiny.join("image.json")).unwrap()).unwrap();
    let sum = command("sha256sum", &[disk.to_str().unwrap()]);
    manifest["min_disk_bytes"] = DISK_BYTES.into();
    manifest["disk"] = serde_json::json!({
        "file": "root.raw", "format": "raw", "size_bytes": DISK_BYTES,
        "sha256": sum.split_whitespace().next().unwrap(),
    });
    fs::write(image.join("image.json"), manifest.to_string()).unwrap();
}

/// The host's file system needs no repair. Nothing uses it yet.
fn check_host(space: &Path) {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let is_space = |line: &&str| line.split(' ').nth(1) == space.to_str();
    let device =
        mounts.lines().find(is_space).and_then(|line| line.split(' ').next()).expect("a disk of its own");
    command("umount", &[space.to_str().unwrap()]);
    command("e2fsck", &["-f", "-n", device]);
    command("mount", &[device, space.to_str().unwrap()]);
}

/// Nor does a guest's, once its journal is replayed as the guest's kernel does when it mounts it.
fn check_guest(state: &Path, scratch: &Path) {
    for volume in fs::read_dir(state.join("volumes")).unwrap().flatten() {
        let copy = scratch.join("volume.copy");
        let copied = copy.to_str().unwrap();
        command("cp", &["--sparse=always", volume.path().to_str().unwrap(), copied]);
        command("e2fsck", &["-E", "journal_only", "-y", copied]);
        command("e2fsck", &["-f", "-n", copied]);
        fs::remove_file(copy).unwrap();
    }
}

/// The last number behind `words` on the console.
fn last(log: &str, words: &str) -> Option<u64> {
    // The last line may be half written.
    let whole = &log[..log.rfind('\n')?];
    whole.lines().rev().find_map(|line| line.trim().strip_prefix(words)?.trim().parse().ok())
}

#[test]
#[ignore = "cuts the power of the host it runs on: scripts/check power-cut, in the lab"]
fn what_a_guest_was_told_is_written_outlives_a_power_cut() {
    let boot: u64 =
        std::env::var("LAB_BOOT").expect("only scripts/lab --restarts may run this").parse().unwrap();
    let rounds = if std::env::var_os("TOFT_LONG").is_some() { 10 } else { 1 };
    let space = directory("TMPDIR");
    let base = space.join("power-cut");
    let (images, loose) = (base.join("images"), base.join("loose"));
    let notes = Notes(base.clone());
    if boot == 0 {
        fs::create_dir_all(&base).unwrap();
        write_image(&images);
    } else {
        check_host(&space);
        assert_eq!(notes.number("cuts"), boot, "the host restarted by itself");
        let kept = fs::read_to_string(&loose).unwrap_or_default();
        assert_ne!(kept, boot.to_string(), "the cut lost nothing, so it shows nothing");
        check_guest(&base.join("state"), &base);
    }
    let daemon = Daemon::start_in(&base, &images);
    if boot == 0 {
        daemon.import("writer");
        let script = base.join("guest");
        fs::write(&script, GUEST).unwrap();
        let script = script.to_str().unwrap();
        daemon.run(&[
            "--wait",
            "server",
            "create",
            "writer",
            "--image",
            "writer",
            "--no-network",
            "--user-data-file",
            script,
        ]);
    }
    // After a cut it runs because that is wanted, without being asked.
    let acknowledged = notes.number("acknowledged");
    let patience = Duration::from_secs(100);
    let look = || {
        let log = daemon.console("writer");
        // The console's log goes on over cuts, as far as the host had written it: its newest guest may be any of those
        // before this boot.
        let (guest, begun) = log.rsplit_once("log: begins ")?.1.split_once('\n')?;
        assert!(!begun.contains("log: broken"), "{log}");
        let found = last(begun, "log: intact")?;
        let is_new = !notes.text("guests").lines().any(|earlier| earlier == guest.trim());
        is_new.then(|| (guest.trim().to_owned(), found))
    };
    // The emulated host loses about one guest in ten while its kernel begins: such a guest has looked at nothing yet,
    // and gets its reset button pressed.
    let mut seen = wait_for_quietly(patience, look);
    for _ in 0..RESETS {
        if seen.is_none() {
            println!("boot {boot}: the guest's kernel does not come up, it is reset");
            daemon.run(&["--wait", "server", "reboot", "writer", "--grace-s", "0"]);
            seen = wait_for_quietly(patience, look);
        }
    }
    let (guest, found) = seen.unwrap_or_else(|| {
        let server = daemon.json(&["server", "show", "writer"]);
        panic!("the guest says nothing of its log:\n{server}\n{}\n{}", daemon.console("writer"), daemon.log())
    });
    println!("boot {boot}: {acknowledged} records were acknowledged before, {} are there", found);
    assert!(found >= acknowledged, "records {} to {acknowledged} are lost", found + 1);
    if boot == rounds {
        daemon.run(&["--wait", "server", "stop", "writer", "--grace-s", "60"]);
        check_guest(&base.join("state"), &base);
        println!("{rounds} power cuts: {} records, every acknowledged one is there", found);
        drop(daemon);
        return fs::remove_dir_all(&base).unwrap();
    }
    let told = wait_for("records", patience, || {
        last(&daemon.console("writer"), "log: safe").filter(|told| *told >= found + RECORDS)
    });
    notes.write("acknowledged", told);
    notes.write("guests", notes.text("guests") + &guest + "\n");
    notes.write("cuts", boot + 1);
    fs::write(&loose, (boot + 1).to_string()).unwrap();
    fs::write("/proc/sysrq-trigger", "b").unwrap();
    unreachable!("the host has no power");
}
