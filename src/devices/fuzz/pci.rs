//! The PCI side of a virtio device: configuration space by both ways in, the BAR, MSI-X, and the common configuration,
//! in any order and of any width. What is latched stays, and the device runs only while it may.
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::Unstructured;
use memory::layout::{PCI_BAR_BYTES, PCI_MMIO_BYTES, PCI_MMIO_START};
use vmm_sys_util::eventfd::EventFd;

use super::driver::{byte, word};
use crate::bus::{Region, little_endian, locked};
use crate::interrupt::{Doorbells, Msi, MsiMessage, Notices};
use crate::pause::NotDrained;
use crate::pci::Root;
use crate::state::{Numbers, Refused};
use crate::virtio::transport::pci::VirtioPci;
use crate::virtio::{ActivateError, Active, Begin, QueueWiring, Signals, Stand, VirtioDevice, Wiring};

const SLOT: u8 = 3;
const BAR: u64 = PCI_MMIO_START + 0x5_0000;
const SIZES: [u16; 2] = [16, 32];
const MEMORY_BYTES: u64 = 1 << 20;
const STEPS_MAX: usize = 256;

const DRIVER_OK: u64 = 4;
const FEATURES_OK: u64 = 8;

/// What the machine around the function was told.
#[derive(Default)]
struct Around {
    /// Of the device.
    name: String,
    routes: [Option<MsiMessage>; 8],
    doorbells: BTreeSet<u64>,
    faults: usize,
    /// What the device was started with and has not dropped.
    running: Option<Running>,
}

/// A device at work.
struct Running {
    signals: Arc<dyn Signals>,
    paused: bool,
    ends: bool,
}

#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<Around>>);

impl Shared {
    /// Around the device of this name.
    pub(super) fn of(name: &str) -> Shared {
        Shared(Arc::new(Mutex::new(Around { name: name.to_owned(), ..Around::default() })))
    }
}

impl Msi for Shared {
    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        locked(&self.0).routes[usize::from(vector)] = message;
    }
    fn raise(&self, vector: u16) {
        assert!(locked(&self.0).routes[usize::from(vector)].is_some(), "vector {vector} goes nowhere");
    }
}

impl Doorbells for Shared {
    fn attach(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        let window = PCI_MMIO_START..PCI_MMIO_START + PCI_MMIO_BYTES;
        assert!(window.contains(&address), "a doorbell at {address:#x}");
        assert!(locked(&self.0).doorbells.insert(address), "two doorbells at {address:#x}");
        Ok(())
    }
    fn detach(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        assert!(locked(&self.0).doorbells.remove(&address), "no doorbell at {address:#x}");
        Ok(())
    }
}

impl Notices for Shared {
    fn device_fault(&self, device: &str, detail: String) {
        let mut around = locked(&self.0);
        assert!(device == around.name && !detail.is_empty() && detail.len() < 4096);
        around.faults += 1;
    }
}

/// A device that does nothing but notice how it is treated.
struct Probe(Shared);

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        4
    }
    fn name(&self) -> &str {
        "probe"
    }
    fn features(&self) -> u64 {
        1 << 3
    }
    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        assert!(offset < 0x2000 && data.iter().all(|byte| *byte == 0));
    }
    fn write_config(&self, offset: u64, _data: &[u8]) {
        assert!(offset < 0x2000);
    }
    fn save(&self) -> Numbers {
        Numbers::default()
    }
    fn restore(&mut self, state: &Numbers) -> Result<(), Refused> {
        state.exactly("probe", []).map(|[]| ())
    }
    fn activate(&mut self, wiring: Wiring) -> Result<Box<dyn Active>, ActivateError> {
        assert!(locked(&self.0.0).running.is_none(), "started twice");
        let offered = self.features() | 1 << 28 | 1 << 29 | 1 << 32;
        assert!(wiring.features & !offered == 0 && wiring.features >> 32 == 1);
        for QueueWiring { index, mut queue, .. } in wiring.queues {
            let size = queue.size();
            assert!(size.is_power_of_two() && size <= SIZES[usize::from(index)]);
            // Nothing is there, or the rings hold whatever they hold; both are the queue's to bear.
            let _ = queue.pop();
        }
        let paused = wiring.begin != Begin::Serving;
        let running = Running { signals: wiring.signals, paused, ends: false };
        locked(&self.0.0).running = Some(running);
        Ok(Box::new(AtWork(self.0.clone())))
    }
}

struct AtWork(Shared);

impl AtWork {
    fn change(&self, change: impl FnOnce(&mut Running)) {
        change(locked(&self.0.0).running.as_mut().expect("it runs"));
    }
}

impl Active for AtWork {
    fn pause_within(&mut self, _patience: Duration) -> Result<(), NotDrained> {
        self.change(|running| running.paused = true);
        Ok(())
    }
    fn stand(&self) -> Option<Stand> {
        self.change(|running| assert!(running.paused, "asked at work"));
        Some(Stand::default())
    }
    fn resume(&mut self) {
        self.change(|running| running.paused = false);
    }
    fn ask_to_stop(&mut self) {
        self.change(|running| running.ends = true);
    }
    fn has_stopped(&mut self, _patience: Duration) -> bool {
        true
    }
    fn stop(self: Box<Self>) {}
}

impl Drop for AtWork {
    fn drop(&mut self) {
        let running = locked(&self.0.0).running.take();
        let ends = running.is_some_and(|running| running.ends);
        assert!(ends || std::thread::panicking(), "dropped at work");
    }
}

/// The machine's side of the bus.
struct Rig {
    around: Shared,
    root: Root,
    ecam: Arc<dyn Region>,
    ports: Arc<dyn Region>,
    window: Arc<dyn Region>,
    held: bool,
}

/// What the guest can see of the common configuration.
#[derive(Debug, PartialEq)]
struct Seen {
    status: u64,
    features: [u64; 2],
    /// Size, enabled, and the three addresses of each queue.
    queues: Vec<[u64; 5]>,
}

impl Rig {
    fn new() -> Rig {
        let around = Shared::of("probe");
        let shared = || Arc::new(around.clone());
        let memory = memory::new(MEMORY_BYTES).unwrap();
        let device = Box::new(Probe(around.clone()));
        let function =
            VirtioPci::new(device, memory, shared(), shared(), shared(), Arc::new(|_| {})).unwrap();
        let root = Root::new();
        root.attach(SLOT, Arc::new(function), BAR).unwrap();
        let (ecam, ports, window) = (root.ecam(), root.ports(), root.window());
        Rig { around, root, ecam, ports, window, held: false }
    }

    fn config(&self, register: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.ecam.read(u64::from(SLOT) << 15 | register, &mut data[..width]);
        little_endian(&data)
    }

    /// Where the BAR answers, in the window.
    fn bar(&self) -> Option<u64> {
        let enabled = self.config(4, 2) & 2 != 0;
        let base = (self.config(0x10, 4) | self.config(0x14, 4) << 32) & !0xF;
        let window = PCI_MMIO_START..=PCI_MMIO_START + PCI_MMIO_BYTES - PCI_BAR_BYTES;
        (enabled && window.contains(&base)).then(|| base - PCI_MMIO_START)
    }

    fn read(&self, bar: u64, offset: u64, width: usize) -> u64 {
        let mut data = [0xFF; 8];
        self.window.read(bar + offset, &mut data[..width]);
        data[width..].fill(0);
        little_endian(&data)
    }

    fn write(&self, bar: u64, offset: u64, value: u64, width: usize) {
        self.window.write(bar + offset, &value.to_le_bytes()[..width]);
    }

    /// Looks at everything through the registers, and leaves the selectors as they were.
    fn seen(&self) -> Option<Seen> {
        let bar = self.bar()?;
        let (driver_select, queue_select) = (self.read(bar, 8, 4), self.read(bar, 22, 2));
        let features = [0, 1].map(|half| {
            self.write(bar, 8, half, 4);
            self.read(bar, 12, 4)
        });
        let queue = |index: u64| {
            self.write(bar, 22, index, 2);
            [(24, 2), (28, 2), (32, 8), (40, 8), (48, 8)].map(|(at, width)| self.read(bar, at, width))
        };
        let queues = (0..SIZES.len() as u64).map(queue).collect();
        self.write(bar, 8, driver_select, 4);
        self.write(bar, 22, queue_select, 2);
        Some(Seen { status: self.read(bar, 20, 1), features, queues })
    }

    /// What a driver does, up to `steps` of it.
    fn drive(&self, steps: usize, ring: u64) {
        let Some(bar) = self.bar() else { return };
        let high = |index: u64| 0x1000 + (ring + index) * 0x1000;
        let order = [
            (20, 0, 1),
            (20, 3, 1),
            (8, 1, 4),
            (12, 1, 4),
            (20, 11, 1),
            (22, ring % 3, 2),
            (24, 8, 2),
            (32, high(0), 8),
            (40, high(1), 8),
            (48, high(2), 8),
            (26, 1, 2),
            (28, 1, 2),
            (20, 15, 1),
        ];
        for (offset, value, width) in order.into_iter().take(steps) {
            self.write(bar, offset, value, width);
        }
    }
}

/// Accesses the function in any way.
pub fn pci(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut rig = Rig::new();
    let first = image(&rig);
    let changes = writable(&first);
    let mut before = rig.seen();
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        let one_access = step(&mut rig, &mut input);
        let after = rig.seen();
        if let (true, Some(before), Some(after)) = (one_access, &before, &after) {
            judge_latches(before, after);
        }
        judge_running(&rig);
        let now = image(&rig);
        let at = (0..256).find(|at| first[*at] != now[*at] && !changes.contains(at));
        assert!(at.is_none(), "the guest changed byte {at:?} of configuration space");
        before = after;
    }
    rig.root.stop();
    assert!(locked(&rig.around.0).doorbells.is_empty() && locked(&rig.around.0).running.is_none());
}

/// Does one thing. False when the guest made several accesses, between which it may have reset the device.
fn step(rig: &mut Rig, input: &mut Unstructured<'_>) -> bool {
    let verb = byte(input);
    let width = [1, 2, 4, 8, 3, 16][usize::from(byte(input) % 6)];
    let mut data = [0; 16];
    let fill =
        |input: &mut Unstructured<'_>, data: &mut [u8]| data.iter_mut().for_each(|to| *to = byte(input));
    match verb % 12 {
        0 | 1 => {
            let slot = if verb & 0x80 == 0 { SLOT } else { verb >> 4 & 3 };
            let at =
                u64::from(slot) << 15 | u64::from(word(input)) & if verb & 0x40 == 0 { 0xFF } else { 0x7FFF };
            match verb % 12 {
                0 => rig.ecam.read(at, &mut data[..width]),
                _ => {
                    fill(input, &mut data[..width]);
                    rig.ecam.write(at, &data[..width]);
                }
            }
        }
        2 => {
            // The address port, at a register of the function.
            let address = 0x8000_0000 | u32::from(SLOT) << 11 | u32::from(byte(input));
            rig.ports.write(0, &address.to_le_bytes());
        }
        3 => {
            fill(input, &mut data[..width]);
            rig.ports.write(u64::from(verb >> 4 & 7), &data[..width]);
        }
        4 => rig.ports.read(u64::from(verb >> 4 & 7), &mut data[..width]),
        5 | 6 => {
            let at = rig.bar().unwrap_or(0).wrapping_add(u64::from(word(input)));
            fill(input, &mut data[..width]);
            match verb % 12 {
                5 => rig.window.write(at, &data[..width]),
                _ => rig.window.read(at, &mut data[..width]),
            }
        }
        7 | 8 => {
            // The common configuration, where it matters most.
            let (at, bar) = (u64::from(byte(input) % 64), rig.bar());
            fill(input, &mut data[..width]);
            if let Some(bar) = bar {
                rig.window.write(bar + at, &data[..width]);
            }
        }
        9 => {
            let signals = locked(&rig.around.0).running.as_ref().map(|running| Arc::clone(&running.signals));
            match (signals, byte(input) % 8) {
                (Some(signals), 0) => signals.broken("the device says so".to_owned()),
                (Some(signals), 1) => signals.config_changed(),
                (Some(signals), index) => signals.queue_used(u16::from(index) - 2),
                (None, _) => {}
            }
        }
        10 => {
            if verb & 0x80 == 0 {
                rig.root.pause().unwrap();
            } else {
                rig.root.resume();
            }
            rig.held = verb & 0x80 == 0;
        }
        _ => {
            rig.drive(usize::from(byte(input) % 14), u64::from(byte(input)));
            return false;
        }
    }
    true
}

/// A queue that is enabled keeps its registers, features that were agreed on stay, and after DRIVER_OK nothing of a
/// queue changes; until a reset, which is seen by its status.
fn judge_latches(before: &Seen, after: &Seen) {
    if after.status == 0 {
        return;
    }
    assert_eq!(after.status & before.status, before.status, "a bit of the status went without a reset");
    if before.status & FEATURES_OK != 0 {
        assert_eq!(before.features, after.features, "features changed after they were agreed on");
    }
    for (was, is) in before.queues.iter().zip(&after.queues) {
        if before.status & DRIVER_OK != 0 || was[1] == 1 {
            assert_eq!(was, is, "a queue changed after it was latched");
        }
        assert!(is[0].is_power_of_two(), "a queue of {}", is[0]);
    }
}

fn judge_running(rig: &Rig) {
    let master = rig.config(4, 2) & 4 != 0;
    let around = locked(&rig.around.0);
    match &around.running {
        Some(running) => {
            assert!(running.paused || master, "the device runs though it may not reach memory");
            assert!(running.paused || !rig.held, "the device runs in a machine that is paused");
        }
        None => assert!(around.doorbells.is_empty(), "doorbells of a device that does not run"),
    }
}

/// Conventional configuration space as the guest reads it.
fn image(rig: &Rig) -> Vec<u8> {
    (0..64).flat_map(|at| (rig.config(at * 4, 4) as u32).to_le_bytes()).collect()
}

/// Bytes that the guest may change: command, BAR, MSI-X control, and the window through configuration space. Also the
/// status, whose bit for interrupts comes and goes.
fn writable(image: &[u8]) -> BTreeSet<usize> {
    let mut bytes: BTreeSet<usize> = (4..7).chain(0x10..0x18).collect();
    let mut at = usize::from(image[0x34]);
    while at != 0 {
        match image[at] {
            0x11 => bytes.extend(at + 2..at + 4),
            0x09 if image[at + 3] == 5 => bytes.extend((at + 4..at + 5).chain(at + 8..at + 20)),
            _ => {}
        }
        at = usize::from(image[at + 1]);
    }
    bytes
}
