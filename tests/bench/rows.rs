//! What was measured: rows of one distribution each, remarks, and what could not be done; as a table and as JSON.
//! It takes no time itself and judges nothing.
use std::fmt::Write;

use crate::guest::Counts;

/// Everything one run has found.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
    skipped: Vec<String>,
    failed: Vec<String>,
}

/// What one series of samples belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Series<'a> {
    /// The group's figure, such as `start_ms`.
    pub(crate) bench: &'a str,
    pub(crate) case: &'a str,
    /// Whose: `toft`, `floor`, `qemu`.
    pub(crate) who: &'a str,
    /// `ms`, `kB`, `1/s`.
    pub(crate) unit: &'a str,
}

struct Row {
    bench: String,
    case: String,
    who: String,
    unit: String,
    median: f64,
    p99: f64,
    min: f64,
    max: f64,
    n: usize,
}

impl Report {
    /// Adds a series. Samples are in the series' unit; there is at least one. Answers the median.
    pub(crate) fn add(&mut self, series: Series<'_>, samples: &[f64]) -> f64 {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else {
            panic!("{} {} of {} has no samples", series.bench, series.case, series.who);
        };
        // Of two in the middle the mean: neither run is the better one's.
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
        self.rows.push(Row {
            bench: series.bench.to_owned(),
            case: series.case.to_owned(),
            who: series.who.to_owned(),
            unit: series.unit.to_owned(),
            median,
            p99: p99(&sorted),
            min: *min,
            max: *max,
            n: sorted.len(),
        });
        median
    }

    /// Exits and system calls per operation, counted once over many operations.
    pub(crate) fn counts(&mut self, bench: &str, case: &str, who: &str, counts: &Counts, operations: f64) {
        for (what, count) in [("exits", counts.exits), ("system calls", counts.system_calls)] {
            let case = format!("{case}: {what}");
            self.add(Series { bench, case: &case, who, unit: "1/op" }, &[count / operations.max(1.0)]);
        }
    }

    /// A sentence below the table: a ratio within this run, a bar, something that is not there.
    pub(crate) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// Whether a figure keeps to what was wanted of it, as a sentence. Being missed is no failure of the run.
    pub(crate) fn bar(&mut self, what: &str, is_met: bool) {
        self.notes.push(format!("{} {what}", if is_met { "met:   " } else { "missed:" }));
    }

    /// A group that this machine cannot measure. The sentence says why, and what to do.
    pub(crate) fn skipped(&mut self, group: &str, why: &str) {
        self.skipped.push(format!("skipped: {group}: {why}"));
    }

    pub(crate) fn has_skipped(&self) -> bool {
        !self.skipped.is_empty()
    }

    /// Something that should have been measured was not.
    pub(crate) fn failed(&mut self, what: &str) {
        self.failed.push(what.to_owned());
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.failed.is_empty()
    }

    pub(crate) fn table(&self, machine: &str) -> String {
        let mut text = format!("\n{machine}\n\n");
        let _ = writeln!(
            text,
            "{:<20} {:<30} {:<16} {:<6} {:>11} {:>11} {:>11} {:>11} {:>5}",
            "bench", "case", "who", "unit", "median", "p99", "min", "max", "n"
        );
        for row in &self.rows {
            let [median, p99, min, max] = [row.median, row.p99, row.min, row.max].map(figure);
            let _ = writeln!(
                text,
                "{:<20} {:<30} {:<16} {:<6} {median:>11} {p99:>11} {min:>11} {max:>11} {:>5}",
                row.bench, row.case, row.who, row.unit, row.n
            );
        }
        text.push('\n');
        let failed = self.failed.iter().map(|what| format!("not measured: {what}"));
        self.notes
            .iter()
            .chain(&self.skipped)
            .cloned()
            .chain(failed)
            .for_each(|line| text.extend([line.as_str(), "\n"]));
        text
    }

    pub(crate) fn json(&self) -> String {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                serde_json::json!({
                    "bench": row.bench, "case": row.case, "who": row.who, "unit": row.unit,
                    "median": row.median, "p99": row.p99, "min": row.min, "max": row.max, "n": row.n,
                })
            })
            .collect();
        format!("{:#}\n", serde_json::Value::from(rows))
    }
}

/// The smallest sample that 99 % of the samples do not exceed.
fn p99(sorted: &[f64]) -> f64 {
    let rank = (sorted.len() as f64 * 0.99).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Three digits that say something.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series<'a>(who: &'a str) -> Series<'a> {
        Series { bench: "start_ms", case: "vmm", who, unit: "ms" }
    }

    #[test]
    fn a_row_has_the_middle_and_the_ends_of_its_samples() {
        let mut report = Report::default();
        let samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(report.add(series("toft"), &samples), 100.5);
        assert_eq!(report.add(series("odd"), &[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(report.add(series("qemu"), &[7.5]), 7.5);
        let rows: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        let expected = serde_json::json!([
            { "bench": "start_ms", "case": "vmm", "who": "toft", "unit": "ms",
              "median": 100.5, "p99": 198.0, "min": 1.0, "max": 200.0, "n": 200 },
            { "bench": "start_ms", "case": "vmm", "who": "odd", "unit": "ms",
              "median": 2.0, "p99": 3.0, "min": 1.0, "max": 3.0, "n": 3 },
            { "bench": "start_ms", "case": "vmm", "who": "qemu", "unit": "ms",
              "median": 7.5, "p99": 7.5, "min": 7.5, "max": 7.5, "n": 1 },
        ]);
        assert_eq!(rows, expected);
    }

    #[test]
    fn what_was_not_measured_is_told_and_only_a_failure_makes_a_run_less_than_whole() {
        let mut report = Report::default();
        report.skipped("linux", "no such KVM");
        assert!(report.is_whole() && report.has_skipped());
        report.failed("disk");
        assert!(!report.is_whole());
        let table = report.table("a machine");
        assert!(table.ends_with("skipped: linux: no such KVM\nnot measured: disk\n"), "{table}");
    }
}
