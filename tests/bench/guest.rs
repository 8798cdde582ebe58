//! One probe guest that measures on command: its command line holds each word after a `serial`, so it waits for a
//! newline before every measurement. While it is not measuring it is stopped (SIGSTOP), because its waiting is a busy
//! loop. Once a guest runs, Toft and other VMMs are told apart here and nowhere else.
use std::ffi::OsStr;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::Process;
use crate::vmm_driver::{Machine, PATIENCE, Vmm};

const WAITING: &str = "probe: serial waiting";

/// A guest that waits.
pub(crate) struct Guest {
    pub(crate) who: &'static str,
    host: Host,
}

/// A VMM with a guest whose console can be read and typed on.
pub(crate) enum Host {
    Toft(Box<Vmm>),
    /// Its console is its standard input and output.
    Other(Box<Process>),
}

impl Host {
    pub(crate) fn pid(&self) -> i32 {
        match self {
            Host::Toft(vmm) => vmm.pid(),
            Host::Other(process) => process.pid,
        }
    }

    /// What the guest has said so far.
    pub(crate) fn told(&mut self) -> String {
        match self {
            Host::Toft(vmm) => vmm.console(),
            Host::Other(process) => process.told(),
        }
    }

    pub(crate) fn type_line(&mut self, line: &str) {
        match self {
            Host::Toft(vmm) => vmm.type_line(line),
            Host::Other(process) => process.type_line(line),
        }
    }

    /// Waits until the guest has said `text` so many times; panics when it does not within `patience`.
    pub(crate) fn wait_for(&mut self, text: &str, times: usize, patience: Duration) {
        match self {
            Host::Toft(vmm) => drop(vmm.wait_for_times_within(text, times, patience)),
            Host::Other(process) => process.wait_for(text, times, patience),
        }
    }
}

/// Numbers of one word's report, `key=value`.
pub(crate) struct Figures(String);

impl Figures {
    pub(crate) fn get(&self, key: &str) -> f64 {
        let found = self.0.split_whitespace().find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        found.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key} in {}", self.0))
    }
}

/// The command line that does these words one after another, for ever, each on command.
pub(crate) fn on_command(settings: &str, words: &[&str]) -> String {
    let each = words.iter().map(|word| format!("serial=3600000 {word} "));
    format!("{settings} {}loop", each.collect::<String>())
}

impl Guest {
    /// Boots Toft's machine; its command line is of [`on_command`].
    pub(crate) fn toft(machine: Machine) -> Guest {
        Guest::wait(Guest { who: "toft", host: Host::Toft(Box::new(Vmm::boot(machine))) })
    }

    /// Starts QEMU with the guest's serial port on its standard input and output.
    pub(crate) fn qemu(path: &Path, arguments: &[String]) -> Guest {
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        let process = Process::start(path, &arguments);
        Guest::wait(Guest { who: "qemu", host: Host::Other(Box::new(process)) })
    }

    fn wait(mut guest: Guest) -> Guest {
        guest.host.wait_for(WAITING, 1, PATIENCE);
        guest.signal(Signal::SIGSTOP);
        guest
    }

    /// Lets it do its next word. Answers what the word reported.
    pub(crate) fn measure(&mut self, word: &str) -> Figures {
        self.measure_while(word, WAITING, || ())
    }

    /// As [`Guest::measure`], but does something as soon as the guest has said `ready` once more.
    pub(crate) fn measure_while(&mut self, word: &str, ready: &str, act: impl FnOnce()) -> Figures {
        self.signal(Signal::SIGCONT);
        let told = self.host.told();
        let before = (told.matches(ready).count(), told.matches(WAITING).count());
        self.host.type_line("");
        self.host.wait_for(ready, before.0 + 1, PATIENCE);
        act();
        self.host.wait_for(WAITING, before.1 + 1, PATIENCE);
        self.signal(Signal::SIGSTOP);
        let name = word.split('=').next().unwrap_or(word);
        let told = self.host.told();
        let line = told.lines().rev().find(|line| line.starts_with(&format!("probe: {name} ok")));
        Figures(line.unwrap_or_else(|| panic!("{} did not do {word}: {told}", self.who)).to_owned())
    }

    /// As [`Guest::measure_while`], with exits and system calls counted from begin to end. What is around the word
    /// itself, some polls of the serial port, is counted with it.
    pub(crate) fn count_while(&mut self, word: &str, ready: &str, act: impl FnOnce()) -> (Figures, Counts) {
        let counter = Counter::attach(self.host.pid());
        let figures = self.measure_while(word, ready, act);
        (figures, counter.read())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.host.pid()), signal).expect("the process lives until it is dropped");
    }
}

/// What one process has done.
pub(crate) struct Counts {
    /// Exits that its vCPUs took to user space. Those that KVM answers itself, doorbells above all, are not in it.
    pub(crate) exits: f64,
    pub(crate) system_calls: f64,
}

/// The kernel's tracepoints, counted by perf.
struct Counter(Child);

impl Counter {
    fn attach(pid: i32) -> Counter {
        let mut perf = Command::new("perf");
        let events = "raw_syscalls:sys_enter,kvm:kvm_userspace_exit";
        perf.args(["stat", "-x,", "-e", events, "-p", &pid.to_string()]);
        let child = perf.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let child = child.unwrap_or_else(|error| panic!("perf cannot be started: {error}"));
        // The process that is counted stands still, so only the beginning of counting has to be certain.
        std::thread::sleep(ATTACH);
        Counter(child)
    }

    fn read(mut self) -> Counts {
        kill(Pid::from_raw(self.0.id() as i32), Signal::SIGINT).expect("it was not reaped");
        let mut text = String::new();
        self.0.stderr.take().expect("it is piped").read_to_string(&mut text).unwrap();
        self.0.wait().unwrap();
        let count = |event: &str| {
            let line = text.lines().find(|line| line.contains(event));
            let value = line.and_then(|line| line.split(',').next()?.parse::<f64>().ok());
            value.unwrap_or_else(|| panic!("perf does not count {event}: {text}"))
        };
        Counts { exits: count("kvm:kvm_userspace_exit"), system_calls: count("raw_syscalls:sys_enter") }
    }
}

/// perf opens its counters well within this.
const ATTACH: Duration = Duration::from_millis(300);
