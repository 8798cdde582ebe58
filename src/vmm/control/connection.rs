//! One peer on the control socket: what it sent, what waits for it, what it watches. It never waits itself; a
//! peer that does not read is given up when its queue is full.
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use sys::seqpacket::Socket;
use wire::channel::{self, Channel};
use wire::control::{Message, Request};

use crate::limits::{PACKETS_PER_TURN, QUEUED_MESSAGES_MAX};
use crate::log;

/// One connection.
pub(super) struct Connection {
    channel: Channel,
    /// With the descriptors that go with each.
    queue: VecDeque<(Message, Vec<OwnedFd>)>,
    /// Total of console bytes beyond which the peer wants to be told, once.
    pub(super) console_seen: Option<u64>,
    waits_for_room: bool,
}

/// Why a connection is no more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Gone {
    #[error("the peer closed it")]
    Closed,
    #[error("{QUEUED_MESSAGES_MAX} messages wait and the peer does not read")]
    Slow,
    #[error(transparent)]
    Channel(#[from] channel::Error),
}

impl Gone {
    /// What is worth a line in the log: a peer that closes is not.
    pub(super) fn complaint(&self) -> Option<String> {
        match self {
            Gone::Closed => None,
            Gone::Channel(channel::Error::Socket(cause))
                if matches!(cause.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                None
            }
            other => Some(log::chain(other)),
        }
    }
}

impl Connection {
    pub(super) fn new(socket: Socket) -> io::Result<Connection> {
        socket.set_nonblocking()?;
        Ok(Connection {
            channel: Channel::new(socket),
            queue: VecDeque::new(),
            console_seen: None,
            waits_for_room: false,
        })
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.channel.as_fd().as_raw_fd()
    }

    /// Everything that has arrived, up to the turn's bound, and why there will be no more.
    pub(super) fn receive(&mut self) -> (Vec<(Request, Vec<OwnedFd>)>, Option<Gone>) {
        let mut requests = Vec::new();
        while requests.len() < PACKETS_PER_TURN {
            match self.channel.receive() {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => return (requests, Some(Gone::Closed)),
                Err(error) if error.is_would_block() => break,
                Err(error) => return (requests, Some(Gone::Channel(error))),
            }
        }
        (requests, None)
    }

    /// Queues a message.
    pub(super) fn push(&mut self, message: Message, handles: Vec<OwnedFd>) -> Result<(), Gone> {
        if self.queue.len() >= QUEUED_MESSAGES_MAX {
            self.flush()?;
        }
        if self.queue.len() >= QUEUED_MESSAGES_MAX {
            return Err(Gone::Slow);
        }
        self.queue.push_back((message, handles));
        Ok(())
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Gone> {
        while let Some((message, handles)) = self.queue.front() {
            let handles: Vec<BorrowedFd<'_>> = handles.iter().map(AsFd::as_fd).collect();
            match self.channel.send(message, &handles) {
                Ok(()) => drop(self.queue.pop_front()),
                Err(error) if error.is_would_block() => break,
                Err(error) => return Err(Gone::Channel(error)),
            }
        }
        Ok(())
    }

    pub(super) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether the connection waits for room, when that has changed.
    pub(super) fn changed_interest(&mut self) -> Option<bool> {
        let waits = self.has_queued();
        (waits != std::mem::replace(&mut self.waits_for_room, waits)).then_some(waits)
    }
}
