use std::sync::Arc;
use std::time::Duration;

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

#[test]
fn threads_pass_when_the_gate_opens_and_all_leave_when_dismissed() {
    let gate = Arc::new(Gate::new(3));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || (gate.pass(), gate.rest()).0)
        })
        .collect();
    assert_eq!(gate.wait_until_parked(soon()), 0);
    gate.open();
    // Having passed, they rest, which counts as parked.
    gate.close();
    assert_eq!(gate.wait_until_parked(soon()), 0);
    gate.dismiss();
    assert!(threads.into_iter().all(|thread| thread.join().unwrap() != Wish::Park));
}

#[test]
fn a_thread_that_does_not_come_is_counted_at_the_deadline() {
    let gate = Arc::new(Gate::new(2));
    let one = {
        let gate = Arc::clone(&gate);
        std::thread::spawn(move || gate.pass())
    };
    assert_eq!(gate.wait_until_parked(Instant::now() + Duration::from_millis(50)), 1);
    gate.dismiss();
    assert_eq!(one.join().unwrap(), Wish::Leave);
}

#[test]
fn a_thread_is_known_from_its_start_to_its_end() {
    let gate = Gate::new(1);
    assert_eq!(gate.thread(0), None);
    gate.name(0, Some(42));
    assert_eq!((gate.thread(0), gate.thread(1)), (Some(42), None));
    gate.name(0, None);
    assert_eq!(gate.thread(0), None);
}

#[test]
fn who_is_held_back_stays_for_so_long_and_nobody_else_does() {
    let gate = Gate::new(2);
    gate.open();
    let (now, nap) = (Instant::now(), Duration::from_millis(50));
    gate.set_nap(1, now + nap);
    assert_eq!(gate.look(0), Wish::Run);
    assert!(now.elapsed() < nap, "the other one waited");
    assert_eq!(gate.look(1), Wish::Run);
    assert!(now.elapsed() >= nap);
    // There is no such thread.
    gate.set_nap(2, soon());
    assert_eq!(gate.look(2), Wish::Run);
}

#[test]
fn who_is_held_back_comes_when_it_is_to_park() {
    let gate = Arc::new(Gate::new(1));
    gate.open();
    gate.set_nap(0, soon());
    let one = {
        let gate = Arc::clone(&gate);
        std::thread::spawn(move || (gate.look(0), gate.pass()))
    };
    gate.close();
    assert_eq!(gate.wait_until_parked(soon()), 0);
    gate.dismiss();
    assert_eq!(one.join().unwrap(), (Wish::Park, Wish::Leave));
}
