//! MSI-X of one function (PCI 3.0, section 6.8.2): the vector table, pending bits and masks. It sends nothing
//! itself: routes and raises go through [`Msi`]. Raising takes no lock, since each device's thread does it.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::bus::{little_endian, locked, read_image};
use crate::interrupt::{Msi, MsiMessage};
use crate::state::Refused;

/// Bytes of one table entry: address low and high, data, vector control.
const ENTRY_BYTES: u64 = 16;
const ENTRY_CONTROL: usize = 12;
const CONTROL_MASKED: u8 = 1;
/// Bits of the message control register that the guest may write: function mask and enable.
pub const CONTROL_WRITABLE: u16 = CONTROL_FUNCTION_MASK | CONTROL_ENABLE;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;

/// The interrupts of one function.
pub struct Msix {
    vectors: Box<[Vector]>,
    enabled: AtomicBool,
    table: Mutex<Table>,
    msi: Arc<dyn Msi>,
}

/// What raising looks at.
struct Vector {
    /// Masked, by itself or with the whole function.
    masked: AtomicBool,
    /// Raised while masked.
    pending: AtomicBool,
}

/// What the guest configures.
struct Table {
    entries: Vec<Entry>,
    function_mask: bool,
}

#[derive(Clone)]
struct Entry {
    bytes: [u8; ENTRY_BYTES as usize],
    /// What [`Msi::route`] was last told.
    routed: Option<MsiMessage>,
}

/// The table and what is pending. Masks and the enable bit of the function lie in its configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// By vector: address low and high, data, vector control.
    pub entries: Vec<[u8; ENTRY_BYTES as usize]>,
    /// Vectors that were raised while masked, ascending.
    pub pending: Vec<u16>,
}

impl Msix {
    /// `count` vectors, all masked, MSI-X disabled.
    pub fn new(count: u16, msi: Arc<dyn Msi>) -> Msix {
        let mut bytes = [0; ENTRY_BYTES as usize];
        if let Some(control) = bytes.get_mut(ENTRY_CONTROL) {
            *control = CONTROL_MASKED;
        }
        let vector = || Vector { masked: AtomicBool::new(true), pending: AtomicBool::new(false) };
        Msix {
            vectors: (0..count).map(|_| vector()).collect(),
            enabled: AtomicBool::new(false),
            table: Mutex::new(Table {
                entries: vec![Entry { bytes, routed: None }; usize::from(count)],
                function_mask: false,
            }),
            msi,
        }
    }

    /// How many vectors there are.
    pub fn count(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    /// Whether the guest has enabled MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Sends the message of `vector`, or remembers it while the vector is masked. A vector out of range and a
    /// function without MSI-X enabled raise nothing.
    pub fn raise(&self, vector: u16) {
        let Some(state) = self.vectors.get(usize::from(vector)) else { return };
        if !self.is_enabled() {
            return;
        }
        if state.masked.load(Ordering::SeqCst) {
            state.pending.store(true, Ordering::SeqCst);
            // An unmask between the two lines above has not seen the bit; whoever clears it sends.
            if state.masked.load(Ordering::SeqCst) || !state.pending.swap(false, Ordering::SeqCst) {
                return;
            }
        }
        self.msi.raise(vector);
    }

    /// Takes the message control register as the guest has written it.
    pub fn control(&self, control: u16) {
        let mut table = locked(&self.table);
        let enabled = control & CONTROL_ENABLE != 0;
        table.function_mask = control & CONTROL_FUNCTION_MASK != 0;
        if !enabled && self.enabled.swap(false, Ordering::SeqCst) {
            self.disable(&mut table);
        }
        if enabled {
            self.enabled.store(true, Ordering::SeqCst);
            for vector in 0..self.count() {
                self.update(&mut table, vector);
            }
        }
    }

    /// Reads the vector table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = locked(&self.table);
        for (at, byte) in (0..).zip(data.iter_mut()) {
            let at = offset.saturating_add(at);
            let entry = usize::try_from(at / ENTRY_BYTES).ok().and_then(|index| table.entries.get(index));
            let mut value = [0];
            if let Some(entry) = entry {
                read_image(&entry.bytes, at % ENTRY_BYTES, &mut value);
            }
            let [value] = value;
            *byte = value;
        }
    }

    /// Writes the vector table. Only aligned double and quad words are defined; others go nowhere.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let width = data.len() as u64;
        if !matches!(width, 4 | 8) || !offset.is_multiple_of(width) {
            return;
        }
        let mut table = locked(&self.table);
        let Ok(vector) = u16::try_from(offset / ENTRY_BYTES) else { return };
        let Some(entry) = table.entries.get_mut(usize::from(vector)) else { return };
        let start = usize::try_from(offset % ENTRY_BYTES).unwrap_or(usize::MAX);
        for (to, from) in entry.bytes.iter_mut().skip(start).zip(data) {
            *to = *from;
        }
        if self.is_enabled() {
            self.update(&mut table, vector);
        }
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (0..).zip(data.iter_mut()) {
            let first = offset.saturating_add(at).saturating_mul(8);
            let first = usize::try_from(first).unwrap_or(usize::MAX);
            let states = self.vectors.iter().skip(first).take(8);
            *byte = (0..).zip(states).fold(0, |bits, (bit, state)| {
                bits | u8::from(state.pending.load(Ordering::SeqCst)).wrapping_shl(bit)
            });
        }
    }

    /// The table and what is pending. Nothing may be raised meanwhile.
    pub fn save(&self) -> MsixState {
        let table = locked(&self.table);
        // A raise that had found it enabled may have left one after it was not: disabled, nothing is pending.
        let is_enabled = self.is_enabled();
        let is_pending = |(_, state): &(u16, &Vector)| is_enabled && state.pending.load(Ordering::SeqCst);
        MsixState {
            entries: table.entries.iter().map(|entry| entry.bytes).collect(),
            pending: (0..).zip(&self.vectors).filter(is_pending).map(|(vector, _)| vector).collect(),
        }
    }

    /// Takes a table over into one that is as it was made, and then the message control register. What is pending
    /// and not masked is raised.
    pub fn restore(&self, device: &str, state: &MsixState, control: u16) -> Result<(), Refused> {
        let mut table = locked(&self.table);
        if state.entries.len() != table.entries.len() {
            let (saved, here) = (state.entries.len(), table.entries.len());
            return Err(Refused::new(
                device,
                format!("its table has {saved} vectors and should have {here}"),
            ));
        }
        if control & CONTROL_ENABLE == 0 && !state.pending.is_empty() {
            return Err(Refused::new(device, "vectors are pending although MSI-X is not enabled"));
        }
        for (entry, bytes) in table.entries.iter_mut().zip(&state.entries) {
            entry.bytes = *bytes;
        }
        for vector in &state.pending {
            let Some(state) = self.vectors.get(usize::from(*vector)) else {
                return Err(Refused::new(device, format!("vector {vector} is pending and does not exist")));
            };
            state.pending.store(true, Ordering::SeqCst);
        }
        drop(table);
        self.control(control);
        Ok(())
    }

    /// Makes one vector's route, mask and pending bit agree with its entry.
    fn update(&self, table: &mut Table, vector: u16) {
        let function_mask = table.function_mask;
        let index = usize::from(vector);
        let (Some(entry), Some(state)) = (table.entries.get_mut(index), self.vectors.get(index)) else {
            return;
        };
        if function_mask || entry.is_masked() {
            state.masked.store(true, Ordering::SeqCst);
            return;
        }
        let message = entry.message();
        if entry.routed != Some(message) {
            self.msi.route(vector, Some(message));
            entry.routed = Some(message);
        }
        state.masked.store(false, Ordering::SeqCst);
        if state.pending.swap(false, Ordering::SeqCst) {
            self.msi.raise(vector);
        }
    }

    fn disable(&self, table: &mut Table) {
        for (vector, (entry, state)) in (0..).zip(table.entries.iter_mut().zip(&self.vectors)) {
            state.masked.store(true, Ordering::SeqCst);
            state.pending.store(false, Ordering::SeqCst);
            if entry.routed.take().is_some() {
                self.msi.route(vector, None);
            }
        }
    }
}

impl Entry {
    fn is_masked(&self) -> bool {
        self.bytes.get(ENTRY_CONTROL).is_none_or(|control| control & CONTROL_MASKED != 0)
    }

    fn message(&self) -> MsiMessage {
        let (address, rest) = self.bytes.split_at(8);
        let data = u32::try_from(little_endian(rest) & 0xFFFF_FFFF).unwrap_or_default();
        MsiMessage { address: little_endian(address), data }
    }
}

#[cfg(test)]
mod tests;
