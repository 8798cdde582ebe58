//! `evil-race`: a second processor rewrites descriptors and headers while a device works on them. Whatever the device
//! reads, it answers or asks to be reset, and serves an honest driver afterwards.

use crate::console::Line;
use crate::cpu::mmio::{read16, write8, write16, write32, write64};
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{self, Device, STATUS_NEEDS_RESET};
use crate::words::siege::{Victim, honest, victims};
use crate::words::{cpus, note};
use crate::{Machine, check, clock, cpu, memory, say};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const ROUNDS: u32 = 10;
const REQUESTS: u32 = 100;
const ANSWER_MS: u64 = 5000;
const REST_MS: u64 = 2000;

/// The descriptor table that the other processor rewrites; 0 lets it rest.
static TABLE: AtomicU64 = AtomicU64::new(0);
/// Two pages that descriptors may point to; headers lie at the start of the first.
static PAGES: AtomicU64 = AtomicU64::new(0);
static RESTS: AtomicBool = AtomicBool::new(false);

/// Bytes of a longer buffer: three sectors. To the balloon any number of a descriptor may come to be that of a page
/// to take away, and the page of this number holds nothing of ours. Numbers from 0x200 to 0x2db are this program's own
/// pages, and one that gives those away is its own victim.
const LONG_BYTES: u64 = 3 * 512;

/// What the other processor does until the end.
pub fn vandal() -> ! {
    let mut random = cpu::tsc() | 1;
    loop {
        let table = TABLE.load(Ordering::SeqCst);
        if table == 0 {
            RESTS.store(true, Ordering::SeqCst);
            core::hint::spin_loop();
            continue;
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let pages = PAGES.load(Ordering::SeqCst);
        let pick = |choices: [u64; 6]| choices[(random >> 40) as usize % choices.len()];
        let descriptor = table + (random >> 8) % 16 * 16;
        match random % 6 {
            0 => write64(descriptor, pick([pages, pages + 4096, 0, 1 << 40, u64::MAX - 7, table])),
            1 => write32(descriptor + 8, pick([0, 1, 16, LONG_BYTES, 4096, 0xffff_ffff]) as u32),
            2 => write16(descriptor + 12, pick([0, 1, 2, 3, 4, 7]) as u16),
            3 => write16(descriptor + 14, pick([0, 1, 2, 3, 15, 0xffff]) as u16),
            4 => write32(pages, pick([0, 1, 4, 8, 11, 13]) as u32),
            _ => write64(pages + 8, pick([0, 1, 7, 1 << 40, u64::MAX, 0x1234_5678])),
        }
    }
}

fn rest() -> Outcome {
    RESTS.store(false, Ordering::SeqCst);
    TABLE.store(0, Ordering::SeqCst);
    check!(clock::spin_until(REST_MS, || RESTS.load(Ordering::SeqCst)), "the other processor does not rest");
    Ok(())
}

pub fn run(machine: &Machine, report: &mut Line) -> Outcome {
    check!(cpus::start(machine, cpus::Job::Vandal)? > 1, "one processor is not enough");
    let (mut devices, mut requests, mut resets) = (0, 0, 0);
    for victim in victims() {
        let Some(probe) = Device::find(victim.kind, 0)? else { continue };
        probe.reset()?;
        devices += 1;
        for _ in 0..ROUNDS {
            memory::release_all();
            let (device, mut queue) = victim.open()?;
            let pages = memory::allocate(2).ok_or_else(out_of_memory)?;
            PAGES.store(pages, Ordering::SeqCst);
            TABLE.store(queue.descriptors, Ordering::SeqCst);
            let is_broken = storm(&device, &mut queue, victim, pages, &mut requests);
            rest()?;
            resets += u32::from(is_broken?);
            device.reset()?;
        }
        honest(victim)?;
        say!("probe: evil-race {} requests={requests} needs_reset={resets}", victim.name);
    }
    note(report, format_args!("devices={devices} requests={requests} needs_reset={resets}"));
    Ok(())
}

/// Makes requests until the device asks to be reset; whether it did.
fn storm(
    device: &Device,
    queue: &mut Queue,
    victim: &Victim,
    pages: u64,
    requests: &mut u32,
) -> Outcome<bool> {
    for _ in 0..REQUESTS {
        let before = read16(queue.used + 2);
        write8(pages, 0);
        let read = Segment::Read { address: pages, bytes: 16 };
        let chain = [read, Segment::Write { address: pages + 512, bytes: LONG_BYTES as u32 + 1 }];
        // The heads are counted here: what comes back may have been rewritten.
        let head = (*requests % u32::from(queue.size / 2) * 2) as u16;
        queue.place(head, if victim.kind == virtio::RNG { &chain[1..] } else { &chain });
        queue.offer(head);
        queue.ring();
        let answered = clock::spin_until(ANSWER_MS, || {
            read16(queue.used + 2) != before || device.status() & STATUS_NEEDS_RESET != 0
        });
        check!(answered, "{} neither answers nor complains", victim.name);
        *requests += 1;
        if device.status() & STATUS_NEEDS_RESET != 0 {
            return Ok(true);
        }
    }
    Ok(false)
}
