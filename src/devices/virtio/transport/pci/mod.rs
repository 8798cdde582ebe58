//! Virtio over PCI (virtio 1.2, section 4.1), modern only, MSI-X only: one memory BAR with every structure. It
//! moves registers and starts and stops the device; it never touches a queue. `vmm` makes one per device.
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memory::Ram;
use memory::layout::{PCI_MMIO_BYTES, PCI_MMIO_START};
use virtio_queue::QueueT;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::device::{
    Active, Begin, QueueWiring, Signals, ThreadHook, VirtioDevice, Wiring, with_causes,
};
use super::super::queue::{Position, Queue};
use crate::bus::{locked, read_image};
use crate::interrupt::{Doorbells, Msi, Notices};
use crate::limits::{CONFIG_BYTES_MAX, DRAIN_MS_MAX, RESET_WAIT_MS};
use crate::pause::NotDrained;
use crate::pci::msix::Msix;
use crate::pci::{Decoded, Function};

mod common;
mod config;
mod layout;
mod signals;
mod state;

use common::{Common, Outcome, QueueRegisters};
use config::Config;
use signals::PciSignals;
pub use state::{CommonState, FunctionState, QueueState, SignalsState};

/// Feature bits of the transport and its queues (virtio 1.2, section 6).
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// No BAR is decoded.
const NOWHERE: u64 = u64::MAX;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    state: Mutex<State>,
    signals: Arc<PciSignals>,
    /// One per queue, signalled by doorbells in the kernel or by a write that came here.
    kicks: Vec<Arc<EventFd>>,
    /// Where the BAR is decoded, or [`NOWHERE`]; read by every access of memory without a lock.
    base: AtomicU64,
    memory: Arc<Ram>,
    doorbells: Arc<dyn Doorbells>,
    threads: ThreadHook,
}

/// What the guest configures. Held while the device is started and stopped, never while a queue is served.
struct State {
    device: Box<dyn VirtioDevice>,
    config: Config,
    common: Common,
    /// The device's own configuration when the driver last read any of it.
    told: Option<ConfigImage>,
    active: Option<Box<dyn Active>>,
    /// What was active until the driver's reset, which is done when this has ended.
    ending: Option<Box<dyn Active>>,
    /// Doorbells in place: the address, and the queue they kick.
    attached: Vec<(u64, usize)>,
    /// The machine is paused. Until it goes on, nothing else lets the device go on.
    held: bool,
    /// The guest lets the function reach memory. Kernels take that away before they start another kernel, so that
    /// no packet lands in the memory of that one.
    master: bool,
}

/// A device's own configuration.
type ConfigImage = [u8; CONFIG_BYTES_MAX];

fn image_of(device: &dyn VirtioDevice) -> ConfigImage {
    let mut image = [0; CONFIG_BYTES_MAX];
    device.read_config(0, &mut image);
    image
}

impl VirtioPci {
    /// A function that is off until the guest's driver finds it. Fails when the host gives no eventfd or the
    /// device has more queues than the BAR has room for.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<Ram>,
        msi: Arc<dyn Msi>,
        doorbells: Arc<dyn Doorbells>,
        notices: Arc<dyn Notices>,
        threads: ThreadHook,
    ) -> io::Result<VirtioPci> {
        let sizes = device.queue_sizes();
        let kicks = sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new));
        let kicks = kicks.collect::<io::Result<Vec<_>>>()?;
        let too_many = || io::Error::new(io::ErrorKind::InvalidInput, "too many queues for one function");
        let queues = u16::try_from(sizes.len()).ok().filter(|count| *count <= layout::QUEUES_MAX);
        let queues = queues.ok_or_else(too_many)?;
        let vectors = queues.saturating_add(1);
        let signals = PciSignals::new(device.name().to_owned(), queues, Msix::new(vectors, msi), notices);
        let config = Config::new(device.device_type(), queues, vectors).ok_or_else(too_many)?;
        let offered = device.features() | VERSION_1 | INDIRECT_DESC | EVENT_IDX;
        let common = Common::new(offered, sizes);
        let state = State {
            device,
            config,
            common,
            told: None,
            active: None,
            ending: None,
            attached: Vec::new(),
            held: false,
            master: false,
        };
        Ok(VirtioPci {
            state: Mutex::new(state),
            signals: Arc::new(signals),
            kicks,
            base: AtomicU64::new(NOWHERE),
            memory,
            doorbells,
            threads,
        })
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut state = locked(&self.state);
        self.finish_reset(&mut state, Duration::ZERO);
        let image = state.common.image(&self.signals.live());
        read_image(&image, offset, data);
    }

    /// The generation changes with the first read after a change, so that no number of changes between two reads
    /// brings it back to where it was (virtio 1.2, section 4.1.4.3.1).
    fn read_device(&self, offset: u64, data: &mut [u8]) {
        let mut state = locked(&self.state);
        // The whole is compared and the answer taken from it: the host may change it meanwhile.
        let now = image_of(state.device.as_ref());
        if state.told.replace(now).is_some_and(|before| before != now) {
            self.signals.count_change();
        }
        read_image(&now, offset, data);
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut state = locked(&self.state);
        if !self.finish_reset(&mut state, Duration::ZERO) {
            // The driver waits for a status of 0 before it does anything else (virtio 1.2, section 4.1.4.3.2).
            return;
        }
        let had_agreed = state.common.has_agreed();
        let outcome = state.common.write(offset, data, self.signals.is_broken());
        if !had_agreed && state.common.has_agreed() {
            state.device.negotiated(state.common.features());
        }
        match outcome {
            Outcome::Nothing => {}
            Outcome::ConfigVector(vector) => self.signals.set_config_vector(vector),
            Outcome::QueueVector(queue, vector) => self.signals.set_queue_vector(queue, vector),
            Outcome::Reset => {
                self.begin_reset(&mut state);
                self.finish_reset(&mut state, Duration::from_millis(RESET_WAIT_MS));
            }
            Outcome::Activate => {
                let begin = if !state.master || state.held { Begin::Paused } else { Begin::Serving };
                if let Err(detail) = self.activate(&mut state, begin) {
                    self.signals.broken(detail);
                }
            }
            Outcome::Broken(detail) => self.signals.broken(detail.to_owned()),
        }
    }

    /// Starts the device with the queues as they are latched.
    fn activate(&self, state: &mut State, begin: Begin) -> Result<(), String> {
        self.signals.set_running(true);
        let features = state.common.features();
        let mut queues = Vec::new();
        for (index, registers) in (0_u16..).zip(state.common.queues()).filter(|(_, queue)| queue.enabled) {
            let queue = self
                .queue(registers, features, position(&begin, index))
                .map_err(|why| format!("queue {index}: {why}"))?;
            let Some(kick) = self.kicks.get(usize::from(index)) else { continue };
            queues.push(QueueWiring { index, queue, kick: Arc::clone(kick) });
        }
        let signals: Arc<dyn Signals> = self.signals.clone();
        let wiring = Wiring {
            memory: Arc::clone(&self.memory),
            features,
            queues,
            signals,
            threads: Arc::clone(&self.threads),
            begin,
        };
        state.active = Some(state.device.activate(wiring).map_err(|error| with_causes(&error))?);
        self.ring_doorbells(state);
        Ok(())
    }

    /// The queue that `registers` describe, if every part of it lies in guest memory.
    fn queue(&self, registers: &QueueRegisters, features: u64, position: Position) -> Result<Queue, String> {
        let mut queue = virtio_queue::Queue::new(registers.size_max).map_err(|error| error.to_string())?;
        queue.try_set_size(registers.size).map_err(|error| error.to_string())?;
        let [table, driver, device] = registers.addresses.map(GuestAddress);
        queue.try_set_desc_table_address(table).map_err(|error| error.to_string())?;
        queue.try_set_avail_ring_address(driver).map_err(|error| error.to_string())?;
        queue.try_set_used_ring_address(device).map_err(|error| error.to_string())?;
        queue.set_event_idx(features & EVENT_IDX != 0);
        queue.set_ready(true);
        // The crate takes an available ring at 0 for one that was never set.
        if driver.0 == 0 || !queue.is_valid(&*self.memory) {
            return Err(format!(
                "size {} with its parts at {:#x}, {:#x} and {:#x} does not lie in guest memory",
                registers.size, table.0, driver.0, device.0
            ));
        }
        let queue = Queue::resume(queue, Arc::clone(&self.memory), position);
        Ok(if features & INDIRECT_DESC != 0 { queue } else { queue.without_indirect() })
    }

    /// Begins to end what the driver has started.
    fn begin_reset(&self, state: &mut State) {
        self.signals.set_running(false);
        if let Some(mut active) = state.active.take() {
            active.ask_to_stop();
            state.ending = Some(active);
        }
        self.ring_doorbells(state);
        if state.ending.is_none() {
            self.clear(state);
        }
    }

    /// Whether no reset is under way, after waiting for at most `patience`. The registers stay as they are while the
    /// device may still touch guest memory, so a status of 0 says that it does not.
    fn finish_reset(&self, state: &mut State, patience: Duration) -> bool {
        let Some(ending) = &mut state.ending else { return true };
        if !ending.has_stopped(patience) {
            return false;
        }
        state.ending = None;
        self.clear(state);
        true
    }

    /// Back to what a driver finds first.
    fn clear(&self, state: &mut State) {
        for kick in &self.kicks {
            // An empty eventfd refuses, which is what is wanted.
            let _ = kick.read();
        }
        state.common.reset();
        self.signals.reset();
    }

    /// Makes the doorbells in the kernel agree with where the BAR is and whether the device runs. One that cannot
    /// be attached costs speed only: the write then arrives here.
    fn ring_doorbells(&self, state: &mut State) {
        let base = self.base.load(Ordering::SeqCst);
        let running = state.active.is_some() && base != NOWHERE;
        let wanted: Vec<(u64, usize)> = (0_u64..)
            .zip(state.common.queues())
            .enumerate()
            .filter(|(_, (_, queue))| running && queue.enabled)
            .filter_map(|(at, (index, _))| Some((layout::doorbell(base, index)?, at)))
            .collect();
        if wanted.iter().map(|(address, _)| address).eq(state.attached.iter().map(|(address, _)| address)) {
            return;
        }
        for (address, queue) in state.attached.drain(..) {
            if let Some(kick) = self.kicks.get(queue) {
                // The kernel refuses only what is not attached.
                let _ = self.doorbells.detach(address, kick);
            }
        }
        for (address, queue) in wanted {
            let Some(kick) = self.kicks.get(queue) else { continue };
            if self.doorbells.attach(address, kick).is_ok() {
                state.attached.push((address, queue));
            }
        }
    }

    /// Acts on what a write of configuration space has changed.
    fn configured(&self, state: &mut State) {
        // Elsewhere nothing forwards accesses, and a doorbell there could shadow what is not ours.
        let window =
            PCI_MMIO_START..=PCI_MMIO_START.saturating_add(PCI_MMIO_BYTES.saturating_sub(layout::BAR_BYTES));
        let base = state.config.memory_bar().filter(|base| window.contains(base)).unwrap_or(NOWHERE);
        if self.base.swap(base, Ordering::SeqCst) != base {
            self.ring_doorbells(state);
        }
        let master = state.config.is_bus_master();
        if std::mem::replace(&mut state.master, master) == master {
            return;
        }
        match &mut state.active {
            // A device that cannot be drained takes nothing new all the same, and a disk that hangs does not hold the
            // vCPU that wrote this.
            Some(active) if !master => drop(active.pause_within(Duration::from_millis(RESET_WAIT_MS))),
            Some(active) if !state.held => active.resume(),
            _ => {}
        }
    }

    fn notify(&self, offset: u64) {
        let queue = usize::try_from(offset / layout::NOTIFY_STRIDE).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(queue) {
            // A full counter is as good as one more.
            let _ = kick.write(1);
        }
    }
}

/// Where queue `index` begins.
fn position(begin: &Begin, index: u16) -> Position {
    match begin {
        Begin::Restored(stand) => {
            let saved = stand.queues.iter().find(|(at, _)| *at == index);
            saved.map_or_else(Position::default, |(_, position)| *position)
        }
        Begin::Serving | Begin::Paused => Position::default(),
    }
}

impl Function for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let access = locked(&self.state).config.indirect(offset);
        if let Some(access) = access {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..access.width) {
                self.read_memory(access.offset, value);
                locked(&self.state).config.set_indirect_data(value);
            }
        }
        locked(&self.state).config.read(offset, data);
        let status = config::STATUS.checked_sub(offset).and_then(|at| data.get_mut(usize::from(at)));
        if let (true, Some(status)) = (self.signals.has_line_interrupt(), status) {
            *status |= config::STATUS_INTERRUPT;
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let access = {
            let mut state = locked(&self.state);
            state.config.write(offset, data);
            self.configured(&mut state);
            self.signals.msix().control(state.config.msix_control());
            let value = state.config.indirect_data();
            state.config.indirect(offset).map(|access| (access, value))
        };
        if let Some((access, value)) = access {
            self.write_memory(access.offset, value.get(..access.width).unwrap_or_default());
        }
    }

    fn assign(&self, address: u64) {
        let mut state = locked(&self.state);
        state.config.assign(address);
        self.configured(&mut state);
    }

    fn decoded(&self) -> Option<Decoded> {
        let base = self.base.load(Ordering::SeqCst);
        (base != NOWHERE).then_some(Decoded { base, length: layout::BAR_BYTES })
    }

    fn read_memory(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match layout::area(offset) {
            Some((layout::Area::Common, within)) => self.read_common(within, data),
            Some((layout::Area::Isr, 0)) => {
                if let Some(first) = data.first_mut() {
                    *first = self.signals.take_isr();
                }
            }
            Some((layout::Area::Device, within)) => self.read_device(within, data),
            Some((layout::Area::Table, within)) => self.signals.msix().read_table(within, data),
            Some((layout::Area::Pending, within)) => self.signals.msix().read_pending(within, data),
            Some((layout::Area::Isr | layout::Area::Notify, _)) | None => {}
        }
    }

    fn write_memory(&self, offset: u64, data: &[u8]) {
        match layout::area(offset) {
            Some((layout::Area::Common, within)) => self.write_common(within, data),
            Some((layout::Area::Device, within)) => locked(&self.state).device.write_config(within, data),
            Some((layout::Area::Notify, within)) => self.notify(within),
            Some((layout::Area::Table, within)) => self.signals.msix().write_table(within, data),
            Some((layout::Area::Isr | layout::Area::Pending, _)) | None => {}
        }
    }

    fn pause(&self, patience: Duration) -> Result<(), NotDrained> {
        let mut state = locked(&self.state);
        if !self.finish_reset(&mut state, patience.min(Duration::from_millis(DRAIN_MS_MAX))) {
            return Err(NotDrained { device: state.device.name().to_owned(), in_flight: 1 });
        }
        state.held = true;
        state.active.as_mut().map_or(Ok(()), |active| active.pause_within(patience))
    }

    fn resume(&self) {
        let mut state = locked(&self.state);
        state.held = false;
        if let (true, Some(active)) = (state.master, &mut state.active) {
            active.resume();
        }
    }

    fn ask_to_stop(&self) {
        self.begin_reset(&mut locked(&self.state));
    }

    fn stop(&self) {
        let mut state = locked(&self.state);
        self.begin_reset(&mut state);
        if let Some(ending) = state.ending.take() {
            ending.stop();
            self.clear(&mut state);
        }
    }
}

#[cfg(test)]
mod tests;
