//! Bounds of what other hosts can make this one do, each with the reason for its size.
use std::ops::RangeInclusive;
use std::time::Duration;

/// Connections from other hosts at once; each costs a task and one frame. Those that carry a stream of a move do not count: a
/// move that was accepted waits for so many and no more.
pub const CONNECTIONS_MAX: usize = 16;

/// Most streams for the memory of one machine: more than this many processors are not worth it on the networks there are.
pub const LIVE_STREAMS_MAX: u16 = 4;

/// Bytes that are on their way in each direction of a stream, at either end: a socket's buffer and some records of TLS.
pub const PUMP_BYTES: usize = 256 << 10;

/// How often the source of a machine says that it is there: some times within [`SILENCE`].
pub const BEAT: Duration = Duration::from_secs(10);

/// Pauses before a machine that has come is announced: what is lost once is told again.
pub const ANNOUNCE_AFTER: [Duration; 3] =
    [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(500)];

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

/// How long a connection is quiet before the kernel asks whether there is another end: what broke while nothing was on its way is
/// known so soon, and a probe costs one packet.
pub const PROBE_EVERY: Duration = Duration::from_secs(5);

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
