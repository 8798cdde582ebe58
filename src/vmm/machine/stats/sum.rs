//! Counters of a machine that several processes have run, one after the other. Pure.
use wire::control::{BalloonStats, DiskStats, MachineStats, NicStats, VcpuStats};

/// What this process counted and what was counted before. Sizes that are not counts are those of this moment, and so is
/// the console's total: it is a position in a file.
pub(super) fn with_before(here: MachineStats, before: &MachineStats) -> MachineStats {
    MachineStats {
        running_ns: here.running_ns.saturating_add(before.running_ns),
        resets: here.resets.saturating_add(before.resets),
        vcpus: each(here.vcpus, &before.vcpus, vcpu),
        disks: each(here.disks, &before.disks, disk),
        nics: each(here.nics, &before.nics, nic),
        balloon: BalloonStats {
            target_bytes: here.balloon.target_bytes,
            actual_bytes: here.balloon.actual_bytes,
            reported_bytes: here.balloon.reported_bytes.saturating_add(before.balloon.reported_bytes),
            malformed: here.balloon.malformed.saturating_add(before.balloon.malformed),
        },
        rng_bytes: here.rng_bytes.saturating_add(before.rng_bytes),
        rng_malformed: here.rng_malformed.saturating_add(before.rng_malformed),
        console_written: here.console_written,
        unclaimed_accesses: here.unclaimed_accesses.saturating_add(before.unclaimed_accesses),
    }
}

fn each<T: Default>(here: Vec<T>, before: &[T], sum: impl Fn(T, &T) -> T) -> Vec<T> {
    let none = T::default();
    here.into_iter().enumerate().map(|(at, one)| sum(one, before.get(at).unwrap_or(&none))).collect()
}

fn vcpu(here: VcpuStats, before: &VcpuStats) -> VcpuStats {
    VcpuStats {
        exits: here.exits.saturating_add(before.exits),
        cpu_ns: here.cpu_ns.saturating_add(before.cpu_ns),
    }
}

fn disk(here: DiskStats, before: &DiskStats) -> DiskStats {
    DiskStats {
        reads: here.reads.saturating_add(before.reads),
        read_bytes: here.read_bytes.saturating_add(before.read_bytes),
        writes: here.writes.saturating_add(before.writes),
        written_bytes: here.written_bytes.saturating_add(before.written_bytes),
        flushes: here.flushes.saturating_add(before.flushes),
        discards: here.discards.saturating_add(before.discards),
        errors: here.errors.saturating_add(before.errors),
        malformed: here.malformed.saturating_add(before.malformed),
        throttled: here.throttled.saturating_add(before.throttled),
    }
}

fn nic(here: NicStats, before: &NicStats) -> NicStats {
    NicStats {
        rx_packets: here.rx_packets.saturating_add(before.rx_packets),
        rx_bytes: here.rx_bytes.saturating_add(before.rx_bytes),
        tx_packets: here.tx_packets.saturating_add(before.tx_packets),
        tx_bytes: here.tx_bytes.saturating_add(before.tx_bytes),
        rx_dropped: here.rx_dropped.saturating_add(before.rx_dropped),
        tx_dropped: here.tx_dropped.saturating_add(before.tx_dropped),
        malformed: here.malformed.saturating_add(before.malformed),
        throttled: here.throttled.saturating_add(before.throttled),
    }
}
