//! Bounds of volumes, each with the reason for its size.
use std::time::Duration;

/// Bytes copied between two looks at whether the copy was cancelled: some 10 ms of work.
pub const PIECE_BYTES: usize = 8 << 20;

/// What an overlay has in one file or the other, in bytes: its machine writes no less at once.
pub const HOLE_BYTES: u64 = 4096;

/// What two snapshots' disks are compared by, in bytes: what differs is kept twice in whole blocks, and each block that does not
/// may need a row of 24 bytes in a list.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// Bytes that are compared between two looks at whether anybody wants it still.
pub const BLOCKS_BYTES: usize = 1 << 20;

/// How long a machine waits for the disk of the one before it. The kernel takes the rings of a process apart after
/// its end has been told, some milliseconds or more on a busy host, and they hold the files they worked on.
pub const LET_GO: Duration = Duration::from_secs(3);

/// Pause between two looks at whether it was let go.
pub const LET_GO_AGAIN: Duration = Duration::from_millis(5);

/// How often a copy's progress is told.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Bytes of the file system that new volumes and images leave free, so that records can still be written.
pub const RESERVE_BYTES: u64 = 64 << 20;
