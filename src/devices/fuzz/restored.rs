//! Functions and the serial port from what anybody may have saved: a state that was right but for a few fields. What is taken is what
//! is saved again and keeps the bounds that a driver has to keep; what it serves then may hold anything.
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Unstructured;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::driver::{AVAIL, Guest, RING_BYTES, Step, USED, byte, word};
use super::pci::Shared;
use super::serial::{Pulses, Sink};
use crate::bus::Region;
use crate::limiter::{LevelState, LimiterState, RateLimits, TokenBucket};
use crate::pci::Function;
use crate::serial::{Serial, SerialState};
use crate::state::Refused;
use crate::virtio::balloon::{Balloon, BalloonOptions};
use crate::virtio::block::{Access, Block, BlockOptions, CacheMode, Disk};
use crate::virtio::net::{Link, Net, NetOptions};
use crate::virtio::rng::Rng;
use crate::virtio::transport::pci::{FunctionState, VirtioPci};
use crate::virtio::worker::by_hand::ByHand;
use crate::virtio::{Position, Stand, VirtioDevice};

const CHANGES_MAX: u8 = 8;
const DISK_BYTES: u64 = 32 << 10;
const FIFO_BYTES: usize = 64;
/// Where queues are kicked (`transport::pci::layout`).
const NOTIFY: u64 = 0x4000;
const NOTIFY_STRIDE: u64 = 4;
/// VERSION_1, EVENT_IDX and INDIRECT_DESC.
const OF_THE_TRANSPORT: u64 = 1 << 32 | 1 << 29 | 1 << 28;
const DRIVER_OK: u8 = 4;
const ALL_IS_WELL: u8 = 15;
const MEMORY_AND_MASTER: u8 = 6;

/// Restores what `data` says: a byte for which device, what was saved of it, and what the guest does then.
pub fn restored(data: &[u8]) {
    let mut input = Unstructured::new(data);
    match byte(&mut input) % 5 {
        4 => serial(&mut input),
        which => function(which, &mut input),
    }
}

/// A function, and what it is judged by.
struct Made {
    function: VirtioPci,
    features: u64,
    sizes: Vec<u16>,
    /// The wire of an interface.
    _far: Option<UnixDatagram>,
}

fn make(which: u8, guest: &Guest) -> Made {
    let few = TokenBucket { per_second: 1, burst: 4 };
    let limits = RateLimits { bandwidth: None, operations: Some(few) };
    let mut wire = None;
    let device: Box<dyn VirtioDevice> = match which {
        0 => Box::new(Rng::new(Arc::default())),
        1 => Box::new(Balloon::new(BalloonOptions { target_bytes: 0, stats: Arc::default() }).0),
        2 => {
            let file = sys::memfd::create("disk", DISK_BYTES).unwrap();
            let options = BlockOptions {
                name: "disk0".to_owned(),
                disk: Disk::plain(file, None, Access::ReadWrite).unwrap(),
                cache: CacheMode::Writeback,
                serial: "a serial".to_owned(),
                limits,
                stats: Arc::default(),
            };
            Box::new(Block::new(options).unwrap())
        }
        _ => {
            let (near, far) = UnixDatagram::pair().unwrap();
            wire = Some(far);
            let options = NetOptions {
                name: "nic0".to_owned(),
                link: Link::socket(OwnedFd::from(near).into()).unwrap(),
                mac: [2, 0, 0, 0, 0, 7],
                mtu: 1500,
                rx_limits: limits,
                tx_limits: limits,
                stats: Arc::default(),
            };
            Box::new(Net::new(options).unwrap())
        }
    };
    let (features, sizes) = (device.features() | OF_THE_TRANSPORT, device.queue_sizes().to_vec());
    let around = Shared::of(device.name());
    let shared = || Arc::new(around.clone());
    let memory = Arc::clone(&guest.memory);
    let function = VirtioPci::new(device, memory, shared(), shared(), shared(), Arc::new(|_| {})).unwrap();
    Made { function, features, sizes, _far: wire }
}

fn function(which: u8, input: &mut Unstructured<'_>) {
    let mut guest = Guest::new(input, 5);
    let fresh = make(which, &guest);
    fresh.function.pause(Duration::ZERO).unwrap();
    let mut state = fresh.function.save().unwrap();
    if byte(input) & 1 != 0 {
        serve(&mut state, &fresh);
    }
    for _ in 0..byte(input) % (CHANGES_MAX + 1) {
        change(&mut state, input);
    }
    let made = make(which, &guest);
    let (outcome, worker) = ByHand::catch_any(|| made.function.restore(&state));
    match outcome {
        Err(refused) => return judge_refusal(&refused),
        Ok(()) => judge(&state, &made, &guest),
    }
    made.function.resume();
    let Some(mut worker) = worker else { return };
    worker.turn();
    while let Some(step) = guest.next(input) {
        match step {
            Step::Kick(queue) => {
                made.function.write_memory(NOTIFY + u64::from(queue) * NOTIFY_STRIDE, &[0, 0]);
                worker.turn();
            }
            // Nothing is reset: that would wait for a thread.
            Step::Pause | Step::Resume => worker.turn(),
            Step::Own(at) => made.function.read_memory(u64::from(at) << 6, &mut [0; 64]),
        }
    }
}

/// As a driver leaves a function that it uses.
fn serve(state: &mut FunctionState, made: &Made) {
    state.config.resize(state.config.len().max(5), 0);
    state.config[4] |= MEMORY_AND_MASTER;
    state.common.features = made.features;
    state.common.status = ALL_IS_WELL;
    for (at, queue) in (1..).zip(&mut state.common.queues) {
        (queue.size, queue.enabled) = (16, true);
        queue.addresses = [RING_BYTES * at, RING_BYTES * at + AVAIL, RING_BYTES * at + USED];
    }
    let queues = (0..made.sizes.len() as u16).map(|index| (index, Position::default())).collect();
    state.stand = Some(Stand { queues, limits: Vec::new() });
}

/// Any number, and those more often at which something ends.
fn wide(input: &mut Unstructured<'_>) -> u64 {
    match byte(input) {
        small @ 0..0x80 => small.into(),
        shift @ 0x80..0xC0 => 1 << (shift - 0x80),
        shift @ 0xC0..0xE0 => {
            (1_u64 << (2 * (shift - 0xC0))).wrapping_add(byte(input).into()).wrapping_sub(128)
        }
        _ => input.arbitrary().unwrap_or_default(),
    }
}

fn one_of<'a, T>(several: &'a mut [T], input: &mut Unstructured<'_>) -> Option<&'a mut T> {
    let at = usize::from(byte(input)) % several.len().max(1);
    several.get_mut(at)
}

/// Has one field say something else.
fn change(state: &mut FunctionState, input: &mut Unstructured<'_>) {
    let (which, value) = (byte(input) % 24, wide(input));
    let FunctionState { config, msix, common, signals, stand, own, .. } = state;
    match which {
        0 => {
            let at = usize::from(byte(input));
            config.resize(config.len().max(at + 1), 0);
            config[at] = value as u8;
        }
        1 => config.resize(value as usize % 8192, 0xFF),
        2 => {
            let at = usize::from(byte(input) % 16);
            if let Some(entry) = one_of(&mut msix.entries, input) {
                entry[at] = value as u8;
            }
        }
        3 => msix.entries.truncate(value as usize % 8),
        4 => msix.pending.push(value as u16),
        5 => common.features ^= 1 << (value % 64),
        6 => common.unknown_features ^= true,
        7 => (common.device_select, common.driver_select) = (value as u32, value as u32),
        8 => common.status = value as u8,
        9 => common.queue_select = value as u16,
        10..15 => {
            let place = usize::from(byte(input) % 3);
            let Some(queue) = one_of(&mut common.queues, input) else { return };
            match which {
                10 | 11 => queue.size = value as u16,
                12 => queue.enabled ^= true,
                _ => queue.addresses[place] = value,
            }
        }
        15 => drop(common.queues.pop()),
        16 => {
            (signals.config_vector, signals.isr, signals.broken) = (value as u16, byte(input), value & 1 != 0)
        }
        17 => {
            if let Some(vector) = one_of(&mut signals.queue_vectors, input) {
                *vector = value as u16;
            }
        }
        18 => *stand = stand.is_none().then(Stand::default),
        19..23 => {
            let Some(stand) = stand else { return };
            match which {
                19 => stand.queues.push((value as u16, Position::default())),
                20 => drop(stand.queues.pop()),
                21 => {
                    if let Some((_, position)) = one_of(&mut stand.queues, input) {
                        (position.next, position.signalled) = (value as u16, word(input));
                    }
                }
                _ => {
                    let level = Some(LevelState { tokens: value as i64, nano_tokens: word(input).into() });
                    stand.limits.push(LimiterState { bandwidth: level, operations: level });
                }
            }
        }
        _ => own.change(byte(input).into(), value),
    }
}

fn judge_refusal(refused: &Refused) {
    let told = refused.to_string();
    assert!(!refused.detail.is_empty() && told.len() < 1024, "told in {} bytes", told.len());
}

/// What was taken is what is saved again, and a driver could have done it.
fn judge(state: &FunctionState, made: &Made, guest: &Guest) {
    let again = made.function.save().expect("it is paused");
    let end = state.config.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    assert_eq!(again.config, state.config[..end]);
    assert_eq!(again.msix.entries, state.msix.entries);
    assert_eq!((&again.common, &again.own), (&state.common, &state.own));
    assert_eq!(again.stand.map(|stand| stand.queues), state.stand.clone().map(|stand| stand.queues));
    let common = &again.common;
    for (queue, size_max) in common.queues.iter().zip(&made.sizes) {
        assert!(queue.size.is_power_of_two() && queue.size <= *size_max, "a queue of {}", queue.size);
    }
    if common.status & DRIVER_OK == 0 || again.signals.broken {
        return;
    }
    let offered = common.features & !made.features == 0 && common.features >> 32 & 1 == 1;
    assert!(offered && !common.unknown_features, "features {:#x} were agreed on", common.features);
    for queue in common.queues.iter().filter(|queue| queue.enabled) {
        let size = u64::from(queue.size);
        for (start, bytes) in queue.addresses.into_iter().zip([16 * size, 6 + 2 * size, 6 + 8 * size]) {
            let last = GuestAddress(start.saturating_add(bytes - 1));
            let lies =
                guest.memory.address_in_range(GuestAddress(start)) && guest.memory.address_in_range(last);
            assert!(lies, "a part of a ring at {start:#x}");
        }
    }
}

/// Any registers, and as much input as the input says.
fn serial(input: &mut Unstructured<'_>) {
    let serial = Serial::new(Arc::new(Pulses::default()), Box::new(Sink::default()));
    let state = SerialState {
        divisor: [byte(input), byte(input)],
        interrupt_enable: byte(input),
        interrupt_identification: byte(input),
        line_control: byte(input),
        line_status: byte(input),
        modem_control: byte(input),
        modem_status: byte(input),
        scratch: byte(input),
        received: vec![byte(input); usize::from(byte(input))],
    };
    match serial.restore(&state) {
        Err(refused) => return judge_refusal(&refused),
        Ok(()) => assert_eq!(serial.save(), state),
    }
    assert!(state.received.len() <= FIFO_BYTES, "{} bytes were taken", state.received.len());
    while !input.is_empty() {
        let (register, value) = (byte(input), byte(input));
        match register & 8 {
            0 => serial.write(u64::from(register & 7), &[value]),
            _ => serial.read(u64::from(register & 7), &mut [value]),
        }
    }
    assert!(serial.save().received.len() <= FIFO_BYTES);
}
