use wire::saved::lower::Run;

use super::*;

const BYTES: u64 = 8 << 20;

/// A file of pages that tell their offset and whose they are.
fn file(whose: u8) -> File {
    let file = tempfile::tempfile().unwrap();
    for offset in (0..BYTES).step_by(4096) {
        let mut page = [whose; 4096];
        page[..8].copy_from_slice(&offset.to_le_bytes());
        file.write_all_at(&page, offset).unwrap();
    }
    file
}

fn files() -> MemoryFiles {
    let run = |offset, bytes, file| Run { offset, bytes, file };
    let runs =
        vec![run(0, 4096, 1), run(1 << 20, 3 << 20, 0), run(5 << 20, 8192, 1), run(BYTES - 4096, 4096, 0)];
    let list = tempfile::tempfile().unwrap();
    let bytes = Lower { bytes: BYTES, files: 2, runs }.join();
    list.write_all_at(&bytes, 0).unwrap();
    MemoryFiles::new(file(1), (&list, digest(&bytes)), vec![file(2), file(3)], BYTES).unwrap()
}

/// However few runs may be mapped, memory is what is read, and what is written to it stays there.
#[test]
fn runs_are_mapped_or_read_and_memory_is_the_same() {
    let files = files();
    let mut wanted = vec![0; BYTES as usize];
    files.read_exact_at(&mut wanted, 0).unwrap();
    assert_eq!(
        [wanted[8], wanted[4096 + 8], wanted[(2 << 20) + 8], wanted[BYTES as usize - 1]],
        [3, 1, 2, 2]
    );
    for runs_max in [0, 1, 3, 100] {
        let own = files.own.try_clone().unwrap();
        let ram = memory::build(BYTES, memory::Backing::Private(own)).unwrap();
        files.lay_over(&ram, runs_max).unwrap();
        let mut found = vec![0; BYTES as usize];
        memory::read(&ram, 0, &mut found).unwrap();
        assert!(found == wanted, "with {runs_max} mapped");
        for offset in [0, 4096, 2 << 20, 5 << 20] {
            memory::fill(&ram, offset, &[9; 4096]).unwrap();
        }
    }
    let mut again = vec![0; BYTES as usize];
    files.read_exact_at(&mut again, 0).unwrap();
    assert!(again == wanted, "a file was written to");
}
