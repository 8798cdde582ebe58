//! `disk`: random reads and sequential writes of one virtio disk over the same file, as far as the page cache: what the
//! VMM costs, not what the medium does. QEMU's disk is virtio-pci on q35 with io_uring and a thread of its own.
use std::fs::File;
use std::io::Write;
use std::path::Path;

use crate::ground::Ground;
use crate::guest::{Guest, on_command};
use crate::rows::{Report, Series};
use crate::vmm_driver::Machine;

const DISK_BYTES: u64 = 256 << 20;

/// A case: its name, the probe's word, and the figure taken of its report with its unit.
struct Case {
    name: &'static str,
    word: &'static str,
    figure: &'static str,
    unit: &'static str,
    /// At least so many times QEMU's.
    wanted: f64,
}

const CASES: [Case; 3] = [
    Case { name: "read 4k depth 1", word: "blkbench=1,4096,1000", figure: "iops", unit: "1/s", wanted: 1.0 },
    Case {
        name: "read 4k depth 32",
        word: "blkbench=32,4096,1000",
        figure: "iops",
        unit: "1/s",
        wanted: 1.3,
    },
    Case {
        name: "write 64k, flush",
        word: "blkappend=65536,1000,16",
        figure: "mib_per_s",
        unit: "MiB/s",
        wanted: 1.0,
    },
];

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let directory = tempfile::tempdir_in(&ground.files).unwrap();
    let path = directory.path().join("disk");
    write_disk(&path);
    let words = CASES.map(|case| case.word);
    let mut guests = [toft(ground, &path, &words), qemu(ground, &path, &words)];
    let rounds = ground.samples(9, 1);
    let mut samples = [const { [const { Vec::new() }; 2] }; 3];
    for _ in 0..rounds {
        for (case, samples) in CASES.iter().zip(&mut samples) {
            for (guest, samples) in guests.iter_mut().zip(samples) {
                samples.push(guest.measure(case.word).get(case.figure));
            }
        }
    }
    for (case, samples) in CASES.iter().zip(&samples) {
        let series = |who| Series { bench: "disk", case: case.name, who, unit: case.unit };
        let [toft, qemu] = [0, 1].map(|at| report.add(series(guests[at].who), &samples[at]));
        let (name, ratio, wanted) = (case.name, toft / qemu, case.wanted);
        report.bar(&format!("disk {name}: {ratio:.2} x QEMU (wanted: {wanted})"), ratio >= wanted);
    }
    for case in &CASES {
        for guest in &mut guests {
            let (figures, counts) = guest.count_while(case.word, "probe: serial waiting", || ());
            report.counts("disk", case.name, guest.who, &counts, figures.get("ops"));
        }
    }
}

/// Written, because holes would be read faster than data.
fn write_disk(path: &Path) {
    let mut file = File::create(path).unwrap();
    let block: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    for _ in 0..DISK_BYTES / block.len() as u64 {
        file.write_all(&block).unwrap();
    }
    file.sync_all().unwrap();
}

fn toft(ground: &Ground, path: &Path, words: &[&str]) -> Guest {
    let mut machine = Machine::new(&ground.probe(), &on_command("", words));
    machine.spec.memory_bytes = 128 << 20;
    machine.disk(File::options().read(true).write(true).open(path).unwrap(), |_| ());
    Guest::toft(machine)
}

fn qemu(ground: &Ground, path: &Path, words: &[&str]) -> Guest {
    let drive = format!(
        "if=none,id=d,file={},format=raw,cache=writeback,aio=io_uring,file.locking=off",
        path.display()
    );
    let device = "virtio-blk-pci,drive=d,iothread=t,disable-legacy=on".to_owned();
    let more = [
        "-object".to_owned(),
        "iothread,id=t".to_owned(),
        "-drive".to_owned(),
        drive,
        "-device".to_owned(),
        device,
    ];
    Guest::qemu(&ground.qemu(), &q35(ground, &on_command("", words), &more))
}

/// QEMU's q35 with the probe, 128 MiB and its serial port on standard input and output.
pub(crate) fn q35(ground: &Ground, cmdline: &str, more: &[String]) -> Vec<String> {
    let fixed =
        "-M q35 -accel kvm -m 128 -nodefaults -display none -no-reboot -serial stdio -nic none -kernel";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    arguments.push(ground.probe().to_str().expect("scripts/bench gives a plain path").to_owned());
    arguments.extend(["-append".to_owned(), cmdline.to_owned()]);
    arguments.extend_from_slice(more);
    arguments
}
