//! A stage for the real daemon: a directory of its own, images with the probe guest, and the daemon that is started,
//! killed and started again on it. Runs inside the namespaces that `world` makes.
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::api::{Answer, Api, text};
use crate::world::{World, groups, processes, run};

/// Longest wait for something that takes well under a second on a quiet machine.
pub(crate) const SOON: Duration = Duration::from_secs(40);

/// How often a condition outside this process is looked at.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The image whose guest counts until its button is pressed.
pub(crate) const IMAGE: &str = "beating";

/// Bytes of its disk.
const DISK_BYTES: usize = 1 << 20;

/// Memory of its servers in bytes.
pub(crate) const MEMORY_BYTES: u64 = 64 << 20;

/// How a daemon is started.
#[derive(Debug, Clone, Default)]
pub(crate) struct Orders {
    /// The checkpoint at which it kills itself: a number, or a name with a number among those of that name.
    pub(crate) die_at: Option<String>,
    /// The checkpoint at which it stops until it is told to go on.
    pub(crate) hold_at: Option<String>,
    /// Whether its commits come after what was to follow them.
    pub(crate) late_commits: bool,
    /// VMMs that it keeps ready.
    pub(crate) warm_shells: usize,
    /// Further flags.
    pub(crate) flags: Vec<String>,
}

/// What outlives a daemon, and the daemon.
pub(crate) struct Stage {
    base: tempfile::TempDir,
    bin: PathBuf,
    probe: PathBuf,
    /// A process whose network is the daemon's; the test's own when absent.
    network_of: Option<u32>,
    daemon: Mutex<Option<Child>>,
    /// The number of the copy of the daemon's program that runs: an upgrade is another file.
    edition: Mutex<u32>,
    /// What there was before any daemon.
    empty: World,
    /// Ids of servers that were made, by which their control groups are known.
    ids: Mutex<Vec<String>>,
}

/// Waits until `look` finds something; says what did not come.
pub(crate) async fn wait_for<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> Result<T, String> {
    let end = Instant::now() + SOON;
    loop {
        if let Some(found) = look().await {
            return Ok(found);
        }
        if Instant::now() > end {
            return Err(format!("{what}: not within {SOON:?}"));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

impl Stage {
    /// An empty stage. `TOFT_BIN` says where the binaries are, `TOFT_PROBE` where the probe guest is.
    pub(crate) fn new() -> Stage {
        Stage::on(None)
    }

    /// As [`Stage::new`], for a daemon in the network of this process: to others it is another host.
    pub(crate) fn on(network_of: Option<u32>) -> Stage {
        let directory = |name: &str| -> PathBuf {
            std::env::var_os(name).unwrap_or_else(|| panic!("set {name}, as scripts/test does")).into()
        };
        let (bin, probe) = (directory("TOFT_BIN"), directory("TOFT_PROBE"));
        let everyone = std::fs::Permissions::from_mode(0o755);
        // Directly below /tmp, because every user must be able to reach dnsmasq's files.
        let base = tempfile::Builder::new().prefix("toft").permissions(everyone).tempdir_in("/tmp").unwrap();
        write_image(&base.path().join("import").join(IMAGE), &probe, "beat=100");
        let mut stage = Stage {
            base,
            bin,
            probe,
            network_of,
            daemon: Mutex::default(),
            edition: Mutex::default(),
            empty: World::look(&[], &[]),
            ids: Mutex::default(),
        };
        stage.install(0);
        stage.empty = stage.look();
        stage
    }

    /// Starts a daemon on it.
    pub(crate) fn start(&self, orders: Orders) {
        let base = self.base.path();
        let log = std::fs::File::options().create(true).append(true).open(self.log_path()).expect("a log");
        let program = self.program(*lock(&self.edition));
        let mut command = match self.network_of {
            None => Command::new(program),
            Some(pid) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/proc/{pid}/ns/net")).arg(program);
                // One server may be known to both hosts, and each has a group for it.
                let group = std::env::var("TOFT_CGROUP").expect("set where tests run inside");
                command.env("TOFT_CGROUP", format!("{group}-far"));
                command
            }
        };
        command
            .arg("--state-dir")
            .arg(base.join("state"))
            .arg("--run-dir")
            .arg(base.join("run"))
            .arg("--vmm")
            .arg(self.bin.join("toft-vmm"))
            .arg("--import-dir")
            .arg(base.join("import"))
            .args(["--warm-shells", &orders.warm_shells.to_string()])
            .args(orders.flags)
            .env("TOFT_CHECKPOINTS", self.checkpoints_path())
            // The log is shown by its end, which is to be what the daemon said.
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log);
        if let Some(point) = orders.die_at {
            command.env("TOFT_DIE_AT", point);
        }
        if let Some(point) = orders.hold_at {
            command.env("TOFT_HOLD_AT", point);
        }
        if orders.late_commits {
            command.env("TOFT_LATE_COMMITS", "yes");
        }
        let _ = std::fs::remove_file(self.checkpoints_path());
        let child = command.spawn().expect("the daemon can be started");
        assert!(lock(&self.daemon).replace(child).is_none(), "one daemon at a time");
    }

    /// Starts a daemon and waits until it answers; an error says that it died before.
    pub(crate) async fn open(&self, orders: Orders) -> Result<(), ExitStatus> {
        self.start(orders);
        let end = Instant::now() + SOON;
        while self.api().read("/v1").await.is_err() {
            if let Some(status) = self.ended() {
                return Err(status);
            }
            assert!(Instant::now() < end, "the daemon does not answer:\n{}", self.log());
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// As [`Stage::open`] for a daemon that has no reason to die.
    pub(crate) async fn open_well(&self) {
        self.open_well_with(Orders::default()).await;
    }

    /// The same for one with orders of its own.
    pub(crate) async fn open_well_with(&self, orders: Orders) {
        if let Err(status) = self.open(orders).await {
            panic!("the daemon ended with {status}:\n{}", self.log());
        }
    }

    /// The daemon's end, when it has ended by itself.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        let mut daemon = lock(&self.daemon);
        let status = daemon.as_mut()?.try_wait().expect("our child")?;
        *daemon = None;
        Some(status)
    }

    /// Sends the daemon a signal and waits for its end.
    pub(crate) async fn end(&self, signal: Signal) {
        let Some(pid) = lock(&self.daemon).as_ref().map(Child::id) else { return };
        // An error means that it has ended already.
        let _ = kill(Pid::from_raw(pid as i32), signal);
        let ended = wait_for("the daemon's end", async || self.ended()).await;
        let status = ended.unwrap_or_else(|late| panic!("{late}\n{}", self.log()));
        if signal == Signal::SIGTERM {
            assert!(status.success(), "the daemon ended with {status}:\n{}", self.log());
        }
    }

    /// `kill -9`.
    pub(crate) async fn kill(&self) {
        self.end(Signal::SIGKILL).await;
    }

    /// Takes away what no restart of a host leaves: every process, and all that is made of kernel memory.
    pub(crate) async fn lose_power(&self) {
        self.kill().await;
        let all_gone = async || {
            let left = processes();
            for (pid, _) in &left {
                // That it has ended already is what was wanted.
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            left.is_empty().then_some(())
        };
        wait_for("the end of every process", all_gone).await.unwrap();
        for line in run("ip", &["-o", "link", "show", "type", "bridge"]).lines() {
            run("ip", &["link", "delete", line.split(": ").nth(1).expect("a device's name")]);
        }
        run("nft", &["flush", "ruleset"]);
        let mut groups = groups(&lock(&self.ids));
        // The innermost first.
        groups.sort_by_key(|group| std::cmp::Reverse(group.components().count()));
        for group in groups {
            // A process is among its group's for a moment after it has no command line any more.
            let removed = async || std::fs::remove_dir(&group).is_ok().then_some(());
            wait_for(&format!("the end of {}", group.display()), removed).await.unwrap();
        }
        // The run directory is on a tmpfs where Toft is installed.
        std::fs::remove_dir_all(self.base.path().join("run")).expect("the run directory");
    }

    /// Whether the daemon waits where it was ordered to.
    pub(crate) fn is_held(&self) -> bool {
        let Some(pid) = lock(&self.daemon).as_ref().map(Child::id) else { return false };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name before the state may hold anything but ends at the last bracket (proc_pid_stat(5)).
        stat.rsplit_once(") ").is_some_and(|(_, after)| after.starts_with('T'))
    }

    /// Lets a daemon that is held go on.
    pub(crate) fn release(&self) {
        if let Some(pid) = lock(&self.daemon).as_ref().map(Child::id) {
            // An error means that it has ended, which whoever waits for it finds out.
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGCONT);
        }
    }

    /// A file of the test's own.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    /// Puts another copy of the program in the place of the one that runs; the next start uses it.
    pub(crate) fn upgrade(&self) {
        let mut edition = lock(&self.edition);
        self.install(*edition + 1);
        std::fs::remove_file(self.program(*edition)).expect("the old program");
        *edition += 1;
    }

    fn install(&self, edition: u32) {
        let (from, to) = (self.bin.join("toftd"), self.program(edition));
        // A link is as good as a copy and costs no 90 MB, where both are on one file system.
        if std::fs::hard_link(&from, &to).is_err() {
            std::fs::copy(&from, &to).expect("the daemon's program");
        }
    }

    fn program(&self, edition: u32) -> PathBuf {
        self.base.path().join(format!("toftd-{edition}"))
    }

    /// The daemon's API.
    pub(crate) fn api(&self) -> Api {
        Api::new(self.base.path().join("state/run/toftd.sock"))
    }

    /// The names of the checkpoints that the latest daemon has passed.
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.checkpoints_path()).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn checkpoints_path(&self) -> PathBuf {
        self.base.path().join("checkpoints")
    }

    fn log_path(&self) -> PathBuf {
        self.base.path().join("toftd.log")
    }

    /// The end of the daemons' log.
    pub(crate) fn log(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Everything there is but the test's own files.
    pub(crate) fn look(&self) -> World {
        let base = self.base.path();
        World::look(&[base.join("state"), base.join("run")], &lock(&self.ids))
    }

    /// Waits until there is what there was, and says what is different when it does not come to that.
    pub(crate) async fn same_as(&self, before: &World) -> Result<(), String> {
        let same = async || self.differs_from(before).is_empty().then_some(());
        let outcome = wait_for("the world as before", same).await;
        outcome.map_err(|late| format!("{late}\n  {}", self.differs_from(before).join("\n  ")))
    }

    /// What is different under a daemon that lives: it has one launcher, or none before the first start.
    fn differs_from(&self, before: &World) -> Vec<String> {
        let mut differences = self.look().differs_from(before);
        differences.retain(|line| !line.ends_with(": process toft-vmm launcher (1)"));
        differences
    }

    /// VMM processes by the names of their servers.
    pub(crate) fn vmms(&self) -> BTreeMap<String, i32> {
        let machines = processes().into_iter().filter_map(|(pid, line)| {
            let (_, label) = line.split_once("machine --label ")?;
            Some((label.split(' ').next()?.to_owned(), pid))
        });
        machines.collect()
    }

    /// The process of the daemon's launcher.
    pub(crate) fn launcher(&self) -> Option<i32> {
        processes().into_iter().find(|(_, line)| line == "toft-vmm launcher").map(|(pid, _)| pid)
    }

    /// How often the guest of a server has counted since its latest boot, and how often it has booted in all.
    pub(crate) async fn beats(&self, id: &str) -> (u64, usize) {
        let answer = self.api().read(&format!("/v1/servers/{id}/console-log")).await;
        // A server that is being deleted may go between two looks.
        let Some(log) = answer.ok().and_then(|answer| answer.body.as_str().map(str::to_owned)) else {
            return (0, 0);
        };
        let boots: Vec<&str> = log.split("probe: hello").collect();
        let beat = |line: &str| line.trim().strip_prefix("probe: beat ")?.parse().ok();
        let last = boots.last().and_then(|boot| boot.lines().rev().find_map(beat));
        (last.unwrap_or(0), boots.len() - 1)
    }

    /// Imports the image and waits for it.
    pub(crate) async fn import(&self) {
        let answer = self.call(Method::POST, "/v1/images", "import", Some(import_body(IMAGE))).await;
        self.succeeded(&answer.operation()).await.unwrap();
    }

    /// Imports an image whose guest does other things: words of the probe guest.
    pub(crate) async fn import_another(&self, name: &str, words: &str) {
        write_image(&self.base.path().join("import").join(name), &self.probe, words);
        let body = json!({ "name": name, "source": { "import_directory": name } });
        let answer = self.call(Method::POST, "/v1/images", &format!("import-{name}"), Some(body)).await;
        self.succeeded(&answer.operation()).await.unwrap();
    }

    /// A mutating call that must be answered.
    pub(crate) async fn call(&self, method: Method, path: &str, key: &str, body: Option<Value>) -> Answer {
        let answer = self.api().call(method, path, Some(key), body).await;
        let answer = answer.unwrap_or_else(|gone| panic!("{path}: {gone}\n{}", self.log()));
        assert!(answer.is_ok(), "{path}: {}", answer.body);
        if let Some(id) = answer.body["resource"]["id"].as_str() {
            self.knows(id);
        }
        answer
    }

    /// Remembers a server, for its control groups.
    pub(crate) fn knows(&self, id: &str) {
        let mut ids = lock(&self.ids);
        if !ids.iter().any(|known| known == id) {
            ids.push(id.to_owned());
        }
    }

    /// Makes a server that runs; answers its id.
    pub(crate) async fn create(&self, name: &str) -> String {
        let key = format!("create-{}-{name}", lock(&self.ids).len());
        let answer = self.call(Method::POST, "/v1/servers", &key, Some(server_body(name))).await;
        self.succeeded(&answer.operation()).await.unwrap();
        text(&answer.body["resource"]["id"])
    }

    /// Waits for the end of an operation with a daemon that lives; answers the operation.
    pub(crate) async fn finished(&self, id: &str) -> Result<Value, String> {
        let end = Instant::now() + SOON;
        loop {
            let path = format!("/v1/operations/{id}?wait=10s");
            let answer = self.api().read(&path).await.map_err(|gone| format!("operation {id}: {gone}"))?;
            if answer.status != 200 {
                return Err(format!("operation {id}: {}", answer.body));
            }
            match answer.body["state"].as_str() {
                Some("succeeded" | "failed" | "cancelled") => return Ok(answer.body),
                _ if Instant::now() > end => return Err(format!("no end within {SOON:?}: {}", answer.body)),
                _ => {}
            }
        }
    }

    /// Waits for an operation that must succeed.
    pub(crate) async fn succeeded(&self, id: &str) -> Result<(), String> {
        let operation = self.finished(id).await?;
        match operation["state"].as_str() {
            Some("succeeded") => Ok(()),
            _ => Err(format!("did not succeed: {operation}")),
        }
    }

    /// Deletes everything, ends the daemon, and expects nothing to be left.
    pub(crate) async fn close(self) {
        self.clear().await;
        self.end(Signal::SIGTERM).await;
        self.left_nothing().await;
    }

    /// Deletes everything.
    pub(crate) async fn clear(&self) {
        let api = self.api();
        for (path, doomed) in [("/v1/servers", true), ("/v1/volumes", false), ("/v1/networks", true)] {
            for item in api.all(path).await {
                assert!(doomed, "{item} should have gone with its server");
                let id = text(&item["id"]);
                let answer =
                    self.call(Method::DELETE, &format!("{path}/{id}"), &format!("end-{id}"), None).await;
                self.succeeded(&answer.operation()).await.unwrap();
            }
        }
        for snapshot in api.all("/v1/snapshots").await {
            let id = text(&snapshot["id"]);
            let answer =
                self.call(Method::DELETE, &format!("/v1/snapshots/{id}"), &format!("end-{id}"), None).await;
            self.succeeded(&answer.operation()).await.unwrap();
        }
        for image in api.all("/v1/images").await {
            let id = text(&image["id"]);
            let answer =
                self.call(Method::DELETE, &format!("/v1/images/{id}"), &format!("end-{id}"), None).await;
            self.succeeded(&answer.operation()).await.unwrap();
        }
    }

    /// Expects an empty world, after the end of the daemon.
    pub(crate) async fn left_nothing(&self) {
        let left = wait_for("an empty world", async || {
            let left = self.look().differs_from(&self.empty);
            left.iter().all(|line| belongs_to_a_daemon(line)).then_some(())
        });
        if let Err(late) = left.await {
            panic!("{late}\n  {}", self.look().differs_from(&self.empty).join("\n  "));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // What else runs here ends with the namespace.
        if let Some(daemon) = lock(&self.daemon).as_mut() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if std::thread::panicking() {
            eprintln!("the daemons' log ends:\n{}", self.log());
        }
    }
}

/// What a daemon keeps when it keeps nothing: its records and its empty directories.
fn belongs_to_a_daemon(line: &str) -> bool {
    let empty = ["servers", "images", "volumes", "snapshots", "networks", "import", "run", "state"];
    let directory = empty.iter().any(|name| line.ends_with(&format!("/{name}")));
    (line.contains(": directory ") && directory)
        || line.ends_with("/state/toft.db")
        || line.ends_with("/state/run/lock")
}

/// The body of a request for a server.
pub(crate) fn server_body(name: &str) -> Value {
    json!({ "name": name, "image": IMAGE, "memory_bytes": MEMORY_BYTES })
}

/// The body of a request for an import under this name.
pub(crate) fn import_body(name: &str) -> Value {
    json!({ "name": name, "source": { "import_directory": IMAGE } })
}

/// How a process ended that a signal killed.
pub(crate) fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(Signal::SIGKILL as i32)
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
        "name": IMAGE,
        "title": "The probe guest, counting",
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
