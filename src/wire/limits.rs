//! Bounds of everything that crosses the wire, each with the reason for its size.

/// Longest JSON document in one packet, in bytes. A machine with every device at its limit needs 24 KiB;
/// statistics of 32 vCPUs and 16 devices need 12 KiB.
pub const PACKET_BYTES_MAX: usize = 64 * 1024;

/// Most descriptors in one packet. The kernel's own bound (SCM_MAX_FD) is 253; a machine at every device
/// limit carries 3 + 16 + 8.
pub const DESCRIPTORS_MAX: usize = 64;

/// Most virtual CPUs of one machine.
pub const VCPUS_MAX: u8 = 32;

/// Most features of a CPU that is a list of them: twice what the table of the VMM has.
pub const CPU_FEATURES_MAX: usize = 512;

/// Longest name of a feature in bytes.
pub const CPU_FEATURE_BYTES_MAX: usize = 32;

/// Least guest memory, in bytes: below this no stock kernel unpacks its initrd.
pub const MEMORY_BYTES_MIN: u64 = 32 << 20;

/// Most guest memory, in bytes. The memory slots and ACPI tables are tested up to here.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// Most disks of one machine. One PCI bus has 32 slots; disks and nics share it with the other devices.
pub const DISKS_MAX: usize = 16;

/// Most network interfaces of one machine.
pub const NICS_MAX: usize = 8;

/// Longest kernel command line in bytes, with its terminator: the x86 kernel's COMMAND_LINE_SIZE.
pub const CMDLINE_BYTES_MAX: usize = 2048;

/// Longest virtio-blk serial, in bytes: virtio 1.2, section 5.2.6, VIRTIO_BLK_ID_BYTES.
pub const SERIAL_BYTES_MAX: usize = 20;

/// Most bytes of console input in one command. The guest's 16550 drains a few bytes an interrupt, so a
/// longer paste is sent in pieces as the replies say how much was taken.
pub const CONSOLE_INPUT_BYTES_MAX: usize = 4096;

/// Default capacity of a console ring in bytes: a full boot of a distribution is about 60 KiB.
pub const CONSOLE_RING_BYTES: u64 = 1 << 20;

/// Least capacity of a console ring in bytes.
pub const CONSOLE_RING_BYTES_MIN: u64 = 4096;

/// Most capacity of a console ring in bytes, so that a damaged header cannot ask for more.
pub const CONSOLE_RING_BYTES_MAX: u64 = 64 << 20;

/// Longest body of one frame between two daemons, in bytes: a piece, or a server with all its user data, each byte escaped.
pub const FRAME_BYTES_MAX: usize = (1 << 20) + 64;

/// Longest piece of a file in one frame, in bytes.
pub const PIECE_BYTES_MAX: usize = 1 << 20;

/// Longest last will in bytes; longer files are not ours.
pub const WILL_BYTES_MAX: usize = 16 * 1024;

/// Longest state file beside its table of memory, in bytes: 32 vCPUs with 20 KiB each as text and the most devices need
/// 1 MiB.
pub const STATE_BYTES_MAX: u64 = 16 << 20;

/// Bytes of the table for each MiB of memory: one row of 48 for a whole part, and up to twenty for one in pieces.
pub const STATE_BYTES_PER_MIB: u64 = 1024;

/// Most sections of a state file. Four are known.
pub const SECTIONS_MAX: u64 = 64;

/// Most files below one of a snapshot: with the machine's own files they fit into a packet, and whoever reads has as many to
/// open at most.
pub const LOWER_FILES_MAX: u32 = 15;

/// Most runs of one file that lie in lower ones: 24 MiB to read. A file with more keeps the rest itself.
pub const LOWER_RUNS_MAX: u64 = 1 << 20;

/// Most streams of one move: more than any network card has queues worth using.
pub const STREAMS_MAX: usize = 16;

/// Longest document in a frame between two VMMs, in bytes: a reason of 2 KiB, each byte escaped.
pub const DOCUMENT_BYTES_MAX: u32 = 16 << 10;

/// Longest downtime that a move may aim at, in milliseconds. Beyond it, saving the machine is the better way.
pub const DOWNTIME_MS_MAX: u32 = 60_000;

/// How much longer a machine may stand still than its move aims at before the move is given up, in milliseconds, when nobody
/// says: guests' own watchdogs bark after 20 s and more.
pub const STANDSTILL_MS: u32 = 10_000;

/// Longest such time, in milliseconds.
pub const STANDSTILL_MS_MAX: u32 = 600_000;

/// Least bandwidth of a move, in bytes a second: with less, one piece of memory outlasts the patience of the other end.
pub const BANDWIDTH_BYTES_MIN: u64 = 1 << 20;
