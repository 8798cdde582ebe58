//! `evil-*`: what a hostile driver does. After each attack the device must still answer its status
//! register, and after a reset it must do an honest request.

use crate::console::Line;
use crate::cpu::mmio::{read8, read16, read32, write8, write16, write32, write64};
use crate::failure::{Outcome, out_of_memory};
use crate::pci;
use crate::virtio::common;
use crate::virtio::disk::{self, Disk};
use crate::virtio::nic::Nic;
use crate::virtio::queue::{
    DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Queue, Segment, write_raw,
};
use crate::virtio::{Device, STATUS_DRIVER_OK, STATUS_NEEDS_RESET};
use crate::words::note;
use crate::{check, clock, memory, say};

/// How long an attack is given to be noticed.
const NOTICE_MS: u64 = 100;
pub const NO_RAM: u64 = 0x7fff_ffff_f000;

/// A way to break the ring's rules; `scratch` is a page of the guest's own.
pub type Attack = (&'static str, fn(&mut Queue, scratch: u64));

pub const ATTACKS: &[Attack] = &[
    ("loop", |queue, scratch| {
        for position in 0..queue.size {
            let next = (position + 1) % queue.size;
            write_raw(queue.descriptors, position, scratch, 16, DESCRIPTOR_NEXT, next);
        }
        queue.offer(0);
    }),
    ("self-loop", |queue, scratch| {
        write_raw(queue.descriptors, 0, scratch, 16, DESCRIPTOR_NEXT, 0);
        queue.offer(0);
    }),
    ("next-out-of-range", |queue, scratch| {
        write_raw(queue.descriptors, 0, scratch, 16, DESCRIPTOR_NEXT, 0xffff);
        queue.offer(0);
    }),
    ("head-out-of-range", |queue, _| queue.offer(0xffff)),
    ("address-out-of-range", |queue, _| {
        write_raw(queue.descriptors, 0, NO_RAM, 16, DESCRIPTOR_NEXT, 1);
        write_raw(queue.descriptors, 1, NO_RAM, 4096, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 2);
        write_raw(queue.descriptors, 2, NO_RAM, 1, DESCRIPTOR_WRITE, 0);
        queue.offer(0);
    }),
    ("address-wraps", |queue, _| {
        write_raw(queue.descriptors, 0, u64::MAX - 7, 4096, 0, 0);
        queue.offer(0);
    }),
    ("address-is-device", |queue, _| {
        // The device's own doorbell: memory to the driver, nothing to the device.
        let doorbell = queue.doorbell & !0xfff;
        write_raw(queue.descriptors, 0, doorbell, 16, DESCRIPTOR_NEXT, 1);
        write_raw(queue.descriptors, 1, doorbell, 512, DESCRIPTOR_WRITE, 0);
        queue.offer(0);
    }),
    ("zero-length", |queue, scratch| {
        write_raw(queue.descriptors, 0, scratch, 0, DESCRIPTOR_NEXT, 1);
        write_raw(queue.descriptors, 1, scratch, 0, DESCRIPTOR_WRITE, 0);
        queue.offer(0);
    }),
    ("huge-length", |queue, scratch| {
        write_raw(queue.descriptors, 0, scratch, 16, DESCRIPTOR_NEXT, 1);
        write_raw(queue.descriptors, 1, scratch, 0xffff_fe00, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 2);
        write_raw(queue.descriptors, 2, scratch + 64, 1, DESCRIPTOR_WRITE, 0);
        queue.offer(0);
    }),
    ("write-then-read", |queue, scratch| {
        write_raw(queue.descriptors, 0, scratch, 16, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 1);
        write_raw(queue.descriptors, 1, scratch + 64, 16, 0, 0);
        queue.offer(0);
    }),
    ("indirect-huge", |queue, scratch| {
        write_raw(queue.descriptors, 0, scratch, 0xffff_fff0, DESCRIPTOR_INDIRECT, 0);
        queue.offer(0);
    }),
    ("indirect-odd", |queue, scratch| {
        write_raw(queue.descriptors, 0, scratch, 17, DESCRIPTOR_INDIRECT, 0);
        queue.offer(0);
    }),
    ("indirect-nested", |queue, scratch| {
        write_raw(scratch, 0, scratch, 32, DESCRIPTOR_INDIRECT, 0);
        write_raw(scratch, 1, scratch, 16, 0, 0);
        write_raw(queue.descriptors, 0, scratch, 32, DESCRIPTOR_INDIRECT, 0);
        queue.offer(0);
    }),
    ("indirect-loop", |queue, scratch| {
        write_raw(scratch, 0, scratch + 64, 16, DESCRIPTOR_NEXT, 1);
        write_raw(scratch, 1, scratch + 64, 16, DESCRIPTOR_NEXT, 0);
        write_raw(queue.descriptors, 0, scratch, 32, DESCRIPTOR_INDIRECT, 0);
        queue.offer(0);
    }),
    ("available-jumps", |queue, _| {
        write16(queue.available + 2, queue.available_index.wrapping_add(0x7fff));
    }),
    ("head-twice", |queue, scratch| {
        // A read of a disk's first sector, an answer for others; taken twice, it would be answered twice.
        write_raw(queue.descriptors, 0, scratch, 16, DESCRIPTOR_NEXT, 1);
        write_raw(queue.descriptors, 1, scratch + 64, 513, DESCRIPTOR_WRITE, 0);
        queue.offer(0);
        queue.offer(0);
    }),
    ("doorbell-storm", |queue, _| {
        for _ in 0..1000 {
            queue.ring();
        }
    }),
    ("doorbell-wrong-queue", |queue, _| write16(queue.doorbell, 0xffff)),
];

/// A way to change a running device's registers.
type Rewiring = (&'static str, fn(&Device));

/// What an attack led to.
pub struct Score {
    pub attacks: u32,
    pub needs_reset: u32,
}

impl Score {
    pub fn strike(&mut self, device: &Device, queue: &mut Queue, attack: &Attack) -> Outcome {
        let (name, strike) = attack;
        let scratch = memory::allocate(1).ok_or_else(out_of_memory)?;
        strike(queue, scratch);
        queue.ring();
        clock::spin_until(NOTICE_MS, || {
            device.status() & STATUS_NEEDS_RESET != 0 || read16(queue.used + 2) != 0
        });
        let status = device.status();
        let used = read16(queue.used + 2);
        check!(status & STATUS_DRIVER_OK != 0 && status != 0xff, "{name}: status {status:#x}");
        self.attacks += 1;
        self.needs_reset += u32::from(status & STATUS_NEEDS_RESET != 0);
        say!("probe: evil {name} status={status:#x} used={used}");
        device.reset()
    }
}

pub fn block(index: usize, report: &mut Line) -> Outcome {
    let mut score = Score { attacks: 0, needs_reset: 0 };
    for attack in ATTACKS {
        memory::release_all();
        let mut disk = Disk::require(index)?;
        score.strike(&disk.device, &mut disk.queue, attack)?;
        let mut disk = Disk::require(index)?;
        let buffer = memory::allocate(1).ok_or_else(out_of_memory)?;
        disk.read(0, buffer, 512)?;
        disk.device.reset()?;
    }
    rewired(index, &mut score)?;
    note(report, format_args!("attacks={} needs_reset={}", score.attacks, score.needs_reset));
    Ok(())
}

/// Changes the queue's registers while the device runs, then makes an honest request.
fn rewired(index: usize, score: &mut Score) -> Outcome {
    let rewirings: &[Rewiring] = &[
        ("queue-size-zero", |device| write16(device.common + common::QUEUE_SIZE, 0)),
        ("queue-size-odd", |device| write16(device.common + common::QUEUE_SIZE, 3)),
        ("queue-size-huge", |device| write16(device.common + common::QUEUE_SIZE, 0xffff)),
        ("queue-moved", |device| {
            write32(device.common + common::QUEUE_DESCRIPTORS, 0xffff_f000);
            write32(device.common + common::QUEUE_DESCRIPTORS + 4, 0x7fff);
        }),
        ("queue-disabled", |device| write16(device.common + common::QUEUE_ENABLE, 0)),
        ("queue-vector-wrong", |device| write16(device.common + common::QUEUE_VECTOR, 0x7fff)),
        ("features-late", |device| write32(device.common + common::DRIVER_FEATURE, 0xffff_ffff)),
    ];
    for (name, rewire) in rewirings {
        memory::release_all();
        let disk = Disk::require(index)?;
        write16(disk.device.common + common::QUEUE_SELECT, 0);
        rewire(&disk.device);
        let mut disk = disk;
        disk.write_header(0, disk::READ_ID, 0);
        let (header, at) = disk.header(0);
        disk.queue.add(&[
            Segment::Read { address: header, bytes: 16 },
            Segment::Write { address: header + 2048, bytes: 20 },
            Segment::Write { address: at, bytes: 1 },
        ]);
        disk.queue.ring();
        clock::spin_until(NOTICE_MS, || read16(disk.queue.used + 2) != 0);
        let status = disk.device.status();
        check!(status != 0xff, "{name}: status {status:#x}");
        say!("probe: evil {name} status={status:#x} used={}", read16(disk.queue.used + 2));
        score.attacks += 1;
        score.needs_reset += u32::from(status & STATUS_NEEDS_RESET != 0);
        disk.device.reset()?;
    }
    bad_start(index, score)
}

/// Starts the device with queues no device can use; then with none at all.
fn bad_start(index: usize, score: &mut Score) -> Outcome {
    let queues: &[(&str, u64, u16)] = &[
        ("rings-outside-ram", NO_RAM, 1),
        ("rings-at-zero", 0, 1),
        ("rings-wrap", !0xfff, 1),
        ("rings-unaligned", 0x20_0003, 1),
        ("no-queue", 0, 0),
    ];
    for (name, address, enable) in queues {
        let Some(mut device) = Device::find(crate::virtio::BLOCK, index)? else { return Ok(()) };
        device.negotiate(0)?;
        write16(device.common + common::QUEUE_SELECT, 0);
        for register in [common::QUEUE_DESCRIPTORS, common::QUEUE_DRIVER, common::QUEUE_DEVICE] {
            write32(device.common + register, *address as u32);
            write32(device.common + register + 4, (*address >> 32) as u32);
        }
        write16(device.common + common::QUEUE_ENABLE, *enable);
        device.add_status(STATUS_DRIVER_OK);
        clock::pause_ms(10);
        let status = device.status();
        check!(status != 0xff, "{name}: status {status:#x}");
        say!("probe: evil {name} status={status:#x}");
        score.attacks += 1;
        score.needs_reset += u32::from(status & STATUS_NEEDS_RESET != 0);
        device.reset()?;
    }
    memory::release_all();
    let mut disk = Disk::require(index)?;
    let buffer = memory::allocate(1).ok_or_else(out_of_memory)?;
    disk.read(0, buffer, 512)?;
    disk.device.reset()
}

/// The same attacks on a network card's transmit queue, then on its receive queue, where a device
/// may notice only when a frame arrives.
pub fn net(index: usize, report: &mut Line) -> Outcome {
    let mut score = Score { attacks: 0, needs_reset: 0 };
    for attack in ATTACKS {
        memory::release_all();
        let mut nic = Nic::require(index)?;
        score.strike(&nic.device, &mut nic.transmit, attack)?;
        let mut nic = Nic::require(index)?;
        let mut frame = [0u8; 60];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&nic.mac);
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        nic.send(&frame, None)?;
        nic.device.reset()?;
        let mut nic = Nic::without_buffers(index)?;
        score.strike(&nic.device, &mut nic.receive, attack)?;
    }
    memory::release_all();
    let nic = Nic::require(index)?;
    note(report, format_args!("attacks={} needs_reset={}", score.attacks, score.needs_reset));
    nic.device.reset()
}

/// `evil-config`: odd accesses to every virtio function's registers and configuration space.
pub fn configuration(report: &mut Line) -> Outcome {
    let mut functions = 0;
    let mut failure = None;
    pci::scan(|function, identity| {
        if identity & 0xffff != 0x1af4 {
            return false;
        }
        functions += 1;
        for offset in (0..0x1000).step_by(4) {
            let _ = function.read32(offset);
        }
        // Identity and class are read-only; the command and BARs are put back.
        for offset in [0x00, 0x08, 0x2c, 0x34, 0x3c, 0x100, 0xffc] {
            function.write32(offset, 0xffff_ffff);
        }
        if function.read32(0) != identity {
            failure = Some("its identity changed");
        }
        let Some(base) = (0..6).find_map(|index| function.bar(index)) else { return false };
        function.enable();
        for offset in (0..0x4000u64).step_by(0x1000) {
            let _ = (read8(base + offset + 1), read16(base + offset + 3), read32(base + offset + 0xffd));
        }
        false
    });
    if let Some(reason) = failure {
        crate::fail!("{reason}");
    }
    let Some(device) = [crate::virtio::RNG, crate::virtio::BLOCK, crate::virtio::NET]
        .into_iter()
        .find_map(|kind| Device::find(kind, 0).ok().flatten())
    else {
        crate::fail!("no virtio device answers after it")
    };
    // Writes of the wrong width and to read-only registers of the common structure.
    for offset in 0..56 {
        write8(device.common + offset, 0xff);
        write64(device.common + (offset & !7), u64::MAX);
    }
    device.reset()?;
    note(report, format_args!("functions={functions}"));
    Ok(())
}
