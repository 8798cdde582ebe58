//! A connection between two daemons: whole messages over TLS, in both directions. It knows no servers.
use std::io;

use model::Code;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wire::peer::{self, HEAD_BYTES, Message};

use crate::error::{Error, Result};

/// One end.
pub(super) struct Link<S> {
    stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    pub(super) fn new(stream: S) -> Link<S> {
        Link { stream }
    }

    /// Sends a message.
    pub(super) async fn send(&mut self, message: &Message) -> Result<()> {
        let frame = message.frame().map_err(|cause| Error::internal("a message is too long", cause))?;
        self.stream.write_all(&frame).await.map_err(broken)?;
        self.stream.flush().await.map_err(broken)
    }

    /// The next message. Fails with `host_unreachable` when the connection ends or what comes is none; memory is taken
    /// only for what a frame may hold.
    pub(super) async fn receive(&mut self) -> Result<Message> {
        let mut head = [0; HEAD_BYTES];
        self.stream.read_exact(&mut head).await.map_err(broken)?;
        let length = peer::head(head).map_err(strange)?;
        let mut document = vec![0; length];
        self.stream.read_exact(&mut document).await.map_err(broken)?;
        Message::read(&document).map_err(strange)
    }

    /// Says that nothing more comes.
    pub(super) async fn end(&mut self) -> Result<()> {
        self.stream.shutdown().await.map_err(broken)
    }
}

fn broken(cause: io::Error) -> Error {
    Error::new(Code::HostUnreachable, "the connection to the other host broke; try again").caused_by(cause)
}

fn strange(cause: peer::FrameError) -> Error {
    Error::new(Code::HostUnreachable, cause.to_string())
}
