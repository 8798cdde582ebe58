//! What fuzzers call: kernels and initial RAM disks of any shape, put into guest memory, state files of any content, and
//! what comes over the streams of a move. No part of a machine.
//! `tests/fuzz` calls it with new bytes, and the test here with the seeds kept there.
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvm::Start;
use memory::{Extent, Ram, layout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use wire::saved::lower::Lower;
use wire::transfer::Kind;

use crate::boot::{Source, prepare};
use crate::migrate::fuzz as migrate;
use crate::snapshot::{self, MachineState};

const MEMORY_BYTES: u64 = 24 << 20;
/// Files are no longer than the input, but may be stretched by a hole, so that offsets reach far.
const HOLE_BYTES_MAX: u64 = 1 << 20;

/// Boots `data`: a byte that says how much of it is an initrd, one for a hole behind the kernel, and the kernel.
pub fn elf(data: &[u8]) {
    let [split, hole, rest @ ..] = data else { return };
    let (initrd_bytes, kernel) = rest.split_at(rest.len().min(usize::from(*split)));
    let hole = u64::from(*hole) * (HOLE_BYTES_MAX / 255);
    let ram = memory::new(MEMORY_BYTES).expect("memory for a small machine");
    let (kernel, initrd) = (file(kernel, hole), file(initrd_bytes, 0));
    let source = Source { kernel: &kernel, initrd: Some(&initrd), cmdline: "console=ttyS0", vcpus: 2 };
    match prepare(&ram, &source) {
        Ok(Start::Pvh { entry, start_info }) => {
            assert!(ram.address_in_range(GuestAddress(entry)), "entered at {entry:#x}");
            let module = word(&ram, start_info + 16);
            let modules = word(&ram, start_info + 8) >> 32;
            let told = (modules > 0).then(|| (word(&ram, module), word(&ram, module + 8)));
            judge_initrd(&ram, initrd_bytes, told);
        }
        Ok(Start::Long { entry, zero_page, .. }) => {
            assert!(ram.address_in_range(GuestAddress(entry)), "entered at {entry:#x}");
            let half = |low, high| {
                word(&ram, zero_page + low) & 0xFFFF_FFFF | (word(&ram, zero_page + high) & 0xFFFF_FFFF) << 32
            };
            let (start, bytes) = (half(0x218, 0xC0), half(0x21C, 0xC4));
            judge_initrd(&ram, initrd_bytes, (bytes > 0).then_some((start, bytes)));
        }
        Err(refused) => {
            let detail = refused.to_string();
            assert!(!detail.is_empty() && detail.len() < 1024, "told in {} bytes", detail.len());
        }
    }
}

/// Opens `data` as a state file whose digest was found right. What is taken is written as it was read, and no part of
/// memory lies outside or over another. The same for a list of what lies in lower files, which begins in its own way.
pub fn state(data: &[u8]) {
    if let Some((head, _)) = data.split_first_chunk::<24>()
        && head.starts_with(b"toftruns")
    {
        return lower(data, u64::from_le_bytes(*head.last_chunk().expect("eight bytes")));
    }
    match snapshot::parse(data) {
        Ok((contents, table)) => {
            let end = table.parts.iter().fold(0, |end, part| {
                assert!(part.offset >= end && part.bytes > 0 && u64::from(part.bytes) <= 1 << 20);
                part.offset + u64::from(part.bytes)
            });
            assert!(end <= table.memory_bytes, "a part ends at {end:#x}");
            judge_machine(&contents.machine);
            let again = snapshot::bytes(&contents, &table).expect("what was read can be written");
            assert!(snapshot::parse(&again).expect("what was written can be read") == (contents, table));
        }
        Err(refused) => {
            let detail = refused.to_string();
            assert!(!detail.is_empty() && detail.len() < 1024, "told in {} bytes", detail.len());
        }
    }
}

/// What processors and controllers are given is of the sizes that KVM's interface has.
fn judge_machine(machine: &MachineState) {
    let judge_refusal = |refused: kvm::Error| {
        let detail = refused.to_string();
        assert!(!detail.is_empty() && detail.len() < 1024, "told in {} bytes", detail.len());
    };
    for cpu in &machine.cpus {
        if let Err(refused) = cpu.check() {
            judge_refusal(refused);
            continue;
        }
        assert!(cpu.mp_state <= 3, "a processor in state {}", cpu.mp_state);
        let whole = [&cpu.regs, &cpu.sregs, &cpu.debugregs, &cpu.events].map(Vec::len);
        assert_eq!(whole, [144, 312, 128, 64]);
        assert!(cpu.xsave.len() <= 4096 && cpu.xcrs.len() <= 392 && cpu.lapic.len() <= 1024);
    }
    match machine.vm.check() {
        Err(refused) => judge_refusal(refused),
        Ok(()) => {
            assert!(machine.vm.irqchips.iter().all(|chip| chip.len() <= 520));
            assert_eq!(machine.vm.pit.len(), 112);
        }
    }
}

/// Every byte of the file lies in one place, and that is one of the files there are.
fn lower(data: &[u8], length: u64) {
    match Lower::split(data, length) {
        Ok(lower) => {
            assert_eq!(lower.join(), data);
            let (mut at, mut below) = (0, 0);
            for (piece, file) in lower.pieces(0..length) {
                assert!(piece.start == at && piece.end > at && file.is_none_or(|file| file < lower.files));
                below += file.map_or(0, |_| piece.end - piece.start);
                at = piece.end;
            }
            assert_eq!((at, below), (length, lower.lower_bytes()));
        }
        Err(refused) => {
            let detail = refused.to_string();
            assert!(!detail.is_empty() && detail.len() < 1024, "told in {} bytes", detail.len());
        }
    }
}

/// Takes `data` as what comes over one stream of a move: a byte that says over which of how many, or that it is a disk's,
/// and the frames. Memory comes to lie only in this stream's shards and inside, and no more of it than came; so does a disk.
pub fn moved(data: &[u8]) {
    let Some((which, mut frames)) = data.split_first() else { return };
    if which & 16 != 0 {
        return moved_disk(frames);
    }
    let (index, count) = (usize::from(which & 3), usize::from(which >> 2 & 3) + 1);
    let ram = memory::new(MOVED_BYTES).expect("memory for a small machine");
    let (mut console, mut came) = (Vec::new(), frames.len() as u64);
    // What comes packed is more than came, by as much as its heads say.
    let may_pack = frames.windows(7).any(|word| word == b"\"packs\"");
    let outcome = migrate::take_stream(&mut frames, &ram, index, count, |position, piece: &[u8]| {
        console.push((position, piece.to_vec()));
    });
    if let Err(refused) = &outcome {
        assert!(!refused.is_empty() && refused.len() < 2048, "told in {} bytes", refused.len());
    }
    let mut end = None;
    for (position, piece) in &console {
        assert!(end.is_none_or(|end| end == *position) && !piece.is_empty(), "the console has a gap");
        end = Some(position + piece.len() as u64);
        came = came.checked_sub(piece.len() as u64).expect("no more of the console than came");
    }
    for extent in memory::touched(&ram).expect("a memory file") {
        judge_place(extent, index, count);
        came = match came.checked_sub(extent.bytes.saturating_sub(4096)) {
            None if may_pack => 0,
            left => left.expect("no more of memory than came"),
        };
    }
}

/// What comes over a stream belongs to it.
fn judge_place(extent: Extent, index: usize, count: usize) {
    for offset in (extent.offset..extent.offset + extent.bytes).step_by(4096) {
        assert_eq!(wire::transfer::stream_of(offset, count as u64), index as u64, "memory at {offset:#x}");
    }
}

/// Takes `data` as what goes over one stream of a move that owes memory: a byte that says over which of how many, and the frames
/// that come from its source, or what is asked of that. Memory comes to lie only in this stream's shards, and nobody waits for what
/// nobody will bring; of a source comes what was asked for, in order, and no more.
pub fn owed(data: &[u8]) {
    let Some((which, mut frames)) = data.split_first() else { return };
    let (index, count) = (usize::from(which & 3), usize::from(which >> 2 & 3) + 1);
    let ram = Arc::new(memory::new(MOVED_BYTES).expect("memory for a small machine"));
    if which & 16 != 0 {
        return asked(frames, &ram, index, count);
    }
    // Where there is none, nothing is ever owed.
    let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") else { return };
    match migrate::gather_stream(&mut frames, &ram, device.as_fd(), index, count) {
        Ok(left) => assert!(left <= MOVED_BYTES / 4096, "{left} pages are owed"),
        Err(refused) => {
            assert!(!refused.is_empty() && refused.len() < 2048, "told in {} bytes", refused.len());
        }
    }
    for extent in memory::touched(&ram).expect("a memory file") {
        judge_place(extent, index, count);
    }
}

fn asked(asks: &[u8], ram: &Arc<Ram>, index: usize, count: usize) {
    for offset in (0..MOVED_BYTES).step_by(5 * 4096) {
        memory::fill(ram, offset, &[7]).expect("memory that can be written");
    }
    let wanted = migrate::asked_for(asks, MOVED_BYTES, index, count);
    let mut pages = wanted.iter().flat_map(|part| (part.offset..part.offset + part.bytes).step_by(4096));
    migrate::answer_stream(asks, ram, index, count, |head| {
        let holds = head.offset.is_multiple_of(5 * 4096);
        let part = head.offset..head.offset + u64::from(head.length);
        assert_eq!(head.kind == Kind::Part, holds, "what was answered with {head:?}");
        for offset in part.step_by(4096) {
            assert_eq!(pages.next(), Some(offset), "what was not asked for came in {head:?}");
        }
    });
    assert_eq!(pages.next(), None, "what was asked for did not come");
}

fn moved_disk(mut frames: &[u8]) {
    // With an end that cannot be moved, so that whoever writes beyond it fails.
    let file = sys::memfd::create("disk", MOVED_DISK_BYTES).expect("memory for a small disk");
    let (came, pages) = (frames.len() as u64, (frames.len() / 16) as u64);
    if let Err(refused) = migrate::take_disk(&mut frames, &file, MOVED_DISK_BYTES) {
        assert!(!refused.is_empty() && refused.len() < 2048, "told in {} bytes", refused.len());
        assert!(!refused.contains("write a disk"), "what lies inside can be written: {refused}");
    }
    let (mut at, mut found) = (0, 0);
    while let Some((start, end)) = sys::memfd::next_data(&file, at).expect("a memory file") {
        (at, found) = (end, found + end - start);
    }
    // Each frame touches two pages more than it fills at most.
    assert!(found <= came + 2 * 4096 * pages, "{found} bytes of which {came} came");
}

/// Not whole pages.
const MOVED_DISK_BYTES: u64 = (1 << 20) + 512;

/// Four shards, the last one cut short.
const MOVED_BYTES: u64 = (8 << 20) - 4096;

fn word(ram: &Ram, address: u64) -> u64 {
    ram.read_obj(GuestAddress(address)).expect("parameters lie in memory")
}

/// What the kernel is told of its initrd is where the initrd is.
fn judge_initrd(ram: &Ram, wanted: &[u8], told: Option<(u64, u64)>) {
    assert_eq!(told.map_or(0, |(_, bytes)| bytes), wanted.len() as u64);
    let Some((start, _)) = told else { return };
    assert!(start >= layout::HIGH_RAM_START, "an initrd at {start:#x}");
    let mut found = vec![0; wanted.len()];
    ram.read_slice(&mut found, GuestAddress(start)).expect("the initrd lies in memory");
    assert!(found == wanted, "the initrd was written over");
}

fn file(bytes: &[u8], hole: u64) -> File {
    let file = sys::memfd::create("fuzz", bytes.len() as u64 + hole).expect("a memory file");
    file.write_all_at(bytes, 0).expect("room for the input");
    file
}

#[cfg(test)]
mod tests {
    use seeds::INPUTS;

    /// Each has a thread and a userfaultfd of its own, which takes milliseconds.
    const INPUTS_OWED: u64 = INPUTS / 6;

    #[test]
    fn seeds_of_the_kernel_loader_hold() {
        seeds::replay("elf", super::elf);
    }

    #[test]
    fn seeds_of_the_streams_of_a_move_hold() {
        seeds::replay("moved", super::moved);
    }

    #[test]
    fn seeds_of_a_move_that_owes_memory_hold() {
        seeds::replay("owed", super::owed);
    }

    #[test]
    fn seeds_of_the_state_reader_hold() {
        seeds::replay("state", super::state);
    }

    #[test]
    fn inputs_near_the_seeds_of_the_kernel_loader_hold() {
        seeds::vary("elf", INPUTS, super::elf);
    }

    #[test]
    fn inputs_near_the_seeds_of_the_streams_of_a_move_hold() {
        seeds::vary("moved", INPUTS, super::moved);
    }

    #[test]
    fn inputs_near_the_seeds_of_a_move_that_owes_memory_hold() {
        seeds::vary("owed", INPUTS_OWED, super::owed);
    }

    #[test]
    fn inputs_near_the_seeds_of_the_state_reader_hold() {
        seeds::vary("state", INPUTS, super::state);
    }
}
