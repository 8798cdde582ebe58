//! The host bridge at 00:00.0: an identity and nothing else. Guests look for a bridge before they believe that
//! there is a bus.
use std::time::Duration;

use super::config::{ConfigSpace, Identity};
use super::function::{Decoded, Function};
use crate::pause::NotDrained;

/// A host bridge without registers of its own.
pub struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// The bridge of a generic PCI Express host, as the PCI ID list knows it.
    pub fn new() -> HostBridge {
        let identity = Identity {
            vendor: 0x1B36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        HostBridge { config: ConfigSpace::new(identity) }
    }
}

impl Default for HostBridge {
    fn default() -> HostBridge {
        HostBridge::new()
    }
}

impl Function for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn write_config(&self, _offset: u16, _data: &[u8]) {}
    fn assign(&self, _address: u64) {}
    fn decoded(&self) -> Option<Decoded> {
        None
    }
    fn read_memory(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn write_memory(&self, _offset: u64, _data: &[u8]) {}
    fn pause(&self, _patience: Duration) -> Result<(), NotDrained> {
        Ok(())
    }
    fn resume(&self) {}
    fn ask_to_stop(&self) {}
    fn stop(&self) {}
}
