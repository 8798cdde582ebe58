//! Bounds of what other hosts can make this one do, each with the reason for its size.
use std::ops::RangeInclusive;
use std::time::Duration;

/// Connections from other hosts at once that have not shown what they are for. Each costs a handshake and one short frame.
/// Moves, and the streams that they wait for, do not count.
pub const STRANGERS_MAX: usize = 32;

/// Conversations at once with one host that has shown what it is for, each with a frame of up to a megabyte: one for each move that
/// comes from it, and some in which it asks what is in the way.
pub const TALKS_MAX: usize = 4 * MOVES_MAX;

/// Longest frame of such a connection in bytes: some times what a ticket or a move's name takes. What is parsed may take tens of
/// times as much memory.
pub const STRANGER_FRAME_BYTES: usize = 4 << 10;

/// Servers that come here at once. Each has a VMM with its memory, some threads, and a share of the network: more of them only
/// take longer.
pub const MOVES_MAX: usize = 16;

/// Most streams for the memory of one machine: more than this many processors are not worth it on the networks there are.
pub const LIVE_STREAMS_MAX: u16 = 4;

/// Bytes that are on their way in each direction of a stream, at either end: a socket's buffer and some records of TLS.
pub const PUMP_BYTES: usize = 256 << 10;

/// Bytes of one stream that are between two hosts at most. With more a guest stands still for longer than it has to; with less
/// a stream is slow where the other host is far: this is 100 MB/s at 10 ms.
pub const STREAM_BYTES: usize = 1 << 20;

/// How often a target looks whether what comes is wanted still.
pub const WANTED_EVERY: Duration = Duration::from_secs(1);

/// How often the source of a machine says that it is there: some times within [`SILENCE`].
pub const BEAT: Duration = Duration::from_secs(10);

/// How long another host may take to be reached, or one that connects to show what it is for.
pub const CONNECT: Duration = Duration::from_secs(10);

/// How long a whole conversation before a move may take: handshake, greeting, question, answer.
pub const CONVERSATION: Duration = Duration::from_secs(30);

/// How long it is waited for what another host said last, on a connection that breaks: it is there already, or never will be.
pub const FAREWELL: Duration = Duration::from_secs(1);

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

/// Least that a host which sends a server sends of it in [`PACE_EVERY`]: far less than with the least bandwidth that can be asked
/// for. Who sends less holds its place, memory and disks here for as long as it likes.
pub const PACE_BYTES_MIN: u64 = 32 << 20;

/// How long that may take. What a medium or a network stalls for is less.
pub const PACE_EVERY: Duration = Duration::from_secs(600);

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

/// Most characters of what another host says to people: a sentence or two, with a list of CPU features.
pub const TEXT_CHARS_MAX: usize = 4096;

/// Most characters of another host's name that are kept.
pub const HOST_CHARS_MAX: usize = 253;
