//! Toft's VMM with a stopwatch: all files are made before, then it is spawned, given its machine, and its first
//! output awaited, as the daemon does it. `vmm_driver` is for everything that is not timed.
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use sys::jail::{Jail, Program, Refused, User};
use sys::pidfd::{PidFd, Signal};
use sys::seqpacket::{Listener, Socket};
use wire::channel::Channel;
use wire::console::Ring;
use wire::control;
use wire::launch::{self, JailUser, Rlimits, fd};
use wire::limits::CONSOLE_RING_BYTES;
use wire::machine::Console;
use wire::saved::lower::Lower;
use wire::saved::{Clock, Counters, Digest, Identity, LowerFiles, MemoryUse, RestoreSpec, Then};

use crate::groups::Group;
use crate::vmm_driver::{Machine, PATIENCE, RLIMITS, Saved, Vmm, program, readable};

/// Ids that no process on this host has.
const ID: u32 = 0x7000_0000;

/// In what VMMs are kept while they are measured, in words. Fails when that is less than a daemon keeps them in: less costs less.
pub(crate) fn walls() -> Result<String, String> {
    let mut vmm = Vmm::start();
    if !vmm.refused.is_empty() {
        return Err(format!(
            "VMMs cannot be measured without their jail, of which this host refuses {:?}",
            vmm.refused
        ));
    }
    let Ok(control::Reply::Hello { sandbox, .. }) =
        vmm.command(control::Command::Hello { protocol: control::PROTOCOL })
    else {
        return Err("a VMM does not say what it is kept in".to_owned());
    };
    let control::Sandbox { seccomp, landlock_abi, rings_restricted } = sandbox;
    if !(seccomp && rings_restricted) {
        return Err(format!("VMMs cannot be measured without their filters: {sandbox:?}"));
    }
    let landlock = if landlock_abi > 0 { "with" } else { "where this kernel has no" };
    Ok(format!("VMMs are in their jail and under their filters, {landlock} Landlock."))
}

/// What one VMM is given.
pub(crate) struct Files {
    directory: tempfile::TempDir,
    listener: OwnedFd,
    kvm: OwnedFd,
    will: OwnedFd,
    log: OwnedFd,
}

impl Files {
    pub(crate) fn new() -> Files {
        let directory = tempfile::Builder::new().prefix("toft-bench").tempdir().unwrap();
        let file = |name: &str| OwnedFd::from(File::create(directory.path().join(name)).unwrap());
        let listener = Listener::bind(&directory.path().join("control.sock")).unwrap();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        Files { listener: listener.into(), kvm: kvm.into(), will: file("will"), log: file("log"), directory }
    }

    /// Gives the machine its console.
    fn console(&self, machine: &mut Machine) {
        let path = self.directory.path().join("console.ring");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        Ring::create(file.try_clone().unwrap(), CONSOLE_RING_BYTES).unwrap();
        machine.spec.console = Console { ring: machine.add(file) };
    }

    /// Boots the machine and waits as [`Files::until`] does.
    fn boot(&self, machine: &Machine, text: &str, patience: Duration) -> Instant {
        self.until(control::Command::Boot(Box::new(machine.spec.clone())), machine, text, patience)
    }

    /// Gives the command that makes the machine and waits until its console holds `text`, which any output does when it is
    /// empty; answers when that was.
    fn until(&self, command: control::Command, machine: &Machine, text: &str, patience: Duration) -> Instant {
        let channel = Channel::new(Socket::connect(&self.directory.path().join("control.sock")).unwrap());
        let descriptors: Vec<_> = machine.files.iter().map(File::as_fd).collect();
        channel.send(&control::Request { id: 1, command }, &descriptors).unwrap();
        // Asked for at once, so that the VMM finds it as soon as the machine runs.
        let watch = |id, seen| {
            let command = control::Command::WatchConsole { seen };
            channel.send(&control::Request { id, command }, &[]).unwrap();
        };
        watch(2, 0);
        let mut watches = 2;
        let deadline = Instant::now() + patience;
        loop {
            assert!(readable(channel.as_fd(), deadline), "{text:?} did not come; log: {}", self.log());
            match channel.receive().ok().flatten().map(|(message, _)| message) {
                Some(control::Message::Notice(control::Notice::Console { written })) => {
                    let now = Instant::now();
                    if text.is_empty() || self.told().contains(text) {
                        return now;
                    }
                    watches += 1;
                    watch(watches, written);
                }
                Some(control::Message::Reply { result: Err(fault), .. }) => panic!("{fault}"),
                Some(_) => (),
                None => panic!("the VMM has gone; log: {}", self.log()),
            }
        }
    }

    /// What is on the console.
    fn told(&self) -> String {
        let mut ring = Ring::open(File::open(self.directory.path().join("console.ring")).unwrap()).unwrap();
        let piece = ring.read(0, CONSOLE_RING_BYTES as usize).unwrap();
        String::from_utf8_lossy(&piece.data).into_owned()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

/// A VMM that is killed when dropped.
pub(crate) struct Running {
    pidfd: PidFd,
    files: Files,
    /// Gone after the process.
    _groups: Vec<Group>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.pidfd.signal(Signal::SIGKILL);
        readable(self.pidfd.as_fd(), Instant::now() + PATIENCE);
        // A child of the launcher is reaped there.
        let _ = self.pidfd.reap();
    }
}

/// Spawns a VMM in its jail and boots `machine`. Answers it, and milliseconds from its exec to the first output.
pub(crate) fn start_vmm(machine: Machine) -> (Running, f64) {
    start_vmm_until(machine, "", PATIENCE)
}

/// As [`start_vmm`], but until the console holds `text`; panics when it does not within `patience`.
pub(crate) fn start_vmm_until(mut machine: Machine, text: &str, patience: Duration) -> (Running, f64) {
    let files = Files::new();
    files.console(&mut machine);
    let command = control::Command::Boot(Box::new(machine.spec.clone()));
    in_jail(files, command, &machine, text, patience)
}

/// The memory files below one that was saved, and what lies in which.
pub(crate) struct Below {
    pub(crate) lower: Lower,
    pub(crate) files: Vec<File>,
}

/// As [`start_vmm`], but for a machine that goes on from where it was saved, as one that is another from then on.
pub(crate) fn restore_vmm(mut machine: Machine, saved: &Saved, below: Option<&Below>) -> (Running, f64) {
    let files = Files::new();
    files.console(&mut machine);
    let lower = below.map(|Below { lower, files }| {
        let (list, bytes) = (tempfile::tempfile().unwrap(), lower.join());
        list.write_all_at(&bytes, 0).unwrap();
        LowerFiles {
            runs: machine.add(list),
            digest: Digest(Sha256::digest(&bytes).into()),
            files: files.iter().map(|file| machine.add(file.try_clone().unwrap())).collect(),
        }
    });
    let spec = RestoreSpec {
        lower,
        state: machine.add(saved.state.try_clone().unwrap()),
        root: saved.report.root,
        memory: machine.add(saved.memory.try_clone().unwrap()),
        machine: machine.spec.clone(),
        how: MemoryUse::Private,
        clock: Clock::Advance,
        counters: Counters::Fresh,
        identity: Identity::New,
        then: Then::Run,
    };
    in_jail(files, control::Command::Restore(Box::new(spec)), &machine, "", PATIENCE)
}

fn in_jail(
    files: Files,
    command: control::Command,
    machine: &Machine,
    text: &str,
    patience: Duration,
) -> (Running, f64) {
    let null = File::open("/dev/null").unwrap();
    let executable = File::open(program()).unwrap();
    let program = Program {
        executable: executable.as_fd(),
        name: "toft-vmm".as_ref(),
        arguments: &["machine".as_ref(), "--label".as_ref(), "bench".as_ref()],
        descriptors: &[
            (null.as_fd(), fd::STDIN),
            (files.log.as_fd(), 1),
            (files.log.as_fd(), 2),
            (files.listener.as_fd(), fd::CONTROL),
            (files.kvm.as_fd(), fd::KVM),
            (files.will.as_fd(), fd::WILL),
        ],
    };
    let user = User::Own { uid: ID, gid: ID };
    let jail =
        Jail { user, cgroups: &[], rlimits: RLIMITS, empty: None, refused: Refused::Fails, left_out: &[] };
    let started =
        sys::jail::spawn(&program, &jail).unwrap_or_else(|error| panic!("{error}: {}", error.cause));
    let running = Running { pidfd: started.pidfd, files, _groups: Vec::new() };
    let first = running.files.until(command, machine, text, patience);
    (running, first.duration_since(started.executed_at).as_secs_f64() * 1e3)
}

/// A launcher, ended when dropped.
pub(crate) struct Launcher {
    channel: Option<Channel>,
    pidfd: PidFd,
}

impl Launcher {
    pub(crate) fn start() -> Launcher {
        let (ours, theirs) = Socket::pair().unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let started = sys::spawn::spawn(&sys::spawn::Program {
            executable: Path::new(&program()),
            name: "toft-vmm".as_ref(),
            arguments: &["launcher".as_ref()],
            descriptors: &[
                (null.as_fd(), 0),
                (null.as_fd(), 1),
                (null.as_fd(), 2),
                (theirs.as_fd(), fd::CONTROL),
            ],
        });
        Launcher { channel: Some(Channel::new(ours)), pidfd: started.unwrap().1 }
    }

    /// Has a VMM started in control groups, as a daemon does, and boots `machine`. Answers it, and milliseconds from the request to the
    /// first output.
    pub(crate) fn start_vmm(&self, mut machine: Machine) -> (Running, f64) {
        let files = Files::new();
        files.console(&mut machine);
        let groups = Group::of_a_vmm();
        let joins: Vec<File> = groups.iter().map(Group::joining).collect();
        let channel = self.channel.as_ref().expect("it was not left");
        let begun = Instant::now();
        let user = JailUser::Own { uid: ID, gid: ID };
        let rlimits =
            Rlimits { nofile: RLIMITS.nofile, fsize_bytes: RLIMITS.fsize_bytes, nproc: RLIMITS.nproc };
        let jail = launch::Jail { user, cgroups: joins.len() as u8, rlimits, required: true };
        let command = launch::Command::Spawn { label: "bench".to_owned(), jail };
        let own = [&files.listener, &files.kvm, &files.will, &files.log].map(AsFd::as_fd);
        let descriptors: Vec<_> = own.into_iter().chain(joins.iter().map(AsFd::as_fd)).collect();
        channel.send(&launch::Request { id: 1, command }, &descriptors).unwrap();
        let pidfd = loop {
            match channel.receive().unwrap().expect("the launcher lives") {
                (launch::Message::Reply { result: Ok(launch::Reply::Spawned { .. }), .. }, mut with) => {
                    break PidFd::from(with.pop().expect("the pidfd comes along"));
                }
                (launch::Message::Exited { .. }, _) => (),
                (other, _) => panic!("{other:?}"),
            }
        };
        let running = Running { pidfd, files, _groups: groups };
        let first = running.files.boot(&machine, "", PATIENCE);
        (running, first.duration_since(begun).as_secs_f64() * 1e3)
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
