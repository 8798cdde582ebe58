//! A snapshot as a stream that a caller reads: all of it, wherever it lies. The files of a snapshot never change, and one that is deleted meanwhile is
//! read to its end all the same: its files are open. A stream that fails breaks off, so that nobody takes it for whole.
use std::io::{self, Write};
use std::time::Duration;

use model::network::Network;
use model::snapshot::SnapshotState;
use model::{Code, Name, SnapshotId};
use rusqlite::Connection;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::bundle::{Head, HeadDisk, HeadImage, HeadMemory, HeadNic, Plan};
use super::limits::{EXPORT_PIECE_BYTES, EXPORT_PIECES_MAX, EXPORT_SILENCE_MAX};
use super::{STATE, SnapshotRecord, Snapshots, chain};
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::store::records;

/// An export under way.
pub struct Export {
    /// The snapshot's name.
    pub name: Name,
    /// Length of the stream in bytes.
    pub bytes: u64,
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
}

impl Export {
    /// The next piece; none at the end. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<io::Result<Vec<u8>>> {
        self.pieces.recv().await
    }
}

impl Snapshots {
    /// Begins to write it as a stream. Fails with `wrong_state` when it is not there yet, or not any more.
    pub async fn export(&self, id: SnapshotId) -> Result<Export> {
        let record = self.readable(id).await?;
        let (name, chain) = (record.shown.name.clone(), record.chain.clone());
        let state = self.directory(id).join(STATE);
        let state_bytes = match record.root {
            None => 0,
            Some(_) => std::fs::metadata(state).map_err(|cause| unreadable(&name, cause))?.len(),
        };
        let head = self.core.store.read(move |connection| head(connection, record, state_bytes)).await?;
        let (shown, dirs) = (name.clone(), self.core.dirs.clone());
        let plan = blocking(move || {
            let open = |name: &str| chain::open(&dirs, id, &chain, name);
            let plan = Plan::of(open, head).map_err(|cause| unreadable(&shown, cause))?;
            let bytes = plan.bytes().map_err(|cause| unreadable(&shown, cause))?;
            Ok((plan, bytes))
        });
        let (plan, bytes) = plan.await?;
        // What is open is let be, but before it was, something may have been taken from it.
        self.readable(id).await?;
        let (sender, pieces) = mpsc::channel(EXPORT_PIECES_MAX);
        let sink = Sink { sender, runtime: Handle::current(), piece: Vec::new() };
        tokio::task::spawn_blocking(move || sink.write_all_of(&plan, id));
        Ok(Export { name, bytes, pieces })
    }
}

impl Snapshots {
    async fn readable(&self, id: SnapshotId) -> Result<SnapshotRecord> {
        let record: SnapshotRecord = self.core.store.read(move |all| records::one(all, id.0)).await?;
        if record.shown.state != SnapshotState::Ready {
            let detail = format!("snapshot {} is not complete, or being deleted", record.shown.name);
            return Err(Error::new(Code::WrongState, detail));
        }
        Ok(record)
    }
}

fn unreadable(name: &Name, cause: io::Error) -> Error {
    if cause.kind() == io::ErrorKind::NotFound {
        return Error::new(Code::WrongState, format!("snapshot {name} has just been deleted"));
    }
    Error::file(format!("the files of snapshot {name} cannot be read"), cause)
}

fn head(connection: &Connection, record: SnapshotRecord, state_bytes: u64) -> Result<Head> {
    let SnapshotRecord { shown, root, origin, .. } = record;
    let image: model::image::Image = records::one(connection, shown.image_id.0)?;
    let nics = origin.nics.into_iter().map(|nic| {
        let network = records::find::<Network>(connection, nic.network_id.0)?.map(|network| network.name);
        Ok(HeadNic { network, mac: nic.mac, ipv4: nic.ipv4, limits: nic.limits })
    });
    let nics = nics.collect::<Result<_>>()?;
    let disks = shown.volumes.iter().zip(&origin.disks).map(|(volume, disk)| HeadDisk {
        size_bytes: volume.size_bytes,
        cache: disk.cache,
        limits: disk.limits,
    });
    Ok(Head {
        name: shown.name,
        description: shown.description,
        labels: shown.labels,
        server_id: shown.server_id,
        server_name: shown.server_name,
        vcpus: shown.vcpus,
        memory_bytes: shown.memory_bytes,
        cpu: shown.cpu.clone(),
        image: HeadImage { name: image.name, sha256: image.sha256 },
        taken_at: shown.taken_at,
        paused_ms: shown.paused_ms,
        memory: root.map(|root| HeadMemory { root, state_bytes }),
        disks: disks.collect(),
        nics,
        default_user: origin.default_user,
        ssh_keys: origin.ssh_keys,
        user_data: origin.user_data,
        restart_policy: origin.restart_policy,
        isolation: origin.isolation,
        descent: origin.descent,
        processor: origin.processor,
        data_bytes: 0,
    })
}

/// Where a thread that may wait writes what a caller reads.
struct Sink {
    sender: mpsc::Sender<io::Result<Vec<u8>>>,
    runtime: Handle,
    piece: Vec<u8>,
}

impl Sink {
    fn write_all_of(mut self, plan: &Plan, id: SnapshotId) {
        let written = plan.write(&mut self).and_then(|()| self.flush());
        let Err(cause) = written else { return };
        tracing::warn!(snapshot = %id, "its export breaks off: {cause}");
        // Who has gone hears nothing.
        let _ = self.send(Err(cause), EXPORT_SILENCE_MAX);
    }

    fn send(&self, piece: io::Result<Vec<u8>>, patience: Duration) -> io::Result<()> {
        let sent =
            self.runtime.block_on(async { tokio::time::timeout(patience, self.sender.send(piece)).await });
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "its reader takes nothing any more")),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= EXPORT_PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.piece);
        if piece.is_empty() { Ok(()) } else { self.send(Ok(piece), EXPORT_SILENCE_MAX) }
    }
}
