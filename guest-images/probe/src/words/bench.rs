//! `blkbench=<depth>,<bytes>,<ms>[,write]`: random requests at a fixed depth; completions polled.
//! `blkappend=<bytes>,<ms>,<writes>`: sequential writes, a flush after each so many. Writing overwrites the disk.

use crate::clock::Deadline;
use crate::console::Line;
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::disk::{self, Disk, SECTOR_BYTES};
use crate::virtio::queue::Segment;
use crate::words::{note, number};
use crate::{check, clock, cpu, memory};

const DEPTH_MAX: u64 = 64;
const STALL_MS: u64 = 10_000;
const BUFFERS_BYTES_MAX: u64 = 4 << 20;

pub fn run(disk: usize, argument: &str, report: &mut Line) -> Outcome {
    let mut parts = argument.split(',');
    let mut next = |default| parts.next().and_then(number).unwrap_or(default);
    let (depth, bytes, ms) = (next(1), next(4096), next(1000));
    let is_write = argument.ends_with(",write");
    check!((1..=DEPTH_MAX).contains(&depth), "depth is 1 to {DEPTH_MAX}");
    check!(bytes > 0 && bytes % SECTOR_BYTES == 0, "bytes is a multiple of {SECTOR_BYTES}");
    check!(depth * bytes <= BUFFERS_BYTES_MAX, "depth times bytes is at most {BUFFERS_BYTES_MAX}");
    let mut disk = Disk::require(disk)?;
    let places = disk.sectors / (bytes / SECTOR_BYTES);
    check!(places > 0, "the disk is smaller than one request");
    let buffers = memory::allocate((depth * bytes).div_ceil(memory::PAGE_BYTES)).ok_or_else(out_of_memory)?;
    let mut slot_of_head = [0u16; 256];
    let mut random = cpu::tsc() | 1;
    let mut submit = |disk: &mut Disk, slot: u16, slots: &mut [u16; 256]| -> Outcome {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let sector = (random >> 16) % places * (bytes / SECTOR_BYTES);
        disk.write_header(slot, if is_write { disk::OUT } else { disk::IN }, sector);
        let (header, status) = disk.header(slot);
        let address = buffers + u64::from(slot) * bytes;
        let data = if is_write {
            Segment::Read { address, bytes: bytes as u32 }
        } else {
            Segment::Write { address, bytes: bytes as u32 }
        };
        let ends =
            (Segment::Read { address: header, bytes: 16 }, Segment::Write { address: status, bytes: 1 });
        let Some(head) = disk.queue.add(&[ends.0, data, ends.1]) else { crate::fail!("the queue is full") };
        slots[usize::from(head)] = slot;
        Ok(())
    };
    let start = cpu::tsc();
    let end = Deadline::in_ms(ms);
    for slot in 0..depth as u16 {
        submit(&mut disk, slot, &mut slot_of_head)?;
    }
    disk.queue.kick();
    let (mut in_flight, mut operations) = (depth, 0u64);
    let mut stalled = Deadline::in_ms(STALL_MS);
    while in_flight > 0 {
        let mut submitted = false;
        while let Some(completion) = disk.queue.poll()? {
            let slot = slot_of_head[usize::from(completion.head)];
            let status = cpu::mmio::read8(disk.header(slot).1);
            check!(status == disk::STATUS_OK, "status {status} after {operations} requests");
            operations += 1;
            in_flight -= 1;
            stalled = Deadline::in_ms(STALL_MS);
            if !end.passed() {
                submit(&mut disk, slot, &mut slot_of_head)?;
                in_flight += 1;
                submitted = true;
            }
        }
        if submitted {
            disk.queue.kick();
        } else {
            core::hint::spin_loop();
            check!(!stalled.passed(), "{in_flight} requests not completed in {STALL_MS} ms");
        }
    }
    let cycles = cpu::tsc() - start;
    let us = clock::cycles_to_us(cycles).max(1);
    note(report, format_args!("ops={operations} cycles={cycles} us={us}"));
    note(
        report,
        format_args!(
            "iops={} mib_per_s={}",
            operations * 1_000_000 / us,
            (operations * bytes / us * 1_000_000) >> 20
        ),
    );
    disk.device.reset()
}

/// Writes the disk from its beginning, `writes` requests in flight at once, then a flush; again from the beginning when
/// its end is reached.
pub fn append(disk: usize, bytes: u64, ms: u64, writes: u64, report: &mut Line) -> Outcome {
    check!((1..=DEPTH_MAX).contains(&writes), "1 to {DEPTH_MAX} writes go before a flush");
    check!(bytes > 0 && bytes % SECTOR_BYTES == 0, "bytes is a multiple of {SECTOR_BYTES}");
    check!(bytes <= BUFFERS_BYTES_MAX, "bytes is at most {BUFFERS_BYTES_MAX}");
    let mut disk = Disk::require(disk)?;
    let sectors = bytes / SECTOR_BYTES;
    check!(disk.sectors >= sectors * writes, "the disk is smaller than what goes before a flush");
    let address = memory::allocate(bytes.div_ceil(memory::PAGE_BYTES)).ok_or_else(out_of_memory)?;
    let data = Segment::Read { address, bytes: bytes as u32 };
    let (mut sector, mut operations, mut flushes) = (0, 0u64, 0u64);
    let start = cpu::tsc();
    let end = Deadline::in_ms(ms);
    while !end.passed() {
        if sector + sectors * writes > disk.sectors {
            sector = 0;
        }
        for slot in 0..writes as u16 {
            disk.write_header(slot, disk::OUT, sector);
            let (header, status) = disk.header(slot);
            let ends =
                (Segment::Read { address: header, bytes: 16 }, Segment::Write { address: status, bytes: 1 });
            check!(disk.queue.add(&[ends.0, data, ends.1]).is_some(), "the queue is full");
            sector += sectors;
        }
        disk.queue.kick();
        let stalled = Deadline::in_ms(STALL_MS);
        let mut in_flight = writes;
        while in_flight > 0 {
            match disk.queue.poll()? {
                Some(_) => in_flight -= 1,
                None => check!(!stalled.passed(), "{in_flight} writes not completed in {STALL_MS} ms"),
            }
        }
        for slot in 0..writes as u16 {
            let status = cpu::mmio::read8(disk.header(slot).1);
            check!(status == disk::STATUS_OK, "status {status} after {operations} writes");
        }
        operations += writes;
        disk.flush()?;
        flushes += 1;
    }
    let us = clock::cycles_to_us(cpu::tsc() - start).max(1);
    note(report, format_args!("ops={operations} flushes={flushes} us={us}"));
    note(report, format_args!("mib_per_s={}", (operations * bytes / us * 1_000_000) >> 20));
    disk.device.reset()
}
