//! Joins the request queue to the host's entropy. A chain is a request as it is: its writable part is filled, what
//! it lets the device read means nothing.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memory::Ram;

use super::backend;
use crate::limits::{ANSWERS_PER_TURN, RNG_BYTES_MAX, SMALL_QUEUE_SIZE};
use crate::state::{Numbers, Refused};
use crate::virtio::device::{ActivateError, Active, QueueWiring, Signals, Stand, VirtioDevice, Wiring};
use crate::virtio::queue::{Chain, Fault};
use crate::virtio::worker::{Handler, Progress, Sources, Worker, WorkerOptions};

const DEVICE_TYPE: u32 = 4;
const KIND: &str = "rng";
/// Bytes copied at once.
const PIECE_BYTES: usize = 4096;

/// Counters of the device, monotonic.
#[derive(Debug, Default)]
pub struct RngStats {
    /// Bytes given to the guest.
    pub bytes: AtomicU64,
    /// Buffers that lay outside guest memory.
    pub malformed: AtomicU64,
}

/// The entropy device.
pub struct Rng {
    stats: Arc<RngStats>,
}

impl Rng {
    /// A device that counts in `stats`.
    pub fn new(stats: Arc<RngStats>) -> Rng {
        Rng { stats }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }
    fn name(&self) -> &str {
        "rng"
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[SMALL_QUEUE_SIZE]
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Entropy is fresh in every process, so there is nothing to keep.
    fn save(&self) -> Numbers {
        Numbers::default()
    }

    fn restore(&mut self, state: &Numbers) -> Result<(), Refused> {
        state.exactly(self.name(), []).map(|[]| ())
    }

    fn activate(&mut self, wiring: Wiring) -> Result<Box<dyn Active>, ActivateError> {
        let options = WorkerOptions::new(KIND, self.name(), &wiring);
        let Wiring { queues, signals, .. } = wiring;
        let queue = queues.into_iter().next().ok_or(ActivateError::QueueMissing { index: 0 })?;
        let handler = RngHandler { queue, signals, stats: Arc::clone(&self.stats) };
        Ok(Box::new(Worker::start(options, Box::new(handler))?))
    }
}

struct RngHandler {
    queue: QueueWiring,
    signals: Arc<dyn Signals>,
    stats: Arc<RngStats>,
}

impl Handler for RngHandler {
    fn kicked(&mut self, index: u16, _sources: &Sources) -> Result<Progress, Fault> {
        let stats = &self.stats;
        let more =
            self.queue.queue.answer_each(ANSWERS_PER_TURN, |memory, chain| fill(stats, memory, chain))?;
        if self.queue.queue.wants_signal()? {
            self.signals.queue_used(index);
        }
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn stand(&mut self) -> Option<Stand> {
        Stand::of([(self.queue.index, &self.queue.queue)])
    }
}

/// Fills the writable part of `chain`, or as much of its start as can be; returns how much that is.
fn fill(stats: &RngStats, memory: &Ram, chain: &Chain) -> u32 {
    let wanted = chain.writable_bytes().min(RNG_BYTES_MAX);
    let mut piece = [0; PIECE_BYTES];
    let mut written = 0_u32;
    while written < wanted {
        let left = usize::try_from(wanted.saturating_sub(written)).unwrap_or(PIECE_BYTES);
        let Some(piece) = piece.get_mut(..left.min(PIECE_BYTES)) else { break };
        // Without entropy the driver gets a shorter answer, which it must expect.
        if backend::fill(piece).is_err() {
            break;
        }
        if chain.write(memory, written, piece).is_err() {
            stats.malformed.fetch_add(1, Ordering::Relaxed);
            break;
        }
        written = written.saturating_add(u32::try_from(piece.len()).unwrap_or(wanted));
    }
    stats.bytes.fetch_add(u64::from(written), Ordering::Relaxed);
    written
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
