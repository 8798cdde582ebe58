//! A kernel that refuses one system call of the daemon or its launcher when told to. Static binaries leave no
//! library to stand before, and `ptrace` counts by thread; seccomp's user notification (seccomp_unotify(2)) stops
//! each call of every thread here, in one order, and lets it go on or fail. `injected` tells it what to refuse.
use std::ffi::c_int;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use nix::errno::Errno;
use nix::libc;

/// Whose call it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Caller {
    Daemon,
    /// The launcher and the child that it turns into a VMM, until that is one.
    Launcher,
    /// The VMM.
    Vmm,
}

/// A system call that may be refused, and with what.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    number: i64,
    on: On,
    pub(crate) errors: &'static [Errno],
}

/// What a call works on; a fault is only true to life on some of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    /// A path: its second or first argument.
    Path(usize),
    /// A descriptor of a file below the stage, of memory, of a control group or a switch of the kernel's; sockets and
    /// counters of the runtime do not run full.
    File,
    Anything,
}

const FULL: &[Errno] = &[Errno::ENOSPC, Errno::EIO];
const NAMES: &[Errno] = &[Errno::ENOSPC, Errno::EIO, Errno::ENOMEM];
const OPENS: &[Errno] = &[Errno::EMFILE, Errno::EIO, Errno::ENOSPC, Errno::ENOMEM];
const DESCRIPTORS: &[Errno] = &[Errno::EMFILE, Errno::ENOMEM];
const MEMORY: &[Errno] = &[Errno::ENOMEM];
const DISK: &[Errno] = &[Errno::EIO];

const fn kind(name: &'static str, number: i64, on: On, errors: &'static [Errno]) -> Kind {
    Kind { name, number, on, errors }
}

/// Every call that can be refused. `mmap` is that of files alone: without memory of its own a Rust program aborts,
/// which is a crash and tested as one.
pub(crate) const KINDS: &[Kind] = &[
    kind("openat", libc::SYS_openat, On::Path(1), OPENS),
    kind("openat2", libc::SYS_openat2, On::Path(1), OPENS),
    kind("open", libc::SYS_open, On::Path(0), OPENS),
    kind("mkdir", libc::SYS_mkdir, On::Path(0), NAMES),
    kind("mkdirat", libc::SYS_mkdirat, On::Path(1), NAMES),
    kind("rename", libc::SYS_rename, On::Path(0), NAMES),
    kind("renameat", libc::SYS_renameat, On::Path(1), NAMES),
    kind("unlink", libc::SYS_unlink, On::Path(0), DISK),
    kind("unlinkat", libc::SYS_unlinkat, On::Path(1), DISK),
    kind("rmdir", libc::SYS_rmdir, On::Path(0), DISK),
    kind("chmod", libc::SYS_chmod, On::Path(0), DISK),
    kind("read", libc::SYS_read, On::File, DISK),
    kind("pread64", libc::SYS_pread64, On::File, DISK),
    kind("write", libc::SYS_write, On::File, FULL),
    kind("writev", libc::SYS_writev, On::File, FULL),
    kind("pwrite64", libc::SYS_pwrite64, On::File, FULL),
    kind("copy_file_range", libc::SYS_copy_file_range, On::File, FULL),
    kind("fallocate", libc::SYS_fallocate, On::File, FULL),
    kind("ftruncate", libc::SYS_ftruncate, On::File, FULL),
    kind("fsync", libc::SYS_fsync, On::File, FULL),
    kind("fdatasync", libc::SYS_fdatasync, On::File, FULL),
    kind("getdents64", libc::SYS_getdents64, On::File, DISK),
    kind("mmap", libc::SYS_mmap, On::File, MEMORY),
    kind("socket", libc::SYS_socket, On::Anything, DESCRIPTORS),
    kind("socketpair", libc::SYS_socketpair, On::Anything, DESCRIPTORS),
    kind("bind", libc::SYS_bind, On::Anything, FULL),
    kind("connect", libc::SYS_connect, On::Anything, MEMORY),
    kind("accept4", libc::SYS_accept4, On::Anything, DESCRIPTORS),
    kind("sendmsg", libc::SYS_sendmsg, On::Anything, MEMORY),
    kind("pipe2", libc::SYS_pipe2, On::Anything, DESCRIPTORS),
    kind("memfd_create", libc::SYS_memfd_create, On::Anything, DESCRIPTORS),
    kind("pidfd_open", libc::SYS_pidfd_open, On::Anything, DESCRIPTORS),
    kind("eventfd2", libc::SYS_eventfd2, On::Anything, DESCRIPTORS),
    kind("timerfd_create", libc::SYS_timerfd_create, On::Anything, DESCRIPTORS),
    kind("epoll_create1", libc::SYS_epoll_create1, On::Anything, DESCRIPTORS),
    kind("io_uring_setup", libc::SYS_io_uring_setup, On::Anything, DESCRIPTORS),
    kind("userfaultfd", libc::SYS_userfaultfd, On::Anything, DESCRIPTORS),
    kind("epoll_ctl", libc::SYS_epoll_ctl, On::Anything, MEMORY),
    kind("clone", libc::SYS_clone, On::Anything, MEMORY),
    kind("clone3", libc::SYS_clone3, On::Anything, MEMORY),
    kind("ioctl", libc::SYS_ioctl, On::Anything, &[Errno::EIO, Errno::ENOMEM]),
    kind("mount", libc::SYS_mount, On::Anything, MEMORY),
    kind("unshare", libc::SYS_unshare, On::Anything, MEMORY),
    kind("pivot_root", libc::SYS_pivot_root, On::Anything, MEMORY),
    kind("setresuid", libc::SYS_setresuid, On::Anything, &[Errno::EAGAIN]),
    kind("setresgid", libc::SYS_setresgid, On::Anything, MEMORY),
    kind("execve", libc::SYS_execve, On::Anything, MEMORY),
    kind("execveat", libc::SYS_execveat, On::Anything, MEMORY),
];

/// A call that was made, or is to be refused: the `nth` of its kind, from 1, since the kernel was told to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Call {
    pub(crate) caller: Caller,
    /// Place in [`KINDS`].
    pub(crate) kind: usize,
    pub(crate) nth: u32,
}

/// The kernel as one daemon and its children see it.
pub(crate) struct Kernel {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    counting: bool,
    seen: Vec<(Call, String)>,
    refuse: Option<(Call, Errno)>,
    refused: Option<String>,
    daemon: i32,
    /// Files below this are the daemon's; its log, which it shares with nobody's work, lies directly in it.
    base: String,
}

impl Kernel {
    /// Starts a daemon whose files lie below `base` on such a kernel.
    pub(crate) fn start(mut command: Command, base: &str) -> (Child, Kernel) {
        let shared = Arc::new(Mutex::new(Shared { base: base.to_owned(), ..Shared::default() }));
        let (sender, receiver) = mpsc::channel();
        // A filter belongs to the thread that installs it and to all it starts from then on.
        let spawning = std::thread::spawn(move || {
            sender.send(install()).unwrap();
            command.spawn().unwrap()
        });
        let listener = receiver.recv().unwrap();
        let watching = shared.clone();
        std::thread::spawn(move || watch(&listener, &watching));
        let child = spawning.join().unwrap();
        lock(&shared).daemon = child.id() as i32;
        (child, Kernel { shared })
    }

    /// Counts calls from here on, and refuses this one.
    pub(crate) fn arm(&self, refuse: Option<(Call, Errno)>) {
        let mut shared = lock(&self.shared);
        shared.seen.clear();
        shared.refused = None;
        shared.refuse = refuse;
        shared.counting = true;
    }

    /// Counts no more. Answers the calls that were made, each with what it was about, and what was refused.
    pub(crate) fn disarm(&self) -> (Vec<(Call, String)>, Option<String>) {
        let mut shared = lock(&self.shared);
        shared.counting = false;
        (std::mem::take(&mut shared.seen), shared.refused.take())
    }
}

impl Shared {
    /// What the caller gets; nothing when the call is to go on.
    fn judge(&mut self, notice: &Notice) -> Option<Errno> {
        if !self.counting {
            return None;
        }
        let kind = KINDS.iter().position(|kind| kind.number == i64::from(notice.data.nr))?;
        let caller = self.caller(notice.pid)?;
        let about = self.about(&KINDS[kind], notice)?;
        let earlier = self.seen.iter().filter(|(call, _)| call.caller == caller && call.kind == kind).count();
        let call = Call { caller, kind, nth: earlier as u32 + 1 };
        let (refuse, errno) = self.refuse.unzip();
        let refused = refuse == Some(call);
        if refused {
            self.refused = Some(format!("{} {about}", KINDS[kind].name));
        }
        self.seen.push((call, about));
        errno.filter(|_| refused)
    }

    fn caller(&self, thread: u32) -> Option<Caller> {
        let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
        let process: i32 = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()?;
        if process == self.daemon {
            return Some(Caller::Daemon);
        }
        let line = std::fs::read(format!("/proc/{process}/cmdline")).ok()?;
        match line {
            line if line.starts_with(b"toft-vmm\0launcher") => Some(Caller::Launcher),
            line if line.starts_with(b"toft-vmm\0machine") => Some(Caller::Vmm),
            _ => None,
        }
    }

    /// What the call is about, when it is one that may be refused.
    fn about(&self, kind: &Kind, notice: &Notice) -> Option<String> {
        let argument = |at: usize| notice.data.args[at];
        match kind.on {
            On::Anything => Some(format!("({:#x}, {:#x})", argument(0), argument(1))),
            On::Path(at) => {
                let mut path = [0; 256];
                let memory = File::open(format!("/proc/{}/mem", notice.pid)).ok()?;
                let read = memory.read_at(&mut path, argument(at)).unwrap_or(0);
                let end = path[..read].iter().position(|byte| *byte == 0).unwrap_or(read);
                Some(String::from_utf8_lossy(&path[..end]).into_owned())
            }
            On::File => {
                let at = if kind.name == "mmap" { 4 } else { 0 };
                let link = format!("/proc/{}/fd/{}", notice.pid, argument(at) as i32);
                let path = std::fs::read_link(link).ok()?.to_string_lossy().into_owned();
                if ["/memfd:", "/sys/fs/cgroup/", "/proc/sys/"].iter().any(|start| path.starts_with(start)) {
                    return Some(path);
                }
                let below = path.strip_prefix(&self.base)?;
                (!below.ends_with("toftd.log")).then(|| below.to_owned())
            }
        }
    }
}

/// `struct seccomp_notif` of linux/seccomp.h.
#[repr(C)]
#[derive(Default)]
struct Notice {
    id: u64,
    pid: u32,
    flags: u32,
    data: Data,
}

/// `struct seccomp_data`.
#[repr(C)]
#[derive(Default)]
struct Data {
    nr: i32,
    arch: u32,
    instruction_pointer: u64,
    args: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    val: i64,
    error: i32,
    flags: u32,
}

nix::ioctl_readwrite!(notif_recv, b'!', 0, Notice);
nix::ioctl_readwrite!(notif_send, b'!', 1, Answer);

/// Answers every call that is stopped, until nobody is left who could make one.
fn watch(listener: &OwnedFd, shared: &Mutex<Shared>) {
    loop {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(cause) => panic!("the listener cannot be waited for: {cause}"),
            Ok(_) => {}
        }
        if !ready[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)) {
            return;
        }
        let mut notice = Notice::default();
        // SAFETY: the descriptor is a listener of seccomp, and `notice` is its zeroed structure of the kernel's size.
        if unsafe { notif_recv(listener.as_raw_fd(), &mut notice) }.is_err() {
            // The caller has been killed meanwhile.
            continue;
        }
        let refused = lock(shared).judge(&notice);
        let mut answer = match refused {
            Some(errno) => Answer { id: notice.id, val: 0, error: -(errno as i32), flags: 0 },
            None => Answer { id: notice.id, val: 0, error: 0, flags: 1 },
        };
        // SAFETY: as above; an error means that the caller has been killed meanwhile.
        let _ = unsafe { notif_send(listener.as_raw_fd(), &mut answer) };
    }
}

/// Puts this thread under a filter that stops each call of [`KINDS`], except a vCPU's entry into its guest.
fn install() -> OwnedFd {
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const NOTIFY: u32 = 0x7fc0_0000;
    const ALLOW: u32 = 0x7fff_0000;
    const KVM_RUN: u32 = 0xae80;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let (number, second_argument) = (0, 24);
    let mut program = vec![
        step(LOAD, 0, 0, number),
        step(EQUAL, 0, 4, libc::SYS_ioctl as u32),
        step(LOAD, 0, 0, second_argument),
        step(EQUAL, 0, 1, KVM_RUN),
        step(RETURN, 0, 0, ALLOW),
        step(RETURN, 0, 0, NOTIFY),
    ];
    for (at, kind) in KINDS.iter().enumerate() {
        program.push(step(EQUAL, (KINDS.len() - at) as u8, 0, kind.number as u32));
    }
    program.extend([step(RETURN, 0, 0, ALLOW), step(RETURN, 0, 0, NOTIFY)]);
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    const SET_MODE_FILTER: c_int = 1;
    const NEW_LISTENER: c_int = 1 << 3;
    // SAFETY: `program` points at instructions that live until the call returns; the kernel checks and copies them.
    let made = unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, NEW_LISTENER, &program) };
    let descriptor = Errno::result(made).expect("seccomp's user notification needs root");
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor as c_int) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
