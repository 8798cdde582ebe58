//! Bounds of what one caller, or all of them together, can make the daemon hold, each with the reason for its
//! size. What a body may say is bounded by `model::limits`; what is stored, by `host`.
use std::time::Duration;

/// How long a daemon waits for another to let its socket go: a process that a killed daemon was starting listens
/// in its stead until it becomes another program.
pub(crate) const SOCKET_LET_GO_MAX: Duration = Duration::from_secs(2);

/// Pause between two looks at that socket.
pub(crate) const SOCKET_LET_GO_AGAIN: Duration = Duration::from_millis(20);

/// Connections served at once over all listeners. Each costs about 20 KiB at rest; a panel keeps a handful.
pub const CONNECTIONS_MAX: usize = 1024;

/// Event streams at once: each holds a connection for as long as its reader likes.
pub const EVENT_STREAMS_MAX: usize = 128;

/// Console WebSockets at once: several readers for every server of a well-filled host.
pub const CONSOLES_MAX: usize = 256;

/// Requests that wait for an operation at once; they are idle tasks, but they hold connections.
pub const WAITS_MAX: usize = 512;

/// Uploads at once: each writes to the host's disk at full speed.
pub const UPLOADS_MAX: usize = 4;

/// Exports at once: each reads from the host's disk at full speed and fills a core with hashing.
pub const EXPORTS_MAX: usize = 4;

/// Largest body of an upload in bytes. The host's free space bounds it earlier; this bounds a host that has much.
pub const UPLOAD_BYTES_MAX: u64 = 256 << 30;

/// Header lines of one request: browsers send about 20.
pub const HEADERS_MAX: usize = 64;

/// Bytes buffered while reading a request's head, and so the longest URI plus headers. Tokens and selectors
/// fit many times.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;

/// Longest query string in bytes: the longest useful one is a label selector of 32 terms.
pub const QUERY_BYTES_MAX: usize = 8 * 1024;

/// Longest time to send a request's head, and the longest pause between two requests of one connection, so that
/// neither a slow nor a silent client keeps a connection.
pub const HEAD_READ_MAX: Duration = Duration::from_secs(30);

/// Longest time to send a whole JSON body; 256 KiB take this long on a bad modem line.
pub const BODY_READ_MAX: Duration = Duration::from_secs(30);

/// Longest pause within an upload.
pub const UPLOAD_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Longest time that the rest of a refused upload is read and thrown away, so that its sender gets to the answer.
pub(crate) const LINGER_MAX: Duration = Duration::from_secs(5);

/// Bytes of it at most: what is on its way in the buffers of a fast and long line, many times over.
pub(crate) const LINGER_BYTES_MAX: u64 = 256 << 20;

/// Longest time that a client may take no byte of what is ready for it before it is cut off. Heartbeats make
/// every stream have something ready.
pub const WRITE_STALL_MAX: Duration = Duration::from_secs(60);

/// Longest time for a TLS handshake: four round trips to the other side of the world and a busy client.
pub const TLS_HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Pause between heartbeats of a stream: below the idle timeout of common proxies (60 s).
pub const HEARTBEAT: Duration = Duration::from_secs(15);

/// Pings of a console without an answer before its reader counts as gone.
pub const PINGS_UNANSWERED_MAX: u32 = 3;

/// Largest message from a console's reader: a large paste. Longer ones are split by the sender.
pub const CONSOLE_INPUT_BYTES_MAX: usize = 64 * 1024;

/// Longest time that what a reader typed before it went is still given to the guest, which may be slow to take it.
pub(crate) const TYPED_LAST_MAX: Duration = Duration::from_secs(5);

/// Largest frame sent to a console's reader, and so what one slow reader makes the daemon hold.
pub const CONSOLE_OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// Events read from the store in one go while streaming.
pub const EVENTS_BATCH: u32 = 200;

/// Servers whose machines are asked for counters in one scrape of `/metrics`; a well-filled host has fewer.
pub const METRICS_SERVERS_MAX: usize = 1000;

/// Machines asked for counters at once during a scrape.
pub const METRICS_AT_ONCE: usize = 8;

/// Longest wait for one machine's counters during a scrape; a stuck machine must not hide the others.
pub const METRICS_WAIT_MAX: Duration = Duration::from_secs(1);

/// Most characters of a detail or a pointer in a problem document. What callers send comes back in them: without a
/// bound, a body of 1 MiB that is one unknown name is answered with 4 MiB.
pub const DETAIL_CHARS_MAX: usize = 1024;

/// Field errors listed in one problem document.
pub const FIELD_ERRORS_MAX: usize = 64;

/// Longest time between the order to stop and the end of the last connection. Streams end at once; what
/// remains are answers being written and uploads, which a client repeats.
pub const CLOSE_MAX: Duration = Duration::from_secs(10);

/// Most bytes of answers that are kept for who asks the same: several lists of a hundred servers at 100 KB and the
/// servers themselves, on a daemon that is to stay small.
pub const KEPT_BYTES_MAX: usize = 4 << 20;

/// Pause after the system refused a new connection (no descriptors left), so that the loop does not spin.
pub const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Longest path of a Unix socket: `sun_path` of unix(7) less its final zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Retry-After in seconds for what frees up by itself soon: streams, waits, a restarting daemon.
pub const RETRY_AFTER_S: u64 = 2;

/// Most bytes of a console's log in one answer: all that is kept of most consoles.
pub const CONSOLE_LOG_BYTES_MAX: usize = 1024 * 1024;
