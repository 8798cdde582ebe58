//! Every way out that we know, each tried in the whole jail and in one with a hole.
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use sys::jail::{EmptyNamespaces, Refused, Step};

use crate::calls::{call, signed};
use crate::cell::{Cell, FILTERED, Plan, fresh_id};

/// Either of these two stops what only root may do.
const RIGHTS: &[Step] = &[Step::Ids, Step::Capabilities];

/// Everything but the ids.
pub(crate) const NOTHING_BUT_IDS: &[Step] = &[
    Step::PidNamespace,
    Step::MountNamespace,
    Step::NetNamespace,
    Step::IpcNamespace,
    Step::UtsNamespace,
    Step::Root,
    Step::Rlimits,
    Step::Keyring,
    Step::Capabilities,
    Step::NoNewPrivs,
];

/// The whole jail refuses the attack, and so it does with any one of `hole`'s walls if they are several; without
/// all of them the same attack gets through. Even then the filter of every kind of thread ends it.
#[track_caller]
fn stopped_by(hole: &[Step], order: &Value) {
    try_jails(fresh_id(), hole, order);
    try_filters(fresh_id(), hole, order);
}

/// Kinds of threads of a VMM.
const THREADS: [&str; 9] =
    ["main", "main with a machine", "vcpu", "save", "settle", "block", "net", "rng", "balloon"];

/// With the hole, but behind all that a VMM's thread has closed behind itself.
#[track_caller]
fn try_filters(uid: u32, hole: &[Step], order: &Value) {
    try_filtered_cells(order, || Cell::start(uid, hole, &[]));
}

#[track_caller]
fn try_filtered_cells(order: &Value, start: impl Fn() -> Cell) {
    for thread in THREADS {
        let mut order = order.clone();
        order["thread"] = thread.into();
        match start().order(&order) {
            Err(why) => assert_eq!(why, FILTERED, "{order}"),
            Ok(what) => panic!("{order} gets {what} in spite of its filter"),
        }
    }
}

#[track_caller]
fn try_jails(uid: u32, hole: &[Step], order: &Value) {
    try_cells(hole, order, |left_out| Cell::start(uid, left_out, &[]));
}

#[track_caller]
fn try_cells(hole: &[Step], order: &Value, start: impl Fn(&[Step]) -> Cell) {
    if let Ok(what) = start(&[]).order(order) {
        panic!("{order} gets {what} out of the whole jail");
    }
    for wall in hole.iter().filter(|_| hole.len() > 1) {
        if let Ok(what) = start(&[*wall]).order(order) {
            panic!("{order} gets {what} with nothing but {wall:?} left out");
        }
    }
    if let Err(why) = start(hole).order(order) {
        panic!("{order} proves nothing: without {hole:?} it is refused as well: {why}");
    }
}

/// A copy that stays open across exec, as a careless library leaves it, above the numbers that the attacker is given.
fn left_open(file: &File) -> usize {
    call(libc::SYS_fcntl, &[signed(file.as_raw_fd()), libc::F_DUPFD as usize, 20]).unwrap()
}

/// A directory that everybody can use, with a file that everybody can read and write.
pub(crate) struct Bait {
    pub(crate) directory: tempfile::TempDir,
}

impl Bait {
    pub(crate) fn new() -> Bait {
        let directory = tempfile::Builder::new().prefix("toft-bait").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "the host's").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o666)).unwrap();
        Bait { directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

#[test]
fn files_of_the_host_cannot_be_opened() {
    let bait = Bait::new();
    let file = bait.path("file");
    for attack in ["open", "open_upwards", "open_for_writing"] {
        stopped_by(&[Step::Root], &json!({"attack": attack, "path": file}));
    }
    stopped_by(&[Step::Root], &json!({"attack": "create", "path": bait.path("new")}));
    stopped_by(&[Step::Root], &json!({"attack": "list", "path": bait.directory.path()}));
}

#[test]
fn devices_and_processes_have_no_files() {
    for path in ["/dev/null", "/proc/self/status", "/sys/kernel/uevent_seqnum"] {
        stopped_by(&[Step::Root], &json!({"attack": "open", "path": path}));
    }
}

#[test]
fn a_ring_opens_nothing() {
    let bait = Bait::new();
    for path in [bait.path("file").as_path(), Path::new("/dev/zero")] {
        let order = json!({"attack": "open_through_ring", "path": path});
        try_jails(fresh_id(), &[Step::Root], &order);
        // Only the main thread makes rings, before it has a machine, and restricts them before they are used. From then on
        // it has no such call, and no other thread ever has.
        for thread in &THREADS[1..] {
            let mut order = order.clone();
            order["thread"] = (*thread).into();
            let refused = Cell::start(fresh_id(), &[Step::Root], &[]).order(&order).unwrap_err();
            assert!(refused == FILTERED || refused.contains("not implemented"), "{thread}: {refused}");
        }
    }
}

#[test]
fn each_kind_of_thread_lives_behind_what_it_has_closed() {
    // Or that a filter ended an attack would prove nothing.
    for thread in THREADS {
        let order = json!({"attack": "nothing", "thread": thread});
        assert_eq!(Cell::start(fresh_id(), &[], &[]).order(&order), Ok("nothing".to_owned()), "{thread}");
    }
}

#[test]
fn the_root_directory_is_empty_and_stays_so() {
    let mut cell = Cell::start(fresh_id(), &[], &[]);
    assert!(cell.order(&json!({"attack": "list", "path": "/"})).is_err());
    stopped_by(&[Step::Root], &json!({"attack": "list", "path": "/"}));
    // Even root could not write there, its own or one that is shared: the file system itself is read-only.
    let shared = EmptyNamespaces::make().unwrap();
    for empty in [None, Some(&shared)] {
        let plan = Plan { empty, ..Plan::without(RIGHTS) };
        let refused = Cell::of(&plan).unwrap().order(&json!({"attack": "create", "path": "/file"}));
        assert!(refused.unwrap_err().contains("Read-only"));
    }
}

#[test]
fn a_directory_left_open_leads_nowhere() {
    let bait = Bait::new();
    let root = left_open(&File::open("/").unwrap());
    let order = json!({"attack": "open_inherited", "path": bait.path("file")});
    stopped_by(&[Step::Descriptors], &order);
    call(libc::SYS_close, &[root]).unwrap();
}

#[test]
fn sockets_of_the_host_cannot_be_reached() {
    let bait = Bait::new();
    let path = bait.path("socket");
    let _by_path = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
    stopped_by(&[Step::Root], &json!({"attack": "connect_path", "path": path}));

    let name = format!("toft-bait-{}", std::process::id());
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    stopped_by(&[Step::NetNamespace], &json!({"attack": "connect_abstract", "name": name}));

    let inet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = inet.local_addr().unwrap().to_string();
    stopped_by(&[Step::NetNamespace], &json!({"attack": "connect_inet", "address": address}));
    stopped_by(RIGHTS, &json!({"attack": "raw_packets"}));
}

#[test]
fn other_processes_are_out_of_reach_even_under_the_same_id() {
    let uid = fresh_id();
    let mut victim = Cell::start(uid, NOTHING_BUT_IDS, &[]);
    let pid = victim.started.pid;
    victim.order(&json!({"attack": "stay", "then": "wait"})).unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let address = u64::from_str_radix(maps.split_once('-').unwrap().0, 16).unwrap();
    for attack in ["signal", "trace", "read_memory", "take_descriptor"] {
        if attack != "signal" && !same_id_suffices() {
            eprintln!("skipped: {attack}: Yama forbids it on this host, jail or not");
            continue;
        }
        let order = json!({"attack": attack, "pid": pid, "address": address});
        try_jails(uid, &[Step::PidNamespace], &order);
        try_filters(uid, &[Step::PidNamespace], &order);
    }
    let order = json!({"attack": "list", "path": format!("/proc/{pid}/fd")});
    try_jails(uid, &[Step::Root], &order);
    try_filters(uid, &[Step::Root], &order);
}

#[test]
fn a_userfaultfd_of_another_cannot_be_taken() {
    let uid = fresh_id();
    let mut victim = Cell::start(uid, NOTHING_BUT_IDS, &[]);
    let held = match victim.order(&json!({"attack": "hold_userfaultfd", "then": "wait"})) {
        Ok(held) => held.parse::<i32>().unwrap(),
        Err(why) => return eprintln!("skipped: a userfaultfd of another: this host gives none: {why}"),
    };
    if !same_id_suffices() {
        return eprintln!("skipped: a userfaultfd of another: Yama forbids it on this host, jail or not");
    }
    let order = json!({"attack": "take_userfaultfd", "pid": victim.started.pid, "descriptor": held});
    try_jails(uid, &[Step::PidNamespace], &order);
    try_filters(uid, &[Step::PidNamespace], &order);
}

#[test]
fn namespaces_of_another_cannot_be_entered() {
    let uid = fresh_id();
    let mut victim = Cell::start(uid, NOTHING_BUT_IDS, &[]);
    victim.order(&json!({"attack": "stay", "then": "wait"})).unwrap();
    let order = json!({"attack": "enter_namespaces", "pid": victim.started.pid});
    let hole = [Step::PidNamespace, Step::Ids, Step::Capabilities];
    try_jails(uid, &hole, &order);
    try_filters(uid, &hole, &order);
}

/// Whether a process may look into another of the same id (ptrace(2), "/proc/sys/kernel/yama/ptrace_scope").
fn same_id_suffices() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").is_ok_and(|scope| scope.trim() == "0")
        || !Path::new("/proc/sys/kernel/yama").exists()
}

#[test]
fn other_processes_are_out_of_reach_of_another_id() {
    let mut victim = Cell::start(fresh_id(), NOTHING_BUT_IDS, &[]);
    let pid = victim.started.pid;
    victim.order(&json!({"attack": "stay", "then": "wait"})).unwrap();
    for attack in ["signal", "trace", "take_descriptor"] {
        let order = json!({"attack": attack, "pid": pid});
        // The pid namespace is not what stops it here: the ids do.
        for hole in [&[][..], &[Step::PidNamespace], &[Step::Ids, Step::Capabilities]] {
            assert!(Cell::start(fresh_id(), hole, &[]).order(&order).is_err(), "{attack} {hole:?}");
        }
        let hole = [Step::PidNamespace, Step::Ids, Step::Capabilities];
        Cell::start(fresh_id(), &hole, &[]).order(&order).unwrap();
    }
}

#[test]
fn what_only_root_may_do_is_refused() {
    for attack in ["mount", "make_writable", "unshare", "chroot", "join_group"] {
        stopped_by(RIGHTS, &json!({"attack": attack}));
    }
    stopped_by(&[Step::Ids], &json!({"attack": "become_root"}));
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if sysctl.trim() == "0" {
        stopped_by(RIGHTS, &json!({"attack": "userfaultfd"}));
    } else {
        eprintln!("skipped: userfaultfd: this host gives it to everybody");
    }
}

#[test]
fn a_file_that_was_given_leads_to_no_other_of_its_file_system() {
    // The log, the console's ring and the disks of a VMM lie on a file system of the host.
    let bait = Bait::new();
    let file = File::open(bait.path("file")).unwrap();
    let secret = std::ffi::CString::new(bait.path("file").into_os_string().into_encoded_bytes()).unwrap();
    // struct file_handle: the room behind these two words, then what the file system fills it with.
    let mut handle = [0_u32; 2 + 32];
    handle[0] = 32 * 4;
    let mut mount = 0_i32;
    let pointers = (secret.as_ptr() as usize, handle.as_mut_ptr() as usize, (&raw mut mount) as usize);
    let arguments = [libc::AT_FDCWD as usize, pointers.0, pointers.1, pointers.2, 0];
    if let Err(error) = call(libc::SYS_name_to_handle_at, &arguments) {
        return eprintln!("skipped: files by handle: this file system has none: {error}");
    }
    let order = json!({"attack": "open_by_handle", "handle": handle.to_vec()});
    let start =
        |left_out: &[Step]| Cell::of(&Plan { given: Some(&file), ..Plan::without(left_out) }).unwrap();
    try_cells(RIGHTS, &order, start);
    try_filtered_cells(&order, || start(RIGHTS));
}

#[test]
fn no_device_can_be_made() {
    let bait = Bait::new();
    let hole = [Step::Root, Step::Ids, Step::Capabilities];
    let order = json!({"attack": "make_device", "path": bait.path("device")});
    try_jails(fresh_id(), &hole, &order);
    std::fs::remove_file(bait.path("device")).unwrap();
    try_filters(fresh_id(), &hole, &order);
}

#[test]
fn the_log_of_the_kernel_cannot_be_read() {
    if std::fs::read_to_string("/proc/sys/kernel/dmesg_restrict").is_ok_and(|text| text.trim() == "0") {
        return eprintln!("skipped: the kernel's log: this host shows it to everybody");
    }
    stopped_by(RIGHTS, &json!({"attack": "kernel_log"}));
}

#[test]
fn a_user_namespace_is_for_the_filters_to_refuse() {
    // Most kernels give one to everybody, with capabilities inside: no wall of the jail stands in between.
    let order = json!({"attack": "user_namespace"});
    if let Err(why) = Cell::start(fresh_id(), &[], &[]).order(&order) {
        eprintln!("skipped: a user namespace: this host gives none: {why}");
    }
    try_filters(fresh_id(), &[], &order);
}

#[test]
fn nothing_executed_gains_a_right() {
    let bait = Bait::new();
    let program = bait.path("heir");
    // By a process of its own: what another test's child still has open for writing cannot be executed.
    let this = std::env::current_exe().unwrap();
    assert!(std::process::Command::new("cp").args([&this, &program]).status().unwrap().success());
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o4755)).unwrap();
    stopped_by(&[Step::Root, Step::NoNewPrivs], &json!({"attack": "heir", "path": program}));
}

#[test]
fn keys_of_the_daemon_cannot_be_read() {
    const KEYCTL_JOIN_SESSION_KEYRING: usize = 1;
    const SESSION: i32 = -3;
    let name = std::ffi::CString::new(format!("toft-bait-{}", std::process::id())).unwrap();
    // This thread has a session of its own from here on; no other test sees the key.
    match call(libc::SYS_keyctl, &[KEYCTL_JOIN_SESSION_KEYRING, 0]) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            return eprintln!("skipped: keys: this kernel has none");
        }
        joined => joined.unwrap(),
    };
    let (kind, description, payload) = (c"user".as_ptr(), name.as_ptr(), c"secret".as_ptr());
    let arguments = [kind as usize, description as usize, payload as usize, 6, signed(SESSION)];
    call(libc::SYS_add_key, &arguments).unwrap();
    stopped_by(&[Step::Keyring], &json!({"attack": "read_key", "name": name.to_str().unwrap()}));
}

#[test]
fn shared_memory_of_the_host_cannot_be_attached() {
    let key = 0x7061_0000 | (std::process::id() as i32 & 0xffff);
    let flags = (libc::IPC_CREAT | libc::IPC_EXCL | 0o666) as usize;
    let segment = call(libc::SYS_shmget, &[signed(key), 4096, flags]).unwrap();
    stopped_by(&[Step::IpcNamespace], &json!({"attack": "shared_memory", "key": key}));
    call(libc::SYS_shmctl, &[segment, libc::IPC_RMID as usize, 0]).unwrap();
}

#[test]
fn the_host_has_no_name_inside() {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    stopped_by(&[Step::UtsNamespace], &json!({"attack": "host_name", "name": name.trim()}));
}

#[test]
fn nothing_grows_beyond_its_limit() {
    try_jails(fresh_id(), &[Step::Rlimits], &json!({"attack": "exhaust_descriptors", "count": 100}));
    try_jails(fresh_id(), &[Step::Rlimits], &json!({"attack": "exhaust_tasks", "count": 20}));
    try_jails(fresh_id(), &[Step::Rlimits], &json!({"attack": "long_file", "bytes": (1 << 20) + 1}));
    // Up to the limit a file may grow.
    Cell::start(fresh_id(), &[], &[]).order(&json!({"attack": "long_file", "bytes": 1 << 20})).unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    let bytes = sys::jail::MEMLOCK_BYTES + 4096;
    // What the attacker would inherit must be more than the jail allows, or the hole shows nothing.
    let wanted = hard.max(2 * bytes);
    if setrlimit(Resource::RLIMIT_MEMLOCK, wanted, wanted).is_err() {
        assert!(hard > bytes, "locked memory is already limited to {hard} here, and that cannot be raised");
        setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard).unwrap();
    }
    stopped_by(&[Step::Rlimits], &json!({"attack": "locked_memory", "bytes": bytes}));
}

/// A pids cgroup of v1 or v2, removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(pids_max: u32) -> Option<Cgroup> {
        let v2 = PathBuf::from("/sys/fs/cgroup");
        let parent = if v2.join("cgroup.controllers").exists() {
            std::fs::write(v2.join("cgroup.subtree_control"), "+pids").ok()?;
            v2
        } else {
            v2.join("pids")
        };
        let path = parent.join(format!("toft-jail-test-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        let cgroup = Cgroup(path);
        std::fs::write(cgroup.0.join("pids.max"), pids_max.to_string()).ok()?;
        Some(cgroup)
    }

    fn open(&self) -> File {
        let name = if self.0.join("tasks").exists() { "tasks" } else { "cgroup.procs" };
        File::options().write(true).open(self.0.join(name)).unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("{} stays: {error}", self.0.display());
        }
    }
}

#[test]
fn a_cgroup_bounds_what_the_limits_would_let_through() {
    let Some(cgroup) = Cgroup::new(8) else {
        return eprintln!("skipped: cgroups: no pids controller can be had here");
    };
    let file = cgroup.open();
    let cgroups: [BorrowedFd<'_>; 1] = [file.as_fd()];
    let order = json!({"attack": "exhaust_tasks", "count": 20});
    let mut cell = Cell::start(fresh_id(), &[Step::Rlimits], &cgroups);
    let listed = std::fs::read_to_string(cgroup.0.join("cgroup.procs")).unwrap();
    assert_eq!(listed.trim(), cell.started.pid.to_string());
    assert!(cell.order(&order).is_err());
    drop(cell);
    Cell::start(fresh_id(), &[Step::Rlimits, Step::Cgroups], &cgroups).order(&order).unwrap();
}

#[test]
fn a_process_joins_each_cgroup_with_one_write_of_its_own() {
    // In place of a group's file, a pipe that keeps writes apart.
    let pipe = || nix::unistd::pipe2(OFlag::O_DIRECT | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    for (left_out, expected) in [(&[][..], Some(b"0")), (&[Step::Cgroups], None)] {
        let pipes = [pipe(), pipe()];
        let [(one, one_in), (two, two_in)] = &pipes;
        let cell = Cell::of(&Plan { cgroups: &[one_in.as_fd(), two_in.as_fd()], ..Plan::without(left_out) });
        let _cell = cell.unwrap();
        for pipe in [one, two] {
            let mut written = [0; 64];
            let count = nix::unistd::read(pipe, &mut written).ok();
            assert_eq!(count.map(|count| &written[..count]), expected.map(|text| &text[..]), "{left_out:?}");
            // It writes once, and its number stays with the test.
            assert_eq!(nix::unistd::read(pipe, &mut written), Err(Errno::EAGAIN), "{left_out:?}");
        }
    }
}

/// A group that the kernel lets nobody into, and how it says so. For v2, one that hands its memory to groups below it
/// (cgroup-v2, "No Internal Process Constraint"); for v1, one without CPUs (cpusets, "Usage Examples").
fn closed_group() -> std::io::Result<(Cgroup, Errno)> {
    let root = Path::new("/sys/fs/cgroup");
    let name = format!("toft-jail-test-closed-{}", std::process::id());
    if !root.join("cgroup.controllers").exists() {
        let path = root.join("cpuset").join(name);
        std::fs::create_dir(&path)?;
        return Ok((Cgroup(path), Errno::ENOSPC));
    }
    std::fs::write(root.join("cgroup.subtree_control"), "+memory")?;
    std::fs::create_dir(root.join(&name))?;
    let cgroup = Cgroup(root.join(&name));
    std::fs::write(cgroup.0.join("cgroup.subtree_control"), "+memory")?;
    Ok((cgroup, Errno::EBUSY))
}

#[test]
fn a_group_that_takes_nobody_fails_the_start_or_is_told() {
    let (cgroup, errno) = match closed_group() {
        Ok(closed) => closed,
        Err(error) => return eprintln!("skipped: closed cgroups: none can be made here: {error}"),
    };
    let file = cgroup.open();
    let cgroups = [file.as_fd()];
    let plan = |refused| Plan { cgroups: &cgroups, refused, ..Plan::without(&[]) };
    let error = Cell::of(&plan(Refused::Fails)).err().expect("the start fails");
    assert_eq!((error.step, error.cause.raw_os_error()), (Step::Cgroups, Some(errno as i32)));
    let cell = Cell::of(&plan(Refused::LeftOut)).unwrap();
    let told: Vec<_> = cell.started.refused.iter().map(|(step, why)| (*step, why.raw_os_error())).collect();
    assert_eq!(told, [(Step::Cgroups, Some(errno as i32))]);
    assert_eq!(std::fs::read_to_string(cgroup.0.join("cgroup.procs")).unwrap(), "");
}

/// What `/proc/<pid>/status` says.
fn status(pid: i32) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

#[test]
fn the_jail_looks_from_outside_as_it_should() {
    let namespace =
        |pid: i32| ["mnt", "net"].map(|name| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap());
    let plans = || {
        let shared = Plan::without(&[]);
        [shared.empty, None].map(|empty| Plan { empty, ..Plan::without(&[]) })
    };
    let mut namespaces = BTreeMap::new();
    for plan in plans().iter().chain(&plans()) {
        let cell = Cell::of(plan).unwrap_or_else(|error| panic!("{error}: {}", error.cause));
        assert!(cell.started.refused.is_empty(), "{:?}", cell.started.refused);
        looks_as_it_should(cell.started.pid, plan.uid);
        namespaces
            .entry(plan.empty.is_some())
            .or_insert_with(Vec::new)
            .push((namespace(cell.started.pid), cell));
    }
    for kind in 0..2 {
        let is_same = |shared| namespaces[&shared][0].0[kind] == namespaces[&shared][1].0[kind];
        assert!(is_same(true) && !is_same(false));
    }
}

fn looks_as_it_should(pid: i32, uid: u32) {
    let status = status(pid);
    assert_eq!(status["Uid"], format!("{uid} {uid} {uid} {uid}"));
    assert_eq!(status["Gid"], format!("{uid} {uid} {uid} {uid}"));
    assert_eq!(status["Groups"], "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["NSpid"].split(' ').next_back(), Some("1"));
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), PathBuf::from("/"));
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.starts_with("tmpfs / tmpfs ro,nosuid,nodev,noexec"), "{mounts}");
}

#[test]
fn each_namespace_is_its_own_unless_left_out() {
    let namespaces = [
        ("mnt", &[Step::MountNamespace, Step::Root][..]),
        ("pid", &[Step::PidNamespace]),
        ("net", &[Step::NetNamespace]),
        ("ipc", &[Step::IpcNamespace]),
        ("uts", &[Step::UtsNamespace]),
    ];
    let of = |pid: &str, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    let whole = Cell::start(fresh_id(), &[], &[]);
    for (name, hole) in namespaces {
        assert_ne!(of(&whole.started.pid.to_string(), name), of("self", name), "{name}");
        let open = Cell::start(fresh_id(), hole, &[]);
        assert_eq!(of(&open.started.pid.to_string(), name), of("self", name), "{name}");
    }
}

#[test]
fn a_descriptor_of_the_host_is_closed_even_without_its_mark() {
    let bait = Bait::new();
    let path = bait.path("file");
    let file = left_open(&File::open(&path).unwrap());
    let open = |hole: &[Step]| {
        let cell = Cell::start(fresh_id(), hole, &[]);
        let fds = std::fs::read_dir(format!("/proc/{}/fd", cell.started.pid)).unwrap();
        fds.filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to == path)).count()
    };
    assert_eq!((open(&[]), open(&[Step::Descriptors])), (0, 1));
    call(libc::SYS_close, &[file]).unwrap();
}
