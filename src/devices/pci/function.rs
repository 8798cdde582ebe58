//! What a slot of the bus holds. A trait only: the root calls it with accesses that are already cut to size.
use std::time::Duration;

use crate::pause::NotDrained;

/// A function of the bus. Called by several vCPUs at once.
pub trait Function: Send + Sync {
    /// Reads configuration space; the access lies within one double word below 4096.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space; the access lies within one double word below 4096.
    fn write_config(&self, offset: u16, data: &[u8]);
    /// Points the memory BAR, if there is one, at `address`. Called before the guest runs.
    fn assign(&self, address: u64);
    /// The range of memory the function answers to at present.
    fn decoded(&self) -> Option<Decoded>;
    /// Reads at `offset` of the memory BAR.
    fn read_memory(&self, offset: u64, data: &mut [u8]);
    /// Writes at `offset` of the memory BAR.
    fn write_memory(&self, offset: u64, data: &[u8]);
    /// Takes nothing new and waits until nothing is in flight, for at most `patience`.
    fn pause(&self, patience: Duration) -> Result<(), NotDrained>;
    /// Goes on after [`Function::pause`], whether that succeeded or not.
    fn resume(&self);
    /// Begins what [`Function::stop`] ends. Returns at once, so that several functions can end side by side.
    fn ask_to_stop(&self);
    /// Ends what the function does for its driver, as a reset of the machine.
    fn stop(&self);
}

/// A range of memory that a function answers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoded {
    /// The first address.
    pub base: u64,
    /// Bytes.
    pub length: u64,
}
