//! A console over a WebSocket: the guest's output as binary frames, typing in either kind. Output is read from
//! the console's log by position, never queued, so a slow reader costs one frame and is told of what it missed.
//! `handlers::console` calls it once the ticket was taken.
use std::pin::pin;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, close_code};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use host::servers::{ConsolePiece, ConsoleStream, Keyboard};
use model::Code;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::closing::Closing;
use crate::limits::{
    CONSOLE_OUTPUT_BYTES_MAX, HEARTBEAT, PINGS_UNANSWERED_MAX, TYPED_LAST_MAX, WRITE_STALL_MAX,
};

/// Serves one reader to its end.
pub(crate) async fn serve(
    socket: WebSocket,
    console: ConsoleStream,
    closing: Closing,
    permit: OwnedSemaphorePermit,
) {
    let (sink, stream) = socket.split();
    // One notice: what the keyboard has to say is said to the one screen or not at all.
    let (notices, from_keyboard) = mpsc::channel(1);
    let keyboard = console.keyboard();
    let read_only = console.read_only;
    let mut kicked = console.kicked();
    let mut screen = Screen { sink, next: None };
    let mut listening = pin!(listen(stream, keyboard, read_only, notices));
    let end = tokio::select! {
        end = screen.show(console, from_keyboard, closing) => {
            if end == End::ReaderGone {
                // What it typed before it went may not have been read yet.
                let _ = timeout(TYPED_LAST_MAX, &mut listening).await;
            }
            end
        }
        // Beside the others, so that a reader who takes nothing goes as quickly as any.
        () = kicked.wait() => End::Kicked,
        end = &mut listening => end,
    };
    screen.close(end).await;
    drop(permit);
}

/// Why a console was closed.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The reader went.
    ReaderGone,
    /// The reader takes nothing.
    ReaderStuck,
    /// The reader was put out.
    Kicked,
    /// The server is gone.
    ServerGone,
    /// The daemon closes; the server runs on.
    Closing,
    /// Something failed.
    Failed(String),
}

impl End {
    /// Close code (RFC 6455, section 7.4.1) and reason.
    fn frame(&self) -> Option<(u16, String)> {
        match self {
            End::ReaderGone | End::ReaderStuck => None,
            End::Kicked => Some((close_code::POLICY, "the console was taken away; ask for it anew".into())),
            End::ServerGone => Some((close_code::NORMAL, "the server is gone".into())),
            End::Closing => Some((close_code::AWAY, "the daemon is restarting; open it again".into())),
            End::Failed(detail) => Some((close_code::ERROR, detail.clone())),
        }
    }
}

/// What the keyboard's side tells the screen's side.
enum Notice {
    /// A text frame.
    Say(String),
    /// The reader answered a ping.
    Alive,
}

struct Screen {
    sink: SplitSink<WebSocket, Message>,
    /// Position that the next piece should start at.
    next: Option<u64>,
}

impl Screen {
    async fn show(
        &mut self,
        mut console: ConsoleStream,
        mut notices: mpsc::Receiver<Notice>,
        mut closing: Closing,
    ) -> End {
        let mut ping = interval(HEARTBEAT);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ping.reset();
        let mut unanswered = 0;
        loop {
            let sent = tokio::select! {
                () = closing.ordered() => return End::Closing,
                piece = console.next() => match piece {
                    Ok(Some(piece)) => self.piece(piece).await,
                    Ok(None) => return End::ServerGone,
                    Err(error) => return End::Failed(error.detail),
                },
                Some(notice) = notices.recv() => match notice {
                    Notice::Say(text) => self.send(Message::Text(Utf8Bytes::from(text))).await,
                    Notice::Alive => {
                        unanswered = 0;
                        Ok(())
                    }
                },
                _ = ping.tick() => {
                    unanswered += 1;
                    if unanswered > PINGS_UNANSWERED_MAX {
                        return End::ReaderStuck;
                    }
                    self.send(Message::Ping(Vec::new().into())).await
                }
            };
            if let Err(end) = sent {
                return end;
            }
        }
    }

    async fn piece(&mut self, piece: ConsolePiece) -> Result<(), End> {
        let missed = self.next.map_or(0, |next| piece.start.saturating_sub(next));
        if missed > 0 {
            let text = serde_json::json!({ "gap_bytes": missed }).to_string();
            self.send(Message::Text(Utf8Bytes::from(text))).await?;
        }
        self.next = Some(piece.start.saturating_add(piece.data.len() as u64));
        for part in piece.data.chunks(CONSOLE_OUTPUT_BYTES_MAX) {
            self.send(Message::Binary(part.to_vec().into())).await?;
        }
        Ok(())
    }

    async fn send(&mut self, message: Message) -> Result<(), End> {
        match timeout(WRITE_STALL_MAX, self.sink.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::ReaderGone),
            Err(_) => Err(End::ReaderStuck),
        }
    }

    async fn close(mut self, end: End) {
        tracing::debug!(?end, "a console was closed");
        let Some((code, mut reason)) = end.frame() else { return };
        // A control frame holds 125 bytes, two of them the code.
        let mut cut = reason.len().min(123);
        while !reason.is_char_boundary(cut) {
            cut -= 1;
        }
        reason.truncate(cut);
        let frame = Message::Close(Some(CloseFrame { code, reason: Utf8Bytes::from(reason) }));
        let _ = timeout(Duration::from_secs(1), self.sink.send(frame)).await;
    }
}

/// Types what the reader sends. The next message is read when the guest has taken this one, so that nothing
/// piles up.
async fn listen(
    mut stream: SplitStream<WebSocket>,
    keyboard: Keyboard,
    read_only: bool,
    notices: mpsc::Sender<Notice>,
) -> End {
    let mut told = false;
    while let Some(message) = stream.next().await {
        let typed = match message {
            Ok(Message::Binary(data)) => data,
            Ok(Message::Text(text)) => text.into(),
            Ok(Message::Ping(_) | Message::Pong(_)) => {
                let _ = notices.send(Notice::Alive).await;
                continue;
            }
            Ok(Message::Close(_)) | Err(_) => return End::ReaderGone,
        };
        let refused = if read_only {
            Some(Code::Forbidden.as_str())
        } else {
            keyboard.write(&typed).await.err().map(|error| error.code.as_str())
        };
        // Once until it works again: a held key must not flood the screen.
        match refused {
            Some(code) if !told => {
                told = true;
                let _ = notices.send(Notice::Say(serde_json::json!({ "refused": code }).to_string())).await;
            }
            Some(_) => {}
            None => told = false,
        }
    }
    End::ReaderGone
}
