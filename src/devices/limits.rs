//! Every bound of this room with the reason for its size.

/// How long a pause waits for requests in flight. A healthy disk answers within milliseconds; a machine that
/// cannot be drained in this time is reported, not stopped for longer than a guest's own patience.
pub const DRAIN_MS_MAX: u64 = 5_000;

/// How long a stop (reset by the driver, end of the machine) waits for requests in flight. Longer than a pause,
/// because memory that a late answer lands in may belong to something else by then; Linux gives a disk 30 s.
pub const STOP_MS_MAX: u64 = 60_000;

/// Descriptors in one chain, indirect ones included. Larger than any Linux driver makes (block: 128 + 2, net:
/// 19) and equal to what QEMU accepts, so a driver that works there works here.
pub const CHAIN_DESCRIPTORS_MAX: usize = 1024;

/// Events taken from one epoll_wait. More than one device's descriptors; the rest stays in the kernel.
pub const EVENTS_MAX: usize = 32;
