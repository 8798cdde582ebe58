//! A real VMM in the launcher's jail: what it was told to be kept in is what it is kept in, and its machine runs
//! there. What an attacker could do from inside is tested in `tests/jail`.
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use sys::jail;
use sys::pidfd::{Ended, PidFd, Signal};
use wire::channel::Channel;
use wire::control::{self, FaultCode};
use wire::launch::{Command, ExitStatus, Jail, Message, Reply, Rlimits};

use crate::launcher::{Launcher, Orphan, jail};
use crate::probe_guest;
use crate::run::copy_program;
use crate::vmm_driver::{Machine, PATIENCE, RLIMITS, Vmm, program, readable};

/// Spawns with a jail; answers the process.
fn spawn(launcher: &Launcher, label: &str, jail: Jail, cgroups: Vec<OwnedFd>) -> (i32, Orphan) {
    let mut descriptors = Vec::from(launcher.descriptors("server"));
    descriptors.extend(cgroups);
    launcher.ask(1, Command::Spawn { label: label.to_owned(), jail }, &descriptors);
    let (message, mut descriptors) = launcher.hear();
    let Message::Reply { id: 1, result: Ok(Reply::Spawned { pid, missing }) } = message else {
        panic!("{message:?}")
    };
    if nix::unistd::geteuid().is_root() {
        assert!(missing.is_empty(), "{missing:?}");
    }
    (pid, Orphan(PidFd::from(descriptors.pop().expect("the pidfd comes along"))))
}

/// A file of `/proc/<pid>`: the words of each line, by what stands before the separator.
fn table(path: String, separator: &str) -> BTreeMap<String, Vec<String>> {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
    std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once(separator))
        .map(|(name, rest)| (name.trim().to_owned(), words(rest)))
        .collect()
}

#[test]
fn a_label_is_only_for_people() {
    let launcher = Launcher::start();
    let (pid, _vmm) = spawn(&launcher, "", jail(), Vec::new());
    // The kernel closes what tells the launcher of an exec a moment before it shows the new program's arguments.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let title = loop {
        let title = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        if !title.is_empty() || std::time::Instant::now() > end {
            break title;
        }
        std::thread::yield_now();
    };
    assert_eq!(title, "toft-vmm\0machine\0--label\0\0");
}

#[test]
fn a_vmm_is_the_launchers_program_whatever_its_path_comes_to_lead_to() {
    let directory = tempfile::tempdir().unwrap();
    let (path, other) = (directory.path().join("toft-vmm"), directory.path().join("other"));
    copy_program(&program(), &path);
    std::fs::write(&other, "somebody else's").unwrap();
    std::fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let launcher = Launcher::of(&path);
    let ours = std::fs::metadata(&path).unwrap().ino();
    type Link = fn(&Path, &Path) -> std::io::Result<()>;
    let links: [(&str, Link); 2] = [
        ("symbolic", |to, at| std::os::unix::fs::symlink(to, at)),
        ("hard", |to, at| std::fs::hard_link(to, at)),
    ];
    for (name, link) in links {
        std::fs::remove_file(&path).unwrap();
        link(&other, &path).unwrap();
        let (pid, vmm) = spawn(&launcher, name, jail(), Vec::new());
        // Through the descriptor, not through the name that is shown for it.
        assert_eq!(std::fs::metadata(format!("/proc/{pid}/exe")).unwrap().ino(), ours, "{name}");
        vmm.0.signal(Signal::SIGKILL).unwrap();
        assert_eq!(launcher.hear().0, Message::Exited { pid, status: ExitStatus::Signal(9) });
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody else's", "{name}");
        for kind in ["sock", "will", "log"] {
            std::fs::remove_file(launcher.directory.path().join(format!("server.{kind}"))).unwrap();
        }
    }
}

#[test]
fn the_control_socket_may_lie_anywhere() {
    // The VMM gets it bound and listening; in its empty root there is no such path, and none would help it.
    let launcher = Launcher::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("deep/api.socket");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let mut descriptors = Vec::from(launcher.descriptors("server"));
    descriptors[0] = sys::seqpacket::Listener::bind(&path).unwrap().into();
    launcher.ask(1, Command::Spawn { label: "server".to_owned(), jail: jail() }, &descriptors);
    let (message, mut descriptors) = launcher.hear();
    assert!(matches!(message, Message::Reply { result: Ok(Reply::Spawned { .. }), .. }), "{message:?}");
    let _vmm = Orphan(PidFd::from(descriptors.pop().expect("the pidfd comes along")));
    let channel = Channel::new(sys::seqpacket::Socket::connect(&path).unwrap());
    let hello = control::Command::Hello { protocol: control::PROTOCOL };
    channel.send(&control::Request { id: 7, command: hello }, &[]).unwrap();
    assert!(readable(channel.as_fd(), Instant::now() + PATIENCE), "the VMM says nothing");
    let (answer, _) = channel.receive::<control::Message>().unwrap().expect("the VMM lives");
    assert!(matches!(answer, control::Message::Reply { id: 7, result: Ok(control::Reply::Hello { .. }) }));
}

#[test]
fn a_vmm_is_the_first_process_of_its_namespace() {
    let launcher = Launcher::start();
    let (pid, _vmm) = spawn(&launcher, "server", jail(), Vec::new());
    let status = table(format!("/proc/{pid}/status"), ":");
    let seen = &status["NSpid"];
    assert_eq!((seen.first(), seen.last()), (Some(&pid.to_string()), Some(&"1".to_owned())), "{seen:?}");
}

#[test]
fn a_vmm_has_the_limits_it_was_given() {
    let launcher = Launcher::start();
    let rlimits = Rlimits { nofile: 200, fsize_bytes: 3 << 20, nproc: 900 };
    let (pid, _vmm) = spawn(&launcher, "server", Jail { rlimits, ..jail() }, Vec::new());
    let limits = table(format!("/proc/{pid}/limits"), "  ");
    let locked = wire::launch::MEMLOCK_BYTES;
    let expected = [
        ("Max open files", 200),
        ("Max file size", 3 << 20),
        ("Max processes", 900),
        ("Max core file size", 0),
        ("Max locked memory", locked),
    ];
    for (name, value) in expected {
        let value = value.to_string();
        assert_eq!(limits[name][..2], [value.clone(), value], "{name}");
    }
}

#[test]
fn a_vmm_is_killed_by_its_descriptor() {
    let launcher = Launcher::start();
    let (pid, vmm) = spawn(&launcher, "server", jail(), Vec::new());
    // The first process of a namespace heeds no signal without a handler from inside, but any from outside.
    vmm.0.signal(Signal::SIGKILL).unwrap();
    let (message, _) = launcher.hear();
    assert_eq!(message, Message::Exited { pid, status: ExitStatus::Signal(9) });
}

#[test]
fn a_vmm_without_descriptors_to_spare_ends_with_a_reason() {
    let launcher = Launcher::start();
    let rlimits = Rlimits { nofile: 3, ..jail().rlimits };
    let (pid, _vmm) = spawn(&launcher, "server", Jail { rlimits, ..jail() }, Vec::new());
    let (message, _) = launcher.hear();
    assert_eq!(message, Message::Exited { pid, status: ExitStatus::Code(1) });
    let log = std::fs::read_to_string(launcher.directory.path().join("server.log")).unwrap();
    assert!(log.contains("Too many open files"), "{log}");
}

#[test]
fn guest_memory_keeps_to_the_limit_of_file_size() {
    // The machine has 64 MiB of memory, which is a file.
    let limited = |fsize_bytes| Vmm::start_limited(jail::Rlimits { fsize_bytes, ..RLIMITS });
    let machine = || Machine::new(probe_guest::path(), "mem rng");
    let mut vmm = limited(64 << 20);
    vmm.try_boot(machine()).unwrap();
    assert_eq!(vmm.wait_for_end().0, Ended::Code(0));
    assert!(vmm.told().contains("probe: done failed=0"), "{}", vmm.told());
    let fault = limited((64 << 20) - 1).try_boot(machine()).unwrap_err();
    assert_eq!(fault.code, FaultCode::Host);
    assert!(fault.detail.contains("File too large"), "{fault}");
}

/// A cgroup two levels deep in one hierarchy, removed when dropped.
struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// In each hierarchy of v1 that a machine is limited by, or in the one of v2.
    fn all() -> Vec<Cgroup> {
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = match root.join("cgroup.controllers").exists() {
            true => vec![root.to_owned()],
            false => ["cpu", "memory", "pids"].map(|name| root.join(name)).to_vec(),
        };
        let made = hierarchies.into_iter().filter_map(|hierarchy| {
            let path = hierarchy.join(format!("toft-test-{}/inner", std::process::id()));
            std::fs::create_dir_all(&path).ok().map(|()| Cgroup { path })
        });
        made.collect()
    }

    fn open(&self) -> OwnedFd {
        let tasks = self.path.join("tasks");
        let path = if tasks.exists() { tasks } else { self.path.join("cgroup.procs") };
        File::options().write(true).open(path).unwrap().into()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in [self.path.as_path(), self.path.parent().expect("it is two levels deep")] {
            if let Err(error) = std::fs::remove_dir(path) {
                eprintln!("{} stays: {error}", path.display());
            }
        }
    }
}

#[test]
fn a_vmm_is_in_the_cgroups_it_was_given() {
    let cgroups = Cgroup::all();
    if cgroups.is_empty() {
        return eprintln!("skipped: cgroups: none can be made here");
    }
    let launcher = Launcher::start();
    let files: Vec<OwnedFd> = cgroups.iter().map(Cgroup::open).collect();
    let wanted = Jail { cgroups: files.len() as u8, ..jail() };
    let (pid, vmm) = spawn(&launcher, "server", wanted, files);
    for cgroup in &cgroups {
        let listed = std::fs::read_to_string(cgroup.path.join("cgroup.procs")).unwrap();
        assert_eq!(listed.trim(), pid.to_string(), "{}", cgroup.path.display());
    }
    // A cgroup can be removed only when its last process has been reaped.
    vmm.0.signal(Signal::SIGKILL).unwrap();
    assert!(readable(vmm.0.as_fd(), Instant::now() + PATIENCE), "it does not end");
    launcher.hear();
}
