//! A guest that goes on as soon as it is answered. The service is called by hand.
use std::time::Instant;

use super::*;
use crate::virtio::bench::PATIENCE;

/// Whether a guest that goes on after an answer of the kernel's is asked to kick, once looking for it `pays` or not; and
/// whether the thread would serve it unasked.
fn after_an_answer(pays: bool) -> (bool, bool) {
    let mut driver = Driver::new(Setup { event_idx: true, ..Setup::default() });
    driver.active.take().unwrap().stop();
    let features = driver.block.features() | EVENT_IDX;
    let (wiring, signals) = (driver.ring.wiring(0, features), driver.heard.clone());
    let mut service = driver.block.service(wiring, signals, features, None).unwrap();
    let end = Instant::now() + PATIENCE;
    // A kick right after it went to sleep. A machine that is busy needs several tries to be soon.
    while service.lookout.pays() != pays {
        assert!(Instant::now() < end);
        service.lookout.sleeps(Instant::now());
        service.lookout.woken(Instant::now());
    }
    // The kernel's own thread does this one, so it is never answered at once.
    let flush = driver.send(VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    service.take_requests().unwrap();
    loop {
        assert!(Instant::now() < end);
        service.queue.ask_for_kicks().unwrap();
        let serves = service.answered().unwrap();
        if driver.bench.bytes(flush.status, 1) == [OK] {
            return (driver.ring.avail_event() == 1, serves);
        }
    }
}

#[test]
fn a_guest_that_goes_on_at_once_after_an_answer_needs_no_kick() {
    assert_eq!(after_an_answer(true), (false, true));
    assert_eq!(after_an_answer(false), (true, false));
}
