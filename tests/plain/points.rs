//! Where moves are killed: each point that a daemon passes in a move, and each phase that it saves one in, has its place in
//! the lists of the suites that kill there, or a reason why not.
use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::walls::sources;

/// A suite that kills: where its lists are, what they are called, and the sources whose points it is to have in them.
struct Suite {
    file: &'static str,
    lists: &'static [&'static str],
    sources: &'static [&'static str],
    /// Points of these sources at which nothing is killed, and why.
    without: &'static [(&'static str, &'static str)],
}

const NO_FILES: &str = "nothing is carried as files where a machine moves";

const SUITES: [Suite; 2] = [
    Suite {
        file: "tests/daemon/live.rs",
        lists: &["POINTS", "POINTS_OF_OWING", "RECONNECTED"],
        sources: &[
            "src/host/migration/carry.rs",
            "src/host/migration/take.rs",
            "src/host/migration/live.rs",
            "src/host/servers/live.rs",
        ],
        without: &[
            ("move.copied", NO_FILES),
            ("move.filled", NO_FILES),
            ("move.flushed", NO_FILES),
            ("server.ordered", "an order to pause, which is no move's; the sweep of calls counts it"),
        ],
    },
    Suite {
        file: "tests/daemon/moves.rs",
        lists: &["DEATHS"],
        sources: &["src/host/migration/carry.rs", "src/host/migration/take.rs"],
        without: &[],
    },
];

/// The phases that a move is saved in, each with points of every suite at which the source, and the target, dies in it.
const PHASES: [(&str, [Option<&str>; 2]); 6] = [
    ("Copy", [Some("move.accepted:1"), Some("move.recorded:1")]),
    ("Ready", [None, Some("move.decided:1")]),
    ("Commit", [Some("move.decided:1"), None]),
    ("Moved", [Some("move.decided:2"), Some("move.decided:2")]),
    // A move has failed before it comes to these: what daemons do that start anew in them is walked by
    // `src/host/servers/moving/plan/live_tests.rs`.
    ("Returned", [None, None]),
    ("Dropped", [None, None]),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|cause| panic!("{path}: {cause}"))
}

/// What `checkpoint` is called with.
fn passed(source: &str) -> BTreeSet<String> {
    let calls = source.split(".checkpoint(").skip(1);
    calls
        .filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next())
        .map(str::to_owned)
        .collect()
}

/// The points in the lists of a suite, with their numbers.
fn killed(suite: &Suite) -> BTreeSet<String> {
    let text = read(suite.file);
    let list = |name: &&str| {
        let (_, rest) = text.split_once(&format!("const {name}: ")).unwrap_or_else(|| panic!("no {name}"));
        let (_, value) = rest.split_once(" = ").unwrap();
        let (value, _) = value.split_once(";\n").unwrap();
        value.split('"').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()
    };
    suite.lists.iter().flat_map(list).collect()
}

#[test]
fn every_point_of_a_move_is_one_at_which_it_is_killed() {
    for suite in SUITES {
        let passed: BTreeSet<String> = suite.sources.iter().flat_map(|path| passed(&read(path))).collect();
        let without: BTreeSet<String> = suite.without.iter().map(|(point, _)| (*point).to_owned()).collect();
        let killed: BTreeSet<String> = killed(&suite)
            .into_iter()
            .map(|point| point.split_once(':').expect("a point and its number").0.to_owned())
            .collect();
        assert!(passed.len() > 5, "{passed:?}");
        let expected: BTreeSet<String> = passed.difference(&without).cloned().collect();
        assert_eq!(killed, expected, "{}: what is killed at, and what is passed", suite.file);
        assert!(without.is_subset(&passed), "{}: {without:?} of {passed:?}", suite.file);
    }
}

#[test]
fn every_point_of_a_move_lies_in_those_sources() {
    let known: BTreeSet<String> =
        SUITES.iter().flat_map(|suite| suite.sources).flat_map(|path| passed(&read(path))).collect();
    let all = sources(&root().join("src/host"));
    let all: BTreeSet<String> =
        all.iter().flat_map(|path| passed(&std::fs::read_to_string(path).unwrap())).collect();
    let strange: Vec<&String> =
        all.iter().filter(|point| point.starts_with("move.") && !known.contains(*point)).collect();
    assert!(strange.is_empty(), "{strange:?}");
}

#[test]
fn every_phase_of_a_move_is_one_in_which_it_is_killed() {
    let plan = read("src/host/servers/moving/plan.rs");
    let (_, rest) = plan.split_once("pub(crate) enum Phase {\n").unwrap();
    let (body, _) = rest.split_once("\n}").unwrap();
    let phases: Vec<&str> = body
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with("///"))
        .map(|line| line.trim_end_matches(','))
        .collect();
    assert_eq!(phases, PHASES.map(|(phase, _)| phase));
    for suite in SUITES {
        let killed = killed(&suite);
        for (phase, point) in
            PHASES.into_iter().flat_map(|(phase, points)| points.map(|point| (phase, point)))
        {
            assert!(point.is_none_or(|point| killed.contains(point)), "{phase}: {}: {point:?}", suite.file);
        }
    }
}
