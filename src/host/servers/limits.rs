//! Bounds of servers: waits for VMMs, restarts, console readers. Each with the reason for its size.
use std::time::Duration;

/// Most bytes of an image's disk that are copied while the VMM is being started; they take a fraction of a second.
pub const QUICK_FILL_BYTES_MAX: u64 = 64 << 20;

/// First pause before a failed server is started again, in milliseconds; doubled with each failure.
pub const RESTART_PAUSE_MS: i64 = 1000;

/// Longest such pause, in milliseconds: somebody who mends the cause sees it work within minutes.
pub const RESTART_PAUSE_MS_MAX: i64 = 300_000;

/// A machine that ran so long in milliseconds was sound; pauses begin anew after it.
pub const STABLE_MS: i64 = 600_000;

/// How long a VMM may take to build and start its machine. 1 TiB of memory slots and a cold disk fit.
pub const BOOT: Duration = Duration::from_secs(60);

/// How long a VMM may take to answer a command that touches no disk.
pub const COMMAND: Duration = Duration::from_secs(5);

/// How long parking may take: the VMM's own bound on draining its devices, and some.
pub const PAUSE: Duration = Duration::from_secs(30);

/// How long a VMM that was told to quit may take before it is killed.
pub const QUIT: Duration = Duration::from_secs(2);

/// How long the kernel may take to end a killed process: it frees the guest's memory meanwhile.
pub const KILL: Duration = Duration::from_secs(30);

pub use crate::limits::{FILE_BYTES_MIN, RETRY, RETRY_MAX, SHELL_QUIT};

/// Longest sleep for a deadline before the clock is read again: so long it may be behind a clock that was set.
pub const CLOCK: Duration = Duration::from_secs(30);

/// Pause between attempts to reach a VMM that lives and does not answer.
pub const RECONNECT: Duration = Duration::from_secs(2);

/// Readers of one console at once: people and a recorder; each costs a task and one piece of output.
pub const CONSOLE_READERS_MAX: usize = 16;

/// Bytes of one piece of console output.
pub const CONSOLE_PIECE_BYTES: usize = 32 * 1024;

/// Most bytes of one `console_log` answer: the whole ring.
pub const CONSOLE_LOG_BYTES_MAX: usize = 1 << 20;

/// How long a console ticket is worth something.
pub const CONSOLE_TOKEN: Duration = Duration::from_secs(60);

/// Pause before typing goes on when the guest's serial port is full.
pub const CONSOLE_FULL: Duration = Duration::from_millis(10);

/// How long typing waits for a guest that reads nothing before it gives up.
pub const CONSOLE_STUCK: Duration = Duration::from_secs(30);

/// Least time between two events of one kind that a guest causes at will, such as resets and device faults. It doubles
/// with each that follows, up to [`GUEST_EVENT_EVERY_MAX`].
pub const GUEST_EVENT_EVERY: Duration = Duration::from_secs(10);

/// Longest such pause, and so long there must have been none at all before pauses begin anew. A hundred guests that cause
/// all they can fill the event log ([`crate::limits::EVENTS_KEPT`]) in two weeks.
pub const GUEST_EVENT_EVERY_MAX: Duration = Duration::from_secs(3600);

/// What a VMM needs besides its guest's memory, in bytes: measured at 5 MiB, with room for queues.
pub const VMM_OVERHEAD_BYTES: u64 = 16 << 20;

/// Memory kept for the host itself, in bytes, besides one part in [`HOST_RESERVE_PART`] of the total.
pub const HOST_RESERVE_BYTES: u64 = 256 << 20;

/// One part in so many of the host's memory is kept for its page tables and caches.
pub const HOST_RESERVE_PART: u64 = 32;

/// Largest VMM log in bytes that is kept when the next machine starts; a longer one loses its beginning.
pub const LOG_BYTES_MAX: u64 = 1 << 20;

/// Notices of one VMM that wait for its actor. More are dropped: a guest can cause them at will.
pub const NOTICES_MAX: usize = 64;

/// How often a save is looked at: it takes some milliseconds for a small memory.
pub const SAVE_LOOK: Duration = Duration::from_millis(20);

/// How often in a row a VMM that lives may leave the question for its memory without an answer, and the pause between.
pub const SETTLE_ASKS: u32 = 5;
/// See [`SETTLE_ASKS`].
pub const SETTLE_ASK_AGAIN: Duration = Duration::from_millis(200);

/// How often a move is looked at when its VMM says nothing: it tells of each phase, but not to a daemon that is new.
pub const MOVE_LOOK: Duration = Duration::from_millis(50);

/// How often is looked whether a server that comes has a VMM, which takes some milliseconds.
pub const MOVE_SPAWN_LOOK: Duration = Duration::from_millis(3);

/// How long a handover between two VMMs of this host may take before it is given up: memory stays where it is, and the guest
/// stands still for the end of it only.
pub const UPGRADE: Duration = Duration::from_secs(10);

/// How long a guest may stand still for a handover, in milliseconds, before it runs on where it was. It takes some, on a host that
/// has time.
pub const UPGRADE_STANDSTILL_MS: u32 = 2000;

/// Pause before a handover is looked at again of which something went wrong.
pub const UPGRADE_AGAIN: Duration = Duration::from_millis(20);

/// Notices of a VMM in a handover that wait to be read, which happens at once. It says a dozen.
pub const UPGRADE_NOTICES_MAX: usize = 256;

/// Bytes a second at which memory is read from a disk and compared, at the least: a slow disk in bad company.
const RESTORE_BYTES_PER_S: u64 = 20 << 20;

/// How long a VMM may take to read so much memory from the disk.
pub const fn restoring(memory_bytes: u64) -> Duration {
    Duration::from_secs(memory_bytes / RESTORE_BYTES_PER_S)
}

/// How long the record of a move that has ended is kept, in milliseconds, for a host that asks how it came out: as long as
/// anybody leaves a host off that is to come back.
pub const MOVES_KEPT_MS: i64 = 180 * 24 * 3600 * 1000;

/// How often progress of a copy is written down.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Most characters of what a VMM says about a device's fault that are recorded.
pub const FAULT_CHARS_MAX: usize = 500;

/// How long a start that failed waits for the VMM's end, so that its last will can say why.
pub const ENDED: Duration = Duration::from_secs(1);

/// Most tickets of one server that are still worth something.
pub const CONSOLE_TOKENS_MAX: usize = 256;

/// Pauses before a machine that has come from another host is announced once more.
pub const ANNOUNCE_AFTER: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(500)];

/// Pause between two looks at what the guest of a clone prints, for word of its identity: the whole ring takes three seconds.
pub const IDENTITY_EVERY: Duration = Duration::from_millis(100);
