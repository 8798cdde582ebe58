//! How long a guest got nothing done, by its own clock, which goes on by the time that it stands still in a move. It is read off
//! the lines `tick` and `dirty pass` of the probe's console. Called by the groups that move machines.
use std::time::{Duration, Instant};

use crate::rows::{Report, Series};
use crate::vmm_driver::PATIENCE;

/// What an idle guest does: it tells the time each millisecond.
pub(crate) const TICKS: &str = "ticks=1000000000,1";

/// How often a guest that writes tells of its longest gap, in milliseconds.
pub(crate) const REPORT_MS: u32 = 50;

/// For how long a guest is looked at that nothing happens to.
const QUIET: Duration = Duration::from_millis(100);

/// For how long guests stood still in moves, in milliseconds.
#[derive(Default)]
pub(crate) struct Stood {
    /// As the VMM measures it.
    pub(crate) blackout_ms: Vec<f64>,
    /// The gap that the guest itself saw at whose end it was told that it had been stopped.
    gap_ms: Vec<f64>,
    /// The longest gap that it saw from before each move to after it.
    whole_ms: Vec<f64>,
    /// The longest that it saw just before, when nothing happened.
    quiet_ms: Vec<f64>,
}

impl Stood {
    /// Looks at a guest that nothing happens to. `console` answers what its console has.
    pub(crate) fn look_before(&mut self, mut console: impl FnMut() -> String) {
        let since_ns = last_ns(&console());
        std::thread::sleep(QUIET);
        self.quiet_ms.push(longest_ms(&told_since(since_ns, console)));
    }

    /// Looks at a guest that has moved since it told that time.
    pub(crate) fn look_after(&mut self, since_ns: u64, console: impl FnMut() -> String) {
        let lines = told_since(since_ns, console);
        self.whole_ms.push(longest_ms(&lines));
        let stopped_ms = lines.iter().filter_map(|line| line.stopped_ms).reduce(f64::max);
        self.gap_ms.push(stopped_ms.expect("the guest was told that it had been stopped"));
    }

    /// Adds the rows, and whether both measures of the standstill keep to what is wanted. Answers the median of the longest gaps in all of
    /// a move.
    pub(crate) fn tell(&self, report: &mut Report, case: &str, most_ms: f64) -> f64 {
        let series = |bench, who| Series { bench, case, who, unit: "ms" };
        report.add(series("gap_ms", "none"), &self.quiet_ms);
        let whole_ms = report.add(series("gap_ms", "toft, whole move"), &self.whole_ms);
        for (bench, samples) in [("gap_ms", &self.gap_ms), ("blackout_ms", &self.blackout_ms)] {
            let median = report.add(series(bench, "toft"), samples);
            let text = format!("{bench} {case}: {median:.1} ms (wanted: at most {most_ms})");
            report.bar(&text, median <= most_ms);
        }
        whole_ms
    }
}

/// A line that tells the time: the longest gap since the line before, and the one after which the guest was told that it had been stopped.
struct Told {
    ns: u64,
    gap_ms: f64,
    stopped_ms: Option<f64>,
}

fn told(console: &str) -> Vec<Told> {
    // Cut off from a line that is under way.
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let number = |line: &str, name| line.split_once(name)?.1.split_whitespace().next()?.parse::<u64>().ok();
    let mut last_ns = None;
    let of_line = |line: &str| {
        let ns = number(line, " ns=")?;
        let since_ns = ns.saturating_sub(last_ns.replace(ns).unwrap_or(ns));
        let ms = |us: u64| us as f64 / 1e3;
        let gap_ms = number(line, " gap_us=").map_or(since_ns as f64 / 1e6, ms);
        let stopped_us = number(line, " stopped_us=").filter(|us| *us > 0);
        let stopped_ms = (number(line, " stopped=") == Some(1)).then_some(gap_ms).or(stopped_us.map(ms));
        Some(Told { ns, gap_ms, stopped_ms })
    };
    whole.lines().filter_map(of_line).collect()
}

/// The time that a guest has told last; 0 if it has told none.
pub(crate) fn last_ns(console: &str) -> u64 {
    told(console).last().map_or(0, |last| last.ns)
}

/// What a guest has told since that time, once it has told the time twice more: what happened as it began a line is in the next
/// one.
fn told_since(since_ns: u64, mut console: impl FnMut() -> String) -> Vec<Told> {
    let (from_ns, end) = (last_ns(&console()), Instant::now() + PATIENCE);
    loop {
        let console = console();
        assert!(!console.contains("FAILED"), "{console}");
        let mut lines = told(&console);
        if lines.iter().rev().take_while(|line| line.ns > from_ns).count() >= 2 {
            lines.retain(|line| line.ns > since_ns);
            return lines;
        }
        assert!(Instant::now() < end, "the guest tells no time:\n{console}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn longest_ms(lines: &[Told]) -> f64 {
    lines.iter().map(|line| line.gap_ms).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_what_a_line_says_or_the_time_between_two_lines_that_are_whole() {
        let ticks = "probe: tick 1 5 ns=1000000 stopped=0 steal=0\r\nprobe: tick 2 6 ns=3500000 stopped=0 steal=0\r\n";
        let said = format!(
            "{ticks}probe: dirty pass 3 written_mib=9 ns=9000000 gap_us=700 stopped_us=600\r\nprobe: tick 4 7 ns=95"
        );
        let gaps: Vec<f64> = told(&said).iter().map(|line| line.gap_ms).collect();
        assert_eq!(gaps, [0.0, 2.5, 0.7]);
        let stopped: Vec<_> = told(&said).iter().map(|line| line.stopped_ms).collect();
        assert_eq!(stopped, [None, None, Some(0.6)]);
        assert_eq!((last_ns(&said), last_ns("probe: hello")), (9_000_000, 0));
    }

    #[test]
    fn the_gap_of_a_move_is_the_one_after_which_the_guest_was_told_of_it() {
        let times = ["1000000", "9000000", "29000000", "33000000 stopped=1", "34000000", "90000000"];
        let lines = times.map(|ns| format!("probe: tick 1 1 ns={ns}\n"));
        let (mut stood, mut shown) = (Stood::default(), 3);
        stood.look_after(1_000_000, || {
            shown += 1;
            lines[..shown.min(lines.len())].concat()
        });
        // The first look shows four lines, so the sixth is waited for.
        assert_eq!((stood.gap_ms[0], stood.whole_ms[0]), (4.0, 56.0));
    }
}
