//! Bounds of what other hosts can make this one do, each with the reason for its size.
use std::ops::RangeInclusive;
use std::time::Duration;

/// Connections from other hosts at once; each costs a task and one frame. Moves are few, and memory goes through them.
pub const CONNECTIONS_MAX: usize = 16;

/// How long another host may take to be reached.
pub const CONNECT: Duration = Duration::from_secs(10);

/// How long a whole conversation before a move may take: handshake, greeting, question, answer.
pub const CONVERSATION: Duration = Duration::from_secs(30);

/// Pause after a connection could not be taken, which is a lack of descriptors and passes.
pub const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// How long a ticket is good when nobody says, in seconds: an evening's work on two hosts.
pub const TICKET_S: u64 = 3600;

/// Longest a ticket may be good, in seconds.
pub const TICKET_S_MAX: u64 = 24 * 3600;

/// Most tickets that are good at once: they are made by hand or one a move.
pub const TICKETS_MAX: u32 = 1000;

/// How long the other host may say nothing while a move goes on: a disk that is slow, or a network that stalls. A peer that
/// is gone without a word is noticed by it.
pub const SILENCE: Duration = Duration::from_secs(60);

/// How long the target may take to have everything on its medium.
pub const FLUSH: Duration = Duration::from_secs(1800);

/// Pause before a target that did not answer is asked again, which doubles from here.
pub const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Longest such pause: whoever brings a host back waits no longer to see what became of its servers.
pub const ASK_AGAIN_MAX: Duration = Duration::from_secs(60);

/// Least bandwidth of a move, in bytes a second: with less, one piece outlasts the patience of the other host.
pub const BANDWIDTH_BYTES_MIN: u64 = 1 << 20;

/// How long a proof may be, in characters: something has to be said, and it is kept with an event.
pub const PROOF_CHARS: RangeInclusive<usize> = 10..=1000;

/// Most characters of another host's name that are kept.
pub const HOST_CHARS_MAX: usize = 253;
