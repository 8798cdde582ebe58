//! How much memory servers may have, and whether another machine fits. Memory is never promised twice.
//! CPUs are shared, so they are counted and not refused.
use model::Code;
use rusqlite::Connection;

use super::limits;
use super::record::{self, ServerRecord};
use crate::error::{Error, Result};

/// Memory that servers may have in all.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// In bytes.
    pub memory_bytes: u64,
}

impl Capacity {
    /// As the operator says, else the host's memory less what the host needs for itself.
    pub fn of_host(configured: Option<u64>) -> Result<Capacity> {
        if let Some(memory_bytes) = configured {
            return Ok(Capacity { memory_bytes });
        }
        let text = std::fs::read_to_string("/proc/meminfo")
            .map_err(|cause| Error::internal("the host's memory cannot be read", cause))?;
        let total_kib: u64 = text
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok())
            .unwrap_or_default();
        let total_bytes = total_kib.saturating_mul(1024);
        let reserve_bytes =
            limits::HOST_RESERVE_BYTES.saturating_add(total_bytes / limits::HOST_RESERVE_PART);
        Ok(Capacity { memory_bytes: total_bytes.saturating_sub(reserve_bytes) })
    }

    /// Promises memory to the record's next machine. Fails with `no_capacity`.
    pub fn admit(&self, connection: &Connection, record: &mut ServerRecord) -> Result<()> {
        check(record.name.as_str(), record.memory_bytes, self.left(connection, record)?)?;
        // The guest of a memory that came from elsewhere goes on with what it found there.
        let goes_on = record.life.saved.is_some();
        let record::Held { tsc_khz, features, .. } = std::mem::take(&mut record.held);
        record.held = record::Held {
            memory_bytes: record.memory_bytes,
            vcpus: record.vcpus,
            cpu: Some(record.cpu.clone()),
            tsc_khz: tsc_khz.filter(|_| goes_on),
            features: features.filter(|_| goes_on),
            below: Vec::new(),
        };
        Ok(())
    }

    /// Whether a machine of this much memory would fit if there were no other. Fails with `no_capacity`.
    pub(crate) fn could_hold(&self, name: &str, memory_bytes: u64) -> Result<()> {
        check(name, memory_bytes, self.memory_bytes)
    }

    /// Whether a machine of this much memory that is not here yet would fit. Fails with `no_capacity`.
    pub(crate) fn fits(&self, connection: &Connection, name: &str, memory_bytes: u64) -> Result<()> {
        let (held, _) = record::held(connection, None)?;
        check(name, memory_bytes, self.memory_bytes.saturating_sub(held))
    }

    /// Memory that nobody but this server holds, in bytes.
    pub fn left(&self, connection: &Connection, record: &ServerRecord) -> Result<u64> {
        let (others, _) = record::held(connection, Some(record.id))?;
        Ok(self.memory_bytes.saturating_sub(others))
    }
}

fn check(name: &str, memory_bytes: u64, left: u64) -> Result<()> {
    const MIB: u64 = 1 << 20;
    let needed = memory_bytes.saturating_add(limits::VMM_OVERHEAD_BYTES);
    if needed <= left {
        return Ok(());
    }
    Err(Error::new(
        Code::NoCapacity,
        format!(
            "server {name} needs {} MiB of memory and {} MiB are left; stop or delete servers, or ask for less",
            needed.div_ceil(MIB),
            left / MIB
        ),
    ))
}
