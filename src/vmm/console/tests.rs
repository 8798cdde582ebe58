use std::fs::File;

use super::*;

fn console() -> (Arc<Console>, Arc<Bell>, File) {
    let bell = Arc::new(Bell::new().unwrap());
    let file = tempfile::tempfile().unwrap();
    let ring = Ring::create(file.try_clone().unwrap(), 4096).unwrap();
    (Console::new(ring, Arc::clone(&bell)), bell, file)
}

#[test]
fn a_watch_fires_once_when_more_was_written() {
    let (console, bell, _file) = console();
    let mut sink = console.sink();
    sink.write_all(b"hello").unwrap();
    assert!(!bell.take().console, "nobody watches");
    console.watch([5, 9].into_iter());
    assert!(!bell.take().console, "nothing is new");
    sink.write_all(b"!").unwrap();
    assert!(bell.take().console);
    sink.write_all(b"!").unwrap();
    assert!(!bell.take().console, "it has fired");
}

#[test]
fn a_watch_on_what_was_written_before_fires_at_once() {
    let (console, bell, _file) = console();
    console.sink().write_all(b"hello").unwrap();
    console.watch([3].into_iter());
    assert!(bell.take().console);
}

#[test]
fn output_that_cannot_be_kept_does_not_stop_the_guest() {
    let bell = Arc::new(Bell::new().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ring");
    Ring::create(File::options().read(true).write(true).create_new(true).open(&path).unwrap(), 4096).unwrap();
    let console = Console::new(Ring::open(File::open(&path).unwrap()).unwrap(), bell);
    assert_eq!(console.sink().write(b"lost").unwrap(), 4);
    assert_eq!(console.written(), 0);
}

#[test]
fn what_was_written_before_a_reopen_counts() {
    let (console, _bell, file) = console();
    console.sink().write_all(b"before").unwrap();
    let again = Console::new(Ring::open(file).unwrap(), Arc::new(Bell::new().unwrap()));
    again.sink().write_all(b" after").unwrap();
    assert_eq!(again.written(), 12);
}
