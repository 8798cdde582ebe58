//! Why a command failed, how it is told, and with which exit code.
use std::io;
use std::path::PathBuf;

use model::{Code, FieldError, Problem};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot reach the daemon at {endpoint}")]
    Connect {
        endpoint: String,
        #[source]
        cause: io::Error,
    },
    #[error("the daemon at {endpoint} broke off")]
    Http {
        endpoint: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the daemon's answer is not what was expected")]
    Answer(#[source] serde_json::Error),
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
    #[error("HTTP status {status} without a problem document")]
    Status { status: u16 },
    #[error("no {kind} is named {name:?}; `toft {kind} list` shows those that there are")]
    NoSuchName { kind: &'static str, name: String },
    #[error("no server has the labels {selector:?}; `toft server list` shows those that there are")]
    NoneSelected { selector: String },
    #[error(
        "operation {operation} did not end within {seconds} s; it goes on: toft operation wait {operation}"
    )]
    WaitTimeout { operation: String, seconds: u64 },
    #[error("operation {operation} could not be waited for any longer")]
    WaitLost {
        operation: String,
        #[source]
        cause: Box<Error>,
    },
    #[error("the daemon ended the stream; go on with `toft event follow{}`", after(.0))]
    Ended(Option<u64>),
    #[error("operation {operation} was cancelled")]
    Cancelled { operation: String },
    #[error("{0}")]
    Usage(String),
    #[error("cannot read {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("cannot write {}", .path.display())]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("cannot read standard input")]
    Input(#[source] io::Error),
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    #[error("cannot start")]
    Runtime(#[source] io::Error),
    #[error("the certificate or authority cannot be used")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("{0}")]
    Upgrade(String),
    /// What is in the way has been said.
    #[error("{0} cannot take the server as things are")]
    Blocked(String),
    #[error("the console was closed: {0}")]
    Console(String),
    #[error("{doing}")]
    Machine {
        doing: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// `toft run` ends as its machine ended; everything has been said.
    #[error("the machine ended with {0}")]
    Guest(u8),
}

/// The flag with which nothing is missed.
fn after(last: &Option<u64>) -> String {
    last.map(|last| format!(" --after {last}")).unwrap_or_default()
}

impl Error {
    /// The exit code, as `toft --help` lists them.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) | Error::Read { .. } | Error::Write { .. } => 2,
            Error::NoSuchName { .. } | Error::NoneSelected { .. } => 3,
            Error::Connect { .. } | Error::Http { .. } | Error::Ended(_) => 5,
            Error::Cancelled { .. } | Error::Blocked(_) => 4,
            Error::WaitTimeout { .. } => 7,
            Error::WaitLost { cause, .. } => cause.exit_code(),
            Error::Guest(code) => *code,
            Error::Problem(problem) => match (problem.code, problem.status) {
                (Code::Timeout, _) => 7,
                (Code::NoCapacity | Code::DiskFull | Code::NoAddress, _) => 6,
                (_, 404) => 3,
                (_, 409 | 412) => 4,
                (_, 400 | 413 | 415 | 422) => 2,
                _ if problem.retryable => 5,
                _ => 1,
            },
            _ => 1,
        }
    }

    /// What is printed: the chain of causes, then each field that is not valid.
    pub(crate) fn report(&self) -> String {
        let mut text = format!("toft: {}\n", self.chain());
        if let Error::Problem(problem) = self {
            // A single fault may be told by the detail already.
            let told = |words: &str| problem.detail.contains(words);
            for field in problem.errors.iter().filter(|field| !told(&field.detail) || !told(&field.pointer)) {
                text.push_str(&format!("  {}: {}\n", field.pointer, field.detail));
            }
            for noun in problem.errors.iter().filter_map(unfound) {
                text.push_str(&format!("  see `toft {noun} list`\n"));
            }
            let actions = problem.allowed_actions.as_deref().unwrap_or_default().join(", ");
            if !actions.is_empty() && !told(&actions) {
                text.push_str(&format!("  possible now: {actions}\n"));
            }
            text.push_str(&format!("  code {}, request {}\n", problem.code.as_str(), problem.request_id));
        }
        if let Error::WaitLost { operation, .. } = self {
            text.push_str(&format!("  to go on waiting: toft operation wait {operation}\n"));
        }
        if let Error::Connect { cause, .. } = self {
            text.push_str(match cause.kind() {
                io::ErrorKind::PermissionDenied => "  run as root, or as a user the daemon's socket admits\n",
                _ => "  is toftd running? --endpoint or TOFT_ENDPOINT says where\n",
            });
        }
        text
    }

    /// The error and its causes in one line.
    pub(crate) fn chain(&self) -> String {
        let causes = std::iter::successors(std::error::Error::source(self), |error| error.source());
        causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"))
    }

    /// Whether there was no daemon to answer, or one that was ending or beginning.
    pub(crate) fn is_without_daemon(&self) -> bool {
        match self {
            Error::Connect { .. } | Error::Http { .. } => true,
            Error::Problem(problem) => problem.code == Code::Draining,
            _ => false,
        }
    }

    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Error::Output(cause) if cause.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// The noun of which a field of the body names one that there is not.
fn unfound(field: &FieldError) -> Option<&str> {
    let (_, noun) = field.pointer.rsplit_once('/').filter(|_| field.code == "not_found")?;
    ["image", "network", "snapshot"].contains(&noun).then_some(noun)
}
