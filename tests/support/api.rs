//! A client of the API for tests that kill its server: every answer is data, and so is that none came.
//! It speaks HTTP over the Unix socket, one connection a request, and retries nothing by itself.
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;

/// Longest wait for an answer; a wait for an operation asks for less.
const ANSWER: Duration = Duration::from_secs(40);

/// Where the daemon answers.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    socket: PathBuf,
}

/// What the daemon said.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// The HTTP status.
    pub(crate) status: u16,
    /// Whether it says that an earlier call with this key was answered the same.
    pub(crate) replayed: bool,
    /// The document.
    pub(crate) body: Value,
}

/// Nobody answered, for this reason: the daemon is not there, or died in between.
#[derive(Debug)]
pub(crate) struct Gone(String);

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "nobody answered: {}", self.0)
    }
}

impl Answer {
    /// Whether it is a success.
    pub(crate) fn is_ok(&self) -> bool {
        self.status < 300
    }

    /// The operation that was accepted; panics with the whole answer when none was.
    pub(crate) fn operation(&self) -> String {
        // Of several, all of which one call makes or none, the first stands for the rest.
        let one = self.body.pointer("/operation/id").or_else(|| self.body.pointer("/items/0/operation/id"));
        match one.and_then(Value::as_str) {
            Some(id) => id.to_owned(),
            None => panic!("no operation was accepted: {} {}", self.status, self.body),
        }
    }

    /// The `code` of a problem.
    pub(crate) fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }
}

/// The text in a document where there must be one.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

impl Api {
    /// A client of the daemon behind this socket.
    pub(crate) fn new(socket: PathBuf) -> Api {
        Api { socket }
    }

    /// One request.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Option<Value>,
    ) -> Result<Answer, Gone> {
        let exchange = async {
            let response = self.send(method, path, key, body).await?;
            let status = response.status().as_u16();
            let replayed = response.headers().contains_key("idempotency-replayed");
            let kind = response.headers().get("content-type").map(|kind| kind.as_bytes().to_vec());
            let is_text = kind.is_some_and(|kind| kind.starts_with(b"text/"));
            let bytes = response.into_body().collect().await.map_err(gone)?.to_bytes();
            let body = match (is_text, bytes.is_empty()) {
                // A console on which nothing was written yet is a text too.
                (true, _) => Value::String(String::from_utf8_lossy(&bytes).into_owned()),
                (_, true) => Value::Null,
                _ => serde_json::from_slice(&bytes).map_err(gone)?,
            };
            Ok(Answer { status, replayed, body })
        };
        match tokio::time::timeout(ANSWER, exchange).await {
            Ok(answer) => answer,
            Err(_) => panic!("{path} was not answered within {ANSWER:?}, and the connection lives"),
        }
    }

    /// Reads a document.
    pub(crate) async fn read(&self, path: &str) -> Result<Answer, Gone> {
        self.call(Method::GET, path, None, None).await
    }

    /// Reads a document that must be there.
    pub(crate) async fn get(&self, path: &str) -> Value {
        let answer = self.read(path).await.unwrap_or_else(|gone| panic!("{path}: {gone}"));
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.body
    }

    /// Every item of a list.
    pub(crate) async fn all(&self, path: &str) -> Vec<Value> {
        let (mut items, mut cursor) = (Vec::new(), String::new());
        loop {
            let mut page = self.get(&format!("{path}?limit=200{cursor}")).await;
            if let Some(more) = page["items"].as_array_mut() {
                items.append(more);
            }
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return items,
            }
        }
    }

    /// The body of a stream, to be read as it comes.
    pub(crate) async fn stream(&self, path: &str) -> Result<Incoming, Gone> {
        let response = self.send(Method::GET, path, None, None).await?;
        match response.status().as_u16() {
            200 => Ok(response.into_body()),
            status => Err(Gone(format!("{path} answered {status}"))),
        }
    }

    /// The whole event log.
    pub(crate) async fn log(&self) -> Vec<Value> {
        let path = "/v1/events?after=0&follow=false&format=ndjson";
        let body = self.stream(path).await.unwrap_or_else(|gone| panic!("{path}: {gone}"));
        let bytes = body.collect().await.unwrap_or_else(|cause| panic!("{path}: {cause}")).to_bytes();
        events(&bytes)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Option<Value>,
    ) -> Result<Response<Incoming>, Gone> {
        let stream = tokio::net::UnixStream::connect(&self.socket).await.map_err(gone)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(gone)?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let bytes = match body {
            Some(body) => {
                request = request.header("content-type", "application/json");
                Bytes::from(body.to_string())
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(bytes)).expect("a request");
        sender.send_request(request).await.map_err(gone)
    }
}

/// The events in NDJSON; heartbeats are empty lines.
pub(crate) fn events(bytes: &[u8]) -> Vec<Value> {
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).expect("an event")).collect()
}

fn gone(cause: impl std::fmt::Display) -> Gone {
    Gone(cause.to_string())
}
