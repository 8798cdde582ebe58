//! The connections over which the VMMs of a move speak: opened by the source, joined to a move by its name and by who is at
//! the other end, and pumped between TLS and a socket of the VMM's. What goes over them only the VMMs read.
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt;
use model::Code;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::{client, server};
use uuid::Uuid;
use wire::peer::{Message, Saying};
use wire::saved::Digest;

use super::link::{Link, Wire, keep_short, out_of_turn};
use super::source::connect;
use super::strangers::Stranger;
use super::{Migrations, limits};
use crate::error::{Error, Result};
use crate::servers::live::Streams;
use crate::servers::moving::Move;

/// A stream of another host's VMM.
type Joined = server::TlsStream<Wire>;

/// Streams that moves wait for, by move.
#[derive(Default)]
pub(super) struct Joining(Mutex<HashMap<Uuid, Places>>);

/// The streams that one move waits for.
struct Places {
    /// Who may join: the host that the move began with.
    peer: Digest,
    free: Vec<Option<oneshot::Sender<Joined>>>,
    /// Whose places they are.
    mark: Arc<()>,
}

/// A move that waits for its streams; dropped, nobody can join it any more.
pub(super) struct Awaited<'m> {
    migrations: &'m Migrations,
    id: Uuid,
    streams: Vec<oneshot::Receiver<Joined>>,
    mark: Arc<()>,
}

/// What carries a move's streams to and fro; dropped, they end.
pub(super) type Pumps = JoinSet<()>;

impl Migrations {
    /// Begins to wait for so many streams of a move.
    pub(super) fn await_streams(&self, begun: &Move, count: usize) -> Awaited<'_> {
        let (free, streams) =
            (0..count).map(|_| oneshot::channel()).map(|(give, take)| (Some(give), take)).unzip();
        let mark = Arc::new(());
        let mut all = self.joining.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(begun.id, Places { peer: begun.peer, free, mark: Arc::clone(&mark) });
        Awaited { migrations: self, id: begun.id, streams, mark }
    }

    /// Gives a connection to the move that waits for it. Fails with `unauthenticated` unless one does, from this very host.
    pub(super) async fn join(
        &self,
        mut link: Link<Joined>,
        (source, stranger): (Digest, Stranger),
        transfer: &str,
        stream: u16,
    ) -> Result<()> {
        let place = {
            let mut all = self.joining.0.lock().unwrap_or_else(PoisonError::into_inner);
            let places = transfer.parse().ok().and_then(|id: Uuid| all.get_mut(&id));
            places
                .filter(|places| places.peer == source)
                .and_then(|places| places.free.get_mut(usize::from(stream))?.take())
        };
        let Some(place) = place else {
            let detail = "no move waits for this stream";
            link.send(&Message::Refuse { detail: detail.to_owned() }).await?;
            link.end().await?;
            return Err(Error::new(Code::Unauthenticated, detail));
        };
        drop(stranger);
        keep_short(link.get_ref().get_ref().0.get_ref())?;
        link.say(Saying::Copying).await?;
        // Whoever waited may have given up.
        let _ = place.send(link.into_inner());
        Ok(())
    }

    /// Opens so many streams to the target, which waits for them; `of_memory` of them are memory's.
    pub(super) async fn open_streams(
        &self,
        begun: &Move,
        of_memory: usize,
        of_disks: usize,
    ) -> Result<(Streams, Pumps)> {
        let address = begun.address.ok_or_else(out_of_turn)?;
        let mut opened: Vec<client::TlsStream<Wire>> = Vec::new();
        for stream in (0_u16..).take(of_memory.saturating_add(of_disks)) {
            let mut link = connect(&self.identity, address, begun.peer).await?;
            keep_short(link.get_ref().get_ref().0.get_ref())?;
            link.send(&Message::Join { transfer: begun.id.to_string(), stream }).await?;
            match link.message(limits::CONVERSATION).await? {
                Message::Say(Saying::Copying) => opened.push(link.into_inner()),
                Message::Refuse { detail } => return Err(Error::new(Code::MigrationBlocked, detail)),
                _ => return Err(out_of_turn()),
            }
        }
        pump(opened, of_memory)
    }
}

impl Awaited<'_> {
    /// Waits for all of them.
    pub(super) async fn all(mut self, of_memory: usize) -> Result<(Streams, Pumps)> {
        let late = || Error::new(Code::HostUnreachable, "the streams of the machine do not come");
        let mut joined = Vec::new();
        let come = async {
            for stream in std::mem::take(&mut self.streams) {
                joined.push(stream.await.map_err(|_| late())?);
            }
            Ok::<(), Error>(())
        };
        timeout(limits::CONVERSATION, come).await.map_err(|_| late())??;
        pump(joined, of_memory)
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        let mut all = self.migrations.joining.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Not those of a later connection of the same move, which took their place.
        if all.get(&self.id).is_some_and(|places| Arc::ptr_eq(&places.mark, &self.mark)) {
            all.remove(&self.id);
        }
    }
}

/// Carries each stream to a socket and back, the end of either way too.
fn pump<S>(opened: Vec<S>, of_memory: usize) -> Result<(Streams, Pumps)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broken = |cause| Error::internal("a pair of sockets cannot be made", cause);
    let (mut sockets, mut pumps) = (Vec::new(), JoinSet::new());
    for stream in opened {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(broken)?;
        ours.set_nonblocking(true).map_err(broken)?;
        let ours = UnixStream::from_std(ours).map_err(broken)?;
        sockets.push(OwnedFd::from(theirs));
        pumps.spawn(async move {
            let ((mut from_vmm, mut to_vmm), (mut from_host, mut to_host)) =
                (ours.into_split(), split(stream));
            // A link that breaks ends both ways, and the VMM finds its stream gone.
            let _ = tokio::try_join!(carry(&mut from_vmm, &mut to_host), carry(&mut from_host, &mut to_vmm));
        });
    }
    Ok((Streams { sockets, of_memory }, pumps))
}

/// Carries what is read to where it is written, and its end. TLS gives a record at a time: what has come already goes along.
async fn carry(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> std::io::Result<()> {
    let mut buffer = vec![0; limits::PUMP_BYTES];
    loop {
        let mut filled = from.read(&mut buffer).await?;
        if filled == 0 {
            return to.shutdown().await;
        }
        // The end comes again, and so does what is broken.
        while let Some(rest @ [_, ..]) = buffer.get_mut(filled..)
            && let Some(Ok(more @ 1..)) = from.read(rest).now_or_never()
        {
            filled += more;
        }
        to.write_all(buffer.get(..filled).unwrap_or_default()).await?;
        to.flush().await?;
    }
}
