//! A virtio device behind PCI (modern, virtio 1.2 section 4.1): registers, features, MSI-X.
//! Rings are in `queue`. Called by the device words, each of which resets its device at the end.

pub mod disk;
pub mod msix;
pub mod nic;
pub mod queue;

use crate::cpu::mmio::{read8, read16, read32, write8, write16, write32};
use crate::failure::Outcome;
use crate::pci::{self, Function};
use crate::{check, clock, fail};
use msix::Msix;
use queue::Queue;

pub const NET: u16 = 1;
pub const BLOCK: u16 = 2;
pub const RNG: u16 = 4;
pub const BALLOON: u16 = 5;

pub const FEATURE_INDIRECT: u64 = 1 << 28;
pub const FEATURE_EVENT_INDEX: u64 = 1 << 29;
pub const FEATURE_VERSION_1: u64 = 1 << 32;

pub const STATUS_ACKNOWLEDGE: u8 = 1;
pub const STATUS_DRIVER: u8 = 2;
pub const STATUS_DRIVER_OK: u8 = 4;
pub const STATUS_FEATURES_OK: u8 = 8;
pub const STATUS_NEEDS_RESET: u8 = 64;

const VENDOR: u32 = 0x1af4;
const DEVICE_MODERN: u32 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
/// How long a device may take to reset.
const RESET_MS: u64 = 2000;

/// Registers of the common configuration structure (section 4.1.4.3).
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 30;
    pub const QUEUE_DESCRIPTORS: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

pub struct Device {
    pub common: u64,
    notify: u64,
    notify_multiplier: u32,
    config: u64,
    pub msix: Option<Msix>,
    pub features: u64,
}

impl Device {
    /// The `index`th device of a kind in bus order, reset and acknowledged.
    pub fn find(kind: u16, index: usize) -> Outcome<Option<Self>> {
        let mut left = index;
        let mut found = None;
        pci::scan(|function, identity| {
            let matches = identity == VENDOR | (DEVICE_MODERN + u32::from(kind)) << 16;
            if matches && left == 0 {
                found = Some(function);
            }
            if matches {
                left = left.wrapping_sub(1);
            }
            found.is_some()
        });
        let Some(function) = found else { return Ok(None) };
        let device = Self::open(function)?;
        device.reset()?;
        Ok(Some(device))
    }

    /// As `find`, but its absence is a failure.
    pub fn require(kind: u16, index: usize) -> Outcome<Self> {
        match Self::find(kind, index)? {
            Some(device) => Ok(device),
            None => fail!("no virtio device of type {kind} number {index}"),
        }
    }

    fn open(function: Function) -> Outcome<Self> {
        let mut isr = 0;
        let mut device =
            Self { common: 0, notify: 0, notify_multiplier: 0, config: 0, msix: None, features: 0 };
        for at in function.capabilities(CAPABILITY_VENDOR) {
            let bar = function.read8(at + 4);
            let offset = u64::from(function.read32(at + 8));
            let slot = match function.read8(at + 3) {
                1 => &mut device.common,
                2 => {
                    device.notify_multiplier = function.read32(at + 16);
                    &mut device.notify
                }
                3 => &mut isr,
                4 => &mut device.config,
                _ => continue,
            };
            let Some(base) = function.bar(bar) else { fail!("BAR {bar} has no memory") };
            if *slot == 0 {
                *slot = base + offset;
            }
        }
        let is_complete = device.common != 0 && device.notify != 0 && isr != 0;
        check!(is_complete, "common, notify or ISR capability missing");
        function.enable();
        device.msix = Msix::open(function);
        Ok(device)
    }

    pub fn status(&self) -> u8 {
        read8(self.common + common::STATUS)
    }

    pub fn add_status(&self, bits: u8) {
        write8(self.common + common::STATUS, self.status() | bits);
    }

    /// Resets the device and waits until it says so.
    pub fn reset(&self) -> Outcome {
        write8(self.common + common::STATUS, 0);
        check!(clock::spin_until(RESET_MS, || self.status() == 0), "reset not done after {RESET_MS} ms");
        Ok(())
    }

    pub fn offered(&self) -> u64 {
        let word = |select: u32| {
            write32(self.common + common::DEVICE_FEATURE_SELECT, select);
            u64::from(read32(self.common + common::DEVICE_FEATURE))
        };
        word(0) | word(1) << 32
    }

    /// Accepts those of `wanted` that are offered, plus VERSION_1 and ring features.
    pub fn negotiate(&mut self, wanted: u64) -> Outcome {
        self.add_status(STATUS_ACKNOWLEDGE);
        self.add_status(STATUS_DRIVER);
        let offered = self.offered();
        check!(offered & FEATURE_VERSION_1 != 0, "VERSION_1 not offered, features {offered:#x}");
        self.features = offered & (wanted | FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_INDEX);
        for select in 0..2u32 {
            write32(self.common + common::DRIVER_FEATURE_SELECT, select);
            write32(self.common + common::DRIVER_FEATURE, (self.features >> (32 * select)) as u32);
        }
        self.add_status(STATUS_FEATURES_OK);
        check!(self.status() & STATUS_FEATURES_OK != 0, "features {:#x} refused", self.features);
        Ok(())
    }

    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    pub fn queue_count(&self) -> u16 {
        read16(self.common + common::QUEUES)
    }

    /// Sets up queue `index` with at most `size_max` entries; completions are polled for.
    pub fn queue(&self, index: u16, size_max: u16) -> Outcome<Queue> {
        self.queue_with_vector(index, size_max, None)
    }

    /// As `queue`, with completions signalled through MSI-X table entry `entry`.
    pub fn queue_with_vector(&self, index: u16, size_max: u16, entry: Option<u16>) -> Outcome<Queue> {
        write16(self.common + common::QUEUE_SELECT, index);
        let size = read16(self.common + common::QUEUE_SIZE).min(size_max).min(queue::SIZE_MAX);
        check!(size != 0, "queue {index} does not exist");
        write16(self.common + common::QUEUE_SIZE, size);
        if let Some(entry) = entry {
            write16(self.common + common::QUEUE_VECTOR, entry);
            let taken = read16(self.common + common::QUEUE_VECTOR);
            check!(taken == entry, "vector {entry} of queue {index} refused");
        }
        let notify_offset = read16(self.common + common::QUEUE_NOTIFY_OFFSET);
        let doorbell = self.notify + u64::from(notify_offset) * u64::from(self.notify_multiplier);
        let queue = Queue::new(index, size, doorbell, self.features, entry.is_some())?;
        for (register, address) in [
            (common::QUEUE_DESCRIPTORS, queue.descriptors),
            (common::QUEUE_DRIVER, queue.available),
            (common::QUEUE_DEVICE, queue.used),
        ] {
            write32(self.common + register, address as u32);
            write32(self.common + register + 4, (address >> 32) as u32);
        }
        write16(self.common + common::QUEUE_ENABLE, 1);
        check!(read16(self.common + common::QUEUE_ENABLE) == 1, "queue {index} cannot be enabled");
        Ok(queue)
    }

    /// Has changes of the configuration signalled through MSI-X table entry `entry`.
    pub fn set_config_vector(&self, entry: u16) -> Outcome {
        write16(self.common + common::CONFIG_VECTOR, entry);
        let taken = read16(self.common + common::CONFIG_VECTOR);
        check!(taken == entry, "vector {entry} of the configuration refused");
        Ok(())
    }

    pub fn generation(&self) -> u8 {
        read8(self.common + common::GENERATION)
    }

    pub fn ready(&self) -> Outcome {
        self.add_status(STATUS_DRIVER_OK);
        let status = self.status();
        check!(status & STATUS_NEEDS_RESET == 0, "status {status:#x} after DRIVER_OK");
        Ok(())
    }

    pub fn config8(&self, offset: u64) -> u8 {
        read8(self.config + offset)
    }

    pub fn config16(&self, offset: u64) -> u16 {
        read16(self.config + offset)
    }

    pub fn config32(&self, offset: u64) -> u32 {
        read32(self.config + offset)
    }

    pub fn write_config32(&self, offset: u64, value: u32) {
        write32(self.config + offset, value);
    }

    /// A 64-bit field, read again while the device changes its configuration.
    pub fn config64(&self, offset: u64) -> u64 {
        loop {
            let generation = read8(self.common + common::GENERATION);
            let value = u64::from(self.config32(offset)) | u64::from(self.config32(offset + 4)) << 32;
            if read8(self.common + common::GENERATION) == generation {
                return value;
            }
        }
    }
}
