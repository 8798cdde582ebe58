use std::io::Write;

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs `test` in a network namespace of its own, which ends with its thread.
fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        let missing = match unshare(CloneFlags::CLONE_NEWNET) {
            Err(cause) => Some(format!("a network namespace of its own: {cause}")),
            Ok(()) if !std::path::Path::new("/dev/net/tun").exists() => Some("/dev/net/tun".to_owned()),
            Ok(()) => None,
        };
        match missing {
            None => test(),
            // Past the capture of the test harness, so that it is always seen.
            Some(what) => writeln!(io::stderr(), "skipped: taps: this host does not give {what}").unwrap(),
        }
    };
    std::thread::spawn(run).join().unwrap();
}

#[test]
fn a_tap_is_made_as_a_machine_needs_it() {
    in_own_network(|| {
        let tap = Tap::create("toft-test").unwrap();
        assert_eq!(tap.name(), "toft-test");
        inspect(tap.as_fd()).unwrap();
        let flags = nix::fcntl::fcntl(tap.as_fd(), nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert_ne!(flags & libc::O_NONBLOCK, 0);
        let flags = nix::fcntl::fcntl(tap.as_fd(), nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_ne!(flags & libc::FD_CLOEXEC, 0);
        for offloads in [
            Offloads { checksum: true, tso4: true, tso6: true },
            Offloads { checksum: true, ..Offloads::default() },
            Offloads::default(),
        ] {
            set_offloads(tap.as_fd(), offloads).unwrap();
        }
    });
}

#[test]
fn a_tap_goes_with_its_descriptor() {
    in_own_network(|| {
        let listed = || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("toft-test:");
        let tap = Tap::create("toft-test").unwrap();
        assert!(listed());
        assert_eq!(Tap::create("toft-test").unwrap_err().raw_os_error(), Some(libc::EBUSY));
        drop(tap);
        assert!(!listed());
    });
}

#[test]
fn names_that_no_interface_can_have_are_refused() {
    for name in ["", "sixteen-letters-", "a/b", "tap%d", "a b", "..", "a:1", "t\0p", "täp"] {
        assert_eq!(Tap::create(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name:?}");
    }
}

#[test]
fn what_is_no_tap_is_told_apart() {
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(inspect(file.as_fd()).is_err());
    assert!(set_offloads(file.as_fd(), Offloads::default()).is_err());
    let wrong = Offloads { tso4: true, ..Offloads::default() };
    assert_eq!(set_offloads(file.as_fd(), wrong).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}
