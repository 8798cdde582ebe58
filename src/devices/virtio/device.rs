//! The contract between a virtio device and its transport. Traits and plain types only; `transport::pci` calls
//! the devices through them and gives them what they need to serve a driver.
use std::io;
use std::sync::Arc;
use std::time::Duration;

use memory::Ram;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Position, Queue};
use crate::limiter::LimiterState;
use crate::limits::PAUSE_MAX;
use crate::pause::NotDrained;
use crate::state::{Numbers, Refused};

/// A virtio device as its transport sees it. The guest reaches every method but [`VirtioDevice::name`], so none
/// may panic, block for long or trust an argument.
pub trait VirtioDevice: Send {
    /// The device's number in virtio 1.2, section 5.
    fn device_type(&self) -> u32;
    /// What operators call it: `disk0`, `nic1`, `rng`, `balloon`.
    fn name(&self) -> &str;
    /// The device's own feature bits. The transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX.
    fn features(&self) -> u64;
    /// The largest size of each queue, powers of two up to 32768, in queue order.
    fn queue_sizes(&self) -> &[u16];
    /// Fills `data` with the device's configuration at `offset`; what lies beyond its end reads zero. It has at most
    /// [`crate::limits::CONFIG_BYTES_MAX`] bytes.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset` of the configuration; what is read-only or beyond the end is ignored.
    fn write_config(&self, offset: u64, data: &[u8]);
    /// What the device keeps beside its queues, by name. Asked while it is paused.
    fn save(&self) -> Numbers;
    /// Takes over what [`VirtioDevice::save`] gave, which may have been changed by anybody. Called before
    /// [`VirtioDevice::activate`]; after an error the device is of no use.
    fn restore(&mut self, state: &Numbers) -> Result<(), Refused>;
    /// The driver has agreed to `features` and may read from here on what depends on them.
    fn negotiated(&self, _features: u64) {}
    /// Starts to serve the queues: the driver has set DRIVER_OK. Called again after each reset.
    fn activate(&mut self, wiring: Wiring) -> Result<Box<dyn Active>, ActivateError>;
}

/// All that a device gets from its transport to serve one driver, until the next reset.
pub struct Wiring {
    /// Guest memory.
    pub memory: Arc<Ram>,
    /// The feature bits that were agreed on.
    pub features: u64,
    /// The queues the driver has enabled, ascending by index; their addresses and sizes have been checked.
    pub queues: Vec<QueueWiring>,
    /// The way to the driver.
    pub signals: Arc<dyn Signals>,
    /// Called first in each new thread.
    pub threads: ThreadHook,
    /// How the device starts.
    pub begin: Begin,
}

/// How a device starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begin {
    /// Serves at once.
    Serving,
    /// Paused, as if [`Active::pause`] had been called.
    Paused,
    /// Paused, and where another device has stopped. The queues stand there already.
    Restored(Stand),
}

impl Begin {
    /// What bucket number `at` held where the device stopped, if it did.
    pub fn limits(&self, at: usize) -> Option<LimiterState> {
        match self {
            Begin::Restored(stand) => stand.limits.get(at).copied(),
            Begin::Serving | Begin::Paused => None,
        }
    }
}

/// Where a device stands that is paused with nothing in flight.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stand {
    /// By queue, ascending by number; only those the driver has enabled.
    pub queues: Vec<(u16, Position)>,
    /// What the buckets of its limits hold, in the device's own order.
    #[serde(default)]
    pub limits: Vec<LimiterState>,
}

impl Stand {
    /// Of these queues; nothing when a chain of one is in flight.
    pub fn of<'a>(queues: impl IntoIterator<Item = (u16, &'a Queue)>) -> Option<Stand> {
        let positions = queues.into_iter().map(|(index, queue)| Some((index, queue.position()?)));
        Some(Stand { queues: positions.collect::<Option<_>>()?, limits: Vec::new() })
    }

    /// With what these buckets hold.
    pub fn with_limits(self, limits: Vec<LimiterState>) -> Stand {
        Stand { limits, ..self }
    }
}

/// One enabled queue.
pub struct QueueWiring {
    /// Its number, as [`VirtioDevice::queue_sizes`] counts.
    pub index: u16,
    /// The queue itself.
    pub queue: Queue,
    /// Signalled when the driver has made buffers available. Non-blocking.
    pub kick: Arc<EventFd>,
}

/// How a device speaks to its driver. Never blocks; called from the device's own thread.
pub trait Signals: Send + Sync {
    /// There is something new in the used ring of queue `index`. Ask [`Queue::wants_signal`] before.
    fn queue_used(&self, index: u16);
    /// The device's configuration has changed.
    fn config_changed(&self);
    /// The driver broke the rules beyond what can be answered: sets DEVICE_NEEDS_RESET and tells the operator.
    fn broken(&self, detail: String);
}

/// Called with the kind of thread first in each new thread, before it touches anything of the guest's.
pub type ThreadHook = Arc<dyn Fn(&'static str) + Send + Sync>;

/// A device that serves its queues.
pub trait Active: Send {
    /// Takes nothing new from the queues and waits, for at most [`crate::limits::DRAIN_MS_MAX`], until nothing is
    /// in flight. After an error the device is still paused; call [`Active::resume`] to let it go on.
    fn pause(&mut self) -> Result<(), NotDrained> {
        self.pause_within(PAUSE_MAX)
    }
    /// As [`Active::pause`], but waits for at most `patience`: what is in flight then may end later.
    fn pause_within(&mut self, patience: Duration) -> Result<(), NotDrained>;
    /// Where the device stood when it was last paused; nothing when it is broken or was not drained.
    fn stand(&self) -> Option<Stand>;
    /// Goes on after [`Active::pause`].
    fn resume(&mut self);
    /// Takes nothing new from here on and begins to end. Returns at once.
    fn ask_to_stop(&mut self);
    /// Waits for at most `patience` for the end that [`Active::ask_to_stop`] began; true when guest memory is no
    /// longer touched.
    fn has_stopped(&mut self, patience: Duration) -> bool;
    /// Ends the threads and returns when guest memory is no longer touched.
    fn stop(self: Box<Self>);
}

/// Why a device cannot serve its driver. The transport sets DEVICE_NEEDS_RESET and tells the operator.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The host gave no thread or descriptor.
    #[error("cannot start the {kind} thread")]
    Thread {
        /// The kind of thread.
        kind: &'static str,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The driver left out a queue that the device cannot do without.
    #[error("queue {index} is not enabled")]
    QueueMissing {
        /// The queue's number.
        index: u16,
    },
    /// What the device stands on failed.
    #[error("the backend failed")]
    Backend(#[source] io::Error),
}

/// An error and its causes in one line, for the operator.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
