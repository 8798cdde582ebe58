//! Against a small model of a guest that writes at a rate over so much memory, and of a wire that takes another rate.
use super::*;

const MIB: u64 = 1 << 20;

struct Model {
    memory: u64,
    wire: u64,
    /// Bytes a second of pages that were not written since the round began.
    writes: u64,
    over: u64,
}

struct Outcome {
    next: Next,
    rounds: u32,
    /// Of the last decision, and what it came to be.
    downtime: Duration,
    expected: Duration,
    sent: u64,
    throttle_percent: u8,
}

impl Model {
    fn run(&self, limits: SendLimits) -> Outcome {
        let mut convergence = Convergence::patient(Mode::PreCopy);
        let wire = limits.bandwidth_bytes_per_s.unwrap_or(u64::MAX).min(self.wire);
        let (mut to_send, mut sent, mut throttle_percent) = (self.memory, 0, 0);
        for number in 1..1000 {
            let took = Duration::from_secs_f64(to_send as f64 / wire as f64 + 0.0005);
            // What is written lies anywhere in `over`, and that anywhere in what is sent, piece after piece: how much of each was
            // written since it went, and of what is not sent in this round.
            let (mut pieces, mut others) = (Vec::new(), 0.0_f64);
            let (mut again, steps, over) = (0.0, 20, self.over as f64);
            for step in 1..=steps {
                let held = f64::from(convergence.throttle_percent());
                let writes = self.writes as f64 * (100.0 - held) / 100.0 * took.as_secs_f64() / steps as f64;
                pieces.push(0.0_f64);
                pieces
                    .iter_mut()
                    .chain([&mut others])
                    .for_each(|part| *part = (*part + writes / over).min(1.0));
                let piece_bytes = (to_send as f64).min(over) / steps as f64;
                again = pieces.iter().sum::<f64>() * piece_bytes;
                let gone_bytes = to_send * step / steps;
                convergence.midway(Glimpse { all_bytes: to_send, gone_bytes, again_bytes: again as u64 });
            }
            let left_bytes = (again + (over - to_send as f64).max(0.0) * others) as u64;
            sent += to_send;
            let decision = convergence.after(Round { number, took, sent_bytes: to_send, left_bytes }, limits);
            match decision.next {
                Next::Again { throttle_percent: now } => {
                    assert!(now >= throttle_percent && now <= 99);
                    throttle_percent = now;
                    to_send = left_bytes;
                }
                next => {
                    let downtime =
                        Duration::from_secs_f64(left_bytes as f64 / wire as f64) + Duration::from_millis(6);
                    let expected = decision.expected_downtime;
                    return Outcome { next, rounds: number, downtime, expected, sent, throttle_percent };
                }
            }
        }
        panic!("it never ends");
    }
}

fn limits(downtime_ms: u32) -> SendLimits {
    SendLimits { downtime_ms, bandwidth_bytes_per_s: None, ..SendLimits::default() }
}

#[test]
fn an_idle_guest_is_stopped_after_one_round() {
    let model = Model { memory: 2048 * MIB, wire: 1000 * MIB, writes: 10 * MIB / 100, over: MIB };
    let outcome = model.run(limits(10));
    assert_eq!((outcome.next, outcome.rounds, outcome.throttle_percent), (Next::Stop, 1, 0));
}

#[test]
fn a_guest_that_writes_at_half_the_wires_rate_gets_there_unhindered() {
    let model = Model { memory: 2048 * MIB, wire: 1000 * MIB, writes: 500 * MIB, over: 1792 * MIB };
    let outcome = model.run(limits(50));
    assert_eq!((outcome.next, outcome.throttle_percent), (Next::Stop, 0));
    assert!(outcome.downtime <= Duration::from_millis(50), "{:?}", outcome.downtime);
    assert!(outcome.sent <= 2 * model.memory, "{} MiB sent", outcome.sent / MIB);
}

#[test]
fn every_model_ends_and_the_downtime_is_what_was_expected() {
    for wire in [20, 125, 1000, 4000] {
        for writes in [0, 1, 50, 125, 500, 3000, 10_000] {
            for over in [1, 16, 256, 2048] {
                for downtime in [10, 50, 100, 1000] {
                    let model = Model {
                        memory: 2048 * MIB,
                        wire: wire * MIB,
                        writes: writes * MIB,
                        over: over * MIB,
                    };
                    let outcome = model.run(limits(downtime));
                    let words = format!("wire {wire} writes {writes} over {over} within {downtime} ms");
                    // Give up only where one hundredth of the guest's time still writes more than goes.
                    let hopeless = writes > 50 * wire || over > 0 && downtime == 10 && wire == 20;
                    assert!(outcome.next == Next::Stop || hopeless, "{words}: {:?}", outcome.next);
                    if outcome.next == Next::Stop {
                        let bar = Duration::from_millis(downtime.into());
                        assert!(
                            outcome.downtime <= bar || outcome.rounds == 1,
                            "{words}: {:?}",
                            outcome.downtime
                        );
                        let apart = outcome.expected.abs_diff(outcome.downtime);
                        assert!(apart < Duration::from_millis(5), "{words}: {apart:?} apart");
                    }
                }
            }
        }
    }
}

#[test]
fn a_guest_that_outruns_the_wire_arrives_by_throttle_within_twice_its_memory() {
    let model = Model { memory: 2048 * MIB, wire: 119 * MIB, writes: 1000 * MIB, over: 512 * MIB };
    let outcome = model.run(limits(100));
    assert_eq!(outcome.next, Next::Stop);
    assert!(outcome.throttle_percent >= 90, "{}", outcome.throttle_percent);
    assert!(outcome.sent <= 2 * model.memory, "{} MiB sent", outcome.sent / MIB);
}

#[test]
fn a_guest_that_outruns_the_wire_over_most_of_its_memory_is_held_back_before_all_of_it_has_gone() {
    for writes in [150, 400, 1000] {
        let model = Model { memory: 768 * MIB, wire: 119 * MIB, writes: writes * MIB, over: 768 * MIB };
        let outcome = model.run(limits(50));
        assert_eq!(outcome.next, Next::Stop);
        assert!(outcome.sent <= model.memory * 2, "{writes}: {} MiB sent", outcome.sent / MIB);
    }
}

#[test]
fn a_round_that_is_not_over_tells_only_when_the_better_half_has_gone_and_most_was_written_again() {
    for (gone, again, throttle_percent) in [(500, 499, 0), (512, 256, 0), (512, 257, 99), (900, 450, 0)] {
        let mut convergence = Convergence::patient(Mode::PreCopy);
        let glimpse = Glimpse { all_bytes: 1024 * MIB, gone_bytes: gone * MIB, again_bytes: again * MIB };
        convergence.midway(glimpse);
        assert_eq!(convergence.throttle_percent(), throttle_percent, "{glimpse:?}");
    }
}

#[test]
fn less_bandwidth_is_reckoned_with() {
    let model = Model { memory: 512 * MIB, wire: 1000 * MIB, writes: 40 * MIB, over: 256 * MIB };
    let bound =
        SendLimits { downtime_ms: 50, bandwidth_bytes_per_s: Some(50 * MIB), ..SendLimits::default() };
    let outcome = model.run(bound);
    assert_eq!(outcome.next, Next::Stop);
    assert!(outcome.throttle_percent > 0 && outcome.downtime <= Duration::from_millis(50));
}
