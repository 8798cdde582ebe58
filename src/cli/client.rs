//! One HTTP request at a time over a Unix socket, TCP or TLS. Every request has a connection of its own: the
//! commands are short and a fresh connection has no state to go stale.
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use futures_util::TryStreamExt;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use model::Problem;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::error::Error;
use crate::limits;

/// Where the daemon listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Unix(PathBuf),
    Tcp { host: String, port: u16 },
    Tls { host: String, port: u16 },
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Endpoint, String> {
        let host_port = |rest: &str, default: u16| -> Result<(String, u16), String> {
            let rest = rest.trim_end_matches('/');
            let (host, port) = match rest.rsplit_once(':') {
                Some((host, port)) if !port.ends_with(']') => {
                    (host, port.parse().map_err(|_| format!("{port:?} is not a port"))?)
                }
                _ => (rest, default),
            };
            if host.is_empty() || host.contains('/') {
                return Err(format!("{text:?} names no host"));
            }
            Ok((host.trim_matches(['[', ']']).to_owned(), port))
        };
        if let Some(path) = text.strip_prefix("unix:") {
            Ok(Endpoint::Unix(path.into()))
        } else if let Some(rest) = text.strip_prefix("http://") {
            host_port(rest, 80).map(|(host, port)| Endpoint::Tcp { host, port })
        } else if let Some(rest) = text.strip_prefix("https://") {
            host_port(rest, 443).map(|(host, port)| Endpoint::Tls { host, port })
        } else if text.starts_with('/') {
            Ok(Endpoint::Unix(text.into()))
        } else {
            Err("use unix:PATH, http://HOST:PORT or https://HOST:PORT".to_owned())
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
            Endpoint::Tcp { host, port } => write!(f, "http://{host}:{port}"),
            Endpoint::Tls { host, port } => write!(f, "https://{host}:{port}"),
        }
    }
}

/// Anything bytes can flow over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// The daemon as the commands see it.
pub(crate) struct Client {
    endpoint: Endpoint,
    token: Option<String>,
    tls: Option<TlsConnector>,
    show_http: bool,
    idempotency_key: Option<String>,
    /// The daemon has asked for the body of an upload.
    may_send: Arc<tokio::sync::Notify>,
}

/// Asks to be told before the body is sent, so that a refusal is read and not lost behind a broken pipe.
const EXPECT: (&str, &str) = ("expect", "100-continue");

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) body: Bytes,
}

impl Answer {
    /// The body as a document.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_json::from_slice(&self.body).map_err(Error::Answer)
    }
}

impl Client {
    pub(crate) fn new(
        endpoint: Endpoint,
        token: Option<String>,
        ca_file: Option<&Path>,
        show_http: bool,
        idempotency_key: Option<String>,
    ) -> Result<Client, Error> {
        let tls = match (&endpoint, ca_file) {
            (Endpoint::Tls { .. }, Some(file)) => Some(connector(file)?),
            (Endpoint::Tls { .. }, None) => {
                return Err(Error::Usage("https needs --ca-file: the authority to trust".to_owned()));
            }
            _ => None,
        };
        Ok(Client { endpoint, token, tls, show_http, idempotency_key, may_send: Arc::default() })
    }

    /// Sends a request and reads the whole answer. A mutating request carries an idempotency key. Statuses from
    /// 400 become [`Error::Problem`].
    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        json: Option<Vec<u8>>,
        headers: &[(&str, &str)],
    ) -> Result<Answer, Error> {
        let body = json.map(|json| ("application/json", json));
        self.print_request(method, path, body.as_ref().map(|(_, json)| json.as_slice()), headers);
        let (kind, bytes) = match body {
            Some((kind, bytes)) => (Some(kind), Bytes::from(bytes)),
            None => (None, Bytes::new()),
        };
        let length = bytes.len() as u64;
        let body = Full::new(bytes).map_err(|never| match never {}).boxed();
        let response = self.in_time(self.exchange(method, path, kind, Some(length), body, headers)).await?;
        self.collect(response).await
    }

    /// `GET`, as a document.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.send("GET", path, None, &[]).await?.json()
    }

    /// Sends a file as the body, streaming. Its length is told where it is known. It takes as long as it takes, and so does the answer,
    /// which comes when what was sent has been put away.
    pub(crate) async fn upload(
        &self,
        path: &str,
        kind: &str,
        file: tokio::fs::File,
        length_bytes: Option<u64>,
        on_progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Answer, Error> {
        if self.show_http {
            eprintln!("{} --data-binary @FILE", self.curl("POST", path, &[("content-type", kind)]));
        }
        let may_send = self.may_send.clone();
        let chunks = futures_util::stream::try_unfold((file, 0u64), move |(mut file, sent)| {
            on_progress(sent);
            let may_send = may_send.clone();
            async move {
                if sent == 0 {
                    // A daemon that refuses says so first. One that says nothing may not know the question.
                    let _ = tokio::time::timeout(limits::CONTINUE_TIMEOUT, may_send.notified()).await;
                }
                let mut chunk = vec![0; 256 * 1024];
                let read = tokio::io::AsyncReadExt::read(&mut file, &mut chunk).await?;
                chunk.truncate(read);
                let next = (file, sent + read as u64);
                Ok::<_, io::Error>((read > 0).then(|| (hyper::body::Frame::data(Bytes::from(chunk)), next)))
            }
        });
        let body = http_body_util::StreamBody::new(chunks.into_stream());
        let body = BodyExt::boxed(SyncBody(std::sync::Mutex::new(Box::pin(body))));
        let response = self.exchange("POST", path, Some(kind), length_bytes, body, &[EXPECT]).await?;
        self.collect(response).await
    }

    /// Starts a request whose answer is read bit by bit. Statuses from 400 become [`Error::Problem`].
    pub(crate) async fn stream(&self, path: &str, headers: &[(&str, &str)]) -> Result<Incoming, Error> {
        self.print_request("GET", path, None, headers);
        let body = Full::new(Bytes::new()).map_err(|never| match never {}).boxed();
        let response = self.in_time(self.exchange("GET", path, None, None, body, headers)).await?;
        if response.status().as_u16() >= 400 {
            return Err(self.collect(response).await.err().unwrap_or(Error::Status { status: 500 }));
        }
        self.print_status(response.status().as_u16());
        Ok(response.into_body())
    }

    /// A connection for a WebSocket, and the host name to put in its request.
    pub(crate) async fn connect(&self) -> Result<Box<dyn Stream>, Error> {
        let connecting = tokio::time::timeout(limits::CONNECT_TIMEOUT, self.open());
        let result = connecting.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        result.map_err(|cause| Error::Connect { endpoint: self.endpoint.to_string(), cause })
    }

    /// The `Host` of every request.
    pub(crate) fn authority(&self) -> String {
        match &self.endpoint {
            Endpoint::Unix(_) => "localhost".to_owned(),
            Endpoint::Tcp { host, port } | Endpoint::Tls { host, port } => {
                let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                format!("{bracketed}:{port}")
            }
        }
    }

    async fn open(&self) -> io::Result<Box<dyn Stream>> {
        match &self.endpoint {
            Endpoint::Unix(path) => Ok(Box::new(tokio::net::UnixStream::connect(path).await?)),
            Endpoint::Tcp { host, port } => {
                Ok(Box::new(tokio::net::TcpStream::connect((host.as_str(), *port)).await?))
            }
            Endpoint::Tls { host, port } => {
                let tcp = tokio::net::TcpStream::connect((host.as_str(), *port)).await?;
                let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
                let connector = self.tls.as_ref().ok_or_else(|| io::Error::other("no authority to trust"))?;
                Ok(Box::new(connector.connect(name, tcp).await?))
            }
        }
    }

    /// Bounds the time to the head of an answer.
    async fn in_time(
        &self,
        answer: impl Future<Output = Result<hyper::Response<Incoming>, Error>>,
    ) -> Result<hyper::Response<Incoming>, Error> {
        let bound = limits::ANSWER_TIMEOUT;
        tokio::time::timeout(bound, answer).await.unwrap_or_else(|_| {
            let cause =
                io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", bound.as_secs()));
            Err(Error::Http { endpoint: self.endpoint.to_string(), cause: cause.into() })
        })
    }

    async fn exchange(
        &self,
        method: &str,
        path: &str,
        kind: Option<&str>,
        length: Option<u64>,
        body: BoxBody<Bytes, io::Error>,
        headers: &[(&str, &str)],
    ) -> Result<hyper::Response<Incoming>, Error> {
        let stream = self.connect().await?;
        let broke = |cause: Box<dyn std::error::Error + Send + Sync>| Error::Http {
            endpoint: self.endpoint.to_string(),
            cause,
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broke(e.into()))?;
        tokio::spawn(connection);
        let mut request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.authority())
            .header("user-agent", concat!("toft/", env!("CARGO_PKG_VERSION")));
        if let Some(kind) = kind {
            request = request.header("content-type", kind);
        }
        if let Some(length) = length.filter(|length| *length > 0 || kind.is_some()) {
            request = request.header("content-length", length);
        }
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if !matches!(method, "GET" | "HEAD") {
            let key = self.idempotency_key.clone().unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
            request = request.header("idempotency-key", key);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request =
            request.body(body).map_err(|error| Error::Usage(format!("bad request: {error}")))?;
        let may_send = self.may_send.clone();
        hyper::ext::on_informational(&mut request, move |_| may_send.notify_one());
        sender.send_request(request).await.map_err(|e| broke(e.into()))
    }

    async fn collect(&self, response: hyper::Response<Incoming>) -> Result<Answer, Error> {
        let status = response.status().as_u16();
        self.print_status(status);
        let body = Limited::new(response.into_body(), limits::ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|cause| Error::Http { endpoint: self.endpoint.to_string(), cause })?
            .to_bytes();
        if status < 400 {
            return Ok(Answer { body });
        }
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Err(Error::Problem(Box::new(problem))),
            Err(_) => Err(Error::Status { status }),
        }
    }

    fn print_request(&self, method: &str, path: &str, json: Option<&[u8]>, headers: &[(&str, &str)]) {
        if !self.show_http {
            return;
        }
        let mut line = self.curl(method, path, headers);
        if let Some(json) = json {
            line.push_str(" -H 'content-type: application/json' -d ");
            line.push_str(&quote(&String::from_utf8_lossy(json)));
        }
        eprintln!("{line}");
    }

    /// The same request as a curl command; the token stays in the environment.
    fn curl(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
        let mut line = String::from("+ curl -sS");
        match &self.endpoint {
            Endpoint::Unix(socket) => {
                line.push_str(&format!(" --unix-socket {}", quote(&socket.display().to_string())));
            }
            Endpoint::Tcp { .. } | Endpoint::Tls { .. } => {
                line.push_str(" -H \"authorization: Bearer $TOFT_TOKEN\"");
            }
        }
        if method != "GET" {
            line.push_str(&format!(" -X {method}"));
        }
        for (name, value) in headers {
            line.push_str(&format!(" -H {}", quote(&format!("{name}: {value}"))));
        }
        let scheme = if matches!(self.endpoint, Endpoint::Tls { .. }) { "https" } else { "http" };
        line.push_str(&format!(" {}", quote(&format!("{scheme}://{}{path}", self.authority()))));
        line
    }

    fn print_status(&self, status: u16) {
        if self.show_http {
            eprintln!("< {status}");
        }
    }
}

/// A shell word.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn connector(ca_file: &Path) -> Result<TlsConnector, Error> {
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(ca_file).map_err(|cause| Error::Tls(Box::new(cause)))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|cause| Error::Tls(Box::new(cause)))?;
        roots.add(certificate).map_err(|cause| Error::Tls(Box::new(cause)))?;
    }
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Makes a body that is `Send` also `Sync`, as hyper's boxed body asks; it is only ever polled by one task.
struct SyncBody<B>(std::sync::Mutex<B>);

impl<B: hyper::body::Body + Unpin> hyper::body::Body for SyncBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<B::Data>, B::Error>>> {
        let body = self.get_mut().0.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::pin::Pin::new(body).poll_frame(context)
    }
}

#[cfg(test)]
mod tests;
