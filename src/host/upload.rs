//! A caller's stream, for work that may wait: pieces go from the task that receives them to the thread that uses them,
//! and no more of them than a few wait. `images` and `snapshots` read what is sent to them this way.
use std::io::{self, Read};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{Notify, mpsc};

/// Longest silence of a caller in the middle of an upload.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Bytes that are read in one go.
const PIECE_BYTES: usize = 64 << 10;

/// Pieces that wait for the disk. When they are not taken, the sender is not read any further.
const PIECES_MAX: usize = 4;

/// Has `work` read a stream. None when it was cancelled, whatever the work came to: one that sends nothing is not waited for,
/// and its reader finds the stream broken off. A stream that is silent for too long is `TimedOut` to the reader, one that broke
/// off `ConnectionAborted`.
pub(crate) async fn feed<T>(
    stream: Box<dyn AsyncRead + Send + Unpin>,
    cancelled: &Notify,
    work: impl AsyncFnOnce(Pieces) -> T,
) -> Option<T> {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let work = work(Pieces { pieces, piece: Vec::new(), at: 0, ended: false });
    tokio::pin!(work);
    tokio::select! {
        done = &mut work => Some(done),
        () = pump(stream, sender) => Some(work.await),
        () = cancelled.notified() => {
            let _ = work.await;
            None
        }
    }
}

/// Hands a caller's stream on, piece by piece, until it ends or nobody takes it. The end is an empty piece, so that
/// it is told from a daemon that goes down.
async fn pump(mut stream: Box<dyn AsyncRead + Send + Unpin>, pieces: mpsc::Sender<io::Result<Vec<u8>>>) {
    loop {
        let mut piece = vec![0; PIECE_BYTES];
        let read = match tokio::time::timeout(SILENCE_MAX, stream.read(&mut piece)).await {
            Ok(read) => read.map_err(|cause| match cause.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::FileTooLarge => cause,
                // Whatever the transport calls it, to the reader the sender is gone.
                _ => io::Error::new(io::ErrorKind::ConnectionAborted, cause),
            }),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        let last = !matches!(read, Ok(1..));
        let piece = read.map(|length| {
            piece.truncate(length);
            piece
        });
        if pieces.send(piece).await.is_err() || last {
            return;
        }
    }
}

/// Reads what is pumped, from a thread that may wait.
pub(crate) struct Pieces {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() && !self.ended {
            self.at = 0;
            self.piece =
                self.pieces.blocking_recv().unwrap_or(Err(io::ErrorKind::ConnectionAborted.into()))?;
            self.ended = self.piece.is_empty();
        }
        let mut left = self.piece.get(self.at..).unwrap_or_default();
        let read = Read::read(&mut left, buffer)?;
        self.at += read;
        Ok(read)
    }
}
