//! Virtio devices (virtio 1.2): the contract between a device and its transport, queues that survive any guest,
//! the thread that serves them, and the devices. Nothing here knows PCI but `transport`.

pub mod queue;

pub mod device;

pub mod worker;

pub mod balloon;
pub mod block;
pub mod net;
pub mod rng;

pub mod transport;

#[cfg(test)]
pub(crate) mod bench;
#[cfg(test)]
pub(crate) mod hostile;

pub use device::{
    ActivateError, Active, Begin, QueueWiring, Signals, Stand, ThreadHook, VirtioDevice, Wiring,
};
pub use queue::{BufferError, Chain, Fault, Position, Queue, Segment};
pub use worker::{Handler, Kick, Progress, Sources, Worker, WorkerOptions};
