//! The driver's side of virtqueues for tests: a small guest memory, rings written the way a guest writes them,
//! right or wrong, and signals that can be waited for. Every device's tests stand on it; no KVM is needed.
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memory::Ram;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Active, Begin, QueueWiring, Signals, Wiring};
use super::queue::Queue;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// VIRTIO_F_EVENT_IDX as a feature mask.
pub(crate) const EVENT_IDX: u64 = 1 << 29;

/// Longer than anything on a busy machine takes, so that reaching it means failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Memory of 8 MiB with a bump allocator.
pub(crate) struct Bench {
    pub(crate) memory: Arc<Ram>,
    next: u64,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        Bench::over(memory::new(8 << 20).unwrap())
    }

    /// A bench of which somebody else has the memory; its buffers are those from the start.
    pub(crate) fn over(memory: Arc<Ram>) -> Bench {
        Bench { memory, next: 0x1000 }
    }

    /// A buffer of its own page or pages.
    pub(crate) fn buffer(&mut self, bytes: u64) -> u64 {
        let address = self.next;
        self.next += bytes.div_ceil(0x1000) * 0x1000;
        assert!(self.next <= 8 << 20, "the bench is out of memory");
        address
    }

    /// A buffer that holds `data`.
    pub(crate) fn filled(&mut self, data: &[u8]) -> u64 {
        let address = self.buffer(data.len() as u64);
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
        address
    }

    pub(crate) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// A queue of `size` entries.
    pub(crate) fn ring(&mut self, size: u16) -> Ring {
        let entries = u64::from(size);
        let (table, avail) = (self.buffer(entries * 16), self.buffer(entries * 2 + 6));
        let used = self.buffer(entries * 8 + 6);
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let memory = Arc::clone(&self.memory);
        Ring { memory, size, table, avail, used, kick, free: 0, offered: 0, seen: 0 }
    }

    /// Wiring for `rings` in index order with the driver's `features`.
    pub(crate) fn wiring(&self, rings: &[&Ring], features: u64) -> (Wiring, Arc<Heard>) {
        let heard = Arc::new(Heard::default());
        let queues = (0..).zip(rings).map(|(index, ring)| ring.wiring(index, features)).collect();
        let wiring = Wiring {
            memory: Arc::clone(&self.memory),
            features,
            queues,
            signals: heard.clone(),
            threads: Arc::new(|_| {}),
            begin: Begin::Serving,
        };
        (wiring, heard)
    }
}

/// The driver's view of one queue. Descriptors are handed out in a circle and never waited for.
pub(crate) struct Ring {
    memory: Arc<Ram>,
    pub(crate) size: u16,
    pub(crate) table: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) kick: Arc<EventFd>,
    free: u16,
    offered: u16,
    seen: u16,
}

/// A buffer of a chain: address, length, and whether the device may write it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    Read(u64, u32),
    Write(u64, u32),
}

impl Ring {
    /// The device's side of the queue.
    pub(crate) fn queue(&self, features: u64) -> Queue {
        let mut queue = virtio_queue::Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.table as u32), Some((self.table >> 32) as u32));
        queue.set_avail_ring_address(Some(self.avail as u32), Some((self.avail >> 32) as u32));
        queue.set_used_ring_address(Some(self.used as u32), Some((self.used >> 32) as u32));
        queue.set_event_idx(features & EVENT_IDX != 0);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        Queue::new(queue, Arc::clone(&self.memory))
    }

    pub(crate) fn wiring(&self, index: u16, features: u64) -> QueueWiring {
        QueueWiring { index, queue: self.queue(features), kick: Arc::clone(&self.kick) }
    }

    /// Writes a descriptor as it is told.
    pub(crate) fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        write_descriptor(&self.memory, self.table + u64::from(index) * 16, address, length, flags, next);
    }

    /// Writes a proper chain and returns its head; nothing is offered yet.
    pub(crate) fn chain(&mut self, parts: &[Part]) -> u16 {
        let head = self.free;
        for (at, part) in parts.iter().enumerate() {
            let index = self.free;
            self.free = (self.free + 1) % self.size;
            let more = if at + 1 < parts.len() { NEXT } else { 0 };
            match *part {
                Part::Read(address, length) => self.descriptor(index, address, length, more, self.free),
                Part::Write(address, length) => {
                    self.descriptor(index, address, length, more | WRITE, self.free);
                }
            }
        }
        head
    }

    /// Puts `head` into the available ring.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = self.avail + 4 + u64::from(self.offered % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.offered = self.offered.wrapping_add(1);
        self.offer_index(self.offered);
    }

    /// Sets the available index as it is told.
    pub(crate) fn offer_index(&mut self, index: u16) {
        self.offered = index;
        let order = Ordering::Release;
        self.memory.store(index, GuestAddress(self.avail + 2), order).unwrap();
    }

    /// Writes a chain, offers it and kicks.
    pub(crate) fn submit(&mut self, parts: &[Part]) -> u16 {
        let head = self.chain(parts);
        self.offer(head);
        self.kick.write(1).unwrap();
        head
    }

    /// Sets the flags of the available ring.
    pub(crate) fn avail_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.avail)).unwrap();
    }

    /// Asks to be told when the used index passes `index` (EVENT_IDX).
    pub(crate) fn used_event(&self, index: u16) {
        let address = self.avail + 4 + u64::from(self.size) * 2;
        self.memory.write_obj(index, GuestAddress(address)).unwrap();
    }

    /// What the device last asked to be kicked at (EVENT_IDX).
    pub(crate) fn avail_event(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.used + 4 + u64::from(self.size) * 8)).unwrap()
    }

    /// The next used element, (head, written), if there is one.
    pub(crate) fn take_used(&mut self) -> Option<(u32, u32)> {
        let order = Ordering::Acquire;
        let index: u16 = self.memory.load(GuestAddress(self.used + 2), order).unwrap();
        if index == self.seen {
            return None;
        }
        let slot = GuestAddress(self.used + 4 + u64::from(self.seen % self.size) * 8);
        self.seen = self.seen.wrapping_add(1);
        let element: [u8; 8] = self.memory.read_obj(slot).unwrap();
        let (id, written) = element.split_at(4);
        Some((u32::from_le_bytes(id.try_into().unwrap()), u32::from_le_bytes(written.try_into().unwrap())))
    }

    /// Waits for the next used element.
    pub(crate) fn wait_used(&mut self, heard: &Heard) -> (u32, u32) {
        let mut found = None;
        heard.wait("a used buffer", |_| {
            found = self.take_used();
            found.is_some()
        });
        found.unwrap()
    }
}

/// Pauses and resumes a device as fast as it can, in a thread of its own.
pub(crate) struct Pauses {
    thread: JoinHandle<()>,
    is_over: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
}

impl Pauses {
    pub(crate) fn start(mut active: Box<dyn Active>) -> Pauses {
        let (is_over, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (over, counter) = (Arc::clone(&is_over), Arc::clone(&count));
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                active.pause().unwrap();
                active.resume();
                counter.fetch_add(1, Ordering::Relaxed);
            }
            active.stop();
        });
        Pauses { thread, is_over, count }
    }

    /// How often it has paused.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Stops the device.
    pub(crate) fn end(self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// Writes one descriptor at `at`, which may lie in an indirect table.
pub(crate) fn write_descriptor(memory: &Ram, at: u64, address: u64, length: u32, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(at)).unwrap();
}

/// What a device has signalled.
#[derive(Default)]
pub(crate) struct Heard {
    log: Mutex<Log>,
    changed: Condvar,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Log {
    /// Queue indices in the order they were signalled.
    pub(crate) used: Vec<u16>,
    pub(crate) config_changes: usize,
    pub(crate) broken: Vec<String>,
}

impl Heard {
    pub(crate) fn log(&self) -> Log {
        self.log.lock().unwrap().clone()
    }

    /// Waits until `done` holds; asks again after each signal, and every 10 ms for what comes without one.
    pub(crate) fn wait(&self, what: &str, mut done: impl FnMut(&Log) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut log = self.log.lock().unwrap();
        while !done(&log) {
            assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}: {log:?}");
            log = self.changed.wait_timeout(log, Duration::from_millis(10)).unwrap().0;
        }
    }

    fn note(&self, change: impl FnOnce(&mut Log)) {
        change(&mut self.log.lock().unwrap());
        self.changed.notify_all();
    }
}

impl Signals for Heard {
    fn queue_used(&self, index: u16) {
        self.note(|log| log.used.push(index));
    }
    fn config_changed(&self) {
        self.note(|log| log.config_changes += 1);
    }
    fn broken(&self, detail: String) {
        self.note(|log| log.broken.push(detail));
    }
}
