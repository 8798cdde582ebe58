//! What goes wrong, as data: everything a problem document needs but the request's path and id.
//! It knows no HTTP; `http` turns it into a response and logs the chain of causes.
use std::sync::Arc;

use model::{Code, FieldError, OperationId, Problem};

/// The result of anything in this room.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong.
#[derive(Debug, Clone)]
pub struct Error {
    /// For programs.
    pub code: Code,
    /// What happened this time and what to do.
    pub detail: String,
    /// Fields that are not valid.
    pub errors: Vec<FieldError>,
    /// With `wrong_state`, and then always: what can be done now.
    pub allowed_actions: Option<Vec<String>>,
    /// The operation that is in the way, or that failed.
    pub operation_id: Option<OperationId>,
    pub(crate) source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of this code; `detail` is a sentence for the caller.
    pub fn new(code: Code, detail: impl Into<String>) -> Error {
        Error {
            code,
            detail: detail.into(),
            errors: Vec::new(),
            // Nothing, unless `with_actions` knows better.
            allowed_actions: (code == Code::WrongState).then(Vec::new),
            operation_id: None,
            source: None,
        }
    }

    /// There is no such `noun`.
    pub fn not_found(noun: &str, id: impl std::fmt::Display) -> Error {
        Error::new(Code::NotFound, format!("there is no {noun} {id}"))
    }

    /// One field is not valid. `pointer` is a JSON pointer into the body or a parameter's name.
    pub fn invalid(pointer: impl Into<String>, code: &str, detail: impl Into<String>) -> Error {
        Error::all_invalid(vec![FieldError {
            pointer: pointer.into(),
            code: code.into(),
            detail: detail.into(),
        }])
    }

    /// These fields are not valid. There is at least one.
    pub fn all_invalid(errors: Vec<FieldError>) -> Error {
        let detail = match errors.as_slice() {
            [one] => format!("{}: {}", one.pointer, one.detail),
            more => format!("{} fields are not valid", more.len()),
        };
        Error { errors, ..Error::new(Code::Invalid, detail) }
    }

    /// A bug of ours or trouble of the host that no caller can mend; the cause goes to the log, not to the caller.
    pub fn internal(
        what: impl Into<String>,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error::new(Code::Internal, what).caused_by(cause)
    }

    /// Trouble with a file, told with what to do about it: `disk_full`, `too_many` without a descriptor left,
    /// `no_capacity` without memory, otherwise `internal`.
    pub fn file(what: impl Into<String>, cause: std::io::Error) -> Error {
        let (code, advice) = match rustix::io::Errno::from_io_error(&cause) {
            Some(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => {
                (Code::DiskFull, "the host's disk is full; delete volumes or images, or add space")
            }
            Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => (
                Code::TooMany,
                "too many files are open; try again, or raise the daemon's limit of open files",
            ),
            Some(rustix::io::Errno::NOMEM) => {
                (Code::NoCapacity, "the host is out of memory; stop or delete servers, or add memory")
            }
            Some(rustix::io::Errno::IO) => {
                (Code::Internal, "the host's disk reported an input/output error; see the kernel's log")
            }
            Some(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => {
                (Code::Internal, "permission denied; the daemon needs root, or files that are its own")
            }
            _ => return Error::new(Code::Internal, what).caused_by(cause),
        };
        Error::new(code, format!("{}: {advice}", what.into())).caused_by(cause)
    }

    /// Attaches the cause.
    pub fn caused_by(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.source = Some(Arc::from(cause.into()));
        self
    }

    /// Says what can be done now instead; with `wrong_state`.
    pub fn with_actions(mut self, allowed_actions: Vec<String>) -> Error {
        self.allowed_actions = Some(allowed_actions);
        self
    }

    /// Names the operation that is in the way or that failed.
    pub fn with_operation(mut self, id: OperationId) -> Error {
        self.operation_id = Some(id);
        self
    }

    /// The problem document for a request to path `instance`.
    pub fn to_problem(&self, instance: &str, request_id: &str) -> Problem {
        Problem {
            kind: format!("/errors#{}", self.code.as_str()),
            title: self.code.title().to_owned(),
            status: self.code.status(),
            detail: self.detail.clone(),
            instance: instance.to_owned(),
            code: self.code,
            request_id: request_id.to_owned(),
            retryable: self.code.retryable(),
            errors: self.errors.clone(),
            allowed_actions: self.allowed_actions.clone(),
            operation_id: self.operation_id,
        }
    }

    /// The sentence with every cause, for the log.
    pub fn chain(&self) -> String {
        let mut text = self.detail.clone();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            text.push_str(": ");
            text.push_str(&inner.to_string());
            cause = inner.source();
        }
        text
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|cause| cause as &(dyn std::error::Error + 'static))
    }
}

impl From<rusqlite::Error> for Error {
    fn from(cause: rusqlite::Error) -> Error {
        let (code, detail) = match cause.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => (
                Code::DiskFull,
                "the host's disk is full, and its records cannot be written; delete volumes or images, or add space",
            ),
            Some(rusqlite::ErrorCode::OutOfMemory) => {
                (Code::NoCapacity, "the host is out of memory; stop or delete servers, or add memory")
            }
            Some(rusqlite::ErrorCode::SystemIoFailure) => (
                Code::Internal,
                "the disk of the host's records reported an error; see the kernel's and the daemon's log",
            ),
            _ => (Code::Internal, "the host's records cannot be read or written; see the daemon's log"),
        };
        Error::new(code, detail).caused_by(cause)
    }
}

impl From<serde_json::Error> for Error {
    fn from(cause: serde_json::Error) -> Error {
        Error::internal("a record of the host cannot be read", cause)
    }
}

/// A size in the largest binary unit that leaves nothing over.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.trailing_zeros() as usize / 10).min(UNITS.len() - 1);
    format!("{} {}", bytes >> (10 * unit), UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_told_whole() {
        let cases = [
            (4096, "4 KiB"),
            (2 << 20, "2 MiB"),
            (1 << 40, "1 TiB"),
            (1 << 60, "1048576 TiB"),
            (1025, "1025 bytes"),
        ];
        for (bytes, told) in cases {
            assert_eq!(size(bytes), told);
        }
    }

    #[test]
    fn wrong_state_always_says_what_can_be_done_and_nothing_else_does() {
        for code in Code::ALL {
            let problem = Error::new(*code, "no").to_problem("/v1", "");
            assert_eq!(problem.allowed_actions.is_some(), *code == Code::WrongState, "{code:?}");
        }
        let error = Error::new(Code::WrongState, "no").with_actions(vec!["start".to_owned()]);
        assert_eq!(error.to_problem("/v1", "").allowed_actions.unwrap(), ["start"]);
    }
}
