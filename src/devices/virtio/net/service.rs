//! The interface's thread: both directions in turn, the tap, the limits' timers. Everything is done within a call, so
//! nothing is ever in flight; a pause gives back what is held and leaves the tap alone.
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memory::Ram;
use vmm_sys_util::epoll::EventSet;

use super::NetStats;
use super::backend::Link;
use super::receive::{Receiver, Waiting};
use super::transmit::Transmitter;
use crate::EventFd;
use crate::virtio::{Fault, Handler, Progress, Signals, Sources, Stand};

/// The queues of the one pair (virtio 1.2, section 5.1.2).
pub(super) const RECEIVE: u16 = 0;
pub(super) const TRANSMIT: u16 = 1;

/// The descriptors besides the kicks.
mod token {
    pub(super) const TAP: u32 = 0;
    pub(super) const RECEIVE_LIMITS: u32 = 1;
    pub(super) const TRANSMIT_LIMITS: u32 = 2;
}

/// What both directions work with.
pub(super) struct Shared {
    pub(super) link: Link,
    pub(super) memory: Arc<Ram>,
    pub(super) features: u64,
    pub(super) mtu: u16,
    pub(super) stats: Arc<NetStats>,
    pub(super) signals: Arc<dyn Signals>,
}

/// One pair of queues at work.
pub(super) struct Service {
    receiver: Receiver,
    transmitter: Transmitter,
    transmit_kick: Arc<EventFd>,
    shared: Arc<Shared>,
    /// Whether the thread waits for the tap.
    is_listening: bool,
    /// Paused or broken.
    is_quiet: bool,
}

impl Service {
    pub(super) fn new(
        receiver: Receiver,
        transmitter: Transmitter,
        transmit_kick: Arc<EventFd>,
        shared: Arc<Shared>,
    ) -> Service {
        Service { receiver, transmitter, transmit_kick, shared, is_listening: true, is_quiet: false }
    }

    fn receive(&mut self, sources: &Sources) -> Result<(), Fault> {
        let outcome = if self.is_quiet { Ok(()) } else { self.receiver.run() };
        self.listen(sources);
        outcome
    }

    fn transmit(&mut self) -> Result<(), Fault> {
        if !self.is_quiet && self.transmitter.run()? == Progress::More {
            // It refuses only when its counter is full, and then the kick is heard anyway.
            let _ = self.transmit_kick.write(1);
        }
        Ok(())
    }

    /// Waits for the tap exactly while a packet could be taken from it.
    fn listen(&mut self, sources: &Sources) {
        if self.receiver.waiting == Waiting::Gone {
            if self.is_listening {
                // It would be reported for ever, even with nothing asked of it.
                let _ = sources.remove(&self.shared.link);
                self.is_listening = false;
            }
            return;
        }
        let is_wanted = !self.is_quiet && self.receiver.waiting == Waiting::Packets;
        if is_wanted != self.is_listening {
            let interest = if is_wanted { EventSet::IN } else { EventSet::empty() };
            // The descriptor was added when the thread started, so this cannot fail; if it did, the worst is a
            // wake-up too many or a packet that waits for the next kick.
            let _ = sources.change(&self.shared.link, token::TAP, interest);
            self.is_listening = is_wanted;
        }
    }
}

impl Handler for Service {
    fn started(&mut self, sources: &Sources) -> io::Result<()> {
        sources.add(&self.shared.link, token::TAP, EventSet::IN)?;
        for (throttle, token) in [
            (&self.receiver.throttle, token::RECEIVE_LIMITS),
            (&self.transmitter.throttle, token::TRANSMIT_LIMITS),
        ] {
            sources.add(&throttle.timer(), token, EventSet::IN)?;
            sources.add(&throttle.changed(), token, EventSet::IN)?;
        }
        Ok(())
    }

    fn kicked(&mut self, index: u16, sources: &Sources) -> Result<Progress, Fault> {
        match index {
            RECEIVE => self.receive(sources).map(|()| Progress::Idle),
            _ => self.transmitter.run(),
        }
    }

    fn event(&mut self, token: u32, sources: &Sources) -> Result<(), Fault> {
        match token {
            token::TAP => {
                // It also tells, unasked and for ever, that the interface has gone. An event that was already on its
                // way when the tap was silenced means nothing.
                if !self.is_listening && self.shared.link.has_gone() {
                    self.receiver.waiting = Waiting::Gone;
                    self.is_listening = true;
                }
                self.receive(sources)
            }
            token::RECEIVE_LIMITS => {
                self.receiver.throttle.woken();
                if self.receiver.waiting == Waiting::Tokens {
                    self.receiver.waiting = Waiting::Packets;
                }
                self.receive(sources)
            }
            _ => {
                self.transmitter.throttle.woken();
                self.transmit()
            }
        }
    }

    fn stand(&mut self) -> Option<Stand> {
        let stand = Stand::of([self.receiver.queue(), self.transmitter.queue()])?;
        Some(stand.with_limits(vec![self.receiver.throttle.save(), self.transmitter.throttle.save()]))
    }

    fn pausing(&mut self, sources: &Sources) {
        self.is_quiet = true;
        self.receiver.give_back();
        self.listen(sources);
    }

    fn resumed(&mut self, sources: &Sources) {
        self.is_quiet = false;
        self.listen(sources);
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
