use std::io::Write;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;

const DISK_BYTES: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn memory() -> Arc<Ram> {
    crate::new(4 << 20).unwrap()
}

fn disk(content: &[u8]) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    Arc::new(file)
}

/// The same tests hold for both engines.
fn each_engine(test: impl Fn(&dyn Fn(Arc<File>, u16) -> Ring)) {
    test(&|file, depth| Ring::plain(file, depth).unwrap());
    let probe = Ring::new(disk(b""), 1).unwrap();
    match probe.fallback_cause() {
        None => test(&|file, depth| {
            let ring = Ring::new(file, depth).unwrap();
            assert_eq!(ring.engine(), Engine::IoUring);
            ring
        }),
        Some(cause) => skipped(cause),
    }
}

/// Past the capture of the test harness, so that it is always seen.
fn skipped(cause: &io::Error) {
    writeln!(io::stderr(), "skipped: io_uring: this host does not give it: {cause}").unwrap();
}

fn finish(ring: &mut Ring) -> Vec<Completed> {
    let mut done = Vec::new();
    assert!(ring.drain(PATIENCE, &mut done), "the ring did not drain");
    done
}

fn only(done: Vec<Completed>) -> io::Result<()> {
    let [completed]: [Completed; 1] = done.try_into().unwrap();
    completed.result
}

fn at(address: u64, length: u32) -> (GuestAddress, u32) {
    (GuestAddress(address), length)
}

#[test]
fn pieces_are_read_and_written_in_order() {
    each_engine(|ring_over| {
        let memory = memory();
        let file = disk(b"abcdefghij");
        let mut ring = ring_over(Arc::clone(&file), 4);
        ring.read(7, 2, &memory, [at(0x2000, 3), at(0x1000, 2)]).unwrap();
        ring.submit();
        let done = finish(&mut ring);
        assert_eq!(done[0].token, 7);
        only(done).unwrap();
        let (mut first, mut second) = ([0; 4], [0; 3]);
        memory.read_slice(&mut first, GuestAddress(0x2000)).unwrap();
        memory.read_slice(&mut second, GuestAddress(0x1000)).unwrap();
        assert_eq!((&first, &second), (b"cde\0", b"fg\0"));

        for durability in [Durability::Cached, Durability::Durable] {
            ring.write(1, 4, &memory, [at(0x1000, 1), at(0x2000, 2)], durability).unwrap();
            only(finish(&mut ring)).unwrap();
        }
        let mut content = [0; 10];
        file.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"abcdfcdhij");
    });
}

#[test]
fn what_is_not_guest_memory_is_refused_before_anything_happens() {
    each_engine(|ring_over| {
        let memory = memory();
        let mut ring = ring_over(disk(b"x"), 1);
        let end = memory.last_addr().0;
        for piece in
            [at(end, 2), at(end + 1, 1), at(u64::MAX, 1), at(u64::MAX - 1, u32::MAX), at(0, u32::MAX)]
        {
            assert_eq!(ring.read(0, 0, &memory, [at(0, 1), piece]), Err(Refused::Outside));
            let refused = ring.write(0, 0, &memory, [piece], Durability::Cached);
            assert_eq!(refused, Err(Refused::Outside));
        }
        assert_eq!(ring.read(0, 0, &memory, vec![at(0, 1); PIECES_MAX + 1]), Err(Refused::TooLong));
        assert_eq!(ring.read(0, u64::MAX, &memory, [at(0, 1)]), Err(Refused::Offset));
        assert_eq!(ring.punch(0, 1 << 62, 1 << 62), Err(Refused::Offset));
        assert_eq!(ring.in_flight(), 0);
        assert_eq!(Arc::strong_count(&memory), 1);
    });
}

#[test]
fn the_depth_bounds_what_is_in_flight() {
    each_engine(|ring_over| {
        let mut ring = ring_over(disk(b"x"), 2);
        ring.sync(1).unwrap();
        ring.sync(2).unwrap();
        assert!(!ring.has_room());
        assert_eq!(ring.sync(3), Err(Refused::Full));
        assert_eq!(finish(&mut ring).len(), 2);
        ring.sync(3).unwrap();
        assert_eq!(finish(&mut ring)[0].token, 3);
    });
}

#[test]
fn memory_lives_as_long_as_the_kernel_may_touch_it() {
    each_engine(|ring_over| {
        let memory = memory();
        let mut ring = ring_over(disk(&[1; 512]), 1);
        ring.read(0, 0, &memory, [at(0, 512)]).unwrap();
        assert_eq!(Arc::strong_count(&memory), 2);
        finish(&mut ring);
        assert_eq!(Arc::strong_count(&memory), 1);
        ring.read(0, 0, &memory, [at(0, 512)]).unwrap();
        drop(ring);
        assert_eq!(Arc::strong_count(&memory), 1);
    });
}

#[test]
fn a_read_past_the_end_of_the_file_is_an_error() {
    each_engine(|ring_over| {
        let memory = memory();
        let mut ring = ring_over(disk(&[1; 512]), 1);
        ring.read(0, 256, &memory, [at(0, 512)]).unwrap();
        assert_eq!(only(finish(&mut ring)).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_backing_file_is_only_read() {
    let (own, backing) = (disk(&[1; 8192]), disk(&[2; 4096]));
    let each: [fn(Files, u16) -> io::Result<Ring>; 2] = [Ring::new, Ring::plain];
    for open in each {
        let (memory, backing) = (memory(), Some(Arc::clone(&backing)));
        let mut ring = open(Files { own: Arc::clone(&own), backing }, 4).unwrap();
        ring.read(0, 0, &memory, [at(0, 512)]).unwrap();
        ring.read_backing(1, 512, &memory, [at(512, 256), at(1024, 256)]).unwrap();
        let done = finish(&mut ring);
        assert!(done.len() == 2 && done.iter().all(|completed| completed.result.is_ok()), "{done:?}");
        let mut read = [0; 1280];
        memory.read_slice(&mut read, GuestAddress(0)).unwrap();
        let wanted = [[1; 256], [1; 256], [2; 256], [0; 256], [2; 256]].concat();
        assert_eq!(read, wanted[..]);
        ring.read_backing(2, 2048, &memory, [at(0, 4096)]).unwrap();
        assert_eq!(only(finish(&mut ring)).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut without = open(Files::from(Arc::clone(&own)), 4).unwrap();
        without.read_backing(3, 0, &memory, [at(0, 512)]).unwrap();
        assert_eq!(only(finish(&mut without)).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}

#[test]
fn short_transfers_are_carried_on_with() {
    // The kernel moves at most 0x7fff_f000 bytes at a time; a sparse file and one small piece named again and
    // again make a longer request cheap to hold. Copying it takes seconds, so one engine has to do: carrying on
    // is not the engine's.
    let memory = memory();
    let file = tempfile::tempfile().unwrap();
    let length = 0x8000_0000_u64 + 4096;
    file.set_len(length).unwrap();
    file.write_all_at(b"tail", length - 4).unwrap();
    let mut ring = Ring::new(Arc::new(file), 1).unwrap();
    let mut pieces = vec![at(0, 2 << 20); 1022];
    pieces.extend([at(0, (4 << 20) - 4092), at(0x1000, 8188)]);
    assert_eq!(pieces.iter().map(|(_, length)| u64::from(*length)).sum::<u64>(), length);
    ring.read(0, 0, &memory, pieces).unwrap();
    only(finish(&mut ring)).unwrap();
    let mut tail = [0; 4];
    memory.read_slice(&mut tail, GuestAddress(0x1000 + 8184)).unwrap();
    assert_eq!(&tail, b"tail");
}

#[test]
fn interruptions_are_tried_again_but_not_for_ever() {
    let mut slot = Slot { kind: Kind::Sync, busy: true, ..Slot::default() };
    for _ in 0..RETRIES_MAX {
        assert!(slot.advance(-libc::EINTR).is_none());
    }
    assert_eq!(slot.advance(-libc::EINTR).unwrap().unwrap_err().raw_os_error(), Some(libc::EINTR));
}

#[test]
fn what_io_uring_refuses_is_done_plainly() {
    let memory = memory();
    let mut ring = Ring::new(disk(&[9; 4096]), 4).unwrap();
    for token in 0..2 {
        ring.read(token, 0, &memory, [at(0x1000 * token, 4096)]).unwrap();
    }
    ring.fall_back(io::Error::from_raw_os_error(libc::EPERM));
    ring.read(2, 0, &memory, [at(0x2000, 4096)]).unwrap();
    assert_eq!(ring.engine(), Engine::Plain);
    assert_eq!(ring.fallback_cause().and_then(io::Error::raw_os_error), Some(libc::EPERM));
    let done = finish(&mut ring);
    assert_eq!(done.len(), 3);
    assert!(done.iter().all(|completed| completed.result.is_ok()));
    let mut read = [0; 0x3000];
    memory.read_slice(&mut read, GuestAddress(0)).unwrap();
    assert!(read.iter().all(|byte| *byte == 9));
}

#[test]
fn errors_of_the_file_are_answers() {
    each_engine(|ring_over| {
        let memory = memory();
        let path = tempfile::NamedTempFile::new().unwrap();
        let mut ring = ring_over(Arc::new(File::open(path.path()).unwrap()), 1);
        ring.write(0, 0, &memory, [at(0, 512)], Durability::Cached).unwrap();
        assert_eq!(only(finish(&mut ring)).unwrap_err().raw_os_error(), Some(libc::EBADF));
    });
}

#[test]
fn zeroes_are_written_over_ranges_longer_than_their_source() {
    each_engine(|ring_over| {
        let file = disk(&[7; DISK_BYTES]);
        let mut ring = ring_over(Arc::clone(&file), 1);
        let refused = ring.write_zeroes(0, 0, Ring::WRITE_ZEROES_BYTES_MAX + 1, Durability::Cached);
        assert_eq!(refused, Err(Refused::TooLong));
        ring.write_zeroes(0, 512, 200_000, Durability::Cached).unwrap();
        only(finish(&mut ring)).unwrap();
        let mut content = vec![0; DISK_BYTES];
        file.read_exact_at(&mut content, 0).unwrap();
        assert!(content[..512].iter().all(|byte| *byte == 7));
        assert!(content[512..200_512].iter().all(|byte| *byte == 0));
        assert!(content[200_512..].iter().all(|byte| *byte == 7));
    });
}

#[test]
fn a_ring_that_moves_between_threads_goes_on() {
    each_engine(|ring_over| {
        let memory = memory();
        let mut ring = ring_over(disk(&[5; 4096]), 4);
        for round in 0..3_u8 {
            let memory = Arc::clone(&memory);
            ring = std::thread::spawn(move || {
                ring.read(round.into(), 0, &memory, [at(0, 4096)]).unwrap();
                only(finish(&mut ring)).unwrap();
                ring
            })
            .join()
            .unwrap();
        }
        assert_eq!(ring.in_flight(), 0);
    });
}

#[test]
fn the_event_tells_of_answers() {
    each_engine(|ring_over| {
        let memory = memory();
        let mut ring = ring_over(disk(&[5; 4096]), 4);
        let mut done = Vec::new();
        ring.read(0, 0, &memory, [at(0, 4096)]).unwrap();
        ring.submit();
        while done.is_empty() {
            let wait = PollTimeout::from(20_000_u16);
            let readable = poll(&mut [PollFd::new(ring.ready(), PollFlags::POLLIN)], wait).unwrap();
            assert_eq!(readable, 1, "no event came");
            ring.reap(&mut done);
        }
        let quiet = poll(&mut [PollFd::new(ring.ready(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap();
        assert_eq!(quiet, 0, "the event stays after everything was taken");
    });
}

#[test]
fn a_ring_does_nothing_but_what_it_was_made_for() {
    let file = disk(b"x");
    let ready = EventFd::new().unwrap();
    let mut uring = match Uring::new(&Files::from(file), ready.as_fd(), 4) {
        Ok(uring) => uring,
        Err(cause) => return skipped(&cause),
    };
    assert_eq!(uring.probe_refusals(), vec![Some(libc::EACCES); 4]);
}

#[derive(Debug, Clone)]
enum Step {
    Read { offset: usize, lengths: Vec<usize> },
    Write { offset: usize, lengths: Vec<usize>, seed: u8 },
    Punch { offset: usize, length: usize },
    Zero { offset: usize, length: usize },
    WriteZeroes { offset: usize, length: usize },
    Sync,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let offset = 0..DISK_BYTES / 2;
    let lengths = || proptest::collection::vec(1..5000_usize, 1..8);
    let length = 1..DISK_BYTES / 2;
    let step = prop_oneof![
        (offset.clone(), lengths()).prop_map(|(offset, lengths)| Step::Read { offset, lengths }),
        (offset.clone(), lengths(), any::<u8>()).prop_map(|(offset, lengths, seed)| Step::Write {
            offset,
            lengths,
            seed
        }),
        (offset.clone(), length.clone()).prop_map(|(offset, length)| Step::Punch { offset, length }),
        (offset.clone(), length.clone()).prop_map(|(offset, length)| Step::Zero { offset, length }),
        (offset, length).prop_map(|(offset, length)| Step::WriteZeroes { offset, length }),
        Just(Step::Sync),
    ];
    proptest::collection::vec(step, 1..20)
}

/// Pieces of the lengths, apart from each other in memory and in reverse order.
fn scatter(lengths: &[usize]) -> Vec<(GuestAddress, u32)> {
    let place = |index: usize| 0x10_0000 - 0x3000 * index as u64;
    lengths.iter().enumerate().map(|(index, length)| at(place(index), *length as u32)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn both_engines_do_what_a_vector_of_bytes_does(steps in steps()) {
        each_engine(|ring_over| {
            let memory = memory();
            let mut oracle: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 512) as u8).collect();
            let file = disk(&oracle);
            let mut ring = ring_over(Arc::clone(&file), 2);
            for step in &steps {
                match step {
                    Step::Read { offset, lengths } => {
                        let pieces = scatter(lengths);
                        ring.read(0, *offset as u64, &memory, pieces.clone()).unwrap();
                        only(finish(&mut ring)).unwrap();
                        let mut from = *offset;
                        for (address, length) in pieces {
                            let mut read = vec![0; length as usize];
                            memory.read_slice(&mut read, address).unwrap();
                            assert_eq!(read, oracle[from..from + read.len()]);
                            from += read.len();
                        }
                    }
                    Step::Write { offset, lengths, seed } => {
                        let pieces = scatter(lengths);
                        let mut to = *offset;
                        for (address, length) in &pieces {
                            let data: Vec<u8> = (0..*length).map(|at| seed.wrapping_add(at as u8)).collect();
                            memory.write_slice(&data, *address).unwrap();
                            oracle[to..to + data.len()].copy_from_slice(&data);
                            to += data.len();
                        }
                        ring.write(0, *offset as u64, &memory, pieces, Durability::Cached).unwrap();
                        only(finish(&mut ring)).unwrap();
                    }
                    Step::Punch { offset, length } | Step::Zero { offset, length }
                    | Step::WriteZeroes { offset, length } => {
                        let (from, bytes) = (*offset as u64, *length as u64);
                        match step {
                            Step::Punch { .. } => ring.punch(0, from, bytes).unwrap(),
                            Step::Zero { .. } => ring.zero(0, from, bytes).unwrap(),
                            _ => ring.write_zeroes(0, from, bytes, Durability::Cached).unwrap(),
                        }
                        match only(finish(&mut ring)) {
                            Ok(()) => oracle[*offset..*offset + *length].fill(0),
                            // Not every file system can do either; then nothing has happened.
                            Err(cause) => assert_eq!(cause.raw_os_error(), Some(libc::EOPNOTSUPP)),
                        }
                    }
                    Step::Sync => {
                        ring.sync(0).unwrap();
                        only(finish(&mut ring)).unwrap();
                    }
                }
            }
            let mut content = vec![0; DISK_BYTES];
            file.read_exact_at(&mut content, 0).unwrap();
            assert_eq!(content, oracle);
        });
    }
}

#[test]
fn the_longest_requests_leave_no_storage_behind() {
    const DEPTH: usize = 64;
    each_engine(|ring_over| {
        let memory = memory();
        let mut ring = ring_over(disk(&[7; 4096]), DEPTH as u16);
        for token in 0..DEPTH as u64 {
            ring.read(token, 0, &memory, (0..PIECES_MAX).map(|piece| at(piece as u64, 1))).unwrap();
        }
        assert!(finish(&mut ring).into_iter().all(|done| done.result.is_ok()));
        let kept: usize = ring.slots.iter().map(|slot| slot.vectors.kept()).sum();
        assert!(kept <= 2 * DEPTH * vectors::PIECES_KEPT, "{kept} after answers");
        // So have those that were refused.
        for _ in 0..DEPTH {
            let outside = (0..PIECES_MAX).map(|piece| at(piece as u64, 1)).chain([at(u64::MAX - 8, 1)]);
            assert!(ring.read(0, 0, &memory, outside).is_err());
        }
        let kept: usize = ring.slots.iter().map(|slot| slot.vectors.kept()).sum();
        assert!(kept <= 2 * DEPTH * vectors::PIECES_KEPT, "{kept} after refusals");
    });
}
