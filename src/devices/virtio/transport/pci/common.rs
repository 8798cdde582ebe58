//! The common configuration structure (virtio 1.2, section 4.1.4.3) as data: registers, the order in which a
//! driver may set them, and what latches when. Pure: it says what a write means, the transport does it.
//!
//! ```text
//! 0 ─ ACKNOWLEDGE, DRIVER ─► features written ─ FEATURES_OK ─► queues written, enabled ─ DRIVER_OK ─► running
//! ▲                          (features latch)                  (each queue latches when enabled)       │
//! └───────────────────────────────────── 0 written ◄──────────────────────────────────────────────────┘
//! ```
use super::state::{CommonState, QueueState};
use crate::bus::little_endian;
use crate::state::Refused;

/// No vector is assigned.
pub(super) const NO_VECTOR: u16 = 0xFFFF;

/// Bits of the device status (section 2.1).
pub(super) const ACKNOWLEDGE: u8 = 1;
pub(super) const DRIVER: u8 = 2;
pub(super) const DRIVER_OK: u8 = 4;
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const NEEDS_RESET: u8 = 64;
pub(super) const FAILED: u8 = 128;

const VERSION_1: u64 = 1 << 32;

/// The registers.
pub(super) struct Common {
    offered: u64,
    accepted: u64,
    /// The driver wrote a feature bit that does not even have a number here.
    accepted_unknown: bool,
    device_select: u32,
    driver_select: u32,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// The registers of one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    pub(super) size_max: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    /// Descriptor table, driver area (available ring), device area (used ring).
    pub(super) addresses: [u64; 3],
}

/// What others than the driver change.
pub(super) struct Live {
    pub(super) config_vector: u16,
    pub(super) queue_vectors: Vec<u16>,
    pub(super) generation: u8,
    pub(super) broken: bool,
}

/// What a write means beyond the registers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Nothing,
    ConfigVector(u16),
    QueueVector(u16, u16),
    /// The driver resets the device; [`Common::reset`] is called when it is done.
    Reset,
    /// The driver is ready.
    Activate,
    /// The driver broke the order of things.
    Broken(&'static str),
}

impl Common {
    pub(super) fn new(offered: u64, queue_sizes: &[u16]) -> Common {
        let queue =
            |size: &u16| QueueRegisters { size_max: *size, size: *size, enabled: false, addresses: [0; 3] };
        Common {
            offered,
            accepted: 0,
            accepted_unknown: false,
            device_select: 0,
            driver_select: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    /// The features that were agreed on.
    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    /// Whether they were agreed on.
    pub(super) fn has_agreed(&self) -> bool {
        self.status & FEATURES_OK != 0
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Back to what a driver finds first.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.size_max).collect();
        *self = Common::new(self.offered, &sizes);
    }

    /// Whether the driver is ready.
    pub(super) fn is_driver_ok(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    pub(super) fn save(&self) -> CommonState {
        let queue = |queue: &QueueRegisters| QueueState {
            size: queue.size,
            enabled: queue.enabled,
            addresses: queue.addresses,
        };
        CommonState {
            features: self.accepted,
            unknown_features: self.accepted_unknown,
            device_select: self.device_select,
            driver_select: self.driver_select,
            status: self.status,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(queue).collect(),
        }
    }

    /// Takes registers over that a driver could have left: the same order of things holds as for its writes.
    pub(super) fn restore(&mut self, device: &str, state: &CommonState) -> Result<(), Refused> {
        let refuse = |detail: String| Err(Refused::new(device, detail));
        if state.queues.len() != self.queues.len() {
            return refuse(format!("{} queues were saved, it has {}", state.queues.len(), self.queues.len()));
        }
        if state.status & !(ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED) != 0 {
            return refuse(format!("a status of {:#x} cannot be", state.status));
        }
        self.accepted = state.features;
        self.accepted_unknown = state.unknown_features;
        if state.status & FEATURES_OK != 0 && !self.is_acceptable() {
            return refuse(format!("features {:#x} were agreed on, which are not offered", state.features));
        }
        if state.status & DRIVER_OK != 0 && state.status & FEATURES_OK == 0 {
            return refuse("its driver was ready before features were agreed on".to_owned());
        }
        for (registers, saved) in self.queues.iter_mut().zip(&state.queues) {
            if !saved.size.is_power_of_two() || saved.size > registers.size_max {
                return refuse(format!("a queue of {} entries cannot be", saved.size));
            }
            registers.size = saved.size;
            registers.enabled = saved.enabled;
            registers.addresses = saved.addresses;
        }
        self.device_select = state.device_select;
        self.driver_select = state.driver_select;
        self.status = state.status;
        self.queue_select = state.queue_select;
        Ok(())
    }

    /// The structure as the driver reads it.
    pub(super) fn image(&self, live: &Live) -> [u8; 64] {
        let selected = self.queues.get(usize::from(self.queue_select));
        let vector = live.queue_vectors.get(usize::from(self.queue_select)).copied().unwrap_or(NO_VECTOR);
        let status = self.status | if live.broken { NEEDS_RESET } else { 0 };
        let count = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        let [table, driver, device] = selected.map(|queue| queue.addresses).unwrap_or_default();
        let mut image = Vec::with_capacity(64);
        image.extend(self.device_select.to_le_bytes());
        image.extend(half(self.offered, self.device_select).to_le_bytes());
        image.extend(self.driver_select.to_le_bytes());
        image.extend(half(self.accepted, self.driver_select).to_le_bytes());
        image.extend(live.config_vector.to_le_bytes());
        image.extend(count.to_le_bytes());
        image.extend([status, live.generation]);
        image.extend(self.queue_select.to_le_bytes());
        image.extend(selected.map_or(0, |queue| queue.size).to_le_bytes());
        image.extend(vector.to_le_bytes());
        image.extend(u16::from(selected.is_some_and(|queue| queue.enabled)).to_le_bytes());
        // The notification offset: one address per queue.
        image.extend(selected.map_or(0, |_| self.queue_select).to_le_bytes());
        image.extend(table.to_le_bytes());
        image.extend(driver.to_le_bytes());
        image.extend(device.to_le_bytes());
        // queue_notify_data means something only with VIRTIO_F_NOTIF_CONFIG_DATA, queue_reset only with
        // VIRTIO_F_RING_RESET; neither is offered.
        image.resize(64, 0);
        image.try_into().unwrap_or([0; 64])
    }

    /// Takes a write. Fields are written whole, 64-bit ones also by halves (section 4.1.3.1); anything else goes
    /// nowhere. `broken` is DEVICE_NEEDS_RESET.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], broken: bool) -> Outcome {
        let value = little_endian(data);
        let (low32, low16) = (value as u32, value as u16);
        match (offset, data.len()) {
            (0, 4) => self.device_select = low32,
            (8, 4) => self.driver_select = low32,
            (12, 4) => self.accept(low32),
            (16, 2) => return Outcome::ConfigVector(low16),
            (20, 1) => return self.write_status(value as u8, broken),
            (22, 2) => self.queue_select = low16,
            (26, 2) if self.selected().is_some() => return Outcome::QueueVector(self.queue_select, low16),
            (24, 2) => {
                if let Some(queue) = self.unlatched() {
                    // A size that cannot be is not taken; the driver reads back the old one.
                    if low16.is_power_of_two() && low16 <= queue.size_max {
                        queue.size = low16;
                    }
                }
            }
            (28, 2) if low16 == 1 => {
                if let Some(queue) = self.unlatched() {
                    queue.enabled = true;
                }
            }
            (32..56, 4 | 8) => self.write_address(offset, data),
            _ => {}
        }
        Outcome::Nothing
    }

    fn write_status(&mut self, value: u8, broken: bool) -> Outcome {
        if value == 0 {
            return Outcome::Reset;
        }
        self.status |= value & FAILED;
        if broken {
            return Outcome::Nothing;
        }
        self.status |= value & (ACKNOWLEDGE | DRIVER);
        if value & FEATURES_OK != 0 && self.is_acceptable() {
            self.status |= FEATURES_OK;
        }
        if value & DRIVER_OK != 0 && self.status & DRIVER_OK == 0 {
            if self.status & FEATURES_OK == 0 {
                return Outcome::Broken("DRIVER_OK was set before features were agreed on");
            }
            self.status |= DRIVER_OK;
            return Outcome::Activate;
        }
        Outcome::Nothing
    }

    /// A subset of what is offered, and a driver that knows virtio 1.
    fn is_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0 && !self.accepted_unknown
    }

    fn accept(&mut self, bits: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let (low, high) = (self.accepted & 0xFFFF_FFFF, self.accepted & !0xFFFF_FFFF);
        match self.driver_select {
            0 => self.accepted = high | u64::from(bits),
            1 => self.accepted = low | u64::from(bits) << 32,
            _ => self.accepted_unknown |= bits != 0,
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue while its registers may change: until it is enabled or the driver is ready.
    fn unlatched(&mut self) -> Option<&mut QueueRegisters> {
        if self.status & DRIVER_OK != 0 {
            return None;
        }
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.enabled)
    }

    fn write_address(&mut self, offset: u64, data: &[u8]) {
        let width = data.len() as u64;
        if !offset.is_multiple_of(width) {
            return;
        }
        let Some(queue) = self.unlatched() else { return };
        let which = usize::try_from(offset.saturating_sub(32) / 8).unwrap_or(usize::MAX);
        let Some(address) = queue.addresses.get_mut(which) else { return };
        let mut bytes = address.to_le_bytes();
        let start = usize::try_from(offset % 8).unwrap_or(usize::MAX);
        for (to, from) in bytes.iter_mut().skip(start).zip(data) {
            *to = *from;
        }
        *address = u64::from_le_bytes(bytes);
    }
}

/// 32 of 64 feature bits; beyond them there are none.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
