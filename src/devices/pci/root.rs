//! The root of the bus: 32 slots with one function each, reached by ECAM, by the two configuration ports and
//! through memory BARs. Lookups take no lock. `vmm` puts the three regions on its buses and pauses through it.
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use memory::layout::PCI_MMIO_START;

use super::bridge::HostBridge;
use super::function::{Decoded, Function};
use crate::bus::Region;
use crate::limits::PAUSE_MAX;
use crate::pause::NotDrained;

/// Devices on a conventional bus.
pub const SLOTS: usize = 32;

/// Why a function cannot be put into a slot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AttachError {
    /// The bus has no such slot.
    #[error("slot {0} is not below {SLOTS}")]
    NoSlot(u8),
    /// Something is there.
    #[error("slot {0} is taken")]
    Taken(u8),
}

/// The bus and what is on it. Clones share it.
#[derive(Clone)]
pub struct Root {
    shared: Arc<Shared>,
}

struct Shared {
    slots: [OnceLock<Arc<dyn Function>>; SLOTS],
    /// The configuration address register (port 0xCF8).
    address: AtomicU32,
}

impl Root {
    /// A bus with a host bridge in slot 0.
    pub fn new() -> Root {
        let slots = [const { OnceLock::new() }; SLOTS];
        let root = Root { shared: Arc::new(Shared { slots, address: AtomicU32::new(0) }) };
        // Slot 0 of a new bus is empty.
        let _ = root.attach(0, Arc::new(HostBridge::new()), 0);
        root
    }

    /// Puts `function` into `slot`, its memory BAR at `bar_address`.
    pub fn attach(&self, slot: u8, function: Arc<dyn Function>, bar_address: u64) -> Result<(), AttachError> {
        let place = self.shared.slots.get(usize::from(slot)).ok_or(AttachError::NoSlot(slot))?;
        function.assign(bar_address);
        place.set(function).map_err(|_| AttachError::Taken(slot))
    }

    /// The region of [`memory::layout::PCI_ECAM_START`].
    pub fn ecam(&self) -> Arc<dyn Region> {
        Arc::new(Ecam(self.clone()))
    }

    /// The region of the eight ports from [`memory::layout::PCI_CONFIG_PORT`].
    pub fn ports(&self) -> Arc<dyn Region> {
        Arc::new(Ports(self.clone()))
    }

    /// The region of [`PCI_MMIO_START`], in which BARs lie.
    pub fn window(&self) -> Arc<dyn Region> {
        Arc::new(Window(self.clone()))
    }

    /// The configuration address register.
    pub fn address(&self) -> u32 {
        self.shared.address.load(Ordering::Relaxed)
    }

    /// Sets the configuration address register; bits that do not exist are left out.
    pub fn set_address(&self, address: u32) {
        self.shared.address.store(address & ADDRESS_BITS, Ordering::Relaxed);
    }

    /// Pauses every function. When one cannot be drained, those before it go on and the error is returned.
    pub fn pause(&self) -> Result<(), NotDrained> {
        // Each has as long as it may ever take.
        self.pause_each(|| PAUSE_MAX)
    }

    /// The same, but waits for at most `patience` in all: what is in flight then may end later.
    pub fn pause_within(&self, patience: Duration) -> Result<(), NotDrained> {
        let deadline = Instant::now().checked_add(patience);
        self.pause_each(|| {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            left.unwrap_or(PAUSE_MAX).min(PAUSE_MAX)
        })
    }

    fn pause_each(&self, patience: impl Fn() -> Duration) -> Result<(), NotDrained> {
        for (count, function) in self.functions().enumerate() {
            if let Err(error) = function.pause(patience()) {
                // The one that failed holds back new work too.
                self.functions().take(count.saturating_add(1)).for_each(|function| function.resume());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Lets every function go on, in the reverse of the order they were paused in.
    pub fn resume(&self) {
        self.shared.slots.iter().rev().filter_map(OnceLock::get).for_each(|function| function.resume());
    }

    /// Ends what every function does, for the end of the machine. Returns when none touches guest memory. All end
    /// side by side, so that several disks that hang cost the time of one.
    pub fn stop(&self) {
        self.functions().for_each(|function| function.ask_to_stop());
        self.functions().for_each(|function| function.stop());
    }

    fn functions(&self) -> impl Iterator<Item = &Arc<dyn Function>> {
        self.shared.slots.iter().filter_map(OnceLock::get)
    }

    /// The function at a device and function number of bus 0. There is only function 0.
    fn at(&self, device: u32, function: u32) -> Option<&dyn Function> {
        let slot = self.shared.slots.get(usize::try_from(device).ok()?)?.get()?;
        (function == 0).then_some(slot.as_ref())
    }
}

impl Default for Root {
    fn default() -> Root {
        Root::new()
    }
}

/// Whether an access of `length` bytes lies within one double word and has a width a configuration cycle has.
fn is_one_cycle(offset: u64, length: usize) -> bool {
    matches!((length, offset % 4), (1, _) | (2, 0..=2) | (4, 0))
}

/// Memory-mapped configuration space of bus 0. An access is cut into double words from its start: an aligned quad
/// word makes two configuration cycles; pieces that cross a double word are undefined and make none.
struct Ecam(Root);

impl Ecam {
    /// The function and the register at `offset`.
    fn find(&self, offset: u64) -> Option<(&dyn Function, u16)> {
        let number = |shift: u32, mask: u64| u32::try_from((offset >> shift) & mask).ok();
        if offset >> 20 != 0 {
            return None;
        }
        let function = self.0.at(number(15, 0x1F)?, number(12, 0x7)?)?;
        Some((function, u16::try_from(offset & 0xFFF).ok()?))
    }
}

impl Region for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        for (at, piece) in (0..).step_by(4).zip(data.chunks_mut(4)) {
            let at = offset.saturating_add(at);
            if let (true, Some((function, register))) = (is_one_cycle(at, piece.len()), self.find(at)) {
                function.read_config(register, piece);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, piece) in (0..).step_by(4).zip(data.chunks(4)) {
            let at = offset.saturating_add(at);
            if let (true, Some((function, register))) = (is_one_cycle(at, piece.len()), self.find(at)) {
                function.write_config(register, piece);
            }
        }
    }
}

/// The address port at offset 0 and the data port at offset 4 (PCI 3.0, section 3.2.2.3.2).
struct Ports(Root);

/// Set in the address register when accesses of the data port are configuration cycles.
const ADDRESS_ENABLE: u32 = 1 << 31;
/// The bits of the address register that exist.
const ADDRESS_BITS: u32 = 0x80FF_FFFC;

impl Ports {
    fn find(&self, offset: u64, length: usize) -> Option<(&dyn Function, u16)> {
        let within = offset.checked_sub(4)?;
        if !is_one_cycle(within, length) {
            return None;
        }
        let address = self.0.shared.address.load(Ordering::Relaxed);
        // Only bus 0 exists.
        if address & ADDRESS_ENABLE == 0 || (address >> 16) & 0xFF != 0 {
            return None;
        }
        let function = self.0.at((address >> 11) & 0x1F, (address >> 8) & 0x7)?;
        let register = u16::try_from(address & 0xFC).ok()?.checked_add(u16::try_from(within).ok()?)?;
        Some((function, register))
    }
}

impl Region for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.0.shared.address.load(Ordering::Relaxed).to_le_bytes());
        } else if let Some((function, register)) = self.find(offset, data.len()) {
            function.read_config(register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0.shared.address.store(u32::from_le_bytes(bytes) & ADDRESS_BITS, Ordering::Relaxed);
        } else if let Some((function, register)) = self.find(offset, data.len()) {
            function.write_config(register, data);
        }
    }
}

/// The memory window in which BARs lie.
struct Window(Root);

impl Window {
    /// The function whose BAR holds the whole access, the lowest slot first when the guest made two overlap.
    fn find(&self, offset: u64, length: usize) -> Option<(&dyn Function, u64)> {
        let address = PCI_MMIO_START.checked_add(offset)?;
        let length = u64::try_from(length).ok()?;
        self.0.functions().find_map(|function| {
            let Decoded { base, length: bytes } = function.decoded()?;
            let within = address.checked_sub(base)?;
            (within.checked_add(length)? <= bytes).then_some((function.as_ref(), within))
        })
    }
}

impl Region for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.find(offset, data.len()) {
            Some((function, within)) => function.read_memory(within, data),
            None => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, within)) = self.find(offset, data.len()) {
            function.write_memory(within, data);
        }
    }
}

#[cfg(test)]
mod tests;
