//! A daemon of the bench's own, with a state directory of its own, in the namespaces of `scripts/bench`; and the moment
//! at which a guest says its first word.
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::client::{self, Local};
use crate::ground::Ground;

/// Longest wait for what takes well under a second.
const SOON: Duration = Duration::from_secs(60);

/// Pause between two looks at a file: short beside what is measured, long beside what a look costs. To be told by inotify
/// instead costs more: closing it waits for the kernel's readers, some 10 ms.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// Bytes of the image's disk.
const DISK_BYTES: usize = 1 << 20;

/// Memory of a server in bytes.
const MEMORY_BYTES: u64 = 64 << 20;

/// Memory that servers may have in all: more than there is, since these guests touch almost none of theirs.
const MEMORY_BYTES_ALL: u64 = 1 << 40;

/// Where the API answers to tokens, in a network namespace of the bench's own.
const PORT: u16 = 8080;

/// A daemon and what is around it; all of it goes when it goes.
pub(crate) struct Host {
    base: tempfile::TempDir,
    bin: PathBuf,
    daemon: Option<Child>,
    /// None is what the daemon does when nobody says.
    warm_shells: Option<usize>,
    /// Where it waits for other hosts, if it does, and the process whose network it has then.
    waits: Option<(SocketAddr, Option<u32>)>,
}

impl Host {
    /// A daemon that has the image, and keeps no VMM ready.
    pub(crate) fn start(ground: &Ground) -> Host {
        Host::start_as(ground, Some(0), None)
    }

    /// A daemon that has the image, and keeps so many VMMs ready.
    pub(crate) fn start_with(ground: &Ground, warm_shells: usize) -> Host {
        Host::start_as(ground, Some(warm_shells), None)
    }

    /// A daemon that has the image, and keeps ready what it does when nobody says.
    pub(crate) fn start_as_installed(ground: &Ground) -> Host {
        Host::start_as(ground, None, None)
    }

    /// A daemon that waits for other hosts at an address, of the network of a process.
    pub(crate) fn start_waiting(ground: &Ground, at: SocketAddr, network_of: Option<u32>) -> Host {
        Host::start_as(ground, Some(0), Some((at, network_of)))
    }

    fn start_as(
        ground: &Ground,
        warm_shells: Option<usize>,
        waits: Option<(SocketAddr, Option<u32>)>,
    ) -> Host {
        // Every user must be able to reach dnsmasq's files.
        let everyone = std::fs::Permissions::from_mode(0o755);
        let base = tempfile::Builder::new().prefix("toft").permissions(everyone).tempdir_in(&ground.files);
        let base = base.expect("a directory where scripts/bench says");
        let mut host = Host { base, bin: ground.binaries.clone(), daemon: None, warm_shells, waits };
        host.open();
        host.import(ground, "idle", "brief halt");
        host
    }

    /// Imports an image whose guest does what the words say.
    pub(crate) fn import(&self, ground: &Ground, name: &str, words: &str) {
        write_image(&self.base.path().join("import").join(name), &ground.probe(), words);
        let body = json!({ "name": name, "source": { "import_directory": name } });
        self.local().call("POST", "/v1/images", Some("wait=30"), Some(&body));
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) fn open(&mut self) {
        let path = |name: &str| self.base.path().join(name);
        let log = File::options().create(true).append(true).open(self.log()).expect("a log");
        let mut command = match self.waits {
            Some((_, Some(holder))) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/proc/{holder}/ns/net")).arg(self.bin.join("toftd"));
                command
            }
            _ => Command::new(self.bin.join("toftd")),
        };
        if let Some((address, _)) = self.waits {
            command.args(["--migration-listen", &address.to_string()]);
        }
        command.arg("--state-dir").arg(path("state")).arg("--run-dir").arg(path("run"));
        command.arg("--vmm").arg(self.bin.join("toft-vmm")).arg("--import-dir").arg(path("import"));
        // Other daemons of this host have their groups elsewhere, and this one's parent goes with its last server.
        command.arg("--cgroup").arg(self.base.path().file_name().expect("a name"));
        if let Some(number) = self.warm_shells {
            command.args(["--warm-shells", &number.to_string()]);
        }
        command.args(["--memory-bytes", &MEMORY_BYTES_ALL.to_string()]);
        command.args(["--listen", &self.address().to_string()]);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        self.daemon = Some(command.spawn().expect("the daemon can be started"));
        let end = Instant::now() + SOON;
        while UnixStream::connect(self.socket()).is_err() {
            let ended = self.daemon.as_mut().expect("started").try_wait().expect("our child");
            assert!(ended.is_none() && Instant::now() < end, "the daemon does not answer:\n{}", self.told());
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// `kill -9` of the daemon; servers run on.
    pub(crate) fn kill(&mut self) {
        self.end(Signal::SIGKILL);
    }

    fn end(&mut self, signal: Signal) {
        if let Some(mut daemon) = self.daemon.take() {
            // An error means that it has ended already.
            let _ = kill(Pid::from_raw(daemon.id() as i32), signal);
            daemon.wait().expect("our child");
        }
    }

    /// Deletes every server, by some callers at once.
    fn delete_all(&self) {
        loop {
            let list = self.local().call("GET", "/v1/servers?limit=100", None, None);
            let ids: Vec<&Value> = list["items"].as_array().into_iter().flatten().collect();
            if ids.is_empty() {
                return;
            }
            std::thread::scope(|scope| {
                for part in ids.chunks(ids.len().div_ceil(DELETERS)) {
                    scope.spawn(move || {
                        let mut client = self.local();
                        for server in part {
                            let path = format!("/v1/servers/{}", server["id"].as_str().expect("an id"));
                            client.call("DELETE", &path, Some("wait=30"), None);
                        }
                    });
                }
            });
        }
    }

    /// A client with the daemon's user.
    pub(crate) fn local(&self) -> Local {
        client::local(&self.socket())
    }

    /// Where holders of tokens are answered.
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], PORT))
    }

    /// A new token's secret.
    pub(crate) fn token(&self) -> String {
        let mut command = Command::new(self.bin.join("toftd"));
        command.arg("--state-dir").arg(self.base.path().join("state")).args(["token", "create", "bench"]);
        let output = command.output().expect("toftd can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("text");
        let secret = text.split_whitespace().find(|word| word.starts_with("toft_"));
        secret.expect("a secret").to_owned()
    }

    /// A figure of the daemon's process from /proc/<pid>/status, in KiB.
    pub(crate) fn status_kb(&self, name: &str) -> f64 {
        let pid = self.daemon.as_ref().expect("a daemon that runs").id();
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process that lives");
        let line = text.lines().find(|line| line.starts_with(name)).expect("a line of this name");
        line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number")
    }

    /// How often the daemons' log has this text.
    pub(crate) fn log_count(&self, text: &str) -> usize {
        std::fs::read_to_string(self.log()).unwrap_or_default().matches(text).count()
    }

    /// The end of the daemons' log.
    pub(crate) fn told(&self) -> String {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// The last line of the daemons' log with this text.
    pub(crate) fn told_of(&self, text: &str) -> Option<String> {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        log.lines().rev().find(|line| line.contains(text)).map(str::to_owned)
    }

    /// What the guest of a server has written to its console.
    pub(crate) fn console(&self, id: &str) -> String {
        let ring = File::open(self.ring(id)).and_then(wire::console::Ring::open);
        let piece = ring.and_then(|mut ring| ring.read(0, 1 << 20));
        piece.map(|piece| String::from_utf8_lossy(&piece.data).into_owned()).unwrap_or_default()
    }

    /// Where that lies.
    pub(crate) fn ring(&self, id: &str) -> PathBuf {
        self.base.path().join("state/servers").join(id).join("console.ring")
    }

    /// Where the files of a snapshot lie.
    pub(crate) fn snapshot(&self, id: &str) -> PathBuf {
        self.base.path().join("state/snapshots").join(id)
    }

    fn log(&self) -> PathBuf {
        self.base.path().join("toftd.log")
    }

    fn socket(&self) -> PathBuf {
        self.base.path().join("state/run/toftd.sock")
    }

    /// What the guest of a server has written to its console.
    pub(crate) fn console_log(&self, id: &str) -> String {
        self.local().text(&format!("/v1/servers/{id}/console-log"))
    }

    /// What the memory control group of a server that was started on no shell is charged, in KiB.
    pub(crate) fn charged_kb(&self, id: &str) -> Option<f64> {
        let parent = self.base.path().file_name().expect("a name");
        let files =
            [("/sys/fs/cgroup/memory", "memory.usage_in_bytes"), ("/sys/fs/cgroup", "memory.current")];
        let text = files.iter().find_map(|(root, file)| {
            std::fs::read_to_string(Path::new(root).join(parent).join(id).join(file)).ok()
        });
        Some(text?.trim().parse::<f64>().ok()? / 1024.0)
    }

    /// Waits until the guest of a server has written to its console.
    pub(crate) fn first_word(&self, id: &str) {
        let path = self.ring(id);
        let end = Instant::now() + SOON;
        let mut ring = None;
        loop {
            if ring.is_none() {
                ring = File::open(&path).ok();
            }
            if ring.as_ref().is_some_and(|ring| written(ring) > 0) {
                return;
            }
            assert!(Instant::now() < end, "server {id} says nothing:\n{}", self.told());
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Drop for Host {
    /// Servers would outlive their daemon, and be in the way of what is measured next.
    fn drop(&mut self) {
        // On a thread of its own, because its panic must not meet one that is under way.
        let deleted = std::thread::scope(|scope| scope.spawn(|| self.delete_all()).join());
        if deleted.is_err() {
            eprintln!("bench: servers are left behind in {}", self.base.path().display());
        }
        self.end(Signal::SIGTERM);
    }
}

/// Callers that delete at once.
const DELETERS: usize = 4;

/// Bytes that the ring has had, as its header says; none while it is being made.
fn written(ring: &File) -> u64 {
    let mut bytes = [0; 8];
    match ring.read_exact_at(&mut bytes, 16) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => 0,
    }
}

/// The body of a request for a server.
pub(crate) fn server(name: &str) -> Value {
    json!({ "name": name, "image": "idle", "memory_bytes": MEMORY_BYTES })
}

/// The id of what an answer is about.
pub(crate) fn id(answer: &Value) -> String {
    answer["resource"]["id"].as_str().unwrap_or_else(|| panic!("no resource in {answer}")).to_owned()
}

fn write_image(directory: &Path, probe: &Path, words: &str) {
    std::fs::create_dir_all(directory).expect("the import directory");
    let part = |name: &str, bytes: &[u8]| {
        std::fs::write(directory.join(name), bytes).expect("an image's file");
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let kernel = std::fs::read(probe).expect("the probe guest");
    let mut disk = vec![0; DISK_BYTES];
    disk[..4].copy_from_slice(b"disk");
    let manifest = json!({
        "format_version": 1,
        "name": "idle",
        "title": "The probe guest, halted",
        "architecture": "x86_64",
        "disk": { "file": "root.raw", "format": "raw", "size_bytes": DISK_BYTES, "sha256": part("root.raw", &disk) },
        "kernel": { "file": "kernel", "sha256": part("kernel", &kernel) },
        "cmdline": words,
        "min_memory_bytes": MEMORY_BYTES,
        "min_disk_bytes": DISK_BYTES,
        "default_user": "root",
    });
    std::fs::write(directory.join("image.json"), manifest.to_string()).expect("the manifest");
}
