//! How children of the launcher are started: the same program in another mode, in a session of its own, with
//! nothing but the descriptors it is to have. Jails will be built here.
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use sys::pidfd::PidFd;
use sys::spawn::{Program, Session, spawn};
use wire::launch::fd;

/// The running program, even when the file it was started from has been replaced by a newer one.
const SELF: &str = "/proc/self/exe";
const STDOUT: i32 = 1;
const STDERR: i32 = 2;

/// Starts a VMM with its control listener, KVM, will and log.
pub(super) fn start_vmm(label: &str, descriptors: &[OwnedFd; 4]) -> io::Result<(i32, PidFd)> {
    let null = File::open("/dev/null")?;
    let [control, kvm, will, log] = descriptors;
    spawn(&Program {
        executable: Path::new(SELF),
        name: OsStr::new("toft-vmm"),
        arguments: &["machine", "--label", label].map(OsStr::new),
        descriptors: &[
            (null.as_fd(), fd::STDIN),
            (log.as_fd(), STDOUT),
            (log.as_fd(), STDERR),
            (control.as_fd(), fd::CONTROL),
            (kvm.as_fd(), fd::KVM),
            (will.as_fd(), fd::WILL),
        ],
        session: Session::Own,
    })
}

/// Starts a probe; its report, or what it complains about, comes through the file.
pub(super) fn start_probe(kvm: &OwnedFd) -> io::Result<(i32, PidFd, File)> {
    let null = File::open("/dev/null")?;
    let (output, input) = io::pipe()?;
    let (pid, pidfd) = spawn(&Program {
        executable: Path::new(SELF),
        name: OsStr::new("toft-vmm"),
        arguments: &["probe".as_ref()],
        descriptors: &[
            (null.as_fd(), fd::STDIN),
            (input.as_fd(), STDOUT),
            (input.as_fd(), STDERR),
            (kvm.as_fd(), fd::KVM),
        ],
        session: Session::Own,
    })?;
    Ok((pid, pidfd, File::from(OwnedFd::from(output))))
}
