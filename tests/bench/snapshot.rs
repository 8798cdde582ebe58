//! `snapshot`: how long a guest that writes makes no progress while a snapshot of its memory is taken as it runs, by how much
//! of its memory was touched.
use wire::control::Command;

use crate::ground::Ground;
use crate::rows::{Report, Series};
use crate::vmm_driver::{Machine, Vmm};

/// What the guest rewrites while it is saved, in MiB a second.
const RATE_MIB_PER_S: u64 = 256;

/// Memory beyond what is touched, in MiB.
const SPARE_MIB: u64 = 64;

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    for (case, mib, samples) in [("1 GiB", 1024, 7), ("4 GiB", 4096, 3)] {
        let mib = ground.samples(mib, 64) as u64;
        let (stalls, before, paused) = stalls(ground, mib, ground.samples(samples, 1));
        let series = |bench, who| Series { bench, case, who, unit: "ms" };
        let stall = report.add(series("snapshot_stall_ms", "toft"), &stalls);
        report.add(series("snapshot_stall_ms", "none"), &before);
        report.add(series("snapshot_pause_ms", "toft"), &paused);
        report.bar(&format!("snapshot_stall_ms {case} {stall:.2}, at most 5"), stall <= 5.0);
    }
}

/// The longest gap of each snapshot, one as long without, and how long the machine was paused for each.
fn stalls(ground: &Ground, mib: u64, samples: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let filled = format!("dirty={mib},0,{}", 1000 + 2 * mib);
    let mut machine = Machine::new(&ground.probe(), &format!("{filled} dirty={mib},{RATE_MIB_PER_S}"));
    machine.spec.memory_bytes = (mib + SPARE_MIB) << 20;
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("probe: dirty ok");
    let mut seen = vmm.console().matches(PASS).count();
    let (mut stalls, mut before, mut paused) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..samples {
        // Two whole reports in which nothing happens, then all in which the save lies. One is whole when the next has begun.
        let quiet = vmm.wait_for_times(PASS, seen + 4);
        before.push(longest_ms(&quiet, seen + 1, seen + 3));
        let from = quiet.matches(PASS).count();
        let saved = vmm.save_live();
        paused.push(saved.report.stall_us as f64 / 1e3);
        let until = vmm.console().matches(PASS).count() + 1;
        let busy = vmm.wait_for_times(PASS, until + 1);
        stalls.push(longest_ms(&busy, from, until));
        assert!(!busy.contains("FAILED"), "{busy}");
        seen = until + 1;
    }
    vmm.command(Command::Pause).expect("it runs");
    (stalls, before, paused)
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
