//! Listeners and connections: opens the Unix socket and the TCP port, bounds what a connection may hold, and
//! ends it all in order. Knows no path and no resource. `toftd` calls it with an open host.
mod listen;
mod stall;
mod tls;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use host::Host;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tower::ServiceExt;

use crate::auth::Peer;
use crate::closing::Closing;
use crate::limits::{ACCEPT_RETRY, CLOSE_MAX, CONNECTIONS_MAX, HEAD_BYTES_MAX, HEAD_READ_MAX, HEADERS_MAX};
use crate::routes::Api;

/// Where the API is served.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// The Unix socket, which trusts its peer's user.
    pub unix: Option<UnixListen>,
    /// The TCP port, which asks for tokens.
    pub tcp: Option<TcpListen>,
}

/// A Unix socket to serve on.
#[derive(Debug, Clone)]
pub struct UnixListen {
    /// Its path; what an ended daemon left there is replaced.
    pub path: PathBuf,
    /// Group whose members may use the API beside root and the daemon's own user.
    pub group_id: Option<u32>,
}

/// A TCP port to serve on.
#[derive(Debug, Clone)]
pub struct TcpListen {
    /// Address; beyond loopback only with TLS.
    pub address: SocketAddr,
    /// Certificate and key.
    pub tls: Option<TlsFiles>,
}

/// PEM files of a TLS server.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate and those between it and its root.
    pub certificates: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither socket nor port.
    #[error("nowhere to serve the API: configure a Unix socket or a TCP address")]
    Nowhere,
    /// `sun_path` of unix(7) is short.
    #[error(
        "the socket path {path:?} has more than {max} bytes; choose a shorter state directory or --socket"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// What is possible.
        max: usize,
    },
    /// Something answers at the socket.
    #[error("another daemon serves {0:?}; stop it first or choose another --socket")]
    Busy(PathBuf),
    /// The path is taken by something that is not a socket.
    #[error("{0:?} exists and is not a socket; it is left alone, choose another --socket")]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot make the socket {path:?}")]
    Unix {
        /// The path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The port cannot be opened.
    #[error("cannot listen on {address}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Tokens would cross a network in the clear.
    #[error(
        "{0} is not a loopback address, and without TLS tokens would cross the network in the clear: give it a \
         certificate and key with `--tls-cert` and `--tls-key`, or listen on 127.0.0.1"
    )]
    Plain(SocketAddr),
    /// The certificate or key cannot be used.
    #[error("cannot use the TLS file {path:?}: {detail}")]
    Tls {
        /// The file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
}

/// Open listeners that nothing is served on yet.
pub struct Bound {
    unix: Option<listen::UnixSocket>,
    tcp: Option<listen::TcpPort>,
}

impl std::fmt::Debug for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bound").field("tcp", &self.tcp_address()).finish_non_exhaustive()
    }
}

/// Serves the API until `stop` ends; then streams end, requests are answered, and it returns.
pub async fn serve(host: Host, config: &Config, stop: impl Future<Output = ()> + Send) -> Result<(), Error> {
    bind(config).await?.serve(host, stop).await;
    Ok(())
}

/// Opens the listeners, so that a mistake in the configuration is known before anything is started.
pub async fn bind(config: &Config) -> Result<Bound, Error> {
    if config.unix.is_none() && config.tcp.is_none() {
        return Err(Error::Nowhere);
    }
    let tcp = match &config.tcp {
        Some(tcp) => Some(listen::TcpPort::open(tcp).await?),
        None => None,
    };
    let unix = match &config.unix {
        Some(unix) => Some(listen::UnixSocket::open(unix).await?),
        None => None,
    };
    Ok(Bound { unix, tcp })
}

impl Bound {
    /// Address of the TCP port, with the number the system chose where 0 was asked for.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().map(listen::TcpPort::address)
    }

    /// Serves the API until `stop` ends; then streams end, requests are answered, and it returns.
    pub async fn serve(self, host: Host, stop: impl Future<Output = ()> + Send) {
        let (order, closing) = Closing::new();
        let api = Api::new(host, closing.clone());
        let router = crate::routes::router(api.clone());
        let mut listeners = JoinSet::new();
        if let Some(unix) = self.unix {
            listeners.spawn(serve_unix(unix, router.clone(), closing.clone()));
        }
        if let Some(tcp) = self.tcp {
            listeners.spawn(serve_tcp(tcp, router, closing));
        }
        stop.await;
        let _ = order.send(true);
        while listeners.join_next().await.is_some() {}
        let _ = tokio::time::timeout(CLOSE_MAX, api.consoles_closed()).await;
    }
}

async fn serve_unix(socket: listen::UnixSocket, router: Router, closing: Closing) {
    let mut connections = Connections::new(closing);
    while let Some(permit) = connections.room().await {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = connections.closed() => break,
        };
        match accepted {
            Ok((stream, peer)) => connections.spawn(permit, stream, peer, router.clone()),
            Err(cause) => refused(cause).await,
        }
    }
    drop(socket);
    connections.finish().await;
}

async fn serve_tcp(port: listen::TcpPort, router: Router, closing: Closing) {
    let mut connections = Connections::new(closing);
    while let Some(permit) = connections.room().await {
        let accepted = tokio::select! {
            accepted = port.accept() => accepted,
            () = connections.closed() => break,
        };
        match accepted {
            Ok((stream, peer)) => match port.tls() {
                Some(tls) => connections.spawn_tls(permit, stream, tls, peer, router.clone()),
                None => connections.spawn(permit, stream, peer, router.clone()),
            },
            Err(cause) => refused(cause).await,
        }
    }
    drop(port);
    connections.finish().await;
}

/// A connection that ended before it was accepted, or no descriptors left: neither ends the listener.
async fn refused(cause: std::io::Error) {
    tracing::warn!(%cause, "cannot accept a connection");
    tokio::time::sleep(ACCEPT_RETRY).await;
}

/// The connections of one listener. Each listener has its own bound, so that strangers at the port cannot keep
/// root from the socket.
struct Connections {
    tasks: JoinSet<()>,
    room: Arc<Semaphore>,
    closing: Closing,
}

impl Connections {
    fn new(closing: Closing) -> Connections {
        Connections { tasks: JoinSet::new(), room: Arc::new(Semaphore::new(CONNECTIONS_MAX)), closing }
    }

    /// Waits for room for one more; `None` when closing. Those that wait stay in the kernel's queue.
    async fn room(&mut self) -> Option<OwnedSemaphorePermit> {
        while self.tasks.try_join_next().is_some() {}
        let room = Arc::clone(&self.room);
        tokio::select! {
            permit = room.acquire_owned() => permit.ok(),
            () = self.closed() => None,
        }
    }

    /// Ends when the daemon closes.
    async fn closed(&self) {
        self.closing.clone().ordered().await;
    }

    fn spawn<S>(&mut self, permit: OwnedSemaphorePermit, stream: S, peer: Peer, router: Router)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let closing = self.closing.clone();
        self.tasks.spawn(async move {
            connection(stream, peer, router, closing).await;
            drop(permit);
        });
    }

    fn spawn_tls(
        &mut self,
        permit: OwnedSemaphorePermit,
        stream: tokio::net::TcpStream,
        tls: tls::Acceptor,
        peer: Peer,
        router: Router,
    ) {
        let closing = self.closing.clone();
        self.tasks.spawn(async move {
            match tls.accept(stream).await {
                Ok(stream) => connection(stream, peer, router, closing).await,
                Err(cause) => tracing::debug!(%cause, "a TLS handshake failed"),
            }
            drop(permit);
        });
    }

    /// Gives the connections a while to end, then cuts them off.
    async fn finish(mut self) {
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(CLOSE_MAX, ended).await.is_err() {
            tracing::warn!(left = self.tasks.len(), "connections were cut off");
            self.tasks.shutdown().await;
        }
    }
}

/// Serves one connection to its end.
async fn connection<S>(stream: S, peer: Peer, router: Router, mut closing: Closing)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.clone().oneshot(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_READ_MAX)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stall::Stall::new(stream)), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing.ordered() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(cause) = ended {
        tracing::debug!(%cause, "a connection ended badly");
    }
}
