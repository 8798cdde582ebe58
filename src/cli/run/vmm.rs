//! The VMM of `toft run`: a launcher is started for it, as the daemon does, so that its jail is built by the same
//! code. What the jail is without is told on standard error.
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::poll::{PollFd, PollFlags, poll};
use sys::pidfd::PidFd;
use sys::seqpacket::{Listener, Socket};
use sys::spawn::Program;
use tokio::io::unix::AsyncFd;
use wire::channel::Channel;
use wire::control::{self, Message};
use wire::isolation::{Item, Missing};
use wire::launch::{self, Jail, JailUser, Reply, Rlimits};

use super::{Scratch, failed};
use crate::error::Error;
use crate::limits;

/// A VMM process of ours and the connection to it. Killed when dropped, so that it never outlives its terminal.
pub(super) struct Vmm {
    process: PidFd,
    pub(super) channel: AsyncFd<Channel>,
    /// Reaps it.
    _launcher: Launcher,
}

impl Vmm {
    pub(super) fn start(executable: &Path, kvm: &File, will: &File, scratch: &Scratch) -> Result<Vmm, Error> {
        let path = scratch.0.join("control");
        let listener = Listener::bind(&path).map_err(failed("cannot make the control socket"))?;
        let stderr = io::stderr();
        let descriptors = [listener.as_fd(), kvm.as_fd(), will.as_fd(), stderr.as_fd()];
        let launcher = Launcher::start(executable)?;
        let (process, mut missing) = launcher.spawn(jail(), &descriptors)?;
        let socket = Socket::connect(&path).map_err(failed("cannot reach the VMM"))?;
        socket.set_nonblocking().map_err(failed("cannot reach the VMM"))?;
        let channel = Channel::new(socket);
        missing.extend(ask_for_sandbox(&channel)?);
        tell(&missing);
        #[allow(
            deprecated,
            reason = "its successor is unsafe because a descriptor may change behind its number; a channel owns its own"
        )]
        let channel = AsyncFd::new(channel).map_err(failed("cannot reach the VMM"))?;
        Ok(Vmm { process, channel, _launcher: launcher })
    }

    pub(super) async fn receive(&self) -> Result<Option<Message>, Error> {
        loop {
            let mut ready = self.channel.readable().await.map_err(failed("cannot wait for the VMM"))?;
            match self.channel.get_ref().receive() {
                Ok(message) => return Ok(message.map(|(message, _)| message)),
                Err(error) if error.is_would_block() => ready.clear_ready(),
                // A VMM that was killed resets the connection instead of closing it.
                Err(wire::channel::Error::Socket(cause))
                    if cause.kind() == io::ErrorKind::ConnectionReset =>
                {
                    return Ok(None);
                }
                Err(cause) => {
                    return Err(Error::Machine {
                        doing: "the VMM is unreadable".into(),
                        cause: cause.into(),
                    });
                }
            }
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended by itself; there is nothing else to do about an error here.
        let _ = self.process.signal(nix::sys::signal::Signal::SIGKILL);
    }
}

/// The launcher process and our end of its socket. It ends when that closes.
struct Launcher {
    channel: Channel,
    process: PidFd,
}

impl Launcher {
    fn start(executable: &Path) -> Result<Launcher, Error> {
        let (ours, theirs) = Socket::pair().map_err(failed("cannot make the launcher's socket"))?;
        let null = File::open("/dev/null").map_err(failed("cannot open /dev/null"))?;
        let stderr = io::stderr();
        let program = Program {
            executable,
            name: OsStr::new("toft-vmm"),
            arguments: &[OsStr::new("launcher")],
            descriptors: &[
                (null.as_fd(), launch::fd::STDIN),
                (stderr.as_fd(), 1),
                (stderr.as_fd(), 2),
                (theirs.as_fd(), launch::fd::CONTROL),
            ],
            // Ctrl-C is for this process, which then presses the power button.
        };
        let (_, process) = sys::spawn::spawn(&program).map_err(|cause| Error::Machine {
            doing: format!("cannot run {} (--vmm says which)", executable.display()),
            cause: cause.into(),
        })?;
        Ok(Launcher { channel: Channel::new(ours), process })
    }

    fn spawn(&self, jail: Jail, descriptors: &[BorrowedFd<'_>]) -> Result<(PidFd, Vec<Missing>), Error> {
        let command = launch::Command::Spawn { label: "toft run".to_owned(), jail };
        let request = launch::Request { id: 1, command };
        self.channel.send(&request, descriptors).map_err(failed("cannot speak to the launcher"))?;
        let mut polled = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, limits::LAUNCH_MS).map_err(failed("cannot wait for the launcher"))? == 0 {
            return Err(failed("cannot start the VMM")("the launcher does not answer"));
        }
        let answer = self.channel.receive().map_err(failed("the launcher is unreadable"))?;
        match answer {
            Some((launch::Message::Reply { id: 1, result }, descriptors)) => {
                match (result, <[OwnedFd; 1]>::try_from(descriptors)) {
                    (Ok(Reply::Spawned { missing, .. }), Ok([pidfd])) => Ok((PidFd::from(pidfd), missing)),
                    (Err(why), _) => Err(failed("the launcher refused")(why)),
                    _ => {
                        Err(failed("cannot start the VMM")("the launcher's answer is not what was expected"))
                    }
                }
            }
            Some(_) => Err(failed("cannot start the VMM")("the launcher's answer is not what was expected")),
            None => Err(failed("cannot start the VMM")("the launcher has ended")),
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // It has nothing left to do: the machine is over. It may have ended by itself.
        let _ = self.process.signal(nix::sys::signal::Signal::SIGKILL);
        let _ = self.process.reap();
    }
}

/// First user id that `toft run` takes for its VMMs, one for each process id: above those that distributions and
/// systemd hand to people, services and containers.
const UID_FIRST: u32 = 0x7000_0000;

/// As much of the daemon's jail as one machine in the foreground can have.
fn jail() -> Jail {
    let id = UID_FIRST + std::process::id();
    let (user, nproc) = match nix::unistd::geteuid().is_root() {
        true => (JailUser::Own { uid: id, gid: id }, limits::VMM_NPROC),
        // The caller's other processes count, too, so any number could be too low.
        false => (JailUser::Caller, u64::MAX),
    };
    let rlimits = Rlimits { nofile: limits::VMM_NOFILE, fsize_bytes: u64::MAX, nproc };
    Jail { user, cgroups: 0, rlimits, required: false }
}

/// What the VMM could not close by itself. One that has ended meanwhile is told of by whoever hears it next.
fn ask_for_sandbox(channel: &Channel) -> Result<Vec<Missing>, Error> {
    let hello = control::Request { id: 0, command: control::Command::Hello { protocol: control::PROTOCOL } };
    channel.send(&hello, &[]).map_err(failed("cannot speak to the VMM"))?;
    let mut polled = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
    if poll(&mut polled, limits::LAUNCH_MS).map_err(failed("cannot wait for the VMM"))? == 0 {
        return Err(failed("cannot start the VMM")("it does not answer"));
    }
    let Ok(Some((Message::Reply { result: Ok(control::Reply::Hello { sandbox, .. }), .. }, _))) =
        channel.receive()
    else {
        return Ok(Vec::new());
    };
    let walls = [
        (sandbox.seccomp, Item::Seccomp, "the kernel filters no system calls"),
        (sandbox.landlock_abi > 0, Item::Landlock, "the kernel has none, or it is switched off"),
        (sandbox.rings_restricted, Item::IoUring, "the kernel cannot restrict rings"),
    ];
    let open = walls.into_iter().filter(|(held, ..)| !held);
    Ok(open.map(|(_, item, why)| Missing { item, why: why.to_owned() }).collect())
}

/// One line for each reason.
fn tell(missing: &[Missing]) {
    let mut reasons: Vec<(&str, Vec<Item>)> = Vec::new();
    for Missing { item, why } in missing {
        match reasons.iter_mut().find(|(reason, _)| reason == why) {
            Some((_, items)) => items.push(*item),
            None => reasons.push((why, vec![*item])),
        }
    }
    let cgroups = vec![Item::CgroupCpu, Item::CgroupMemory, Item::CgroupPids];
    reasons.push(("toft run makes no cgroups", cgroups));
    for (why, items) in reasons {
        let names: Vec<&str> = items.into_iter().map(Item::name).collect();
        eprintln!("toft: the jail is without {}: {why}", names.join(", "));
    }
}
