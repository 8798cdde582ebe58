//! Each filter in a process of its own: what it allows works, and what it does not ends the process.
use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;

use super::*;

const FILTER: &str = "TOFT_TEST_FILTER";
const DEED: &str = "TOFT_TEST_DEED";
/// Bad system call (signal(7)).
const SIGSYS: i32 = 31;

/// What somebody who has taken over a thread would like to do, and three things it is to do.
const DEEDS: [(&str, fn()); 14] = [
    ("nothing", || ()),
    ("allocate", || drop(std::hint::black_box(vec![1_u8; 8 << 20]))),
    ("start a thread", || std::thread::spawn(|| ()).join().unwrap()),
    ("make a ring", || drop(memory::ring::Ring::new(null(), 8))),
    ("open a file", || drop(File::open("/etc/passwd"))),
    ("list a directory", || drop(std::fs::read_dir("/proc"))),
    ("remove a file", || drop(std::fs::remove_file("/nonexistent"))),
    ("connect", || drop(UnixStream::connect("/nonexistent"))),
    ("listen", || drop(TcpListener::bind("127.0.0.1:0"))),
    ("execute", || drop(Command::new("/bin/true").status())),
    ("hold another process", || drop(sys::pidfd::PidFd::open(1))),
    ("change directory", || drop(std::env::set_current_dir("/"))),
    ("make a file in memory", || drop(sys::memfd::create("test", 4096))),
    ("make a pipe", || drop(std::io::pipe())),
];

static NULL: OnceLock<Arc<File>> = OnceLock::new();

/// Opened before any filter is on.
fn null() -> Arc<File> {
    Arc::clone(NULL.get_or_init(|| Arc::new(File::open("/dev/null").unwrap())))
}

/// The process that is sacrificed.
#[test]
#[ignore = "the tests beside it run it, each time in a process of its own"]
fn inside() {
    let wanted = |name: &str| std::env::var(name).unwrap();
    let filter = Filter::ALL.into_iter().find(|filter| format!("{filter:?}") == wanted(FILTER)).unwrap();
    let (_, deed) = DEEDS.into_iter().find(|(name, _)| *name == wanted(DEED)).unwrap();
    drop(null());
    if filter != Filter::NoRings {
        Filter::NoClone3.load().unwrap();
    }
    filter.load().unwrap();
    deed();
    std::io::stderr().write_all(b"survived\n").unwrap();
    // The test harness has wishes of its own.
    std::process::exit(0);
}

/// Whether a deed is survived below a filter.
fn survives(filter: Filter, deed: &str) -> bool {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "sandbox::tests::inside", "--nocapture", "--test-threads=1"])
        .env(FILTER, format!("{filter:?}"))
        .env(DEED, deed)
        .output()
        .unwrap();
    let survived = output.stderr.ends_with(b"survived\n");
    let killed = output.status.signal() == Some(SIGSYS);
    assert!(survived != killed, "{filter:?}, {deed}: {output:?}");
    survived
}

#[test]
fn every_filter_is_short() {
    for filter in Filter::ALL {
        let instructions = filter.instructions().unwrap();
        println!("{filter:?}: {instructions} instructions");
        assert!((4..400).contains(&instructions), "{filter:?}: {instructions}");
    }
}

#[test]
fn a_device_of_an_unknown_kind_gets_the_smallest_filter() {
    assert_eq!(Filter::of_device("block"), Filter::Block);
    assert_eq!(Filter::of_device("something new"), Filter::Rng);
}

#[test]
fn nothing_but_what_a_filter_allows_is_survived() {
    for filter in [Filter::Control, Filter::Vcpu, Filter::Block, Filter::Net, Filter::Rng, Filter::Balloon] {
        let survived: Vec<&str> =
            DEEDS.iter().map(|(deed, _)| *deed).filter(|deed| survives(filter, deed)).collect();
        let expected: &[&str] = match filter {
            Filter::Control => {
                &["nothing", "allocate", "start a thread", "make a ring", "make a file in memory"]
            }
            Filter::Vcpu => &["nothing", "allocate", "start a thread", "make a ring"],
            _ => &["nothing", "allocate"],
        };
        assert_eq!(survived, expected, "{filter:?}");
    }
}

#[test]
fn without_rings_the_kernel_seems_to_have_none() {
    Filter::NoRings.load().unwrap();
    let ring = memory::ring::Ring::new(null(), 8).unwrap();
    assert_eq!(ring.engine(), memory::ring::Engine::Plain);
    assert_eq!(ring.fallback_cause().unwrap().raw_os_error(), Some(libc::ENOSYS));
}
