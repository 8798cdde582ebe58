//! Joins the balloon's queues to guest memory. Inflated and reported pages are returned to the host at once; the
//! guest takes deflated ones back by touching them.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use memory::Ram;

use super::backend::{self, Outcome};
use super::config::Config;
use super::request::{self, Pages};
use super::state::State;
use crate::bus::locked;
use crate::limits::{BALLOON_ANSWERS_PER_TURN, BALLOON_RANGES_PER_REPORT_MAX, SMALL_QUEUE_SIZE};
use crate::state::{Numbers, Refused};
use crate::virtio::device::{
    ActivateError, Active, Begin, QueueWiring, Signals, Stand, VirtioDevice, Wiring,
};
use crate::virtio::queue::{Chain, Fault};
use crate::virtio::worker::{Handler, Progress, Sources, Worker, WorkerOptions};

const DEVICE_TYPE: u32 = 5;
const KIND: &str = "balloon";

/// Feature bits (virtio 1.2, section 5.5.3). The guest may take pages back when it runs out of memory; it may
/// report free pages; and it may say what they hold, without which a guest that initialises freed memory refuses
/// to report.
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;

/// Queues 0 and 1. The specification numbers the reporting queue 4, but Linux and QEMU leave out the numbers of
/// queues whose features are not offered, which makes it 2. Both places are served; 3 is never used.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORT: [u16; 2] = [2, 4];
const QUEUE_SIZES: [u16; 5] = [SMALL_QUEUE_SIZE; 5];

/// What a balloon is made with.
#[derive(Debug, Default)]
pub struct BalloonOptions {
    /// Bytes the guest is asked to give from the start.
    pub target_bytes: u64,
    /// Where it counts.
    pub stats: Arc<BalloonStats>,
}

/// Counters of the device, monotonic.
#[derive(Debug, Default)]
pub struct BalloonStats {
    /// Bytes returned to the host by inflating.
    pub inflated_bytes: AtomicU64,
    /// Bytes returned to the host by free page reporting.
    pub reported_bytes: AtomicU64,
    /// Requests that broke the protocol, and ranges that are not guest memory.
    pub malformed: AtomicU64,
    /// Ranges that the host did not take back.
    pub failed: AtomicU64,
}

/// The balloon.
pub struct Balloon {
    shared: Arc<Shared>,
}

/// The operator's side. Clones share it; it outlives the device harmlessly.
#[derive(Clone)]
pub struct BalloonControl {
    shared: Arc<Shared>,
}

struct Shared {
    config: Config,
    stats: Arc<BalloonStats>,
    /// The way to the driver, while there is one.
    signals: Mutex<Option<Weak<dyn Signals>>>,
}

impl Balloon {
    /// A balloon and the handle to it.
    pub fn new(options: BalloonOptions) -> (Balloon, BalloonControl) {
        let BalloonOptions { target_bytes, stats } = options;
        let shared = Arc::new(Shared { config: Config::default(), stats, signals: Mutex::new(None) });
        shared.config.set_target_bytes(target_bytes);
        (Balloon { shared: Arc::clone(&shared) }, BalloonControl { shared })
    }
}

impl BalloonControl {
    /// Asks the guest to give `bytes` in all, rounded down to 4 KiB. It gives them when and if it likes.
    pub fn set_target_bytes(&self, bytes: u64) {
        if !self.shared.config.set_target_bytes(bytes) {
            return;
        }
        let signals = locked(&self.shared.signals).as_ref().and_then(Weak::upgrade);
        if let Some(signals) = signals {
            signals.config_changed();
        }
    }

    /// Bytes the guest is asked for.
    pub fn target_bytes(&self) -> u64 {
        self.shared.config.target_bytes()
    }

    /// Bytes the guest says it has given.
    pub fn actual_bytes(&self) -> u64 {
        self.shared.config.actual_bytes()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }
    fn name(&self) -> &str {
        "balloon"
    }
    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_POISON | REPORTING
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.config.read(offset, data);
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        self.shared.config.write(offset, data);
    }

    fn save(&self) -> Numbers {
        self.shared.config.save().numbers()
    }
    fn restore(&mut self, state: &Numbers) -> Result<(), Refused> {
        self.shared.config.restore(State::read(self.name(), state)?);
        Ok(())
    }

    fn activate(&mut self, wiring: Wiring) -> Result<Box<dyn Active>, ActivateError> {
        let options = WorkerOptions::new(KIND, self.name(), &wiring);
        let Wiring { features, queues, signals, begin, .. } = wiring;
        for index in [INFLATE, DEFLATE] {
            if !queues.iter().any(|queue| queue.index == index) {
                return Err(ActivateError::QueueMissing { index });
            }
        }
        if !matches!(begin, Begin::Restored(_)) {
            self.shared.config.start();
        }
        *locked(&self.shared.signals) = Some(Arc::downgrade(&signals));
        let handler = BalloonHandler { queues, signals, features, shared: Arc::clone(&self.shared) };
        Ok(Box::new(Worker::start(options, Box::new(handler))?))
    }
}

struct BalloonHandler {
    queues: Vec<QueueWiring>,
    signals: Arc<dyn Signals>,
    features: u64,
    shared: Arc<Shared>,
}

impl Handler for BalloonHandler {
    fn kicked(&mut self, index: u16, _sources: &Sources) -> Result<Progress, Fault> {
        let Some(wiring) = self.queues.iter_mut().find(|queue| queue.index == index) else {
            return Ok(Progress::Idle);
        };
        let (shared, features) = (&self.shared, self.features);
        let more = wiring.queue.answer_each(BALLOON_ANSWERS_PER_TURN, |memory, chain| {
            match index {
                INFLATE => shared.inflate(memory, chain),
                // The guest touches what it takes back, and gets a fresh page then.
                DEFLATE => {}
                _ if REPORT.contains(&index) && features & REPORTING != 0 => {
                    shared.report(memory, chain, features);
                }
                _ => count(&shared.stats.malformed, 1),
            }
            0
        })?;
        if wiring.queue.wants_signal()? {
            self.signals.queue_used(index);
        }
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn stand(&mut self) -> Option<Stand> {
        Stand::of(self.queues.iter().map(|wiring| (wiring.index, &wiring.queue)))
    }
}

impl Shared {
    fn inflate(&self, memory: &Ram, chain: &Chain) {
        match request::numbered(memory, chain) {
            Ok(ranges) => {
                ranges.into_iter().for_each(|pages| self.discard(memory, pages, &self.stats.inflated_bytes))
            }
            Err(request::Malformed) => count(&self.stats.malformed, 1),
        }
    }

    /// A guest whose free pages hold a pattern wants to find it there again, and discarded pages read zero.
    fn report(&self, memory: &Ram, chain: &Chain, features: u64) {
        if features & PAGE_POISON != 0 && self.config.poison() != 0 {
            return;
        }
        let mut ranges = request::reported(chain);
        for pages in ranges.by_ref().take(BALLOON_RANGES_PER_REPORT_MAX) {
            self.discard(memory, pages, &self.stats.reported_bytes);
        }
        // A report is a hint: what is left out costs memory and nothing else.
        if ranges.next().is_some() {
            count(&self.stats.malformed, 1);
        }
    }

    fn discard(&self, memory: &Ram, pages: Pages, returned: &AtomicU64) {
        match backend::discard(memory, pages) {
            Outcome::Returned(bytes) => count(returned, bytes),
            Outcome::Refused => count(&self.stats.malformed, 1),
            Outcome::Failed => count(&self.stats.failed, 1),
        }
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
