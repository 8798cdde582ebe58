//! Lines for people in the VMM's log, which is its standard error. Bounded, because a guest can cause lines and
//! nobody rotates the file. What programs need to know goes over the wire instead.
use std::fmt::Display;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::limits::LOG_LINES_MAX;

static LINES: AtomicU32 = AtomicU32::new(0);

/// Writes one line; the last one allowed says that it is.
pub(crate) fn line(text: impl Display) {
    match LINES.fetch_add(1, Ordering::Relaxed) {
        count if count < LOG_LINES_MAX => eprintln!("{text}"),
        count if count == LOG_LINES_MAX => eprintln!("(no more lines: {LOG_LINES_MAX} were written)"),
        _ => LINES.store(LOG_LINES_MAX + 1, Ordering::Relaxed),
    }
}

/// Joins an error with its causes, for a person.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        // An error that repeats its cause in its own text tells it once.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}
