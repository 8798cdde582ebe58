//! `blk`, `write`, `verify`: what a disk must do. `blk` overwrites the first MiB and the last
//! sector of every writable disk.

use crate::console::Line;
use crate::cpu::mmio::{write32, write64};
use crate::failure::{Outcome, out_of_memory};
use crate::memory::{self, fill, first_difference};
use crate::virtio::disk::{self, Disk, SECTOR_BYTES};
use crate::virtio::queue::Segment;
use crate::words::note;
use crate::{check, cpu, fail, say};
use core::fmt::Write;

const DISKS_MAX: usize = 16;
const BUFFER_BYTES: u64 = 64 << 10;
const BUFFER_SECTORS: u64 = BUFFER_BYTES / SECTOR_BYTES;
/// Sectors `blk` needs to do all its checks.
const TESTED_SECTORS: u64 = 1 << 11;

/// Tests one disk, or each of them.
pub fn run(only: Option<usize>, report: &mut Line) -> Outcome {
    let mut tested = 0;
    for index in 0..DISKS_MAX {
        if only.is_some_and(|wanted| wanted != index) {
            continue;
        }
        memory::release_all();
        let Some(disk) = Disk::find(index)? else { break };
        let mut line = Line::new();
        one(disk, &mut line)?;
        say!("probe: blk-disk {index}{}", line.as_str());
        tested += 1;
    }
    check!(tested > 0, "no disk found");
    note(report, format_args!("disks={tested}"));
    Ok(())
}

fn one(mut disk: Disk, report: &mut Line) -> Outcome {
    let buffer = memory::allocate(2 * BUFFER_BYTES / memory::PAGE_BYTES).ok_or_else(out_of_memory)?;
    note(report, format_args!("sectors={} features={:#x}", disk.sectors, disk.device.features));
    serial(&mut disk, buffer, report)?;
    refusals(&mut disk, buffer)?;
    if disk.is_read_only() {
        read_only(&mut disk, buffer)?;
        note(report, format_args!("read_only=1"));
        return disk.device.reset();
    }
    check!(disk.sectors >= TESTED_SECTORS, "{} sectors are too few to test", disk.sectors);
    let seed = cpu::tsc();
    sizes(&mut disk, buffer, seed)?;
    scattered(&mut disk, buffer, seed)?;
    for (kind, feature, name) in [
        (disk::DISCARD, disk::FEATURE_DISCARD, "discard"),
        (disk::WRITE_ZEROES, disk::FEATURE_WRITE_ZEROES, "write_zeroes"),
    ] {
        let offered = disk.device.has(feature);
        if offered {
            range_request(&mut disk, buffer, kind, seed)?;
        }
        note(report, format_args!("{name}={}", u8::from(offered)));
    }
    disk.device.reset()
}

fn serial(disk: &mut Disk, buffer: u64, report: &mut Line) -> Outcome {
    let id = memory::bytes_mut(buffer, 20);
    id.fill(0);
    disk.succeed(disk::READ_ID, 0, &[Segment::Write { address: buffer, bytes: 20 }])?;
    let _ = report.write_str(" serial=");
    for byte in memory::bytes(buffer, 20).iter().take_while(|byte| **byte != 0) {
        report.push(if byte.is_ascii_graphic() { *byte } else { b'_' });
    }
    Ok(())
}

/// What a disk must refuse, read-only or not.
fn refusals(disk: &mut Disk, buffer: u64) -> Outcome {
    let data = [Segment::Write { address: buffer, bytes: SECTOR_BYTES as u32 }];
    let beyond = disk.request(disk::IN, disk.sectors, &data)?;
    check!(beyond == disk::STATUS_IO_ERROR, "read beyond the end: status {beyond}");
    let wrapped = disk.request(disk::IN, u64::MAX, &data)?;
    check!(wrapped == disk::STATUS_IO_ERROR, "read at sector 2^64-1: status {wrapped}");
    let unknown = disk.request(0x7fff_0000, 0, &data)?;
    check!(unknown == disk::STATUS_UNSUPPORTED, "unknown request type: status {unknown}");
    Ok(())
}

fn read_only(disk: &mut Disk, buffer: u64) -> Outcome {
    disk.read(0, buffer, SECTOR_BYTES as u32)?;
    memory::bytes_mut(buffer + BUFFER_BYTES, SECTOR_BYTES)
        .copy_from_slice(memory::bytes(buffer, SECTOR_BYTES));
    memory::bytes_mut(buffer, SECTOR_BYTES)[0] ^= 0xff;
    let status =
        disk.request(disk::OUT, 0, &[Segment::Read { address: buffer, bytes: SECTOR_BYTES as u32 }])?;
    check!(status == disk::STATUS_IO_ERROR, "write to a read-only disk: status {status}");
    disk.read(0, buffer, SECTOR_BYTES as u32)?;
    let is_same = memory::bytes(buffer, SECTOR_BYTES) == memory::bytes(buffer + BUFFER_BYTES, SECTOR_BYTES);
    check!(is_same, "a refused write changed the disk");
    Ok(())
}

/// Writes, flushes and reads back 512 B, 4 KiB and 64 KiB, and the last sector.
fn sizes(disk: &mut Disk, buffer: u64, seed: u64) -> Outcome {
    let last = disk.sectors - 1;
    let cases = [(3, 512), (8, 4096), (128, BUFFER_BYTES), (last, 512)];
    for (sector, bytes) in cases {
        fill(buffer, bytes, seed, sector * 64);
        disk.write(sector, buffer, bytes as u32)?;
    }
    disk.flush()?;
    for (sector, bytes) in cases {
        memory::bytes_mut(buffer, bytes).fill(0);
        disk.read(sector, buffer, bytes as u32)?;
        if let Some(offset) = first_difference(buffer, bytes, seed, sector * 64) {
            fail!("{bytes} bytes at sector {sector} differ at offset {offset}");
        }
    }
    Ok(())
}

/// One request of many unequal segments, none of them a whole number of sectors.
fn scattered(disk: &mut Disk, buffer: u64, seed: u64) -> Outcome {
    const SECTOR: u64 = 512;
    const BYTES: u64 = 16 << 10;
    const PIECE: u64 = BYTES / 32 + 8;
    let count = BYTES.div_ceil(PIECE) as usize;
    let piece = |index: u64| (buffer + index * PIECE, PIECE.min(BYTES - index * PIECE) as u32);
    let mut segments = [Segment::Read { address: 0, bytes: 0 }; 32];
    for (index, segment) in segments[..count].iter_mut().enumerate() {
        let (address, bytes) = piece(index as u64);
        *segment = Segment::Read { address, bytes };
    }
    fill(buffer, BYTES, seed ^ 1, 0);
    disk.succeed(disk::OUT, SECTOR, &segments[..count])?;
    memory::bytes_mut(buffer, BYTES).fill(0);
    // Read in the other order of segments' sizes: the first takes what the write's last held.
    let mut start = buffer;
    for (index, segment) in segments[..count].iter_mut().enumerate() {
        let (_, bytes) = piece((count - 1 - index) as u64);
        *segment = Segment::Write { address: start, bytes };
        start += u64::from(bytes);
    }
    disk.succeed(disk::IN, SECTOR, &segments[..count])?;
    if let Some(offset) = first_difference(buffer, BYTES, seed ^ 1, 0) {
        fail!("scattered request differs at offset {offset}");
    }
    Ok(())
}

/// Discard or write-zeroes of the middle of a written range: its neighbours must survive.
fn range_request(disk: &mut Disk, buffer: u64, kind: u32, seed: u64) -> Outcome {
    const FIRST: u64 = 1024;
    let table = buffer + BUFFER_BYTES;
    fill(buffer, BUFFER_BYTES, seed, FIRST);
    disk.write(FIRST, buffer, BUFFER_BYTES as u32)?;
    let (hole, hole_sectors) = (FIRST + 32, BUFFER_SECTORS - 64);
    write64(table, hole);
    write32(table + 8, hole_sectors as u32);
    write32(table + 12, 0);
    disk.succeed(kind, 0, &[Segment::Read { address: table, bytes: 16 }])?;
    memory::bytes_mut(buffer, BUFFER_BYTES).fill(0xa5);
    disk.read(FIRST, buffer, BUFFER_BYTES as u32)?;
    let edge = 32 * SECTOR_BYTES;
    let is_head_kept = first_difference(buffer, edge, seed, FIRST).is_none();
    let tail = BUFFER_BYTES - edge;
    let is_tail_kept = first_difference(buffer + tail, edge, seed, FIRST + tail / 8).is_none();
    check!(is_head_kept && is_tail_kept, "request type {kind} changed its neighbours");
    if kind == disk::WRITE_ZEROES {
        let is_zero = memory::bytes(buffer + edge, tail - edge).iter().all(|byte| *byte == 0);
        check!(is_zero, "write-zeroes left something");
    }
    write64(table, disk.sectors - 1);
    write32(table + 8, 8);
    let status = disk.request(kind, 0, &[Segment::Read { address: table, bytes: 16 }])?;
    check!(status != disk::STATUS_OK, "request type {kind} beyond the end succeeded");
    Ok(())
}

/// `write=<sector>,<seed>[,<sectors>]`: a pattern that outlives this boot.
pub fn write_pattern(
    disk: usize,
    sector: Option<u64>,
    seed: Option<u64>,
    sectors: Option<u64>,
    report: &mut Line,
) -> Outcome {
    let (mut disk, seed) = (Disk::require(disk)?, seed.unwrap_or(0));
    let sectors = each_piece(sector, sectors, |sector, buffer, bytes| {
        fill(buffer, bytes, seed, sector * 64);
        disk.write(sector, buffer, bytes as u32)
    })?;
    disk.flush()?;
    note(report, format_args!("sectors={sectors} seed={seed}"));
    disk.device.reset()
}

/// `verify=<sector>,<seed>[,<sectors>]`: the pattern an earlier `write` left.
pub fn verify_pattern(
    disk: usize,
    sector: Option<u64>,
    seed: Option<u64>,
    sectors: Option<u64>,
    report: &mut Line,
) -> Outcome {
    let (mut disk, seed) = (Disk::require(disk)?, seed.unwrap_or(0));
    let sectors = each_piece(sector, sectors, |sector, buffer, bytes| {
        disk.read(sector, buffer, bytes as u32)?;
        match first_difference(buffer, bytes, seed, sector * 64) {
            Some(offset) => fail!("sector {} differs", sector + offset / SECTOR_BYTES),
            None => Ok(()),
        }
    })?;
    note(report, format_args!("sectors={sectors} seed={seed}"));
    disk.device.reset()
}

fn each_piece(
    sector: Option<u64>,
    sectors: Option<u64>,
    mut visit: impl FnMut(u64, u64, u64) -> Outcome,
) -> Outcome<u64> {
    let Some(first) = sector else { fail!("give <sector>,<seed>[,<sectors>]") };
    let sectors = sectors.unwrap_or(BUFFER_SECTORS);
    let buffer = memory::allocate(BUFFER_BYTES / memory::PAGE_BYTES).ok_or_else(out_of_memory)?;
    let mut done = 0;
    while done < sectors {
        let piece = (sectors - done).min(BUFFER_SECTORS);
        visit(first + done, buffer, piece * SECTOR_BYTES)?;
        done += piece;
    }
    Ok(sectors)
}
