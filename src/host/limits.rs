//! Bounds of the host's queues, waits and tables, each with the reason for its size.
use std::time::Duration;

/// Length of `sun_path` in bytes, with its terminator (unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = 108;

/// How long a daemon waits for another to let the state directory go. A process that a killed daemon was starting
/// has its descriptors until it becomes another program, and an old daemon may be closing while a new one starts.
pub const LOCK: Duration = Duration::from_secs(2);

/// Pause between two looks at that lock.
pub const LOCK_AGAIN: Duration = Duration::from_millis(20);

/// Connections that read records side by side: enough for two cores, few enough to hold open.
pub const READERS_MAX: usize = 4;

/// What each connection keeps of the database, in KiB: the upper levels of its trees. The kernel keeps the rest for all of them.
pub const DATABASE_CACHE_KB: i64 = 512;

/// Length of the write-ahead log from the beginning, in bytes: SQLite begins again at its front after 1,000 pages of 4 KiB, each
/// with a header of 24 bytes, and the transaction that passes that limit may be a large one.
pub const LOG_BYTES: u64 = 5 << 20;

/// Statements that each connection keeps compiled: more than one journey of a server has, or each pass compiles all of them anew.
pub const STATEMENTS_KEPT: usize = 96;

/// How long a read or write waits for another process that holds the database, such as an operator's sqlite3.
pub const DATABASE_BUSY: Duration = Duration::from_secs(5);

/// First pause before work that failed for the host's reasons is tried again; doubled each time.
pub const RETRY: Duration = Duration::from_millis(200);

/// Longest such pause: a disk that has room again is noticed before its operator wonders.
pub const RETRY_MAX: Duration = Duration::from_secs(30);

/// How long the answer of a call with an idempotency key is kept: as long as its operation.
pub const IDEMPOTENCY_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// How long a finished operation is kept.
pub const OPERATIONS_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Most events kept. At 300 bytes each this is 30 MB; older ones answer `cursor_expired`.
pub const EVENTS_KEPT: u64 = 100_000;

/// Events are cut back once in so many, so that the cost is spread.
pub const EVENTS_CUT_EVERY: u64 = 1000;

/// Most events of one page.
pub const EVENTS_PAGE_MAX: u32 = 500;

/// Most terms of one label selector.
pub const SELECTOR_TERMS_MAX: usize = 32;

/// Most access tokens of one host: they are made by hand.
pub const TOKENS_MAX: u32 = 1000;

/// Most commands that wait for one VMM's or launcher's answers: a few readers of a console and an actor.
pub const COMMANDS_MAX: usize = 256;

/// Packets read from one VMM before other tasks get their turn: each may cost a parse of 64 KiB.
pub const PACKETS_PER_TURN: u32 = 16;

/// Most packets of a VMM within [`UNASKED_EVERY`] that answer no command. A guest causes some 32 faults and no more
/// resets than machines can be built, which takes milliseconds; who says more is no VMM of ours. Its connection is closed
/// and made again after a pause, so that a taken-over VMM costs the daemon little and keeps its server.
pub const UNASKED_MAX: u32 = 1_000;

/// See [`UNASKED_MAX`].
pub const UNASKED_EVERY: Duration = Duration::from_secs(1);

/// How long the launcher may take to start a VMM.
pub const SPAWN: Duration = Duration::from_secs(10);

/// Most VMMs that are kept ready: a few more than are started within the time that one takes.
pub const WARM_SHELLS_MAX: usize = 16;

/// Room for a server's name in the command line of a VMM that is started before there is a server: as long as the
/// launcher admits.
pub const LABEL_BYTES: usize = 64;

/// How long a VMM without a machine may take to end, when it is told to and when it is killed.
pub const SHELL_QUIT: Duration = Duration::from_secs(2);

/// Pause before a VMM that was kept ready and has died is replaced.
pub const SHELL_AGAIN: Duration = Duration::from_secs(1);

/// Most open descriptors of a VMM: at every device limit a machine uses about 300, most of them eventfds.
pub const VMM_NOFILE: u64 = 1_024;

/// A VMM may write files of so many bytes whatever its disks: its console ring and its log.
pub const FILE_BYTES_MIN: u64 = 16 << 20;

/// Most tasks of a VMM, whose user id is its own: 32 vCPU threads, some 30 for devices, and io_uring's workers.
pub const VMM_NPROC: u64 = 512;

/// What a server's group may hold besides the guest's memory, in bytes: the VMM's own, as promised to it, and the page
/// cache of its disks, which the kernel takes back. With less, a guest that writes waits for the disk.
pub const VMM_MEMORY_BYTES: u64 = 160 << 20;

/// One part in so many of the guest's memory, which a server's group may hold besides: page tables of the VMM and of KVM, when all of
/// it is in use by pages of 4 KiB, take a five-hundredth each.
pub const VMM_TABLES_PART: u64 = 256;

/// CPUs that a server may use besides those of its vCPUs: its devices' threads and io_uring's workers run there.
pub const DEVICE_CPUS: u64 = 1;

/// The span in which CPU time is counted, in microseconds: what a new group has (kernel documentation, sched-bwc,
/// "Management").
pub const CPU_PERIOD_US: u64 = 100_000;

/// How often the removal of a group is tried while the last thread of its process ends, and the pause between.
pub const CGROUP_REMOVE_TRIES: u32 = 50;

/// See [`CGROUP_REMOVE_TRIES`].
pub const CGROUP_REMOVE_AGAIN: Duration = Duration::from_millis(10);

/// How long the launcher may take to try KVM with a guest, which counts instructions for a while.
pub const PROBE: Duration = Duration::from_secs(60);

/// How long the launcher's word on a process that has ended may follow its end.
pub const EXIT_STATUS: Duration = Duration::from_millis(500);
