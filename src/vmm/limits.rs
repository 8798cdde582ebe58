//! Bounds of this room, each with the reason for its size.

/// Most open control connections: the daemon, its successor while it is upgraded, and people who look.
pub(crate) const CONNECTIONS_MAX: usize = 8;

/// Descriptors that there is room for from the start, before there are threads: those of the largest machine, with both ends of a
/// move. Each takes eight bytes.
pub(crate) const DESCRIPTORS_READY: i32 = 512;

/// Most messages that wait for one peer. A peer that does not read this many has died or hangs; it is dropped
/// and may connect again.
pub(crate) const QUEUED_MESSAGES_MAX: usize = 64;

/// Packets read from one connection before the others get their turn.
pub(crate) const PACKETS_PER_TURN: usize = 16;

/// Most device faults that wait to be told, and that are told within [`FAULTS_EVERY_MS`]. A guest can cause them at will; the rest is only counted.
pub(crate) const FAULTS_MAX: usize = 32;

/// The span in which so many are told, and the rest is only counted, in milliseconds: the daemon closes a connection on
/// which too much comes unasked.
pub(crate) const FAULTS_EVERY_MS: u64 = 1_000;

/// Longest text of one device fault, in bytes.
pub(crate) const FAULT_BYTES_MAX: usize = 512;

/// How often the progress of a save is told at most, in milliseconds.
pub(crate) const SAVE_TOLD_EVERY_MS: u64 = 100;

/// Pages that may be left to protect in the moment that is saved: each run of them costs a microsecond of standing still.
pub(crate) const ARMED_PAGES_MAX: usize = 512;

/// Rounds of protecting what was just written before the moment comes all the same.
pub(crate) const ARMED_ROUNDS_MAX: usize = 8;

/// How often what is written is protected again while the moment is waited for, in milliseconds.
pub(crate) const REARM_EVERY_MS: u64 = 20;

/// Most runs of memory that are mapped from lower files of a snapshot: each makes the kernel keep two mappings more, of
/// which a process has 65 530, and what the guest gives back of them takes its share.
pub(crate) const MAPPED_RUNS_MAX: usize = 8_192;

/// Pages of a piece of memory that may be left to copy as the machine stands still for it: half a millisecond.
pub(crate) const SETTLE_PAGES_MAX: u64 = 256;

/// Rounds of copying what was just written before the machine stands still for a piece all the same. A guest that writes
/// all of it again and again makes it stand still for as long as a copy of one piece takes.
pub(crate) const SETTLE_ROUNDS_MAX: u32 = 4;

/// Zeroes in a row, in bytes, that are written as the machine stands still, and not given back: a guest could make each of them a
/// system call, and it has all this memory anyway.
pub(crate) const SETTLE_ZEROES_MAX: u64 = 256 << 10;

/// Bytes of a disk that are looked at before who copies it lets others have its processor.
pub(crate) const COPY_GIVES_WAY_BYTES: u64 = 2 << 20;

/// Pieces of a disk's backing file that are filled in before they are written down: 16 MiB, below what a group of some 160 MiB may have that is
/// not.
pub(crate) const SETTLE_WRITE_PIECES: u32 = 32;

/// How long the machine may stand still for what its devices have in flight before a piece is turned, in milliseconds. Then it
/// runs on, and the piece is due again later; twice as long after some tries, up to the longest.
pub(crate) const SETTLE_DRAIN_MS: u64 = 50;
/// See [`SETTLE_DRAIN_MS`].
pub(crate) const SETTLE_DRAIN_MS_MAX: u64 = 400;
/// See [`SETTLE_DRAIN_MS`].
pub(crate) const SETTLE_TRIES_EACH: u32 = 4;
/// How often a piece is tried: three quarters of a minute.
pub(crate) const SETTLE_TRIES_MAX: u32 = 20;

/// For how many times the length of a pause the machine runs before the next one.
pub(crate) const SETTLE_RUNS_ON: u32 = 9;

/// How often the progress of a move is told at most, in milliseconds.
pub(crate) const MOVE_TOLD_EVERY_MS: u64 = 100;

/// How long one end of a move waits for the other to read, write or answer, in milliseconds. The least bandwidth there is
/// sends a piece of memory in two seconds; a switch that fails over takes some.
pub(crate) const LINK_PATIENCE_MS: u16 = 30_000;

/// How much of memory that is owed is on its way over one stream without anybody waiting for it, in bytes: what comes in between for
/// whoever waits, 2 ms at 1 Gbit/s, and what keeps a stream busy whose answer takes as long.
pub(crate) const ASKED_AHEAD_BYTES: u64 = 256 << 10;

/// In what time a vCPU that writes too fast both runs and is held back, in milliseconds: below what a guest's timers notice.
pub(crate) const BRAKE_EVERY_MS: u64 = 10;

/// How often it is looked, at most, whether such a vCPU has run for its share, in microseconds.
pub(crate) const BRAKE_LOOK_US: u64 = 100;

/// The same of one that has not done so for longer than both take, in milliseconds.
pub(crate) const BRAKE_IDLE_MS: u64 = 1;

/// How often it is looked how much of a round is written again while it goes, in milliseconds. A look costs a bit of each page.
pub(crate) const GLANCE_EVERY_MS: u64 = 250;

/// How long the streams may take, in milliseconds, for so many bytes while vCPUs are held back for them: far longer than with
/// the least bandwidth that a move can be given.
pub(crate) const THROTTLED_MS_MAX: u64 = 60_000;
/// See [`THROTTLED_MS_MAX`].
pub(crate) const THROTTLED_BYTES_MIN: u64 = 16 << 20;

/// How long all vCPUs may take to leave KVM_RUN. They are interrupted by a signal and finish one emulated
/// access; only a host that does not schedule them takes longer.
pub(crate) const PARK_MS_MAX: u64 = 5_000;

/// Most lines about the guest's doings that one process writes to its log, which nobody rotates.
pub(crate) const LOG_LINES_MAX: u32 = 1_000;

/// How long a process that ends waits for its peers to take what is queued for them. The will is written
/// before, so nothing is lost with a peer that does not listen.
pub(crate) const FAREWELL_MS_MAX: u64 = 200;

/// How long a VMM without a machine waits for somebody to connect. A daemon connects at once, and one that was
/// killed is back within seconds.
pub(crate) const FORSAKEN_MS: i32 = 120_000;

/// How long neither peers nor guest have anything to say before a VMM gives back what only the building of its machine needed. A
/// guest's first moments need much of the same code, which would come back a piece at a time.
pub(crate) const TRIM_MS: i32 = 100;

/// Events taken from epoll at once.
pub(crate) const EVENTS_PER_WAIT: usize = 32;

/// Most VMMs of one launcher: more servers than any host of ours has memory for.
pub(crate) const CHILDREN_MAX: usize = 4_096;

/// Longest label of a VMM, in bytes.
pub(crate) const LABEL_BYTES_MAX: usize = 64;

/// How long the launcher waits for its probing child. Where kernel mode is emulated, the probe takes a second.
pub(crate) const PROBE_MS_MAX: u64 = 30_000;

/// Longest report of a probing child in bytes: below a pipe's capacity, so that the child never waits.
pub(crate) const REPORT_BYTES_MAX: usize = 32 * 1024;

/// Instructions that the probe's loop runs at first, and the most it runs to get a steady measurement.
pub(crate) const PROBE_LOOPS_FIRST: u64 = 20_000;
/// See [`PROBE_LOOPS_FIRST`].
pub(crate) const PROBE_LOOPS_MAX: u64 = 1 << 32;

/// Shortest measurement of the probe in nanoseconds; the clock's own cost disappears in it.
pub(crate) const PROBE_NS_MIN: u64 = 50_000_000;

/// Exits that the probe measures: enough for a median.
pub(crate) const PROBE_EXITS: usize = 200;

/// Instructions per second of kernel mode below which Linux is not expected to boot: it runs about a thousand
/// million of them on its way to the first process, and users wait a minute, not hours. An emulated host of the
/// lab, which boots it in twenty seconds, measures 800 million.
pub(crate) const LINUX_IPS_MIN: u64 = 20_000_000;
