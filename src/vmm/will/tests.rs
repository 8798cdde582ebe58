use std::fs::File;
use std::process::Command;

use super::*;

const WILL: &str = "TOFT_TEST_WILL";

#[test]
fn the_first_reason_stands() {
    let file = tempfile::tempfile().unwrap();
    let will = LastWill { file: Arc::new(file.try_clone().unwrap()) };
    will.write(Reason::TripleFault);
    will.write(Reason::PoweredOff);
    assert_eq!(Will::read(&file).unwrap().unwrap().reason, Reason::TripleFault);
}

/// Does nothing unless the next test starts it in a process of its own.
#[test]
fn child_that_panics() {
    let Some(path) = std::env::var_os(WILL) else { return };
    LastWill::arm(File::create(path).unwrap());
    std::thread::spawn(|| panic!("a bug of ours")).join().unwrap();
}

#[test]
fn a_panic_of_any_thread_writes_its_place_and_aborts() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("will.json");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "will::tests::child_that_panics"])
        .env(WILL, &path)
        .output()
        .unwrap();
    assert!(!child.status.success());
    let reason = Will::read(&File::open(path).unwrap()).unwrap().unwrap().reason;
    let Reason::Crashed(text) = reason else { panic!("{reason:?}") };
    assert!(text.contains("will/tests.rs:") && text.ends_with(": a bug of ours"), "{text}");
}
