//! `snapshot`: how long a guest that writes makes no progress while a snapshot of its memory is taken as it runs, by how much
//! of its memory was touched.
use wire::control::Command;

use crate::ground::Ground;
use crate::rows::{Report, Series};
use crate::vmm_driver::{Machine, Vmm};
use crate::witness::Witness;

/// What the guest rewrites while it is saved, in MiB a second.
const RATE_MIB_PER_S: u64 = 256;

/// Memory beyond what is touched, in MiB.
const SPARE_MIB: u64 = 64;

/// A machine that stands still itself for longer shows nothing of a guest on it.
const STILL_MS_MAX: f64 = 2.0;

/// Snapshots that are taken at most for each that counts.
const TRIES: usize = 3;

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    for (case, mib, samples) in [("1 GiB", 1024, 5), ("4 GiB", 4096, 3)] {
        let mib = ground.samples(mib, 64) as u64;
        let found = stalls(ground, mib, ground.samples(samples, 1));
        let series = |bench, who| Series { bench, case, who, unit: "ms" };
        report.add(series("snapshot_stall_ms", "none"), &found.before);
        report.add(series("snapshot_stall_ms", "toft, any"), &found.any);
        report.add(series("snapshot_stall_ms", "the machine"), &found.machine);
        report.add(series("snapshot_pause_ms", "toft"), &found.paused);
        if found.stalls.is_empty() {
            let what = format!("snapshot_stall_ms {case}: the machine stood still in every snapshot");
            report.note(what);
            continue;
        }
        let stall = report.add(series("snapshot_stall_ms", "toft"), &found.stalls);
        report.bar(&format!("snapshot_stall_ms {case} {stall:.2}, at most 5"), stall <= 5.0);
    }
}

/// In milliseconds.
#[derive(Default)]
struct Found {
    /// The longest gap in a while without a snapshot.
    before: Vec<f64>,
    /// The longest of each snapshot, and of those in which the machine did not stand still itself.
    any: Vec<f64>,
    stalls: Vec<f64>,
    /// The longest time in each snapshot in which nothing on the machine ran.
    machine: Vec<f64>,
    /// How long the guest was paused for each.
    paused: Vec<f64>,
}

fn stalls(ground: &Ground, mib: u64, samples: usize) -> Found {
    let filled = format!("dirty={mib},0,{}", 1000 + 2 * mib);
    let mut machine = Machine::new(&ground.probe(), &format!("{filled} dirty={mib},{RATE_MIB_PER_S}"));
    machine.spec.memory_bytes = (mib + SPARE_MIB) << 20;
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("probe: dirty ok");
    let seen = vmm.console().matches(PASS).count();
    let quiet = vmm.wait_for_times(PASS, seen + samples + 2);
    // Whole reports; one is whole when the next has begun.
    let mut found = Found::default();
    found.before.extend((1..=samples).map(|at| longest_ms(&quiet, seen + at, seen + at + 1)));
    let witness = Witness::start();
    while found.stalls.len() < samples && found.any.len() < samples * TRIES {
        // From the end of a report to that of the one in which the save has ended.
        let begun = vmm.console().matches(PASS).count();
        vmm.wait_for_times(PASS, begun + 1);
        witness.longest_ms();
        let from = vmm.console().matches(PASS).count();
        let saved = vmm.save_live();
        let until = vmm.console().matches(PASS).count() + 1;
        // The witness watches for as long as the reports tell of, and not while the last of them is waited for to be whole.
        vmm.wait_for_times(PASS, until);
        let still = witness.longest_ms();
        let busy = vmm.wait_for_times(PASS, until + 1);
        let stall = longest_ms(&busy, from, until);
        assert!(!busy.contains("FAILED"), "{busy}");
        found.any.push(stall);
        found.machine.push(still);
        found.paused.push(saved.report.stall_us as f64 / 1e3);
        if still <= STILL_MS_MAX {
            found.stalls.push(stall);
        }
    }
    vmm.command(Command::Pause).expect("it runs");
    found
}

/// What each report of the guest begins with.
const PASS: &str = "dirty pass";

/// The longest gap that the guest has told of in its reports from one on and before another.
fn longest_ms(console: &str, from: usize, until: usize) -> f64 {
    let reports = console.split(PASS).skip(1 + from).take(until - from);
    let gap = |report: &str| -> Option<f64> {
        report.split_once("gap_us=")?.1.split_whitespace().next()?.parse().ok()
    };
    reports.filter_map(gap).fold(0.0, f64::max) / 1e3
}
