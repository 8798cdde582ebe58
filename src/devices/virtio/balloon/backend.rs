//! Returns pages to the host. It knows no ring.
use memory::{Error, Ram};
use vm_memory::GuestAddress;

use super::request::Pages;

/// What became of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Bytes that the host has back.
    Returned(u64),
    /// The range is not guest memory.
    Refused,
    /// The host could not take it; the guest keeps the pages, which costs memory and nothing else.
    Failed,
}

pub(super) fn discard(memory: &Ram, pages: Pages) -> Outcome {
    match memory::discard(memory, GuestAddress(pages.start), pages.bytes) {
        Ok(()) => Outcome::Returned(pages.bytes),
        Err(Error::Discard(_)) => Outcome::Failed,
        Err(_) => Outcome::Refused,
    }
}
