//! `clone`: how long a machine that was saved takes to go on, by the size of its memory; how long a hundred servers take that
//! go on from one snapshot, and what each holds of its own; what reading ahead is worth to one whose memory is in no cache.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::{Value, json};
use wire::control::Command;
use wire::saved::form;
use wire::saved::lower::{Lower, Run};
use wire::saved::table::Table;

use crate::client::Local;
use crate::create::NOT_BEFORE;
use crate::ground::Ground;
use crate::host::{Host, id};
use crate::rows::{Report, Series};
use crate::toft::{Below, restore_vmm};
use crate::vmm_driver::{Machine, Saved, Vmm};

/// MiB that the guest has written before it is saved, all with the same pattern.
const WRITTEN_MIB: u64 = 64;

/// A line each millisecond, so that progress is seen when it is made.
const TICKS: &str = "ticks=10000000,1";

/// What guests do that are cloned by the hundred: they wait to be told that a disk has changed, as a clone is, say what they
/// see, and halt. A hundred that went on would be measured with each other's noise.
const TOLD: &str = "changed=600000 halt";

/// What the guest says before it waits.
const WAITING: &str = "changed waiting";

/// What guests use that are cloned with nothing in the page cache: 64 MiB in two places.
const USED: &str = "mem=32";
const TOLD_USED: &str = "changed=600000 mem=32 halt";

/// Memory of the servers that are cloned, in bytes.
const MEMORY_BYTES: u64 = 512 << 20;

/// Bytes that a clone may have written when it has only just begun to run.
const DIRTY_KB_MAX: f64 = 1024.0;

/// VMMs that the daemon keeps ready where one clone is asked for after the other.
const WARM_SHELLS: usize = 2;

/// Time between two of them.
const IDLE: Duration = Duration::from_millis(100);

const WAIT: Option<&str> = Some("wait=60");

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    for (case, memory_mib, files) in
        [("128 MiB", 128, 1), ("1 GiB", 1024, 1), ("1 GiB in 16 files", 1024, 16)]
    {
        let took = report.add(
            Series { bench: "restore_ms", case, who: "toft", unit: "ms" },
            &restores(ground, memory_mib, files, ground.samples(51, 3)),
        );
        report.bar(&format!("restore_ms {case} {took:.2}, at most 4"), took <= 4.0);
    }
    let took = report.add(
        Series { bench: "restore_ms", case: "API, warm shell", who: "toft", unit: "ms" },
        &through_the_api(ground),
    );
    report.bar(&format!("restore_ms through the API {took:.2}, at most 5"), took <= 5.0);
    hundred(ground, report);
    from_the_disk(ground, report);
}

/// Milliseconds from the exec of a VMM to the first line of its guest, whose memory lies in so many files.
fn restores(ground: &Ground, memory_mib: u64, files: u32, samples: usize) -> Vec<f64> {
    let machine = || {
        let mut machine = Machine::new(&ground.probe(), &format!("dirty={WRITTEN_MIB},0,50 {TICKS}"));
        machine.spec.memory_bytes = memory_mib << 20;
        machine
    };
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("tick 3 ");
    vmm.command(Command::Pause).expect("it runs");
    let saved = vmm.save();
    drop(vmm);
    let below = (files > 1).then(|| scattered(&saved, memory_mib << 20, files));
    (0..samples).map(|_| restore_vmm(machine(), &saved, below.as_ref()).1).collect()
}

/// The memory of a machine as the longest chain of snapshots has it at worst: each part in another file than the one before.
fn scattered(saved: &Saved, memory_bytes: u64, files: u32) -> Below {
    let mut state = vec![0; saved.report.state_bytes as usize];
    saved.state.read_exact_at(&mut state, 0).expect("its state");
    let table = Table::parse(&mut form::split(&state).expect("its form")).expect("its table");
    let lower_files = || {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(memory_bytes).expect("room for a hole");
        file
    };
    let below: Vec<File> = (1..files).map(|_| lower_files()).collect();
    let mut lower = Lower { bytes: memory_bytes, files: files - 1, runs: Vec::new() };
    for (index, part) in (0..).zip(&table.parts) {
        let Some(file) = (index % files).checked_sub(1) else { continue };
        let mut data = vec![0; part.bytes as usize];
        saved.memory.read_exact_at(&mut data, part.offset).expect("a part of memory");
        below[file as usize].write_all_at(&data, part.offset).expect("room for a part");
        // What lies below is not in the own file: it would be seen there if it was taken from it.
        saved.memory.write_all_at(&vec![0xEE; data.len()], part.offset).expect("room for a part");
        lower.push(Run { offset: part.offset, bytes: part.bytes.into(), file });
    }
    Below { lower, files: below }
}

/// Milliseconds from the request for one clone to the first line of its guest, when a VMM waits for it.
fn through_the_api(ground: &Ground) -> Vec<f64> {
    let host = Host::start_with(ground, WARM_SHELLS);
    let mut client = host.local();
    let snapshot = snapshot(&host, ground, 128 << 20, (TICKS, "tick 3 "));
    let mut one = |at: usize| {
        // What the one before is followed by: its end, and another VMM that waits.
        std::thread::sleep(IDLE);
        let begun = Instant::now();
        let server = clones(&mut client, &snapshot, &format!("one-{at}"), 1).remove(0);
        std::thread::sleep(NOT_BEFORE);
        host.first_word(&server);
        let took = begun.elapsed().as_secs_f64() * 1e3;
        client.call("DELETE", &format!("/v1/servers/{server}"), WAIT, None);
        took
    };
    one(0);
    (1..=ground.samples(41, 3)).map(one).collect()
}

/// Takes a snapshot with memory of a server whose guest does what `words` say and has said `last`, and pauses that server.
fn snapshot(host: &Host, ground: &Ground, memory_bytes: u64, (words, last): (&str, &str)) -> String {
    host.import(ground, "counting", &format!("dirty={WRITTEN_MIB},0,50 {words}"));
    let mut client = host.local();
    let body = json!({ "name": "first", "image": "counting", "memory_bytes": memory_bytes });
    let first = id(&client.call("POST", "/v1/servers", WAIT, Some(&body)));
    while !host.console_log(&first).contains(last) {}
    let path = format!("/v1/servers/{first}/actions/snapshot");
    let body = json!({ "name": "then", "memory": true });
    let snapshot = id(&client.call("POST", &path, WAIT, Some(&body)));
    let path = format!("/v1/servers/{first}/actions/pause");
    client.call("POST", &path, WAIT, None);
    snapshot
}

fn hundred(ground: &Ground, report: &mut Report) {
    let count = ground.samples(100, 3);
    let host = Host::start(ground);
    let snapshot = snapshot(&host, ground, MEMORY_BYTES, (TOLD, WAITING));
    let mut client = host.local();
    let rounds = ground.samples(5, 1);
    let (mut took_s, mut dirty_kb, mut charged_kb) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let begun = Instant::now();
        let servers = clones(&mut client, &snapshot, &format!("clone-{round}"), count);
        servers.iter().for_each(|server| host.first_word(server));
        took_s.push(begun.elapsed().as_secs_f64());
        dirty_kb.extend(private_dirty_kb(&format!("clone-{round}-")));
        charged_kb.extend(servers.iter().filter_map(|server| host.charged_kb(server)));
        for server in servers {
            client.call("DELETE", &format!("/v1/servers/{server}"), WAIT, None);
        }
    }
    let took = report.add(series("clone100_s", "s"), &took_s);
    report.bar(&format!("clone100_s {took:.2}, at most 1"), took <= 1.0);
    report.add(series("cgroup_kb", "kB"), &charged_kb);
    report.add(series("private_dirty_kb", "kB"), &dirty_kb);
    let most_kb = dirty_kb.iter().copied().fold(0.0, f64::max);
    let text = format!("private dirty of a clone {most_kb:.0} kB where it is most, at most {DIRTY_KB_MAX}");
    report.bar(&text, most_kb <= DIRTY_KB_MAX);
}

/// Milliseconds from the request for one clone until its guest has written all over [`USED`], when nothing of the snapshot's memory
/// is in the page cache: with what the first clone used read ahead, and without.
fn from_the_disk(ground: &Ground, report: &mut Report) {
    let host = Host::start_with(ground, WARM_SHELLS);
    let mut client = host.local();
    let snapshot = snapshot(&host, ground, 128 << 20, (&format!("{USED} {TOLD_USED}"), WAITING));
    let directory = host.snapshot(&snapshot);
    let (list, hidden) = (directory.join("machine.used"), directory.join("hidden"));
    let memory = File::open(directory.join("machine.memory")).expect("its memory");
    let mut number = 0;
    let mut one = |client: &mut Local, before_the_end: &mut dyn FnMut(&mut Local)| {
        memory.sync_all().expect("written pages");
        posix_fadvise(&memory, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("an empty cache");
        std::thread::sleep(IDLE);
        number += 1;
        let begun = Instant::now();
        let server = clones(client, &snapshot, &format!("cold-{number}"), 1).remove(0);
        while !host.console(&server).contains("mem ok") {
            std::thread::sleep(NOT_BEFORE);
        }
        let took = begun.elapsed().as_secs_f64() * 1e3;
        before_the_end(client);
        client.call("DELETE", &format!("/v1/servers/{server}"), WAIT, None);
        took
    };
    one(&mut client, &mut |client| {
        let path = format!("/v1/snapshots/{snapshot}");
        while client.call("GET", &path, None, None)["working_set_bytes"].is_null() {
            std::thread::sleep(IDLE);
        }
    });
    let samples = ground.samples(15, 1);
    let mut nothing = |_: &mut Local| {};
    let ahead: Vec<f64> = (0..samples).map(|_| one(&mut client, &mut nothing)).collect();
    std::fs::rename(&list, &hidden).expect("the list");
    let without: Vec<f64> = (0..samples).map(|_| one(&mut client, &mut nothing)).collect();
    for (case, took) in [("64 MiB used, read ahead", ahead), ("64 MiB used, not read ahead", without)] {
        report.add(Series { bench: "cold_ms", case, who: "toft", unit: "ms" }, &took);
    }
}

fn series<'a>(bench: &'a str, unit: &'a str) -> Series<'a> {
    Series { bench, case: "512 MiB", who: "toft", unit }
}

fn clones(client: &mut Local, snapshot: &str, name: &str, count: usize) -> Vec<String> {
    let body = json!({ "name": name, "count": count });
    let path = format!("/v1/snapshots/{snapshot}/actions/clone");
    let answer = client.call("POST", &path, None, Some(&body));
    let items = answer["items"].as_array().unwrap_or_else(|| panic!("no clones in {answer}"));
    let server = |item: &Value| item["server_id"].as_str().expect("an id").to_owned();
    items.iter().map(server).collect()
}

/// Of the VMMs of servers whose names begin so: all that is theirs alone and written, guest memory included.
fn private_dirty_kb(label: &str) -> Vec<f64> {
    let is_one = |pid: &str| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").contains(&format!("machine --label {label}"))
    };
    let figure = |pid: String| -> Option<f64> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:"))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    };
    let processes = std::fs::read_dir("/proc").expect("/proc");
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()) && is_one(pid))
        .filter_map(figure)
        .collect()
}
