//! A program that is measured as it is: no jail, its output on a pipe. Killed and reaped when dropped.
use std::ffi::OsStr;
use std::fs::File;
use std::io::{PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use sys::jail::{Jail, Program, Refused, Step, User, spawn};
use sys::pidfd::{PidFd, Signal};

use crate::vmm_driver::{PATIENCE, RLIMITS, readable};

/// Everything that makes a jail. It is left out, so that all programs are executed by the same code.
const WALLS: [Step; 13] = [
    Step::Cgroups,
    Step::PidNamespace,
    Step::UserNamespace,
    Step::MountNamespace,
    Step::NetNamespace,
    Step::IpcNamespace,
    Step::UtsNamespace,
    Step::Root,
    Step::Rlimits,
    Step::Ids,
    Step::Keyring,
    Step::Capabilities,
    Step::NoNewPrivs,
];

/// A program that runs.
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// When it was executed.
    pub(crate) executed_at: Instant,
    pidfd: PidFd,
    input: PipeWriter,
    output: File,
    told: Vec<u8>,
    /// How much there was at which time.
    came: Vec<(usize, Instant)>,
}

impl Process {
    /// Starts a program with its standard output and error on one pipe, and its input on another.
    pub(crate) fn start(path: &Path, arguments: &[&OsStr]) -> Process {
        let executable = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (stdin, input) = std::io::pipe().unwrap();
        let (output, stdout) = std::io::pipe().unwrap();
        let program = Program {
            executable: executable.as_fd(),
            name: path.as_os_str(),
            arguments,
            descriptors: &[(stdin.as_fd(), 0), (stdout.as_fd(), 1), (stdout.as_fd(), 2)],
        };
        let jail = Jail {
            user: User::Own { uid: 0, gid: 0 },
            cgroups: &[],
            rlimits: RLIMITS,
            empty: None,
            refused: Refused::Fails,
            left_out: &WALLS,
        };
        let started = spawn(&program, &jail).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Process {
            pid: started.pid,
            input,
            executed_at: started.executed_at,
            pidfd: started.pidfd,
            output: File::from(OwnedFd::from(output)),
            told: Vec::new(),
            came: Vec::new(),
        }
    }

    /// Waits until the output holds `text`; answers when its first byte came. What the program says itself is passed over.
    pub(crate) fn first_of(&mut self, text: &str) -> Instant {
        self.wait_for(text, 1, PATIENCE);
        let at = self.told.windows(text.len()).position(|part| part == text.as_bytes()).expect("it is there");
        self.came.iter().find(|(bytes, _)| *bytes > at).expect("it came").1
    }

    /// Types a line.
    pub(crate) fn type_line(&mut self, line: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// All output so far.
    pub(crate) fn told(&self) -> String {
        String::from_utf8_lossy(&self.told).into_owned()
    }

    /// Waits until the output holds `text` so many times; panics when it does not within `patience`.
    pub(crate) fn wait_for(&mut self, text: &str, times: usize, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.told().matches(text).count() < times {
            self.read_some(text, deadline);
        }
    }

    fn read_some(&mut self, what: &str, deadline: Instant) {
        let mut buffer = [0; 4096];
        let came = readable(self.output.as_fd(), deadline);
        let bytes = if came { self.output.read(&mut buffer).unwrap() } else { 0 };
        assert!(bytes > 0, "{what} did not come; so far: {}", String::from_utf8_lossy(&self.told));
        self.told.extend_from_slice(&buffer[..bytes]);
        self.came.push((self.told.len(), Instant::now()));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.pidfd.signal(Signal::SIGKILL);
        readable(self.pidfd.as_fd(), Instant::now() + Duration::from_secs(10));
        let _ = self.pidfd.reap();
    }
}
