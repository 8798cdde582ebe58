//! The configuration space of a virtio function: identity, BAR, MSI-X and the virtio capabilities (virtio 1.2,
//! section 4.1.4). It performs no access itself; it says what the indirect window asks for.
use super::layout;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::CONTROL_WRITABLE;
use crate::state::Refused;

const VENDOR: u16 = 0x1AF4;
/// Device numbers of modern devices start here (virtio 1.2, section 4.1.2).
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// Kinds of virtio capabilities.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// The low byte of the status register, and the bit that says what the interrupt line would say.
pub(super) const STATUS: u16 = 0x06;
pub(super) const STATUS_INTERRUPT: u8 = 1 << 3;

/// Offsets in the capability of the indirect window.
const INDIRECT_BAR: u16 = 4;
const INDIRECT_OFFSET: u16 = 8;
const INDIRECT_LENGTH: u16 = 12;
const INDIRECT_DATA: u16 = 16;

/// A configuration space with what the transport needs to find in it again.
pub(super) struct Config {
    space: ConfigSpace,
    msix_at: u16,
    indirect_at: u16,
}

/// An access of the BAR through configuration space.
pub(super) struct Indirect {
    pub(super) offset: u64,
    /// 1, 2 or 4 bytes.
    pub(super) width: usize,
}

impl Config {
    /// Nothing when the device type is not one, or the capabilities do not fit.
    pub(super) fn new(device_type: u32, queues: u16, vectors: u16) -> Option<Config> {
        let number = u16::try_from(device_type).ok()?;
        let mut space = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE.checked_add(number)?,
            revision: 1,
            class: class(device_type),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        space.add_memory_bar(layout::BAR_BYTES);

        let control = vectors.checked_sub(1)?;
        let mut msix = Vec::from(control.to_le_bytes());
        msix.extend(offset(layout::TABLE)?.to_le_bytes());
        msix.extend(offset(layout::PENDING)?.to_le_bytes());
        let msix_at = space.add_capability(CAPABILITY_MSIX, &msix, &CONTROL_WRITABLE.to_le_bytes())?;

        let stride = u32::try_from(layout::NOTIFY_STRIDE).ok()?;
        let notify_bytes = u32::from(queues).checked_mul(stride)?;
        let structures: [(u8, u64, u32, &[u8]); 4] = [
            (COMMON_CFG, layout::COMMON, layout::COMMON_BYTES, &[]),
            (ISR_CFG, layout::ISR, 1, &[]),
            (DEVICE_CFG, layout::DEVICE, layout::DEVICE_BYTES, &[]),
            (NOTIFY_CFG, layout::NOTIFY, notify_bytes, &stride.to_le_bytes()),
        ];
        for (kind, start, length, extra) in structures {
            let body = virtio_capability(kind, offset(start)?, length, extra)?;
            space.add_capability(CAPABILITY_VENDOR, &body, &[])?;
        }
        let body = virtio_capability(PCI_CFG, 0, 0, &[0; 4])?;
        let mut writable = vec![0, 0, 0xFF, 0, 0, 0];
        writable.extend([0xFF; 12]);
        let indirect_at = space.add_capability(CAPABILITY_VENDOR, &body, &writable)?;
        Some(Config { space, msix_at, indirect_at })
    }

    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        self.space.write(offset, data);
    }

    pub(super) fn save(&self) -> Vec<u8> {
        self.space.save()
    }

    pub(super) fn restore(&mut self, device: &str, registers: &[u8]) -> Result<(), Refused> {
        self.space.restore(device, registers)
    }

    pub(super) fn memory_bar(&self) -> Option<u64> {
        self.space.memory_bar()
    }

    pub(super) fn is_bus_master(&self) -> bool {
        self.space.is_bus_master()
    }

    pub(super) fn assign(&mut self, address: u64) {
        self.space.assign_memory_bar(address);
    }

    pub(super) fn msix_control(&self) -> u16 {
        self.space.word(self.msix_at.saturating_add(2))
    }

    /// The access that touching `offset` means, when that is in the data register of the indirect window and the
    /// window points to something that can be accessed. Its width is the window's, not that of the touch.
    pub(super) fn indirect(&self, offset: u16) -> Option<Indirect> {
        let register = |at: u16| self.indirect_at.saturating_add(at);
        let width = usize::try_from(self.space.dword(register(INDIRECT_LENGTH))).ok()?;
        let target = u64::from(self.space.dword(register(INDIRECT_OFFSET)));
        let bar = self.space.word(register(INDIRECT_BAR)) & 0xFF;
        let aligned = matches!(width, 1 | 2 | 4) && target.is_multiple_of(width as u64);
        let data = register(INDIRECT_DATA);
        let hit = (data..data.saturating_add(4)).contains(&offset) && bar == 0;
        (hit && aligned && target < layout::BAR_BYTES).then_some(Indirect { offset: target, width })
    }

    /// What the data register holds.
    pub(super) fn indirect_data(&self) -> [u8; 4] {
        self.space.dword(self.indirect_at.saturating_add(INDIRECT_DATA)).to_le_bytes()
    }

    pub(super) fn set_indirect_data(&mut self, value: &[u8]) {
        self.space.set(self.indirect_at.saturating_add(INDIRECT_DATA), value);
    }
}

fn offset(start: u64) -> Option<u32> {
    u32::try_from(start).ok()
}

/// `struct virtio_pci_cap` after its next pointer, for BAR 0.
fn virtio_capability(kind: u8, offset: u32, length: u32, extra: &[u8]) -> Option<Vec<u8>> {
    let bytes = u8::try_from(extra.len()).ok()?.checked_add(16)?;
    let mut body = vec![bytes, kind, 0, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra);
    Some(body)
}

/// The class code that people see in a list of devices; drivers go by the device number.
fn class(device_type: u32) -> u32 {
    match device_type {
        1 => 0x02_00_00,
        2 => 0x01_80_00,
        _ => 0x00_FF_00,
    }
}
