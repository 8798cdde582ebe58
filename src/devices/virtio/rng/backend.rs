//! The host's random numbers. It knows no ring.
use std::io;

/// Fills `data` from the kernel's generator.
pub(super) fn fill(data: &mut [u8]) -> io::Result<()> {
    sys::random::fill(data)
}
