//! How far long work on a server is: told in its operation, which is one of a server's while the work lasts.
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use model::operation::Progress;

use super::effects::Doing;
use super::limits;
use crate::error::Result;
use crate::operations;

/// A part of an operation: its name, the percent from which it counts, and how many percent it is.
pub(super) type Part = (&'static str, u8, u8);

/// How many bytes are done, and how many there are: written by the work, read by whoever tells.
#[derive(Default)]
pub(super) struct Moved {
    done: AtomicU64,
    total: AtomicU64,
}

impl Moved {
    pub(super) fn note(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }
}

impl Doing {
    /// Does work to its end and tells how far it is meanwhile. Fails as the work does, or when nothing can be recorded.
    pub(super) async fn telling<T>(
        &self,
        part: Part,
        moved: &Moved,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                outcome = &mut work => return outcome,
                () = tokio::time::sleep(limits::PROGRESS_EVERY) => {
                    let (done, total) = (&moved.done, &moved.total);
                    self.tell(part, done.load(Ordering::Relaxed), total.load(Ordering::Relaxed)).await?;
                }
            }
        }
    }

    /// As [`Doing::tell`] for who looks more often than is written down; `told` is when that was last.
    pub(super) async fn tell_at_times(
        &self,
        told: &mut Instant,
        part: Part,
        done: u64,
        total: u64,
    ) -> Result<()> {
        if told.elapsed() >= limits::PROGRESS_EVERY {
            self.tell(part, done, total).await?;
            *told = Instant::now();
        }
        Ok(())
    }

    /// Tells how far a part of the work is.
    pub(super) async fn tell(&self, (phase, from, span): Part, done: u64, total: u64) -> Result<()> {
        let Some(job) = self.record.life.job else { return Ok(()) };
        let share = done.saturating_mul(u64::from(span)).checked_div(total).unwrap_or_default();
        let progress = Progress {
            phase: phase.to_owned(),
            percent: from + u8::try_from(share).unwrap_or(span).min(span),
            bytes_done: Some(done),
            bytes_total: Some(total),
            ..Progress::default()
        };
        self.workshop.core.store.write(move |tx| operations::progress(tx, job.id, progress)).await
    }
}
