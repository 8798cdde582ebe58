use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::virtio::bench::{Heard, PATIENCE};

/// Counts turns; its `busy` requests are answered when `answers` is signalled.
struct Probe {
    turns: Arc<AtomicUsize>,
    more: usize,
    fault: bool,
    busy: Arc<AtomicUsize>,
    answers: Arc<EventFd>,
    quiet: Arc<AtomicBool>,
}

impl Probe {
    fn new() -> Probe {
        Probe {
            turns: Arc::default(),
            more: 0,
            fault: false,
            busy: Arc::default(),
            answers: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            quiet: Arc::default(),
        }
    }
}

impl Handler for Probe {
    fn started(&mut self, sources: &Sources) -> io::Result<()> {
        sources.add(&*self.answers, 7, EventSet::IN)
    }
    fn kicked(&mut self, _index: u16, _sources: &Sources) -> Result<Progress, Fault> {
        self.turns.fetch_add(1, Ordering::SeqCst);
        if self.fault {
            return Err(Fault::Protocol("the test wants it so"));
        }
        if self.more > 0 {
            self.more -= 1;
            return Ok(Progress::More);
        }
        Ok(Progress::Idle)
    }
    fn event(&mut self, token: u32, _sources: &Sources) -> Result<(), Fault> {
        assert_eq!(token, 7);
        self.answers.read().unwrap();
        self.busy.store(0, Ordering::SeqCst);
        Ok(())
    }
    fn in_flight(&self) -> usize {
        self.busy.load(Ordering::SeqCst)
    }
    fn stand(&mut self) -> Option<Stand> {
        Some(Stand::default())
    }
    fn pausing(&mut self, _sources: &Sources) {
        self.quiet.store(true, Ordering::SeqCst);
    }
    fn resumed(&mut self, _sources: &Sources) {
        self.quiet.store(false, Ordering::SeqCst);
    }
}

fn start(probe: Probe) -> (Worker, Arc<EventFd>, Arc<Heard>) {
    let heard = Arc::new(Heard::default());
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let options = WorkerOptions {
        kind: "probe",
        device: "probe0".to_owned(),
        kicks: vec![Kick { index: 3, event: Arc::clone(&kick) }],
        signals: heard.clone(),
        threads: Arc::new(|kind| assert_eq!(kind, "probe")),
        begin: Begin::Serving,
    };
    (Worker::start(options, Box::new(probe)).unwrap(), kick, heard)
}

/// Waits for a counter that another thread moves.
fn reach(counter: &AtomicUsize, wanted: usize) {
    let deadline = Instant::now() + PATIENCE;
    while counter.load(Ordering::SeqCst) < wanted {
        assert!(Instant::now() < deadline, "the counter stays below {wanted}");
        std::thread::yield_now();
    }
}

// virtio 1.2: 2.7.10.2-3
#[test]
fn a_kick_brings_turns_until_the_handler_is_idle() {
    let probe = Probe { more: 4, ..Probe::new() };
    let turns = Arc::clone(&probe.turns);
    let (worker, kick, _) = start(probe);
    kick.write(1).unwrap();
    reach(&turns, 5);
    Box::new(worker).stop();
    assert_eq!(turns.load(Ordering::SeqCst), 5);
}

#[test]
fn a_pause_waits_for_what_is_in_flight_and_keeps_kicks_for_later() {
    let probe = Probe::new();
    let (turns, busy) = (Arc::clone(&probe.turns), Arc::clone(&probe.busy));
    let (answers, quiet) = (Arc::clone(&probe.answers), Arc::clone(&probe.quiet));
    busy.store(2, Ordering::SeqCst);
    let (mut worker, kick, _) = start(probe);
    let answering = std::thread::spawn({
        let quiet = Arc::clone(&quiet);
        move || {
            let deadline = Instant::now() + PATIENCE;
            while !quiet.load(Ordering::SeqCst) && Instant::now() < deadline {
                std::thread::yield_now();
            }
            answers.write(1).unwrap();
        }
    });
    worker.pause().unwrap();
    answering.join().unwrap();
    assert_eq!(busy.load(Ordering::SeqCst), 0);
    kick.write(1).unwrap();
    worker.pause().unwrap();
    assert_eq!(turns.load(Ordering::SeqCst), 0);
    worker.resume();
    reach(&turns, 1);
    assert!(!quiet.load(Ordering::SeqCst));
}

#[test]
fn a_pause_that_cannot_drain_says_so_and_can_be_undone() {
    let probe = Probe::new();
    let (turns, busy) = (Arc::clone(&probe.turns), Arc::clone(&probe.busy));
    busy.store(2, Ordering::SeqCst);
    let (mut worker, kick, _) = start(probe);
    assert_eq!(worker.pause(), Err(NotDrained { device: "probe0".to_owned(), in_flight: 2 }));
    kick.write(1).unwrap();
    worker.resume();
    reach(&turns, 1);
    busy.store(0, Ordering::SeqCst);
}

#[test]
fn whoever_does_not_wait_so_long_lets_it_go_on_with_what_is_in_flight() {
    let probe = Probe::new();
    let (turns, busy) = (Arc::clone(&probe.turns), Arc::clone(&probe.busy));
    busy.store(2, Ordering::SeqCst);
    let (mut worker, kick, _) = start(probe);
    let began = Instant::now();
    assert!(worker.pause_within(Duration::from_millis(20)).is_err());
    assert!(began.elapsed() < Duration::from_millis(DRAIN_MS_MAX / 2), "{:?}", began.elapsed());
    kick.write(1).unwrap();
    worker.resume();
    reach(&turns, 1);
    busy.store(0, Ordering::SeqCst);
    worker.pause().unwrap();
}

#[test]
fn a_fault_is_told_once_and_no_kick_is_heard_after_it() {
    let probe = Probe { fault: true, ..Probe::new() };
    let turns = Arc::clone(&probe.turns);
    let (mut worker, kick, heard) = start(probe);
    kick.write(1).unwrap();
    heard.wait("fault", |log| !log.broken.is_empty());
    kick.write(1).unwrap();
    worker.pause().unwrap();
    worker.resume();
    worker.pause().unwrap();
    assert_eq!(turns.load(Ordering::SeqCst), 1);
    assert_eq!(heard.log().broken, ["the test wants it so"]);
}

#[test]
fn a_handler_that_cannot_start_breaks_the_device() {
    struct Stillborn;
    impl Handler for Stillborn {
        fn started(&mut self, _sources: &Sources) -> io::Result<()> {
            Err(io::ErrorKind::OutOfMemory.into())
        }
        fn kicked(&mut self, _index: u16, _sources: &Sources) -> Result<Progress, Fault> {
            panic!("nothing is heard before the start");
        }
        fn stand(&mut self) -> Option<Stand> {
            panic!("a broken device stands nowhere");
        }
    }
    let heard = Arc::new(Heard::default());
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    kick.write(1).unwrap();
    let options = WorkerOptions {
        kind: "probe",
        device: "probe0".to_owned(),
        kicks: vec![Kick { index: 0, event: kick }],
        signals: heard.clone(),
        threads: Arc::new(|_| {}),
        begin: Begin::Serving,
    };
    let mut worker = Worker::start(options, Box::new(Stillborn)).unwrap();
    heard.wait("fault", |log| log.broken.len() == 1);
    worker.pause().unwrap();
    worker.resume();
    worker.pause().unwrap();
    Box::new(worker).stop();
    assert_eq!(heard.log().broken.len(), 1);
}

#[test]
fn dropping_a_worker_ends_its_thread() {
    let probe = Probe::new();
    let turns = Arc::downgrade(&probe.turns);
    let (worker, ..) = start(probe);
    drop(worker);
    assert!(turns.upgrade().is_none());
}
