//! The walk of a virtqueue, against a second reading of the specification: what is popped is what the descriptors say,
//! heads are in flight once, and the used ring says what was completed.
use arbitrary::Unstructured;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Guest, Piece, Step, byte, word};
use crate::virtio::{Chain, Fault, Queue, Segment};

/// Bytes read from or written to one chain.
const BYTES_MAX: usize = 256;

/// Takes, holds, gives back and completes chains in any order.
pub fn queue(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut guest = Guest::new(&mut input, 1);
    let mut queue = guest.queue(0);
    let mut held: Vec<Chain> = Vec::new();
    // Taken and not given back, as the ring's index counts.
    let mut taken = 0_u16;
    let mut completed = 0_u16;
    let mut given_back_ends = 0;
    while let Some(step) = guest.next(&mut input) {
        let outcome = match step {
            Step::Kick(_) => take(&guest, &mut queue, &mut held, &mut taken),
            Step::Own(which) if !held.is_empty() => {
                let chain = held.remove(usize::from(which) % held.len());
                // What was taken before a completion may no longer be undone.
                given_back_ends = held.len();
                completed = completed.wrapping_add(1);
                complete(&guest, &mut queue, chain, completed.wrapping_sub(1), &mut input)
            }
            Step::Own(_) => queue.wants_signal().map(drop),
            Step::Pause if held.len() > given_back_ends => {
                if let Some(chain) = held.pop() {
                    queue.give_back(chain);
                    taken = taken.wrapping_sub(1);
                }
                Ok(())
            }
            Step::Pause => queue.silence_kicks(),
            Step::Resume => queue.ask_for_kicks().and_then(|_| queue.wants_signal().map(drop)),
        };
        assert_eq!(queue.in_flight(), held.len() + usize::from(outcome.is_err() && is_of_a_chain(&outcome)));
        if outcome.is_err() {
            return;
        }
    }
}

/// Whether a head was taken before the fault was found.
fn is_of_a_chain(outcome: &Result<(), Fault>) -> bool {
    matches!(outcome, Err(Fault::Chain { .. } | Fault::ChainTooLong { .. } | Fault::Order { .. }))
}

fn take(guest: &Guest, queue: &mut Queue, held: &mut Vec<Chain>, taken: &mut u16) -> Result<(), Fault> {
    let head = guest.head_at(0, *taken);
    let expected = guest.walk(0, head);
    let Some(chain) = queue.pop().inspect_err(|fault| match fault {
        Fault::HeadInFlight { head } => assert!(held.iter().any(|chain| chain.head() == *head)),
        Fault::HeadRange { head, size } => assert!(head >= size),
        Fault::Ring(_) | Fault::Protocol(_) => {}
        _ => assert_eq!(expected, None, "a chain that is right was refused: {fault}"),
    })?
    else {
        return Ok(());
    };
    *taken = taken.wrapping_add(1);
    assert_eq!(chain.head(), head);
    assert!(chain.head() < queue.size());
    assert!(held.iter().all(|other| other.head() != head), "head {head} is in flight twice");
    let pieces = |segments: &[Segment], writable| -> Vec<Piece> {
        let piece =
            |segment: &Segment| Piece { address: segment.address.0, length: segment.length, writable };
        segments.iter().map(piece).collect()
    };
    let found = [pieces(chain.readable(), false), pieces(chain.writable(), true)].concat();
    assert_eq!(Some(found), expected, "head {head}");
    read(guest, &chain);
    held.push(chain);
    Ok(())
}

/// The bytes that a chain reads are those that lie in its buffers.
fn read(guest: &Guest, chain: &Chain) {
    let total = usize::try_from(chain.readable_bytes()).unwrap();
    let mut data = vec![0; total.min(BYTES_MAX)];
    let offset = chain.readable_bytes() / 2;
    data.truncate(total - offset as usize);
    let outcome = chain.read(&guest.memory, offset, &mut data);
    let mut wanted = Vec::new();
    let mut skip = u64::from(offset);
    for segment in chain.readable() {
        let length = u64::from(segment.length);
        let skipped = skip.min(length);
        skip -= skipped;
        let take = (length - skipped).min((data.len() - wanted.len()) as u64);
        if take == 0 {
            continue;
        }
        let mut part = vec![0; take as usize];
        let inside = segment
            .address
            .0
            .checked_add(skipped)
            .is_some_and(|start| guest.memory.read_slice(&mut part, GuestAddress(start)).is_ok());
        if !inside {
            assert!(outcome.is_err() || data.is_empty(), "a buffer outside memory was read");
            return;
        }
        wanted.extend(part);
    }
    assert!(outcome.is_ok(), "buffers inside memory were not read: {outcome:?}");
    assert_eq!(data, wanted);
    let beyond = chain.read(&guest.memory, chain.readable_bytes(), &mut [0]);
    assert!(beyond.is_err(), "a byte beyond the chain was read");
}

/// Completes `chain` as number `at`.
fn complete(
    guest: &Guest,
    queue: &mut Queue,
    chain: Chain,
    at: u16,
    input: &mut Unstructured<'_>,
) -> Result<(), Fault> {
    let written = u32::from(word(input)) << (byte(input) % 17);
    let (head, room) = (u64::from(chain.head()), u64::from(chain.writable_bytes()));
    queue.complete(chain, written)?;
    assert_eq!(guest.used_element(0, at), head | u64::from(written).min(room) << 32);
    queue.wants_signal().map(drop)
}
