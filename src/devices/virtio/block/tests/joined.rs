//! Writes that are done as one. The service is called by hand, so that they are there at once.
use std::time::Instant;

use super::*;
use crate::limits::BLOCK_JOINED_BYTES_MAX;
use crate::virtio::Handler;
use crate::virtio::bench::PATIENCE;

/// Has what was sent taken at once; the number of requests that the kernel got, and the answers by head.
fn serve(driver: &mut Driver, count: usize) -> (usize, std::collections::HashMap<u32, u32>) {
    let features = driver.block.features();
    let (wiring, signals) = (driver.ring.wiring(0, features), driver.heard.clone());
    let mut service = driver.block.service(wiring, signals, features, None).unwrap();
    service.take_requests().unwrap();
    let requests = service.in_flight();
    let (mut answers, end) = (std::collections::HashMap::new(), Instant::now() + PATIENCE);
    while answers.len() < count {
        assert!(Instant::now() < end, "{answers:?} of {count}");
        service.serve().unwrap();
        answers.extend(driver.ring.take_used());
    }
    assert_eq!((service.in_flight(), service.in_flight), (0, Default::default()));
    (requests, answers)
}

fn idle(setup: Setup) -> Driver {
    let mut driver = Driver::new(setup);
    driver.active.take().unwrap().stop();
    driver
}

#[test]
fn writes_side_by_side_are_one_request_and_have_an_answer_each() {
    each_engine(|engine| {
        let mut driver = idle(Setup { engine, ..Setup::default() });
        let writes = [(2, 1), (3, 2), (5, 1), (9, 1), (8, 1)];
        let sent = writes.map(|(sector, sectors): (u64, usize)| {
            driver.send(VIRTIO_BLK_T_OUT, sector, &vec![100 + sector as u8; sectors * 512], 0)
        });
        let (requests, answers) = serve(&mut driver, sent.len());
        assert_eq!(requests, 3, "the first three are one, and the last two are the wrong way round");
        for sent in &sent {
            assert_eq!((answers[&u32::from(sent.head)], driver.bench.bytes(sent.status, 1)[0]), (1, OK));
        }
        for (sector, byte) in [(2, 102), (3, 103), (4, 103), (5, 105), (6, 6), (8, 108), (9, 109)] {
            assert_eq!(driver.on_disk(sector, 512), [byte; 512], "sector {sector}");
        }
        assert_eq!((seen(&driver.stats.writes), seen(&driver.stats.written_bytes)), (5, 6 * 512));
    });
}

#[test]
fn a_piece_outside_memory_fails_its_own_write_alone() {
    each_engine(|engine| {
        let mut driver = idle(Setup { engine, ..Setup::default() });
        let before = driver.send(VIRTIO_BLK_T_OUT, 2, &[102; 512], 0);
        let (header, status) = (driver.header(VIRTIO_BLK_T_OUT, 3), driver.filled(&[UNANSWERED]));
        driver.ring.submit(&[Part::Read(header, 16), Part::Read(1 << 40, 512), Part::Write(status, 1)]);
        let after = driver.send(VIRTIO_BLK_T_OUT, 4, &[104; 512], 0);
        serve(&mut driver, 3);
        let statuses = [before.status, status, after.status].map(|at| driver.bench.bytes(at, 1)[0]);
        assert_eq!(statuses, [OK, IOERR, OK]);
        assert_eq!(driver.on_disk(2, 3 * 512), [[102; 512], [3; 512], [104; 512]].concat());
        assert_eq!(seen(&driver.stats.malformed), 1);
    });
}

#[test]
fn what_fails_as_one_is_tried_one_by_one() {
    each_engine(|engine| {
        let (mut named, path) = tempfile::NamedTempFile::new().unwrap().into_parts();
        std::io::Write::write_all(&mut named, &[7; 512 * 16]).unwrap();
        // Nothing can be written through this one, whatever the disk was made to think.
        let mut driver = Driver::over(File::open(&path).unwrap(), Setup { engine, ..Setup::default() });
        driver.active.take().unwrap().stop();
        let sent = [2, 3, 4].map(|sector| driver.send(VIRTIO_BLK_T_OUT, sector, &[1; 512], 0));
        let (requests, _) = serve(&mut driver, sent.len());
        assert_eq!(requests, 1);
        assert!(sent.iter().all(|sent| driver.bench.bytes(sent.status, 1) == [IOERR]));
        assert_eq!(seen(&driver.stats.errors), 3);
    });
}

#[test]
fn only_so_much_is_done_as_one() {
    let half = vec![9; BLOCK_JOINED_BYTES_MAX as usize / 2];
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * BLOCK_JOINED_BYTES_MAX).unwrap();
    let mut driver = Driver::over(file, Setup::default());
    driver.active.take().unwrap().stop();
    let sectors = half.len() as u64 / 512;
    for at in 0..3 {
        driver.send(VIRTIO_BLK_T_OUT, at * sectors, &half, 0);
    }
    assert_eq!(serve(&mut driver, 3).0, 2);
}
