//! A client of the API that costs little: one connection that is kept, blocking calls, no retries.
//! The bench measures through it, so what it does itself is part of every figure.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Most bytes of an answer's head.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// A connection.
pub(crate) struct Client<S> {
    stream: S,
    /// What was read and is not yet used.
    buffer: Vec<u8>,
}

/// A connection as the daemon's own user.
pub(crate) type Local = Client<UnixStream>;

/// Over the Unix socket.
pub(crate) fn local(socket: &Path) -> Local {
    let stream = UnixStream::connect(socket).expect("the daemon's socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    Client { stream, buffer: Vec::new() }
}

/// Over TCP.
pub(crate) fn remote(address: SocketAddr) -> Client<TcpStream> {
    let stream = TcpStream::connect(address).expect("the daemon's port");
    stream.set_nodelay(true).expect("no delay");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    Client { stream, buffer: Vec::new() }
}

impl<S: Read + Write> Client<S> {
    /// Sends bytes that are a request.
    pub(crate) fn send(&mut self, request: &[u8]) {
        self.stream.write_all(request).expect("the daemon reads");
    }

    /// Reads one answer; its status and its body.
    pub(crate) fn receive(&mut self) -> (u16, Vec<u8>) {
        let head = loop {
            if let Some(at) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            assert!(self.buffer.len() < HEAD_BYTES_MAX, "an answer's head without an end");
            self.more();
        };
        let text = std::str::from_utf8(&self.buffer[..head]).expect("a head of text");
        let status = text.get(9..12).and_then(|digits| digits.parse().ok()).expect("a status");
        let length = text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
        });
        let end = head + length.expect("a length");
        while self.buffer.len() < end {
            self.more();
        }
        let rest = self.buffer.split_off(end);
        let mut whole = std::mem::replace(&mut self.buffer, rest);
        (status, whole.split_off(head))
    }

    fn more(&mut self) {
        let mut piece = [0; 64 << 10];
        let count = self.stream.read(&mut piece).expect("the daemon answers");
        assert!(count > 0, "the daemon closed the connection");
        self.buffer.extend_from_slice(&piece[..count]);
    }

    /// A request that must succeed; its document.
    pub(crate) fn call(
        &mut self,
        method: &str,
        path: &str,
        prefer: Option<&str>,
        body: Option<&Value>,
    ) -> Value {
        self.send(&request(method, path, None, prefer, body));
        let (status, body) = self.receive();
        let text = String::from_utf8_lossy(&body);
        assert!((200..300).contains(&status), "{method} {path} was answered {status}: {text}");
        serde_json::from_slice(&body).unwrap_or_else(|cause| panic!("{method} {path}: {cause}: {text}"))
    }

    /// A document that is text.
    pub(crate) fn text(&mut self, path: &str) -> String {
        self.send(&request("GET", path, None, None, None));
        let (status, body) = self.receive();
        assert_eq!(status, 200, "{path}");
        String::from_utf8_lossy(&body).into_owned()
    }
}

/// A request's bytes.
pub(crate) fn request(
    method: &str,
    path: &str,
    token: Option<&str>,
    prefer: Option<&str>,
    body: Option<&Value>,
) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n");
    let mut header = |name: &str, value: &str| text.push_str(&format!("{name}: {value}\r\n"));
    if let Some(token) = token {
        header("authorization", &format!("Bearer {token}"));
    }
    if let Some(prefer) = prefer {
        header("prefer", prefer);
    }
    let body = body.map(Value::to_string).unwrap_or_default();
    if !body.is_empty() {
        header("content-type", "application/json");
    }
    if method != "GET" {
        header("content-length", &body.len().to_string());
    }
    (text + "\r\n" + &body).into_bytes()
}
