//! Bounds of snapshots, each with the reason for its size.
use std::time::Duration;

/// Longest sleep for an expiry before the clock is read again: so late one may be behind a clock that was set.
pub const CLOCK: Duration = Duration::from_secs(30);
