use proptest::prelude::*;

use super::*;

const SECOND_NS: u64 = 1_000_000_000;

fn bucket(per_second: u64, burst: u64) -> Option<TokenBucket> {
    Some(TokenBucket { per_second, burst })
}

#[test]
fn no_limits_let_everything_pass() {
    let mut limiter = Limiter::new(RateLimits::default(), 0);
    for _ in 0..1000 {
        assert_eq!(limiter.take(1, u64::MAX, 0), Take::Granted);
    }
}

#[test]
fn a_burst_passes_at_once_and_then_the_rate_holds() {
    let mut limiter = Limiter::new(RateLimits { bandwidth: bucket(1000, 500), operations: None }, 7);
    assert_eq!(limiter.take(1, 500, 7), Take::Granted);
    assert_eq!(limiter.take(1, 100, 7), Take::RetryAt(7 + SECOND_NS / 10));
    assert_eq!(limiter.take(1, 100, 6 + SECOND_NS / 10), Take::RetryAt(7 + SECOND_NS / 10));
    assert_eq!(limiter.take(1, 100, 7 + SECOND_NS / 10), Take::Granted);
}

#[test]
fn a_request_larger_than_the_burst_passes_when_full_and_is_paid_back() {
    let mut limiter = Limiter::new(RateLimits { bandwidth: bucket(100, 10), operations: None }, 0);
    assert_eq!(limiter.take(1, 1010, 0), Take::Granted);
    // The debt is 1000 tokens: ten seconds, and one token more for the next byte.
    assert_eq!(limiter.take(1, 1, 0), Take::RetryAt(10 * SECOND_NS + SECOND_NS / 100));
    assert_eq!(limiter.take(1, 1, 10 * SECOND_NS + SECOND_NS / 100), Take::Granted);
}

#[test]
fn a_request_that_one_bucket_refuses_costs_the_other_nothing() {
    let limits = RateLimits { bandwidth: bucket(1, 100), operations: bucket(1, 1) };
    let mut limiter = Limiter::new(limits, 0);
    assert_eq!(limiter.take(1, 50, 0), Take::Granted);
    assert_eq!(limiter.take(1, 50, 0), Take::RetryAt(SECOND_NS));
    assert_eq!(limiter.take(1, 50, SECOND_NS), Take::Granted);
}

#[test]
fn a_clock_that_goes_back_gives_nothing_and_breaks_nothing() {
    let mut limiter = Limiter::new(RateLimits { bandwidth: None, operations: bucket(1, 1) }, SECOND_NS);
    assert_eq!(limiter.take(1, 0, SECOND_NS), Take::Granted);
    assert_eq!(limiter.take(1, 0, 0), Take::RetryAt(2 * SECOND_NS));
    assert_eq!(limiter.take(1, 0, 2 * SECOND_NS), Take::Granted);
}

#[test]
fn changing_limits_often_is_no_way_around_them() {
    let limits = RateLimits { bandwidth: bucket(10, 10), operations: None };
    let mut limiter = Limiter::new(limits, 0);
    assert_eq!(limiter.take(1, 10, 0), Take::Granted);
    for _ in 0..100 {
        limiter.set(limits, 0);
        assert_eq!(limiter.take(1, 10, 0), Take::RetryAt(SECOND_NS));
    }
    limiter.set(RateLimits::default(), 0);
    assert_eq!(limiter.take(1, u64::MAX, 0), Take::Granted);
}

#[test]
fn the_largest_numbers_do_not_overflow() {
    let limits = RateLimits { bandwidth: bucket(u64::MAX, u64::MAX), operations: bucket(1, u64::MAX) };
    let mut limiter = Limiter::new(limits, 0);
    for now_ns in [0, 1, u64::MAX, u64::MAX] {
        limiter.take(1, u64::MAX, now_ns);
    }
    let mut slow = Limiter::new(RateLimits { bandwidth: bucket(1, u64::MAX), operations: None }, 0);
    assert_eq!(slow.take(1, u64::MAX, 0), Take::Granted);
    assert_eq!(slow.take(1, u64::MAX, 0), Take::RetryAt(u64::MAX));
}

#[test]
fn zeroes_count_as_ones() {
    let mut limiter = Limiter::new(RateLimits { bandwidth: None, operations: bucket(0, 0) }, 0);
    assert_eq!(limiter.take(1, 0, 0), Take::Granted);
    assert_eq!(limiter.take(1, 0, 0), Take::RetryAt(SECOND_NS));
}

/// Whole tokens and whole seconds, where plain arithmetic is enough.
struct Oracle {
    per_second: i64,
    burst: i64,
    tokens: i64,
}

impl Oracle {
    fn take(&mut self, cost: i64, passed_s: i64) -> bool {
        self.tokens = (self.tokens + passed_s * self.per_second).min(self.burst);
        let granted = self.tokens >= cost.min(self.burst);
        self.tokens -= if granted { cost } else { 0 };
        granted
    }
}

proptest! {
    #[test]
    fn grants_are_those_of_the_oracle(
        per_second in 1_u32..1000, burst in 1_u32..5000,
        asks in proptest::collection::vec((0_u32..8000, 0_u32..20), 1..200),
    ) {
        let (rate, most) = (u64::from(per_second), u64::from(burst));
        let mut limiter = Limiter::new(RateLimits { bandwidth: bucket(rate, most), operations: None }, 0);
        let mut oracle =
            Oracle { per_second: per_second.into(), burst: burst.into(), tokens: burst.into() };
        let mut now_ns = 0;
        for (cost, passed_s) in asks {
            now_ns += u64::from(passed_s) * SECOND_NS;
            let granted = limiter.take(1, cost.into(), now_ns) == Take::Granted;
            prop_assert_eq!(granted, oracle.take(cost.into(), passed_s.into()));
        }
    }

    #[test]
    fn what_is_refused_passes_exactly_when_it_was_told_to_come_back(
        per_second in 1_u64.., burst in 1_u64.., costs in proptest::collection::vec(any::<u64>(), 1..20),
        steps in proptest::collection::vec(0_u64..1 << 40, 20),
    ) {
        let limits = RateLimits { bandwidth: bucket(per_second, burst), operations: None };
        let mut limiter = Limiter::new(limits, 0);
        let mut now_ns = 0_u64;
        for (cost, step) in costs.into_iter().zip(steps) {
            now_ns = now_ns.saturating_add(step);
            if let Take::RetryAt(at_ns) = limiter.take(1, cost, now_ns) {
                prop_assert!(at_ns > now_ns || at_ns == u64::MAX);
                if at_ns == u64::MAX {
                    break;
                }
                prop_assert_ne!(limiter.clone().take(1, cost, at_ns - 1), Take::Granted);
                prop_assert_eq!(limiter.take(1, cost, at_ns), Take::Granted);
                now_ns = at_ns;
            }
        }
    }

    #[test]
    fn over_any_time_no_more_passes_than_the_burst_and_the_rate(
        per_second in 1_u64..100_000, burst in 1_u64..100_000,
        asks in proptest::collection::vec((0_u64..1000, 0_u64..50_000_000), 1..300),
    ) {
        let limits = RateLimits { bandwidth: bucket(per_second, burst), operations: None };
        let mut limiter = Limiter::new(limits, 0);
        let (mut now_ns, mut passed, mut largest) = (0_u64, 0_u64, 0_u64);
        for (cost, step) in asks {
            now_ns += step;
            if limiter.take(1, cost, now_ns) == Take::Granted {
                passed += cost;
                largest = largest.max(cost);
            }
        }
        let allowed = u128::from(burst.max(largest))
            + u128::from(per_second) * u128::from(now_ns) / u128::from(SECOND_NS);
        prop_assert!(u128::from(passed) <= allowed + u128::from(largest.saturating_sub(burst)));
    }
}

#[test]
fn a_throttle_wakes_its_thread_when_tokens_are_there() {
    let limits = RateLimits { bandwidth: None, operations: bucket(2, 1) };
    let mut throttle = Throttle::new(Arc::new(LimitsSlot::new(limits).unwrap())).unwrap();
    assert!(throttle.allows(0));
    assert!(!throttle.allows(0));
    assert!(throttle.is_waiting());
    assert!(is_readable(throttle.timer(), 5000));
    throttle.woken();
    assert!(!is_readable(throttle.timer(), 0));
    assert!(throttle.allows(0));
}

#[test]
fn new_limits_wake_the_thread_and_hold_from_then_on() {
    let slot = Arc::new(LimitsSlot::new(RateLimits { bandwidth: None, operations: bucket(1, 1) }).unwrap());
    let mut throttle = Throttle::new(Arc::clone(&slot)).unwrap();
    assert!(throttle.allows(0));
    assert!(!throttle.allows(0));
    assert!(!is_readable(throttle.changed(), 0));
    slot.set(RateLimits::default());
    assert!(is_readable(throttle.changed(), 0));
    throttle.woken();
    assert!(!is_readable(throttle.changed(), 0));
    assert!(throttle.allows(0));
}

fn is_readable(fd: BorrowedFd<'_>, wait_ms: u16) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(wait_ms)).unwrap() == 1
}

#[test]
fn what_comes_to_several_operations_costs_several() {
    let limits = RateLimits { bandwidth: None, operations: bucket(10, 10) };
    let mut limiter = Limiter::new(limits, 0);
    assert_eq!(limiter.take(7, 0, 0), Take::Granted);
    assert_eq!(limiter.take(7, 0, 0), Take::RetryAt(400_000_000));
    // More than the bucket holds passes when that is full.
    assert_eq!(limiter.take(25, 0, SECOND_NS), Take::Granted);
    assert_eq!(limiter.take(1, 0, SECOND_NS), Take::RetryAt(2 * SECOND_NS + 600_000_000));
}
