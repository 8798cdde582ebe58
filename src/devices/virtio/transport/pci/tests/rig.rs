//! A function with everything around it, and a driver's hands. The tests beside it say what should happen.
use std::sync::atomic::AtomicUsize;

use vmm_sys_util::epoll::EventSet;

use super::super::*;
use crate::bus::little_endian;
use crate::interrupt::MsiMessage;
use crate::state::{Numbers, Refused};
use crate::virtio::bench::{Bench, PATIENCE, Ring};
use crate::virtio::device::{ActivateError, Stand};
use crate::virtio::queue::Fault;
use crate::virtio::worker::{Handler, Kick, Progress, Sources, Worker, WorkerOptions};

/// Everything around the function, counted.
#[derive(Default)]
pub(super) struct Around {
    pub(super) raised: Mutex<Vec<u16>>,
    pub(super) doorbells: Mutex<Vec<u64>>,
    pub(super) faults: Mutex<Vec<String>>,
    pub(super) refuse_doorbells: bool,
}

impl Msi for Around {
    fn route(&self, _vector: u16, _message: Option<MsiMessage>) {}
    fn raise(&self, vector: u16) {
        self.raised.lock().unwrap().push(vector);
    }
}

impl Doorbells for Around {
    fn attach(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        if self.refuse_doorbells {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.doorbells.lock().unwrap().push(address);
        Ok(())
    }
    fn detach(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let at =
            doorbells.iter().position(|other| *other == address).expect("only what is attached is detached");
        doorbells.remove(at);
        Ok(())
    }
}

impl Notices for Around {
    fn device_fault(&self, device: &str, detail: String) {
        self.faults.lock().unwrap().push(format!("{device}: {detail}"));
    }
}

/// A device with two queues that hands every buffer back at once; its configuration is eight bytes.
struct Echo {
    config: Arc<Mutex<[u8; 8]>>,
    negotiated: Arc<Mutex<Vec<u64>>>,
    running: Arc<AtomicUsize>,
    hung: Arc<Hung>,
    needs_both: bool,
}

/// A request that does not end before it is told to.
pub(super) struct Hung {
    requests: AtomicUsize,
    answered: EventFd,
}

impl Hung {
    pub(super) fn begin(&self) {
        self.requests.store(1, Ordering::SeqCst);
    }
    pub(super) fn end(&self) {
        self.requests.store(0, Ordering::SeqCst);
        self.answered.write(1).unwrap();
    }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u32 {
        4
    }
    fn name(&self) -> &str {
        "echo"
    }
    fn features(&self) -> u64 {
        1 << 3
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 32]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&*self.config.lock().unwrap(), offset, data);
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        for (to, from) in config.iter_mut().skip(usize::try_from(offset).unwrap()).zip(data) {
            *to = *from;
        }
    }
    fn save(&self) -> Numbers {
        Numbers::of([("config", u64::from_le_bytes(*self.config.lock().unwrap()))])
    }
    fn restore(&mut self, state: &Numbers) -> Result<(), Refused> {
        let [config] = state.exactly("echo", ["config"])?;
        *self.config.lock().unwrap() = config.to_le_bytes();
        Ok(())
    }
    fn negotiated(&self, features: u64) {
        self.negotiated.lock().unwrap().push(features);
    }
    fn activate(&mut self, wiring: Wiring) -> Result<Box<dyn Active>, ActivateError> {
        if self.needs_both && wiring.queues.len() < 2 {
            return Err(ActivateError::QueueMissing { index: 1 });
        }
        let kicks = wiring.queues.iter().map(|queue| Kick { index: queue.index, event: queue.kick.clone() });
        let options = WorkerOptions {
            kind: "echo",
            device: "echo".to_owned(),
            kicks: kicks.collect(),
            signals: wiring.signals.clone(),
            threads: wiring.threads,
            begin: wiring.begin,
        };
        self.running.fetch_add(1, Ordering::SeqCst);
        let running = Arc::clone(&self.running);
        let hung = Arc::clone(&self.hung);
        let handler = EchoHandler { queues: wiring.queues, signals: wiring.signals, running, hung };
        Ok(Box::new(Worker::start(options, Box::new(handler))?))
    }
}

struct EchoHandler {
    queues: Vec<QueueWiring>,
    signals: Arc<dyn Signals>,
    running: Arc<AtomicUsize>,
    hung: Arc<Hung>,
}

impl Handler for EchoHandler {
    fn started(&mut self, sources: &Sources) -> io::Result<()> {
        sources.add(&self.hung.answered, 0, EventSet::IN)
    }
    fn event(&mut self, _token: u32, _sources: &Sources) -> Result<(), Fault> {
        let _ = self.hung.answered.read();
        Ok(())
    }
    fn in_flight(&self) -> usize {
        self.hung.requests.load(Ordering::SeqCst)
    }
    fn kicked(&mut self, index: u16, _sources: &Sources) -> Result<Progress, Fault> {
        let wiring = self.queues.iter_mut().find(|queue| queue.index == index).unwrap();
        while let Some(chain) = wiring.queue.pop()? {
            let written = chain.writable_bytes();
            wiring.queue.complete(chain, written)?;
        }
        if wiring.queue.wants_signal()? {
            self.signals.queue_used(index);
        }
        Ok(Progress::Idle)
    }
    fn stand(&mut self) -> Option<Stand> {
        Stand::of(self.queues.iter().map(|wiring| (wiring.index, &wiring.queue)))
    }
}

impl Drop for EchoHandler {
    fn drop(&mut self) {
        self.running.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A function with everything around it and a driver's hands.
pub(super) struct Rig {
    pub(super) bench: Bench,
    pub(super) around: Arc<Around>,
    pub(super) function: VirtioPci,
    /// The device's configuration, as the host changes it.
    pub(super) host_config: Arc<Mutex<[u8; 8]>>,
    /// Features that the device was told of, once for each agreement.
    pub(super) negotiated: Arc<Mutex<Vec<u64>>>,
    pub(super) running: Arc<AtomicUsize>,
    pub(super) hung: Arc<Hung>,
}

pub(super) const BASE: u64 = PCI_MMIO_START + 0x5_0000;

impl Rig {
    pub(super) fn new() -> Rig {
        Rig::with(Around::default(), false)
    }

    /// Another function over the memory of this one, as a machine has that takes it over.
    pub(super) fn beside(&self) -> Rig {
        Rig::over(Bench::over(self.bench.memory.clone()), Around::default(), false)
    }

    pub(super) fn with(around: Around, needs_both: bool) -> Rig {
        Rig::over(Bench::new(), around, needs_both)
    }

    fn over(bench: Bench, around: Around, needs_both: bool) -> Rig {
        let around = Arc::new(around);
        let running = Arc::new(AtomicUsize::new(0));
        let config = Arc::new(Mutex::new(*b"toftecho"));
        let hung = Hung { requests: AtomicUsize::new(0), answered: EventFd::new(EFD_NONBLOCK).unwrap() };
        let hung = Arc::new(hung);
        let (host_config, negotiated) = (Arc::clone(&config), Arc::default());
        let device = Echo {
            config,
            negotiated: Arc::clone(&negotiated),
            running: running.clone(),
            hung: hung.clone(),
            needs_both,
        };
        let function = VirtioPci::new(
            Box::new(device),
            bench.memory.clone(),
            around.clone(),
            around.clone(),
            around.clone(),
            Arc::new(|_| {}),
        );
        let function = function.unwrap();
        function.assign(BASE);
        Rig { bench, around, function, host_config, negotiated, running, hung }
    }

    pub(super) fn write(&self, offset: u64, value: u64, width: usize) {
        self.function.write_memory(offset, &value.to_le_bytes()[..width]);
    }

    pub(super) fn read(&self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read_memory(offset, &mut data[..width]);
        little_endian(&data[..width])
    }

    pub(super) fn config(&self, offset: u16, width: usize) -> u64 {
        let mut data = [0; 4];
        self.function.read_config(offset, &mut data[..width]);
        little_endian(&data[..width])
    }

    pub(super) fn set_config(&self, offset: u16, value: u32, width: usize) {
        self.function.write_config(offset, &value.to_le_bytes()[..width]);
    }

    /// Capabilities as (id, offset).
    pub(super) fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        let mut at = self.config(0x34, 1) as u16;
        while at != 0 && found.len() < 64 {
            found.push((self.config(at, 1) as u8, at));
            at = self.config(at + 1, 1) as u16;
        }
        found
    }

    pub(super) fn virtio_capability(&self, kind: u64) -> u16 {
        let mut all = self.capabilities().into_iter().filter(|(id, _)| *id == 9).map(|(_, at)| at);
        all.find(|at| self.config(at + 3, 1) == kind).unwrap()
    }

    /// What a driver does up to its queues.
    pub(super) fn agree(&self) {
        self.set_config(4, 6, 2);
        let msix = self.capabilities().into_iter().find(|(id, _)| *id == 0x11).unwrap().1;
        self.set_config(msix + 2, 0x8000, 2);
        for vector in 0..3 {
            self.write(layout::TABLE + vector * 16, 0xFEE0_0000, 8);
            self.write(layout::TABLE + vector * 16 + 8, 0x40 + vector, 8);
        }
        for (offset, value, width) in
            [(20, 0, 1), (20, 3, 1), (8, 0, 4), (12, 1 << 3, 4), (8, 1, 4), (12, 1, 4), (20, 11, 1)]
        {
            self.write(offset, value, width);
        }
        assert_eq!(self.read(20, 1), 11);
        self.write(16, 0, 2);
    }

    pub(super) fn enable(&self, index: u64, ring: &Ring) {
        self.write(22, index, 2);
        self.write(24, u64::from(ring.size), 2);
        self.write(26, index + 1, 2);
        for (offset, address) in [(32, ring.table), (40, ring.avail), (48, ring.used)] {
            self.write(offset, address & 0xFFFF_FFFF, 4);
            self.write(offset + 4, address >> 32, 4);
        }
        self.write(28, 1, 2);
    }

    pub(super) fn start(&mut self) -> [Ring; 2] {
        let rings = [self.bench.ring(16), self.bench.ring(32)];
        self.agree();
        self.enable(0, &rings[0]);
        self.enable(1, &rings[1]);
        self.write(20, 15, 1);
        rings
    }

    pub(super) fn wait(&self, what: &str, mut done: impl FnMut(&Around) -> bool) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while !done(&self.around) {
            assert!(std::time::Instant::now() < deadline, "no {what} within {PATIENCE:?}");
            std::thread::yield_now();
        }
    }

    pub(super) fn faults(&self) -> Vec<String> {
        self.around.faults.lock().unwrap().clone()
    }

    pub(super) fn doorbells(&self) -> Vec<u64> {
        self.around.doorbells.lock().unwrap().clone()
    }
}
