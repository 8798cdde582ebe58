//! `start_ms`: from the exec of a VMM, or from the request to the launcher, to the guest's first output. The guest is
//! the probe with one vCPU and 128 MiB, everywhere. Subjects take turns, so that noise hits all of them alike.
use std::ffi::OsStr;

use crate::ground::Ground;
use crate::process::Process;
use crate::rows::{Report, Series};
use crate::toft::{Launcher, start_vmm};
use crate::vmm_driver::Machine;

/// It stays after its greeting.
const WORDS: &str = "spin";

/// How that begins.
const GREETING: &str = "probe:";
const MEMORY_MIB: &str = "128";

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let rounds = ground.samples(101, 3);
    let launcher = Launcher::start();
    let qemu =
        ground.on_path("qemu-system-x86_64").expect("qemu-system-x86_64 is installed by scripts/bench");
    let (probe, floor) = (ground.probe(), ground.floor());
    let probe = probe.as_os_str();
    let floor_arguments = [probe, MEMORY_MIB.as_ref(), WORDS.as_ref()];
    let qemu_arguments = microvm(probe);
    let [mut floor_ms, mut toft_ms, mut launched_ms, mut qemu_ms] = [const { Vec::new() }; 4];
    for round in 0..rounds {
        floor_ms.push(first_output_ms(Process::start(&floor, &floor_arguments)));
        toft_ms.push(start_vmm(machine(ground)).1);
        launched_ms.push(launcher.start_vmm(machine(ground)).1);
        // It takes almost twenty times as long, and a quarter of the samples tell its median well enough.
        if round % 4 == 0 {
            qemu_ms.push(first_output_ms(Process::start(&qemu, &qemu_arguments)));
        }
    }
    let series = |case, who| Series { bench: "start_ms", case, who, unit: "ms" };
    let floor = report.add(series("vmm", "floor"), &floor_ms);
    let toft = report.add(series("vmm", "toft"), &toft_ms);
    report.add(series("vmm", "qemu"), &qemu_ms);
    report.add(series("with_launcher", "toft"), &launched_ms);
    let ratio = toft / floor;
    report.bar(
        &format!("start_ms vmm: {toft:.2} ms, {ratio:.2} x floor (wanted: at most 4 ms and 2 x floor)"),
        toft <= 4.0 && ratio <= 2.0,
    );
    peers(ground, report, rounds.div_ceil(4));
}

fn machine(ground: &Ground) -> Machine {
    let mut machine = Machine::new(&ground.probe(), WORDS);
    machine.spec.memory_bytes = 128 << 20;
    machine
}

fn first_output_ms(mut process: Process) -> f64 {
    let first = process.first_of(GREETING);
    first.duration_since(process.executed_at).as_secs_f64() * 1e3
}

/// QEMU's smallest machine, which starts the probe without firmware.
fn microvm(probe: &OsStr) -> [&OsStr; 16] {
    [
        "-M".as_ref(),
        "microvm,pcie=on,x-option-roms=off,pit=off,pic=off,rtc=off".as_ref(),
        "-accel".as_ref(),
        "kvm".as_ref(),
        "-m".as_ref(),
        MEMORY_MIB.as_ref(),
        "-nodefaults".as_ref(),
        "-display".as_ref(),
        "none".as_ref(),
        "-no-reboot".as_ref(),
        "-serial".as_ref(),
        "stdio".as_ref(),
        "-append".as_ref(),
        "ecam=0xe0000000 spin".as_ref(),
        "-kernel".as_ref(),
        probe,
    ]
}

/// Those that are installed. Debian has neither, so they are measured only where somebody brought them.
fn peers(ground: &Ground, report: &mut Report, rounds: usize) {
    let directory = tempfile::Builder::new().prefix("toft-bench").tempdir().unwrap();
    let config = directory.path().join("firecracker.json");
    let probe = ground.probe();
    let document = serde_json::json!({
        "boot-source": { "kernel_image_path": probe, "boot_args": WORDS },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": [],
    });
    std::fs::write(&config, document.to_string()).unwrap();
    let firecracker: [&OsStr; 3] = ["--no-api".as_ref(), "--config-file".as_ref(), config.as_os_str()];
    let cloud_hypervisor: [&OsStr; 12] = [
        "--kernel".as_ref(),
        probe.as_os_str(),
        "--cmdline".as_ref(),
        WORDS.as_ref(),
        "--cpus".as_ref(),
        "boot=1".as_ref(),
        "--memory".as_ref(),
        "size=128M".as_ref(),
        "--serial".as_ref(),
        "tty".as_ref(),
        "--console".as_ref(),
        "off".as_ref(),
    ];
    for (name, arguments) in [("firecracker", &firecracker[..]), ("cloud-hypervisor", &cloud_hypervisor[..])]
    {
        let Some(path) = ground.on_path(name) else {
            report.note(format!("absent: {name} is not on PATH"));
            continue;
        };
        let samples: Vec<f64> =
            (0..rounds).map(|_| first_output_ms(Process::start(&path, arguments))).collect();
        report.add(Series { bench: "start_ms", case: "vmm", who: name, unit: "ms" }, &samples);
    }
}
