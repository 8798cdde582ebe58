//! `balloon`, `report`: gives memory back to the host, through the balloon and by reporting it
//! free, and takes it back (virtio 1.2 section 5.5).

use crate::clock::Deadline;
use crate::console::Line;
use crate::cpu::mmio::{write32, write64};
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{self, Device};
use crate::words::note;
use crate::{Machine, check, memory, say};

const FEATURE_STATISTICS: u64 = 1 << 1;
const FEATURE_REPORTING: u64 = 1 << 5;
const TARGET: u64 = 0;
const ACTUAL: u64 = 4;
const TIMEOUT_MS: u64 = 20_000;
/// Page numbers in one request.
const BATCH: u64 = 256;
const REPORTED_PIECE_BYTES: u64 = 4 << 20;
const PIECES_MAX: usize = 16;

struct Balloon {
    device: Device,
    inflate: Queue,
    deflate: Queue,
    numbers: u64,
    actual: u64,
}

impl Balloon {
    fn open() -> Outcome<(Self, Option<Queue>)> {
        let mut device = Device::require(virtio::BALLOON, 0)?;
        device.negotiate(FEATURE_STATISTICS | FEATURE_REPORTING)?;
        let inflate = device.queue(0, 128)?;
        let deflate = device.queue(1, 128)?;
        // Queues that were not negotiated do not count, so reporting's number depends on statistics.
        let mut next = 2;
        let mut statistics = None;
        if device.has(FEATURE_STATISTICS) {
            statistics = Some(device.queue(next, 128)?);
            next += 1;
        }
        let reporting = if device.has(FEATURE_REPORTING) { Some(device.queue(next, 128)?) } else { None };
        device.ready()?;
        if let Some(mut queue) = statistics {
            // The device keeps this buffer until it wants statistics.
            let tags = memory::allocate(1).ok_or_else(out_of_memory)?;
            crate::cpu::mmio::write16(tags, 4);
            write64(tags + 2, 0);
            queue.add(&[Segment::Read { address: tags, bytes: 10 }]);
            queue.kick();
        }
        let numbers = memory::allocate(1).ok_or_else(out_of_memory)?;
        Ok((Self { device, inflate, deflate, numbers, actual: 0 }, reporting))
    }

    fn target(&self) -> u64 {
        self.device.config32(TARGET).into()
    }

    /// Moves towards `target` pages: the balloon holds the last pages of free RAM.
    fn follow(&mut self, machine: &Machine, target: u64) -> Outcome {
        let pages = machine.free.pages();
        let target = target.min(pages);
        while self.actual != target {
            let is_inflating = self.actual < target;
            let (first, count) = if is_inflating {
                (self.actual, (target - self.actual).min(BATCH))
            } else {
                let count = (self.actual - target).min(BATCH);
                (self.actual - count, count)
            };
            for index in 0..count {
                let page = machine.free.page(pages - 1 - (first + index)).unwrap_or(0);
                write32(self.numbers + index * 4, (page / memory::PAGE_BYTES) as u32);
            }
            let segment = [Segment::Read { address: self.numbers, bytes: count as u32 * 4 }];
            let queue = if is_inflating { &mut self.inflate } else { &mut self.deflate };
            queue.request(&segment, TIMEOUT_MS)?;
            self.actual = if is_inflating { first + count } else { first };
            self.device.write_config32(ACTUAL, self.actual as u32);
        }
        Ok(())
    }
}

/// `balloon[=<ms>]`: goes to the host's target and, for `ms`, keeps following it. Deflates at the
/// end and checks that the returned memory works.
pub fn run(machine: &Machine, ms: Option<u64>, report: &mut Line) -> Outcome {
    let (mut balloon, _) = Balloon::open()?;
    let deadline = Deadline::in_ms(ms.unwrap_or(0));
    let mut most = 0;
    loop {
        let target = balloon.target();
        if balloon.actual != target.min(machine.free.pages()) {
            balloon.follow(machine, target)?;
            say!("probe: balloon at pages={} target={target}", balloon.actual);
        }
        most = most.max(balloon.actual);
        if deadline.passed() {
            break;
        }
        crate::clock::pause_ms(1);
    }
    let held = balloon.actual;
    balloon.follow(machine, 0)?;
    let pages = machine.free.pages();
    for index in 0..most {
        let page = machine.free.page(pages - 1 - index).unwrap_or(0);
        memory::fill(page, memory::PAGE_BYTES, 1, page);
        let difference = memory::first_difference(page, memory::PAGE_BYTES, 1, page);
        check!(difference.is_none(), "page {page:#x} does not work after deflating");
    }
    note(report, format_args!("pages={held} most={most} features={:#x}", balloon.device.features));
    balloon.device.reset()
}

/// `report=<mib>`: dirties memory, reports it free, then uses it again.
pub fn report_free(machine: &Machine, mib: u64, report: &mut Line) -> Outcome {
    let (mut balloon, reporting) = Balloon::open()?;
    let Some(mut queue) = reporting else { crate::fail!("free page reporting not offered") };
    let Some(region) = machine.free.regions().iter().max_by_key(|region| region.end - region.start) else {
        crate::fail!("no free RAM")
    };
    let start = region.start.next_multiple_of(REPORTED_PIECE_BYTES);
    let end = region.end.min(start + (mib << 20));
    check!(start + REPORTED_PIECE_BYTES <= end, "not {mib} MiB free");
    memory::fill(start, end - start, 2, start);
    say!("probe: report dirtied bytes={}", end - start);
    let mut reported = 0;
    let mut pieces = [Segment::Write { address: 0, bytes: 0 }; PIECES_MAX];
    while start + reported + REPORTED_PIECE_BYTES <= end {
        let mut count = 0;
        while count < PIECES_MAX && start + reported + REPORTED_PIECE_BYTES <= end {
            let address = start + reported;
            pieces[count] = Segment::Write { address, bytes: REPORTED_PIECE_BYTES as u32 };
            reported += REPORTED_PIECE_BYTES;
            count += 1;
        }
        queue.request(&pieces[..count], TIMEOUT_MS)?;
    }
    say!("probe: report reported bytes={reported}");
    // The content of reported memory is undefined until it is written again.
    memory::fill(start, reported, 3, start);
    let difference = memory::first_difference(start, reported, 3, start);
    check!(difference.is_none(), "reported memory does not work again");
    note(report, format_args!("bytes={reported}"));
    balloon.actual = 0;
    balloon.device.reset()
}
