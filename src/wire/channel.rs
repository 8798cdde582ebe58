//! One JSON document and its descriptors per seqpacket packet. No threads and no waiting of its own: with a
//! non-blocking socket, `WouldBlock` comes through for the caller's epoll or tokio to handle.
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sys::seqpacket::Socket;

use crate::limits::{DESCRIPTORS_MAX, PACKET_BYTES_MAX};

/// A connected socket that carries documents.
#[derive(Debug)]
pub struct Channel {
    socket: Socket,
}

/// Why a document did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed, or would block.
    #[error("control socket")]
    Socket(#[source] io::Error),
    /// The peer sent something that is not the expected document.
    #[error("unreadable packet of {bytes} bytes")]
    Parse {
        /// The packet's length.
        bytes: usize,
        /// Where and why.
        #[source]
        cause: serde_json::Error,
    },
    /// The document to send is longer than a packet.
    #[error("document of {bytes} bytes is longer than a packet of {PACKET_BYTES_MAX}")]
    TooLong {
        /// The document's length.
        bytes: usize,
    },
}

impl Error {
    /// Whether a non-blocking socket had nothing to read, or no room.
    pub fn is_would_block(&self) -> bool {
        matches!(self, Error::Socket(cause) if cause.kind() == io::ErrorKind::WouldBlock)
    }
}

impl Channel {
    /// Speaks over a connected socket.
    pub fn new(socket: Socket) -> Channel {
        Channel { socket }
    }

    /// Sends one document with its descriptors.
    pub fn send<T: Serialize>(&self, document: &T, descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let text = serde_json::to_vec(document).map_err(|cause| Error::Parse { bytes: 0, cause })?;
        if text.len() > PACKET_BYTES_MAX {
            return Err(Error::TooLong { bytes: text.len() });
        }
        self.socket.send(&text, descriptors).map_err(Error::Socket)
    }

    /// Receives one document with its descriptors; `None` when the peer has closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, Error> {
        // Most documents are short, and whoever waits for them seldom has memory to spare for the longest.
        let length = self.socket.next_length().map_err(Error::Socket)?;
        let mut text = vec![0; length.min(PACKET_BYTES_MAX)];
        let (length, descriptors) = self.socket.receive(&mut text, DESCRIPTORS_MAX).map_err(Error::Socket)?;
        if length == 0 {
            return Ok(None);
        }
        text.truncate(length);
        let document =
            serde_json::from_slice(&text).map_err(|cause| Error::Parse { bytes: length, cause })?;
        Ok(Some((document, descriptors)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    /// For event loops. The number stays valid and the same as long as the channel lives.
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
