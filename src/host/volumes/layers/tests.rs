use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::super::fill::{Watch, fill};
use super::*;

const BLOCK: u64 = BLOCK_BYTES;

/// A file of blocks of one byte each; what is zero is a hole.
fn file(blocks: &[u8], length: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(length).unwrap();
    for (at, value) in (0..length).step_by(BLOCK as usize).zip(blocks) {
        let bytes = BLOCK.min(length - at) as usize;
        if *value != 0 {
            file.write_all_at(&vec![*value; bytes], at).unwrap();
        }
    }
    file
}

fn bytes(layers: &Layers) -> Vec<u8> {
    let mut bytes = vec![0; layers.own.metadata().unwrap().len() as usize];
    layers.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn twin(file: &File) -> File {
    file.try_clone().unwrap()
}

/// Takes `file` on `base`: what it holds then, with all that it needs.
fn on(file: File, base: &Layers) -> Layers {
    let lower = thin(&file, base, &|| false).unwrap();
    let files = [&base.own].into_iter().chain(&base.files).map(twin).collect();
    Layers::new(file, lower, files).unwrap()
}

#[test]
fn only_blocks_that_differ_are_kept_and_holes_need_nothing() {
    let base = Layers::one(file(&[1, 2, 0, 4], 4 * BLOCK));
    let made = on(file(&[1, 9, 3, 0], 4 * BLOCK), &base);
    assert_eq!(made.lower().runs, [Run { offset: 0, bytes: BLOCK, file: 0 }]);
    assert_eq!(made.own.metadata().unwrap().blocks() * 512, 2 * BLOCK);
    let data: Vec<_> = made.data(0..4 * BLOCK).map(Result::unwrap).collect();
    assert_eq!(data, [(0..BLOCK, Some(0)), (BLOCK..3 * BLOCK, None)]);
    // One byte makes a block another.
    let changed = file(&[1, 2, 0, 4], 4 * BLOCK);
    changed.write_all_at(&[7], BLOCK + 77).unwrap();
    assert_eq!(on(changed, &base).lower().lower_bytes(), 2 * BLOCK);
    // Zeroes that were written are no data.
    let zeroes = file(&[0, 0, 0, 0], 4 * BLOCK);
    zeroes.write_all_at(&[0; 4096], 2 * BLOCK).unwrap();
    let made = on(zeroes, &base);
    assert_eq!((made.own.metadata().unwrap().blocks(), made.lower().lower_bytes()), (0, BLOCK));
}

#[test]
fn a_disk_that_grew_or_ends_within_a_block_is_compared_as_far_as_both_go() {
    let short = Layers::one(file(&[1, 2], BLOCK + 8192));
    let grown = file(&[1, 2, 3], 3 * BLOCK);
    let made = on(twin(&grown), &short);
    assert_eq!(made.lower().lower_bytes(), BLOCK, "a block of which the base has a part is kept");
    assert_eq!(
        bytes(&made),
        [vec![1; BLOCK as usize], vec![2; BLOCK as usize], vec![3; BLOCK as usize]].concat()
    );
    let same = on(file(&[1, 2], BLOCK + 8192), &short);
    assert_eq!((same.lower().lower_bytes(), same.own.metadata().unwrap().blocks()), (BLOCK + 8192, 0));
}

#[test]
fn who_wants_it_no_more_is_heard_and_lower_files_that_are_too_short_are_refused() {
    let base = Layers::one(file(&[1], BLOCK));
    let stopped = thin(&file(&[1], BLOCK), &base, &|| true);
    assert_eq!(stopped.unwrap_err().kind(), io::ErrorKind::Interrupted);
    let made = on(file(&[1], BLOCK), &base);
    for files in [vec![], vec![tempfile::tempfile().unwrap()]] {
        let refused = Layers::new(twin(&made.own), made.lower().clone(), files);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A chain of files, each as it was when it was taken, whatever comes after it, and no block in two places.
    #[test]
    fn a_chain_holds_every_file_as_it_was(
        states in prop::collection::vec(prop::collection::vec(0..3_u8, 12), 1..6),
    ) {
        let length = 12 * BLOCK;
        let mut chain: Vec<Layers> = Vec::new();
        for state in &states {
            let taken = file(state, length);
            let made = chain.last().map(|base| on(twin(&taken), base)).unwrap_or(Layers::one(taken));
            chain.push(made);
        }
        for (index, (state, made)) in states.iter().zip(&chain).enumerate() {
            let wanted: Vec<u8> = state.iter().flat_map(|value| vec![*value; BLOCK as usize]).collect();
            prop_assert!(bytes(made) == wanted, "{}", index);
            let before = index.checked_sub(1).map(|before| &states[before]);
            let is_new = |block: &usize| state[*block] != 0 && before.is_none_or(|before| before[*block] != state[*block]);
            let new = (0..state.len()).filter(is_new).count() as u64;
            prop_assert_eq!(made.own.metadata().unwrap().blocks() * 512, new * BLOCK);
            // A volume that is filled from it holds the same, and no more.
            let volume = tempfile::tempfile().unwrap();
            let watch = Watch::default();
            fill(made, &volume, length, &watch).unwrap();
            prop_assert!(bytes(&Layers::one(twin(&volume))) == wanted, "{}", index);
            let data = state.iter().filter(|value| **value != 0).count() as u64;
            prop_assert_eq!(volume.metadata().unwrap().blocks() * 512, data * BLOCK);
        }
    }
}

/// Reads the pieces that an overlay says it has, and nothing else.
fn told(layers: &Layers, range: Range<u64>) -> Vec<u8> {
    let mut told = vec![0; (range.end - range.start) as usize];
    let mut at = range.start;
    for found in layers.data(range.clone()) {
        let (piece, file) = found.unwrap();
        assert!(piece.start >= at && piece.start < piece.end && piece.end <= range.end, "{piece:?}");
        at = piece.end;
        let within = (piece.start - range.start) as usize..(piece.end - range.start) as usize;
        layers.file(file).unwrap().read_exact_at(&mut told[within], piece.start).unwrap();
    }
    told
}

const PAGE: u64 = 4096;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Against an array that is written to as the overlay is: pages with a byte, zeroes too.
    #[test]
    fn an_overlay_reads_as_one_file(
        below in prop::collection::vec(0..3_u8, 0..24),
        writes in prop::collection::vec((0..32_u64, 1..4_u64, 0..3_u8), 0..24),
        (from, to) in (0..32 * PAGE, 0..32 * PAGE),
    ) {
        let (length, backing) = (32 * PAGE, tempfile::tempfile().unwrap());
        let mut wanted = vec![0; length as usize];
        backing.set_len(below.len() as u64 * PAGE).unwrap();
        for (page, value) in (0..).zip(&below).filter(|(_, value)| **value != 0) {
            let at = page * PAGE;
            backing.write_all_at(&[*value; PAGE as usize], at).unwrap();
            wanted[at as usize..][..PAGE as usize].fill(*value);
        }
        let own = tempfile::tempfile().unwrap();
        own.set_len(length).unwrap();
        for (page, pages, value) in writes {
            let (at, end) = (page * PAGE, ((page + pages) * PAGE).min(length));
            own.write_all_at(&vec![value; (end - at) as usize], at).unwrap();
            wanted[at as usize..end as usize].fill(value);
        }
        let layers = Layers::over(own, backing);
        prop_assert!(bytes(&layers) == wanted);
        let range = from.min(to)..from.max(to);
        let part = &wanted[range.start as usize..range.end as usize];
        let mut read = vec![7; part.len()];
        layers.read_exact_at(&mut read, range.start).unwrap();
        prop_assert!(read == part && told(&layers, range.clone()) == part);
        prop_assert!(layers.read_exact_at(&mut [0; 2], length - 1).is_err());
        // What is filled from it is whole.
        let (volume, watch) = (tempfile::tempfile().unwrap(), Watch::default());
        fill(&layers, &volume, length + PAGE, &watch).unwrap();
        let whole = bytes(&Layers::one(twin(&volume)));
        prop_assert!(whole[..length as usize] == wanted && whole[length as usize..].iter().all(|byte| *byte == 0));
    }
}
