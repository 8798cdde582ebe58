//! Bounds of volumes, each with the reason for its size.
use std::time::Duration;

/// Bytes copied between two looks at whether the copy was cancelled: some 10 ms of work.
pub const PIECE_BYTES: usize = 8 << 20;

/// How often a copy's progress is told.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Bytes of the file system that new volumes and images leave free, so that records can still be written.
pub const RESERVE_BYTES: u64 = 64 << 20;
