//! A probe under way: who asked, where its report comes from, and when it has taken too long.
use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use sys::pidfd::{Ended, PidFd, Signal};
use wire::launch::KvmReport;

use crate::limits::{PROBE_MS_MAX, REPORT_BYTES_MAX};

/// One probe.
#[derive(Debug)]
pub(super) struct Probing {
    request: u64,
    output: File,
    deadline: Option<Instant>,
}

impl Probing {
    pub(super) fn new(request: u64, output: File) -> Probing {
        Probing { request, output, deadline: Some(Instant::now() + Duration::from_millis(PROBE_MS_MAX)) }
    }

    /// Kills a probe that is over its time.
    pub(super) fn expire(&mut self, pidfd: &PidFd) {
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.deadline = None;
            // It may have ended by itself meanwhile; either way its end is reported.
            let _ = pidfd.signal(Signal::SIGKILL);
        }
    }

    /// Time left, rounded up; `None` once it is over.
    pub(super) fn left_ms(&self) -> Option<i32> {
        let left = self.deadline?.saturating_duration_since(Instant::now());
        Some(i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1))
    }

    /// The answer to the request, when the child has ended.
    pub(super) fn finish(self, ended: Ended) -> (u64, Result<KvmReport, String>) {
        let result = match ended {
            _ if self.deadline.is_none() => Err(format!("the probe did not end within {PROBE_MS_MAX} ms")),
            Ended::Code(0) => self.report(),
            Ended::Code(_) => {
                self.read().and_then(|text| Err(String::from_utf8_lossy(&text).trim().to_owned()))
            }
            Ended::Signal(signal) => Err(format!("the probe was ended by signal {signal}")),
        };
        (self.request, result)
    }

    fn report(&self) -> Result<KvmReport, String> {
        let unreadable = |error| format!("the probe's report is unreadable: {error}");
        serde_json::from_slice(&self.read()?).map_err(unreadable)
    }

    /// The child has gone and was the only writer, so this does not wait.
    fn read(&self) -> Result<Vec<u8>, String> {
        let mut text = Vec::new();
        let read = (&self.output).take(REPORT_BYTES_MAX as u64).read_to_end(&mut text);
        read.map_err(|error| format!("cannot read the probe's report: {error}"))?;
        Ok(text)
    }
}
