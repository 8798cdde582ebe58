//! What fuzzers call for lists of used memory: their text, or ranges of which a list is made. What is read ahead lies in its file and
//! in order, in whichever file has it, and nothing of it twice. No part of the daemon.
use wire::saved::lower::{Lower, Run};

use super::*;

/// Not whole pages, and longer than a long run.
const FILE_BYTES: u64 = (3 << 20) + 512;
/// What lies in the lower file.
const BELOW: Range<u64> = 1 << 20..2 << 20;

/// Reads `data` as a list's text, or as ranges that were found in use, as its first byte says.
pub fn used(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 2 {
        0 => match Used::parse(rest) {
            Ok(used) => judge(&used),
            Err(refused) => assert_eq!(refused.kind(), io::ErrorKind::InvalidData),
        },
        _ => joined(rest),
    }
}

/// Four bytes say which page, two how many. Every page that was found lies in a run, and the list can be read.
fn joined(data: &[u8]) {
    let (rows, _) = data.as_chunks();
    let ranges: Vec<Range<u64>> = rows
        .iter()
        .map(|[p0, p1, p2, p3, c0, c1]| {
            let start = u64::from(u32::from_le_bytes([*p0, *p1, *p2, *p3])) * PAGE_BYTES;
            start..start + (u64::from(u16::from_le_bytes([*c0, *c1])) + 1) * PAGE_BYTES
        })
        .collect();
    let used = Used::of(ranges.clone());
    for range in ranges {
        let holds = |(offset, bytes): &(u64, u64)| *offset <= range.start && offset + bytes >= range.end;
        assert!(used.runs.iter().any(holds), "{range:?} was left out");
    }
    let text = serde_json::to_vec(&used).expect("it can be written");
    assert!(text.len() as u64 <= USED_BYTES_MAX);
    assert_eq!(Used::parse(&text).expect("it was just written"), used);
    judge(&used);
}

fn judge(used: &Used) {
    let file = |bytes| sys::memfd::create("memory", bytes).expect("a memory file");
    let run = Run { offset: BELOW.start, bytes: BELOW.end - BELOW.start, file: 0 };
    let lower = Lower { bytes: FILE_BYTES, files: 1, runs: vec![run] };
    let layers = Layers::new(file(FILE_BYTES), lower, vec![file(BELOW.end)]).expect("it is long enough");
    let mut end = 0;
    for (file, piece) in pieces(&layers, used.runs.iter(), FILE_BYTES, AHEAD_PIECE_BYTES) {
        assert!(piece.start >= end && piece.end > piece.start, "{piece:?} was read before");
        assert!(piece.end <= FILE_BYTES, "{piece:?} lies beyond the file");
        assert!(piece.end - piece.start <= AHEAD_PIECE_BYTES);
        let is_below = BELOW.contains(&piece.start);
        assert!(std::ptr::eq(file.expect("there are both"), layers.file(is_below.then_some(0)).unwrap()));
        end = piece.end;
    }
    read_ahead(&layers, used).expect("a memory file can be read");
}
