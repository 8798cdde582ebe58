//! The configuration space of one type-0 function (PCI 3.0, section 6.1): a register file with a mask of what the
//! guest may write. It decides nothing: the function looks at what a write has changed.
use crate::bus::{little_endian, read_image};
use crate::state::Refused;

/// Conventional configuration space; what lies beyond reads zero, which ends the list of extended capabilities.
const BYTES: usize = 256;

const COMMAND: u16 = 0x04;
const BAR0: u16 = 0x10;
const CAPABILITIES_POINTER: u16 = 0x34;
/// First byte after the type-0 header.
const CAPABILITIES_START: u16 = 0x40;

/// Bits of the command register a function without I/O ports and INTx has: memory space, bus master, interrupt
/// disable. The guest may set the last one; it changes nothing, since there is no interrupt line.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | COMMAND_MASTER | 1 << 10;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
/// Status register: there is a capabilities list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// A 64-bit memory BAR, not prefetchable.
const BAR_MEMORY_64: u32 = 0b100;

/// Who a function says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, the class in the highest of the three bytes.
    pub class: u32,
    /// Vendor of the subsystem.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// A register file.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    /// Bits set here can be written by the guest.
    writable: [u8; BYTES],
    /// Where the next capability's offset goes.
    link: u16,
    /// Where the next capability goes.
    free: u16,
}

impl ConfigSpace {
    /// A function with no BAR and no capability.
    pub fn new(identity: Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; BYTES],
            writable: [0; BYTES],
            link: CAPABILITIES_POINTER,
            free: CAPABILITIES_START,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        let [interface, subclass, class, _] = identity.class.to_le_bytes();
        space.set(0x08, &[identity.revision, interface, subclass, class]);
        space.set(0x2C, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2E, &identity.subsystem.to_le_bytes());
        space
    }

    /// Gives the function a 64-bit memory BAR in BAR0 and BAR1. `bytes` is a power of two of at least 4096.
    pub fn add_memory_bar(&mut self, bytes: u64) {
        let mask = !bytes.saturating_sub(1);
        self.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        self.set(BAR0, &BAR_MEMORY_64.to_le_bytes());
        self.allow(BAR0, &mask.to_le_bytes());
    }

    /// Appends a capability: `body` is what follows the next pointer, `writable` the mask of what the guest may
    /// change in it. Returns its offset, or nothing when the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let at = self.free;
        let body_at = at.checked_add(2)?;
        let end = body_at.checked_add(u16::try_from(body.len()).ok()?)?;
        if usize::from(end) > BYTES {
            return None;
        }
        self.set(self.link, &[u8::try_from(at).ok()?]);
        self.set(at, &[id, 0]);
        self.set(body_at, body);
        self.allow(body_at, writable);
        self.set(0x06, &[STATUS_CAPABILITIES]);
        self.link = at.checked_add(1)?;
        self.free = end.checked_next_multiple_of(4)?;
        Some(at)
    }

    /// Reads at any offset and of any width.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        read_image(&self.bytes, u64::from(offset), data);
    }

    /// Writes by the guest: only what is writable changes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let from = usize::from(offset).min(BYTES);
        let registers = self.bytes.iter_mut().skip(from);
        let masks = self.writable.iter().skip(from);
        for ((register, mask), value) in registers.zip(masks).zip(data) {
            *register = (*register & !mask) | (value & mask);
        }
    }

    /// Writes by the host: everything changes.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        let registers = self.bytes.iter_mut().skip(usize::from(offset));
        for (register, value) in registers.zip(data) {
            *register = *value;
        }
    }

    /// Every byte of which the guest may write a part; zero where it may not. Trailing zeroes are left out.
    pub fn save(&self) -> Vec<u8> {
        let mut registers: Vec<u8> =
            self.bytes.iter().zip(&self.writable).map(|(register, mask)| register & mask).collect();
        while registers.pop_if(|register| *register == 0).is_some() {}
        registers
    }

    /// Takes over what [`ConfigSpace::save`] gave for a function of the same make.
    pub fn restore(&mut self, device: &str, registers: &[u8]) -> Result<(), Refused> {
        let fits = |(register, mask): (&u8, &u8)| register & !mask == 0;
        if registers.len() > BYTES || !registers.iter().zip(&self.writable).all(fits) {
            return Err(Refused::new(device, "its configuration has bits set that cannot be written"));
        }
        let saved = registers.iter().copied().chain(std::iter::repeat(0));
        for ((register, mask), value) in self.bytes.iter_mut().zip(&self.writable).zip(saved) {
            *register = (*register & !mask) | value;
        }
        Ok(())
    }

    /// A 16-bit register.
    pub fn word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// A 32-bit register.
    pub fn dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Where the memory BAR points, if the function decodes memory accesses.
    pub fn memory_bar(&self) -> Option<u64> {
        let enabled = self.word(COMMAND) & COMMAND_MEMORY != 0;
        let mut data = [0; 8];
        self.read(BAR0, &mut data);
        enabled.then(|| little_endian(&data) & !0xF)
    }

    /// Whether the function may reach memory by itself (PCI 3.0, section 6.2.2).
    pub fn is_bus_master(&self) -> bool {
        self.word(COMMAND) & COMMAND_MASTER != 0
    }

    /// Points the memory BAR at `address`, a multiple of its size.
    pub fn assign_memory_bar(&mut self, address: u64) {
        self.set(BAR0, &(address | u64::from(BAR_MEMORY_64)).to_le_bytes());
    }

    fn allow(&mut self, offset: u16, mask: &[u8]) {
        let masks = self.writable.iter_mut().skip(usize::from(offset));
        for (entry, bits) in masks.zip(mask) {
            *entry = *bits;
        }
    }
}

#[cfg(test)]
mod tests;
