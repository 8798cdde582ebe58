//! A guest that gives receive buffers one by one. The receiver is called by hand, so that nothing depends on time.
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::super::receive::Receiver;
use super::super::service::Shared;
use super::*;
use crate::limiter::{LimitsSlot, Throttle};

/// Packets that wait in the tap.
const PACKETS: u16 = 5;

#[test]
fn buffers_that_come_one_by_one_need_no_kick_each() {
    let (near, far) = UnixDatagram::pair().unwrap();
    let mut bench = Bench::new();
    let mut ring = bench.ring(16);
    let (mut wiring, heard) = bench.wiring(&[&ring], EVENT_IDX);
    let shared = Arc::new(Shared {
        link: Link::socket(File::from(OwnedFd::from(near))).unwrap(),
        memory: Arc::clone(&bench.memory),
        features: EVENT_IDX,
        mtu: 1500,
        stats: Arc::default(),
        signals: heard,
    });
    let slot = Arc::new(LimitsSlot::new(RateLimits::default()).unwrap());
    let mut receiver = Receiver::new(wiring.queues.remove(0), Throttle::new(slot).unwrap(), shared);
    for _ in 0..PACKETS {
        far.send(&[&[0; HEADER][..], &frame(1, 60)].concat()).unwrap();
    }
    let mut buffer = |ring: &mut Ring| {
        let buffer = bench.buffer(2000);
        let head = ring.chain(&[Part::Write(buffer, 2000)]);
        ring.offer(head);
    };

    // None was ever given: the first is kicked for.
    receiver.run().unwrap();
    assert_eq!((ring.avail_event(), ring.take_used()), (0, None));
    // From then on the thread is woken by itself.
    for given in 1..PACKETS {
        buffer(&mut ring);
        receiver.run().unwrap();
        assert_eq!(ring.take_used().map(|(_, written)| written), Some(72), "buffer {given}");
        assert_ne!(ring.avail_event(), given, "a kick is asked for with the next after buffer {given}");
        let mut asked = [PollFd::new(receiver.throttle.timer(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut asked, patience), Ok(1), "the thread is not woken after buffer {given}");
        receiver.throttle.woken();
    }
    // When it has found none, it asks for a kick and sleeps.
    receiver.run().unwrap();
    assert_eq!(ring.avail_event(), PACKETS - 1);
    let mut asked = [PollFd::new(receiver.throttle.timer(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut asked, PollTimeout::from(200_u8)), Ok(0), "the thread is woken for nothing");
    buffer(&mut ring);
    receiver.run().unwrap();
    assert!(ring.take_used().is_some());
}
