//! Counters of a machine as callers see them. It asks the VMM and keeps nothing.
use model::server::{DiskMetrics, NicMetrics, ServerMetrics, SettlingMetrics};
use model::{Code, ServerId};
use wire::control::{Command, MachineStats, Reply};
use wire::settling::MemoryStatus;

use super::{Servers, limits, live, settle};
use crate::error::{Error, Result};
use crate::vmms::ProcessId;

impl Servers {
    /// Counters of its machine. Fails with `wrong_state` when none runs.
    pub async fn metrics(&self, id: ServerId) -> Result<ServerMetrics> {
        let (entry, process) = self.machine(id, "measure").await?;
        let link = entry.link(limits::COMMAND).await.map_err(Error::from)?;
        match link.ask(Command::Stats, &[], limits::COMMAND).await.map_err(Error::from)? {
            Reply::Stats(stats) => {
                // One that cannot say shows what it can.
                let (memory, owed) =
                    tokio::join!(settle::memory(&link, limits::COMMAND), live::owed_bytes(&link));
                let memory = memory.ok().flatten().unwrap_or_default();
                Ok(shown(&stats, memory, owed.ok(), &process.id()))
            }
            other => Err(Error::new(Code::MachineFailed, format!("the VMM answered {other:?}"))),
        }
    }
}

const NS_PER_MS: u64 = 1_000_000;

/// As callers see them.
fn shown(
    stats: &MachineStats,
    memory: MemoryStatus,
    owed_bytes: Option<u64>,
    process: &ProcessId,
) -> ServerMetrics {
    let disk_faults: u64 = stats.disks.iter().map(|disk| disk.malformed).sum();
    let nic_faults: u64 = stats.nics.iter().map(|nic| nic.malformed).sum();
    ServerMetrics {
        running_ms: stats.running_ns / NS_PER_MS,
        resets: stats.resets,
        vcpu_cpu_ms: stats.vcpus.iter().map(|vcpu| vcpu.cpu_ns / NS_PER_MS).collect(),
        vcpu_exits: stats.vcpus.iter().map(|vcpu| vcpu.exits).collect(),
        memory_resident_bytes: resident_bytes(process.pid).unwrap_or_default(),
        memory_shared_bytes: memory.shared_bytes,
        memory_owed_bytes: owed_bytes,
        settling: memory.settling.map(|settling| SettlingMetrics {
            pauses: settling.pauses,
            longest_pause_us: settling.longest_pause_us,
            paused_us: settling.paused_us,
            total_us: settling.total_us,
        }),
        disks: stats
            .disks
            .iter()
            .map(|disk| DiskMetrics {
                reads: disk.reads,
                read_bytes: disk.read_bytes,
                writes: disk.writes,
                written_bytes: disk.written_bytes,
                flushes: disk.flushes,
                discards: disk.discards,
                errors: disk.errors,
                throttled: disk.throttled,
            })
            .collect(),
        nics: stats
            .nics
            .iter()
            .map(|nic| NicMetrics {
                rx_packets: nic.rx_packets,
                rx_bytes: nic.rx_bytes,
                tx_packets: nic.tx_packets,
                tx_bytes: nic.tx_bytes,
                rx_dropped: nic.rx_dropped,
                tx_dropped: nic.tx_dropped,
                throttled: nic.throttled,
            })
            .collect(),
        balloon_bytes: stats.balloon.actual_bytes,
        reported_bytes: stats.balloon.reported_bytes,
        device_faults: disk_faults.saturating_add(nic_faults).saturating_add(stats.balloon.malformed),
    }
}

/// `VmRSS` of `/proc/<pid>/status` (proc_pid_status(5)).
fn resident_bytes(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
