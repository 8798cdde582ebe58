//! Programs see the descriptors they were given and no others.
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use super::*;
use crate::pidfd::Ended;

/// Runs a line of shell with `descriptors` and returns what it wrote to the pipe at number 9, and how it ended.
fn shell(line: &str, descriptors: &[(BorrowedFd<'_>, RawFd)]) -> (String, Ended) {
    let (mut output, input) = std::io::pipe().unwrap();
    let mut all = descriptors.to_vec();
    all.push((input.as_fd(), 9));
    let (_, process) = spawn(&Program {
        executable: Path::new("/bin/sh"),
        name: OsStr::new("sh"),
        arguments: &[OsStr::new("-c"), OsStr::new(line)],
        descriptors: &all,
    })
    .unwrap();
    drop(input);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    (text, ended(&process))
}

fn ended(process: &PidFd) -> Ended {
    use nix::poll::{PollFd, PollFlags, poll};
    let timed_out = poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], 10_000u16).unwrap() == 0;
    assert!(!timed_out, "the program did not end");
    assert!(process.has_ended().unwrap());
    process.reap().unwrap().unwrap()
}

fn file(text: &str) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.into()
}

#[test]
fn a_program_gets_its_descriptors_and_no_others() {
    let _not_passed = File::open("/dev/null").unwrap();
    let (kernel, kvm) = (file("kernel"), file("kvm"));
    let line = "cat <&3 >&9; cat <&4 >&9; cd /proc/self/fd; for fd in *; do [ -e $fd ] && echo -n \" $fd\"; done >&9";
    let (text, end) = shell(line, &[(kernel.as_fd(), 3), (kvm.as_fd(), 4)]);
    assert_eq!(end, Ended::Code(0));
    let (contents, open) = text.split_once(' ').unwrap();
    assert_eq!(contents, "kernelkvm");
    // The shell itself opens the directory and keeps copies above 9 while it redirects.
    let ours: Vec<&str> = open.split(' ').filter(|fd| fd.parse::<i32>().unwrap() < 9).collect();
    assert!(ours.iter().all(|fd| ["1", "3", "4"].contains(fd)), "{open}");
}

#[test]
fn numbers_may_be_swapped() {
    let (one, other) = (file("one"), file("other"));
    // Whatever numbers the two have, ask for them the other way round, where they are low enough.
    let (first, second) = (one.as_raw_fd().min(NUMBER_MAX), other.as_raw_fd().min(NUMBER_MAX - 1));
    // Not by `<&`, for which the shell knows numbers of one digit only.
    let line = format!("cat /proc/self/fd/{first} /proc/self/fd/{second} >&9");
    if first != 9 && second != 9 && first != second && first > 2 && second > 2 {
        let (text, _) = shell(&line, &[(other.as_fd(), first), (one.as_fd(), second)]);
        assert_eq!(text, "otherone");
    }
}

#[test]
fn a_signal_is_told_from_a_code() {
    assert_eq!(shell("exit 7", &[]).1, Ended::Code(7));
    assert_eq!(shell("kill -9 $$", &[]).1, Ended::Signal(9));
}

#[test]
fn a_file_that_cannot_be_executed_is_an_error() {
    let program = Program {
        executable: Path::new("/nonexistent"),
        name: OsStr::new("x"),
        arguments: &[],
        descriptors: &[],
    };
    assert_eq!(spawn(&program).unwrap_err().kind(), io::ErrorKind::NotFound);
}
