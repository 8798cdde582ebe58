//! A connection between two daemons: whole messages and pieces of files over TLS, in both directions. It knows no servers.
use std::io;
use std::time::Duration;

use model::Code;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;
use wire::limits::FRAME_BYTES_MAX;
use wire::peer::{self, HEAD_BYTES, Kind, Message, Piece, Saying};

use super::limits;
use crate::error::{Error, Result};

/// One end.
pub(super) struct Link<S> {
    stream: S,
    head: [u8; HEAD_BYTES],
    body: Vec<u8>,
    /// How much of both has come.
    filled: usize,
    /// Longest frame that is read, in bytes.
    longest: usize,
    /// What was said last from here.
    pub(super) said: Option<Saying>,
    /// Whether what is owed was kept for the other end.
    pub(super) has_held: bool,
}

/// What came.
pub(super) enum Received {
    /// A message.
    Message(Message),
    /// A piece of a file, for [`Piece::read`].
    Piece(Vec<u8>),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    pub(super) fn new(stream: S) -> Link<S> {
        Link {
            stream,
            head: [0; HEAD_BYTES],
            body: Vec::new(),
            filled: 0,
            longest: FRAME_BYTES_MAX,
            said: None,
            has_held: false,
        }
    }

    /// One whose other end has shown nothing yet: it gets short frames heard, until [`Link::trust`].
    pub(super) fn with_stranger(stream: S) -> Link<S> {
        Link { longest: limits::STRANGER_FRAME_BYTES, ..Link::new(stream) }
    }

    /// From here on frames may be as long as any.
    pub(super) fn trust(&mut self) {
        self.longest = FRAME_BYTES_MAX;
    }

    /// What is below.
    pub(super) fn get_ref(&self) -> &S {
        &self.stream
    }

    /// What is below: nothing more that comes is a frame.
    pub(super) fn into_inner(self) -> S {
        self.stream
    }

    /// Sends a message.
    pub(super) async fn send(&mut self, message: &Message) -> Result<()> {
        let frame = message.frame().map_err(|cause| Error::internal("a message is too long", cause))?;
        let sent = async {
            self.stream.write_all(&frame).await?;
            self.stream.flush().await
        };
        patiently(sent).await
    }

    /// Says how far a move is.
    pub(super) async fn say(&mut self, saying: Saying) -> Result<()> {
        self.said = Some(saying);
        self.send(&Message::Say(saying)).await
    }

    /// Sends a piece of a file. What follows it makes sure that it is not held back.
    pub(super) async fn send_piece(&mut self, piece: Piece<'_>) -> Result<()> {
        let head = piece.head().map_err(|cause| Error::internal("a piece is too long", cause))?;
        let sent = async {
            self.stream.write_all(&head).await?;
            self.stream.write_all(piece.bytes).await
        };
        patiently(sent).await
    }

    /// What comes next. Fails with `host_unreachable` when the connection ends or what comes is none of it; memory is taken
    /// only for what a frame may hold. Cancel-safe.
    pub(super) async fn receive(&mut self) -> Result<Received> {
        while let Some(left @ [_, ..]) = self.head.get_mut(self.filled..) {
            self.filled += read(&mut self.stream, left).await?;
        }
        let (kind, length) = peer::head(self.head).map_err(strange)?;
        if length > self.longest {
            let detail = format!("the other host sent {length} bytes before it had shown a ticket");
            return Err(Error::new(Code::HostUnreachable, detail));
        }
        if self.body.len() != length {
            self.body = vec![0; length];
        }
        while let Some(left @ [_, ..]) = self.body.get_mut(self.filled - HEAD_BYTES..) {
            self.filled += read(&mut self.stream, left).await?;
        }
        self.filled = 0;
        let body = std::mem::take(&mut self.body);
        match kind {
            Kind::Document => Ok(Received::Message(plain(Message::read(&body).map_err(strange)?))),
            Kind::Piece => Ok(Received::Piece(body)),
        }
    }

    /// The next message, within this time.
    pub(super) async fn message(&mut self, patience: Duration) -> Result<Message> {
        match timeout(patience, self.receive()).await {
            Ok(Ok(Received::Message(message))) => Ok(message),
            Ok(Ok(Received::Piece(_))) => Err(out_of_turn()),
            Ok(Err(cause)) => Err(cause),
            Err(_) => Err(Error::new(Code::HostUnreachable, "the other host does not answer in time")),
        }
    }

    /// Says that nothing more comes.
    pub(super) async fn end(&mut self) -> Result<()> {
        self.stream.shutdown().await.map_err(broken)
    }
}

/// What TLS reads: it asks the kernel for no more than 4 KiB at a time, which is a call for each page of a machine.
pub(super) type Wire = BufReader<TcpStream>;

/// Sets a connection between two daemons up, at either end. Nothing is gathered: words wait for answers, and pieces are large.
/// One that only the other end knows to be broken is found out, though nothing is to be sent (tcp(7)).
pub(super) fn set_up(stream: TcpStream) -> Result<Wire> {
    let set = || {
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, limits::PROBE_EVERY)?;
        sockopt::set_tcp_keepintvl(&stream, limits::PROBE_EVERY)?;
        let silence_ms = u32::try_from(limits::SILENCE.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(&stream, silence_ms)?;
        Ok::<(), io::Error>(())
    };
    set().map_err(|cause| Error::internal("a connection cannot be set up", cause))?;
    Ok(BufReader::with_capacity(limits::PUMP_BYTES, stream))
}

/// Bounds what a stream of a machine holds between two hosts, at either end: all of it has to arrive when the guest stands still,
/// which is only known to have been sent. The kernel takes twice as much for what it keeps beside the data (socket(7)).
pub(super) fn keep_short(stream: &TcpStream) -> Result<()> {
    let bytes = limits::STREAM_BYTES / 2;
    // Without the privilege it is less.
    let set = || {
        sockopt::set_socket_send_buffer_size_force(stream, bytes)
            .or_else(|_| sockopt::set_socket_send_buffer_size(stream, bytes))?;
        sockopt::set_socket_recv_buffer_size_force(stream, bytes)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(stream, bytes))
    };
    set().map_err(|cause| Error::internal("a connection cannot be set up", cause))
}

/// Reads something.
async fn read(stream: &mut (impl AsyncRead + Unpin), into: &mut [u8]) -> Result<usize> {
    match stream.read(into).await.map_err(broken)? {
        0 => Err(broken(io::ErrorKind::UnexpectedEof.into())),
        count => Ok(count),
    }
}

/// What is sent is taken within the time that a host may be silent, or it counts as gone.
async fn patiently(sent: impl Future<Output = io::Result<()>>) -> Result<()> {
    let late = |_| Error::new(Code::HostUnreachable, "the other host takes nothing any more");
    timeout(limits::SILENCE, sent).await.map_err(late)?.map_err(broken)
}

/// What the other side says to people, as it may be kept and shown: of bounded length, and without characters that do
/// something to a terminal.
fn plain(mut message: Message) -> Message {
    let clean = |text: &mut String| {
        *text = text
            .chars()
            .take(limits::TEXT_CHARS_MAX)
            .map(|letter| if letter.is_control() { ' ' } else { letter })
            .collect();
    };
    match &mut message {
        Message::Greet { host, program, .. } | Message::Welcome { host, program, .. } => {
            clean(host);
            clean(program);
        }
        Message::Verdict { blocked_by } => {
            blocked_by.iter_mut().for_each(|obstacle| clean(&mut obstacle.detail))
        }
        Message::Refuse { detail } => clean(detail),
        Message::Ask(_) | Message::Take(_) | Message::Copied | Message::Say(_) => {}
        Message::Again { .. } | Message::Join { .. } => {}
    }
    message
}

/// The other side says something that has no place there.
pub(super) fn out_of_turn() -> Error {
    Error::new(Code::HostUnreachable, "the other host spoke out of turn; upgrade the older of the two")
}

fn broken(cause: io::Error) -> Error {
    Error::new(Code::HostUnreachable, "the connection to the other host broke; try again").caused_by(cause)
}

fn strange(cause: peer::FrameError) -> Error {
    Error::new(Code::HostUnreachable, cause.to_string())
}
