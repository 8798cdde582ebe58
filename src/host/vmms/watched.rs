//! Lets tokio wait for a descriptor that one of our types owns. It reads and writes nothing.
//! Links, the launcher's connection and pidfds use it.
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Something whose one descriptor is open as long as it lives and never changes.
pub(super) struct Watched<T>(pub(super) T);

impl<T: AsFd> AsRawFd for Watched<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Registers it with tokio's reactor.
#[expect(
    deprecated,
    reason = "the successor is unsafe, which this room forbids; what it demands holds: `Watched` owns its \
              descriptor, so that it stays open and the same as long as AsyncFd holds it"
)]
pub(super) fn watch<T: AsFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<Watched<T>>> {
    AsyncFd::with_interest(Watched(inner), interest)
}
