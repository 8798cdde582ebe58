//! A disk over a backing file.
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

use super::*;
use crate::virtio::Handler;
use crate::virtio::bench::PATIENCE;
use crate::virtio::block::overlay::BLOCK_BYTES;

const BLOCK_SECTORS: u64 = BLOCK_BYTES / 512;
/// The disk reaches further, and the backing file ends within a block.
const BACKED_SECTORS: u64 = SECTORS / 2 + 3;

fn content(sectors: u64) -> Vec<u8> {
    (0..sectors * 512).map(|at| 1 + (at / 512 % 255) as u8).collect()
}

fn backing() -> (File, Vec<u8>) {
    backing_of(BACKED_SECTORS)
}

/// Every third block is a hole.
fn backing_of(sectors: u64) -> (File, Vec<u8>) {
    let (file, mut content) = (tempfile::tempfile().unwrap(), content(sectors));
    for (at, block) in content.chunks_mut(BLOCK_BYTES as usize).enumerate() {
        if at % 3 == 2 {
            block.fill(0);
        } else {
            file.write_all_at(block, at as u64 * BLOCK_BYTES).unwrap();
        }
    }
    file.set_len(sectors * 512).unwrap();
    content.resize((SECTORS * 512) as usize, 0);
    (file, content)
}

fn own() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file
}

fn over(own: &File, backing: &File, engine: Engine) -> Driver {
    let backing = Some(backing.try_clone().unwrap());
    Driver::over(own.try_clone().unwrap(), Setup { engine, backing, ..Setup::default() })
}

/// What a disk reads as, past its driver.
fn all(disk: &Disk) -> Vec<u8> {
    let mut data = vec![0xee; (SECTORS * 512) as usize];
    disk.read_exact_at(&mut data, 0).unwrap();
    data
}

fn fill_all(disk: &Disk) {
    while let Some(piece) = disk.read_ahead().unwrap() {
        disk.fill(&piece).unwrap();
    }
    disk.sync().unwrap();
    disk.make_whole().unwrap();
}

#[test]
fn what_is_not_written_is_read_from_the_backing_file_and_a_read_may_have_both() {
    each_engine(|engine| {
        let (own, (backing, mut oracle)) = (own(), backing());
        let mut driver = over(&own, &backing, engine);
        let blocks_before = own.metadata().unwrap().blocks();
        assert_eq!(driver.write(BLOCK_SECTORS, &[0xaa; 4096]), OK);
        assert_eq!(driver.write(3 * BLOCK_SECTORS + 2, &[0xbb; 512]), OK);
        oracle[4096..8192].fill(0xaa);
        oracle[12288 + 1024..12288 + 1536].fill(0xbb);
        let bytes = 6 * BLOCK_BYTES as usize;
        assert_eq!(driver.read(0, bytes as u32), (OK, oracle[..bytes].to_vec()));
        // Around the end of the backing file.
        let (first, sectors) = (BACKED_SECTORS - 5, 16);
        let around = oracle[first as usize * 512..][..sectors * 512].to_vec();
        assert_eq!(driver.read(first, sectors as u32 * 512), (OK, around));
        let written = (own.metadata().unwrap().blocks() - blocks_before) * 512;
        assert_eq!(written, 2 * BLOCK_BYTES, "two blocks, one of them copied up for its other sectors");
        assert_eq!(seen(&driver.stats.reads), 2);
        assert!(all(&driver.disk) == oracle);
    });
}

#[test]
fn nothing_becomes_a_hole_again() {
    each_engine(|engine| {
        let (own, (backing, mut oracle)) = (own(), backing());
        let mut driver = over(&own, &backing, engine);
        for unmap in [0, 1] {
            let sector = 4 * BLOCK_SECTORS * (1 + u64::from(unmap)) - 3;
            let zeroed = range(sector, 20, unmap);
            assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &zeroed, 0).0, OK);
            oracle[sector as usize * 512..][..20 * 512].fill(0);
        }
        assert_eq!(driver.write(0, &[0xcc; 4096]), OK);
        oracle[..4096].fill(0xcc);
        assert_eq!(driver.ask(VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 0), 0).0, OK);
        assert_eq!(seen(&driver.stats.discards), 3);
        assert!(all(&driver.disk) == oracle);
        driver.active.take().unwrap().stop();
        let again = Disk::plain(own.try_clone().unwrap(), Some(backing), Access::ReadWrite).unwrap();
        assert!(all(&again) == oracle, "nor for the next who opens it");
        fill_all(&again);
        assert_eq!((again.shared_bytes(), all(&again) == oracle), (0, true));
        let alone = Disk::plain(own, None, Access::ReadWrite).unwrap();
        assert!(all(&alone) == oracle, "the file holds all of it");
    });
}

/// While a whole block is being written, a part of it is not copied up over that.
#[test]
fn a_part_of_a_block_waits_for_the_whole_of_it() {
    each_engine(|engine| {
        let (own, (backing, _)) = (own(), backing());
        let mut driver = over(&own, &backing, engine);
        driver.active.take().unwrap().stop();
        let (features, signals) = (driver.block.features(), driver.heard.clone());
        let mut service =
            driver.block.service(driver.ring.wiring(0, features), signals, features, None).unwrap();
        let whole = driver.send(VIRTIO_BLK_T_OUT, BLOCK_SECTORS, &[0xaa; 4096], 0);
        service.take_requests().unwrap();
        service.submit();
        // It is written, which nobody has looked at yet.
        let parts = [(6, 0xbb), (2, 0xcc)]
            .map(|(sector, byte)| driver.send(VIRTIO_BLK_T_OUT, BLOCK_SECTORS + sector, &[byte; 512], 0));
        service.take_requests().unwrap();
        assert_eq!(Handler::in_flight(&service), 3, "one that waits counts, too");
        let (sent, mut answers) = ([[whole].as_slice(), &parts].concat(), 0);
        let end = Instant::now() + PATIENCE;
        while answers < sent.len() {
            assert!(Instant::now() < end, "{answers} answers");
            service.serve().unwrap();
            answers += driver.ring.take_used().iter().count();
        }
        assert!(sent.iter().all(|sent| driver.bench.bytes(sent.status, 1) == [OK]));
        let mut wanted = vec![0xaa; 4096];
        wanted[6 * 512..7 * 512].fill(0xbb);
        wanted[2 * 512..3 * 512].fill(0xcc);
        assert_eq!(driver.on_disk(BLOCK_SECTORS, 4096), wanted);
    });
}

#[test]
fn what_cannot_be_copied_up_is_an_error_and_changes_nothing() {
    each_engine(|engine| {
        let (backing, oracle) = backing();
        let own = memfd_create("own", MFdFlags::MFD_ALLOW_SEALING).map(File::from).unwrap();
        own.set_len(SECTORS * 512).unwrap();
        let mut driver = over(&own, &backing, engine);
        assert_eq!(driver.write(1, &[0xaa; 512]), OK);
        // From here on nothing can be written to it, as to a disk that is full.
        fcntl(&own, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        for (sector, sectors) in [(BLOCK_SECTORS + 1, 1), (BLOCK_SECTORS, 8), (BLOCK_SECTORS - 3, 20)] {
            assert_eq!(driver.write(sector, &vec![0xbb; sectors * 512]), IOERR);
        }
        assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(9, 30, 0), 0).0, IOERR);
        assert_eq!(seen(&driver.stats.errors), 4);
        let (piece, before) = (driver.disk.read_ahead().unwrap().unwrap(), driver.disk.shared_bytes());
        driver.disk.fill(&piece).unwrap_err();
        assert_eq!(driver.disk.shared_bytes(), before);
        let wanted = [&oracle[..512], &[0xaa; 512], &oracle[1024..]].concat();
        assert!(all(&driver.disk) == wanted);
    });
}

/// As after a loss of power between the one and the other. What is read beside it would make data of it.
#[test]
fn space_that_was_given_and_not_written_is_taken_away_before_anything_is_read() {
    let (own, (backing, mut oracle)) = (own(), backing());
    let mode = nix::fcntl::FallocateFlags::empty();
    nix::fcntl::fallocate(&own, mode, 0, 256 << 10).unwrap();
    own.write_all_at(&[0xaa; 64 << 10], 0).unwrap();
    own.sync_all().unwrap();
    oracle[..64 << 10].fill(0xaa);
    sys::holes::clear_unwritten(&own).unwrap();
    let drop_cache = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(&own, 0, 0, drop_cache).unwrap();
    // With what the kernel reads ahead.
    own.read_exact_at(&mut [0; 64 << 10], 0).unwrap();
    let disk = Disk::plain(own, Some(backing), Access::ReadWrite).unwrap();
    assert!(all(&disk) == oracle);
}

#[test]
fn what_a_flush_has_lost_makes_no_disk_whole_and_the_guest_is_told() {
    each_engine(|engine| {
        let (own, (backing, _)) = (own(), backing());
        let mut driver = over(&own, &backing, engine);
        driver.disk.lose_untold();
        assert_eq!(driver.write(0, &[1; 512]), OK);
        let flush = |driver: &mut Driver| driver.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0;
        assert_eq!([flush(&mut driver), flush(&mut driver)], [IOERR, OK], "once");
        while let Some(piece) = driver.disk.read_ahead().unwrap() {
            driver.disk.fill(&piece).unwrap();
        }
        let refused = driver.disk.make_whole().unwrap_err().to_string();
        assert!(refused.contains("could not be written to the medium"), "{refused}");
        assert!(driver.disk.shared_bytes() > 0);
    });
}

/// Writes that are done as one are all told, and none is written again.
#[test]
fn what_was_lost_is_told_to_durable_writes_that_are_done_as_one() {
    each_engine(|engine| {
        let (own, (backing, _)) = (own(), backing());
        let setup =
            Setup { engine, cache: CacheMode::Writethrough, backing: Some(backing), ..Setup::default() };
        let mut driver = Driver::over(own, setup);
        driver.active.take().unwrap().stop();
        let (features, signals) = (driver.block.features(), driver.heard.clone());
        let wiring = driver.ring.wiring(0, features);
        let mut service = driver.block.service(wiring, signals, features, None).unwrap();
        for wanted in [IOERR, OK] {
            if wanted == IOERR {
                driver.disk.lose_untold();
            }
            let sent = [0, 8, 16].map(|sector| driver.send(VIRTIO_BLK_T_OUT, sector, &[7; 4096], 0));
            let (mut answers, end) = (0, Instant::now() + PATIENCE);
            while answers < sent.len() {
                assert!(Instant::now() < end, "{answers} answers");
                service.serve().unwrap();
                answers += driver.ring.take_used().iter().count();
            }
            for sent in sent {
                assert_eq!(driver.bench.bytes(sent.status, 1), [wanted]);
            }
        }
        // Zeroes that are to be durable, too.
        driver.disk.lose_untold();
        let sent = driver.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 0), 0);
        let end = Instant::now() + PATIENCE;
        while driver.ring.take_used().is_none() {
            assert!(Instant::now() < end);
            service.serve().unwrap();
        }
        assert_eq!(driver.bench.bytes(sent.status, 1), [IOERR]);
    });
}

#[test]
fn a_backing_file_is_no_longer_than_the_disk() {
    let (own, backing) = (own(), tempfile::tempfile().unwrap());
    backing.set_len(SECTORS * 512 + 1).unwrap();
    let refused = Disk::plain(own, Some(backing), Access::ReadWrite).unwrap_err();
    let cause = std::error::Error::source(&refused).unwrap().to_string();
    assert!(cause.contains("more than the 1048576 of the disk"), "{cause}");
}

#[derive(Debug, Clone)]
enum Step {
    /// Requests that are sent together. No two have a sector in common, but blocks.
    Together(Vec<Ask>),
    /// A piece is filled in.
    Fill,
    /// All is, and it goes on so.
    MakeWhole,
    /// Another process opens both files.
    Reopen,
}

#[derive(Debug, Clone)]
struct Ask {
    kind: u32,
    /// Behind the end of the one before.
    gap: u64,
    sectors: u32,
    byte: u8,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    const KINDS: [u32; 4] = [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES];
    let ask = (proptest::sample::select(&KINDS[..]), 0..12_u64, 1..20_u32, any::<u8>());
    let ask = ask.prop_map(|(kind, gap, sectors, byte)| Ask { kind, gap, sectors, byte });
    let together = (0..SECTORS, proptest::collection::vec(ask, 1..7)).prop_map(|(from, mut asks)| {
        asks[0].gap = from;
        Step::Together(asks)
    });
    let step = prop_oneof![
        12 => together,
        2 => Just(Step::Fill),
        1 => Just(Step::MakeWhole),
        2 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn an_overlay_does_what_a_vector_of_bytes_does(
        steps in steps(),
        is_plain in any::<bool>(),
        ends_within_a_block in any::<bool>(),
    ) {
        let engine = if is_plain { Engine::Plain } else { Engine::IoUring };
        let sectors = if ends_within_a_block { BACKED_SECTORS } else { SECTORS / 2 };
        let (own, (backing, mut oracle)) = (own(), backing_of(sectors));
        let mut driver = over(&own, &backing, engine);
        for step in steps {
            driver.tidy();
            match step {
                Step::Fill => {
                    driver.active().pause().unwrap();
                    match driver.disk.read_ahead().unwrap() {
                        Some(piece) => driver.disk.fill(&piece).unwrap(),
                        None => driver.disk.make_whole().unwrap(),
                    }
                    driver.active().resume();
                }
                Step::MakeWhole => {
                    driver.active().pause().unwrap();
                    fill_all(&driver.disk);
                    driver.active().resume();
                    let alone = Disk::plain(own.try_clone().unwrap(), None, Access::ReadWrite).unwrap();
                    prop_assert!(all(&alone) == oracle);
                }
                Step::Reopen => {
                    driver.active.take().unwrap().stop();
                    drop(driver);
                    driver = over(&own, &backing, engine);
                }
                Step::Together(asks) => {
                    let (mut sent, mut sector) = (Vec::new(), 0);
                    for Ask { kind, gap, sectors, byte } in asks {
                        sector += gap;
                        let place = sector as usize * 512..(sector as usize + sectors as usize) * 512;
                        let Some(bytes) = oracle.get_mut(place) else { break };
                        let asked = match kind {
                            VIRTIO_BLK_T_IN => driver.send(kind, sector, &[], sectors * 512),
                            VIRTIO_BLK_T_OUT => {
                                bytes.fill(byte);
                                driver.send(kind, sector, bytes, 0)
                            }
                            _ => {
                                bytes.fill(0);
                                driver.send(kind, 0, &range(sector, sectors, u32::from(byte & 1)), 0)
                            }
                        };
                        let wanted = (kind == VIRTIO_BLK_T_IN).then(|| bytes.to_vec());
                        sent.push((asked, wanted));
                        sector += u64::from(sectors);
                    }
                    for _ in &sent {
                        driver.ring.wait_used(&driver.heard);
                    }
                    for (sent, wanted) in sent {
                        prop_assert_eq!(driver.bench.bytes(sent.status, 1), [OK]);
                        if let Some(wanted) = wanted {
                            prop_assert!(driver.bench.bytes(sent.data, wanted.len()) == wanted);
                        }
                    }
                }
            }
            prop_assert!(all(&driver.disk) == oracle);
        }
        prop_assert!(all(&Disk::plain(own, Some(backing), Access::ReadWrite).unwrap()) == oracle);
    }
}
