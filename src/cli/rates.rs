//! Limits of disks and interfaces as options of `toft server create` and `update`.
use clap::Args;
use model::server::{DiskLimits, NicLimits, PatchDiskLimits, PatchNicLimits, Rate, ServerNic};

use crate::target::{self, Limit};

/// Limits, each RATE or RATE:BURST; without a burst it is one second's worth.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits, each a rate per second or RATE:BURST")]
pub(crate) struct Limits {
    /// Bytes the root volume may move, such as 100M or 100M:500M.
    #[arg(long, value_name = "RATE", value_parser = target::byte_rate)]
    disk_bandwidth: Option<Rate>,
    /// Requests the root volume may take.
    #[arg(long, value_name = "RATE", value_parser = target::count_rate)]
    disk_operations: Option<Rate>,
    /// Bytes each interface may receive.
    #[arg(long, value_name = "RATE", value_parser = target::byte_rate, conflicts_with = "no_network")]
    nic_rx_bandwidth: Option<Rate>,
    /// Packets each interface may receive.
    #[arg(long, value_name = "RATE", value_parser = target::count_rate, conflicts_with = "no_network")]
    nic_rx_packets: Option<Rate>,
    /// Bytes each interface may send.
    #[arg(long, value_name = "RATE", value_parser = target::byte_rate, conflicts_with = "no_network")]
    nic_tx_bandwidth: Option<Rate>,
    /// Packets each interface may send.
    #[arg(long, value_name = "RATE", value_parser = target::count_rate, conflicts_with = "no_network")]
    nic_tx_packets: Option<Rate>,
}

/// Limits to change, each RATE, RATE:BURST or none.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Limits, each a rate per second, RATE:BURST, or none")]
pub(crate) struct NewLimits {
    /// Bytes the root volume may move.
    #[arg(long, value_name = "RATE", value_parser = target::byte_limit)]
    disk_bandwidth: Option<Limit>,
    /// Requests the root volume may take.
    #[arg(long, value_name = "RATE", value_parser = target::count_limit)]
    disk_operations: Option<Limit>,
    /// Bytes each interface may receive.
    #[arg(long, value_name = "RATE", value_parser = target::byte_limit)]
    nic_rx_bandwidth: Option<Limit>,
    /// Packets each interface may receive.
    #[arg(long, value_name = "RATE", value_parser = target::count_limit)]
    nic_rx_packets: Option<Limit>,
    /// Bytes each interface may send.
    #[arg(long, value_name = "RATE", value_parser = target::byte_limit)]
    nic_tx_bandwidth: Option<Limit>,
    /// Packets each interface may send.
    #[arg(long, value_name = "RATE", value_parser = target::count_limit)]
    nic_tx_packets: Option<Limit>,
}

impl NewLimits {
    pub(crate) fn disk(&self) -> Option<PatchDiskLimits> {
        let rate = |limit: Option<Limit>| limit.map(|limit| limit.0);
        let (bandwidth_bytes, operations) = (rate(self.disk_bandwidth), rate(self.disk_operations));
        let is_given = bandwidth_bytes.is_some() || operations.is_some();
        is_given.then_some(PatchDiskLimits { bandwidth_bytes, operations })
    }

    pub(crate) fn has_nics(&self) -> bool {
        let all = [self.nic_rx_bandwidth, self.nic_rx_packets, self.nic_tx_bandwidth, self.nic_tx_packets];
        all.iter().any(Option::is_some)
    }

    /// The limits of each interface, changed where they are to be.
    pub(crate) fn nics(&self, nics: &[ServerNic]) -> Vec<PatchNicLimits> {
        let changed = |nic: &ServerNic| {
            let pick = |new: Option<Limit>, now| new.map_or(now, |limit| limit.0);
            let limits = NicLimits {
                rx_bytes: pick(self.nic_rx_bandwidth, nic.limits.rx_bytes),
                rx_packets: pick(self.nic_rx_packets, nic.limits.rx_packets),
                tx_bytes: pick(self.nic_tx_bandwidth, nic.limits.tx_bytes),
                tx_packets: pick(self.nic_tx_packets, nic.limits.tx_packets),
            };
            PatchNicLimits { index: nic.index, limits }
        };
        nics.iter().map(changed).collect()
    }
}

impl Limits {
    pub(crate) fn disk(&self) -> DiskLimits {
        DiskLimits { bandwidth_bytes: self.disk_bandwidth, operations: self.disk_operations }
    }

    pub(crate) fn nic(&self) -> NicLimits {
        NicLimits {
            rx_bytes: self.nic_rx_bandwidth,
            rx_packets: self.nic_rx_packets,
            tx_bytes: self.nic_tx_bandwidth,
            tx_packets: self.nic_tx_packets,
        }
    }
}
