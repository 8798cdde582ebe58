//! Memory that has been found. On a machine that is a guest itself, a page that nobody has used for some seconds may have gone back to
//! its host, and whoever needs it next waits for that host to find another: many times what the kernel takes. The first servers of a
//! run would have pages that the ones before have just given back, the last ones such that have to be found.
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// Bytes of a piece, which is given back as a whole: more than a server takes.
const PIECE_BYTES: usize = 4 << 20;

const PAGE_BYTES: usize = 4096;

/// Pieces whose pages are there.
pub(crate) struct Stock {
    pieces: Vec<MmapRegion>,
    /// Microseconds that a page of each took to be there.
    pub(crate) new_us: Vec<f64>,
}

impl Stock {
    /// So many pieces.
    pub(crate) fn of(count: usize) -> Stock {
        let mut stock = Stock { pieces: Vec::new(), new_us: Vec::new() };
        for _ in 0..count {
            let (piece, us) = touched();
            stock.pieces.push(piece);
            stock.new_us.push(us);
        }
        stock
    }

    /// Gives one back, for whoever needs memory next.
    pub(crate) fn give(&mut self) {
        self.pieces.pop();
    }

    /// Microseconds that pages take which have just been given back, piece by piece.
    pub(crate) fn again_us(&mut self) -> Vec<f64> {
        let pieces = self.pieces.len().min(100);
        let again = |_| {
            self.give();
            let (piece, us) = touched();
            self.pieces.push(piece);
            us
        };
        (0..pieces).map(again).collect()
    }
}

/// A piece every page of which has been written to, and the microseconds that each page took. It is mapped, and not of the allocator,
/// which would keep what it is given back.
fn touched() -> (MmapRegion, f64) {
    let piece = MmapRegion::new(PIECE_BYTES).expect("memory");
    let begun = Instant::now();
    let pages = piece.as_volatile_slice();
    (0..PIECE_BYTES).step_by(PAGE_BYTES).for_each(|at| pages.store(1u8, at, Relaxed).expect("a page"));
    let us = begun.elapsed().as_secs_f64() * 1e6 / (PIECE_BYTES / PAGE_BYTES) as f64;
    (piece, us)
}
