//! IPv4 forwarding, switched on where NAT networks need it and nowhere else: on their bridges and on the devices
//! with a default route. The host-wide switch is never touched. What was switched on is recorded first, so that it
//! can be switched off again; `rules` keeps such a device from forwarding anything that is not Toft's.
//!
//! Where somebody has switched the whole host on, forwarding is their wish: nothing is recorded or restored.
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use crate::volumes::files::{self, Durability};

/// The record and the kernel's switches.
#[derive(Debug, Clone)]
pub(super) struct Forwarding {
    record: PathBuf,
    switches: PathBuf,
}

impl Forwarding {
    /// `record` is the file that remembers, `switches` is `/proc/sys/net/ipv4`.
    pub(super) fn new(record: PathBuf, switches: &Path) -> Forwarding {
        Forwarding { record, switches: switches.to_owned() }
    }

    /// Decides and records which of `uplinks` are to be switched on: those that are off, and those that this
    /// record switched on before.
    pub(super) fn plan(&self, uplinks: &[String]) -> io::Result<Vec<String>> {
        let recorded = self.recorded()?;
        if self.is_on("ip_forward")? {
            self.write_record(&BTreeSet::new())?;
            return Ok(Vec::new());
        }
        let mut planned = BTreeSet::new();
        for uplink in uplinks {
            if recorded.contains(uplink) || !self.is_on(&switch(uplink))? {
                planned.insert(uplink.clone());
            }
        }
        for gone in recorded.difference(&planned) {
            self.set(gone, "0")?;
        }
        self.write_record(&planned)?;
        Ok(planned.into_iter().collect())
    }

    /// Switches devices on.
    pub(super) fn switch_on(&self, devices: &[String]) -> io::Result<()> {
        devices.iter().try_for_each(|device| self.set(device, "1"))
    }

    /// Switches off what the record switched on, and forgets it.
    pub(super) fn restore(&self) -> io::Result<()> {
        if !self.is_on("ip_forward")? {
            self.recorded()?.iter().try_for_each(|device| self.set(device, "0"))?;
        }
        match std::fs::remove_file(&self.record) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(cause),
            _ => Ok(()),
        }
    }

    fn is_on(&self, name: &str) -> io::Result<bool> {
        Ok(std::fs::read_to_string(self.switches.join(name))?.trim() != "0")
    }

    /// A device that is gone has nothing to switch.
    fn set(&self, device: &str, value: &str) -> io::Result<()> {
        match std::fs::write(self.switches.join(switch(device)), value) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// One device a line: names of devices hold no white space.
    fn recorded(&self) -> io::Result<BTreeSet<String>> {
        match std::fs::read_to_string(&self.record) {
            Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
            Err(cause) => Err(cause),
        }
    }

    fn write_record(&self, devices: &BTreeSet<String>) -> io::Result<()> {
        let text: String = devices.iter().map(|device| format!("{device}\n")).collect();
        files::replace(&self.record, text.as_bytes(), Durability::Process)
    }
}

fn switch(device: &str) -> String {
    format!("conf/{device}/forwarding")
}

#[cfg(test)]
mod tests;
