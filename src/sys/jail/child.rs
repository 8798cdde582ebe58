//! What the child does between clone and exec. It borrows its parent's memory and may run beside the parent's
//! other threads, so it makes system calls only: no allocation, no lock, no panic.
use std::ffi::{CStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use super::{Jail, MEMLOCK_BYTES, Program, Refused, Report, Step, Strings, User, raw};
use crate::spawn::{NUMBER_MAX, close_all_on_exec, numbered, place};

/// Everything the child needs, made before it exists.
pub(super) struct Child {
    executable: RawFd,
    arguments: Strings,
    environment: Strings,
    wanted: Vec<(RawFd, RawFd)>,
    moved: Vec<RawFd>,
    cgroups: Vec<RawFd>,
    user: User,
    /// The mount and the network namespace to enter.
    mount: Option<RawFd>,
    net: Option<RawFd>,
    /// Whether the child was made in a user namespace of its own.
    pub(super) user_namespace: bool,
    uid_map: String,
    gid_map: String,
    limits: [(libc::__rlimit_resource_t, u64); 5],
    refused: Refused,
    left_out: Vec<Step>,
    pub(super) report: Report,
    /// When it executed the program.
    pub(super) executed_at: Option<Instant>,
}

impl Child {
    pub(super) fn prepare(program: &Program<'_>, jail: &Jail<'_>) -> io::Result<Child> {
        let backtrace = std::env::var_os("RUST_BACKTRACE").map(|value| {
            let mut variable = OsString::from("RUST_BACKTRACE=");
            variable.push(value);
            variable
        });
        let name = std::iter::once(program.name);
        let wanted = numbered(program.descriptors)?;
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        let rlimits = jail.rlimits;
        let empty = jail.empty.filter(|_| jail.user != User::Caller);
        Ok(Child {
            executable: program.executable.as_raw_fd(),
            arguments: Strings::new(name.chain(program.arguments.iter().copied()))?,
            environment: Strings::new(backtrace.iter().map(OsString::as_os_str))?,
            moved: vec![-1; wanted.len()],
            wanted,
            cgroups: raw(jail.cgroups),
            user: jail.user,
            mount: empty.map(|empty| empty.mount.as_raw_fd()).filter(|_| enters_root(jail)),
            net: empty.map(|empty| empty.net.as_raw_fd()),
            user_namespace: false,
            uid_map: format!("{uid} {uid} 1\n"),
            gid_map: format!("{gid} {gid} 1\n"),
            limits: [
                (libc::RLIMIT_NOFILE, rlimits.nofile),
                (libc::RLIMIT_FSIZE, rlimits.fsize_bytes),
                (libc::RLIMIT_NPROC, rlimits.nproc),
                (libc::RLIMIT_CORE, 0),
                (libc::RLIMIT_MEMLOCK, MEMLOCK_BYTES),
            ],
            refused: jail.refused,
            left_out: jail.left_out.to_vec(),
            report: Report::new(),
            executed_at: None,
        })
    }

    /// Builds the jail and executes the program. Returns only when that failed, with the reason in the report.
    pub(super) fn run(&mut self) {
        let Err((step, error)) = self.build();
        self.report.fail(step, error.raw_os_error());
    }

    fn build(&mut self) -> Result<std::convert::Infallible, (Step, io::Error)> {
        self.step(Step::Cgroups, Child::join_cgroups)?;
        self.must(Step::Prepare, Child::prepare_process)?;
        // Never done without: a directory of the host's that stays open leads out of every root.
        if !self.left_out.contains(&Step::Descriptors) {
            self.must(Step::Descriptors, |_| close_all_on_exec())?;
        }
        self.must(Step::Descriptors, Child::place_descriptors)?;
        if self.user_namespace {
            self.step(Step::UserNamespace, Child::map_caller)?;
        }
        let has_root = self.enter_made_root();
        let mounts = if has_root {
            Done::Yes
        } else {
            self.step(Step::MountNamespace, |_| unshare(libc::CLONE_NEWNS))?
        };
        self.step(Step::NetNamespace, Child::leave_network)?;
        self.step(Step::IpcNamespace, |_| unshare(libc::CLONE_NEWIPC))?;
        self.step(Step::UtsNamespace, |_| unshare(libc::CLONE_NEWUTS).and_then(|()| forget_host_name()))?;
        match mounts {
            _ if has_root => (),
            Done::Yes => self.step(Step::Root, |_| enter_empty_root()).map(drop)?,
            // Without a mount namespace the host itself would lose its root.
            Done::No if self.left_out.contains(&Step::Root) => (),
            Done::No => self.refuse(Step::Root, io::Error::from_raw_os_error(libc::EPERM))?,
        }
        self.step(Step::Rlimits, Child::limit)?;
        // Before the ids, because only CAP_SETPCAP may lock these; the sets themselves are emptied after.
        self.step(Step::Capabilities, |_| lock_capabilities())?;
        self.step(Step::Ids, Child::take_ids)?;
        self.step(Step::Keyring, |_| leave_keyring())?;
        self.step(Step::Capabilities, |_| drop_capabilities())?;
        self.step(Step::NoNewPrivs, |_| forbid_new_privileges())?;
        let error = self.execute();
        Err((Step::Execute, error))
    }

    /// Does a step that the caller may want left out, and that may be done without.
    fn step(
        &mut self,
        step: Step,
        action: impl FnOnce(&mut Child) -> io::Result<()>,
    ) -> Result<Done, (Step, io::Error)> {
        if self.left_out.contains(&step) {
            return Ok(Done::No);
        }
        match action(self) {
            Ok(()) => Ok(Done::Yes),
            Err(error) => self.refuse(step, error).map(|()| Done::No),
        }
    }

    fn refuse(&mut self, step: Step, error: io::Error) -> Result<(), (Step, io::Error)> {
        match self.refused {
            Refused::Fails => Err((step, error)),
            Refused::LeftOut => {
                self.report.refuse(step, error.raw_os_error());
                Ok(())
            }
        }
    }

    fn must(
        &mut self,
        step: Step,
        action: impl FnOnce(&mut Child) -> io::Result<()>,
    ) -> Result<(), (Step, io::Error)> {
        action(self).map_err(|error| (step, error))
    }

    fn join_cgroups(&mut self) -> io::Result<()> {
        // All are tried, so that one that refuses does not cost the others.
        let mut result = Ok(());
        for cgroup in &self.cgroups {
            // "0" is the writer itself, for v1 and v2 (kernel documentation, cgroup-v2, "Processes").
            // SAFETY: the descriptor is open in this process; the text is one byte long.
            let written = unsafe { libc::write(*cgroup, c"0".as_ptr().cast(), 1) };
            if written != 1 {
                result = Err(io::Error::last_os_error());
            }
        }
        result
    }

    /// A session of its own, so that it outlives the caller's terminal, and signals as a new program expects them.
    fn prepare_process(&mut self) -> io::Result<()> {
        // SAFETY: setsid takes nothing; a new child is never a group leader.
        check(unsafe { libc::setsid() })?;
        // SAFETY: SIG_DFL is a disposition, not a function of ours. Handlers are reset by exec.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        Ok(())
    }

    fn place_descriptors(&mut self) -> io::Result<()> {
        // SAFETY: the caller borrows the executable until spawn returns.
        let copy = unsafe { libc::fcntl(self.executable, libc::F_DUPFD_CLOEXEC, NUMBER_MAX + 1) };
        self.executable = check(copy)?;
        for namespace in [&mut self.mount, &mut self.net].into_iter().flatten() {
            // SAFETY: as above.
            *namespace = check(unsafe { libc::fcntl(*namespace, libc::F_DUPFD_CLOEXEC, NUMBER_MAX + 1) })?;
        }
        place(&self.wanted, &mut self.moved)
    }

    /// Whether it is in the namespace that was made for it, and so in its empty root: both root and working directory are those
    /// of the namespace (setns(2)).
    fn enter_made_root(&self) -> bool {
        // SAFETY: two integers; the child shares no root with its parent, which the kernel demands.
        self.mount.is_some_and(|mount| unsafe { libc::setns(mount, libc::CLONE_NEWNS) } == 0)
    }

    /// Into the namespace that was made for it, or into one of its own.
    fn leave_network(&mut self) -> io::Result<()> {
        // SAFETY: two integers.
        match self.net.is_some_and(|net| unsafe { libc::setns(net, libc::CLONE_NEWNET) } == 0) {
            true => Ok(()),
            false => unshare(libc::CLONE_NEWNET),
        }
    }

    /// One user and one group, as an unprivileged process may write them (user_namespaces(7)).
    fn map_caller(&mut self) -> io::Result<()> {
        write_file(c"/proc/self/setgroups", b"deny")?;
        write_file(c"/proc/self/uid_map", self.uid_map.as_bytes())?;
        write_file(c"/proc/self/gid_map", self.gid_map.as_bytes())
    }

    fn limit(&mut self) -> io::Result<()> {
        for (resource, wanted) in self.limits {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: `limit` is valid for writes.
            check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
            // Only root may go above; `u64::MAX` is RLIM_INFINITY.
            let wanted = wanted.min(limit.rlim_max);
            limit = libc::rlimit { rlim_cur: wanted, rlim_max: wanted };
            // SAFETY: `limit` is valid for reads.
            check(unsafe { libc::setrlimit(resource, &raw const limit) })?;
        }
        Ok(())
    }

    fn take_ids(&mut self) -> io::Result<()> {
        let User::Own { uid, gid } = self.user else { return Ok(()) };
        // The bare system calls: glibc's wrappers would tell the parent's threads to change theirs, too.
        // SAFETY: no groups are read from a list of none.
        check_call(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) })?;
        // SAFETY: three integers.
        check_call(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
        // SAFETY: three integers.
        check_call(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
    }

    fn execute(&mut self) -> io::Error {
        // Only now, when nothing is left to do that a signal could interrupt halfway.
        // SAFETY: `sigset_t` is a bit mask, for which zeros are the empty one.
        let none: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the mask is valid for reads; the old one is not asked for.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
        // The clock is read without a system call, or with one; neither allocates.
        self.executed_at = Some(Instant::now());
        // SAFETY: both lists end with null and live as long as this plan; the path is an empty string, so that
        // the descriptor itself is executed.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                self.executable,
                c"".as_ptr(),
                self.arguments.pointers.as_ptr(),
                self.environment.pointers.as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
        io::Error::last_os_error()
    }
}

/// Whether a step was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    Yes,
    No,
}

fn unshare(namespace: libc::c_int) -> io::Result<()> {
    // SAFETY: an integer; only this child is moved.
    check(unsafe { libc::unshare(namespace) }).map(drop)
}

/// The namespace starts with a copy of the host's names, which is nothing the program needs to know.
fn forget_host_name() -> io::Result<()> {
    // SAFETY: the name is one byte long.
    check(unsafe { libc::sethostname(c"-".as_ptr(), 1) })?;
    // SAFETY: as above.
    check(unsafe { libc::setdomainname(c"-".as_ptr(), 1) }).map(drop)
}

/// Whether a jail has the walls that a mount namespace made for it consists of.
fn enters_root(jail: &Jail<'_>) -> bool {
    let left_out = |step| jail.left_out.contains(&step);
    !left_out(Step::MountNamespace) && !left_out(Step::Root)
}

/// Makes a mount namespace with an empty root, and a network namespace, and opens both. Runs in a child that ends then.
pub(super) fn open_empty(mount: &mut RawFd, net: &mut RawFd) -> io::Result<()> {
    unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET)?;
    // Before the root: it has no `/proc`.
    for (path, namespace) in [(c"/proc/self/ns/mnt", mount), (c"/proc/self/ns/net", net)] {
        // SAFETY: a string that ends with NUL.
        *namespace = check(unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) })?;
    }
    enter_empty_root()
}

/// A file system of one directory takes the place of the root, and the old root goes out of reach with everything
/// below it. `/proc` is the one directory that is certain to exist.
fn enter_empty_root() -> io::Result<()> {
    let none = std::ptr::null();
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // What happens to mounts here must not happen to the host's.
    // SAFETY: the target is a string; nothing else is read.
    check(unsafe { libc::mount(none, c"/".as_ptr(), none, private, none.cast()) })?;
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // For tmpfs a size of 0 would mean no bound; the root directory is the one inode.
    let data = c"size=4k,nr_inodes=1,mode=0555";
    let (kind, target) = (c"tmpfs".as_ptr(), c"/proc".as_ptr());
    // SAFETY: all are strings.
    check(unsafe { libc::mount(kind, target, kind, flags, data.as_ptr().cast()) })?;
    // SAFETY: a string.
    check(unsafe { libc::chdir(target) })?;
    // Both being the same, the old root comes to lie on top of the new one (pivot_root(2), "pivot_root(".", ".")").
    // SAFETY: two strings.
    check_call(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    // SAFETY: a string.
    check(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) })?;
    // SAFETY: a string.
    check(unsafe { libc::chdir(c"/".as_ptr()) }).map(drop)
}

/// Nothing that this process becomes can hold a capability again: not by being root, not by executing a file that
/// has some (capabilities(7), "The securebits flags", "Capability bounding set").
fn lock_capabilities() -> io::Result<()> {
    for capability in 0..=63 {
        // SAFETY: two integers.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
            // The kernel has no more of them.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            result => result.map(drop)?,
        }
    }
    let bits = libc::SECBIT_NOROOT
        | libc::SECBIT_NOROOT_LOCKED
        | libc::SECBIT_NO_CAP_AMBIENT_RAISE
        | libc::SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED
        | libc::SECBIT_KEEP_CAPS_LOCKED
        | libc::SECBIT_NO_SETUID_FIXUP_LOCKED;
    // SAFETY: integers.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0) }).map(drop)
}

fn drop_capabilities() -> io::Result<()> {
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    // SAFETY: integers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0) })?;
    // _LINUX_CAPABILITY_VERSION_3 of include/uapi/linux/capability.h; pid 0 is the caller.
    let header: [u32; 2] = [0x2008_0522, 0];
    // Effective, permitted and inheritable, twice 32 bits each.
    let sets = [0_u32; 6];
    // SAFETY: header and sets have the layout and size of version 3.
    check_call(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) })
}

/// Keys in the keyring that the caller's session shares could be read by whoever possesses it, whatever his ids.
fn leave_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    let unnamed = std::ptr::null::<libc::c_char>();
    // SAFETY: a null name asks for a keyring without one.
    match check_call(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, unnamed) }) {
        // A kernel without keyrings has nothing to leave.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        result => result,
    }
}

fn forbid_new_privileges() -> io::Result<()> {
    // SAFETY: integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).map(drop)
}

fn write_file(path: &CStr, text: &[u8]) -> io::Result<()> {
    // SAFETY: a string that ends with NUL.
    let file = check(unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) })?;
    // SAFETY: the text has the length that is passed with it.
    let written = unsafe { libc::write(file, text.as_ptr().cast(), text.len()) };
    let result = if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: opened above and used nowhere else.
    unsafe { libc::close(file) };
    result
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_call(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
