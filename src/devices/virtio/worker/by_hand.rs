//! A worker whose turns are taken by hand, for fuzzers and the replay of what they found: everything that its thread
//! would do, in the caller's thread and in an order that is the same each time. No part of a machine.
use std::cell::RefCell;
use std::sync::mpsc::channel;

use super::{Command, Phase, Service};

/// Turns after which something that is still busy is taken to be busy for ever.
const TURNS_MAX: usize = 10_000;

thread_local! {
    /// Whether the next worker of this thread is kept, and the one that was.
    static PLACE: RefCell<Place> = const { RefCell::new(Place { is_open: false, service: None }) };
}

struct Place {
    is_open: bool,
    service: Option<Service>,
}

/// Takes `service` when it is wanted here; else gives it back.
pub(super) fn keep(service: Service) -> Option<Service> {
    PLACE.with_borrow_mut(|place| {
        if std::mem::take(&mut place.is_open) {
            place.service = Some(service);
            return None;
        }
        Some(service)
    })
}

/// A worker without its thread.
pub(crate) struct ByHand {
    service: Service,
}

impl ByHand {
    /// Keeps the worker that `start` starts. The value that `start` answers must not be asked to pause.
    pub(crate) fn catch<T>(start: impl FnOnce() -> T) -> (T, ByHand) {
        let (started, worker) = ByHand::catch_any(start);
        (started, worker.expect("`start` started a worker"))
    }

    /// The same where `start` may start none.
    pub(crate) fn catch_any<T>(start: impl FnOnce() -> T) -> (T, Option<ByHand>) {
        PLACE.with_borrow_mut(|place| place.is_open = true);
        let started = start();
        let service = PLACE.with_borrow_mut(|place| {
            place.is_open = false;
            place.service.take()
        });
        let worker = service.map(|mut service| {
            service.begin();
            ByHand { service }
        });
        (started, worker)
    }

    /// Takes turns until there is nothing to do.
    pub(crate) fn turn(&mut self) {
        for _ in 0..TURNS_MAX {
            assert!(self.service.turn(0), "the worker cannot wait");
            self.service.advance();
            if self.service.timeout_ms() != 0 && !self.has_news() {
                return;
            }
        }
        panic!("a device is busy for ever");
    }

    /// Whether another turn would find a descriptor ready.
    fn has_news(&self) -> bool {
        let mut events = [super::EpollEvent::default(); 1];
        self.service.sources.epoll.wait(0, &mut events).is_ok_and(|count| count > 0)
    }

    /// Pauses; true when nothing is in flight.
    pub(crate) fn pause(&mut self) -> bool {
        let (answer, answered) = channel();
        self.service.obey(Command::Pause(answer));
        self.turn();
        matches!(self.service.phase, Phase::Paused) && matches!(answered.try_recv(), Ok(Ok(_)))
    }

    /// Goes on after a pause.
    pub(crate) fn resume(&mut self) {
        self.service.obey(Command::Resume);
        self.turn();
    }

    /// Whether the driver broke the device.
    pub(crate) fn is_broken(&self) -> bool {
        self.service.broken
    }

    /// Requests that the backend has not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.service.handler.in_flight()
    }
}
