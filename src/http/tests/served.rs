//! A host on fakes, served over a real Unix socket and a real TCP port, and a client for both.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use model::{Code, Problem};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::stage::Stage;
use crate::{Config, TcpListen, UnixListen};

/// Longest wait of a test for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A served host; everything of it goes when it goes.
pub(super) struct Served {
    pub(super) host: host::Host,
    pub(super) stage: Stage,
    directory: tempfile::TempDir,
    pub(super) tcp: SocketAddr,
    pub(super) token: String,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
}

impl Served {
    pub(super) async fn start() -> Served {
        Served::start_with(|_| {}).await
    }

    /// A host with another configuration.
    pub(super) async fn start_with(change: impl FnOnce(&mut host::Config)) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let stage = Stage::new();
        let mut config = stage.config();
        change(&mut config);
        let host = stage.open_with(config).await.unwrap();
        crate::stage::import(&host).await;
        let (_, token) = host.tokens().create("test", None).await.unwrap();
        let bound = crate::bind(&Config {
            unix: Some(UnixListen { path: directory.path().join("toftd.sock"), group_id: None }),
            tcp: Some(TcpListen { address: "127.0.0.1:0".parse().unwrap(), tls: None }),
        })
        .await
        .unwrap();
        let tcp = bound.tcp_address().unwrap();
        let (stop, stopped) = oneshot::channel();
        let serving = host.clone();
        let served = tokio::spawn(async move { bound.serve(serving, stopped.map(drop)).await });
        Served { host, stage, directory, tcp, token, stop: Some(stop), served }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.path().join("toftd.sock")
    }

    /// A request over the Unix socket.
    pub(super) async fn call(&self, method: &str, path: &str, body: impl Into<Sent>) -> Answer {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        within(exchange(stream, request(method, path, body.into()))).await
    }

    /// A request over TCP.
    pub(super) async fn call_tcp(&self, method: &str, path: &str, body: impl Into<Sent>) -> Answer {
        let stream = TcpStream::connect(self.tcp).await.unwrap();
        within(exchange(stream, request(method, path, body.into()))).await
    }

    /// A request over the Unix socket whose body is read piece by piece.
    pub(super) async fn open(&self, path: &str, body: impl Into<Sent>) -> Response<Incoming> {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        within(begin(stream, request("GET", path, body.into()))).await
    }

    /// Tells the daemon to stop and waits until it has.
    pub(super) async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        within(self.served).await.unwrap();
        self.host.close().await;
    }
}

/// Fails the test when it takes too long.
pub(super) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it took longer than any test should")
}

/// What is sent besides method and path.
#[derive(Default)]
pub(super) struct Sent {
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Sent {
    pub(super) fn nothing() -> Sent {
        Sent::default()
    }

    pub(super) fn text(content_type: &str, body: impl Into<Vec<u8>>) -> Sent {
        Sent { headers: vec![("content-type".into(), content_type.into())], body: body.into() }
    }

    pub(super) fn with(mut self, name: &str, value: &str) -> Sent {
        self.headers.push((name.into(), value.into()));
        self
    }
}

impl From<Value> for Sent {
    fn from(body: Value) -> Sent {
        Sent::text("application/json", body.to_string())
    }
}

fn request(method: &str, path: &str, sent: Sent) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path).header("host", "toft");
    for (name, value) in sent.headers {
        request = request.header(name, value);
    }
    request.body(Full::from(sent.body)).unwrap()
}

async fn begin<S>(stream: S, request: Request<Full<Bytes>>) -> Response<Incoming>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender.send_request(request).await.unwrap()
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Answer
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (parts, body) = begin(stream, request).await.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answer { status: parts.status, headers: parts.headers, body }
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: hyper::HeaderMap,
    pub(super) body: Bytes,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(|value| value.to_str().unwrap()).unwrap_or_default()
    }

    /// The body as JSON, of an answer that must have this status.
    #[track_caller]
    pub(super) fn json<T: DeserializeOwned>(&self, status: u16) -> T {
        let text = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status.as_u16(), status, "{text}");
        assert_eq!(self.header("content-type"), "application/json");
        serde_json::from_slice(&self.body).unwrap_or_else(|cause| panic!("{cause}: {text}"))
    }

    /// The problem, of an answer that must be one with this code, and whole in every part that all have.
    #[track_caller]
    pub(super) fn problem(&self, code: Code) -> Problem {
        let text = String::from_utf8_lossy(&self.body);
        assert_eq!(self.header("content-type"), "application/problem+json", "{text}");
        let problem: Problem =
            serde_json::from_slice(&self.body).unwrap_or_else(|cause| panic!("{cause}: {text}"));
        assert_eq!(problem.code, code, "{text}");
        assert_eq!(problem.status, self.status.as_u16());
        assert_eq!(problem.status, code.status());
        assert_eq!(problem.title, code.title());
        let tells_actions = problem.allowed_actions.is_some();
        assert_eq!(tells_actions, code == Code::WrongState, "{text}");
        assert_eq!(problem.kind, format!("/errors#{}", code.as_str()));
        assert_eq!(problem.request_id, self.header("x-request-id"));
        assert!(
            !problem.request_id.is_empty() && !problem.detail.is_empty() && problem.instance.starts_with('/')
        );
        problem
    }
}
