//! What all vCPU threads of a machine are to do, and how many do it. Threads and kicks are the crew's.
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Run,
    Park,
    Leave,
}

/// One gate for all threads of a machine.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    wish: Wish,
    /// Threads that are outside KVM_RUN and will stay there until the wish changes.
    parked: usize,
    /// Until when each thread that was brought out of the guest stays out.
    naps: Vec<Instant>,
    /// The kernel's ids of the threads, once they have started and until they end.
    threads: Vec<Option<i32>>,
}

impl Gate {
    pub(super) fn new(threads: usize) -> Gate {
        let naps = vec![Instant::now(); threads];
        let state = State { wish: Wish::Park, parked: 0, naps, threads: vec![None; threads] };
        Gate { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn open(&self) {
        self.wish(Wish::Run);
    }

    pub(super) fn close(&self) {
        self.wish(Wish::Park);
    }

    pub(super) fn dismiss(&self) {
        self.wish(Wish::Leave);
    }

    /// Waits until every thread is parked; answers how many are not at the deadline.
    pub(super) fn wait_until_parked(&self, deadline: Instant) -> usize {
        let mut state = self.state();
        loop {
            let running = state.threads.len().saturating_sub(state.parked);
            let left = deadline.saturating_duration_since(Instant::now());
            if running == 0 || left.is_zero() {
                return running;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The thread that runs vCPU `index`, while it lives.
    pub(super) fn thread(&self, index: usize) -> Option<i32> {
        self.state().threads.get(index).copied().flatten()
    }

    /// A thread makes itself known, or says that it ends.
    pub(super) fn name(&self, index: usize, thread: Option<i32>) {
        if let Some(slot) = self.state().threads.get_mut(index) {
            *slot = thread;
        }
    }

    /// What the thread of vCPU `index` is to do at this moment; while it is held back, what it is to do then.
    pub(super) fn look(&self, index: usize) -> Wish {
        let mut state = self.state();
        loop {
            let left = state
                .naps
                .get(index)
                .map_or(Duration::ZERO, |end| end.saturating_duration_since(Instant::now()));
            if state.wish != Wish::Run || left.is_zero() {
                return state.wish;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Holds the thread of vCPU `index` back until then when it comes out of the guest.
    pub(super) fn set_nap(&self, index: usize, until: Instant) {
        if let Some(slot) = self.state().naps.get_mut(index) {
            *slot = until;
        }
    }

    /// Waits, parked, until the wish is another than to park.
    pub(super) fn pass(&self) -> Wish {
        self.wait_while(|wish| wish == Wish::Park)
    }

    /// Waits, parked for good, until all are to leave.
    pub(super) fn rest(&self) {
        self.wait_while(|wish| wish != Wish::Leave);
    }

    fn wait_while(&self, stays: impl Fn(Wish) -> bool) -> Wish {
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        while stays(state.wish) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        state.wish
    }

    fn wish(&self, wish: Wish) {
        self.state().wish = wish;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
