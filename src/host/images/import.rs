//! One import at work: feeds the incoming directory from its source, tells progress, and ends the operation
//! whatever happens. It knows neither manifests nor tar. `images` starts one for each accepted import.
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use model::image::{Image, ImageState};
use model::operation::Progress;
use model::{Code, ImageId, OperationId};
use tokio::io::AsyncRead;
use tokio::sync::Notify;

use super::bundle::{self, Conditions};
use super::incoming::{Arrived, Incoming, Refusal};
use super::limits::PROGRESS_EVERY;
use super::recipe::{self, BuildError, Stage};
use super::{directory, records};
use crate::core::Shared;
use crate::error::{Error, Result};
use crate::operations::{self, Outcome};
use crate::store::records::find;
use crate::upload;
use crate::volumes::files;
use crate::volumes::fill::Watch;

/// One import.
pub(super) struct Import {
    pub(super) core: Shared,
    pub(super) id: ImageId,
    pub(super) operation: OperationId,
    pub(super) conditions: Conditions,
    pub(super) handle: Arc<ImportHandle>,
}

/// What others can do to an import at work.
#[derive(Debug, Default)]
pub(super) struct ImportHandle {
    watch: Arc<Watch>,
    stage: Stage,
    cancelled: Notify,
}

impl ImportHandle {
    /// Makes it stop soon.
    pub(super) fn cancel(&self) {
        self.watch.cancelled.store(true, Ordering::SeqCst);
        self.cancelled.notify_one();
    }
}

/// From where an image comes.
pub(super) enum From {
    /// A caller's stream, of this length where that is known.
    Stream(Box<dyn AsyncRead + Send + Unpin>, Option<u64>),
    /// An entry of the import directory.
    Entry(PathBuf, String),
    /// A recipe of the guest images in this directory.
    Recipe(PathBuf, String),
}

impl Import {
    /// Works to the end. The records say how it ended; the error says it too.
    pub(super) async fn run(self, from: From) -> Result<()> {
        let outcome = tokio::select! {
            arrived = self.bring_in(from) => arrived,
            never = self.tell_progress() => match never {},
        };
        let outcome = match outcome {
            Ok(arrived) => self.arrive(arrived).await,
            Err(cause) => Err(cause),
        };
        let Err(cause) = outcome else { return Ok(()) };
        self.core.insist("the end of an import", || self.give_up(cause.clone())).await?;
        Err(cause)
    }

    async fn bring_in(&self, from: From) -> Result<Arrived> {
        let images = self.core.dirs.root().join("images");
        let id = self.id;
        let made = blocking(move || Incoming::create(&images, id).map_err(Refusal::Store));
        let incoming = made.await.map_err(refused)?;
        self.core.checkpoint("image.incoming")?;
        let (conditions, watch) = (self.conditions.clone(), self.handle.watch.clone());
        let arrived = match from {
            From::Stream(stream, length) => {
                watch.total.store(length.unwrap_or(0), Ordering::Relaxed);
                let receive = async move |pieces| {
                    blocking(move || bundle::receive(pieces, incoming, &conditions, &watch)).await
                };
                let fed = upload::feed(stream, &self.handle.cancelled, receive).await;
                fed.unwrap_or(Err(Refusal::Cancelled))
            }
            From::Entry(import, name) => {
                blocking(move || directory::receive(&import, &name, incoming, &conditions, &watch)).await
            }
            From::Recipe(guest_images, name) => {
                let built = incoming.path().join("built");
                let cancelled = self.handle.cancelled.notified();
                let build = recipe::build(&guest_images, &name, &built, &self.handle.stage, cancelled);
                build.await.map_err(not_built)?;
                blocking(move || directory::adopt(&built, incoming, &conditions, &watch)).await
            }
        };
        arrived.map_err(refused)
    }

    async fn arrive(&self, arrived: Arrived) -> Result<()> {
        self.core.checkpoint("image.arrived")?;
        let (id, operation) = (self.id, self.operation);
        self.core.store.write(move |tx| records::arrive(tx, id, operation, &arrived)).await
    }

    /// Removes what there is of it, then its record; but only while the record says that it is coming in. A commit
    /// that was told as failed may have been made all the same, and then the image is complete.
    async fn give_up(&self, cause: Error) -> Result<()> {
        let (id, operation) = (self.id, self.operation);
        let image: Option<Image> = self.core.store.read(move |connection| find(connection, id.0)).await?;
        if image.is_none_or(|image| image.state != ImageState::Importing) {
            return Ok(());
        }
        let place = self.core.dirs.image(id);
        blocking(move || files::remove_tree(&place).map_err(Refusal::Store)).await.map_err(refused)?;
        let outcome = Outcome::Failed(cause);
        self.core.store.write(move |tx| records::give_up(tx, id, operation, outcome)).await
    }

    /// Records how far it is whenever that has grown. Never ends.
    async fn tell_progress(&self) -> std::convert::Infallible {
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        let mut told = Progress::default();
        loop {
            tick.tick().await;
            let now = self.progress();
            if now == told {
                continue;
            }
            told = now.clone();
            let operation = self.operation;
            let written = self.core.store.write(move |tx| operations::progress(tx, operation, now)).await;
            if let Err(cause) = written {
                tracing::warn!(%operation, "progress is not recorded: {}", cause.chain());
            }
        }
    }

    /// A build counts for nine tenths, and what follows it for the rest.
    fn progress(&self) -> Progress {
        let watch = &self.handle.watch;
        let (done, total) = (watch.done.load(Ordering::Relaxed), watch.total.load(Ordering::Relaxed));
        let percent =
            |share: u64| done.saturating_mul(share).checked_div(total).unwrap_or(0).min(share) as u8;
        let (phase, built) = self.handle.stage.now();
        if !phase.is_empty() && done == 0 {
            return Progress { phase, percent: (u16::from(built) * 9 / 10) as u8, ..Progress::default() };
        }
        let percent = if phase.is_empty() { percent(99) } else { 90 + percent(9) };
        let known = Some(total).filter(|total| *total > 0);
        Progress {
            phase: "receive".to_owned(),
            percent,
            bytes_done: Some(done),
            bytes_total: known,
            ..Progress::default()
        }
    }
}

async fn blocking<T, F>(work: F) -> std::result::Result<T, Refusal>
where
    T: Send + 'static,
    F: FnOnce() -> std::result::Result<T, Refusal> + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|cause| Err(Refusal::Store(io::Error::other(cause))))
}

fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::Corrupt(detail) => Error::new(Code::ImageCorrupt, detail),
        Refusal::Source(cause) if cause.kind() == io::ErrorKind::FileTooLarge => {
            Error::new(Code::BodyTooLarge, "more was sent than an upload may have").caused_by(cause)
        }
        Refusal::Source(cause) if cause.kind() == io::ErrorKind::TimedOut => {
            let detail = format!("nothing came for {} s; send the bundle again", upload::SILENCE_MAX.as_secs());
            Error::new(Code::Timeout, detail).caused_by(cause)
        }
        Refusal::Source(cause) if cause.kind() == io::ErrorKind::ConnectionAborted => {
            Error::new(Code::ImageCorrupt, "the stream broke off before the end of the bundle; send it again")
                .caused_by(cause)
        }
        Refusal::Source(cause) => Error::file("the image cannot be read", cause),
        Refusal::Store(cause) => match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::new(
                Code::DiskFull,
                "the host's disk is full, and nothing of the image was kept; delete volumes or images, or add space",
            )
            .caused_by(cause),
            _ => Error::file("the image cannot be stored", cause),
        },
        Refusal::Cancelled => Error::new(Code::WrongState, "the import was cancelled"),
    }
}

fn not_built(cause: BuildError) -> Error {
    match cause {
        BuildError::Cancelled => refused(Refusal::Cancelled),
        BuildError::Failed(detail) => {
            Error::new(Code::HostUnprepared, format!("the image was not built: {detail}"))
        }
        BuildError::Run { .. } => Error::new(
            Code::HostUnprepared,
            format!("{cause}; check that --guest-images names the project's directory guest-images"),
        )
        .caused_by(cause),
    }
}
