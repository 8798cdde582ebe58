//! The last will in practice: whoever ends the machine writes it first, and a panic writes one for itself.
//! A fatal signal has no time to; an empty will and the exit status tell that.
use std::fs::File;
use std::panic::PanicHookInfo;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use wire::will::{Reason, Will};

use crate::log;

/// The file that outlives the process.
#[derive(Debug, Clone)]
pub(crate) struct LastWill {
    file: Arc<File>,
}

impl LastWill {
    /// Keeps the file and makes every panic from here on write into it and abort: a VMM that has met a bug of
    /// its own does not run a guest on.
    pub(crate) fn arm(file: File) -> LastWill {
        let will = LastWill { file: Arc::new(file) };
        let own = will.clone();
        std::panic::set_hook(Box::new(move |panic| {
            own.write(Reason::Crashed(describe(panic)));
            eprintln!("{panic}");
            std::process::abort();
        }));
        will
    }

    /// Writes why the machine ends. The first reason stands.
    pub(crate) fn write(&self, reason: Reason) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        if let Err(error) = (Will { reason, at_unix_ms }).write(&self.file) {
            log::line(format_args!("cannot write the last will: {error}"));
        }
    }
}

fn describe(panic: &PanicHookInfo<'_>) -> String {
    let message = panic.payload_as_str().unwrap_or("no message");
    match panic.location() {
        Some(place) => format!("{}:{}: {message}", place.file(), place.line()),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests;
