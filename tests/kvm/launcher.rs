//! The launcher through its own wire: it starts VMMs, tells how they end, and looks at KVM.
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use sys::pidfd::{Ended, PidFd, Signal};
use sys::seqpacket::{Listener, Socket};
use sys::spawn::{Program, spawn};
use wire::channel::Channel;
use wire::control;
use wire::isolation::Item;
use wire::launch::{Command, ExitStatus, Jail, JailUser, LinuxSupport, Message, Reply, Request, Rlimits, fd};
use wire::will::{Reason, Will};

use crate::vmm_driver::{PATIENCE, program, readable};

pub(crate) struct Launcher {
    channel: Option<Channel>,
    pid: i32,
    pidfd: PidFd,
    pub(crate) directory: tempfile::TempDir,
}

impl Launcher {
    pub(crate) fn start() -> Launcher {
        Launcher::of(&program())
    }

    /// A launcher of this program.
    pub(crate) fn of(executable: &Path) -> Launcher {
        let directory = tempfile::Builder::new().prefix("toft-launcher").tempdir().unwrap();
        let (ours, theirs) = Socket::pair().unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (pid, pidfd) = spawn(&Program {
            executable,
            name: "toft-vmm".as_ref(),
            arguments: &["launcher".as_ref()],
            descriptors: &[
                (null.as_fd(), 0),
                (null.as_fd(), 1),
                (null.as_fd(), 2),
                (theirs.as_fd(), fd::CONTROL),
            ],
        })
        .unwrap();
        Launcher { channel: Some(Channel::new(ours)), pid, pidfd, directory }
    }

    fn channel(&self) -> &Channel {
        self.channel.as_ref().expect("the launcher was not left")
    }

    pub(crate) fn ask(&self, id: u64, command: Command, descriptors: &[OwnedFd]) {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.channel().send(&Request { id, command }, &descriptors).unwrap();
    }

    pub(crate) fn hear(&self) -> (Message, Vec<OwnedFd>) {
        assert!(readable(self.channel().as_fd(), Instant::now() + PATIENCE), "the launcher says nothing");
        self.channel().receive().unwrap().expect("the launcher lives")
    }

    pub(crate) fn descriptors(&self, name: &str) -> [OwnedFd; 4] {
        let path = |kind: &str| self.directory.path().join(format!("{name}.{kind}"));
        let file = |kind: &str| OwnedFd::from(File::create(path(kind)).unwrap());
        let listener = Listener::bind(&path("sock")).unwrap();
        [listener.into(), kvm(), file("will"), file("log")]
    }

    fn spawn(&self, name: &str) -> (i32, Orphan, Channel) {
        self.ask(1, spawn_command(name), &self.descriptors(name));
        let (message, mut descriptors) = self.hear();
        let Message::Reply { id: 1, result: Ok(Reply::Spawned { pid, .. }) } = message else {
            panic!("{message:?}")
        };
        let pidfd = Orphan(PidFd::from(descriptors.pop().expect("the pidfd comes along")));
        let socket = Socket::connect(&self.directory.path().join(format!("{name}.sock"))).unwrap();
        (pid, pidfd, Channel::new(socket))
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.channel = None;
        if !readable(self.pidfd.as_fd(), Instant::now() + PATIENCE) {
            let _ = self.pidfd.signal(Signal::SIGKILL);
        }
        let _ = self.pidfd.reap();
    }
}

/// A VMM, which would outlive its launcher and the test.
pub(crate) struct Orphan(pub(crate) PidFd);

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::SIGKILL);
    }
}

/// The jail as far as this host and user allow it.
fn spawn_command(label: &str) -> Command {
    Command::Spawn { label: label.to_owned(), jail: jail() }
}

pub(crate) fn jail() -> Jail {
    let root = nix::unistd::geteuid().is_root();
    let user = if root { JailUser::Own { uid: 65_534, gid: 65_534 } } else { JailUser::Caller };
    let rlimits = Rlimits { nofile: 1_024, fsize_bytes: u64::MAX, nproc: 4_096 };
    Jail { user, cgroups: 0, rlimits, required: false }
}

fn kvm() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/kvm").expect("these tests need /dev/kvm").into()
}

fn command(channel: &Channel, command: control::Command) -> control::Message {
    channel.send(&control::Request { id: 7, command }, &[]).unwrap();
    assert!(readable(channel.as_fd(), Instant::now() + PATIENCE), "the VMM says nothing");
    channel.receive().unwrap().expect("the VMM lives").0
}

#[test]
fn what_the_launcher_has_open_does_not_grow_with_its_vmms() {
    let launcher = Launcher::start();
    let open = || std::fs::read_dir(format!("/proc/{}/fd", launcher.pid)).unwrap().count();
    // What KVM offers is kept from here on.
    let first = launcher.spawn("first");
    let before = open();
    let more = ["second", "third", "fourth", "fifth"].map(|name| launcher.spawn(name));
    // It may have answered before it has let go of what an answer takes, now as then.
    let until = Instant::now() + Duration::from_secs(30);
    while open() > before + 1 {
        assert!(Instant::now() < until, "{} are open, and before it were {before}", open());
        std::thread::yield_now();
    }
    drop((first, more));
}

#[test]
fn a_vmm_has_its_descriptors_and_no_others() {
    let launcher = Launcher::start();
    let (pid, _pidfd, channel) = launcher.spawn("server");
    assert!(matches!(
        command(&channel, control::Command::Hello { protocol: 1 }),
        control::Message::Reply { id: 7, result: Ok(control::Reply::Hello { .. }) }
    ));
    let mut open: Vec<(i32, String)> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (entry.file_name().to_str().unwrap().parse().unwrap(), std::fs::read_link(entry.path()).unwrap())
        })
        .map(|(number, target)| (number, target.to_string_lossy().into_owned()))
        .collect();
    open.sort();
    // Beyond those it was given it has only what it made itself: epoll, the bell, our connection.
    for (number, target) in &open {
        match number {
            0 => assert_eq!(target, "/dev/null"),
            1 | 2 => assert!(target.ends_with("server.log"), "{target}"),
            4 => assert_eq!(target, "/dev/kvm"),
            5 => assert!(target.ends_with("server.will"), "{target}"),
            _ => assert!(
                target.starts_with("socket:") || target.starts_with("anon_inode:"),
                "{number}: {target}"
            ),
        }
    }
    let title = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(title, "toft-vmm\0machine\0--label\0server\0");
    assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap(), "toft-vmm\n");
}

#[test]
fn the_end_of_a_vmm_is_told_once_with_its_status() {
    let launcher = Launcher::start();
    let (first, _pidfd, channel) = launcher.spawn("first");
    let (second, pidfd, _channel) = launcher.spawn("second");
    command(&channel, control::Command::Quit);
    let (message, _) = launcher.hear();
    assert_eq!(message, Message::Exited { pid: first, status: ExitStatus::Code(0) });
    let will = Will::read(&File::open(launcher.directory.path().join("first.will")).unwrap()).unwrap();
    assert_eq!(will.unwrap().reason, Reason::Asked);
    pidfd.0.signal(Signal::SIGKILL).unwrap();
    let (message, _) = launcher.hear();
    assert_eq!(message, Message::Exited { pid: second, status: ExitStatus::Signal(9) });
}

#[test]
fn it_sleeps_when_a_vmm_has_ended_of_which_somebody_has_a_descriptor_still() {
    let launcher = Launcher::start();
    let (pid, pidfd, channel) = launcher.spawn("server");
    command(&channel, control::Command::Quit);
    let (message, _) = launcher.hear();
    assert_eq!(message, Message::Exited { pid, status: ExitStatus::Code(0) });
    let status = format!("/proc/{}/status", launcher.pid);
    let end = Instant::now() + PATIENCE;
    while !std::fs::read_to_string(&status).unwrap().contains("State:\tS") {
        assert!(Instant::now() < end, "the launcher is busy");
    }
    assert!(pidfd.0.has_ended().unwrap());
}

#[test]
fn vmms_live_on_when_launcher_and_daemon_go() {
    let mut launcher = Launcher::start();
    let (_, pidfd, channel) = launcher.spawn("orphan");
    launcher.channel = None;
    assert!(readable(launcher.pidfd.as_fd(), Instant::now() + PATIENCE), "the launcher does not end");
    assert_eq!(launcher.pidfd.reap().unwrap(), Some(Ended::Code(0)));
    assert!(!pidfd.0.has_ended().unwrap());
    command(&channel, control::Command::Quit);
    assert!(readable(pidfd.0.as_fd(), Instant::now() + PATIENCE), "the VMM does not end");
}

#[test]
fn a_request_with_the_wrong_descriptors_is_answered() {
    let launcher = Launcher::start();
    launcher.ask(3, spawn_command("x"), &[kvm()]);
    let (message, _) = launcher.hear();
    assert!(matches!(message, Message::Reply { id: 3, result: Err(text) } if text.contains("4 descriptors")));
    launcher.ask(4, spawn_command("a\nb"), &launcher.descriptors("label"));
    let (message, _) = launcher.hear();
    assert!(matches!(message, Message::Reply { id: 4, result: Err(text) } if text.contains("label")));
}

#[test]
fn the_probe_reports_what_it_measured() {
    let launcher = Launcher::start();
    launcher.ask(5, Command::Probe, &[kvm()]);
    let (message, _) = launcher.hear();
    let Message::Reply { id: 5, result: Ok(Reply::Probed(report)) } = message else { panic!("{message:?}") };
    assert_eq!((report.api_version, report.missing.len()), (12, 0));
    assert!(report.kernel_mode_ips > 1_000 && report.exit_ns > 100, "{report:?}");
    if let LinuxSupport::No(why) = &report.linux {
        assert!(why.contains("cmpxchg16b") || why.contains("instructions a second"), "{why}");
    }
}

#[test]
fn a_probe_of_something_else_than_kvm_is_answered() {
    let launcher = Launcher::start();
    launcher.ask(6, Command::Probe, &[File::open("/dev/null").unwrap().into()]);
    let (message, _) = launcher.hear();
    assert!(
        matches!(&message, Message::Reply { id: 6, result: Err(text) } if text.contains("not a usable /dev/kvm")),
        "{message:?}"
    );
}

#[test]
fn what_the_jail_is_without_is_told_or_fails_the_spawn() {
    let launcher = Launcher::start();
    // A file that is no cgroup's takes no process.
    let cgroup = || OwnedFd::from(File::options().write(true).open("/dev/full").unwrap());
    let ask = |id, name: &str, required| {
        let mut descriptors = Vec::from(launcher.descriptors(name));
        descriptors.push(cgroup());
        let jail = Jail { cgroups: 1, required, ..jail() };
        launcher.ask(id, Command::Spawn { label: name.to_owned(), jail }, &descriptors);
        launcher.hear()
    };
    let (message, mut descriptors) = ask(8, "lenient", false);
    let Message::Reply { id: 8, result: Ok(Reply::Spawned { missing, .. }) } = message else {
        panic!("{message:?}")
    };
    let _vmm = Orphan(PidFd::from(descriptors.pop().expect("the pidfd comes along")));
    let items: Vec<Item> = missing.iter().map(|missing| missing.item).collect();
    let cgroups = [Item::CgroupCpu, Item::CgroupMemory, Item::CgroupPids];
    assert!(cgroups.iter().all(|item| items.contains(item)), "{missing:?}");
    if nix::unistd::geteuid().is_root() {
        assert_eq!(items, cgroups);
        assert!(missing[0].why.contains("the cgroup cannot be joined"), "{missing:?}");
    }
    let (message, _) = ask(9, "strict", true);
    let Message::Reply { id: 9, result: Err(why) } = message else { panic!("{message:?}") };
    let sentence =
        if nix::unistd::geteuid().is_root() { "the cgroup cannot be joined" } else { "ids of its own" };
    assert!(why.contains(sentence), "{why}");
}

#[test]
fn a_vmm_is_never_given_the_ids_of_root() {
    let launcher = Launcher::start();
    for (uid, gid) in [(0, 65_534), (65_534, 0)] {
        let jail = Jail { user: JailUser::Own { uid, gid }, ..jail() };
        let descriptors = launcher.descriptors(&format!("{uid}-{gid}"));
        launcher.ask(10, Command::Spawn { label: "root".to_owned(), jail }, &descriptors);
        let (message, _) = launcher.hear();
        assert!(
            matches!(&message, Message::Reply { id: 10, result: Err(text) } if text.contains("those of root")),
            "{message:?}"
        );
    }
}
