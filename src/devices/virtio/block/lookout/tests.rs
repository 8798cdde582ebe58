use std::convert::Infallible;

use super::*;

/// Whether it looks at all, with something to be found at once.
fn looks(lookout: &mut Lookout) -> bool {
    let mut looked = false;
    let found: Result<bool, Infallible> = lookout.find(|| {
        looked = true;
        Ok(true)
    });
    assert_eq!(found, Ok(looked));
    looked
}

fn woken_after(us: u64) -> Lookout {
    let mut lookout = Lookout::default();
    let now = Instant::now();
    lookout.sleeps(now);
    lookout.woken(now + Duration::from_micros(us));
    lookout
}

#[test]
fn nothing_is_looked_for_before_it_would_have_paid() {
    assert!(!looks(&mut Lookout::default()));
    assert!(!looks(&mut woken_after(BLOCK_LOOKOUT_WORTH_US + 1)));
    assert!(looks(&mut woken_after(BLOCK_LOOKOUT_WORTH_US)));
}

#[test]
fn a_look_in_vain_is_the_last_until_a_request_comes_soon_again() {
    let mut lookout = woken_after(1);
    assert_eq!(lookout.find(|| Ok::<_, Infallible>(false)), Ok(false));
    for looked in [false, true] {
        lookout.sleeps(Instant::now());
        lookout.woken(Instant::now());
        assert_eq!(looks(&mut lookout), looked);
    }
}

#[test]
fn a_guest_that_is_always_a_little_late_is_looked_for_ever_more_seldom() {
    let mut lookout = Lookout::default();
    let (mut now, mut looks) = (Instant::now(), 0);
    for _ in 0..1000 {
        lookout.sleeps(now);
        now += Duration::from_micros(BLOCK_LOOKOUT_WORTH_US);
        lookout.woken(now);
        let mut looked = false;
        let found: Result<bool, Infallible> = lookout.find(|| {
            looked = true;
            Ok(false)
        });
        assert_eq!(found, Ok(false));
        looks += u32::from(looked);
    }
    let most = 1000 / BLOCK_LOOKOUTS_FORGONE_MAX + BLOCK_LOOKOUTS_FORGONE_MAX.ilog2() + 1;
    assert!((1..=most).contains(&looks), "{looks} looks");
}

#[test]
fn a_call_that_nobody_slept_before_changes_nothing() {
    let mut lookout = woken_after(1);
    lookout.woken(Instant::now() + Duration::from_secs(1));
    assert!(looks(&mut lookout));
}
