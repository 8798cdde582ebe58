//! Takes in a snapshot that a host has exported, this one or another. Its head comes first and is recorded before the first
//! file is made; until all of it has come and was found right, the record says `creating`, and a crash leaves nothing.
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::image::{Image, ImageState};
use model::operation::{Accepted, Progress, Resource};
use model::server::ServerNic;
use model::snapshot::{ImportSnapshot, Snapshot, SnapshotState, SnapshotVolume};
use model::volume::FillMethod;
use model::{Code, OperationId, SnapshotId, Time};
use rusqlite::Connection;
use sha2::Sha256;
use tokio::io::AsyncRead;
use tokio::sync::Notify;

use super::bundle::{Head, HeadNic, Refusal, read_files, read_head};
use super::chain::Chain;
use super::limits::PROGRESS_EVERY;
use super::record::{self, IMPORT};
use super::{Origin, OriginDisk, SnapshotRecord, Snapshots, Taken, flush, make_directory};
use crate::call::{Actor, Answer, Call};
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::network::Networks;
use crate::operations::{self, NewOperation, Outcome};
use crate::store::{Tx, records};
use crate::upload;
use crate::volumes::fill::Watch;
use crate::volumes::space;

/// Imports by the snapshots that come in.
pub(super) type AtWork = Mutex<BTreeMap<SnapshotId, Arc<Handle>>>;

/// What others can do to an import at work.
#[derive(Default)]
pub(super) struct Handle {
    watch: Arc<Watch>,
    cancelled: Notify,
}

impl Snapshots {
    /// Takes in a snapshot from a stream, and answers when it has ended: the operation in the answer has succeeded.
    /// Fails with `snapshot_corrupt` when the stream is not what it says, and with `invalid` when what the snapshot needs is
    /// not on this host.
    pub async fn import(
        &self,
        call: &Call,
        spec: ImportSnapshot,
        mut body: impl AsyncRead + Send + Unpin + 'static,
    ) -> Result<Answer<Accepted<Snapshot>>> {
        let (head, digest) = read_head(&mut body).await.map_err(refused)?;
        space::check(&self.core.dirs.root().join("snapshots"), head.data_bytes, 0)?;
        if head.memory.is_some() && head.memory_bytes > self.memory_bytes {
            let detail = format!(
                "its machine has {} bytes of memory, and servers of this host {} in all",
                head.memory_bytes, self.memory_bytes
            );
            return Err(Error::new(Code::NoCapacity, detail));
        }
        let (caller, described) = (call.actor.clone(), head.clone());
        let mut answer = self.core.mutate(call, move |tx| accept(tx, spec, described, &caller)).await?;
        let Some(id) = answer.body.resource.as_ref().filter(|_| !answer.replayed).map(|shown| shown.id)
        else {
            return Ok(answer);
        };
        let operation = answer.body.operation.id;
        let handle = Arc::new(Handle::default());
        lock(&self.imports).insert(id, handle.clone());
        // Whoever was quicker than that could wake nobody.
        let asked = self.core.store.read(move |all| operations::is_cancel_asked(all, operation)).await;
        if asked.unwrap_or(false) {
            self.wake(id);
        }
        let import = Import { snapshots: self.clone(), id, operation, handle };
        // In a task of its own, because the caller may hang up, and then it must still be undone.
        let work = tokio::spawn(async move {
            let ended = import.run(head, digest, Box::new(body)).await;
            lock(&import.snapshots.imports).remove(&id);
            ended
        });
        let ended = work.await.unwrap_or_else(|cause| Err(Error::internal("the import ended badly", cause)));
        ended.map_err(|cause| cause.with_operation(operation))?;
        self.expiry.changed.notify_one();
        let look = move |connection: &Connection| {
            let record: SnapshotRecord = records::one(connection, id.0)?;
            Ok(Accepted { operation: operations::one(connection, operation)?, resource: Some(record.shown) })
        };
        answer.body = self.core.store.read(look).await?;
        Ok(answer)
    }

    /// After the transaction that cancels an import: wakes it.
    pub(crate) fn wake(&self, id: SnapshotId) {
        if let Some(import) = lock(&self.imports).get(&id) {
            import.watch.cancelled.store(true, Ordering::SeqCst);
            import.cancelled.notify_one();
        }
    }
}

/// Records a snapshot that comes in, and its operation.
fn accept(tx: &Tx<'_>, spec: ImportSnapshot, head: Head, actor: &Actor) -> Result<Accepted<Snapshot>> {
    let id = SnapshotId::new();
    let image = image(tx, &head)?;
    let (nics, now) = (nics(tx, &head)?, Time::now());
    let volumes = (0u8..).zip(&head.disks);
    let shown = Snapshot {
        id,
        name: spec.name.unwrap_or(head.name),
        description: head.description,
        labels: head.labels,
        state: SnapshotState::Creating,
        server_id: head.server_id,
        server_name: head.server_name,
        imported: true,
        memory: head.memory.is_some(),
        vcpus: head.vcpus,
        memory_bytes: head.memory_bytes,
        cpu: head.cpu,
        image_id: image.id,
        volumes: volumes
            .map(|(index, disk)| SnapshotVolume { index, size_bytes: disk.size_bytes, filled_by: None })
            .collect(),
        stored_bytes: 0,
        parent_id: None,
        inherited_bytes: 0,
        full_because: None,
        working_set_bytes: None,
        taken_at: None,
        paused_ms: None,
        guest_writes_delayed: None,
        guest_write_delay_us_max: None,
        guest_write_delay_us_sum: None,
        expires_at: None,
        generation: 1,
        created_at: now,
        updated_at: now,
    };
    let origin = Origin {
        default_user: head.default_user,
        ssh_keys: head.ssh_keys,
        user_data: head.user_data,
        restart_policy: head.restart_policy,
        isolation: head.isolation,
        nics,
        disks: head.disks.iter().map(|disk| OriginDisk { cache: disk.cache, limits: disk.limits }).collect(),
        descent: head.descent,
        processor: head.processor.filter(|_| shown.memory),
        for_clones: false,
    };
    record::insert(
        tx,
        &SnapshotRecord { shown: shown.clone(), root: None, origin, chain: Chain::default() },
        actor,
    )?;
    let resources = vec![Resource::Snapshot(id)];
    let new = NewOperation { kind: IMPORT, resources, actor, cancellable: true };
    Ok(Accepted { operation: operations::accept(tx, new)?, resource: Some(shown) })
}

/// The image with the same content.
fn image(tx: &Tx<'_>, head: &Head) -> Result<Image> {
    let all: Vec<Image> = records::all(tx)?;
    let same = |image: &Image| image.state == ImageState::Ready && image.sha256 == head.image.sha256;
    all.into_iter().find(same).ok_or_else(|| {
        let detail = format!(
            "its server boots from image {}, and no image here has that one's SHA-256, {}; import the image first",
            head.image.name, head.image.sha256
        );
        Error::invalid("/image", "not_found", detail)
    })
}

/// Its interfaces on the networks of the same names. Only memory needs them all: a driver in it knows of its interfaces.
fn nics(tx: &Tx<'_>, head: &Head) -> Result<Vec<ServerNic>> {
    let mut nics = Vec::new();
    for (index, nic) in (0u8..).zip(&head.nics) {
        let HeadNic { network, mac, ipv4, limits } = nic;
        let found = match network {
            Some(name) => Networks::resolve(tx, Some(name.as_str())).map(|network| network.id),
            None => Err(Error::new(Code::NotFound, "")),
        };
        match found {
            Ok(network_id) => {
                nics.push(ServerNic { network_id, index, mac: mac.clone(), ipv4: *ipv4, limits: *limits });
            }
            Err(cause) if cause.code != Code::NotFound => return Err(cause),
            Err(_) if head.memory.is_none() => {}
            Err(_) => {
                let name = network.as_ref().map_or("one that was deleted", |name| name.as_str());
                let detail = format!(
                    "its interface {index} is on network {name}, which is not here; make a network of that name first"
                );
                return Err(Error::invalid(format!("/nics/{index}/network"), "not_found", detail));
            }
        }
    }
    Ok(nics)
}

/// One import.
struct Import {
    snapshots: Snapshots,
    id: SnapshotId,
    operation: OperationId,
    handle: Arc<Handle>,
}

impl Import {
    /// Works to the end. The records say how it ended; the error says it too.
    async fn run(&self, head: Head, digest: Sha256, body: Box<dyn AsyncRead + Send + Unpin>) -> Result<()> {
        let outcome = tokio::select! {
            taken = self.bring_in(head, digest, body) => taken,
            never = self.tell_progress() => match never {},
        };
        let outcome = match outcome {
            Ok(taken) => self.arrive(taken).await,
            Err(cause) => Err(cause),
        };
        let Err(cause) = outcome else { return Ok(()) };
        let snapshots = &self.snapshots;
        snapshots.core.insist("the end of an import", || self.give_up(cause.clone())).await?;
        tracing::info!(snapshot = %self.id, "was not imported: {}", cause.chain());
        Err(cause)
    }

    async fn bring_in(
        &self,
        head: Head,
        digest: Sha256,
        body: Box<dyn AsyncRead + Send + Unpin>,
    ) -> Result<Taken> {
        let directory = self.snapshots.directory(self.id);
        let made = directory.clone();
        blocking(move || make_directory(&made)).await?;
        self.snapshots.core.checkpoint("snapshot.incoming")?;
        let taken = Taken {
            at_ms: head.taken_at.unwrap_or_else(Time::now).unix_ms(),
            paused_ms: head.paused_ms.unwrap_or_default(),
            delayed: None,
            disks: vec![FillMethod::SparseCopy; head.disks.len()],
            root: head.memory.as_ref().map(|memory| memory.root),
            stored_bytes: 0,
            chain: Chain::default(),
            full_because: None,
        };
        let (watch, place) = (self.handle.watch.clone(), directory.clone());
        let receive = async move |mut pieces: upload::Pieces| {
            let read = move || read_files(&mut pieces, digest, &head, &place, &watch).map_err(refused);
            blocking(read).await
        };
        let fed = upload::feed(body, &self.handle.cancelled, receive).await;
        fed.unwrap_or_else(|| Err(refused(Refusal::Cancelled)))?;
        let stored_bytes = blocking(move || flush(&directory)).await?;
        Ok(Taken { stored_bytes, ..taken })
    }

    async fn arrive(&self, taken: Taken) -> Result<()> {
        self.snapshots.core.checkpoint("snapshot.arrived")?;
        let (id, operation) = (self.id, self.operation);
        let arrive = move |tx: &Tx<'_>| {
            if operations::is_cancel_asked(tx, operation)? {
                return Err(refused(Refusal::Cancelled));
            }
            record::complete(tx, id, &taken)?;
            operations::finish(tx, operation, Outcome::Succeeded)
        };
        self.snapshots.core.store.write(arrive).await
    }

    /// Removes what there is of it, then its record; but only while the record says that it is coming in. A commit that was
    /// told as failed may have been made all the same, and then the snapshot is complete.
    async fn give_up(&self, cause: Error) -> Result<()> {
        let (id, operation) = (self.id, self.operation);
        let look = move |all: &Connection| records::find::<SnapshotRecord>(all, id.0);
        let found = self.snapshots.core.store.read(look).await?;
        if found.is_none_or(|found| found.shown.state != SnapshotState::Creating) {
            return Ok(());
        }
        self.snapshots.remove(id).await?;
        let settle = move |tx: &Tx<'_>| {
            let outcome = match operations::is_cancel_asked(tx, operation)? {
                true => {
                    Outcome::Cancelled("cancelled by its caller; nothing of the snapshot was kept".to_owned())
                }
                false => Outcome::Failed(cause),
            };
            operations::finish(tx, operation, outcome)?;
            record::settle(tx, id)
        };
        self.snapshots.core.store.write(settle).await
    }

    /// Records how far it is whenever that has grown. Never ends.
    async fn tell_progress(&self) -> std::convert::Infallible {
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        let mut told = 0;
        loop {
            tick.tick().await;
            let watch = &self.handle.watch;
            let (done, total) = (watch.done.load(Ordering::Relaxed), watch.total.load(Ordering::Relaxed));
            if done == told {
                continue;
            }
            told = done;
            let percent = done.saturating_mul(99).checked_div(total).unwrap_or(0).min(99) as u8;
            let (bytes_done, bytes_total) = (Some(done), Some(total));
            let progress = Progress {
                phase: "receive".to_owned(),
                percent,
                bytes_done,
                bytes_total,
                ..Progress::default()
            };
            let operation = self.operation;
            let written =
                self.snapshots.core.store.write(move |tx| operations::progress(tx, operation, progress));
            if let Err(cause) = written.await {
                tracing::warn!(%operation, "progress is not recorded: {}", cause.chain());
            }
        }
    }
}

fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::Corrupt(detail) => Error::new(Code::SnapshotCorrupt, detail),
        Refusal::Source(cause) if cause.kind() == io::ErrorKind::FileTooLarge => {
            Error::new(Code::BodyTooLarge, "more was sent than an upload may have").caused_by(cause)
        }
        Refusal::Source(cause) if cause.kind() == io::ErrorKind::TimedOut => {
            let detail =
                format!("nothing came for {} s; send the snapshot again", upload::SILENCE_MAX.as_secs());
            Error::new(Code::Timeout, detail).caused_by(cause)
        }
        Refusal::Source(cause) => {
            let detail = "the stream broke off before the end of the snapshot; send it again";
            Error::new(Code::SnapshotCorrupt, detail).caused_by(cause)
        }
        Refusal::Store(cause) => match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::new(
                Code::DiskFull,
                "the host's disk is full, and nothing of the snapshot was kept; delete volumes, snapshots or images, or \
                 add space",
            )
            .caused_by(cause),
            _ => Error::file("the snapshot cannot be stored", cause),
        },
        Refusal::Cancelled => Error::new(Code::WrongState, "the import was cancelled"),
    }
}

/// A panic elsewhere leaves the map whole: each change is one insert or remove.
fn lock(mutex: &AtWork) -> MutexGuard<'_, BTreeMap<SnapshotId, Arc<Handle>>> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
