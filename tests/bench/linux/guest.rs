//! One Linux guest that does lines of shell on command (guest-images/recipes/bench/files/init). What a line writes comes
//! back on a disk; how long it is and its digest come on the console, and only what fits both is believed.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::PATIENCE_LINUX;
use crate::guest::Host;

/// Longest report, and size of the disk that takes it.
const REPORT_BYTES_MAX: u64 = 1 << 20;

/// A guest that waits for a line.
pub(super) struct Guest {
    host: Host,
    reports: File,
    /// Lines done.
    done: usize,
}

impl Guest {
    /// Makes the disk for reports, then boots; answers when the guest waits for its first line.
    pub(super) fn boot(reports: &Path, boot: impl FnOnce() -> Host) -> Guest {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(reports).unwrap();
        file.set_len(REPORT_BYTES_MAX).unwrap();
        let mut host = boot();
        host.wait_for("bench: ready", 1, PATIENCE_LINUX);
        Guest { host, reports: file, done: 0 }
    }

    /// Has the guest's shell do a line, which must succeed; answers what it wrote to its standard output.
    pub(super) fn run(&mut self, line: &str) -> Vec<u8> {
        self.host.type_line(line);
        self.done += 1;
        self.host.wait_for("bench: ended", self.done, PATIENCE_LINUX);
        let told = self.host.told();
        report(&told, &self.reports).unwrap_or_else(|why| panic!("{line}: {why}\n{told}"))
    }

    /// As [`Guest::run`]; what was written is JSON.
    pub(super) fn json(&mut self, line: &str) -> Value {
        let report = self.run(line);
        serde_json::from_slice(&report)
            .unwrap_or_else(|error| panic!("{line}: {error}: {}", String::from_utf8_lossy(&report)))
    }
}

/// The last report that a console tells of, read from the disk for reports. What is not as told is refused.
fn report(told: &str, reports: &File) -> Result<Vec<u8>, String> {
    let last = told.lines().rev().find_map(|line| line.trim_end().strip_prefix("bench: report "));
    let words: Vec<&str> = last.ok_or("no report")?.split(' ').collect();
    let [status, length, digest] = words[..] else {
        return Err(format!("a report of {} words", words.len()));
    };
    let length = length.parse::<u64>().map_err(|_| format!("a report of {length} bytes"))?;
    if length > REPORT_BYTES_MAX {
        return Err(format!("a report of {length} bytes, more than {REPORT_BYTES_MAX}"));
    }
    let mut report = vec![0; length as usize];
    reports.read_exact_at(&mut report, 0).map_err(|error| format!("the report cannot be read: {error}"))?;
    let found: String = Sha256::digest(&report).iter().map(|byte| format!("{byte:02x}")).collect();
    let text = String::from_utf8_lossy(&report);
    match (found == digest, status) {
        (false, _) => Err(format!("the report is not what the guest wrote: {text}")),
        (true, "0") => Ok(report),
        (true, status) => Err(format!("it ended with {status} in the guest: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of `{}`.
    const DIGEST: &str = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn of(told: &str, disk: &[u8]) -> Result<Vec<u8>, String> {
        let reports = tempfile::tempfile().unwrap();
        reports.write_all_at(disk, 0).unwrap();
        report(told, &reports)
    }

    #[test]
    fn only_a_report_that_is_as_told_is_believed() {
        let good = format!("bench: report 0 2 {DIGEST}\r\nbench: ended\r\n");
        assert_eq!(of(&good, b"{}and an older one"), Ok(b"{}".to_vec()));
        // The last one counts.
        assert_eq!(of(&format!("bench: report 1 9 x\n{good}"), b"{}"), Ok(b"{}".to_vec()));
        for (told, disk, why) in [
            (good.clone(), &b"{]"[..], "not what the guest wrote"),
            (good.clone(), b"{", "cannot be read"),
            (good.replace("report 0", "report 1"), b"{}", "ended with 1"),
            (good.replace(" 2 ", " 1048577 "), b"{}", "more than 1048576"),
            (good.replace(" 2 ", " -2 "), b"{}", "-2 bytes"),
            (good.replace(DIGEST, "0"), b"{}", "not what the guest wrote"),
            ("bench: report 0 2\n".to_owned(), b"{}", "2 words"),
            (String::new(), b"{}", "no report"),
        ] {
            let refused = of(&told, disk).unwrap_err();
            assert!(refused.contains(why), "{told:?}: {refused}");
        }
    }
}
