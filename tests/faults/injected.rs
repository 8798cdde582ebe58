//! System calls that fail in the middle of each verb: what was asked for fails with a clear problem and is undone, or
//! is done all the same; the daemon lives, and the same request works afterwards.
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use nix::errno::Errno;
use serde_json::Value;

use crate::refusals::{Call, Caller, KINDS, Kernel};
use crate::stage::{Said, Stage, wait_for};
use crate::world::{self, World};

/// Faults tried in a normal run, of each verb.
const SAMPLE: usize = 40;

/// How many calls of a VMM that are alike are tried: it writes each byte of the console by itself.
const ALIKE_MAX: u32 = 3;

/// Those who work for a daemon.
const HOST: [Caller; 2] = [Caller::Daemon, Caller::Launcher];

/// What of a host's trouble a fault may be told as. `internal` is a disk that fails.
const CODES: [&str; 7] = [
    "disk_full",
    "too_many",
    "no_capacity",
    "internal",
    "machine_failed",
    "host_unprepared",
    "kvm_unavailable",
];

/// Something that is asked of the daemon, can be undone, and can be seen.
struct Verb {
    name: &'static str,
    request: &'static [&'static str],
    back: &'static [&'static str],
    seen: &'static [&'static str],
    /// The state of what `seen` shows when it is done; nothing when it is to be gone.
    done: Option<&'static str>,
}

const SERVER: [&str; 3] = ["server", "show", "s"];

const CREATE: &[&str] = &["--wait", "server", "create", "s", "--image", "counter", "--memory", "64M"];
const DELETE: &[&str] = &["--wait", "server", "delete", "s"];
const START: &[&str] = &["--wait", "server", "start", "s"];
const STOP: &[&str] = &["--wait", "server", "stop", "s", "--grace-s", "0"];

const VERBS: [Verb; 5] = [
    Verb {
        name: "import",
        request: &["--wait", "image", "import", "more", "--from", "counter"],
        back: &["--wait", "image", "delete", "more"],
        seen: &["image", "show", "more"],
        done: Some("ready"),
    },
    Verb { name: "create", request: CREATE, back: DELETE, seen: &SERVER, done: Some("running") },
    Verb { name: "start", request: START, back: STOP, seen: &SERVER, done: Some("running") },
    Verb { name: "stop", request: STOP, back: START, seen: &SERVER, done: Some("stopped") },
    Verb { name: "delete", request: DELETE, back: CREATE, seen: &SERVER, done: None },
];

/// A stage on a kernel that refuses.
struct Trial {
    stage: Stage,
    kernel: Kernel,
    verb: Verb,
}

type Seen = (Vec<String>, World);

impl Trial {
    fn new(at: usize) -> Trial {
        let [import, create, start, stop, delete] = VERBS;
        let verb = [import, create, start, stop, delete].into_iter().nth(at).unwrap();
        let mut stage = Stage::new();
        let base = stage.path("");
        let (child, kernel) = Kernel::start(stage.daemon_command(), base.to_str().unwrap());
        stage.took(child);
        let _ = stage.toft(&["host", "check"]);
        stage.import("counter");
        if matches!(verb.name, "start" | "stop" | "delete") {
            stage.ok(CREATE);
        }
        if verb.name == "start" {
            stage.ok(STOP);
        }
        Trial { stage, kernel, verb }
    }

    /// Whether what was asked for is so.
    fn is_done(&self) -> bool {
        let said = self.stage.toft(&[&["-o", "json"], self.verb.seen].concat());
        match self.verb.done {
            None => said.code == 3,
            Some(state) => {
                let found: Value = serde_json::from_str(&said.out).unwrap_or_default();
                found["state"] == state
            }
        }
    }

    /// A look at a world that stands still: networks follow their records in their own time.
    fn quiet_look(&self) -> Seen {
        let mut earlier = self.stage.look();
        wait_for("a world that stands still", || {
            let now = self.stage.look();
            let is_quiet = now == earlier && self.dhcp_knows_the_servers();
            earlier = now.clone();
            is_quiet.then_some(now)
        })
    }

    /// Whether DHCP has an address for each server and none else, and is not being told at this moment.
    fn dhcp_knows_the_servers(&self) -> bool {
        let mut known = BTreeSet::new();
        for network in std::fs::read_dir(self.stage.path("run/networks")).into_iter().flatten().flatten() {
            for file in std::fs::read_dir(network.path()).into_iter().flatten().flatten() {
                let name = file.file_name();
                if name.to_string_lossy().ends_with(".unfinished") {
                    return false;
                }
                let of_new = std::fs::read_dir(file.path()).into_iter().flatten().flatten();
                let told = match name.to_str() {
                    Some("hosts") => vec![file.path()],
                    Some("hosts.d") => of_new.map(|file| file.path()).collect(),
                    _ => Vec::new(),
                };
                let read = |path| std::fs::read_to_string(path).unwrap_or_default();
                known.extend(
                    told.into_iter()
                        .flat_map(|path| read(path).lines().map(str::to_owned).collect::<Vec<_>>()),
                );
            }
        }
        self.stage.json(&["server", "list"]).as_array().is_some_and(|servers| servers.len() == known.len())
    }

    /// Waits until nothing is being worked on, networks have got over it, and the launcher is there for what comes next.
    fn settle(&self, what: &str) {
        wait_for(&format!("the end of all work after {what}\n{}", self.stage.log()), || {
            let operations = self.stage.json(&["operation", "list"]);
            let at_work =
                |one: &Value| matches!(one["state"].as_str(), Some("pending" | "running" | "cancelling"));
            let networks = self.stage.json(&["network", "list"]);
            let is_degraded = |one: &Value| one["state"] == "degraded";
            let is_busy = operations.as_array()?.iter().any(at_work);
            (!is_busy && !networks.as_array()?.iter().any(is_degraded)).then_some(())
        });
        if !world::processes().iter().any(|(_, line)| line == "toft-vmm launcher") {
            let _ = self.stage.toft(&["host", "check"]);
        }
    }

    /// One fault: what it was, or nothing when that call was not made this time.
    fn refuse(&mut self, call: Call, errno: Errno) -> Option<String> {
        let before = self.quiet_look();
        self.kernel.arm(Some((call, errno)));
        let said = self.stage.toft(&[&["--wait-timeout-s", "40"], self.verb.request].concat());
        let (_, refused) = self.kernel.disarm();
        let what = format!("{} of {:?}: {errno}, {}th {:?}", self.verb.name, call.caller, call.nth, refused);
        assert!(self.stage.is_alive(), "{what} ended the daemon:\n{}", self.stage.log());
        self.settle(&what);
        self.judge(&what, &said, &before);
        if !self.is_done() {
            self.stage.ok(self.verb.request);
            assert!(self.is_done(), "{what}: not done when asked again");
        }
        self.stage.ok(self.verb.back);
        refused
    }

    fn judge(&self, what: &str, said: &Said, before: &Seen) {
        let told = format!("{what}\n{}{}\n{}", said.out, said.err, self.stage.log());
        let done = self.is_done();
        if said.code == 0 {
            assert!(done, "not done, and told as done: {told}");
            return;
        }
        let code = said.err.split("code ").nth(1).and_then(|rest| rest.split(',').next());
        match code {
            Some(code) => assert!(CODES.contains(&code), "{code} is no word for a fault of the host: {told}"),
            // The connection itself was hit; what was asked for may have been heard or not.
            None => assert!(said.code == 5, "neither a problem nor a broken connection: {told}"),
        }
        if !done {
            self.stage.same_as(before, what);
        }
    }

    /// The calls that the verb makes, each of which can be refused.
    fn count(&self) -> Vec<(Call, String)> {
        self.kernel.arm(None);
        self.stage.ok(self.verb.request);
        let (seen, _) = self.kernel.disarm();
        self.stage.ok(self.verb.back);
        seen
    }
}

/// Every fault of a verb in the long form, or those of the calls that `TOFT_FAULTS` names, such as `openat,mmap`; else as
/// many as fit, spread evenly.
fn faults(seen: &[(Call, String)], sample: usize) -> Vec<(Call, Errno)> {
    let mut times: BTreeMap<(Caller, usize, &str), u32> = BTreeMap::new();
    let all: Vec<(Call, Errno)> = seen
        .iter()
        .filter(|(call, about)| {
            let so_far = times.entry((call.caller, call.kind, about)).or_default();
            *so_far += 1;
            call.caller != Caller::Vmm || *so_far <= ALIKE_MAX
        })
        .flat_map(|(call, _)| KINDS[call.kind].errors.iter().map(|errno| (*call, *errno)))
        .collect();
    if let Ok(names) = std::env::var("TOFT_FAULTS") {
        let is_wanted = |call: &Call| names.split(',').any(|name| name == KINDS[call.kind].name);
        return all.into_iter().filter(|(call, _)| is_wanted(call)).collect();
    }
    if std::env::var_os("TOFT_LONG").is_some() {
        return all;
    }
    // Each kind of call once with each error, then others by a step that shares nothing with the lists' lengths.
    let mut kinds = BTreeSet::new();
    let (mut chosen, rest): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(call, errno)| kinds.insert((call.caller, call.kind, *errno as i32)));
    let step = rest.len().checked_div(sample.saturating_sub(chosen.len()).max(1)).unwrap_or(1).max(1);
    chosen.extend(rest.into_iter().step_by(step));
    chosen.truncate(sample);
    chosen
}

fn every_fault_is_told_and_undone(at: usize, callers: &[Caller], sample: usize) {
    let begun = Instant::now();
    let mut trial = Trial::new(at);
    let first = trial.quiet_look();
    let mut seen = trial.count();
    seen.retain(|(call, _)| callers.contains(&call.caller));
    for caller in callers.iter().copied() {
        let calls = seen.iter().filter(|(call, _)| call.caller == caller).count();
        println!("{}: {calls} calls of {caller:?} can fail", trial.verb.name);
    }
    let (mut tried, mut met) = (0, 0);
    for (call, errno) in faults(&seen, sample) {
        tried += 1;
        let refused = trial.refuse(call, errno);
        met += usize::from(refused.is_some());
        if let Some(what) = refused {
            println!("  {errno} from the {}. {what}", call.nth);
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{}: {met} of {tried} faults met, {seconds:.1} s", trial.verb.name);
    assert!(met * 2 >= tried, "most faults were not met: the calls are counted wrongly");
    // What was started remembers when.
    if matches!(trial.verb.name, "import" | "create") {
        trial.stage.same_as(&first, "all faults");
    }
    trial.stage.stop();
}

#[test]
fn faults_of_an_import_are_told_and_undone() {
    world::inside("injected::faults_of_an_import_are_told_and_undone", async {
        every_fault_is_told_and_undone(0, &HOST, SAMPLE);
    });
}

#[test]
fn faults_of_a_create_are_told_and_undone() {
    world::inside("injected::faults_of_a_create_are_told_and_undone", async {
        every_fault_is_told_and_undone(1, &HOST, SAMPLE);
    });
}

#[test]
fn faults_of_a_start_are_told_and_undone() {
    world::inside("injected::faults_of_a_start_are_told_and_undone", async {
        every_fault_is_told_and_undone(2, &HOST, SAMPLE);
    });
}

#[test]
fn faults_of_a_stop_are_told_and_undone() {
    world::inside("injected::faults_of_a_stop_are_told_and_undone", async {
        every_fault_is_told_and_undone(3, &[Caller::Daemon, Caller::Launcher, Caller::Vmm], SAMPLE);
    });
}

#[test]
fn faults_of_a_delete_are_told_and_undone() {
    world::inside("injected::faults_of_a_delete_are_told_and_undone", async {
        every_fault_is_told_and_undone(4, &HOST, SAMPLE);
    });
}

#[test]
fn faults_of_a_vmm_that_starts_are_told_and_undone() {
    world::inside("injected::faults_of_a_vmm_that_starts_are_told_and_undone", async {
        every_fault_is_told_and_undone(1, &[Caller::Vmm], SAMPLE / 2);
    });
}
