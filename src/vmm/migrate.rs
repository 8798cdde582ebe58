//! Moving the machine to another VMM while its guest runs: the threads and streams of both ends, the phase table that
//! both act by, and the decision when to stop the guest. It knows of devices only what a disk's guest has
//! changed, and builds nothing: what is to be done to the machine are chores for the main thread, in `machine`.
//!
//! ```text
//! phase, converge (pure) ◀── shared: phase, chores, progress ──▶ main thread
//!                               ▲                  ▲
//!              source: one thread that decides, one for each stream ══▶ target: one thread for each stream
//! ```
use std::io;

use wire::transfer::FrameError;

use crate::snapshot;

mod answers;
mod converge;
mod disk;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod gather;
mod midway;
mod pack;
mod phase;
pub(crate) mod ram;
mod shared;
mod source;
mod stream;
mod target;
mod threads;
mod worker;

pub(crate) use phase::{Effect, Event};
pub(crate) use shared::Shared;
pub(crate) use source::{Source, Sources, open as open_streams, open_again as open_streams_again};
pub(crate) use stream::Stream;
pub(crate) use target::Target;

/// Why a move does not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("stream {stream}")]
    Frame {
        stream: usize,
        #[source]
        cause: FrameError,
    },
    #[error("the other end's stream {stream} is not the one that was expected")]
    Streams { stream: usize },
    #[error("the other end said {0:?} when it had nothing to say")]
    Unexpected(wire::transfer::Word),
    #[error(
        "the guest writes to its memory or its disks faster than the streams take it, even when it is held back"
    )]
    DoesNotConverge,
    #[error(
        "the streams took less than {0} bytes in {1:?} while the guest was held back for them; it runs on here"
    )]
    Stalled(u64, std::time::Duration),
    #[error("the guest stood still for {0} ms and the target was not ready; it runs on here")]
    StoodTooLong(u128),
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error("cannot {doing}")]
    Host {
        doing: &'static str,
        #[source]
        cause: io::Error,
    },
    /// Somebody else has ended it, and said why.
    #[error("the move has ended")]
    Over,
}

impl Error {
    fn at(stream: usize) -> impl Fn(FrameError) -> Error {
        move |cause| Error::Frame { stream, cause }
    }

    /// Whether a stream is gone, as opposed to something being wrong.
    fn is_link(&self) -> bool {
        matches!(self, Error::Frame { cause: FrameError::Link(_), .. })
    }
}
