//! A streamed request body as a reader, bounded in bytes and in pauses. What it holds is one piece of the
//! network's; what comes of the bytes is the host's matter. Used by `handlers::images` and `handlers::snapshots`.
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, header};
use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use model::Code;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::error::Failure;
use crate::limits::{LINGER_BYTES_MAX, LINGER_MAX, UPLOAD_BYTES_MAX, UPLOAD_PAUSE_MAX};

/// The declared length of the body; absent with chunked encoding. Fails when it is more than is allowed.
pub(crate) fn check_length(headers: &HeaderMap) -> Result<Option<u64>, Failure> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    match length {
        Some(length) if length > UPLOAD_BYTES_MAX => {
            let detail = format!("the body has {length} bytes, {UPLOAD_BYTES_MAX} are allowed");
            Err(Failure::new(Code::BodyTooLarge, detail))
        }
        length => Ok(length),
    }
}

/// The body, read as it comes.
pub(crate) struct Upload {
    /// Absent when all of it has come, or it broke off.
    body: Option<Body>,
    piece: Bytes,
    left_bytes: u64,
    deadline: Pin<Box<Sleep>>,
}

impl Upload {
    /// Reads this body.
    pub(crate) fn new(body: Body) -> Upload {
        Upload {
            body: Some(body),
            piece: Bytes::new(),
            left_bytes: UPLOAD_BYTES_MAX,
            deadline: Box::pin(tokio::time::sleep(UPLOAD_PAUSE_MAX)),
        }
    }

    /// The next piece that is not empty; `None` at the end.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            let Some(body) = &mut self.body else { return Poll::Ready(None) };
            let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) else {
                ready!(self.deadline.as_mut().poll(cx));
                return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
            };
            self.deadline.as_mut().reset(Instant::now() + UPLOAD_PAUSE_MAX);
            match frame {
                None => {
                    self.body = None;
                    return Poll::Ready(None);
                }
                Some(Err(cause)) => {
                    self.body = None;
                    return Poll::Ready(Some(Err(io::Error::new(io::ErrorKind::UnexpectedEof, cause))));
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) if !piece.is_empty() => return Poll::Ready(Some(Ok(piece))),
                    // Trailers say nothing about what was sent.
                    Ok(_) | Err(_) => {}
                },
            }
        }
    }
}

impl AsyncRead for Upload {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.piece.is_empty() {
            match ready!(this.poll_piece(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Err(cause)) => return Poll::Ready(Err(cause)),
                Some(Ok(piece)) => this.piece = piece,
            }
            match this.left_bytes.checked_sub(this.piece.len() as u64) {
                Some(left_bytes) => this.left_bytes = left_bytes,
                None => return Poll::Ready(Err(io::ErrorKind::FileTooLarge.into())),
            }
        }
        let taken = this.piece.len().min(buf.remaining());
        buf.put_slice(&this.piece[..taken]);
        this.piece.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Upload {
    /// One that was refused before its end is read on for a while: a client that is still sending would find its connection
    /// closed, and never look for the answer that says why. One of which nothing was read may wait to be asked for it.
    fn drop(&mut self) {
        if self.left_bytes < UPLOAD_BYTES_MAX
            && let (Some(body), Ok(runtime)) = (self.body.take(), tokio::runtime::Handle::try_current())
        {
            // Whatever it comes to, there is nobody left who wants it.
            runtime.spawn(tokio::time::timeout(LINGER_MAX, discard(body)));
        }
    }
}

async fn discard(mut body: Body) {
    let mut left_bytes = LINGER_BYTES_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
        match left_bytes.checked_sub(bytes) {
            Some(left) => left_bytes = left,
            None => return,
        }
    }
}
