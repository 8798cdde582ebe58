//! `linux`: a stock Linux kernel as the guest: how long it takes to its first process, and what fio and iperf3 say
//! inside. It needs a KVM that runs Linux. Kernel, initrd, command line, file and kind of tap are the same under every
//! VMM. A VMM that fails loses its own rows and costs the others nothing.
mod guest;
mod image;
mod vmm;

use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::ground::{Effort, Ground, KvmKind};
use crate::process::Process;
use crate::rows::{Report, Series};
use crate::vmm_driver::PATIENCE;
use guest::Guest;
use image::Image;
use vmm::{Disk, Plan, Tap, Vmm};

/// How long one thing that a Linux guest does may take. On an emulated host it takes up to a minute.
const PATIENCE_LINUX: Duration = Duration::from_secs(300);

/// Bytes that fio reads and writes.
const DISK_BYTES: u64 = 256 << 20;

/// The first line of the guest's first process.
const INIT: &str = "bench: init";

/// What the guest calls the disk with [`DISK_BYTES`]: the first has the programs, the second takes reports.
const DEVICE: &str = "/dev/vdc";

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    if let KvmKind::Probe(why) = &ground.kvm {
        let why = format!(
            "this machine's KVM does not run Linux guests: {why}. Run it on a host with VT-x or SVM; to see that it \
             works, `scripts/check bench-linux` runs it on an emulated one"
        );
        return report.skipped("linux", &why);
    }
    let directory = tempfile::tempdir_in(&ground.files).unwrap();
    let peers: Vec<Vmm> = Vmm::PEERS.into_iter().filter(|vmm| ground.on_path(vmm.who()).is_some()).collect();
    let linux = Linux {
        ground,
        image: Image::open(&ground.linux(), &peers, directory.path()),
        directory: directory.path(),
    };
    let beside = |some: &[Vmm]| [&[Vmm::Toft], some, &peers].concat();
    linux.start(&beside(&[Vmm::QemuMicrovm]), report);
    linux.fio(&beside(&[Vmm::Qemu]), report);
    let qemus: &[Vmm] = match Path::new("/dev/vhost-net").exists() {
        true => &[Vmm::Qemu, Vmm::QemuVhost],
        false => &[Vmm::Qemu],
    };
    linux.iperf3(&beside(qemus), report);
}

/// What is compared: a figure's name, its cases with their units, and how many samples of each are taken.
struct Figure<'a> {
    bench: &'static str,
    cases: &'a [(&'static str, &'static str)],
    rounds: usize,
}

/// Takes a sample of every case of every VMM, round by round, of what was prepared for each. What panics has told why.
fn compare<T>(
    figure: &Figure<'_>,
    vmms: &[Vmm],
    report: &mut Report,
    prepare: impl Fn(Vmm) -> T,
    sample: impl Fn(Vmm, &mut T, usize) -> f64,
) {
    let Figure { bench, cases, rounds } = *figure;
    eprintln!("bench: {bench}");
    let mut failed = Vec::new();
    let mut entries = Vec::new();
    for vmm in vmms {
        match catch_unwind(AssertUnwindSafe(|| prepare(*vmm))) {
            Ok(prepared) => entries.push((*vmm, prepared, vec![Vec::new(); cases.len()])),
            Err(_) => failed.push(*vmm),
        }
    }
    for _ in 0..rounds {
        for case in 0..cases.len() {
            entries.retain_mut(|(vmm, prepared, samples)| {
                let taken = catch_unwind(AssertUnwindSafe(|| sample(*vmm, prepared, case)));
                match &taken {
                    Ok(figure) => samples[case].push(*figure),
                    Err(_) => failed.push(*vmm),
                }
                taken.is_ok()
            });
        }
    }
    for (case, (name, unit)) in cases.iter().enumerate() {
        let mut medians = Vec::new();
        for (vmm, _, samples) in &entries {
            let series = Series { bench, case: name, who: vmm.who(), unit };
            medians.push((vmm, report.add(series, &samples[case])));
        }
        let Some((Vmm::Toft, toft)) = medians.first() else { continue };
        for (other, median) in &medians[1..] {
            let ratio = toft / median;
            report.note(format!("{bench} {name}: toft has {ratio:.2} x the figure of {}", other.who()));
        }
    }
    failed.iter().for_each(|vmm| report.failed(&format!("{bench} of {}", vmm.who())));
}

/// What the parts of the group share.
struct Linux<'a> {
    ground: &'a Ground,
    image: Image,
    directory: &'a Path,
}

impl Linux<'_> {
    /// Samples where so many VMMs are compared: many VMMs may take no longer than two.
    fn rounds(&self, full: usize, vmms: &[Vmm]) -> usize {
        self.ground.samples((full * 2).div_ceil(vmms.len().max(2)), 1)
    }

    /// From exec to the first line of the guest's first process.
    fn start(&self, vmms: &[Vmm], report: &mut Report) {
        let figure = Figure {
            bench: "linux_start_ms",
            cases: &[("1 vCPU, 256 MiB", "ms")],
            rounds: self.rounds(20, vmms),
        };
        let plan = |vmm| Plan { vmm, vcpus: 1, memory_mib: 256, disks: Vec::new(), tap: None };
        compare(
            &figure,
            vmms,
            report,
            |_| (),
            |vmm, (), _| plan(vmm).first_line_ms(self.ground, &self.image, self.directory),
        );
    }

    /// fio on a disk, past the guest's page cache and as far as the host's.
    fn fio(&self, vmms: &[Vmm], report: &mut Report) {
        let figure = Figure {
            bench: "linux_fio",
            cases: &[("read 4k depth 1", "1/s"), ("read 4k depth 32", "1/s"), ("write 64k, fsync", "MiB/s")],
            rounds: self.rounds(5, vmms),
        };
        // The options of each case, where its figure is in fio's report, and what that is divided by.
        let cases = [
            ("--rw=randread --bs=4k --iodepth=1", "/jobs/0/read/iops", 1.0),
            ("--rw=randread --bs=4k --iodepth=32", "/jobs/0/read/iops", 1.0),
            ("--rw=write --bs=64k --iodepth=16 --fsync=16", "/jobs/0/write/bw_bytes", 1048576.0),
        ];
        let time = match self.ground.effort {
            Effort::Full => "--ramp_time=500ms --runtime=2",
            Effort::Smoke => "--runtime=1",
        };
        let path = self.directory.join("disk");
        write_disk(&path, if self.ground.effort == Effort::Full { DISK_BYTES } else { DISK_BYTES / 16 });
        let boot = |vmm| self.boot(vmm, Some(&path), None);
        let sample = |_, guest: &mut Guest, case: usize| {
            let (options, pointer, per) = cases[case];
            let told = guest.json(&format!(
                "chroot /mnt fio --name=bench --filename={DEVICE} --ioengine=libaio --direct=1 --time_based {time} \
                 {options} --output-format=json"
            ));
            assert_eq!(told.pointer("/jobs/0/error"), Some(&Value::from(0)), "fio failed: {told}");
            number(&told, pointer) / per
        };
        compare(&figure, vmms, report, boot, sample);
    }

    /// iperf3 between the guest and this host, over one TCP connection.
    fn iperf3(&self, vmms: &[Vmm], report: &mut Report) {
        let figure = Figure {
            bench: "linux_iperf3",
            cases: &[("guest to host", "Gb/s"), ("host to guest", "Gb/s")],
            rounds: self.rounds(5, vmms),
        };
        let time = match self.ground.effort {
            Effort::Full => "--omit 1 --time 3",
            Effort::Smoke => "--time 1",
        };
        let boot = |vmm: Vmm| {
            // One network for each, of those for benchmarks (RFC 2544); other groups have the first ones.
            let number = 16 + vmms.iter().position(|other| *other == vmm).unwrap_or(0);
            let (host, address) = (format!("198.18.{number}.1"), format!("198.18.{number}.2"));
            let tap = Tap::create(vmm, &format!("bench-{number}"), &host);
            let mut guest = self.boot(vmm, None, Some(tap));
            guest.run(&format!("ip address add {address}/24 dev eth0 && ip link set eth0 up"));
            let program = self.ground.on_path("iperf3").expect("iperf3 is not on PATH: run scripts/bench");
            let arguments = ["--server", "--bind", &host, "--forceflush"].map(AsRef::as_ref);
            let mut server = Process::start(&program, &arguments);
            server.wait_for("Server listening", 1, PATIENCE);
            (guest, server, host)
        };
        let sample = |_, (guest, _, host): &mut (Guest, Process, String), case: usize| {
            let direction = ["", "--reverse"][case];
            let told = guest.json(&format!("chroot /mnt iperf3 --client {host} {time} {direction} --json"));
            number(&told, "/end/sum_received/bits_per_second") / 1e9
        };
        compare(&figure, vmms, report, boot, sample);
    }

    /// Boots a guest with two processors that has the programs, and these.
    fn boot(&self, vmm: Vmm, disk: Option<&Path>, tap: Option<Tap>) -> Guest {
        let reports = self.directory.join(format!("report-{}", vmm.who()));
        let mut disks = vec![
            Disk { path: self.image.programs.clone(), is_writable: false },
            Disk { path: reports.clone(), is_writable: true },
        ];
        disks.extend(disk.map(|path| Disk { path: path.to_owned(), is_writable: true }));
        let plan = Plan { vmm, vcpus: 2, memory_mib: 512, disks, tap };
        Guest::boot(&reports, || plan.boot(self.ground, &self.image, self.directory))
    }
}

/// A figure of a report, which is above zero.
fn number(report: &Value, pointer: &str) -> f64 {
    let found = report.pointer(pointer).and_then(Value::as_f64).filter(|found| *found > 0.0);
    found.unwrap_or_else(|| panic!("no {pointer} above 0 in {report}"))
}

/// Written, because holes would be read faster than data.
fn write_disk(path: &Path, bytes: u64) {
    let mut file = File::create(path).unwrap();
    let block: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    for _ in 0..bytes / block.len() as u64 {
        file.write_all(&block).unwrap();
    }
    file.sync_all().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip is installed");
    assert!(status.success(), "ip {arguments}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_fails_loses_its_own_rows_only() {
        let figure = Figure { bench: "b", cases: &[("one", "ms"), ("two", "ms")], rounds: 3 };
        let vmms = [Vmm::Toft, Vmm::Qemu, Vmm::Firecracker, Vmm::CloudHypervisor];
        let mut report = Report::default();
        let prepare = |vmm| match vmm {
            Vmm::Firecracker => panic!("it does not start"),
            _ => 0,
        };
        let sample = |vmm, taken: &mut usize, case| {
            *taken += 1;
            assert!(vmm != Vmm::CloudHypervisor || *taken < 4, "it ends early");
            (case + 1) as f64
        };
        compare(&figure, &vmms, &mut report, prepare, sample);
        let rows: Value = serde_json::from_str(&report.json()).unwrap();
        let rows: Vec<_> = rows.as_array().unwrap().iter().collect();
        let named: Vec<_> = rows.iter().map(|row| [&row["case"], &row["who"], &row["n"]]).collect();
        let expected = [("one", "toft"), ("one", "qemu"), ("two", "toft"), ("two", "qemu")];
        assert_eq!(named.len(), expected.len(), "{named:?}");
        for (found, (case, who)) in named.iter().zip(expected) {
            assert_eq!(*found, [&Value::from(case), &Value::from(who), &Value::from(3)]);
        }
        let table = report.table("");
        assert!(!report.is_whole() && table.contains("not measured: b of firecracker"), "{table}");
        assert!(table.contains("not measured: b of cloud-hypervisor"), "{table}");
    }
}
