//! Where the virtio structures lie in the BAR. Constants and arithmetic only.

pub(super) use memory::layout::PCI_BAR_BYTES as BAR_BYTES;

/// Distance between the notification addresses of two queues, as the capability tells the driver.
pub(super) const NOTIFY_STRIDE: u64 = 4;

pub(super) const COMMON: u64 = 0x0000;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x4000;
pub(super) const TABLE: u64 = 0x8000;
pub(super) const PENDING: u64 = 0xC000;

/// Bytes of the common configuration structure, queue_notify_data and queue_reset included.
pub(super) const COMMON_BYTES: u32 = 60;
/// Bytes told to the driver for the device's own configuration; none here has more.
pub(super) const DEVICE_BYTES: u32 = 0x1000;

/// Queues of one function: with the vector for configuration changes, the table and the notification area hold
/// 1024. No device here comes near.
pub(super) const QUEUES_MAX: u16 = 1023;

/// A structure in the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Area {
    /// Common configuration.
    Common,
    /// Interrupt status.
    Isr,
    /// The device's configuration.
    Device,
    /// Notifications.
    Notify,
    /// MSI-X vectors.
    Table,
    /// MSI-X pending bits.
    Pending,
}

/// Which structure `offset` of the BAR belongs to, and where in it.
pub(super) fn area(offset: u64) -> Option<(Area, u64)> {
    let (area, start) = match offset {
        COMMON..ISR => (Area::Common, COMMON),
        ISR..DEVICE => (Area::Isr, ISR),
        DEVICE..NOTIFY => (Area::Device, DEVICE),
        NOTIFY..TABLE => (Area::Notify, NOTIFY),
        TABLE..PENDING => (Area::Table, TABLE),
        PENDING..BAR_BYTES => (Area::Pending, PENDING),
        _ => return None,
    };
    Some((area, offset.checked_sub(start)?))
}

/// Where queue `index` is kicked when the BAR is at `base`.
pub(super) fn doorbell(base: u64, index: u64) -> Option<u64> {
    base.checked_add(NOTIFY)?.checked_add(index.checked_mul(NOTIFY_STRIDE)?)
}
