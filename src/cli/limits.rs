//! Bounds of the command line, each with the reason for its size.
use std::time::Duration;

/// How long `--wait` waits when not told: a slow distribution's image import takes minutes.
pub(crate) const WAIT_S_DEFAULT: u64 = 900;

/// One long poll, below [`model::limits::WAIT_S_MAX`].
pub(crate) const POLL_S: u64 = 20;

/// How long a daemon that is waited with may be away: one that is replaced takes seconds, one whose host starts again
/// a minute. Then a person should look.
pub(crate) const RETURN_TIMEOUT: Duration = Duration::from_secs(60);

/// How often it is looked for meanwhile.
pub(crate) const RETURN_PAUSE: Duration = Duration::from_millis(500);

/// Time to connect: a daemon that is there answers within milliseconds.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Time to the head of an answer: the longest long poll and some.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(model::limits::WAIT_S_MAX + 30);

/// Time to the word that an upload may be sent, as RFC 9110 advises: a second, then it is sent all the same.
pub(crate) const CONTINUE_TIMEOUT: Duration = Duration::from_secs(1);

/// Largest answer read into memory, in bytes: a page of 200 servers is 300 KiB, a console log 1 MiB.
pub(crate) const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Longest line of an event stream, in bytes.
pub(crate) const EVENT_LINE_BYTES_MAX: usize = 1 << 20;

/// Largest file of user data or JSON read from disk, in bytes: above the API's own limit, so that the API's
/// error is what the user sees.
pub(crate) const FILE_BYTES_MAX: u64 = 1 << 20;

/// Pause before typing again on a console whose input is full: a few characters' time at 115200 baud.
pub(crate) const TYPING_PAUSE: Duration = Duration::from_millis(10);

/// How long the launcher of `toft run` may take to start the VMM, in milliseconds: a jail takes a few.
pub(crate) const LAUNCH_MS: u16 = 10_000;

/// Most open descriptors of a VMM: at every device limit a machine uses about 300, most of them eventfds.
pub(crate) const VMM_NOFILE: u64 = 1_024;

/// Most tasks of a VMM: 32 vCPU threads, some 30 for devices, and io_uring's workers.
pub(crate) const VMM_NPROC: u64 = 512;
