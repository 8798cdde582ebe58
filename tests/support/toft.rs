//! A daemon of a test's own, spoken to through the command line as a person would. Needs the binaries in
//! `TOFT_BIN`; everything it makes is below a directory that goes with it.
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long between two looks at a condition outside this process, at least and at most. What is waited for here takes seconds.
const LOOK_AGAIN: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(3)];

/// A running daemon.
pub(crate) struct Daemon {
    process: Child,
    bin: PathBuf,
    /// Holds the state and the run directory. Every user may enter it, because dnsmasq gives up its privileges.
    base: PathBuf,
    images: PathBuf,
    /// More that it is told.
    flags: Vec<String>,
    /// Removes `base` at the end.
    _scratch: Option<tempfile::TempDir>,
}

/// The directory an environment variable names; the test cannot run without it.
pub(crate) fn directory(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("set {variable}, as scripts/test does")).into()
}

/// Says on stderr what a test has got to, and when, counted from the first thing said. At once and not with the rest of what it says,
/// so that it is known of a test that is ended from outside, too.
pub(crate) fn reached(what: &str) {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    let s = BEGUN.get_or_init(Instant::now).elapsed().as_secs_f64();
    let _ = writeln!(std::io::stderr(), "{s:7.1} s  {what}");
}

/// Waits until `look` finds something; panics with `what` when the time is up.
pub(crate) fn wait_for<T>(what: &str, limit: Duration, look: impl FnMut() -> Option<T>) -> T {
    wait_for_quietly(limit, look)
        .inspect(|_| reached(what))
        .unwrap_or_else(|| panic!("{what} did not come within {} s", limit.as_secs()))
}

impl Daemon {
    /// Starts a daemon with an empty state and waits until it answers.
    pub(crate) fn start() -> Daemon {
        Daemon::start_with(&[])
    }

    /// The same with more flags.
    pub(crate) fn start_with(flags: &[&str]) -> Daemon {
        let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        let scratch = tempfile::Builder::new().prefix("toft").permissions(everyone).tempdir().unwrap();
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let mut daemon = Daemon::start_as(scratch.path(), &directory("TOFT_IMAGES"), flags);
        daemon._scratch = Some(scratch);
        daemon
    }

    /// Starts a daemon with the state that is below `base`, and waits until it answers. What is there stays.
    pub(crate) fn start_in(base: &Path, images: &Path) -> Daemon {
        Daemon::start_as(base, images, Vec::new())
    }

    fn start_as(base: &Path, images: &Path, flags: Vec<String>) -> Daemon {
        let bin = directory("TOFT_BIN");
        let process = spawn(&bin, base, images, &flags);
        let daemon =
            Daemon { process, bin, base: base.to_owned(), images: images.to_owned(), flags, _scratch: None };
        daemon.wait_until_it_answers();
        daemon
    }

    /// Kills the daemon without warning and starts another on the same state.
    pub(crate) fn die_and_start_again(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = spawn(&self.bin, &self.base, &self.images, &self.flags);
        self.wait_until_it_answers();
    }

    fn wait_until_it_answers(&self) {
        wait_for("the daemon", Duration::from_secs(60), || {
            self.command(&["host", "about"]).output().unwrap().status.success().then_some(())
        });
    }

    /// Where the daemon keeps its state.
    pub(crate) fn state(&self) -> PathBuf {
        self.base.join("state")
    }

    /// Where a test keeps files of its own.
    pub(crate) fn scratch(&self) -> &Path {
        &self.base
    }

    /// A command of the command line.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("toft"));
        let socket = self.state().join("run/toftd.sock");
        command
            .env("TOFT_ENDPOINT", format!("unix:{}", socket.display()))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command that must work.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "toft {arguments:?}: {stderr}\n{}", self.log());
        if arguments.contains(&"--wait") {
            reached(&format!("toft {}", arguments.join(" ")));
        }
        output
    }

    /// Runs a command that must work and answers with its JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["-o", "json"], arguments].concat());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs a command that must fail; answers with its exit code and what it said.
    pub(crate) fn fails(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.command(arguments).output().unwrap();
        assert!(!output.status.success(), "toft {arguments:?} was to fail");
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Everything still held of a server's console.
    pub(crate) fn console(&self, server: &str) -> String {
        String::from_utf8_lossy(&self.run(&["server", "console-log", server]).stdout).into_owned()
    }

    /// Waits until a server's console holds `text`; answers with the whole log.
    pub(crate) fn wait_for_console(&self, server: &str, text: &str, limit: Duration) -> String {
        let what = format!("{text:?} on the console of {server}");
        wait_for(&what, limit, || Some(self.console(server)).filter(|log| log.contains(text)))
    }

    /// Imports an image from the directory `TOFT_IMAGES` under its own name.
    pub(crate) fn import(&self, image: &str) {
        self.run(&["--wait", "image", "import", image, "--from", image]);
    }

    /// What there is to know of a server after a failure. What its guest still does, by two looks at its counters, tells where it waits.
    fn tell_of(&self, server: &str) {
        let say = |words: &[&str]| {
            let said = self.command(words).output().map(|output| output.stdout).unwrap_or_default();
            eprintln!("toft {}:\n{}", words.join(" "), String::from_utf8_lossy(&said));
        };
        say(&["-o", "json", "server", "show", server]);
        say(&["server", "console-log", server]);
        say(&["server", "metrics", server]);
        say(&["server", "metrics", server]);
    }

    /// The end of the daemon's log, for failures.
    pub(crate) fn log(&self) -> String {
        let text = std::fs::read_to_string(self.base.join("toftd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

/// As [`wait_for`], for callers who have more to say when it does not come.
pub(crate) fn wait_for_quietly<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        let begun = Instant::now();
        if let Some(found) = look() {
            return Some(found);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        // A look starts processes, which on an emulated host take seconds from the guest that is waited for.
        std::thread::sleep((3 * begun.elapsed()).clamp(LOOK_AGAIN[0], LOOK_AGAIN[1]).min(left));
    }
}

fn spawn(bin: &Path, base: &Path, images: &Path, flags: &[String]) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(base.join("toftd.log")).unwrap();
    Command::new(bin.join("toftd"))
        .arg("--state-dir")
        .arg(base.join("state"))
        .arg("--run-dir")
        .arg(base.join("run"))
        .arg("--vmm")
        .arg(bin.join("toft-vmm"))
        .arg("--import-dir")
        .arg(images)
        .args(flags)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Servers outlive their daemon by design, so they are deleted while it still can.
        let servers = self.command(&["-o", "name", "server", "list"]).output();
        for server in String::from_utf8_lossy(&servers.map(|o| o.stdout).unwrap_or_default()).lines() {
            if std::thread::panicking() {
                self.tell_of(server);
            }
            let _ = self.command(&["--wait", "--wait-timeout-s", "60", "server", "delete", server]).output();
        }
        let networks = self.command(&["-o", "name", "network", "list"]).output();
        for network in String::from_utf8_lossy(&networks.map(|o| o.stdout).unwrap_or_default()).lines() {
            let _ =
                self.command(&["--wait", "--wait-timeout-s", "60", "network", "delete", network]).output();
        }
        if std::thread::panicking() {
            eprintln!("the daemon:\n{}", self.log());
        }
        let pid = nix::unistd::Pid::from_raw(self.process.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        if wait_for_quietly(Duration::from_secs(60), || self.process.try_wait().unwrap()).is_none() {
            eprintln!("the daemon does not end:\n{}", self.log());
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}
