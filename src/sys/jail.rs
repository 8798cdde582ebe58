//! Starts a program in a jail: with nothing of the host's in sight, nobody's rights, and exactly the descriptors
//! it is to have. What the jail holds is decided by the caller; what the process does to itself after exec (system
//! call filter, Landlock) is its own business. The launcher calls it, for the daemon and for `toft run`.
//!
//! ```text
//! clone(pid namespace) ─▶ cgroups ─▶ descriptors ─▶ namespaces ─▶ empty root ─▶ rlimits ─▶ ids ─▶
//! capabilities ─▶ no_new_privs ─▶ execveat          the caller waits, so a refusal is an error here
//! ```
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Instant;

use crate::pidfd::PidFd;

mod child;
mod report;

use child::Child;
use report::Report;
pub use report::Step;

/// What to start.
#[derive(Debug)]
pub struct Program<'a> {
    /// The file to execute, linked statically: in the jail there is nothing to load.
    pub executable: BorrowedFd<'a>,
    /// Its first argument: the name `ps` shows.
    pub name: &'a OsStr,
    /// The arguments that follow.
    pub arguments: &'a [&'a OsStr],
    /// Descriptors and the numbers they get, 0 to [`crate::spawn::NUMBER_MAX`], each number once. Nothing else
    /// of the caller's stays open.
    pub descriptors: &'a [(BorrowedFd<'a>, RawFd)],
}

/// What to keep it in.
#[derive(Debug)]
pub struct Jail<'a> {
    /// Whose rights it has.
    pub user: User,
    /// `cgroup.procs` (v2) or `tasks` (v1) files open for writing, which it joins before anything else, so that
    /// even its first page is charged there.
    pub cgroups: &'a [BorrowedFd<'a>],
    /// Limits of the process.
    pub rlimits: Rlimits,
    /// The mount and network namespace it enters. Each gets its own without this, in a user namespace, which has no rights to
    /// another's, and where the kernel refuses.
    pub empty: Option<&'a EmptyNamespaces>,
    /// What becomes of steps that the kernel refuses.
    pub refused: Refused,
    /// Steps that are not done at all. Empty but in tests, which show that a missing wall is noticed.
    pub left_out: &'a [Step],
}

/// Whose rights a program has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// These ids and no further groups. Needs CAP_SETUID and CAP_SETGID.
    Own {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// The caller's, in a user namespace that knows no other user: it gives the rights that the other namespaces
    /// need to callers who are not root. The caller's further groups stay.
    Caller,
}

/// Memory a program may lock, in bytes. Some kernels count the rings of io_uring as locked (6.18 does, 6.1 does not);
/// a machine at every limit has rings of half a mebibyte.
pub const MEMLOCK_BYTES: u64 = 4 << 20;

/// Limits (getrlimit(2)). Core dumps are 0, locked memory is [`MEMLOCK_BYTES`]. A limit above the caller's own hard limit becomes
/// that one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rlimits {
    /// Most open descriptors.
    pub nofile: u64,
    /// Largest file it can write, in bytes; `u64::MAX` for no limit.
    pub fsize_bytes: u64,
    /// Most tasks of its user id.
    pub nproc: u64,
}

/// What becomes of steps that the kernel refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The program is not started.
    Fails,
    /// It is started without them.
    LeftOut,
}

/// A mount namespace in which there is an empty, read-only directory and nothing else, and a network namespace without a device
/// that is up, for any number of jails. What they share cannot be changed by anybody in it, who would need CAP_SYS_ADMIN or
/// CAP_NET_ADMIN outside of their own user namespace. Each could make its own; but to replace a root the kernel looks at every
/// thread of the host, in case it used the old one (pivot_root(2)), and a network namespace costs it half a millisecond and 170 kB.
/// Between jails that share them sockets lead from one to the other (those with an abstract name, for instance), where a program may
/// make any.
#[derive(Debug)]
pub struct EmptyNamespaces {
    mount: OwnedFd,
    net: OwnedFd,
}

impl EmptyNamespaces {
    /// Makes them, in a child that ends at once. Needs CAP_SYS_ADMIN.
    pub fn make() -> io::Result<EmptyNamespaces> {
        EmptyNamespaces::made_by(plant)
    }

    fn made_by(body: extern "C" fn(*mut libc::c_void) -> libc::c_int) -> io::Result<EmptyNamespaces> {
        // A child that is killed midway has not said how it went, and its root is still the host's.
        let mut seed = Seed { mount: -1, net: -1, result: Err(io::ErrorKind::UnexpectedEof.into()) };
        let argument: *mut Seed = &raw mut seed;
        // With the caller's descriptors, so that those it opens stay.
        // SAFETY: the body gets the seed, which nothing else touches until the child has ended.
        let (_, child) = unsafe { borrow(body, argument.cast(), libc::CLONE_FILES) }?;
        let _ = child.reap();
        // SAFETY: the child has opened it, and nothing else knows it.
        let own = |namespace: RawFd| (namespace >= 0).then(|| unsafe { OwnedFd::from_raw_fd(namespace) });
        let made = (own(seed.mount), own(seed.net));
        seed.result?;
        let (Some(mount), Some(net)) = made else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        Ok(EmptyNamespaces { mount, net })
    }
}

struct Seed {
    mount: RawFd,
    net: RawFd,
    result: io::Result<()>,
}

extern "C" fn plant(seed: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `make` passes a seed that it does not touch until this child is gone.
    let seed = unsafe { &mut *seed.cast::<Seed>() };
    seed.result = child::open_empty(&mut seed.mount, &mut seed.net);
    0
}

/// A program that runs in its jail.
#[derive(Debug)]
pub struct Started {
    /// Its process id in the caller's pid namespace.
    pub pid: i32,
    /// The process; the caller reaps it.
    pub pidfd: PidFd,
    /// Steps that the kernel refused, with its reasons.
    pub refused: Vec<(Step, io::Error)>,
    /// When the jail stood and the program was executed.
    pub executed_at: Instant,
}

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
#[error("the jail cannot be built: {step}")]
pub struct Error {
    /// The step that failed.
    pub step: Step,
    /// What the kernel said.
    #[source]
    pub cause: io::Error,
}

/// Starts the program, with an empty environment but for `RUST_BACKTRACE`. Returns when it executes.
pub fn spawn(program: &Program<'_>, jail: &Jail<'_>) -> Result<Started, Error> {
    let prepare = |cause| Error { step: Step::Prepare, cause };
    let mut plan = Child::prepare(program, jail).map_err(prepare)?;
    // The number to place a descriptor at may be the one that `arrange` is about to read: it copies first.
    let wanted = !jail.left_out.contains(&Step::PidNamespace);
    let namespaces = match jail.user {
        User::Caller => libc::CLONE_NEWUSER | libc::CLONE_NEWPID,
        User::Own { .. } => libc::CLONE_NEWPID,
    };
    let started = if wanted { start(&mut plan, namespaces) } else { start(&mut plan, 0) };
    let (pid, pidfd) = match started {
        Err(cause) if wanted && jail.refused == Refused::LeftOut => {
            // Without them the other namespaces may still be had, or are refused one by one.
            plan.report.refuse(Step::PidNamespace, cause.raw_os_error());
            plan.user_namespace = false;
            start(&mut plan, 0).map_err(|cause| Error { step: Step::Prepare, cause })?
        }
        started => started.map_err(|cause| Error { step: Step::PidNamespace, cause })?,
    };
    match plan.report.failed() {
        None => {
            let executed_at = plan.executed_at.unwrap_or_else(Instant::now);
            Ok(Started { pid, pidfd, refused: plan.report.refused(), executed_at })
        }
        Some((step, cause)) => {
            // It has ended, or its memory would still be ours and we would wait.
            let _ = pidfd.reap();
            Err(Error { step, cause })
        }
    }
}

/// Runs `plan` in a child of [`borrow`].
fn start(plan: &mut Child, namespaces: libc::c_int) -> io::Result<(i32, PidFd)> {
    plan.user_namespace = namespaces & libc::CLONE_NEWUSER != 0;
    let argument: *mut Child = plan;
    // SAFETY: `run` gets the plan, which is borrowed mutably until the child executes or ends.
    unsafe { borrow(run, argument.cast(), namespaces) }
}

/// Runs `body` in a child that borrows this process's memory until it executes or ends, as vfork(2) does: copying the page
/// tables of the caller would cost more than most steps of the jail. This thread waits until then.
///
/// # Safety
/// `argument` is what `body` takes, and `body` makes system calls only.
unsafe fn borrow(
    body: extern "C" fn(*mut libc::c_void) -> libc::c_int,
    argument: *mut libc::c_void,
    more: libc::c_int,
) -> io::Result<(i32, PidFd)> {
    // The child is shallow; a page at the lower end that nobody may touch stops it if it is not.
    let mut stack = Stack::new()?;
    let mut pidfd: RawFd = -1;
    let flags = more | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // No handler of ours may run in the child, where it would act on memory that is the parent's.
    let signals = block_signals()?;
    // SAFETY: the argument outlives the call because CLONE_VFORK suspends this thread until the child executes or ends;
    // `stack` is memory of its own that outlives the child likewise; `pidfd` is where CLONE_PIDFD stores a descriptor.
    let pid = unsafe { libc::clone(body, stack.top(), flags, argument, &raw mut pidfd) };
    let result = if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) };
    restore_signals(&signals);
    let pid = result?;
    // SAFETY: clone succeeded, so the kernel has stored a new descriptor that nothing else knows.
    Ok((pid, PidFd::from(unsafe { OwnedFd::from_raw_fd(pidfd) })))
}

extern "C" fn run(plan: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `start` passes a plan that it borrows mutably and does not touch until this child is gone.
    let plan = unsafe { &mut *plan.cast::<Child>() };
    plan.run();
    // Reached only when the program could not be executed; the report says why.
    127
}

/// The child's stack.
struct Stack {
    base: *mut libc::c_void,
}

impl Stack {
    /// Debug builds spend a few kilobytes a call; releases a few hundred bytes.
    const BYTES: usize = 256 * 1024;
    const GUARD_BYTES: usize = 4096;

    fn new() -> io::Result<Stack> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping wherever the kernel likes disturbs nothing.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), Stack::BYTES, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Stack { base };
        // SAFETY: the range is the lower end of the mapping just made, which nothing uses.
        match unsafe { libc::mprotect(base, Stack::GUARD_BYTES, libc::PROT_NONE) } {
            0 => Ok(stack),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Stacks grow down. A mapping's end is aligned as the ABI demands.
    fn top(&mut self) -> *mut libc::c_void {
        self.base.wrapping_byte_add(Stack::BYTES)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and the child that ran on it has executed or ended.
        unsafe { libc::munmap(self.base, Stack::BYTES) };
    }
}

fn block_signals() -> io::Result<nix::sys::signal::SigSet> {
    use nix::sys::signal::{SigSet, SigmaskHow};
    Ok(SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?)
}

fn restore_signals(mask: &nix::sys::signal::SigSet) {
    // It cannot fail: the mask was read from this thread.
    let _ = mask.thread_set_mask();
}

/// A null-terminated list of strings for exec.
struct Strings {
    /// Owns what `pointers` lead to.
    _strings: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

impl Strings {
    fn new<'a>(strings: impl Iterator<Item = &'a OsStr>) -> io::Result<Strings> {
        let strings: Vec<CString> =
            strings.map(|text| CString::new(text.as_bytes())).collect::<Result<_, _>>()?;
        let mut pointers: Vec<_> = strings.iter().map(|text| text.as_ptr()).collect();
        pointers.push(std::ptr::null());
        Ok(Strings { _strings: strings, pointers })
    }
}

fn raw(descriptors: &[BorrowedFd<'_>]) -> Vec<RawFd> {
    descriptors.iter().map(AsRawFd::as_raw_fd).collect()
}

#[cfg(test)]
mod tests;
