//! Machines saved on the base of earlier saves: what is new in one file, the rest in those before it.
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};

use sha2::{Digest as _, Sha256};
use wire::control::Command;
use wire::saved::lower::{Lower, Run};
use wire::saved::table::Table;
use wire::saved::{Digest, LowerFiles, MemoryUse, Then, form};

use crate::probe_guest;
use crate::vmm_driver::{Machine, Saved, Vmm};

const MEMORY_BYTES: u64 = 256 << 20;

fn machine() -> Machine {
    let mut machine = Machine::new(probe_guest::path(), "dirty=16,200,1300 ticks=100000");
    machine.spec.memory_bytes = MEMORY_BYTES;
    machine
}

fn table(saved: &Saved) -> Table {
    let mut bytes = vec![0; saved.report.state_bytes as usize];
    saved.state.read_exact_at(&mut bytes, 0).unwrap();
    Table::parse(&mut form::split(&bytes).unwrap()).unwrap()
}

/// A save with those it needs: what of it lies in which of them.
struct Chain {
    saved: Saved,
    lower: Lower,
    files: Vec<File>,
}

impl Chain {
    fn whole(saved: Saved) -> Chain {
        let lower = Lower { bytes: MEMORY_BYTES, ..Lower::default() };
        Chain { saved, lower, files: Vec::new() }
    }

    /// `saved` was made on the base of it.
    fn with(&self, saved: Saved) -> Chain {
        let base = table(&self.saved);
        let files: Vec<File> = [&self.saved.memory]
            .into_iter()
            .chain(&self.files)
            .map(|file| file.try_clone().unwrap())
            .collect();
        let mut lower = Lower { bytes: MEMORY_BYTES, files: files.len() as u32, runs: Vec::new() };
        for part in table(&saved).parts.iter().filter(|part| base.holds(part)) {
            for (piece, file) in self.lower.pieces(part.offset..part.offset + u64::from(part.bytes)) {
                let (offset, bytes) = (piece.start, piece.end - piece.start);
                lower.push(Run { offset, bytes, file: file.map_or(0, |file| file + 1) });
            }
        }
        Chain { saved, lower, files }
    }

    fn memory(&self) -> Vec<u8> {
        let mut memory = vec![0; MEMORY_BYTES as usize];
        for (piece, file) in self.lower.pieces(0..MEMORY_BYTES) {
            let file = file.map_or(&self.saved.memory, |file| &self.files[file as usize]);
            file.read_exact_at(&mut memory[piece.start as usize..piece.end as usize], piece.start).unwrap();
        }
        memory
    }

    fn restore(
        &self,
        next: &mut Vmm,
        how: MemoryUse,
        then: Then,
        digest: Option<Digest>,
    ) -> Result<(), wire::control::Fault> {
        let mut machine = machine();
        let list = tempfile::tempfile().unwrap();
        list.write_all_at(&self.lower.join(), 0).unwrap();
        let runs = machine.add(list);
        let files = self.files.iter().map(|file| machine.add(file.try_clone().unwrap())).collect();
        let right = Digest(Sha256::digest(self.lower.join()).into());
        next.try_restore(machine, &self.saved, |spec| {
            (spec.how, spec.then) = (how, then);
            spec.lower = Some(LowerFiles { runs, digest: digest.unwrap_or(right), files });
        })
    }
}

/// Pages that differ.
fn differing(one: &[u8], other: &[u8]) -> usize {
    one.chunks(4096).zip(other.chunks(4096)).filter(|(one, other)| one != other).count()
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = file.try_clone().unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_machine_goes_on_from_what_is_new_and_what_was_saved_before() {
    let mut vmm = Vmm::boot(machine());
    vmm.wait_for_console("dirty pass");
    vmm.command(Command::Pause).unwrap();
    let first = Chain::whole(vmm.save());
    vmm.command(Command::Resume).unwrap();
    vmm.wait_for_console("tick 1 ");
    vmm.command(Command::Pause).unwrap();
    let second = first.with(vmm.save_on(&first.saved).unwrap());
    vmm.command(Command::Resume).unwrap();
    vmm.wait_for_console("tick 3 ");
    vmm.command(Command::Pause).unwrap();
    let third = second.with(vmm.save_on(&second.saved).unwrap());
    let whole = vmm.save();
    // Not that base, and one that was changed.
    let other = Saved { state: first.saved.memory.try_clone().unwrap(), ..vmm.save() };
    let refused = vmm.save_on(&other);
    assert!(refused.is_err_and(|detail| detail.contains("at most") || detail.contains("not the one")));
    drop(vmm);

    // The same table, from less: the second one's memory is in three files by then.
    assert_eq!(table(&third.saved), table(&whole));
    assert!(third.saved.report.memory_bytes < whole.report.memory_bytes / 4, "{:?}", third.saved.report);
    assert_eq!(third.saved.report.memory_bytes + third.lower.lower_bytes(), whole.report.memory_bytes);
    assert!(third.saved.memory.metadata().unwrap().blocks() < whole.memory.metadata().unwrap().blocks() / 4);
    assert!(
        third.lower.runs.iter().any(|run| run.file == 0) && third.lower.runs.iter().any(|run| run.file == 1)
    );
    let wanted = bytes(&whole.memory);
    assert_eq!(differing(&third.memory(), &wanted), 0);

    for (how, is_ready) in [
        (MemoryUse::Private, false),
        (MemoryUse::Private, true),
        (MemoryUse::Copy, false),
        (MemoryUse::Copy, true),
    ] {
        let mut next = Vmm::start();
        if is_ready {
            next.command(Command::Prepare(machine().spec.chassis())).unwrap();
        }
        third.restore(&mut next, how, Then::Stay, None).unwrap();
        // Whatever KVM writes as it is given the clock back.
        let differing = differing(&bytes(&next.save().memory), &wanted);
        assert!(differing <= 4, "{differing} pages are others after {how:?}");
        next.command(Command::Resume).unwrap();
        next.wait_for_console("stopped=0");
        assert!(!next.console().contains("FAILED"), "{}", next.console());
    }

    let refusal = |how, change: &dyn Fn(&mut Chain), digest: Option<Digest>| {
        let files = || third.files.iter().map(|file| file.try_clone().unwrap()).collect();
        let saved = Saved {
            state: third.saved.state.try_clone().unwrap(),
            memory: third.saved.memory.try_clone().unwrap(),
            report: third.saved.report.clone(),
        };
        let mut chain = Chain { saved, lower: third.lower.clone(), files: files() };
        change(&mut chain);
        chain.restore(&mut Vmm::start(), how, Then::Stay, digest).unwrap_err().detail
    };
    let private = MemoryUse::Private;
    let told = refusal(private, &|_| (), Some(Digest([7; 32])));
    assert!(told.contains("not the one that was named"), "{told}");
    let told = refusal(private, &|chain| drop(chain.files.pop()), None);
    assert!(told.contains("1 lower memory files came, the list tells of 2"), "{told}");
    let told = refusal(private, &|chain| chain.lower.runs.reverse(), None);
    assert!(told.contains("cannot be"), "{told}");
    let told = refusal(private, &|chain| chain.files[1] = tempfile::tempfile().unwrap(), None);
    assert!(told.contains("the memory file has 0 bytes"), "{told}");
    // Whoever compares parts finds files that were exchanged.
    let told = refusal(MemoryUse::Copy, &|chain| chain.files.reverse(), None);
    assert!(told.contains("is not what was saved there"), "{told}");
    let told = refusal(MemoryUse::Adopt, &|_| (), None);
    assert!(told.contains("/lower"), "{told}");
}
