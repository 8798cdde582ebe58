use proptest::prelude::*;

use super::*;

const LENGTH: u64 = 1 << 20;

fn run(offset: u64, bytes: u64, file: u32) -> Run {
    Run { offset, bytes, file }
}

fn lower(runs: Vec<Run>) -> Lower {
    Lower { bytes: LENGTH, files: 2, runs }
}

#[test]
fn what_is_joined_is_split_again() {
    for runs in [vec![], vec![run(0, 4096, 1), run(4096, 8192, 0), run(LENGTH - 4096, 4096, 1)]] {
        let lower = lower(runs);
        assert_eq!(Lower::split(&lower.join(), LENGTH), Ok(lower.clone()));
        assert!((lower.join().len() as u64) < LOWER_BYTES_MAX);
    }
    // A disk may end within a page.
    let odd = Lower { bytes: 5000, files: 1, runs: vec![run(4096, 904, 0)] };
    assert_eq!(Lower::split(&odd.join(), 5000), Ok(odd));
}

/// The bytes of the released version: they never change.
#[test]
fn the_golden_list_still_opens() {
    let golden = include_bytes!("golden/version-1");
    let wanted = lower(vec![run(0, 4096, 1), run(8192, 12_288, 0)]);
    assert_eq!(Lower::split(golden, LENGTH), Ok(wanted.clone()));
    assert_eq!(wanted.join(), golden);
}

#[test]
fn lists_that_cannot_be_are_refused_by_what_is_wrong() {
    let good = lower(vec![run(0, 4096, 1), run(8192, 4096, 0)]).join();
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Change); 12] = [
        ("does not begin", |bytes| bytes[0] = b'T'),
        ("has version 2", |bytes| bytes[8] = 2),
        ("tells of 16 files", |bytes| bytes[12] = 16),
        ("is one of 1048577 bytes", |bytes| bytes[16] = 1),
        ("ends before its end", |bytes| bytes.truncate(20)),
        ("47 bytes of runs", |bytes| bytes.truncate(71)),
        ("at 0x1 in", |bytes| bytes[24] = 1),
        ("a run of 0 bytes", |bytes| bytes[33] = 0),
        ("in file 2", |bytes| bytes[40] = 2),
        ("a run of 4096 bytes at 0x0", |bytes| bytes[44] = 1),
        ("at 0x0 in file 0", |bytes| bytes[48..56].fill(0)),
        ("at 0xff", |bytes| bytes[48..56].fill(0xFF)),
    ];
    for (wanted, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let refused = Lower::split(&bad, LENGTH).expect_err(wanted).to_string();
        assert!(refused.contains(wanted), "{refused} is not {wanted}");
    }
    assert!(Lower::split(&good, LENGTH - 4096).is_err());
}

#[test]
fn runs_that_continue_each_other_become_one() {
    let mut lower = lower(vec![]);
    for run in [run(0, 4096, 1), run(4096, 4096, 1), run(8192, 4096, 0), run(16_384, 4096, 0)] {
        lower.push(run);
    }
    assert_eq!(lower.runs, [run(0, 8192, 1), run(8192, 4096, 0), run(16_384, 4096, 0)]);
    assert_eq!(lower.lower_bytes(), 16_384);
}

/// By page: which file has it, from any list.
fn listed() -> impl Strategy<Value = (Lower, Vec<Option<u32>>)> {
    prop::collection::vec(prop::option::of(0..2_u32), 1..64).prop_map(|pages| {
        let mut lower = Lower { bytes: pages.len() as u64 * PAGE_BYTES, files: 2, runs: vec![] };
        for (page, file) in (0..).zip(&pages) {
            if let Some(file) = file {
                lower.push(run(page * PAGE_BYTES, PAGE_BYTES, *file));
            }
        }
        (lower, pages)
    })
}

proptest! {
    #[test]
    fn pieces_are_the_range_in_order_and_each_byte_where_it_lies(
        (lower, pages) in listed(),
        from in 0..70_000_u64,
        bytes in 0..300_000_u64,
    ) {
        prop_assert_eq!(Lower::split(&lower.join(), lower.bytes), Ok(lower.clone()));
        let mut at = from;
        for (piece, file) in lower.pieces(from..from + bytes) {
            prop_assert!(piece.start == at && piece.end > at, "{piece:?} follows {at}");
            at = piece.end;
            for byte in [piece.start, piece.end - 1] {
                let wanted = pages.get((byte / PAGE_BYTES) as usize).copied().flatten();
                prop_assert_eq!(file, wanted, "{}", byte);
            }
        }
        prop_assert_eq!(at, from + bytes);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), has_head in any::<bool>()) {
        let mut input = if has_head { lower(vec![]).join() } else { Vec::new() };
        input.extend(bytes);
        if let Ok(lower) = Lower::split(&input, LENGTH) {
            prop_assert_eq!(lower.join(), input);
        }
    }
}
