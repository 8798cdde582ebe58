use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

fn inputs(count: u64) -> Vec<Vec<u8>> {
    let found = RefCell::new(Vec::new());
    vary("wire", count, |input| found.borrow_mut().push(input.to_vec()));
    found.into_inner()
}

#[test]
fn inputs_are_the_same_each_time_and_differ_from_one_another() {
    let (first, again) = (inputs(500), inputs(400));
    assert_eq!(first[..400], again);
    let distinct: std::collections::BTreeSet<&Vec<u8>> = first.iter().collect();
    assert!(distinct.len() > 450, "{} of 500", distinct.len());
    assert!(first.iter().all(|input| input.len() <= INPUT_BYTES_MAX));
}

#[test]
fn a_length_that_is_believed_is_found_soon() {
    // A reader of pieces with their length before them, which looks at most lengths but not at all.
    let reader = |input: &[u8]| {
        let mut rest = input;
        while let Some((head, following)) = rest.split_first_chunk() {
            let length = u16::from_le_bytes(*head) as usize;
            if length > following.len() + 1 {
                return;
            }
            rest = &following[length..];
        }
    };
    let piece = [&[6, 0][..], b"pieces"].concat();
    let seed = piece.repeat(3);
    let finds = |index: u64| {
        let (mut input, mut random) = (seed.clone(), Random::new(1, index));
        change(&mut input, &piece, &mut random);
        catch_unwind(AssertUnwindSafe(|| reader(&input))).is_err()
    };
    assert!((0..500).any(finds));
}

#[test]
fn an_input_that_fails_is_kept() {
    let failed = RefCell::new(Vec::new());
    let run = || {
        vary("queue", 10, |input| {
            *failed.borrow_mut() = input.to_vec();
            assert!(input.is_empty(), "as it should be here");
        });
    };
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    let name = format!("queue-{}", std::process::id());
    let file = root().join("target/fuzz/varied").join(name);
    assert_eq!(fs::read(&file).unwrap(), failed.into_inner());
    fs::remove_file(file).unwrap();
}
