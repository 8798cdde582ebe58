//! `evil-rng`, `evil-balloon`, `evil-serial`, `evil-registers`: the attacks of `evil` on the other devices, and what is
//! special to each. After each the device must serve an honest driver.

use crate::console::Line;
use crate::cpu::mmio::{read8, read16, read32, write8, write16, write32, write64};
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{self, Device, common};
use crate::words::evil::{ATTACKS, NO_RAM, Score};
use crate::words::note;
use crate::{check, memory, pci};

/// How long an honest request may take.
const HONEST_MS: u64 = 5000;

/// A device with a queue to attack.
pub struct Victim {
    pub name: &'static str,
    pub kind: u16,
    queue: u16,
}

/// One queue of each kind of device.
pub fn victims() -> &'static [Victim] {
    &[
        Victim { name: "disk", kind: virtio::BLOCK, queue: 0 },
        Victim { name: "net-transmit", kind: virtio::NET, queue: 1 },
        Victim { name: "rng", kind: virtio::RNG, queue: 0 },
        Victim { name: "balloon-inflate", kind: virtio::BALLOON, queue: 0 },
    ]
}

const QUEUES_OF_RNG: &[Victim] = &[Victim { name: "rng", kind: virtio::RNG, queue: 0 }];
const QUEUES_OF_BALLOON: &[Victim] = &[
    Victim { name: "inflate", kind: virtio::BALLOON, queue: 0 },
    Victim { name: "deflate", kind: virtio::BALLOON, queue: 1 },
    Victim { name: "report", kind: virtio::BALLOON, queue: 2 },
];
const BALLOON_REPORTING: u64 = 1 << 5;

impl Victim {
    /// The device with all of its queues enabled, ready, and the one to attack.
    pub fn open(&self) -> Outcome<(Device, Queue)> {
        let mut device = Device::require(self.kind, 0)?;
        device.negotiate(if self.kind == virtio::BALLOON { BALLOON_REPORTING } else { 0 })?;
        let count = match self.kind {
            virtio::NET => 2,
            virtio::BALLOON => 3,
            _ => 1,
        };
        let mut attacked = None;
        for index in 0..count {
            let queue = device.queue(index, 64)?;
            if index == self.queue {
                attacked = Some(queue);
            }
        }
        device.ready()?;
        match attacked {
            Some(queue) => Ok((device, queue)),
            None => crate::fail!("{} has no queue {}", self.name, self.queue),
        }
    }
}

/// An honest driver is served by the device that was attacked.
pub fn honest(victim: &Victim) -> Outcome {
    memory::release_all();
    let (device, mut queue) = victim.open()?;
    let page = memory::allocate(1).ok_or_else(out_of_memory)?;
    let read = |bytes| Segment::Read { address: page, bytes };
    let write = |bytes| Segment::Write { address: page + 1024, bytes };
    let written = match victim.kind {
        // Reads a sector: the header is zeroes.
        virtio::BLOCK => queue.request(&[read(16), write(513)], HONEST_MS)? == 513,
        virtio::NET => queue.request(&[read(12 + 60)], HONEST_MS)? == 0,
        virtio::RNG => queue.request(&[write(64)], HONEST_MS)? == 64,
        // No pages at all.
        _ => queue.request(&[read(0)], HONEST_MS)? == 0,
    };
    check!(written, "{} does not serve an honest driver", victim.name);
    device.reset()
}

/// Every attack on every queue of a device.
fn queues(victims: &[Victim], report: &mut Line) -> Outcome {
    let mut score = Score { attacks: 0, needs_reset: 0 };
    for victim in victims {
        for attack in ATTACKS {
            memory::release_all();
            let (device, mut queue) = victim.open()?;
            score.strike(&device, &mut queue, attack)?;
            honest(victim)?;
        }
    }
    note(report, format_args!("attacks={} needs_reset={}", score.attacks, score.needs_reset));
    Ok(())
}

/// `evil-rng`: the attacks, and demands for more than there is memory.
pub fn entropy(report: &mut Line) -> Outcome {
    queues(QUEUES_OF_RNG, report)?;
    memory::release_all();
    let (device, mut queue) = QUEUES_OF_RNG[0].open()?;
    let page = memory::allocate(1).ok_or_else(out_of_memory)?;
    // All of them the same page: what counts is how much the device may be made to hold.
    let demand = [Segment::Write { address: page, bytes: 4096 }; 60];
    for _ in 0..50 {
        let written = queue.request(&demand, HONEST_MS)?;
        check!(written > 0 && written <= 60 * 4096, "{written} bytes for {} asked for", 60 * 4096);
    }
    device.reset()
}

/// `evil-balloon`: the attacks, and page numbers and ranges that are not the guest's.
pub fn balloon(report: &mut Line) -> Outcome {
    queues(QUEUES_OF_BALLOON, report)?;
    let mut requests = 0;
    for victim in QUEUES_OF_BALLOON {
        memory::release_all();
        let (device, mut queue) = victim.open()?;
        let page = memory::allocate(1).ok_or_else(out_of_memory)?;
        for position in 0..1024 {
            // Beyond memory, each in its own way.
            let number = [0xffff_ffff, 0x8000_0000 + position, 0xfee0_0, 0x7fff_ffff][position as usize % 4];
            write32(page + u64::from(position) * 4, number);
        }
        let chains: &[&[Segment]] = &[
            &[Segment::Read { address: page, bytes: 4096 }],
            &[Segment::Read { address: page, bytes: 4095 }],
            &[Segment::Read { address: NO_RAM, bytes: 4096 }],
            &[Segment::Read { address: page, bytes: 0xffff_fffc }],
            &[Segment::Write { address: NO_RAM, bytes: 0x4000_0000 }],
            &[Segment::Write { address: u64::MAX - 0xfff, bytes: 0x1000 }],
            &[Segment::Write { address: 0xfee0_0000, bytes: 0x1000 }],
            &[Segment::Write { address: 0xffff_f000, bytes: 0xffff_f000 }],
        ];
        for chain in chains {
            check!(queue.request(chain, HONEST_MS)? == 0, "{} says it wrote", victim.name);
            requests += 1;
        }
        device.reset()?;
        honest(victim)?;
    }
    note(report, format_args!("requests={requests}"));
    Ok(())
}

/// `evil-serial[=<kib>]`: registers of the serial port in any order and of any width, then more output than anybody
/// reads.
pub fn serial(kib: u64, report: &mut Line) -> Outcome {
    const PORT: u16 = 0x3f8;
    const ACCESSES: u32 = 1000;
    let mut random = crate::cpu::tsc() | 1;
    for _ in 0..ACCESSES {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let (port, value) = (PORT + (random >> 8) as u16 % 8, (random >> 16) as u32);
        match random % 5 {
            0 => crate::cpu::out8(port, value as u8),
            1 => crate::cpu::out16(port, value as u16),
            2 => crate::cpu::out32(port, value),
            3 => drop(crate::cpu::in8(port)),
            _ => drop(crate::cpu::in32(port)),
        }
    }
    // Back to what a driver expects: no divisor, no loop, no interrupts.
    for (register, value) in [(3, 3), (4, 0), (1, 0)] {
        crate::cpu::out8(PORT + register, value);
    }
    crate::console::set_up();
    let text = [b'#'; 1024];
    for _ in 0..kib {
        crate::cpu::out_string(PORT, &text);
    }
    crate::cpu::out_string(PORT, b"\r\n");
    note(report, format_args!("accesses={ACCESSES} kib={kib}"));
    Ok(())
}

/// `evil-registers`: any access of any width anywhere in the registers of every virtio function.
pub fn registers(report: &mut Line) -> Outcome {
    const ACCESSES: u32 = 2000;
    const AREA_BYTES: u64 = 0x1_0000;
    let mut functions = 0;
    let mut random = crate::cpu::tsc() | 1;
    pci::scan(|function, identity| {
        let Some(base) = function.bar(0).filter(|_| identity & 0xffff == 0x1af4) else { return false };
        functions += 1;
        function.enable();
        for _ in 0..ACCESSES {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // Most of them where most is to be spoiled.
            let within = if random & 1 == 0 { 64 } else { AREA_BYTES - 8 };
            let (at, value) = (base + (random >> 8) % within, random >> 3);
            match random >> 1 & 7 {
                0 => write8(at, value as u8),
                1 => write16(at, value as u16),
                2 => write32(at, value as u32),
                3 => write64(at, value),
                4 => drop(read8(at)),
                5 => drop(read16(at)),
                6 => drop(read32(at)),
                // A status as a driver might write it.
                _ => write8(base + common::STATUS, value as u8 & 15),
            }
        }
        write8(base + common::STATUS, 0);
        false
    });
    for victim in victims() {
        if Device::find(victim.kind, 0)?.is_some() {
            honest(victim)?;
        }
    }
    note(report, format_args!("functions={functions} accesses={}", functions * ACCESSES));
    Ok(())
}
