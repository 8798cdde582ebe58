//! `memory`: what a VMM holds besides its guest's memory, and what a server more is charged for in its control group,
//! kernel memory included, beside QEMU's. The guest is the probe, halted: 128 MiB, one disk, one interface.
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use sys::tap::Tap;

use crate::disk::q35;
use crate::ground::Ground;
use crate::groups::Group;
use crate::process::Process;
use crate::rows::{Report, Series};
use crate::vmm_driver::{Machine, PATIENCE, Vmm, program};

/// Also QEMU's, in `q35`.
const MEMORY_KB: u64 = 128 << 10;

const WORDS: &str = "halt";

/// What the probe says first.
const GREETING: &str = "probe:";

/// What a subject holds is told when it has not changed for so long.
const IDLE: Duration = Duration::from_millis(500);

/// Servers at once of each subject. QEMU's take seconds to end, and fewer tell the slope as well.
const SERVERS: [usize; 2] = [100, 20];

/// A server that runs until it is dropped.
enum Server {
    Toft(Box<Vmm>),
    Qemu(Box<Process>),
}

impl Server {
    fn toft(ground: &Ground, disk: &Path, number: usize) -> Server {
        let mut machine = Machine::new(&ground.probe(), WORDS);
        machine.spec.memory_bytes = MEMORY_KB << 10;
        machine.disk(File::options().read(true).write(true).open(disk).unwrap(), |_| ());
        let tap = Tap::create(&format!("bench-t{number}")).unwrap();
        machine.nic(std::os::fd::OwnedFd::from(tap).into());
        let mut vmm = Vmm::boot(machine);
        vmm.wait_for_times(GREETING, 1);
        Server::Toft(Box::new(vmm))
    }

    fn qemu(ground: &Ground, disk: &Path, number: usize) -> Server {
        let more = [
            "-drive".to_owned(),
            format!("if=none,id=d,file={},format=raw,aio=io_uring,file.locking=off", disk.display()),
            "-device".to_owned(),
            "virtio-blk-pci,drive=d,disable-legacy=on".to_owned(),
            "-netdev".to_owned(),
            format!("tap,id=n,ifname=bench-q{number},script=no,downscript=no,vhost=off"),
            "-device".to_owned(),
            "virtio-net-pci,netdev=n,disable-legacy=on,romfile=".to_owned(),
        ];
        let arguments = q35(ground, WORDS, &more);
        let arguments: Vec<_> = arguments.iter().map(std::ffi::OsStr::new).collect();
        let mut process = Process::start(&ground.qemu(), &arguments);
        process.wait_for(GREETING, 1, PATIENCE);
        Server::Qemu(Box::new(process))
    }

    /// Private dirty and resident KiB once it idles.
    fn held_kb(&self) -> (f64, f64) {
        let (mut held, mut since) = (self.held_now_kb(), Instant::now());
        let begun = since;
        while since.elapsed() < IDLE {
            assert!(begun.elapsed() < PATIENCE, "what it holds changes all the time");
            std::thread::sleep(Duration::from_millis(20));
            let now = self.held_now_kb();
            if now != held {
                (held, since) = (now, Instant::now());
            }
        }
        held
    }

    /// The same at this moment, of all mappings but the guest's memory, which is told by its size.
    fn held_now_kb(&self) -> (f64, f64) {
        let pid = match self {
            Server::Toft(vmm) => vmm.pid(),
            Server::Qemu(process) => process.pid,
        };
        let text = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a process that lives");
        let (mut dirty_kb, mut rss_kb, mut is_guest) = (0, 0, false);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(name), Some(Ok(kb))) = (words.next(), words.next().map(str::parse::<u64>)) else {
                continue;
            };
            match name {
                "Size:" => is_guest = kb == MEMORY_KB,
                "Rss:" if !is_guest => rss_kb += kb,
                "Private_Dirty:" if !is_guest => dirty_kb += kb,
                _ => (),
            }
        }
        (dirty_kb as f64, rss_kb as f64)
    }
}

type Start = fn(&Ground, &Path, usize) -> Server;

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let directory = tempfile::tempdir_in(&ground.files).unwrap();
    let disk = directory.path().join("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    // Pages of a program that was just built count as dirty until they are on the disk.
    File::open(program()).unwrap().sync_all().unwrap();
    let subjects: [(&str, Start); 2] = [("toft", Server::toft), ("qemu", Server::qemu)];
    let mut each_kb = Vec::new();
    for ((who, start), servers) in subjects.into_iter().zip(SERVERS) {
        let (mut dirty, mut rss) = (Vec::new(), Vec::new());
        for _ in 0..ground.samples(5, 1) {
            let (dirty_kb, rss_kb) = start(ground, &disk, 0).held_kb();
            dirty.push(dirty_kb);
            rss.push(rss_kb);
        }
        let mut add =
            |case, samples: &[f64]| report.add(Series { bench: "memory", case, who, unit: "kB" }, samples);
        let (dirty_kb, rss_kb) = (add("private_dirty_kb", &dirty), add("rss_kb", &rss));
        let slope_kb = slope_kb(ground.samples(servers, 2), |number| start(ground, &disk, number));
        each_kb.push(add("cgroup_kb", &[slope_kb]));
        if who == "toft" {
            report.bar(&format!("{dirty_kb:.0} kB of private dirty memory, at most 300"), dirty_kb <= 300.0);
            report.bar(&format!("{rss_kb:.0} kB resident, at most 2500"), rss_kb <= 2500.0);
        }
    }
    let ratio = each_kb[1] / each_kb[0];
    report.bar(&format!("a server is charged 1/{ratio:.1} of QEMU's, at most 1/8"), ratio >= 8.0);
}

/// KiB that a control group is charged for each server more, as the slope of a straight line through all counts.
fn slope_kb(servers: usize, start: impl Fn(usize) -> Server) -> f64 {
    let inside = Inside::join();
    let mut running = Vec::new();
    let mut points = Vec::new();
    for number in 1..=servers {
        running.push(start(number));
        points.push((number as f64, inside.0.charged_kb()));
    }
    let count = points.len() as f64;
    let mean = |part: fn(&(f64, f64)) -> f64| points.iter().map(part).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let above: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    let below: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    above / below
}

/// A control group for memory in which this thread is, and whatever it starts. It goes when it is dropped, after them.
struct Inside(Group);

impl Inside {
    fn join() -> Inside {
        let group = Group::make("memory");
        group.joining().write_all(b"0").expect("the group can be joined");
        Inside(group)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = self.0.leaving().write_all(b"0");
    }
}
