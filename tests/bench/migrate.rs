//! `migrate_ms`, `blackout_ms` and `gap_ms`: a machine of 2 GiB whose guest has written 1.75 GiB moves between jailed VMMs over TCP
//! on loopback, again and again, beside a bare program that moves as many pages over as many streams.
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Instant;

use wire::migration::{Phase, SendLimits};

use crate::gaps::{self, REPORT_MS, Stood, TICKS};
use crate::ground::{Effort, Ground};
use crate::rows::{Report, Series};
use crate::vmm_driver::{Machine, Vmm};

/// As many as the smallest machine has processors.
const STREAMS: usize = 2;

/// How long a guest that does next to nothing may stand still, in milliseconds.
pub(crate) const IDLE_DOWNTIME_MS: u32 = 10;

/// How long a guest that writes may stand still, in milliseconds.
const BUSY_DOWNTIME_MS: u32 = 50;

struct Size {
    memory_mib: u64,
    written_mib: u64,
}

/// What some moves took.
#[derive(Default)]
struct Moves {
    whole_ms: Vec<f64>,
    stood: Stood,
    rounds: u32,
}

/// What Cloud Hypervisor's single stream took at best for the same machine on the development machine, where it was built by hand. It is
/// on record, not measured here.
const CLOUD_HYPERVISOR_MS: f64 = 5900.0;

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let size = match ground.effort {
        Effort::Full => Size { memory_mib: 2048, written_mib: 1792 },
        Effort::Smoke => Size { memory_mib: 128, written_mib: 64 },
    };
    let series = |bench, case, who| Series { bench, case, who, unit: "ms" };
    let mib = size.written_mib;

    let fill = format!("dirty={mib},0,6000 {TICKS}");
    let mut vmm = Vmm::boot(machine(ground, &size, &fill));
    vmm.wait_for_console("probe: dirty ok");
    let (mut idle, mut mover_ms) = (Moves::default(), Vec::new());
    for _ in 0..ground.samples(11, 1) {
        have_memory(2 * mib);
        mover_ms.push(mover(ground, mib, None));
        have_memory(2 * mib);
        idle.hop(&mut vmm, machine(ground, &size, &fill), IDLE_DOWNTIME_MS);
    }
    drop(vmm);
    let toft = report.add(series("migrate_ms", "idle", "toft"), &idle.whole_ms);
    let mover = report.add(series("migrate_ms", "idle", "mover"), &mover_ms);
    let ratio = mover / toft;
    report.add(Series { unit: "", ..series("migrate_ratio", "idle", "toft") }, &[ratio]);
    report.bar(&format!("migrate_ratio: {ratio:.2} of mover (wanted: at least 0.8)"), ratio >= 0.8);
    let text = format!(
        "migrate_ms idle: {toft:.0} ms (wanted: at most {:.0}, half of what Cloud Hypervisor took on the development machine)",
        CLOUD_HYPERVISOR_MS / 2.0
    );
    report.bar(&text, toft <= CLOUD_HYPERVISOR_MS / 2.0);
    idle.stood.tell(report, "idle", IDLE_DOWNTIME_MS.into());

    let small = Size { memory_mib: 128, written_mib: 64 };
    let fill = format!("dirty=64,0,100 {TICKS}");
    let mut vmm = Vmm::boot(machine(ground, &small, &fill));
    vmm.wait_for_console("probe: dirty ok");
    let mut idle = Moves::default();
    for _ in 0..ground.samples(100, 2) {
        idle.hop(&mut vmm, machine(ground, &small, &fill), IDLE_DOWNTIME_MS);
    }
    drop(vmm);
    idle.stood.tell(report, "idle, 128 MiB", IDLE_DOWNTIME_MS.into());

    let rate_mib_per_s = (mib as f64 / (mover / 1e3) / 2.0) as u64;
    let small = Size { memory_mib: 256, written_mib: 192 };
    let cases =
        [("half the wire's rate", &size, (11, 1)), ("half the wire's rate, 256 MiB", &small, (100, 2))];
    for (case, size, (full, smoke)) in cases {
        let words = format!("dirty={},{rate_mib_per_s},,{REPORT_MS}", size.written_mib);
        let mut vmm = Vmm::boot(machine(ground, size, &words));
        // When it has been through its memory, and three seconds at least.
        let pass_ms = size.written_mib * 1000 / rate_mib_per_s.max(1) * 5 / 4;
        vmm.wait_for_times("dirty pass", (pass_ms.max(3000) / u64::from(REPORT_MS)) as usize);
        let mut busy = Moves::default();
        for _ in 0..ground.samples(full, smoke) {
            busy.hop(&mut vmm, machine(ground, size, &words), BUSY_DOWNTIME_MS);
        }
        report.add(series("migrate_ms", case, "toft"), &busy.whole_ms);
        busy.stood.tell(report, case, BUSY_DOWNTIME_MS.into());
        let rounds = f64::from(busy.rounds) / busy.whole_ms.len() as f64;
        report.note(format!("{case}: {rate_mib_per_s} MiB/s, {rounds:.1} rounds a move"));
    }
}

fn machine(ground: &Ground, size: &Size, words: &str) -> Machine {
    let mut machine = Machine::new(&ground.probe(), words);
    machine.spec.memory_bytes = size.memory_mib << 20;
    machine
}

impl Moves {
    /// Moves the machine into a new VMM, which takes the place of the old one.
    fn hop(&mut self, vmm: &mut Vmm, machine: Machine, downtime_ms: u32) {
        self.stood.look_before(|| vmm.console());
        let (near, far) = streams();
        let mut next = Vmm::start();
        next.try_receive(machine, far).unwrap();
        let since_ns = gaps::last_ns(&vmm.console());
        let begun = Instant::now();
        vmm.try_send(near, SendLimits { downtime_ms, bandwidth_bytes_per_s: None, ..SendLimits::default() })
            .unwrap();
        let status = vmm.wait_for_move("the end of the move", |status| status.phase.is_end());
        self.whole_ms.push(begun.elapsed().as_secs_f64() * 1e3);
        assert_eq!(status.phase, Phase::Moved, "{status:?}");
        self.stood.blackout_ms.push(status.progress.downtime_us as f64 / 1e3);
        self.rounds += status.progress.rounds;
        // The target's console has the source's lines, too.
        self.stood.look_after(since_ns, || next.console());
        *vmm = next;
    }
}

/// Both ends of connected streams.
fn streams() -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = |_| {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        near.set_nodelay(true).and_then(|()| far.set_nodelay(true)).unwrap();
        (near.into(), far.into())
    };
    (0..STREAMS).map(pair).unzip()
}

/// How long the bare program takes for so much memory, in milliseconds; to an address of the network of a process, or over
/// loopback.
pub(crate) fn mover(ground: &Ground, mib: u64, to: Option<(u32, IpAddr)>) -> f64 {
    let mut command = Command::new(ground.mover());
    command.args([mib.to_string(), STREAMS.to_string()]);
    if let Some((process, address)) = to {
        command.args([format!("/proc/{process}/ns/net"), address.to_string()]);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().unwrap_or_else(|_| panic!("mover: {}", String::from_utf8_lossy(&output.stderr)))
}

/// Takes so much memory and gives it back. Where this machine is a guest itself, memory that has been free for some seconds may
/// have gone back to its host, and costs whoever takes it first three times as much: not so what is measured right after this.
pub(crate) fn have_memory(mib: u64) {
    drop(std::hint::black_box(vec![1_u8; (mib << 20) as usize]));
}
