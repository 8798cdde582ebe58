//! Copies of a disk as it was at one moment, whose guest writes on.
use proptest::prelude::*;

use super::*;
use crate::limits::KEPT_BYTES;

const PART_SECTORS: u64 = KEPT_BYTES / 512;

fn target() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file
}

fn whole(file: &File) -> Vec<u8> {
    let mut data = vec![0xee; (SECTORS * 512) as usize];
    file.read_exact_at(&mut data, 0).unwrap();
    data
}

/// Begins a copy as a VMM does, with nothing in flight.
fn keep(driver: &mut Driver, target: &File) -> Arc<Keeping> {
    driver.active().pause().unwrap();
    let keeping = driver.disk.keep(target.try_clone().unwrap());
    driver.active().resume();
    keeping
}

#[test]
fn what_is_about_to_change_is_copied_first_and_once() {
    each_engine(|engine| {
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        let (target, before) = (target(), whole(&driver.file));
        let keeping = keep(&mut driver, &target);
        let fill = vec![0xaa; 1024];
        // Over the edge of two parts, and again.
        for _ in 0..2 {
            assert_eq!(driver.write(PART_SECTORS - 1, &fill), OK);
        }
        assert_eq!(driver.ask(VIRTIO_BLK_T_DISCARD, 0, &range(3 * PART_SECTORS, 8, 0), 0).0, OK);
        assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(4 * PART_SECTORS, 8, 1), 0).0, OK);
        assert_eq!(driver.read(5 * PART_SECTORS, 512).0, OK);
        let Kept { written_bytes, waits, waited_us, waited_us_max } = keeping.kept();
        // The first sector of a disk of these holds zeroes, which is less than a block.
        assert_eq!((written_bytes, waits), (3 * KEPT_BYTES, 2), "a discard changes nothing meanwhile");
        assert!(waited_us >= waited_us_max);
        let (mut at, mut steps) = (0, 0);
        while let Some(next) = keeping.copy_next(&driver.disk, at).unwrap() {
            (at, steps) = (next, steps + 1);
        }
        keeping.finish().unwrap();
        driver.disk.forget_keeping();
        assert!(steps <= SECTORS * 512 / KEPT_BYTES);
        assert!(whole(&target) == before);
        assert_eq!(driver.write(8 * PART_SECTORS, &fill), OK);
        assert_eq!(keeping.kept().waits, 2, "it is over");
        assert!(whole(&target) == before);
    });
}

#[test]
fn a_copy_that_fails_is_in_nobodys_way() {
    let mut driver = Driver::new(Setup::default());
    // As long as the disk, and nothing can be written to it.
    let (path, before) = (tempfile::NamedTempFile::new().unwrap(), whole(&driver.file));
    path.as_file().set_len(SECTORS * 512).unwrap();
    let keeping = keep(&mut driver, &File::open(path.path()).unwrap());
    assert_eq!(driver.write(0, &[0xaa; 512]), OK);
    keeping.copy_next(&driver.disk, 0).unwrap_err();
    keeping.finish().unwrap_err();
    assert_eq!(driver.write(2 * PART_SECTORS, &[0xaa; 512]), OK);
    // The next one has what is there then.
    let (target, mut now) = (target(), before);
    now[..512].fill(0xaa);
    now[(2 * KEPT_BYTES) as usize..][..512].fill(0xaa);
    let keeping = keep(&mut driver, &target);
    assert_eq!(driver.write(0, &[0xbb; 512]), OK);
    let mut at = 0;
    while let Some(next) = keeping.copy_next(&driver.disk, at).unwrap() {
        at = next;
    }
    keeping.finish().unwrap();
    assert!(whole(&target) == now);
}

#[test]
fn a_hole_stays_one() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file.write_all_at(&[7; 4096], 3 * KEPT_BYTES + 8192).unwrap();
    let before = whole(&file);
    let (mut driver, target) = (Driver::over(file, Setup::default()), target());
    let keeping = keep(&mut driver, &target);
    assert_eq!(driver.write(0, &[0xaa; 4096]), OK);
    assert_eq!(
        keeping.copy_next(&driver.disk, 0).unwrap(),
        Some(KEPT_BYTES),
        "it has data now, and had none"
    );
    assert_eq!(keeping.copy_next(&driver.disk, KEPT_BYTES).unwrap(), Some(4 * KEPT_BYTES));
    assert_eq!(keeping.copy_next(&driver.disk, 4 * KEPT_BYTES).unwrap(), None);
    keeping.finish().unwrap();
    assert_eq!(keeping.kept().written_bytes, 4096);
    assert!(whole(&target) == before);
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&target.metadata().unwrap()), 8);
}

#[test]
fn who_comes_second_for_a_part_waits_for_the_first() {
    let driver = Driver::new(Setup::default());
    for is_given_up in [false, true] {
        let keeping = driver.disk.keep(target());
        assert!(keeping.claim(0));
        let (disk, theirs) = (driver.disk.clone(), Arc::clone(&keeping));
        let (begins, has_begun) = std::sync::mpsc::channel();
        let second = std::thread::spawn(move || {
            begins.send(()).unwrap();
            theirs.before_change(&disk, 512, 512);
        });
        has_begun.recv().unwrap();
        for _ in 0..2000 {
            std::thread::yield_now();
            assert!(!second.is_finished(), "nobody has copied it");
        }
        if is_given_up {
            keeping.end()
        } else {
            keeping.copy(&driver.disk, 0)
        }
        second.join().unwrap();
    }
}

/// A thread copies, another serves a guest that writes all over the disk.
#[test]
fn a_copy_is_of_its_moment_however_much_is_written_meanwhile() {
    each_engine(|engine| {
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        for round in 0..20_u8 {
            let (target, before) = (target(), whole(&driver.file));
            let keeping = keep(&mut driver, &target);
            let disk = driver.disk.clone();
            let copier = std::thread::spawn(move || {
                let mut at = 0;
                while let Some(next) = keeping.copy_next(&disk, at).unwrap() {
                    at = next;
                }
                keeping.finish().unwrap();
                disk.forget_keeping();
            });
            // From behind, so that they meet.
            for part in (0..SECTORS / PART_SECTORS).rev() {
                driver.tidy();
                assert_eq!(driver.write(part * PART_SECTORS + 5, &vec![round; 4096]), OK);
            }
            copier.join().unwrap();
            assert!(whole(&target) == before, "round {round}");
        }
    });
}

#[derive(Debug, Clone)]
enum Step {
    Write { sector: u64, sectors: u32, byte: u8 },
    Zeroes { sector: u64, sectors: u32, unmap: u32 },
    Copy,
    Reactivate,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (sector, sectors) = (0..SECTORS - 300, 1..300_u32);
    let step = prop_oneof![
        4 => (sector.clone(), sectors.clone(), any::<u8>())
            .prop_map(|(sector, sectors, byte)| Step::Write { sector, sectors, byte }),
        2 => (sector, sectors, 0..2_u32)
            .prop_map(|(sector, sectors, unmap)| Step::Zeroes { sector, sectors, unmap }),
        4 => Just(Step::Copy),
        1 => Just(Step::Reactivate),
    ];
    proptest::collection::vec(step, 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn copies_have_what_was_there(steps in steps(), is_plain in any::<bool>(), is_overlay in any::<bool>()) {
        let engine = if is_plain { Engine::Plain } else { Engine::IoUring };
        let content: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 1536) as u8).collect();
        let source = tempfile::tempfile().unwrap();
        source.write_all_at(&content, 0).unwrap();
        let (file, backing) = if is_overlay { (target(), Some(source)) } else { (source, None) };
        let mut driver = Driver::over(file, Setup { engine, backing, ..Setup::default() });
        let target = target();
        let keeping = keep(&mut driver, &target);
        let mut at = Some(0);
        for step in steps {
            driver.tidy();
            match step {
                Step::Write { sector, sectors, byte } => {
                    prop_assert_eq!(driver.write(sector, &vec![byte; sectors as usize * 512]), OK);
                }
                Step::Zeroes { sector, sectors, unmap } => {
                    let zeroes = range(sector, sectors, unmap);
                    prop_assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &zeroes, 0).0, OK);
                }
                Step::Copy => {
                    if let Some(from) = at {
                        at = keeping.copy_next(&driver.disk, from).unwrap();
                    }
                }
                // Another driver of the same disk, after a reset.
                Step::Reactivate => {
                    driver.active.take().unwrap().stop();
                    let Driver { bench, ring, block, .. } = &mut driver;
                    *ring = bench.ring(256);
                    let (wiring, heard) = bench.wiring(&[&*ring], block.features());
                    driver.active = Some(driver.block.activate(wiring).unwrap());
                    driver.heard = heard;
                }
            }
        }
        while let Some(from) = at {
            at = keeping.copy_next(&driver.disk, from).unwrap();
        }
        keeping.finish().unwrap();
        prop_assert!(whole(&target) == content);
    }
}
