//! `toft console`: the server's serial console in this terminal, over a WebSocket opened by a one-use token.
use std::io::IsTerminal;

use clap::Args;
use futures_util::{SinkExt, StreamExt};
use model::Code;
use model::console::{ConsoleToken, CreateConsoleToken};
use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::AsyncReadExt;
use tokio_tungstenite::tungstenite::Message;

use crate::Context;
use crate::error::Error;
use crate::{output, target};

/// Ctrl-], as telnet and others use it.
const ESCAPE: u8 = 0x1d;

/// `toft console`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Name or id.
    server: String,
    /// Only look.
    #[arg(long)]
    read_only: bool,
    /// Do not show what is on the console already.
    #[arg(long)]
    no_replay: bool,
}

pub(crate) async fn run(context: &Context, options: &Options) -> Result<(), Error> {
    let id = target::resolve(&context.client, "servers", &options.server).await?;
    let request = CreateConsoleToken {
        read_only: options.read_only,
        // Positions only grow, so the largest is beyond everything held.
        from: options.no_replay.then_some(u64::MAX),
    };
    let body = serde_json::to_vec(&request).map_err(Error::Answer)?;
    let path = format!("/v1/servers/{id}/console-tokens");
    let token: ConsoleToken = context.client.send("POST", &path, Some(body), &[]).await?.json()?;
    let stream = context.client.connect().await?;
    let url = format!("ws://{}{}", context.client.authority(), token.url);
    let (socket, _) = tokio_tungstenite::client_async(url, stream)
        .await
        .map_err(|cause| Error::Http { endpoint: token.url.clone(), cause: Box::new(cause) })?;
    let terminal = RawTerminal::enter();
    if terminal.is_some() {
        eprint!("connected to {}; Ctrl-] leaves\r\n", options.server);
    }
    let result = relay(socket, options).await;
    drop(terminal);
    eprintln!();
    result
}

async fn relay<S>(mut socket: tokio_tungstenite::WebSocketStream<S>, options: &Options) -> Result<(), Error>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut stdin = tokio::io::stdin();
    let mut typed = vec![0; 1024];
    let mut typing = !options.read_only;
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Binary(data))) => output::print_bytes(&data)?,
                Some(Ok(Message::Text(text))) => eprint!("\r\n[{}]\r\n", notice(&options.server, &text)),
                Some(Ok(Message::Close(frame))) => return closed(frame),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(Error::Console(error.to_string())),
                None => return Ok(()),
            },
            read = stdin.read(&mut typed), if typing => {
                let length = read.map_err(Error::Input)?;
                // A script whose input has ended still wants the output.
                if length == 0 {
                    typing = false;
                    continue;
                }
                let escape = typed[..length].iter().position(|&byte| byte == ESCAPE);
                let data = typed[..escape.unwrap_or(length)].to_vec();
                if !data.is_empty() {
                    let sent = socket.send(Message::Binary(data.into())).await;
                    sent.map_err(|error| Error::Console(error.to_string()))?;
                }
                if escape.is_some() {
                    // The daemon notices a closed socket; there is nobody left to tell of an error.
                    let _ = socket.close(None).await;
                    return Ok(());
                }
            }
        }
    }
}

/// What the daemon tells of the console, for people.
fn notice(server: &str, text: &str) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Notice {
        GapBytes(u64),
        Refused(Code),
    }
    match serde_json::from_str(text) {
        Ok(Notice::GapBytes(count)) => {
            format!("{} were overwritten before they were read", output::bytes(count))
        }
        Ok(Notice::Refused(Code::WrongState)) => {
            format!("{server} does not run: what you type goes nowhere")
        }
        Ok(Notice::Refused(Code::Timeout)) => "the guest does not read what you type".to_owned(),
        Ok(Notice::Refused(code)) => format!("what you type goes nowhere: {}", code.title().to_lowercase()),
        // Of a later daemon.
        Err(_) => text.to_owned(),
    }
}

fn closed(frame: Option<tokio_tungstenite::tungstenite::protocol::CloseFrame>) -> Result<(), Error> {
    match frame {
        Some(frame) if u16::from(frame.code) != 1000 => Err(Error::Console(if frame.reason.is_empty() {
            format!("code {}", u16::from(frame.code))
        } else {
            frame.reason.to_string()
        })),
        _ => Ok(()),
    }
}

/// The terminal without echo and line editing, as it was again when dropped.
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    pub(crate) fn enter() -> Option<RawTerminal> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = termios::tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(RawTerminal { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that has gone.
        let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_daemon_tells_of_a_console_is_for_people() {
        let cases = [
            (r#"{"gap_bytes": 2048}"#, "2 KiB were overwritten before they were read"),
            (r#"{"refused": "wrong_state"}"#, "web does not run: what you type goes nowhere"),
            (r#"{"refused": "timeout"}"#, "the guest does not read what you type"),
            (r#"{"refused": "machine_failed"}"#, "what you type goes nowhere: the machine failed"),
            (r#"{"new": 1}"#, r#"{"new": 1}"#),
        ];
        for (text, told) in cases {
            assert_eq!(notice("web", text), told);
        }
    }
}
