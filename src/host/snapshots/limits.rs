//! Bounds of snapshots, each with the reason for its size.
use std::time::Duration;

/// Longest sleep for an expiry before the clock is read again: so late one may be behind a clock that was set.
pub const CLOCK: Duration = Duration::from_secs(30);

/// Pause before expiries are looked at when something has changed: a hundred clones let go of their snapshot one by one.
pub const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How long a VMM may keep a file open that it has written to its end.
pub const LET_GO: Duration = Duration::from_secs(5);

/// Pause between two looks at whether it has.
pub const LET_GO_AGAIN: Duration = Duration::from_millis(2);

/// How often a file is tried to be opened that is in somebody's hands for a moment, and the pause between: far longer than a
/// thread that holds it is kept from its processor.
pub const OPEN_TRIES: u32 = 100;
/// See [`OPEN_TRIES`].
pub const OPEN_AGAIN: Duration = Duration::from_millis(5);

/// Longest head of an exported snapshot in bytes: 64 keys of 8 KiB and 64 KiB of user data, some of it escaped.
pub const HEAD_BYTES_MAX: usize = 1 << 20;

/// Longest text of an exported snapshot in characters where nothing else bounds it.
pub const TEXT_CHARS_MAX: usize = 256;

/// How often an import's progress is recorded.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Bytes of an export that are handed over in one go.
pub const EXPORT_PIECE_BYTES: usize = 256 << 10;

/// How many such pieces wait for their reader.
pub const EXPORT_PIECES_MAX: usize = 4;

/// Longest silence of whoever reads an export.
pub const EXPORT_SILENCE_MAX: Duration = Duration::from_secs(60);

/// After how long what a machine has used of a snapshot's memory is looked at: a guest that was woken has answered by then,
/// and does what it does.
pub const USED_AFTER: Duration = Duration::from_secs(2);

/// Room between what was used that is read along with it: as much as the kernel maps around a page that is read.
pub const USED_GAP_BYTES: u64 = 64 << 10;

/// Most runs of what was used that are kept; more are joined over wider gaps.
pub const USED_RUNS_MAX: usize = 4096;

/// Longest list of them in bytes: each is two numbers of up to twenty digits.
pub const USED_BYTES_MAX: u64 = 48 * USED_RUNS_MAX as u64;

/// Runs that are so long are read, for which the kernel reads ahead by itself; of shorter ones it is told. A program that
/// used 64 MiB of a file out of the cache, in runs of 64 KiB and in any order, took 60 to 77 ms where the kernel was told of them, and 224
/// to 264 without. Where they lay in one run and it used them in order, it took 57 to 60 ms with that, 34 to 36 without, and 38 with reading.
pub const AHEAD_LONG_BYTES: u64 = 1 << 20;

/// Bytes that the kernel is asked to read ahead at once: what it does for a reader by itself, unless told otherwise.
pub const AHEAD_PIECE_BYTES: u64 = 128 << 10;
