use super::*;

const US: Duration = Duration::from_micros(1);

fn look(holds: bool, again: Duration) -> Look {
    Look { holds, again }
}

#[test]
fn a_vcpu_is_held_back_for_what_it_ran_and_not_for_what_it_waited() {
    let slot = Slot::new(99);
    let start = Instant::now();
    let mut turn = Turn::new(start);
    let cpu_us = |us: u64| us * 1_000;
    // microseconds since the beginning, CPU time in microseconds, what comes of it
    let table = [
        (0, 500, look(true, 10_000 * US)),
        // It is out.
        (5_000, 520, look(false, 5_000 * US)),
        // It is free to run and waits for a processor, which takes longer than its share lasts.
        (9_900, 520, look(false, 100 * US)),
        (10_000, 530, look(false, 100 * US)),
        (11_900, 560, look(false, 100 * US)),
        // It has run.
        (12_000, 620, look(true, 10_000 * US)),
        (12_100, 640, look(false, 9_900 * US)),
        // It has nothing to do.
        (40_000, 650, look(false, 1_000 * US)),
        (90_000, 720, look(true, 10_000 * US)),
    ];
    for (at, cpu, expected) in table {
        assert_eq!(turn.look(&slot, start + at * US, cpu_us(cpu)), expected, "after {at} us, {cpu} of them");
    }
}

#[test]
fn a_share_that_is_left_is_waited_for() {
    let slot = Slot::new(20);
    let start = Instant::now();
    let mut turn = Turn::new(start);
    assert_eq!(turn.look(&slot, start, 0), look(false, 8_000 * US));
    assert_eq!(turn.look(&slot, start + 9_000 * US, 5_000_000), look(false, 3_000 * US));
    assert_eq!(turn.look(&slot, start + 12_000 * US, 8_000_000), look(true, 10_000 * US));
    assert_eq!(turn.look(&slot, start + 14_000 * US, 8_000_000), look(false, 8_000 * US));
}

#[test]
fn all_or_nothing_can_be_taken() {
    let start = Instant::now();
    assert_eq!(Turn::new(start).look(&Slot::new(100), start, 0), look(true, 10_000 * US));
    assert_eq!(Turn::new(start).look(&Slot::new(0), start, 0), look(false, 10_000 * US));
}
