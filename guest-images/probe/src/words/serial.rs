//! `serial[=<ms>]`: reads the console until a newline and says what came.

use crate::clock::Deadline;
use crate::console::{self, Line};
use crate::failure::Outcome;
use crate::{check, say};

pub fn run(timeout_ms: u64, report: &mut Line) -> Outcome {
    say!("probe: serial waiting");
    let deadline = Deadline::in_ms(timeout_ms);
    let mut text = Line::new();
    loop {
        match console::read() {
            Some(b'\n' | b'\r') => break,
            Some(byte) => text.push(byte),
            None => check!(!deadline.passed(), "no newline after {timeout_ms} ms"),
        }
    }
    say!("probe: serial got {}", text.as_str());
    super::note(report, format_args!("bytes={}", text.as_bytes().len()));
    Ok(())
}
