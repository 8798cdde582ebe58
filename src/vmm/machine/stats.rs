//! What outlives a reset: counters, and the disks with their rings. Also the report made of the counters and of the
//! live parts. Counters only grow.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::virtio::balloon::BalloonStats;
use devices::virtio::block::{BlockStats, Disk};
use devices::virtio::net::NetStats;
use devices::virtio::rng::RngStats;
use wire::control::{self, MachineStats, VcpuStats};
use wire::machine::MachineSpec;

use super::parts::Parts;
use super::{Run, nanoseconds};
use crate::console::Console;
use crate::vcpu::Crew;

mod sum;

/// What one process keeps.
pub(super) struct Lasting {
    /// Opened once: when the sandbox is closed, no ring can be made.
    pub(super) drives: Vec<Disk>,
    pub(super) resets: u64,
    /// Time of the runs that have ended.
    ran_ns: u64,
    /// Counters of crews that have left.
    vcpus: Vec<VcpuStats>,
    pub(super) unclaimed: Arc<AtomicU64>,
    pub(super) disks: Vec<Arc<BlockStats>>,
    pub(super) nics: Vec<Arc<NetStats>>,
    pub(super) rng: Arc<RngStats>,
    pub(super) balloon: Arc<BalloonStats>,
    /// What the machine had done before this process took it over.
    pub(super) before: MachineStats,
}

impl Lasting {
    pub(super) fn new(spec: &MachineSpec, drives: Vec<Disk>) -> Lasting {
        Lasting {
            drives,
            resets: 0,
            ran_ns: 0,
            vcpus: vec![VcpuStats::default(); spec.vcpus.into()],
            unclaimed: Arc::default(),
            disks: spec.disks.iter().map(|_| Arc::default()).collect(),
            nics: spec.nics.iter().map(|_| Arc::default()).collect(),
            rng: Arc::default(),
            balloon: Arc::default(),
            before: MachineStats::default(),
        }
    }

    /// A run has ended.
    pub(super) fn count_run(&mut self, run: &Run) {
        self.ran_ns = self.ran_ns.saturating_add(current_ns(run));
    }

    /// A crew has left.
    pub(super) fn count_vcpus(&mut self, crew: &Crew) {
        self.vcpus = self.with(crew);
    }

    /// Everything there is to tell at this moment.
    pub(super) fn report(
        &self,
        run: &Run,
        parts: Option<&Parts>,
        spec: &MachineSpec,
        console: &Console,
    ) -> MachineStats {
        let here = MachineStats {
            running_ns: self.ran_ns.saturating_add(current_ns(run)),
            resets: self.resets,
            vcpus: parts.map_or_else(|| self.vcpus.clone(), |parts| self.with(&parts.crew)),
            disks: self.disks.iter().map(|disk| disk_stats(disk)).collect(),
            nics: self.nics.iter().map(|nic| nic_stats(nic)).collect(),
            balloon: control::BalloonStats {
                target_bytes: spec.balloon.target_bytes,
                actual_bytes: parts.map_or(0, |parts| parts.balloon.actual_bytes()),
                reported_bytes: load(&self.balloon.reported_bytes),
                malformed: load(&self.balloon.malformed),
            },
            rng_bytes: load(&self.rng.bytes),
            rng_malformed: load(&self.rng.malformed),
            console_written: console.written(),
            unclaimed_accesses: load(&self.unclaimed),
        };
        sum::with_before(here, &self.before)
    }

    fn with(&self, crew: &Crew) -> Vec<VcpuStats> {
        let sum = |(before, (exits, cpu_ns)): (&VcpuStats, (u64, u64))| VcpuStats {
            exits: before.exits.saturating_add(exits),
            cpu_ns: before.cpu_ns.saturating_add(cpu_ns),
        };
        self.vcpus.iter().zip(crew.counters()).map(sum).collect()
    }
}

fn current_ns(run: &Run) -> u64 {
    match run {
        Run::Running { since } => nanoseconds(since.elapsed()),
        Run::Paused { .. } => 0,
    }
}

fn disk_stats(stats: &BlockStats) -> control::DiskStats {
    control::DiskStats {
        reads: load(&stats.reads),
        read_bytes: load(&stats.read_bytes),
        writes: load(&stats.writes),
        written_bytes: load(&stats.written_bytes),
        flushes: load(&stats.flushes),
        discards: load(&stats.discards),
        errors: load(&stats.errors),
        malformed: load(&stats.malformed),
        throttled: load(&stats.throttled),
    }
}

fn nic_stats(stats: &NetStats) -> control::NicStats {
    control::NicStats {
        rx_packets: load(&stats.rx_packets),
        rx_bytes: load(&stats.rx_bytes),
        tx_packets: load(&stats.tx_packets),
        tx_bytes: load(&stats.tx_bytes),
        rx_dropped: load(&stats.rx_dropped),
        tx_dropped: load(&stats.tx_dropped),
        malformed: load(&stats.malformed),
        throttled: load(&stats.throttled),
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
