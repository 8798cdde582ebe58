//! The threads of one save: one copies, and while the machine runs another serves those who write. They end by themselves
//! or when the save is cancelled; how far they are is told through the bell.
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memory::guard::Guard;
use memory::{Extent, Ram};
use wire::saved::table::Table;
use wire::saved::{Moment, SaveReport, SaveStatus, WriteDelay};

use super::super::Error;
use crate::bell::Bell;
use crate::limits::{ARMED_PAGES_MAX, ARMED_ROUNDS_MAX, REARM_EVERY_MS, SAVE_TOLD_EVERY_MS};
use crate::log;
use crate::snapshot::{self, Contents, Parts};
use crate::threads::{self, ThreadKind};

/// A save from its begin on. Dropped, it is cancelled and waited for.
pub(in super::super) struct Save {
    shared: Arc<Shared>,
    /// Held by the threads: when they have ended, whoever still waits to write is let go.
    guard: Option<(Weak<Guard>, Moment)>,
    threads: Vec<JoinHandle<()>>,
}

/// Where a save goes.
pub(super) struct Outputs {
    pub(super) state: File,
    pub(super) memory: File,
    pub(super) memory_bytes: u64,
    /// The table of an earlier save, whose parts are left out.
    pub(super) base: Option<Table>,
    pub(super) began: Instant,
}

/// What the threads and the others see.
struct Shared {
    cancelled: AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    stall_us: AtomicU64,
    stage: Mutex<Stage>,
    changed: Condvar,
    bell: Arc<Bell>,
}

enum Stage {
    Arming,
    Armed,
    /// The moment has passed, and the thread has not seen it yet.
    Taken(Box<Contents>),
    Copying,
    Ended(Result<SaveReport, String>),
}

/// What memory is taken from.
enum Source {
    /// Memory of a machine that stays paused.
    Still { ram: Arc<Ram>, extents: Vec<Extent> },
    /// Memory of a machine that runs.
    Guarded { ram: Arc<Ram>, guard: Arc<Guard> },
}

impl Save {
    /// Saves memory that nobody writes to.
    pub(super) fn still(
        outputs: Outputs,
        ram: Arc<Ram>,
        extents: Vec<Extent>,
        contents: Contents,
        bell: &Arc<Bell>,
    ) -> Result<Save, Error> {
        let mut save = Save::new(Stage::Taken(Box::new(contents)), None, bell);
        save.copy(outputs, Source::Still { ram, extents })?;
        Ok(save)
    }

    /// Saves memory that is written to.
    pub(super) fn live(
        outputs: Outputs,
        guard: Arc<Guard>,
        moment: Moment,
        bell: &Arc<Bell>,
    ) -> Result<Save, Error> {
        let mut save = Save::new(Stage::Arming, Some((Arc::downgrade(&guard), moment)), bell);
        let (served, shared) = (Arc::clone(&guard), Arc::clone(&save.shared));
        save.start("faults", move || {
            if let Err(error) = served.serve() {
                shared.end(Err(log::chain(&error)));
            }
        })?;
        let ram = Arc::clone(guard.ram());
        save.copy(outputs, Source::Guarded { ram, guard })?;
        Ok(save)
    }

    fn new(stage: Stage, guard: Option<(Weak<Guard>, Moment)>, bell: &Arc<Bell>) -> Save {
        let shared = Arc::new(Shared {
            cancelled: AtomicBool::new(false),
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            stall_us: AtomicU64::new(0),
            stage: Mutex::new(stage),
            changed: Condvar::new(),
            bell: Arc::clone(bell),
        });
        Save { shared, guard, threads: Vec::new() }
    }

    fn copy(&mut self, outputs: Outputs, source: Source) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        self.start("save", move || {
            let result = shared.work(&outputs, &source).map_err(|error| log::chain(&error));
            if let Source::Guarded { guard, .. } = &source {
                guard.end();
            }
            drop(source);
            shared.end(result);
        })
    }

    fn start(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let run = move || {
            threads::enter(ThreadKind::Save);
            run();
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
        let thread = thread.map_err(|cause| Error::Host { what: format!("the thread {name}"), cause })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Whether it has not come to its end.
    pub(in super::super) fn is_under_way(&self) -> bool {
        !matches!(*self.shared.stage(), Stage::Ended(_))
    }

    /// Whether the machine has to stay paused for it.
    pub(in super::super) fn needs_stillness(&self) -> bool {
        self.guard.is_none() && self.is_under_way()
    }

    /// Whether the moment can come, and who says when.
    pub(super) fn awaits(&self) -> Option<Moment> {
        let (_, moment) = self.guard.as_ref()?;
        matches!(*self.shared.stage(), Stage::Armed).then_some(*moment)
    }

    /// This is the moment.
    pub(super) fn moment(&self, contents: Contents) {
        // Without it the threads have ended, and told why.
        let Some(guard) = self.guard.as_ref().and_then(|(guard, _)| guard.upgrade()) else { return };
        match guard.begin() {
            Ok(()) => {
                *self.shared.stage() = Stage::Taken(Box::new(contents));
                self.shared.changed.notify_all();
            }
            Err(error) => self.fail(&error),
        }
    }

    /// How long the machine stood still in the moment. Told before the report is made, which takes longer.
    pub(super) fn stood_still(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.shared.stall_us.store(us, Ordering::SeqCst);
    }

    /// The moment cannot be taken.
    pub(super) fn fail(&self, error: &dyn std::error::Error) {
        self.shared.end(Err(log::chain(error)));
    }

    pub(super) fn status(&self) -> SaveStatus {
        match &*self.shared.stage() {
            Stage::Arming => SaveStatus::Arming,
            Stage::Armed => SaveStatus::Armed,
            Stage::Taken(_) | Stage::Copying => SaveStatus::Copying {
                done_bytes: self.shared.done_bytes.load(Ordering::Relaxed),
                total_bytes: self.shared.total_bytes.load(Ordering::Relaxed),
            },
            Stage::Ended(Ok(report)) => SaveStatus::Saved(report.clone()),
            Stage::Ended(Err(detail)) => SaveStatus::Failed { detail: detail.clone() },
        }
    }

    /// Gives it up, unless the moment has passed: memory as it was then is kept whatever becomes of the machine.
    pub(in super::super) fn cancel_before_moment(&mut self) {
        let is_before = matches!(*self.shared.stage(), Stage::Arming | Stage::Armed);
        if is_before {
            self.cancel();
        }
    }

    pub(super) fn cancel(&mut self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..).rev() {
            // A panic has aborted the process before it could get here.
            let _ = thread.join();
        }
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Shared {
    fn work(&self, outputs: &Outputs, source: &Source) -> Result<SaveReport, snapshot::Error> {
        let (ram, guard) = match source {
            Source::Still { ram, .. } => (ram, None),
            Source::Guarded { ram, guard } => (ram, Some(guard)),
        };
        if let Some(guard) = guard {
            self.arm(guard, ram)?;
        }
        let contents = self.wait_for_moment(guard)?;
        let extents = match source {
            Source::Still { extents, .. } => extents.clone(),
            Source::Guarded { guard, .. } => guard.extents(),
        };
        self.total_bytes.store(extents.iter().map(|extent| extent.bytes).sum(), Ordering::Relaxed);
        let take = |part: Extent, data: &mut [u8]| match guard {
            Some(guard) => guard.take(part, data),
            None => memory::read(ram, part.offset, data),
        };
        let urgent = || guard.and_then(|guard| guard.urgent());
        let parts = Parts::new(&extents);
        let target = (&outputs.memory, outputs.base.as_ref());
        let (table, memory_bytes) =
            snapshot::copy_out(parts, outputs.memory_bytes, target, take, urgent, self.progress())?;
        let (root, state_bytes) = snapshot::write(&outputs.state, &contents, &table)?;
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let waits = guard.map(|guard| guard.waits());
        Ok(SaveReport {
            root,
            state_bytes,
            memory_bytes,
            stall_us: self.stall_us.load(Ordering::SeqCst),
            waits: waits.map_or(0, |waits| waits.count),
            delay: waits.map(|waits| WriteDelay { us_max: us(waits.longest), us_sum: us(waits.sum) }),
            total_us: us(outputs.began.elapsed()),
        })
    }

    /// Protects memory until little of it is not.
    fn arm(&self, guard: &Guard, ram: &Ram) -> Result<(), snapshot::Error> {
        if !guard.arm(|| !self.is_cancelled())? {
            return Err(snapshot::Error::Cancelled);
        }
        guard.expect(&memory::touched(ram)?);
        for _ in 0..ARMED_ROUNDS_MAX {
            if guard.rearm()? <= ARMED_PAGES_MAX {
                break;
            }
        }
        let mut stage = self.stage();
        if matches!(*stage, Stage::Arming) {
            *stage = Stage::Armed;
        }
        drop(stage);
        self.bell.save();
        Ok(())
    }

    /// Waits until the moment has been taken. What is written meanwhile is protected again from time to time, so that
    /// little is left to protect in the moment itself.
    fn wait_for_moment(&self, guard: Option<&Arc<Guard>>) -> Result<Contents, snapshot::Error> {
        let mut stage = self.stage();
        loop {
            match std::mem::replace(&mut *stage, Stage::Copying) {
                Stage::Taken(contents) => return Ok(*contents),
                other => *stage = other,
            }
            if self.is_cancelled() || matches!(*stage, Stage::Ended(_)) {
                return Err(snapshot::Error::Cancelled);
            }
            let wait = Duration::from_millis(REARM_EVERY_MS);
            stage = self.changed.wait_timeout(stage, wait).unwrap_or_else(PoisonError::into_inner).0;
            if let (Stage::Armed, Some(guard)) = (&*stage, guard) {
                // With the stage in hand, so that the moment is not taken in between.
                guard.rearm()?;
            }
        }
    }

    fn progress(&self) -> impl FnMut(u64) -> bool + '_ {
        let mut told = Instant::now();
        move |bytes| {
            self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
            if told.elapsed() > Duration::from_millis(SAVE_TOLD_EVERY_MS) {
                told = Instant::now();
                self.bell.save();
            }
            !self.is_cancelled()
        }
    }

    /// The first end counts.
    fn end(&self, result: Result<SaveReport, String>) {
        if result.is_err() {
            self.cancelled.store(true, Ordering::SeqCst);
        }
        let mut stage = self.stage();
        if !matches!(*stage, Stage::Ended(_)) {
            *stage = Stage::Ended(result);
        }
        drop(stage);
        self.changed.notify_all();
        self.bell.save();
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
