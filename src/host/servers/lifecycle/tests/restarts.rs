//! What the restart policy makes of the end of a machine, and how long it waits.
use super::*;

/// The phase after a machine that ran until `now_ms` has ended and was released.
fn after(reason: Reason, policy: RestartPolicy, failures: u32, now_ms: i64) -> Life {
    let context = Context { now_ms, policy };
    let running = Life { failures, ..life(Phase::Running { vmm: vmm() }) };
    let ended = step(&running, ended(reason), context);
    step(&ended.life, Event::Released { flushed: false, kept: false }, context).life
}

#[test]
fn each_policy_restarts_what_it_says() {
    use ServerState::{Failed, Starting, Stopped};
    let table = [
        (RestartPolicy::Never, Reason::PoweredOff, Stopped),
        (RestartPolicy::Never, Reason::TripleFault, Failed),
        (RestartPolicy::OnFailure, Reason::PoweredOff, Stopped),
        (RestartPolicy::OnFailure, Reason::GuestPanicked, Starting),
        (RestartPolicy::OnFailure, Reason::Crashed("here".to_owned()), Starting),
        (RestartPolicy::Always, Reason::PoweredOff, Starting),
        (RestartPolicy::Always, Reason::TripleFault, Starting),
    ];
    for (policy, reason, state) in table {
        assert_eq!(after(reason.clone(), policy, 0, 10).phase.state(), state, "{policy:?} {reason:?}");
    }
}

#[test]
fn pauses_before_restarts_grow_to_a_bound_and_begin_anew_after_a_sound_run() {
    let pause_ms = |failures, now_ms| {
        let life = after(Reason::TripleFault, RestartPolicy::OnFailure, failures, now_ms);
        life.phase.deadline_ms().unwrap() - now_ms
    };
    assert_eq!([0, 1, 2, 3].map(|failures| pause_ms(failures, 10)), [1000, 2000, 4000, 8000]);
    assert_eq!(pause_ms(40, 10), crate::servers::limits::RESTART_PAUSE_MS_MAX);
    assert_eq!(pause_ms(40, crate::servers::limits::STABLE_MS), 1000);
}

#[test]
fn a_clock_that_is_set_back_makes_nobody_wait_longer() {
    let waiting = after(Reason::TripleFault, RestartPolicy::OnFailure, 3, 500_000);
    let at = |now_ms| {
        step(&waiting, Event::DeadlinePassed, Context { now_ms, policy: RestartPolicy::OnFailure }).life.phase
    };
    assert_eq!(at(507_999), waiting.phase);
    assert_eq!(at(508_000), Phase::Starting { vmm: None });
    assert_eq!(at(400_000), waiting.phase, "it could be so early");
    assert_eq!(at(200_000), Phase::Starting { vmm: None });
}

#[test]
fn a_machine_that_runs_long_enough_ends_the_row_of_failures() {
    let running = Life { failures: 3, booted_ms: Some(50), ..life(Phase::Running { vmm: vmm() }) };
    let due_ms = 50 + crate::servers::limits::STABLE_MS;
    assert_eq!(running.deadline_ms(), Some(due_ms));
    let at =
        |now_ms| step(&running, Event::DeadlinePassed, Context { now_ms, policy: RestartPolicy::OnFailure });
    assert_eq!(at(due_ms - 1).life, running);
    let sound = at(due_ms).life;
    assert_eq!(sound, Life { failures: 0, ..running });
    assert_eq!(sound.deadline_ms(), None);
}
