//! Every bound of this room with the reason for its size.
use std::time::Duration;

/// How long a pause waits for requests in flight. A healthy disk answers within milliseconds; a machine that
/// cannot be drained in this time is reported, not stopped for longer than a guest's own patience.
pub const DRAIN_MS_MAX: u64 = 5_000;

/// How long a device's thread may take to tell of that. It answers in time unless its handler is stuck in a call, for which the
/// rest is.
pub const PAUSE_MAX: Duration = Duration::from_millis(2 * DRAIN_MS_MAX);

/// How long a stop (reset by the driver, end of the machine) waits for requests in flight. Longer than a pause,
/// because memory that a late answer lands in may belong to something else by then; Linux gives a disk 30 s.
pub const STOP_MS_MAX: u64 = 60_000;

/// How long the vCPU that writes a reset, or takes away a function's right to reach memory, waits for the end of what is
/// in flight. Within it, drivers that do not ask again find the device
/// reset; the others ask every millisecond, and no vCPU is held in the hands of a disk that hangs.
pub const RESET_WAIT_MS: u64 = 50;

/// Bytes of a device's own configuration: four times as many as the longest here, a disk's, has.
pub const CONFIG_BYTES_MAX: usize = 256;

/// Descriptors in one chain, indirect ones included. Larger than any Linux driver makes (block: 128 + 2, net:
/// 19) and equal to what QEMU accepts, so a driver that works there works here.
pub const CHAIN_DESCRIPTORS_MAX: usize = 1024;

/// Descriptors of a completed chain whose storage is kept for the next one: more than most requests have. A guest that once
/// fills a queue with the longest chains does not keep it all.
pub const SPARE_SEGMENTS_MAX: usize = 32;

/// Events taken from one epoll_wait. More than one device's descriptors; the rest stays in the kernel.
pub const EVENTS_MAX: usize = 32;

/// Chains answered in one turn of a device that answers at once, so that commands to its thread wait no longer.
pub const ANSWERS_PER_TURN: usize = 64;

/// Entropy given for one chain. Linux asks for at most a page; a guest that wants more asks again.
pub const RNG_BYTES_MAX: u32 = 64 << 10;

/// Page numbers in one request to inflate or deflate. Linux sends 256; sixteen times that is 16 KiB to read.
pub const BALLOON_PAGES_PER_REQUEST_MAX: u32 = 4096;

/// Requests of a balloon in one turn. Each may be thousands of system calls over gigabytes, and a stop or a pause
/// waits for the turn to end; drivers have no second request in flight that could gain from more.
pub const BALLOON_ANSWERS_PER_TURN: usize = 1;

/// Ranges of one report of free pages: twice what Linux sends, and as many as fit into the queue itself. Returning
/// a range of gigabytes takes part of a second, so an indirect table full of them would hold up a stop for minutes.
pub const BALLOON_RANGES_PER_REPORT_MAX: usize = 64;

/// Entries of the queues of rng and balloon: Linux keeps at most one request in flight in each, but puts up to 32
/// free ranges into one report.
pub const SMALL_QUEUE_SIZE: u16 = 64;

/// Entries of a disk's queue: as many requests as can be in flight, and Linux's own default depth.
pub const BLOCK_QUEUE_SIZE: u16 = 256;

/// Data buffers of one block request (VIRTIO_BLK_F_SEG_MAX): a queue without indirect descriptors less the header
/// and the status.
pub const BLOCK_SEGMENTS_MAX: u32 = 254;

/// Bytes of one such buffer (VIRTIO_BLK_F_SIZE_MAX): with the count above it keeps a request that follows both
/// below [`BLOCK_REQUEST_BYTES_MAX`].
pub const BLOCK_SEGMENT_BYTES_MAX: u32 = 128 << 10;

/// Bytes of one read or write. Linux sends at most 1.25 MiB unless told otherwise; without a bound a guest could ask
/// for more than a pause can wait for.
pub const BLOCK_REQUEST_BYTES_MAX: u32 = 32 << 20;

/// Bytes of requests in flight per disk beyond which nothing more is taken from the queue: what even a slow disk
/// (20 MB/s) moves within a drain, and more than a fast one needs to be kept busy.
pub const BLOCK_IN_FLIGHT_BYTES_MAX: u64 = 64 << 20;

/// Descriptors of requests in flight per disk beyond which nothing more is taken from the queue. Each costs the process up
/// to a hundred bytes; so many are 8 MiB in flight for a guest whose pages are all scattered.
pub const BLOCK_IN_FLIGHT_SEGMENTS_MAX: usize = 2_048;

/// Bytes of writes that lie side by side and are done as one: as long as a kernel's own writes to a disk get.
pub const BLOCK_JOINED_BYTES_MAX: u64 = 1 << 20;

/// Buffers of such writes: a quarter of what one system call takes.
pub const BLOCK_JOINED_SEGMENTS_MAX: usize = 256;

/// How long a write waits for the one that goes on where it ends, when the one before it found such a one: several times what
/// a guest needs to make one more available, and far less than a write costs.
pub const BLOCK_JOIN_WAIT_US: u64 = 2;

/// How long a disk's thread looks for the next request itself when the one before came soon: longer than a guest takes
/// from an answer to its next request, and far less than a kick and a wake-up cost where exits are slow.
pub const BLOCK_LOOKOUT_US: u64 = 50;

/// A request that came within this time after the thread went to sleep would have been found by looking: the time of
/// looking, and as much again for the kick and the wake-up that are in it.
pub const BLOCK_LOOKOUT_WORTH_US: u64 = 2 * BLOCK_LOOKOUT_US;

/// Requests in a row that must have come soon before there is another look after many in vain: each of those cost a look's
/// time for nothing.
pub const BLOCK_LOOKOUTS_FORGONE_MAX: u32 = 64;

/// How long a disk's thread begins new rounds of serving and looking before it hears commands again: they wait for that and
/// one round.
pub const BLOCK_TURN_US: u64 = 1_000;

/// Bytes of a backing file that are filled into an overlay as its guest stands still: copied within the page cache, some tenths
/// of a millisecond.
pub const OVERLAY_PIECE_BYTES: u64 = 512 << 10;

/// Bytes of a disk that are copied as one before a guest changes any of them: some tens of microseconds, for which its request
/// waits.
pub const KEPT_BYTES: u64 = 64 << 10;

/// Ranges in one discard request. Linux merges up to 256 on fast disks; each is a system call here.
pub const DISCARD_RANGES_MAX: u32 = 16;

/// Sectors of one discarded range: 1 GiB, which a file system gives back within milliseconds.
pub const DISCARD_SECTORS_MAX: u32 = 1 << 21;

/// Ranges in one write-zeroes request. One, since each may have to be written out.
pub const WRITE_ZEROES_RANGES_MAX: u32 = 1;

/// Sectors of one zeroed range: 64 MiB, the most that one system call writes where it has to be written out.
pub const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 17;

/// Entries of each queue of an interface: QEMU's default, and enough receive buffers for a burst of 64 KiB packets.
pub const NET_QUEUE_SIZE: u16 = 256;

/// The largest frame in either direction: an IP packet of 64 KiB, as segmentation offload makes them, with an Ethernet
/// header and a VLAN tag. What is longer no kernel sends.
pub const NET_FRAME_BYTES_MAX: u32 = (64 << 10) + 18;

/// Packets handled in one direction before the other has its turn.
pub const NET_BATCH: usize = 128;

/// Sent packets that are handed back to the guest at once: a quarter of what a driver that waits for them has on its way.
pub const NET_HANDED_BACK_AT_ONCE: usize = 16;

/// How long a thread that has run out of receive buffers leaves a guest alone that was just giving some: a busy guest gives tens
/// of them in that time, and a queue of the kernel's holds what comes meanwhile.
pub const NET_BUFFERS_WAIT: Duration = Duration::from_micros(50);
