//! A daemon of a test's own, spoken to through the command line as a person would, with the flags a test chooses.
//! Runs inside the namespaces that `world` makes, where everything it starts ends with it.
use std::cell::RefCell;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::images;
use crate::world::World;

/// Longest wait for something that takes well under a second on a quiet machine.
pub(crate) const SOON: Duration = Duration::from_secs(40);

/// How often a condition outside this process is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A directory with images to import, and the daemon that works in it.
pub(crate) struct Stage {
    base: tempfile::TempDir,
    bin: PathBuf,
    /// What VMMs are started from.
    vmm: PathBuf,
    flags: Vec<OsString>,
    daemon: Option<Child>,
    /// Ids of servers, by which their control groups are known.
    ids: RefCell<Vec<String>>,
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Waits until `look` finds something; panics with `what` when the time is up.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + SOON;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what} did not come within {SOON:?}");
        std::thread::sleep(LOOK_AGAIN);
    }
}

impl Stage {
    /// An empty stage. `TOFT_BIN` says where the binaries are. The import directory holds `counter`, whose guest
    /// counts until its button is pressed.
    pub(crate) fn new() -> Stage {
        let bin = PathBuf::from(std::env::var_os("TOFT_BIN").expect("set TOFT_BIN, as scripts/test does"));
        let everyone = std::fs::Permissions::from_mode(0o755);
        // Directly below /tmp, because every user must be able to reach dnsmasq's files.
        let base = tempfile::Builder::new().prefix("toft").permissions(everyone).tempdir_in("/tmp").unwrap();
        images::write(&base.path().join("import/counter"), "beat=100");
        let vmm = bin.join("toft-vmm");
        Stage { base, bin, vmm, flags: Vec::new(), daemon: None, ids: RefCell::default() }
    }

    /// Adds flags for daemons that are started later.
    pub(crate) fn flags(&mut self, flags: &[&str]) {
        self.flags.extend(flags.iter().map(OsString::from));
    }

    /// Daemons that are started later have this in the place of their VMM's program: a copy of it, or something else.
    pub(crate) fn install(&mut self, program: Option<&str>) {
        self.vmm = self.path("toft-vmm");
        let _ = std::fs::remove_file(&self.vmm);
        match program {
            None => drop(std::fs::copy(self.bin.join("toft-vmm"), &self.vmm).unwrap()),
            Some(text) => std::fs::write(&self.vmm, text).unwrap(),
        }
        std::fs::set_permissions(&self.vmm, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A file or directory of this stage.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    /// The command that starts a daemon here.
    pub(crate) fn daemon_command(&self) -> Command {
        let log = std::fs::File::options().create(true).append(true).open(self.path("toftd.log")).unwrap();
        let mut command = Command::new(self.bin.join("toftd"));
        command
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--import-dir")
            .arg(self.path("import"))
            // What is injected is to meet the server that a test is about.
            .args(["--warm-shells", "0"])
            .arg("--vmm")
            .arg(&self.vmm)
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        command
    }

    /// Starts a daemon and waits until it answers.
    pub(crate) fn start(&mut self) {
        let child = self.daemon_command().spawn().unwrap();
        self.took(child);
        // The launcher is started when it is first needed; from here on it belongs to what there is.
        let _ = self.toft(&["host", "check"]);
    }

    /// Takes a daemon that was started by other means, and waits until it answers.
    pub(crate) fn took(&mut self, child: Child) {
        assert!(self.daemon.replace(child).is_none(), "one daemon at a time");
        wait_for("the daemon", || {
            assert!(self.is_alive(), "the daemon ended:\n{}", self.log());
            (self.toft(&["host", "about"]).code == 0).then_some(())
        });
    }

    /// Whether the daemon runs.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(|daemon| daemon.try_wait().unwrap().is_none())
    }

    /// Asks the daemon to end, and expects it to end well.
    pub(crate) fn stop(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon");
        let pid = nix::unistd::Pid::from_raw(daemon.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = wait_for("the daemon's end", || daemon.try_wait().unwrap());
        assert!(status.success(), "the daemon ended with {status}:\n{}", self.log());
    }

    /// A command of the command line.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("toft"));
        let endpoint = format!("unix:{}", self.path("state/run/toftd.sock").display());
        command.env("TOFT_ENDPOINT", endpoint).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command.
    pub(crate) fn toft(&self, arguments: &[&str]) -> Said {
        Said::of(&mut self.command(arguments))
    }

    /// Runs a command that must work; answers what it printed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let said = self.toft(arguments);
        assert_eq!(said.code, 0, "toft {arguments:?}: {}\n{}", said.err, self.log());
        said.out
    }

    /// Runs a command that must work and print JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let out = self.ok(&[&["-o", "json"], arguments].concat());
        let value: Value =
            serde_json::from_str(&out).unwrap_or_else(|cause| panic!("toft {arguments:?}: {cause}\n{out}"));
        for id in [&value["resource"]["id"], &value["id"]] {
            self.ids.borrow_mut().extend(id.as_str().map(str::to_owned));
        }
        value
    }

    /// Runs a command that must fail with this exit code and a problem of this code, whose words a person can act
    /// on: they must hold each of `words`.
    pub(crate) fn fails(&self, arguments: &[&str], exit: i32, code: &str, words: &[&str]) -> String {
        let said = self.toft(arguments);
        let told = format!("toft {arguments:?}: exit {}\n{}{}", said.code, said.out, said.err);
        assert_eq!(said.code, exit, "{told}\n{}", self.log());
        assert!(said.err.contains(&format!("code {code},")), "not {code}: {told}");
        for word in words {
            assert!(said.err.contains(word), "{word:?} is missing: {told}");
        }
        said.err
    }

    /// Imports `entry` of the import directory under its own name.
    pub(crate) fn import(&self, entry: &str) {
        self.ok(&["--wait", "image", "import", entry, "--from", entry]);
    }

    /// Waits for text on a server's console; answers the whole log.
    pub(crate) fn console(&self, server: &str, text: &str) -> String {
        wait_for(&format!("{text:?} on the console of {server}"), || {
            Some(self.ok(&["server", "console-log", server])).filter(|log| log.contains(text))
        })
    }

    /// Everything there is: what the API lists, and files, processes, devices, rules, mounts and control groups.
    pub(crate) fn look(&self) -> (Vec<String>, World) {
        let kinds = ["server", "image", "volume", "network"];
        let listed = kinds.map(|kind| {
            let mut listed = self.json(&[kind, "list"]);
            // The file system decides what a file uses; and that something was tried may be counted.
            for item in listed.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
                item.retain(|field, _| {
                    !["used_bytes", "generation", "updated_at", "state_reason"].contains(&&**field)
                });
            }
            format!("{kind}: {listed}")
        });
        (listed.into(), World::look(&[self.path("state"), self.path("run")], &self.ids.borrow()))
    }

    /// Waits until everything is as it was; panics with what is different.
    pub(crate) fn same_as(&self, before: &(Vec<String>, World), why: &str) {
        let end = Instant::now() + SOON;
        loop {
            let now = self.look();
            if now == *before {
                return;
            }
            if Instant::now() > end {
                let world = now.1.differs_from(&before.1).join("\n  ");
                panic!("{why}: something is left\n  {world}\n{:#?}\n{:#?}\n{}", before.0, now.0, self.log());
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The end of the daemon's log, for failures.
    pub(crate) fn log(&self) -> String {
        let text = std::fs::read_to_string(self.path("toftd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Said {
    /// Runs a command to its end.
    pub(crate) fn of(command: &mut Command) -> Said {
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Said {
            code: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // Where a test mounted something; the rest of it ends with the namespace.
        for place in ["state", "import"] {
            let _ = Command::new("umount")
                .arg("-l")
                .arg(self.base.path().join(place))
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// Mounts a tmpfs of so many MiB.
pub(crate) fn mount_small(directory: &Path, mib: u64) {
    std::fs::create_dir_all(directory).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m,mode=700"), "small"]).arg(directory);
    assert!(mount.status().unwrap().success());
}
