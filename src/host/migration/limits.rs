//! Bounds of what other hosts can make this one do, each with the reason for its size.
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
