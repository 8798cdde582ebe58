//! Token buckets for bytes and operations, and the slot through which limits change while a device works.
//! Nothing here waits or reads a clock: time comes in as nanoseconds, and [`Throttle`] only arms a timer.
//! `virtio::block` and `virtio::net` ask before each request.
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

mod state;

pub use state::{LevelState, LimiterState};

/// Nano-tokens in a token: with a rate per second and time in nanoseconds no fraction is ever lost.
const NANO: i128 = 1_000_000_000;

/// A rate with a burst: the bucket holds `burst` tokens, starts full and gains `per_second`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    /// Tokens gained per second. Zero counts as one, so that nothing waits for ever.
    pub per_second: u64,
    /// Most tokens the bucket holds. Zero counts as one. A larger request passes when the bucket is full.
    pub burst: u64,
}

/// Limits on one direction of one device; absent means unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateLimits {
    /// Bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Requests or packets.
    pub operations: Option<TokenBucket>,
}

/// What asking for tokens came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// The tokens are taken.
    Granted,
    /// Nothing is taken. Ask again at this time, in nanoseconds of the caller's clock.
    RetryAt(u64),
}

/// Both buckets of one direction. A request passes when both let it pass, and only then costs anything.
#[derive(Debug, Clone, Default)]
pub struct Limiter {
    bandwidth: Option<Level>,
    operations: Option<Level>,
}

impl Limiter {
    /// Full buckets at `now_ns`.
    pub fn new(limits: RateLimits, now_ns: u64) -> Limiter {
        let level = |bucket: Option<TokenBucket>| bucket.map(|bucket| Level::full(bucket, now_ns));
        Limiter { bandwidth: level(limits.bandwidth), operations: level(limits.operations) }
    }

    /// Replaces the limits. A bucket that existed keeps its tokens, cut to the new burst, and its debt, so that
    /// changing limits often is not a way around them.
    pub fn set(&mut self, limits: RateLimits, now_ns: u64) {
        let change = |level: Option<Level>, bucket: Option<TokenBucket>| match (level, bucket) {
            (_, None) => None,
            (None, Some(bucket)) => Some(Level::full(bucket, now_ns)),
            (Some(level), Some(bucket)) => Some(level.changed(bucket, now_ns)),
        };
        self.bandwidth = change(self.bandwidth.take(), limits.bandwidth);
        self.operations = change(self.operations.take(), limits.operations);
    }

    /// What the buckets hold at `now_ns`.
    pub fn save(&mut self, now_ns: u64) -> LimiterState {
        let level = |level: &mut Option<Level>| {
            level.as_mut().map(|level| {
                level.refill(now_ns);
                LevelState::of(level.tokens)
            })
        };
        LimiterState { bandwidth: level(&mut self.bandwidth), operations: level(&mut self.operations) }
    }

    /// Takes over what was saved, for the buckets there are; no bucket then holds more than its burst.
    pub fn restore(&mut self, state: LimiterState) {
        for (level, saved) in
            [(&mut self.bandwidth, state.bandwidth), (&mut self.operations, state.operations)]
        {
            if let (Some(level), Some(saved)) = (level, saved) {
                level.tokens = saved.tokens().min(level.capacity);
            }
        }
    }

    /// Whether everything passes, whatever the time.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.operations.is_none()
    }

    /// Asks for so many operations of `bytes` in all. A clock that goes back is taken as one that stands still.
    pub fn take(&mut self, operations: u64, bytes: u64, now_ns: u64) -> Take {
        let mut asked = [(self.bandwidth.as_mut(), bytes), (self.operations.as_mut(), operations)];
        let mut retry_at_ns = None;
        for (level, cost) in &mut asked {
            let Some(level) = level else { continue };
            level.refill(now_ns);
            retry_at_ns = retry_at_ns.max(level.ready_at_ns(*cost));
        }
        if let Some(at_ns) = retry_at_ns {
            return Take::RetryAt(at_ns);
        }
        for (level, cost) in &mut asked {
            if let Some(level) = level {
                level.spend(*cost);
            }
        }
        Take::Granted
    }
}

/// One bucket. All amounts are nano-tokens; the largest, 2⁶⁴ tokens, needs 94 bits.
#[derive(Debug, Clone)]
struct Level {
    per_second: i128,
    capacity: i128,
    /// Below zero when a request larger than the burst has passed: the debt is paid back first.
    tokens: i128,
    at_ns: u64,
}

impl Level {
    fn full(bucket: TokenBucket, now_ns: u64) -> Level {
        let capacity = nano(bucket.burst.max(1));
        Level { per_second: i128::from(bucket.per_second.max(1)), capacity, tokens: capacity, at_ns: now_ns }
    }

    fn changed(mut self, bucket: TokenBucket, now_ns: u64) -> Level {
        self.refill(now_ns);
        let fresh = Level::full(bucket, self.at_ns);
        Level { tokens: self.tokens.min(fresh.capacity), ..fresh }
    }

    fn refill(&mut self, now_ns: u64) {
        let elapsed_ns = i128::from(now_ns.saturating_sub(self.at_ns));
        self.at_ns = self.at_ns.max(now_ns);
        let gained = elapsed_ns.saturating_mul(self.per_second);
        self.tokens = self.tokens.saturating_add(gained).min(self.capacity);
    }

    /// When `cost` tokens can be had, or nothing if they can now. Never the present, so a caller that waits until
    /// then always finds them.
    fn ready_at_ns(&self, cost: u64) -> Option<u64> {
        let missing = nano(cost).min(self.capacity).saturating_sub(self.tokens);
        if missing <= 0 {
            return None;
        }
        let rounded_up = missing.saturating_add(self.per_second).saturating_sub(1);
        let wait_ns = rounded_up.checked_div(self.per_second).unwrap_or(i128::MAX);
        Some(self.at_ns.saturating_add(u64::try_from(wait_ns).unwrap_or(u64::MAX)))
    }

    fn spend(&mut self, cost: u64) {
        self.tokens = self.tokens.saturating_sub(nano(cost));
    }
}

fn nano(tokens: u64) -> i128 {
    i128::from(tokens).saturating_mul(NANO)
}

/// Limits that one thread sets and a device's thread follows. Cheap to read when nothing has changed.
#[derive(Debug)]
pub struct LimitsSlot {
    limits: Mutex<RateLimits>,
    changes: AtomicU64,
    changed: EventFd,
}

impl LimitsSlot {
    /// Holds `limits`.
    pub fn new(limits: RateLimits) -> io::Result<LimitsSlot> {
        let changed = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(LimitsSlot { limits: Mutex::new(limits), changes: AtomicU64::new(0), changed })
    }

    /// Replaces the limits and wakes the device.
    pub fn set(&self, limits: RateLimits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        self.changes.fetch_add(1, Ordering::Release);
        // It refuses only when its counter is full, and then the device is awake anyway.
        let _ = self.changed.write(1);
    }

    fn limits(&self) -> RateLimits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A limiter on the monotonic clock that follows a [`LimitsSlot`] and wakes its thread when to ask again. The
/// thread waits for both descriptors to be readable and calls [`Throttle::woken`].
#[derive(Debug)]
pub struct Throttle {
    limiter: Limiter,
    slot: Arc<LimitsSlot>,
    seen: u64,
    timer: TimerFd,
    epoch: Instant,
    waiting: bool,
}

impl Throttle {
    /// Follows `slot`, with full buckets.
    pub fn new(slot: Arc<LimitsSlot>) -> io::Result<Throttle> {
        let seen = slot.changes.load(Ordering::Acquire);
        let limiter = Limiter::new(slot.limits(), 0);
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Throttle { limiter, slot, seen, timer, epoch: Instant::now(), waiting: false })
    }

    /// What the buckets hold at this moment.
    pub fn save(&mut self) -> LimiterState {
        let now_ns = self.now_ns();
        self.limiter.save(now_ns)
    }

    /// Takes over what was saved.
    pub fn restore(&mut self, state: LimiterState) {
        self.limiter.restore(state);
    }

    /// Readable when a refused request should be tried again.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Readable when the limits have been changed.
    pub fn changed(&self) -> BorrowedFd<'_> {
        self.slot.changed.as_fd()
    }

    /// Whether a request was refused and nothing has woken the thread since.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Whether one operation of `bytes` may go on. When not, the timer is armed.
    pub fn allows(&mut self, bytes: u64) -> bool {
        self.allows_several(1, bytes)
    }

    /// The same of one that comes to so many, with `bytes` in all.
    pub fn allows_several(&mut self, operations: u64, bytes: u64) -> bool {
        if self.limiter.is_unlimited() && self.slot.changes.load(Ordering::Acquire) == self.seen {
            return true;
        }
        let now_ns = self.now_ns();
        self.follow(now_ns);
        let Take::RetryAt(at_ns) = self.limiter.take(operations, bytes, now_ns) else { return true };
        let wait = Duration::from_nanos(at_ns.saturating_sub(now_ns).clamp(1, WAIT_NS_MAX));
        // Arming a timer fails only for a descriptor or time that is not valid; letting the request pass is then
        // better than a device that never wakes.
        let expiration = Expiration::OneShot(TimeSpec::from_duration(wait));
        self.waiting = self.timer.set(expiration, TimerSetTimeFlags::empty()).is_ok();
        !self.waiting
    }

    /// Wakes the thread after `delay` all the same, for work that does not wait for limits; false when it will not be woken.
    pub fn wake_after(&self, delay: Duration) -> bool {
        let expiration = Expiration::OneShot(TimeSpec::from_duration(delay));
        self.timer.set(expiration, TimerSetTimeFlags::empty()).is_ok()
    }

    /// Takes the wake-up, so that the descriptors are quiet again.
    pub fn woken(&mut self) {
        // Disarming also clears an expiry that nobody has read.
        let _ = self.timer.unset();
        let _ = self.slot.changed.read();
        self.waiting = false;
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn follow(&mut self, now_ns: u64) {
        let changes = self.slot.changes.load(Ordering::Acquire);
        if changes != self.seen {
            self.seen = changes;
            self.limiter.set(self.slot.limits(), now_ns);
        }
    }
}

/// Longest wait before a refused request is tried again: far beyond any sensible limit, well inside the time type.
const WAIT_NS_MAX: u64 = 3_600_000_000_000;

#[cfg(test)]
mod tests;
