//! The host's random numbers. It knows no ring.
use std::io;

/// Fills `data` from the kernel's generator (getrandom(2)), which is seeded long before any machine runs.
pub(super) fn fill(data: &mut [u8]) -> io::Result<()> {
    getrandom::fill(data).map_err(io::Error::from)
}
