use std::error::Error as _;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, poll};

use super::*;
use crate::pidfd::Ended;

/// Bounds that no test comes near.
const RLIMITS: Rlimits = Rlimits { nofile: 64, fsize_bytes: 1 << 20, nproc: 10_000 };

fn caller(left_out: &[Step]) -> Jail<'_> {
    Jail {
        user: User::Caller,
        cgroups: &[],
        rlimits: RLIMITS,
        empty: None,
        refused: Refused::LeftOut,
        left_out,
    }
}

/// This test program, which is static, lists its tests to the writer.
fn list_tests(jail: &Jail<'_>, output: &OwnedFd) -> Result<Started, Error> {
    let executable = File::open("/proc/self/exe").unwrap();
    let program = Program {
        executable: executable.as_fd(),
        name: OsStr::new("inside"),
        arguments: &[OsStr::new("--list")],
        // Rust's start-up opens /dev/null in place of a missing one of these, which ends it where there is none.
        descriptors: &[(output.as_fd(), 0), (output.as_fd(), 1), (output.as_fd(), 2)],
    };
    spawn(&program, jail)
}

fn end(started: &Started) -> Ended {
    let mut polled = [PollFd::new(started.pidfd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut polled, 60_000_u16).unwrap(), 1, "the program does not end");
    started.pidfd.reap().unwrap().expect("it has ended")
}

/// Opens the namespaces that it is in, the host's, and gets no further.
extern "C" fn ends_midway(seed: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `made_by` passes a seed that it does not touch until this child is gone.
    let seed = unsafe { &mut *seed.cast::<Seed>() };
    for (path, namespace) in [(c"/proc/self/ns/mnt", &mut seed.mount), (c"/proc/self/ns/net", &mut seed.net)]
    {
        // SAFETY: a string that ends with NUL.
        *namespace = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    }
    1
}

#[test]
fn namespaces_whose_making_ended_midway_are_none() {
    assert!(EmptyNamespaces::made_by(ends_midway).is_err());
}

#[test]
fn a_program_runs_with_what_it_was_given() {
    let (mut output, input) = io::pipe().unwrap();
    let input = OwnedFd::from(input);
    let started = list_tests(&caller(&[]), &input).unwrap();
    drop(input);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert!(text.contains("jail::tests::a_program_runs_with_what_it_was_given: test"), "{text}");
    assert_eq!(end(&started), Ended::Code(0));
}

#[test]
fn what_cannot_be_executed_is_an_error_of_the_caller() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("plain");
    std::fs::write(&path, "no program").unwrap();
    let plain = File::open(&path).unwrap();
    let program =
        Program { executable: plain.as_fd(), name: OsStr::new("x"), arguments: &[], descriptors: &[] };
    let error = spawn(&program, &caller(&[])).unwrap_err();
    assert_eq!((error.step, error.cause.kind()), (Step::Execute, io::ErrorKind::PermissionDenied));
    assert!(error.to_string().contains("others may execute"), "{error}");
    assert!(error.source().is_some());
}

#[test]
fn a_refused_step_is_told_or_fails_as_the_caller_wishes() {
    let null = File::options().write(true).open("/dev/full").unwrap();
    let (_, input) = io::pipe().unwrap();
    let input = OwnedFd::from(input);
    let cgroups = [null.as_fd()];
    let started = list_tests(&Jail { cgroups: &cgroups, ..caller(&[]) }, &input).unwrap();
    let refused = started.refused.iter().find(|(step, _)| *step == Step::Cgroups).expect("it is told");
    assert_eq!(refused.1.raw_os_error(), Some(libc::ENOSPC));
    end(&started);
    let strict = Jail { cgroups: &cgroups, refused: Refused::Fails, ..caller(&[]) };
    let error = list_tests(&strict, &input).unwrap_err();
    // Where not even a namespace can be had, that is told first.
    assert!([Step::Cgroups, Step::PidNamespace].contains(&error.step), "{error}");
}

#[test]
fn descriptors_are_numbered_once_and_in_range() {
    let null = File::open("/dev/null").unwrap();
    for descriptors in [vec![(null.as_fd(), 3), (null.as_fd(), 3)], vec![(null.as_fd(), 32)]] {
        let program = Program {
            executable: null.as_fd(),
            name: OsStr::new("x"),
            arguments: &[],
            descriptors: &descriptors,
        };
        let error = spawn(&program, &caller(&[])).unwrap_err();
        assert_eq!((error.step, error.cause.kind()), (Step::Prepare, io::ErrorKind::InvalidInput));
    }
}

/// What a jail costs, and each of its steps. Run by name, alone, on a quiet machine.
#[test]
#[ignore = "a measurement"]
fn cost() {
    const ROUNDS: usize = 60;
    let own = User::Own { uid: 65_534, gid: 65_534 };
    let user = if nix::unistd::geteuid().is_root() { own } else { User::Caller };
    let null = OwnedFd::from(File::options().write(true).open("/dev/null").unwrap());
    let median_us = |left_out: &[Step]| {
        let mut times: Vec<u128> = (0..ROUNDS)
            .map(|_| {
                let begun = Instant::now();
                let started = list_tests(&Jail { user, ..caller(left_out) }, &null).unwrap();
                let took = begun.elapsed().as_micros();
                end(&started);
                took
            })
            .collect();
        times.sort_unstable();
        times[ROUNDS / 2]
    };
    let whole = median_us(&[]);
    println!("whole jail: {whole} us");
    let namespaces = [
        Step::PidNamespace,
        Step::MountNamespace,
        Step::NetNamespace,
        Step::IpcNamespace,
        Step::UtsNamespace,
        Step::Root,
    ];
    for step in [Step::Keyring, Step::Rlimits, Step::Capabilities, Step::Ids].into_iter().chain(namespaces) {
        let without = if step == Step::MountNamespace { vec![step, Step::Root] } else { vec![step] };
        println!("without {without:?}: {} us", median_us(&without));
    }
    println!("without namespaces and root: {} us", median_us(&namespaces));
}

const INSIDE: &str = "TOFT_TEST_NO_CLOSE_RANGE";

/// From here on the kernel does not know the call, for this process and its children.
fn forget_call(number: libc::c_long) {
    let statement = |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, number as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: integers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the program lives through the call, which copies it.
    let loaded = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    assert_eq!(loaded, 0, "{}", io::Error::last_os_error());
}

/// What a kernel does that knows less and less.
#[test]
#[ignore = "the test beside it runs it, in a process of its own"]
fn without_close_range() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    // More than one read of the directory lists.
    let null = File::open("/dev/null").unwrap();
    let open = |_| {
        // SAFETY: integers; the copy is left open across exec on purpose, until this process ends.
        let copy = unsafe { libc::fcntl(null.as_raw_fd(), libc::F_DUPFD, 20) };
        assert!(copy >= 20);
        copy
    };
    let copies: Vec<RawFd> = (0..500).map(open).collect();
    // SAFETY: integers.
    let is_marked = |fd: &RawFd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } == libc::FD_CLOEXEC;
    assert!(!copies.iter().any(is_marked));
    forget_call(libc::SYS_close_range);
    let (_, input) = io::pipe().unwrap();
    let input = OwnedFd::from(input);
    // The child's table is its own, so what it marks is marked there alone.
    let started = list_tests(&caller(&[]), &input).unwrap();
    assert!(started.refused.iter().all(|(step, _)| *step != Step::Descriptors));
    end(&started);
    crate::spawn::close_all_on_exec().unwrap();
    assert!(copies.iter().all(is_marked));
    // Where not even that can be had, nothing is started.
    forget_call(libc::SYS_getdents64);
    let error = list_tests(&caller(&[]), &input).unwrap_err();
    assert_eq!((error.step, error.cause.raw_os_error()), (Step::Descriptors, Some(libc::ENOSYS)));
}

#[test]
fn descriptors_are_closed_by_a_kernel_that_cannot_close_them_at_once() {
    let output = std::process::Command::new("/proc/self/exe")
        .args(["--ignored", "--exact", "jail::tests::without_close_range", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("test result: ok. 1 passed"), "{output:?}");
}
