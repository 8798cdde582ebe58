use wire::migration::Side;

use super::*;

const MIB: u64 = 1 << 20;

/// A source in a round that began with so many MiB.
struct Case {
    name: &'static str,
    phase: Phase,
    rounds: u32,
    sent_mib: u64,
    skipped_mib: u64,
    round_mib: u64,
    left_mib: u64,
    mib_per_s: u64,
    dirtied_mib_per_s: u64,
    remaining_s: Option<u64>,
}

/// Ten seconds have gone.
const FIRST: Case = Case {
    name: "the pace so far in the first round",
    phase: Phase::Rounds,
    rounds: 1,
    sent_mib: 1000,
    skipped_mib: 0,
    round_mib: 3000,
    left_mib: 2000,
    mib_per_s: 0,
    dirtied_mib_per_s: 0,
    remaining_s: Some(20),
};

const SECOND: Case = Case {
    name: "a guest that writes nothing",
    rounds: 2,
    round_mib: 400,
    left_mib: 400,
    mib_per_s: 100,
    remaining_s: Some(4),
    ..FIRST
};

impl Case {
    fn moved(&self) -> Moved {
        Moved {
            sent_bytes: self.sent_mib * MIB,
            skipped_bytes: self.skipped_mib * MIB,
            left_bytes: self.left_mib * MIB,
            rounds: self.rounds,
            bytes_per_s: self.mib_per_s * MIB,
            dirtied_bytes_per_s: self.dirtied_mib_per_s * MIB,
            total_us: 10_000_000,
            ..Moved::default()
        }
    }

    fn status(&self, left_mib: u64) -> MigrationStatus {
        MigrationStatus {
            side: Side::Source,
            phase: self.phase,
            in_doubt: false,
            owes: false,
            link_lost: false,
            progress: Moved { left_bytes: left_mib * MIB, ..self.moved() },
            detail: None,
        }
    }
}

#[test]
fn what_remains_is_what_is_left_and_what_each_round_is_expected_to_leave() {
    let cases = [
        FIRST,
        Case { name: "what is skipped took no time", skipped_mib: 1000, remaining_s: Some(10), ..FIRST },
        Case {
            name: "too little has gone to tell",
            sent_mib: 0,
            skipped_mib: 1000,
            remaining_s: None,
            ..FIRST
        },
        Case { name: "the other end gets ready", phase: Phase::Greet, remaining_s: None, ..FIRST },
        SECOND,
        Case {
            // 4 s, then 2, 1, ...
            name: "each round leaves half of what it had",
            dirtied_mib_per_s: 50,
            remaining_s: Some(8),
            ..SECOND
        },
        Case {
            // 1 s of this round, and 2 s, 1 s, ... of the next ones.
            name: "what was written since the round began",
            dirtied_mib_per_s: 50,
            left_mib: 100,
            remaining_s: Some(5),
            ..SECOND
        },
        Case { name: "as much as a round may leave", dirtied_mib_per_s: 75, remaining_s: Some(16), ..SECOND },
        Case { name: "it leaves more than that", dirtied_mib_per_s: 76, remaining_s: None, ..SECOND },
        Case { name: "it writes faster than all goes", dirtied_mib_per_s: 200, remaining_s: None, ..SECOND },
        Case {
            name: "it stands still, and writes no more",
            phase: Phase::LastRound,
            dirtied_mib_per_s: 200,
            left_mib: 50,
            remaining_s: Some(1),
            ..SECOND
        },
        Case {
            name: "it runs elsewhere",
            phase: Phase::Owing,
            dirtied_mib_per_s: 200,
            remaining_s: Some(4),
            ..SECOND
        },
        Case { name: "it has moved", phase: Phase::Moved, remaining_s: None, ..SECOND },
    ];
    for case in cases {
        let found = remaining_s(case.phase, &case.moved(), case.round_mib * MIB);
        assert_eq!(found, case.remaining_s, "{}", case.name);
    }
}

#[test]
fn no_figure_of_a_vmm_is_too_much() {
    for (number, gone) in [(0, 0), (1, 0), (1, 1), (u64::MAX, 0), (u64::MAX, u64::MAX)] {
        for rounds in [0, 1, 2, u32::MAX] {
            let progress = Moved {
                sent_bytes: gone,
                left_bytes: u64::MAX,
                skipped_bytes: gone,
                rounds,
                bytes_per_s: number,
                dirtied_bytes_per_s: number / 2,
                throttle_percent: u8::MAX,
                expected_downtime_us: number,
                downtime_us: number,
                total_us: number,
            };
            for phase in Phase::ALL {
                let status = MigrationStatus { phase, progress, ..SECOND.status(0) };
                let mut outlook = Outlook { round: rounds, round_bytes: u64::MAX };
                assert!(outlook.progress(&status).percent <= 99);
            }
        }
    }
}

#[test]
fn a_round_is_as_long_as_the_most_that_was_seen_left_of_it() {
    let case = Case { dirtied_mib_per_s: 50, ..SECOND };
    let mut outlook = Outlook::default();
    assert_eq!(outlook.progress(&case.status(400)).remaining_s, Some(8));
    assert_eq!(outlook.progress(&case.status(100)).remaining_s, Some(5));
    // Nothing is known of how the next one began.
    let next = Case { rounds: 3, ..case };
    assert_eq!(outlook.progress(&next.status(100)).remaining_s, Some(2));
}

#[test]
fn what_is_expected_of_a_guest_is_told_while_it_runs() {
    let told = |phase| {
        let mut status = Case { phase, ..SECOND }.status(400);
        (status.progress.expected_downtime_us, status.progress.throttle_percent) = (41_001, 30);
        let progress = Outlook::default().progress(&status);
        (progress.bytes_per_s, progress.expected_downtime_ms, progress.throttle_percent)
    };
    assert_eq!(told(Phase::Rounds), (Some(100 * MIB), Some(42), Some(30)));
    assert_eq!(told(Phase::LastRound), (Some(100 * MIB), None, None));
    let first = Outlook::default().progress(&FIRST.status(2000));
    assert_eq!((first.bytes_per_s, first.expected_downtime_ms), (Some(100 * MIB), None));
}

#[test]
fn files_remain_for_as_long_as_they_took_so_far() {
    let told = |sent, total| {
        let Progress { percent, bytes_per_s, remaining_s, .. } =
            of_files(sent, total, Duration::from_secs(2));
        (percent, bytes_per_s, remaining_s)
    };
    assert_eq!(told(200 * MIB, 500 * MIB), (36, Some(100 * MIB), Some(3)));
    assert_eq!(told(MIB - 1, 500 * MIB), (1, None, None));
    assert_eq!(told(500 * MIB, 500 * MIB), (89, Some(250 * MIB), None));
    assert_eq!(told(0, 0), (89, None, None));
}
