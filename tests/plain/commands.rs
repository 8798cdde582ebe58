//! The command line as a process: what it leaves and says when a signal ends it, and when its daemon goes away. The
//! daemon is one that says what a test tells it to.
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ID: &str = "01900000-0000-7000-8000-000000000000";

/// A daemon that answers each request by its first line.
struct Daemon(tempfile::TempDir);

impl Daemon {
    fn new(answer: impl Fn(&str, &mut UnixStream) + Send + Sync + 'static) -> Daemon {
        let daemon = Daemon(tempfile::tempdir().unwrap());
        let listener = UnixListener::bind(daemon.path("sock")).unwrap();
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, answer) = (stream.unwrap(), answer.clone());
                std::thread::spawn(move || {
                    let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
                    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                    answer(&head[0], &mut stream);
                });
            }
        });
        daemon
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn toft(&self, arguments: &[&str]) -> Child {
        // Signals may be ignored where the tests run.
        let mut command = Command::new("env");
        command.args(["--default-signal", env!("CARGO_BIN_EXE_toft")]);
        command.env("TOFT_ENDPOINT", self.path("sock")).args(arguments).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}

fn tell(stream: &mut UnixStream, length: usize, body: &str) {
    // Who asked may have gone.
    let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
}

fn wait_for(what: &str, mut look: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(40);
    while !look() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn end(child: Child, signal: Signal) -> (Output, String) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    // A shell makes 130 of an interrupt.
    assert_eq!(output.status.signal(), Some(signal as i32), "{said}");
    (output, said)
}

#[test]
fn an_export_that_does_not_end_leaves_nothing_or_what_the_next_one_replaces() {
    const WHOLE: &str = "memory and keys";
    let daemon = Daemon::new(|head, stream| match head.contains(ID) {
        true => tell(stream, WHOLE.len(), WHOLE),
        // The rest of it does not come.
        false => {
            tell(stream, WHOLE.len(), &WHOLE[..6]);
            std::thread::park();
        }
    });
    let (file, part) = (daemon.path("f"), daemon.path("f.part"));
    let name = file.to_str().unwrap();
    let begun = || {
        let export = daemon.toft(&["snapshot", "export", &ID.replace('1', "2"), name]);
        wait_for("its begin", || std::fs::read(&part).is_ok_and(|bytes| bytes == b"memory"));
        export
    };
    let whole = || daemon.toft(&["snapshot", "export", ID, name]).wait_with_output().unwrap();
    let words = |output: &Output| String::from_utf8(output.stderr.clone()).unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        end(begun(), signal);
        assert!(!part.exists() && !Path::exists(&file), "{signal}");
    }
    let killed = begun();
    let refused = whole();
    assert_eq!(refused.status.code(), Some(2));
    assert!(words(&refused).contains("another export is writing to it"), "{}", words(&refused));
    end(killed, Signal::SIGKILL);
    let left = std::fs::File::open(&part).unwrap();
    let replaced = whole();
    assert!(replaced.status.success(), "{}", words(&replaced));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), WHOLE);
    assert_eq!(std::io::read_to_string(left).unwrap(), "memory", "who had opened what was left reads on");
    let refused = whole();
    assert_eq!(refused.status.code(), Some(2));
    assert!(words(&refused).contains("exists; choose another name, or remove it"), "{}", words(&refused));
}

/// An operation as the daemon tells it.
fn operation(id: &str, state: &str) -> String {
    let progress = r#"{"phase": "", "percent": 0}"#;
    format!(
        r#"{{"id": "{id}", "kind": "server.stop", "state": "{state}", "progress": {progress}, "resources": [],
            "generation": 1, "created_at": "2026-01-01T00:00:00Z", "cancellable": true}}"#
    )
}

#[test]
fn who_interrupts_a_wait_is_told_how_to_go_on_with_it() {
    let ids = [ID.to_owned(), ID.replace('1', "2")];
    let items = ids.clone().map(|id| {
        format!(r#"{{"server_id": "{ID}", "name": "web1", "operation": {}}}"#, operation(&id, "running"))
    });
    let answer = format!(r#"{{"items": [{}]}}"#, items.join(","));
    let waiting = Arc::new(AtomicBool::new(false));
    let asked = waiting.clone();
    let daemon = Daemon::new(move |head, stream| match head.split_once(' ').unwrap() {
        ("POST", _) => tell(stream, answer.len(), &answer),
        (_, path) if path.contains("wait=") => {
            asked.store(true, Ordering::Relaxed);
            std::thread::park();
        }
        _ => {
            let running = operation(ID, "running");
            tell(stream, running.len(), &running);
        }
    });
    let told = |id: &String| format!("toft: operation {id} goes on: toft operation wait {id}\n");
    for (arguments, words) in [
        (&["operation", "wait", ID][..], told(&ids[0])),
        (&["--wait", "server", "stop", "-l", "a=b"], ids.iter().map(told).collect()),
    ] {
        waiting.store(false, Ordering::Relaxed);
        let child = daemon.toft(arguments);
        wait_for("its wait", || waiting.load(Ordering::Relaxed));
        let (output, said) = end(child, Signal::SIGINT);
        assert_eq!((said, output.stdout.is_empty()), (words, true));
    }
}

#[test]
fn a_wait_outlives_its_daemon() {
    let polls = AtomicUsize::new(0);
    let daemon = Daemon::new(move |_, stream| {
        let state = match polls.fetch_add(1, Ordering::Relaxed) {
            // It ends in the midst of the second and third.
            1 | 2 => return,
            0 | 3 => "running",
            _ => "succeeded",
        };
        let answer = operation(ID, state);
        tell(stream, answer.len(), &answer);
    });
    let output = daemon.toft(&["operation", "wait", ID]).wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && String::from_utf8(output.stdout).unwrap().contains("succeeded"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("; waiting for it to come back"), "{said}");
}

#[test]
fn a_command_that_lacks_something_says_what_and_nothing_else() {
    let daemon = Daemon::new(|_, _| ());
    let said = |arguments: &[&str]| {
        let output = daemon.toft(arguments).wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, words) = said(&["server", "create", "web1"]);
    assert_eq!(code, Some(2), "{words}");
    assert!(words.contains("<--image <IMAGE>|--snapshot <SNAPSHOT>>"), "{words}");
    // The endpoint is in the environment, and need not be typed.
    assert!(!words.contains("--endpoint"), "{words}");
    let mut wrong = Command::new(env!("CARGO_BIN_EXE_toft"));
    let output = wrong.env("TOFT_ENDPOINT", "ftp://x").args(["host", "about"]).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("--endpoint"), "what is wrong there is named");
}

#[test]
fn a_program_names_itself_with_its_version() {
    for (name, program) in [("toft", env!("CARGO_BIN_EXE_toft")), ("toftd", env!("CARGO_BIN_EXE_toftd"))] {
        let output = Command::new(program).arg("--version").output().unwrap();
        let version = concat!(env!("CARGO_PKG_VERSION"), "\n");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{name} {version}"));
    }
}

#[test]
fn a_command_whose_signals_are_ignored_goes_on() {
    let daemon = Daemon::new(|_, _| std::thread::park());
    let sock = daemon.path("sock");
    let mut command = Command::new("sh");
    let line = format!("trap '' INT; exec {} host about", env!("CARGO_BIN_EXE_toft"));
    let child = command.args(["-c", &line]).env("TOFT_ENDPOINT", sock).stderr(Stdio::piped());
    let child = child.stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    wait_for("its thread", || std::fs::read_to_string(&status).unwrap().contains("Threads:\t2"));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let (_, said) = end(child, Signal::SIGTERM);
    assert_eq!(said, "");
}
