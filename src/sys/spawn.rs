//! Starts a program with exactly the descriptors it is to have, each under the number it expects. Nothing
//! else of ours crosses exec.
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::pidfd::PidFd;

/// What to start.
#[derive(Debug)]
pub struct Program<'a> {
    /// The file to execute.
    pub executable: &'a Path,
    /// Its first argument: the name `ps` shows.
    pub name: &'a OsStr,
    /// The arguments that follow.
    pub arguments: &'a [&'a OsStr],
    /// Descriptors and the numbers they get, 0 to [`NUMBER_MAX`], each number once. Numbers that are not listed
    /// are closed.
    pub descriptors: &'a [(BorrowedFd<'a>, RawFd)],
}

/// Largest number a descriptor can be given.
pub const NUMBER_MAX: RawFd = 31;

/// Starts the program in a session of its own, so that it outlives the terminal and the caller's process group, and with an empty
/// environment but for `RUST_BACKTRACE`. Returns its process id and a descriptor for it; the caller reaps it.
pub fn spawn(program: &Program<'_>) -> io::Result<(i32, PidFd)> {
    let wanted = numbered(program.descriptors)?;
    // Allocated before fork: between fork and exec only async-signal-safe calls are allowed.
    let mut moved = vec![-1; wanted.len()];
    let mut command = Command::new(program.executable);
    command.arg0(program.name).args(program.arguments).env_clear();
    if let Some(backtrace) = std::env::var_os("RUST_BACKTRACE") {
        command.env("RUST_BACKTRACE", backtrace);
    }
    let _occupied = occupy(&wanted)?;
    let arrange = move || arrange(&wanted, &mut moved);
    // SAFETY: `arrange` makes system calls only; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(arrange) };
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    // The child is not reaped before this, so the number is still its own.
    Ok((pid, PidFd::open(pid)?))
}

/// The descriptors with the numbers they get; fails when a number is out of range or used twice.
pub(crate) fn numbered(descriptors: &[(BorrowedFd<'_>, RawFd)]) -> io::Result<Vec<(RawFd, RawFd)>> {
    let mut wanted: Vec<(RawFd, RawFd)> = Vec::new();
    for (descriptor, number) in descriptors {
        if !(0..=NUMBER_MAX).contains(number) || wanted.iter().any(|(_, taken)| taken == number) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "descriptor number out of range or used twice",
            ));
        }
        wanted.push((descriptor.as_raw_fd(), *number));
    }
    Ok(wanted)
}

/// Takes every free number that is wanted, until dropped, so that the pipe through which std reports a failed
/// exec is not among them and survives the placement.
fn occupy(wanted: &[(RawFd, RawFd)]) -> io::Result<Vec<OwnedFd>> {
    let highest = wanted.iter().map(|(_, number)| *number).max().unwrap_or(-1);
    let null = std::fs::File::open("/dev/null")?;
    let mut occupied = Vec::new();
    loop {
        let copy = null.try_clone()?;
        if copy.as_raw_fd() > highest {
            return Ok(occupied);
        }
        occupied.push(copy.into());
    }
}

/// Runs in the child: the descriptors in their places, everything else closed on exec.
fn arrange(wanted: &[(RawFd, RawFd)], moved: &mut [RawFd]) -> io::Result<()> {
    // SAFETY: setsid takes nothing; the child of a fork is never a group leader.
    check(unsafe { libc::setsid() })?;
    // Not closed but marked: std reports a failed exec through a descriptor of its own.
    close_all_on_exec()?;
    place(wanted, moved)
}

/// Runs in a child. Gives every wanted descriptor its number, open across exec, and marks no other. Each is first
/// moved above all wanted numbers, so that no placement overwrites a source that is still needed.
pub(crate) fn place(wanted: &[(RawFd, RawFd)], moved: &mut [RawFd]) -> io::Result<()> {
    for ((source, _), moved) in wanted.iter().zip(moved.iter_mut()) {
        // SAFETY: `source` is open: the caller borrows it until spawn returns.
        *moved = check(unsafe { libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, NUMBER_MAX + 1) })?;
    }
    for ((_, number), moved) in wanted.iter().zip(moved.iter()) {
        // SAFETY: both are plain numbers; dup2 clears close-on-exec on the copy.
        check(unsafe { libc::dup2(*moved, *number) })?;
    }
    Ok(())
}

/// Marks every open descriptor, to be closed on exec.
pub(crate) fn close_all_on_exec() -> io::Result<()> {
    const CLOEXEC: libc::c_int = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: close_range(2) takes three integers; with this flag it only marks descriptors.
    match check(unsafe { libc::close_range(0, libc::c_uint::MAX, CLOEXEC) }) {
        Ok(_) => Ok(()),
        // Kernels before 5.11 do not know it, and filters of containers do not let it through.
        Err(_) => mark_each(),
    }
}

/// The same, one after the other as `/proc` lists them. Runs in a child, so it allocates nothing.
fn mark_each() -> io::Result<()> {
    const HEADER_BYTES: usize = std::mem::offset_of!(libc::dirent64, d_name);
    /// Aligned as the entries in it.
    #[repr(C, align(8))]
    struct Entries([u8; 4096]);
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: a string that ends with NUL.
    let directory = check(unsafe { libc::open(c"/proc/self/fd".as_ptr(), flags) })?;
    let mut entries = Entries([0; 4096]);
    let listed = loop {
        // SAFETY: the kernel writes at most as many bytes as it is told, which are there.
        let read = unsafe {
            libc::syscall(libc::SYS_getdents64, directory, entries.0.as_mut_ptr(), entries.0.len())
        };
        let Ok(length) = usize::try_from(read) else { break Err(io::Error::last_os_error()) };
        if length == 0 {
            break Ok(());
        }
        let mut rest = entries.0.get(..length).unwrap_or_default();
        while let Some((header, _)) = rest.split_at_checked(HEADER_BYTES) {
            // `d_reclen`, the entry's own length (getdents(2)), stands before its type and its name.
            let [.., low, high, _type] = header else { break };
            let Some((entry, others)) = rest.split_at_checked(usize::from(u16::from_ne_bytes([*low, *high])))
            else {
                break;
            };
            if entry.is_empty() {
                break;
            }
            rest = others;
            let Some(descriptor) = number(entry.get(HEADER_BYTES..).unwrap_or_default()) else { continue };
            // SAFETY: integers; the descriptor was open a moment ago and nobody else closes any here.
            let marked = unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
            check(marked)?;
        }
    };
    // SAFETY: opened above and used nowhere else.
    unsafe { libc::close(directory) };
    listed
}

/// The number that a name ended by NUL is; nothing for `.` and `..`.
fn number(name: &[u8]) -> Option<RawFd> {
    let end = name.iter().position(|byte| *byte == 0)?;
    std::str::from_utf8(name.get(..end)?).ok()?.parse().ok()
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests;
