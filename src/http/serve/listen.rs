//! The sockets themselves: made with the right owner and mode, refused where they would be unsafe.
use std::io;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::Instant;

use super::tls::Acceptor;
use super::{Error, TcpListen, UnixListen};
use crate::auth::{Peer, Trusted};
use crate::limits::{SOCKET_LET_GO_AGAIN, SOCKET_LET_GO_MAX, SOCKET_PATH_BYTES_MAX};

/// The Unix socket; its file goes when this goes.
pub(super) struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    trusted: Trusted,
}

impl UnixSocket {
    /// Makes the socket beside its path and moves it there, so that nobody meets it before its owner and mode
    /// are right, and a dead daemon's socket is replaced in one step.
    pub(super) async fn open(listen: &UnixListen) -> Result<UnixSocket, Error> {
        let path = &listen.path;
        let mut fresh = path.clone().into_os_string();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        if fresh.as_os_str().as_bytes().len() > SOCKET_PATH_BYTES_MAX {
            return Err(Error::PathTooLong { path: path.clone(), max: SOCKET_PATH_BYTES_MAX - ".new".len() });
        }
        for place in [path, &fresh] {
            clear(place).await?;
        }
        std::fs::remove_file(&fresh).or_else(absent_is_fine).map_err(|source| failed(path, source))?;
        let listener = UnixListener::bind(&fresh).map_err(|source| failed(path, source))?;
        let placed = place(&fresh, path, listen.group_id);
        if let Err(source) = placed {
            let _ = std::fs::remove_file(&fresh);
            return Err(failed(path, source));
        }
        Ok(UnixSocket { listener, path: path.clone(), trusted: Trusted::new(listen.group_id) })
    }

    /// The next connection and who made it.
    pub(super) async fn accept(&self) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = self.listener.accept().await?;
        let credentials = stream.peer_cred()?;
        let peer = Peer::Local {
            uid: credentials.uid(),
            trusted: self.trusted.trusts(credentials.uid(), credentials.gid(), credentials.pid()),
        };
        Ok((stream, peer))
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Sees that nothing of value is at the path.
async fn clear(path: &Path) -> Result<(), Error> {
    match std::fs::symlink_metadata(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(failed(path, source)),
        Ok(found) if !found.file_type().is_socket() => Err(Error::NotASocket(path.to_owned())),
        Ok(_) => {
            let end = Instant::now() + SOCKET_LET_GO_MAX;
            while UnixStream::connect(path).await.is_ok() {
                if Instant::now() > end {
                    return Err(Error::Busy(path.to_owned()));
                }
                tokio::time::sleep(SOCKET_LET_GO_AGAIN).await;
            }
            Ok(())
        }
    }
}

/// Gives the fresh socket its owner and mode, then its path.
fn place(fresh: &Path, path: &Path, group_id: Option<u32>) -> io::Result<()> {
    let mode = match group_id {
        Some(group_id) => {
            std::os::unix::fs::chown(fresh, None, Some(group_id))?;
            0o660
        }
        None => 0o600,
    };
    std::fs::set_permissions(fresh, std::fs::Permissions::from_mode(mode))?;
    std::fs::rename(fresh, path)
}

fn absent_is_fine(cause: io::Error) -> io::Result<()> {
    if cause.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(cause) }
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::Unix { path: path.to_owned(), source }
}

/// The TCP port.
pub(super) struct TcpPort {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Acceptor>,
}

impl TcpPort {
    /// Opens the port.
    pub(super) async fn open(listen: &TcpListen) -> Result<TcpPort, Error> {
        let address = listen.address;
        let tls = listen.tls.as_ref().map(Acceptor::open).transpose()?;
        if tls.is_none() && !address.ip().to_canonical().is_loopback() {
            return Err(Error::Plain(address));
        }
        let failed = |source| Error::Tcp { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(TcpPort { listener, address, tls })
    }

    /// Where it is.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How to make TLS of its connections.
    pub(super) fn tls(&self) -> Option<Acceptor> {
        self.tls.clone()
    }

    /// The next connection and where it comes from.
    pub(super) async fn accept(&self) -> io::Result<(TcpStream, Peer)> {
        let (stream, address) = self.listener.accept().await?;
        // Answers are small and written whole; waiting to fill a segment only delays them.
        stream.set_nodelay(true)?;
        Ok((stream, Peer::Remote { address }))
    }
}
