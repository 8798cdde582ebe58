//! `upgrade_ms` and `upgrade_blackout_ms`: a machine goes from one jailed VMM to another on the same host with its memory where
//! it is, again and again. How long its guest does nothing is read off its console, on which it writes each millisecond.
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use wire::console::Ring;
use wire::migration::Phase;

use crate::ground::{Effort, Ground};
use crate::host::{Host, id, server};
use crate::rows::{Report, Series};
use crate::vmm_driver::{Machine, PATIENCE, Vmm};

/// How often the console is looked at.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// What the bar allows, in milliseconds.
const BLACKOUT_MS_MAX: f64 = 20.0;

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let sizes = match ground.effort {
        Effort::Full => [("128 MiB", 128, 64), ("2 GiB", 2048, 1792)],
        Effort::Smoke => [("64 MiB", 64, 16), ("128 MiB", 128, 64)],
    };
    let mut stood = Vec::new();
    for (case, memory_mib, written_mib) in sizes {
        let series = |bench, case| Series { bench, case, who: "toft", unit: "ms" };
        let words = format!("dirty={written_mib},0,6000 ticks=1000000000,1");
        let machine = || {
            let mut machine = Machine::new(&ground.probe(), &words);
            machine.spec.memory_bytes = memory_mib << 20;
            machine
        };
        let mut vmm = Vmm::boot(machine());
        vmm.wait_for_console("tick 3 ");
        let (mut whole_ms, mut blackout_ms, mut undisturbed_ms) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ground.samples(100, 2) {
            let watcher = Watcher::start(vmm.ring());
            ticks_on(vmm.ring(), 20);
            undisturbed_ms.push(watcher.longest_gap_ms());
            let (next, whole, blackout) = hand_over(&mut vmm, machine());
            vmm = next;
            whole_ms.push(whole);
            blackout_ms.push(blackout);
        }
        report.add(series("upgrade_ms", case), &whole_ms);
        report.add(series("upgrade_gap_ms", case), &undisturbed_ms);
        stood.push(report.add(series("upgrade_blackout_ms", case), &blackout_ms));
    }
    let through_api = through_the_api(ground, report, sizes);
    let text = format!(
        "upgrade_blackout_ms through the API: {through_api:.1} ms (wanted: at most {BLACKOUT_MS_MAX})"
    );
    report.bar(&text, through_api <= BLACKOUT_MS_MAX);
    for ((case, ..), stood) in sizes.into_iter().zip(&stood) {
        let text = format!("upgrade_blackout_ms {case}: {stood:.1} ms (wanted: at most {BLACKOUT_MS_MAX})");
        report.bar(&text, *stood <= BLACKOUT_MS_MAX);
    }
}

/// The same of servers, by one call of the API each. Answers the largest blackout.
fn through_the_api(ground: &Ground, report: &mut Report, sizes: [(&'static str, u64, u64); 2]) -> f64 {
    let host = Host::start(ground);
    let mut largest = 0.0;
    for (case, memory_mib, written_mib) in sizes {
        let api_case = api_case(case);
        let words = format!("dirty={written_mib},0,6000 ticks=1000000000,1");
        let name = case.to_lowercase().replace(' ', "-");
        host.import(ground, &name, &words);
        let mut spec = server(&name);
        spec["image"] = json!(name);
        spec["memory_bytes"] = json!(memory_mib << 20);
        let server = id(&host.local().call("POST", "/v1/servers", Some("wait=30"), Some(&spec)));
        let ring = || std::fs::File::open(host.ring(&server)).expect("its console");
        ticks_on(ring(), 200);
        let (mut whole_ms, mut blackout_ms) = (Vec::new(), Vec::new());
        for _ in 0..ground.samples(30, 2) {
            let watcher = Watcher::start(ring());
            ticks_on(ring(), 20);
            let path = format!("/v1/servers/{server}/actions/upgrade-vmm");
            let began = Instant::now();
            let answer = host.local().call("POST", &path, Some("wait=30"), None);
            whole_ms.push(began.elapsed().as_secs_f64() * 1e3);
            assert_eq!(answer["operation"]["state"], "succeeded", "{answer}\n{}", host.told());
            ticks_on(ring(), 5);
            blackout_ms.push(watcher.longest_gap_ms());
        }
        let series = |bench| Series { bench, case: api_case, who: "toft", unit: "ms" };
        report.add(series("upgrade_ms"), &whole_ms);
        largest = f64::max(largest, report.add(series("upgrade_blackout_ms"), &blackout_ms));
    }
    largest
}

fn api_case(case: &str) -> &'static str {
    match case {
        "2 GiB" => "2 GiB, API",
        "128 MiB" => "128 MiB, API",
        _ => "64 MiB, API",
    }
}

/// Gives the machine to a new VMM. Answers that one, how long it took from asking for the handles until it has the
/// machine, and for how long the guest wrote nothing, both in milliseconds.
fn hand_over(vmm: &mut Vmm, machine: Machine) -> (Vmm, f64, f64) {
    let mut next = Vmm::start();
    let watcher = Watcher::start(vmm.ring());
    let began = Instant::now();
    let handles = vmm.handles().unwrap();
    let (near, far): (OwnedFd, OwnedFd) =
        UnixStream::pair().map(|(near, far)| (near.into(), far.into())).unwrap();
    next.try_take_over(machine, vmm, &handles, far).unwrap();
    vmm.try_hand_over(&near).unwrap();
    let status = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
    let whole_ms = began.elapsed().as_secs_f64() * 1e3;
    assert_eq!(status.phase, Phase::Moved, "{status:?}");
    ticks_on(next.ring(), 5);
    (next, whole_ms, watcher.longest_gap_ms())
}

/// Waits for so many ticks more, or as much as they are. The console keeps too few to count them.
fn ticks_on(ring: File, more: u64) {
    const TICK_BYTES: u64 = 40;
    let (mut ring, deadline) = (Ring::open(ring).unwrap(), Instant::now() + PATIENCE);
    let wanted = ring.written() + more * TICK_BYTES;
    while ring.refresh().unwrap() < wanted {
        assert!(Instant::now() < deadline, "the guest does not go on");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A thread that looks at a console.
struct Watcher {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Watcher {
    fn start(ring: File) -> Watcher {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut ring, stopped) = (Ring::open(ring).unwrap(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let (mut written, mut since, mut longest) = (ring.written(), Instant::now(), Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) {
                let now_written = ring.refresh().unwrap();
                if now_written != written {
                    longest = longest.max(since.elapsed());
                    (written, since) = (now_written, Instant::now());
                }
                std::thread::sleep(LOOK_EVERY);
            }
            longest
        });
        Watcher { stop, thread }
    }

    fn longest_gap_ms(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().as_secs_f64() * 1e3
    }
}
