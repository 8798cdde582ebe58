//! Changes inputs as fuzzers do, from one number: bits, bytes, lengths, pieces. No feedback from who reads them.

/// Bytes at which readers turn: ends of ranges, and what separates text.
const BYTES: [u8; 16] = [0, 1, 2, 3, 4, 0x10, 0x20, b'"', b'-', b'.', b'/', b'9', 0x7F, 0x80, 0xFE, 0xFF];

/// Most changes to one input. Few, so that most of it still says what its seed said.
const CHANGES_MAX: usize = 4;

/// Most bytes that are put in or taken out at once.
const PIECE_BYTES_MAX: usize = 64;

/// Changes `input` in one to [`CHANGES_MAX`] places; `other` is an input of which it may take the end.
pub fn change(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(CHANGES_MAX) {
        let at = random.below(input.len() + 1);
        let end = input.len().min(at + 1 + random.below(PIECE_BYTES_MAX));
        match random.below(9) {
            0 | 1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            2 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = *random.one_of(&BYTES);
                }
            }
            3 | 4 => number(input, at, random),
            5 => {
                let piece: Vec<u8> = match random.below(2) {
                    0 => input[at..end].to_vec(),
                    _ => (0..=random.below(8)).map(|_| *random.one_of(&BYTES)).collect(),
                };
                let to = random.below(input.len() + 1);
                input.splice(to..to, piece);
            }
            6 => drop(input.drain(at..end)),
            7 => input.truncate(at),
            _ => {
                input.truncate(at);
                input.extend(&other[random.below(other.len() + 1)..]);
            }
        }
    }
}

/// Has two, four or eight bytes say another number: a little more or less, one at an edge, or about the input's length.
fn number(input: &mut [u8], at: usize, random: &mut Random) {
    let length = input.len() as u64;
    let width = *random.one_of(&[2, 4, 8]);
    let Some(bytes) = input.get_mut(at..at + width) else { return };
    let mut wide = [0; 8];
    wide[..width].copy_from_slice(bytes);
    let small = random.below(17) as u64;
    let value = match random.below(4) {
        0 => u64::from_le_bytes(wide).wrapping_add(small).wrapping_sub(8),
        1 => (1_u64 << random.below(8 * width)).wrapping_add(small).wrapping_sub(8),
        2 => u64::MAX - small,
        _ => length.wrapping_add(small).wrapping_sub(8),
    };
    bytes.copy_from_slice(&value.to_le_bytes()[..width]);
}

/// Numbers that look random, and are the same from the same start. Source: Vigna's splitmix64.
pub struct Random(u64);

impl Random {
    /// For input `index` of those that `seed` stands for.
    pub fn new(seed: u64, index: u64) -> Random {
        let start = Random(seed).next();
        Random(start ^ Random(index).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// One of the numbers below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// One of several.
    pub fn one_of<'a, T>(&mut self, several: &'a [T]) -> &'a T {
        &several[self.below(several.len())]
    }
}
