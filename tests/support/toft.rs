//! A daemon of a test's own, spoken to through the command line as a person would. Needs the binaries in
//! `TOFT_BIN`; everything it makes is below a directory that goes with it.
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How often a condition outside this process is looked at. What is waited for here takes seconds.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// A running daemon.
pub struct Daemon {
    process: Child,
    bin: PathBuf,
    state: tempfile::TempDir,
    images: PathBuf,
}

/// The directory an environment variable names; the test cannot run without it.
pub fn directory(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("set {variable}, as scripts/test does")).into()
}

/// Waits until `look` finds something; panics with `what` when the time is up.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what} did not come within {} s", limit.as_secs());
        std::thread::sleep(LOOK_AGAIN);
    }
}

impl Daemon {
    /// Starts a daemon with an empty state and waits until it answers.
    pub fn start() -> Daemon {
        let bin = directory("TOFT_BIN");
        let images = directory("TOFT_IMAGES");
        let state = tempfile::Builder::new().prefix("toft").tempdir().unwrap();
        let process = spawn(&bin, state.path(), &images);
        let daemon = Daemon { process, bin, state, images };
        daemon.wait_until_it_answers();
        daemon
    }

    /// Kills the daemon without warning and starts another on the same state.
    pub fn die_and_start_again(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = spawn(&self.bin, self.state.path(), &self.images);
        self.wait_until_it_answers();
    }

    fn wait_until_it_answers(&self) {
        wait_for("the daemon", Duration::from_secs(60), || {
            self.command(&["host", "about"]).output().unwrap().status.success().then_some(())
        });
    }

    /// Where the daemon keeps everything.
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// A command of the command line.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("toft"));
        let socket = self.state.path().join("run/toftd.sock");
        command
            .env("TOFT_ENDPOINT", format!("unix:{}", socket.display()))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command that must work.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "toft {arguments:?}: {stderr}\n{}", self.log());
        output
    }

    /// Runs a command that must work and answers with its JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["-o", "json"], arguments].concat());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs a command that must fail; answers with its exit code and what it said.
    pub fn fails(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.command(arguments).output().unwrap();
        assert!(!output.status.success(), "toft {arguments:?} was to fail");
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Everything still held of a server's console.
    pub fn console(&self, server: &str) -> String {
        String::from_utf8_lossy(&self.run(&["server", "console-log", server]).stdout).into_owned()
    }

    /// Waits until a server's console holds `text`; answers with the whole log.
    pub fn wait_for_console(&self, server: &str, text: &str, limit: Duration) -> String {
        let found = wait_for_quietly(limit, || Some(self.console(server)).filter(|log| log.contains(text)));
        found.unwrap_or_else(|| {
            panic!(
                "{text:?} did not come within {} s; the console:\n{}",
                limit.as_secs(),
                self.console(server)
            )
        })
    }

    /// Imports an image from the directory `TOFT_IMAGES` under its own name.
    pub fn import(&self, image: &str) {
        self.run(&["--wait", "image", "import", image, "--from", image]);
    }

    /// The end of the daemon's log, for failures.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.state.path().join("toftd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

fn wait_for_quietly<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if let Some(found) = look() {
            return Some(found);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    None
}

fn spawn(bin: &Path, state: &Path, images: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(state.join("toftd.log")).unwrap();
    Command::new(bin.join("toftd"))
        .arg("--state-dir")
        .arg(state)
        .arg("--vmm")
        .arg(bin.join("toft-vmm"))
        .arg("--import-dir")
        .arg(images)
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
            let _ = self.command(&["--wait", "--wait-timeout-s", "60", "server", "delete", server]).output();
        }
        let networks = self.command(&["-o", "name", "network", "list"]).output();
        for network in String::from_utf8_lossy(&networks.map(|o| o.stdout).unwrap_or_default()).lines() {
            let _ = self.command(&["--wait", "network", "delete", network]).output();
        }
        let pid = nix::unistd::Pid::from_raw(self.process.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.process.wait();
    }
}
