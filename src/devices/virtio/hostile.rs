//! Chains that no driver may make, for the tests of every device: each must break the device, say so once, and
//! leave memory, host and other devices alone.
use super::bench::{Bench, INDIRECT, NEXT, Part, Ring, WRITE, write_descriptor};

/// What is wrong, and how a guest offers it in a ring of at least four entries.
pub(crate) type Hostile = (&'static str, fn(&mut Bench, &mut Ring));

pub(crate) const CHAINS: &[Hostile] = &[
    ("points to itself", |_, ring| {
        ring.descriptor(0, 0x1000, 16, NEXT | WRITE, 0);
        ring.offer(0);
    }),
    ("loops over two", |_, ring| {
        ring.descriptor(0, 0x1000, 16, NEXT | WRITE, 1);
        ring.descriptor(1, 0x1000, 16, NEXT | WRITE, 0);
        ring.offer(0);
    }),
    ("goes on outside the table", |_, ring| {
        ring.descriptor(0, 0x1000, 16, NEXT | WRITE, ring.size);
        ring.offer(0);
    }),
    ("starts outside the table", |_, ring| ring.offer(ring.size)),
    ("adds up to more than 32 bits", |_, ring| {
        let head = ring.chain(&[Part::Write(0x1000, u32::MAX), Part::Write(0x1000, 1)]);
        ring.offer(head);
    }),
    ("reads after it writes", |_, ring| {
        let head = ring.chain(&[Part::Write(0x1000, 4), Part::Read(0x1000, 4)]);
        ring.offer(head);
    }),
    ("is indirect in indirect", |bench, ring| {
        let table = bench.buffer(32);
        write_descriptor(&bench.memory, table, table, 16, INDIRECT, 0);
        ring.descriptor(0, table, 16, INDIRECT, 0);
        ring.offer(0);
    }),
    ("has an indirect table of no length", |bench, ring| {
        let table = bench.buffer(16);
        ring.descriptor(0, table, 0, INDIRECT, 0);
        ring.offer(0);
    }),
    ("has an indirect table outside memory", |_, ring| {
        ring.descriptor(0, u64::MAX - 15, 16, INDIRECT, 0);
        ring.offer(0);
    }),
    ("is said to be one of more than the queue holds", |_, ring| ring.offer_index(ring.size + 1)),
];
