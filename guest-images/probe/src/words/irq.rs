//! `irq`: one interrupt for each completion, none while masked, a pending one after unmasking,
//! and a processor woken from `hlt`.

use crate::console::Line;
use crate::failure::Outcome;
use crate::virtio::disk::{self, Disk};
use crate::words::note;
use crate::{check, clock, cpu, fail};

const ENTRY: u16 = 0;
const VECTOR: u8 = 0x40;
const REQUESTS: u64 = 32;
const TIMEOUT_MS: u64 = 2000;
/// Long enough for an interrupt that must not come.
const QUIET_MS: u64 = 20;

pub fn run(index: usize, report: &mut Line) -> Outcome {
    let Some(disk) = Disk::find_with_vector(index, Some(ENTRY))? else { fail!("no disk {index}") };
    let Some(msix) = disk.device.msix.as_ref() else { fail!("the disk has no MSI-X") };
    let entries = msix.entries;
    msix.route(ENTRY, VECTOR);
    msix.enable();
    let result = deliver(disk, report);
    note(report, format_args!("entries={entries}"));
    result
}

fn deliver(mut disk: Disk, report: &mut Line) -> Outcome {
    let before = cpu::interrupt_count(VECTOR);
    for done in 1..=REQUESTS {
        identify(&mut disk)?;
        // Looking at the used ring first would tell the device that no interrupt is needed.
        let came = clock::spin_until(TIMEOUT_MS, || cpu::interrupt_count(VECTOR) >= before + done);
        check!(came, "request {done} brought no interrupt in {TIMEOUT_MS} ms");
        collect(&mut disk)?;
    }
    let delivered = cpu::interrupt_count(VECTOR) - before;
    check!(delivered == REQUESTS, "{delivered} interrupts for {REQUESTS} requests");

    let Some(msix) = disk.device.msix.take() else { fail!("the disk lost its MSI-X") };
    msix.set_entry_mask(ENTRY, true);
    identify(&mut disk)?;
    clock::pause_ms(QUIET_MS);
    let masked = cpu::interrupt_count(VECTOR);
    check!(masked == before + REQUESTS, "an interrupt came while masked");
    check!(msix.is_pending(ENTRY), "no pending bit while masked");
    msix.set_entry_mask(ENTRY, false);
    let came = clock::spin_until(TIMEOUT_MS, || cpu::interrupt_count(VECTOR) > masked);
    check!(came, "the pending interrupt was lost");
    check!(!msix.is_pending(ENTRY), "the pending bit stayed");
    collect(&mut disk)?;

    let seen = cpu::interrupt_count(VECTOR);
    identify(&mut disk)?;
    cpu::wait_for_interrupt(VECTOR, seen);
    let woken = clock::spin_until(TIMEOUT_MS, || cpu::interrupt_count(VECTOR) > seen);
    check!(woken, "hlt ended without the interrupt");
    msix.disable();
    note(report, format_args!("delivered={delivered} masked=1 woken=1"));
    disk.device.reset()
}

/// Takes the completion that an interrupt told of.
fn collect(disk: &mut Disk) -> Outcome {
    check!(disk.queue.poll()?.is_some(), "an interrupt without a completion");
    Ok(())
}

/// Makes a small request.
fn identify(disk: &mut Disk) -> Outcome {
    use crate::virtio::queue::Segment;
    disk.write_header(0, disk::READ_ID, 0);
    let (header, status) = disk.header(0);
    let data = Segment::Write { address: header + 2048, bytes: 20 };
    let segments =
        [Segment::Read { address: header, bytes: 16 }, data, Segment::Write { address: status, bytes: 1 }];
    check!(disk.queue.add(&segments).is_some(), "the queue is full");
    disk.queue.kick();
    Ok(())
}
