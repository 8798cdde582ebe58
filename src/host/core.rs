//! What every noun shares: the store, the directories, the wake-ups. It knows no noun.
//! `open` makes one; every facade holds it.
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use model::Code;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::call::{Answer, Call};
use crate::config::{Config, Dirs};
use crate::error::{Error, Result};
use crate::idempotency::{self, Underway};
use crate::limits;
use crate::store::{Store, Tx};
use crate::tokens::Derivation;

/// Runs what waits for the disk where waiting is allowed.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|cause| Err(Error::internal("work on files ended badly", cause)))
}

/// Runs what may wait for the disk on the thread that asks, whose other tasks another one takes over: whoever asked goes on at
/// once, instead of when a thread has been woken and has found a processor. For a commit, and for a few small files.
pub(crate) async fn in_place<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => {
            let done = tokio::task::block_in_place(|| catch_unwind(AssertUnwindSafe(work)));
            done.unwrap_or_else(|_| Err(Error::new(Code::Internal, "work on files or records ended badly")))
        }
        _ => blocking(work).await,
    }
}

/// As [`in_place`], for what the kernel is asked and mostly answers at once, but not always.
pub(crate) fn here<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// What every noun shares.
pub struct Core {
    /// What the operator decided.
    pub config: Config,
    /// Where things lie.
    pub dirs: Dirs,
    /// The records.
    pub store: Store,
    /// When the daemon started.
    pub started_at: model::Time,
    /// Secrets that a repeated call is to be told again.
    pub secrets: Derivation,
    /// Calls whose work is longer than a transaction.
    pub underway: Underway,
}

impl Core {
    /// The core of a daemon that starts now.
    pub fn new(config: Config, dirs: Dirs, store: Store) -> Result<Core> {
        let (secrets, underway) = (Derivation::new()?, Underway::default());
        Ok(Core { config, dirs, store, started_at: model::Time::now(), secrets, underway })
    }

    /// Carries out one mutating call in one transaction: looks the idempotency key up, runs `change`, stores its
    /// answer with the key, commits. Nothing is kept when `change` fails.
    pub async fn mutate<T, F>(&self, call: &Call, change: F) -> Result<Answer<T>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        F: FnOnce(&Tx<'_>) -> Result<T> + Send + 'static,
    {
        self.underway.refuse(call)?;
        let call = call.clone();
        self.store
            .write(move |tx| {
                if let Some(body) = idempotency::replay(tx, &call)? {
                    return Ok(Answer { body, replayed: true });
                }
                let body = change(tx)?;
                idempotency::keep(tx, &call, &body)?;
                Ok(Answer { body, replayed: false })
            })
            .await
    }

    /// Carries out one mutating call whose work is no transaction, such as a test that takes seconds, and keeps its
    /// answer with the idempotency key. The same key is answered `idempotency_running` in the meantime. Nothing is
    /// kept when the work fails or the daemon ends in the middle of it: a repeated call then does it again.
    pub async fn once<T, R>(&self, call: &Call, work: R) -> Result<Answer<T>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        R: Future<Output = Result<T>> + Send,
    {
        let _underway = self.underway.begin(call)?;
        let asked = call.clone();
        if let Some(body) = self.store.read(move |connection| idempotency::replay(connection, &asked)).await?
        {
            return Ok(Answer { body, replayed: true });
        }
        let (body, call) = (work.await?, call.clone());
        let keep = move |tx: &Tx<'_>| idempotency::keep(tx, &call, &body).map(|()| body);
        Ok(Answer { body: self.store.write(keep).await?, replayed: false })
    }

    /// Does work that was promised, again until it succeeds or the daemon ends: what fails it is the host's trouble,
    /// and passes. Each try must be able to follow one that was broken off anywhere.
    pub async fn insist<F, R>(&self, what: &str, mut work: F) -> Result<()>
    where
        F: FnMut() -> R + Send,
        R: Future<Output = Result<()>> + Send,
    {
        let mut pause = limits::RETRY;
        loop {
            match work().await {
                Err(cause) if cause.code != Code::Draining && !self.store.is_dead() => {
                    tracing::warn!("{what} is tried again: {}", cause.chain());
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(limits::RETRY_MAX);
                }
                ended => return ended,
            }
        }
    }

    /// Marks a point that a crash could follow, such as `volume.filled`. Effects call it after each thing they
    /// did to the world; fails when a test decided to die here.
    pub fn checkpoint(&self, point: &'static str) -> Result<()> {
        self.store.checkpoint(point)
    }
}

/// Told of every point that a crash could follow: after each commit and each thing done to the world.
pub trait Checkpoint: Send + Sync {
    /// `point` names the place. `Die` makes everything after it fail, as if the process had been killed.
    fn reached(&self, point: &'static str) -> Fate;
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Go on.
    Live,
    /// Do nothing more, ever.
    Die,
}

/// The checkpoint of real life.
#[derive(Debug, Clone, Copy)]
pub struct AlwaysLive;

impl Checkpoint for AlwaysLive {
    fn reached(&self, _point: &'static str) -> Fate {
        Fate::Live
    }
}

/// The shared core, as facades hold it.
pub type Shared = Arc<Core>;
