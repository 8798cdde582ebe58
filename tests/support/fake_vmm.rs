//! VMMs without KVM: each is a thread that speaks the real control protocol over the real listener it is given,
//! with a guest that does what the test says. They live on when the daemon that started them has gone.
//! Included by `#[path]` in tests of rooms above `vmms`; it needs no privilege.
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use host::vmms::{Finding, Launch, Process, ProcessId, Start};
use host::{Error, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Whence, lseek};
use sha2::{Digest as _, Sha256};
use sys::seqpacket::Listener;
use tokio::sync::watch;
use wire::channel::Channel;
use wire::console::Ring;
use wire::control::{
    Command, DiskStats, Fault, FaultCode, MachineState, MachineStats, Message, NicStats, Notice, PROTOCOL,
    PROTOCOL_OF_BASES, PROTOCOL_SETTLES, Reply, Request, Sandbox, VcpuStats,
};
use wire::copies::{CopyReport, CopySpec, CopyStatus};
use wire::isolation::Item;
use wire::launch::{CpuReport, ExitStatus, KvmReport, LinuxSupport, ShownCpu};
use wire::machine::{CpuTemplate, FdIndex, MachineSpec, RateLimits};
use wire::migration::{MigrationStatus, Owner, Phase, ReceiveSpec, Side};
use wire::saved::form::{self, Section};
use wire::saved::{Digest, MemoryUse, RestoreSpec, SaveReport, SaveSpec, SaveStatus, Then, WriteDelay};
use wire::settling::{MemoryStatus, SettleStage, Settling};
use wire::will::{Reason, Will};

#[path = "fake_memory.rs"]
mod fake_memory;
#[path = "fake_move.rs"]
mod fake_move;

use fake_memory::{Memory, SaveFiles};

/// What the guests of new machines do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Guest {
    /// Boots, says so on the console, powers off when the button is pressed.
    #[default]
    Obeys,
    /// As [`Guest::Obeys`], but does nothing when the button is pressed.
    IgnoresButton,
    /// Powers off as soon as it has booted.
    PowersOff,
    /// Its kernel crashes as soon as it has booted.
    Panics,
    /// The VMM refuses to build its machine.
    CannotBoot,
    /// The VMM dies of a signal while it builds the machine.
    DiesAtBoot,
    /// The devices do not drain, so it cannot be paused.
    CannotPause,
    /// A machine that has come cannot be let run.
    CannotArrive,
    /// Its memory cannot be saved.
    CannotSave,
    /// Its disks are saved onto a disk that is full.
    CannotCopy,
    /// The saving of its memory comes to no end.
    SavesForEver,
    /// The VMM keeps what it has saved open.
    KeepsSaved,
    /// The VMM was started by a version that saves all of memory, whatever was saved before.
    KnowsNoBase,
    /// Its VMM is of a build that settles no memory.
    SettlesNothing,
    /// Its serial port takes no input.
    Deaf,
    /// It cannot be handed to another VMM.
    CannotHandOver,
}

/// Starts VMMs that are threads. Share one among the daemons of a test: it plays the kernel's part.
#[derive(Clone, Default)]
pub struct FakeLaunch {
    kernel: Arc<Kernel>,
}

/// No two hosts of a test have the same.
static PIDS: AtomicI32 = AtomicI32::new(0);

#[derive(Default)]
struct Kernel {
    saves: AtomicI32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    guest: Guest,
    boot: u32,
    /// When present, no VMM can be started, for this reason.
    trouble: Option<Error>,
    vmms: BTreeMap<i32, Arc<FakeVmm>>,
    /// By the key of their cell.
    oom_kills: BTreeMap<String, u64>,
    /// Walls that the host cannot build, and why.
    lacks: BTreeMap<Item, String>,
    build: Option<String>,
    /// How fast the time stamp counters of its guests run.
    tsc_khz: Option<u32>,
    /// What its guests can see of the processor beside what every one has.
    features: BTreeSet<String>,
    death: Option<Death>,
    launcher_dies: Option<Error>,
    untold: Option<Arc<FakeVmm>>,
    violations: Vec<String>,
}

/// How its memory is settled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Settles {
    /// In a few looks.
    #[default]
    Soon,
    /// It comes to no end.
    Never,
    /// Its devices do not drain for a piece of it.
    Cannot,
    /// In a few looks, but the VMM closes its connection at so many of them instead.
    Shy(u32),
    /// It is never said how it goes.
    Mute,
}

/// Where a VMM dies in a handover: of which side, as it enters which phase, and whether it has told of that.
pub type Death = (Side, Phase, bool);

/// One VMM.
pub struct FakeVmm {
    /// Its number; above every number that Linux gives to a process.
    pub pid: i32,
    /// What it was started as.
    pub label: String,
    /// The key of its cell.
    pub cage: String,
    boot: u32,
    build: String,
    wake: UnixStream,
    ended: watch::Sender<Option<Option<ExitStatus>>>,
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    orders: Vec<Order>,
    state: Option<MachineState>,
    spec: Option<MachineSpec>,
    disk: Option<(u64, u64)>,
    disks: Vec<File>,
    taps: Vec<OwnedFd>,
    /// Its disk while it is handed from one to the other.
    handed: Option<(u64, u64)>,
    has_booted: bool,
    death: Option<Death>,
    typed: Vec<u8>,
    limits: BTreeMap<u16, RateLimits>,
    nic_limits: BTreeMap<u16, (RateLimits, RateLimits)>,
    resets: u64,
    presses: u32,
    save: Option<SaveStatus>,
    /// How a copy of its disks stands: a look finds that it is at its end, unless it never is.
    copy: Option<CopyStatus>,
    /// How often it was asked how a save goes.
    save_looks: u32,
    kept: Vec<File>,
    restored: Option<MemoryUse>,
    memory: Memory,
    sandbox: Sandbox,
    /// Which guest its machine has.
    life: u64,
    moving: Option<MigrationStatus>,
    moves_paused: bool,
    /// What it was told that its server is called.
    shown_as: Option<String>,
    /// Requests that it has left without an answer, once it gives none.
    unanswered: Option<u32>,
    /// How much of its memory is others', in quarters, and how the settling of it stands: each look finds a quarter done.
    shared_quarters: u64,
    /// What its disks were made from, where they need that, and how much of them is in there, in quarters.
    backings: Vec<Option<File>>,
    disk_quarters: u64,
    settling: Option<SettleStage>,
    settles: Settles,
    /// Of its move.
    streams: Vec<UnixStream>,
    violations: Vec<String>,
}

enum Order {
    Kill,
    HangUp,
    End(Reason),
    Print(Vec<u8>),
    Notice(Notice),
}

impl Inside {
    /// Bytes of the files that its disks were made from.
    fn backed_bytes(&self) -> u64 {
        self.backings.iter().flatten().filter_map(|file| file.metadata().ok()).map(|found| found.len()).sum()
    }

    /// Copies what its disks have in other files into their own.
    fn fill_disks(&mut self) {
        self.disk_quarters = 0;
        for (own, backing) in self.disks.iter().zip(self.backings.drain(..)) {
            if let Some(backing) = backing {
                fill(own, &backing);
            }
        }
    }

    /// Copies disks as they are now.
    fn copy_disks(&mut self, spec: &CopySpec, descriptors: Vec<OwnedFd>) -> std::io::Result<()> {
        let files: Vec<File> = descriptors.into_iter().map(File::from).collect();
        for copy in &spec.disks {
            let (target, at) = (&files[usize::from(copy.file.0)], usize::from(copy.disk));
            assert!(target.metadata()?.len() >= self.disks[at].metadata()?.len());
            // What its own file has lies over the rest.
            fill(target, &self.disks[at]);
            if let Some(Some(backing)) = self.backings.get(at) {
                fill(target, backing);
            }
        }
        self.copy = Some(CopyStatus::Copying { done_bytes: 0, total_bytes: 2 });
        Ok(())
    }
}

/// Copies what has data in one file and has none in the other, block by block.
fn fill(own: &File, backing: &File) {
    let mut block = [0; 4096];
    let mut from = 0;
    while let Ok(start) = lseek(backing, from, Whence::SeekData) {
        let at = start as u64 / 4096 * 4096;
        let read = backing.read_at(&mut block, at).expect("what a disk was made from");
        // A hole has no data before the next block.
        let data = lseek(own, at as i64, Whence::SeekData);
        if data.map_or(true, |data| data as u64 >= at + block.len() as u64) {
            own.write_all_at(&block[..read], at).expect("room for a disk");
        }
        from = at as i64 + 4096;
    }
}
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeLaunch {
    /// What guests of machines that are started from here on do.
    pub fn set_guest(&self, guest: Guest) {
        lock(&self.kernel.state).guest = guest;
    }

    /// From here on no VMM can be started, for this reason; or again.
    pub fn set_trouble(&self, trouble: Option<Error>) {
        lock(&self.kernel.state).trouble = trouble;
    }

    /// The launcher starts one more VMM and dies before it has said so, which is told as this.
    pub fn let_launcher_die(&self, cause: Error) {
        lock(&self.kernel.state).launcher_dies = Some(cause);
    }

    /// The VMM that a launcher died of starting.
    pub fn untold(&self) -> Option<Arc<FakeVmm>> {
        lock(&self.kernel.state).untold.clone()
    }

    /// The host cannot build this wall.
    pub fn set_lacking(&self, item: Item, why: &str) {
        lock(&self.kernel.state).lacks.insert(item, why.to_owned());
    }

    /// VMMs that are started from here on are of this build.
    pub fn set_build(&self, build: &str) {
        lock(&self.kernel.state).build = Some(build.to_owned());
    }

    /// Every VMM dies where that is said, in its next handover.
    pub fn set_death(&self, death: Option<Death>) {
        lock(&self.kernel.state).death = death;
        self.alive().iter().for_each(|vmm| lock(&vmm.inside).death = death);
    }

    fn build_now(state: &State) -> String {
        state.build.clone().unwrap_or_else(|| "fake".to_owned())
    }

    /// The kernel ends this VMM, because its memory ran out.
    pub fn run_out_of_memory(&self, vmm: &FakeVmm) {
        lock(&self.kernel.state).oom_kills.insert(vmm.cage.clone(), 1);
        vmm.kill();
    }

    /// Every VMM that lives.
    pub fn alive(&self) -> Vec<Arc<FakeVmm>> {
        let state = lock(&self.kernel.state);
        state.vmms.values().filter(|vmm| vmm.ended.borrow().is_none()).cloned().collect()
    }

    /// Those that live and are kept ready for a server.
    pub fn shells(&self) -> Vec<Arc<FakeVmm>> {
        self.alive().into_iter().filter(|vmm| vmm.is_shell()).collect()
    }

    /// Those that live and are servers'.
    pub fn of_servers(&self) -> Vec<Arc<FakeVmm>> {
        self.alive().into_iter().filter(|vmm| !vmm.is_shell()).collect()
    }

    /// The only VMM of a server that lives.
    pub fn only(&self) -> Arc<FakeVmm> {
        let alive = self.of_servers();
        assert_eq!(alive.len(), 1, "one VMM should live");
        alive[0].clone()
    }

    /// From now on the host's probe finds that guests' time stamp counters run at this speed, in thousands of ticks a second.
    pub fn ticks_at(&self, khz: u32) {
        lock(&self.kernel.state).tsc_khz = Some(khz);
    }

    /// From now on the host's probe finds a processor with these features, beside `lm` and `smep`.
    pub fn shows(&self, features: &[&str]) {
        lock(&self.kernel.state).features = features.iter().copied().map(str::to_owned).collect();
    }

    /// What must never happen and did, such as two machines on one disk.
    pub fn violations(&self) -> Vec<String> {
        let state = lock(&self.kernel.state);
        let of_vmms = state.vmms.values().flat_map(|vmm| lock(&vmm.inside).violations.clone());
        state.violations.iter().cloned().chain(of_vmms).collect()
    }

    /// The host loses power: every VMM is gone without a word, and the kernel has another boot id.
    pub async fn power_cycle(&self) {
        let vmms = self.alive();
        lock(&self.kernel.state).boot += 1;
        for vmm in vmms {
            vmm.kill();
            vmm.wait_for_end().await;
        }
    }

    fn boot_id_of(boot: u32) -> String {
        format!("fake-boot-{boot}")
    }

    fn start(&self, start: Start) -> Result<Arc<FakeVmm>> {
        let failed = |cause: std::io::Error| Error::internal("a fake VMM cannot be started", cause);
        let (wake, woken) = UnixStream::pair().map_err(failed)?;
        wake.set_nonblocking(true).map_err(failed)?;
        let mut state = lock(&self.kernel.state);
        if let Some(trouble) = &state.trouble {
            return Err(trouble.clone());
        }
        let pid = i32::MAX - PIDS.fetch_add(1, Ordering::Relaxed);
        let vmm = Arc::new(FakeVmm {
            pid,
            label: start.label,
            cage: start.cell.key,
            boot: state.boot,
            build: FakeLaunch::build_now(&state),
            wake,
            ended: watch::Sender::new(None),
            inside: Mutex::new(Inside {
                state: Some(MachineState::Shell),
                death: state.death,
                ..Inside::default()
            }),
        });
        state.vmms.insert(pid, vmm.clone());
        let running = Running {
            vmm: vmm.clone(),
            kernel: self.kernel.clone(),
            guest: state.guest,
            listener: Listener::from(start.listener),
            woken,
            will: start.will,
            log: start.log,
            connections: Vec::new(),
            ring: None,
            is_unbegun: false,
            armed: None,
            saves_still: false,
        };
        std::thread::spawn(move || running.run());
        Ok(vmm)
    }
}

impl Launch for FakeLaunch {
    fn check(&self) -> Result<()> {
        lock(&self.kernel.state).trouble.clone().map_or(Ok(()), Err)
    }

    fn spawn(&self, start: Start) -> BoxFuture<'_, Result<Arc<dyn Process>>> {
        async move {
            let vmm = self.start(start)?;
            let dies = lock(&self.kernel.state).launcher_dies.take();
            match dies {
                Some(cause) => {
                    lock(&self.kernel.state).untold = Some(vmm);
                    Err(cause)
                }
                None => Ok(vmm as Arc<dyn Process>),
            }
        }
        .boxed()
    }

    fn sweep(&self, prefix: &str, kept: &HashSet<String>) -> Result<()> {
        for vmm in self.alive() {
            if vmm.cage.starts_with(prefix) && !kept.contains(&vmm.cage) {
                vmm.kill();
                // As the real one, which cannot remove a group before.
                while vmm.ended.borrow().is_none() {
                    std::thread::yield_now();
                }
            }
        }
        Ok(())
    }

    fn adopt(&self, id: &ProcessId) -> Result<Option<Arc<dyn Process>>> {
        let state = lock(&self.kernel.state);
        let found = state.vmms.get(&id.pid).filter(|vmm| vmm.ended.borrow().is_none() && vmm.id() == *id);
        Ok(found.map(|vmm| vmm.clone() as Arc<dyn Process>))
    }

    fn boot_id(&self) -> Result<String> {
        Ok(FakeLaunch::boot_id_of(lock(&self.kernel.state).boot))
    }

    fn release(&self, key: &str) -> Result<()> {
        lock(&self.kernel.state).oom_kills.remove(key);
        Ok(())
    }

    fn oom_kills(&self, key: &str) -> u64 {
        lock(&self.kernel.state).oom_kills.get(key).copied().unwrap_or_default()
    }

    fn examine(
        &self,
        _: &ProcessId,
        _: &str,
        sandbox: Option<Sandbox>,
        _: &[PathBuf],
    ) -> Result<Vec<Finding>> {
        let lacks = lock(&self.kernel.state).lacks.clone();
        let found = |item: &Item| lacks.get(item).cloned().map_or_else(|| Ok(format!("{sandbox:?}")), Err);
        Ok(Item::ALL.into_iter().map(|item| Finding { item, found: found(&item) }).collect())
    }

    fn build(&self) -> BoxFuture<'_, Result<String>> {
        async { Ok(FakeLaunch::build_now(&lock(&self.kernel.state))) }.boxed()
    }

    fn probe(&self) -> BoxFuture<'_, Result<KvmReport>> {
        async {
            self.check()?;
            let more = lock(&self.kernel.state).features.clone();
            let features = more.into_iter().chain(["lm", "smep"].map(str::to_owned)).collect();
            Ok(KvmReport {
                api_version: 12,
                extensions: vec![("KVM_CAP_IRQFD".to_owned(), 1)],
                missing: Vec::new(),
                linux: LinuxSupport::No("a fake runs no guest".to_owned()),
                kernel_mode_ips: 1_000_000,
                exit_ns: 10_000,
                landlock_abi: 4,
                tsc_khz: lock(&self.kernel.state).tsc_khz,
                cpu: CpuReport {
                    vendor: "FakeVendor".to_owned(),
                    shown: vec![ShownCpu { template: CpuTemplate::Host, features }],
                    protections: ["smep".to_owned()].into(),
                },
            })
        }
        .boxed()
    }
}

impl Process for FakeVmm {
    fn build(&self) -> Option<String> {
        Some(self.build.clone())
    }

    fn id(&self) -> ProcessId {
        ProcessId { pid: self.pid, start_ticks: 1, boot_id: FakeLaunch::boot_id_of(self.boot) }
    }

    fn kill(&self) -> Result<()> {
        FakeVmm::kill(self);
        Ok(())
    }

    fn ended(&self) -> BoxFuture<'_, Option<ExitStatus>> {
        async move {
            let mut ended = self.ended.subscribe();
            match ended.wait_for(Option::is_some).await {
                Ok(status) => status.flatten(),
                Err(_) => None,
            }
        }
        .boxed()
    }
}

impl FakeVmm {
    /// Ends it as SIGKILL does: no will, no word.
    pub fn kill(&self) {
        self.order(Order::Kill);
    }

    /// Whether it has no machine and was started for no server.
    fn is_shell(&self) -> bool {
        self.cage.starts_with("shell-") && self.state() == MachineState::Shell
    }

    /// Ends its machine for this reason, as the guest or a bug would.
    pub fn end(&self, reason: Reason) {
        self.order(Order::End(reason));
    }

    /// From here on it says this of the walls that it put around itself.
    pub fn set_sandbox(&self, sandbox: Sandbox) {
        lock(&self.inside).sandbox = sandbox;
    }

    /// What `ps` would show.
    pub fn shown_as(&self) -> String {
        lock(&self.inside).shown_as.clone().unwrap_or_else(|| self.label.clone())
    }

    /// It closes every connection.
    pub fn hang_up(&self) {
        self.order(Order::HangUp);
    }

    /// How often it was asked how a save goes.
    pub fn save_looks(&self) -> u32 {
        lock(&self.inside).save_looks
    }

    /// From here on it does nothing that it is told, and answers nobody. It closes every connection.
    pub fn fall_silent(&self) {
        lock(&self.inside).unanswered = Some(0);
        self.order(Order::HangUp);
    }

    /// Requests that it has left without an answer.
    pub fn unanswered(&self) -> u32 {
        lock(&self.inside).unanswered.unwrap_or_default()
    }

    /// The guest writes on its console.
    pub fn print(&self, text: &str) {
        self.order(Order::Print(text.as_bytes().to_vec()));
    }

    /// The VMM says something unasked.
    pub fn say(&self, notice: Notice) {
        self.order(Order::Notice(notice));
    }

    /// Its guest resets the machine, which has other memory then.
    pub fn reset_itself(&self) {
        let resets = {
            let mut inside = lock(&self.inside);
            (inside.shared_quarters, inside.settling) = (0, None);
            inside.resets += 1;
            inside.resets
        };
        self.say(Notice::Booted { resets });
    }

    /// Waits until it has ended.
    pub async fn wait_for_end(&self) {
        let mut ended = self.ended.subscribe();
        let _ = ended.wait_for(Option::is_some).await;
    }

    /// What its machine does.
    pub fn state(&self) -> MachineState {
        lock(&self.inside).state.unwrap_or(MachineState::Exiting)
    }

    /// The machine it was told to build.
    pub fn spec(&self) -> Option<MachineSpec> {
        lock(&self.inside).spec.clone()
    }

    /// What was typed on its console.
    pub fn typed(&self) -> Vec<u8> {
        lock(&self.inside).typed.clone()
    }

    /// Limits that were set live, by disk.
    pub fn disk_limits(&self) -> BTreeMap<u16, RateLimits> {
        lock(&self.inside).limits.clone()
    }

    /// Limits that were set live, to and from the guest, by interface.
    pub fn nic_limits(&self) -> BTreeMap<u16, (RateLimits, RateLimits)> {
        lock(&self.inside).nic_limits.clone()
    }

    /// Times its machine was built again.
    pub fn resets(&self) -> u64 {
        lock(&self.inside).resets
    }

    /// Whether its machine began in it.
    pub fn has_booted(&self) -> bool {
        lock(&self.inside).has_booted
    }

    /// Whether its machine is one that was saved.
    pub fn is_restored(&self) -> bool {
        self.restored_how().is_some()
    }

    /// From here on its memory is settled so.
    pub fn set_settles(&self, settles: Settles) {
        lock(&self.inside).settles = settles;
    }

    /// Whether its memory is being settled.
    pub fn is_settling(&self) -> bool {
        lock(&self.inside).settling == Some(SettleStage::UnderWay)
    }

    /// How much of its memory is others', in quarters.
    pub fn shared_quarters(&self) -> u64 {
        lock(&self.inside).shared_quarters
    }

    /// What became of the memory that its machine was saved with, if it was.
    pub fn restored_how(&self) -> Option<MemoryUse> {
        lock(&self.inside).restored
    }

    /// Writes to its memory: a page of one byte.
    pub fn write_page(&self, page: u64, value: u8) {
        lock(&self.inside).memory.insert(page, value);
    }

    /// The byte of every page that was written.
    pub fn pages(&self) -> BTreeMap<u64, u8> {
        lock(&self.inside).memory.clone()
    }

    /// Times its power button was pressed.
    pub fn presses(&self) -> u32 {
        lock(&self.inside).presses
    }

    /// Changes what its machine does.
    fn turn(&self, inside: &mut Inside, to: MachineState) {
        if inside.state.is_none() {
            return;
        }
        inside.state = Some(to);
        match to {
            MachineState::Running => {
                if let Some(other) = fake_move::runs(inside.life, self.pid) {
                    inside.violations.push(format!("VMMs {other} and {} run the same guest", self.pid));
                }
            }
            _ => fake_move::stands(inside.life, self.pid),
        }
    }

    fn order(&self, order: Order) {
        lock(&self.inside).orders.push(order);
        // A thread that has ended needs no waking, nor one that has not heard of earlier orders yet.
        let _ = (&self.wake).write_all(&[1]);
    }
}

/// The thread's own.
struct Running {
    vmm: Arc<FakeVmm>,
    kernel: Arc<Kernel>,
    guest: Guest,
    listener: Listener,
    woken: UnixStream,
    will: File,
    log: File,
    connections: Vec<Connection>,
    ring: Option<Ring>,
    /// Whether the machine has yet to run.
    is_unbegun: bool,
    /// Files of a save that waits for its moment.
    armed: Option<SaveFiles>,
    /// Whether a save is under way that needs it to stand still.
    saves_still: bool,
}

struct Connection {
    channel: Channel,
    watching: Option<u64>,
}

/// How a VMM ends.
struct Ended(Option<ExitStatus>);

impl Running {
    fn run(mut self) {
        let _ = writeln!(self.log, "fake VMM {} of {}", self.vmm.pid, self.vmm.label);
        let Ended(status) = loop {
            if let Err(ended) = self.turn() {
                break ended;
            }
        };
        {
            let mut inside = lock(&self.vmm.inside);
            fake_move::stands(inside.life, self.vmm.pid);
            inside.state = None;
            inside.disk = None;
            inside.disks.clear();
            inside.backings.clear();
            inside.taps.clear();
        }
        self.vmm.shut_streams();
        let Running { vmm, listener, connections, .. } = self;
        // As the kernel does: descriptors close before anybody hears that the process has gone.
        drop((listener, connections));
        vmm.ended.send_replace(Some(status));
    }

    fn turn(&mut self) -> std::result::Result<(), Ended> {
        let (woken, knocking, speaking) = self.wait();
        if woken {
            let mut drain = [0; 64];
            let _ = self.woken.read(&mut drain);
            let orders = std::mem::take(&mut lock(&self.vmm.inside).orders);
            for order in orders {
                self.carry_out(order)?;
            }
            // Its connections may be others.
            return Ok(());
        }
        if knocking && let Ok(socket) = self.listener.accept() {
            self.connections.push(Connection { channel: Channel::new(socket), watching: None });
        }
        for at in speaking.into_iter().rev() {
            match self.connections[at].channel.receive::<Request>() {
                Ok(Some((request, descriptors))) => self.answer(at, request, descriptors)?,
                Ok(None) | Err(_) => drop(self.connections.remove(at)),
            }
        }
        Ok(())
    }

    fn wait(&self) -> (bool, bool, Vec<usize>) {
        let mut polled = vec![
            PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        polled.extend(self.connections.iter().map(|one| PollFd::new(one.channel.as_fd(), PollFlags::POLLIN)));
        let _ = poll(&mut polled, PollTimeout::NONE);
        let ready = |one: &PollFd<'_>| one.any().unwrap_or(false);
        let speaking =
            polled[2..].iter().enumerate().filter(|(_, one)| ready(one)).map(|(at, _)| at).collect();
        (ready(&polled[0]), ready(&polled[1]), speaking)
    }

    fn carry_out(&mut self, order: Order) -> std::result::Result<(), Ended> {
        match order {
            Order::Kill => return Err(Ended(Some(ExitStatus::Signal(9)))),
            Order::HangUp => self.connections.clear(),
            Order::End(reason) => return Err(self.end(reason)),
            Order::Print(text) => self.print(&text),
            Order::Notice(notice) => self.tell(&notice),
        }
        Ok(())
    }

    fn end(&mut self, reason: Reason) -> Ended {
        let at_unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let code = if matches!(reason, Reason::Crashed(_)) { 1 } else { 0 };
        lock(&self.vmm.inside).state = Some(MachineState::Exiting);
        let _ = Will { reason: reason.clone(), at_unix_ms }.write(&self.will);
        self.tell(&Notice::Exiting(reason));
        Ended(Some(ExitStatus::Code(code)))
    }

    fn tell(&self, notice: &Notice) {
        for connection in &self.connections {
            let _ = connection.channel.send(&Message::Notice(notice.clone()), &[]);
        }
    }

    fn print(&mut self, text: &[u8]) {
        let Some(Ok(written)) = self.ring.as_mut().map(|ring| ring.append(text)) else { return };
        for connection in &mut self.connections {
            if connection.watching.is_some_and(|seen| written > seen) {
                connection.watching = None;
                let notice = Message::Notice(Notice::Console { written });
                let _ = connection.channel.send(&notice, &[]);
            }
        }
    }

    fn answer(
        &mut self,
        at: usize,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> std::result::Result<(), Ended> {
        if let Some(unanswered) = &mut lock(&self.vmm.inside).unanswered {
            *unanswered += 1;
            return Ok(());
        }
        let id = request.id;
        let mut follows = Ok(());
        let mut handles: Vec<OwnedFd> = Vec::new();
        let result = match request.command {
            Command::Hello { .. } => Ok(Reply::Hello {
                protocol: match self.guest {
                    Guest::KnowsNoBase => PROTOCOL_OF_BASES - 1,
                    Guest::SettlesNothing => PROTOCOL_SETTLES - 1,
                    _ => PROTOCOL,
                },
                version: "fake".to_owned(),
                state: self.vmm.state(),
                console_written: self.ring.as_ref().map_or(0, Ring::written),
                sandbox: lock(&self.vmm.inside).sandbox,
            }),
            Command::Label { label } => {
                lock(&self.vmm.inside).shown_as = Some(label);
                Ok(Reply::Done)
            }
            Command::Prepare(_) => Ok(Reply::Done),
            Command::Boot(spec) => {
                let built = self.build(*spec, descriptors);
                built.and_then(|()| {
                    let (begun, ended) = self.begin();
                    follows = ended;
                    begun
                })
            }
            Command::Build(spec) => self.build(*spec, descriptors).map(|()| Reply::Done),
            Command::Resume if self.is_unbegun => {
                let (begun, ended) = self.begin();
                follows = ended;
                begun
            }
            Command::Pause | Command::Park if self.guest == Guest::CannotPause => {
                Err(Fault { code: FaultCode::Timeout, detail: "disk0 did not drain".to_owned() })
            }
            Command::Pause | Command::Park => {
                let turned = self.turn_to(MachineState::Paused);
                if let Some(files) = self.armed.take() {
                    self.write_save(files);
                }
                turned
            }
            Command::Resume if self.saves_still => {
                let detail = "memory is being saved".to_owned();
                Err(Fault { code: FaultCode::WrongState, detail })
            }
            Command::Resume => self.turn_to(MachineState::Running),
            Command::PressPowerButton => {
                lock(&self.vmm.inside).presses += 1;
                if !matches!(self.guest, Guest::IgnoresButton) && self.vmm.state() == MachineState::Running {
                    follows = Err(());
                }
                Ok(Reply::Done)
            }
            Command::Reset => {
                let resets = {
                    let mut inside = lock(&self.vmm.inside);
                    inside.resets += 1;
                    (inside.shared_quarters, inside.settling) = (0, None);
                    inside.resets
                };
                self.tell(&Notice::Booted { resets });
                Ok(Reply::Done)
            }
            Command::Quit => {
                self.reply(at, id, Ok(Reply::Done));
                return Err(self.end(Reason::Asked));
            }
            Command::Stats => Ok(Reply::Stats(Box::new(self.stats()))),
            Command::WatchConsole { seen } => {
                self.connections[at].watching = Some(seen);
                Ok(Reply::Done)
            }
            Command::ConsoleInput { data_base64 } => {
                Ok(Reply::Taken { bytes: self.take_input(&data_base64) })
            }
            Command::LimitDisk { disk, limits } => {
                lock(&self.vmm.inside).limits.insert(disk, limits);
                Ok(Reply::Done)
            }
            Command::LimitNic { nic, rx, tx } => {
                lock(&self.vmm.inside).nic_limits.insert(nic, (rx, tx));
                Ok(Reply::Done)
            }
            Command::SetBalloon { .. } => Ok(Reply::Done),
            Command::SaveStatus => {
                let mut inside = lock(&self.vmm.inside);
                inside.save_looks += 1;
                Ok(Reply::Save(inside.save.clone().unwrap_or(SaveStatus::None)))
            }
            Command::CancelSave => {
                (self.armed, self.saves_still) = (None, false);
                lock(&self.vmm.inside).save.take_if(|save| matches!(save, SaveStatus::Copying { .. }));
                Ok(Reply::Done)
            }
            Command::Save(spec) => self.save(&spec, descriptors),
            Command::CopyDisks(spec) if self.vmm.state() != MachineState::Paused => {
                let detail = format!("{spec:?} while the machine runs");
                lock(&self.vmm.inside).violations.push(detail.clone());
                Err(Fault { code: FaultCode::WrongState, detail })
            }
            Command::CopyDisks(spec) => {
                let copied = lock(&self.vmm.inside).copy_disks(&spec, descriptors);
                copied
                    .map(|()| Reply::Done)
                    .map_err(|cause| Fault { code: FaultCode::Host, detail: cause.to_string() })
            }
            Command::CopyStatus => {
                let never_ends = self.guest == Guest::SavesForEver;
                let copy = &mut lock(&self.vmm.inside).copy;
                let status = copy.clone().unwrap_or(CopyStatus::None);
                if let (CopyStatus::Copying { .. }, false) = (&status, never_ends) {
                    let (waits, delay) = (2, WriteDelay { us_max: 60, us_sum: 70 });
                    let report = CopyReport { waits, delay, ..CopyReport::default() };
                    *copy = Some(match self.guest {
                        Guest::CannotCopy => {
                            CopyStatus::Failed { detail: "no space left on device".to_owned() }
                        }
                        _ => CopyStatus::Copied(report),
                    });
                }
                Ok(Reply::Copy(status))
            }
            Command::CancelCopy => {
                lock(&self.vmm.inside).copy = None;
                Ok(Reply::Done)
            }
            Command::Restore(spec) => self.restore(*spec, descriptors),
            Command::MigrationStatus => {
                Ok(Reply::Migration(lock(&self.vmm.inside).moving.clone().map(Box::new)))
            }
            Command::Send(spec) => {
                self.give_up_settling();
                // What it sends of a disk is all of it.
                lock(&self.vmm.inside).fill_disks();
                let disks =
                    lock(&self.vmm.inside).disks.iter().filter_map(|disk| disk.try_clone().ok()).collect();
                self.vmm.send(&spec, &descriptors, disks)
            }
            Command::Receive(spec) => self.receive(&spec, descriptors),
            Command::CommitMigration => self.vmm.commit_move(),
            Command::CancelMigration => self.vmm.cancel_move(),
            Command::SettleMigration { owner: Owner::Here } if self.guest == Guest::CannotArrive => {
                self.vmm.drop_arrival()
            }
            Command::SettleMigration { owner } => self.vmm.settle_move(owner),
            Command::LimitMigration { .. } => Ok(Reply::Done),
            Command::Reconnect(_) => {
                let detail = "nothing of the machine's memory is owed".to_owned();
                Err(Fault { code: FaultCode::WrongState, detail })
            }
            Command::Handles if self.guest == Guest::CannotHandOver => {
                let detail = "a disk of the machine cannot be handed over".to_owned();
                Err(Fault { code: FaultCode::WrongState, detail })
            }
            Command::Handles if lock(&self.vmm.inside).disk_quarters > 0 => {
                let detail = "some of a disk is in the file that it was made from".to_owned();
                Err(Fault { code: FaultCode::WrongState, detail })
            }
            Command::Handles if lock(&self.vmm.inside).shared_quarters > 0 => {
                let detail = "some of the machine's memory is a file's that others have".to_owned();
                Err(Fault { code: FaultCode::WrongState, detail })
            }
            Command::Settle | Command::CancelSettle | Command::MemoryStatus
                if matches!(self.guest, Guest::SettlesNothing | Guest::KnowsNoBase) =>
            {
                lock(&self.vmm.inside).violations.push(format!("{:?} is of a later build", request.command));
                Err(Fault { code: FaultCode::Invalid, detail: "there is no such command".to_owned() })
            }
            Command::Settle => {
                let mut inside = lock(&self.vmm.inside);
                inside.settling = Some(match inside.settles {
                    Settles::Cannot => SettleStage::Failed { detail: "disk0 did not drain".to_owned() },
                    _ => SettleStage::UnderWay,
                });
                Ok(Reply::Done)
            }
            Command::CancelSettle => {
                self.give_up_settling();
                Ok(Reply::Done)
            }
            Command::MemoryStatus if self.is_shy() => {
                drop(self.connections.remove(at));
                return Ok(());
            }
            Command::MemoryStatus => Ok(Reply::Memory(Box::new(self.memory_status()))),
            Command::Handles => {
                let inside = lock(&self.vmm.inside);
                let null = File::open("/dev/null").map(OwnedFd::from);
                let others = inside.taps.iter().map(OwnedFd::try_clone);
                let disks = inside.disks.iter().map(|disk| disk.try_clone().map(OwnedFd::from));
                handles =
                    [null].into_iter().chain(others).chain(disks).filter_map(std::io::Result::ok).collect();
                let count = |many: usize| u16::try_from(many).unwrap_or(u16::MAX);
                Ok(Reply::Handles { nics: count(inside.taps.len()), disks: Some(count(inside.disks.len())) })
            }
        };
        if follows.is_err() && self.guest == Guest::DiesAtBoot {
            return Err(Ended(Some(ExitStatus::Signal(11))));
        }
        let borrowed: Vec<_> = handles.iter().map(AsFd::as_fd).collect();
        let _ = self.connections[at].channel.send(&Message::Reply { id, result }, &borrowed);
        // A watch that has something to tell already, told after its reply.
        let written = self.ring.as_ref().map_or(0, Ring::written);
        if self.connections[at].watching.is_some_and(|seen| written > seen) {
            self.connections[at].watching = None;
            let _ = self.connections[at].channel.send(&Message::Notice(Notice::Console { written }), &[]);
        }
        match (follows, self.guest) {
            (Ok(()), _) => Ok(()),
            (Err(()), Guest::Panics) => {
                self.tell(&Notice::GuestPanicked);
                Err(self.end(Reason::GuestPanicked))
            }
            (Err(()), _) => Err(self.end(Reason::PoweredOff)),
        }
    }

    fn reply(&self, at: usize, id: u64, result: std::result::Result<Reply, Fault>) {
        let _ = self.connections[at].channel.send(&Message::Reply { id, result }, &[]);
    }

    fn turn_to(&self, state: MachineState) -> std::result::Result<Reply, Fault> {
        let mut inside = lock(&self.vmm.inside);
        if inside.moving.as_ref().is_some_and(|status| !status.phase.is_end()) {
            let detail = "the machine is being moved".to_owned();
            return Err(Fault { code: FaultCode::WrongState, detail });
        }
        match inside.state {
            Some(MachineState::Running | MachineState::Paused) => {
                self.vmm.turn(&mut inside, state);
                Ok(Reply::Done)
            }
            _ => Err(Fault { code: FaultCode::WrongState, detail: "there is no machine".to_owned() }),
        }
    }

    /// Builds the machine, parked.
    fn build(&mut self, spec: MachineSpec, descriptors: Vec<OwnedFd>) -> std::result::Result<(), Fault> {
        let refuse = |code, detail: String| Err(Fault { code, detail });
        if self.vmm.state() != MachineState::Shell {
            return refuse(FaultCode::WrongState, "there is a machine already".to_owned());
        }
        if let Err(cause) = spec.check(descriptors.len()) {
            return refuse(FaultCode::Invalid, cause.to_string());
        }
        if self.guest == Guest::CannotBoot {
            return refuse(FaultCode::Host, "KVM_CREATE_VM: no space left".to_owned());
        }
        let mut files: Vec<Option<File>> =
            descriptors.into_iter().map(|descriptor| Some(File::from(descriptor))).collect();
        let disk = spec.disks.first().and_then(|disk| files[usize::from(disk.file.0)].as_ref());
        let disk = disk.and_then(|file| file.metadata().ok()).map(|meta| (meta.dev(), meta.ino()));
        self.claim(disk);
        let disks =
            spec.disks.iter().filter_map(|disk| files[usize::from(disk.file.0)].as_ref()?.try_clone().ok());
        let disks = disks.collect();
        let backings = spec.disks.iter().map(|disk| files[usize::from(disk.backing?.0)].take());
        let backings: Vec<Option<File>> = backings.collect();
        let taps = spec.nics.iter().filter_map(|nic| files[usize::from(nic.tap.0)].take().map(OwnedFd::from));
        let taps = taps.collect();
        let ring = files[usize::from(spec.console.ring.0)].take().map(Ring::open);
        let Some(Ok(ring)) = ring else {
            return refuse(FaultCode::Invalid, "the console ring cannot be opened".to_owned());
        };
        self.ring = Some(ring);
        self.is_unbegun = true;
        let mut inside = lock(&self.vmm.inside);
        inside.life = fake_move::new_guest();
        self.vmm.turn(&mut inside, MachineState::Paused);
        inside.spec = Some(spec);
        inside.disks = disks;
        inside.disk_quarters = if backings.iter().any(Option::is_some) { 4 } else { 0 };
        inside.backings = backings;
        inside.taps = taps;
        Ok(())
    }

    /// Lets the machine run; the second answer is an error when the guest ends right afterwards.
    #[allow(clippy::type_complexity, reason = "read twice, just above")]
    fn begin(&mut self) -> (std::result::Result<Reply, Fault>, std::result::Result<(), ()>) {
        self.is_unbegun = false;
        let mut inside = lock(&self.vmm.inside);
        inside.has_booted = true;
        self.vmm.turn(&mut inside, MachineState::Running);
        drop(inside);
        self.tell(&Notice::Booted { resets: 0 });
        self.print(b"fake guest: booted\r\n");
        match self.guest {
            // Of one the connection breaks in the middle of the command.
            Guest::DiesAtBoot | Guest::PowersOff | Guest::Panics => (Ok(Reply::Done), Err(())),
            _ => (Ok(Reply::Done), Ok(())),
        }
    }

    /// What is saved is how often that was done, as the one section of a state file, and the pages that a test gave it. While
    /// the machine runs, it waits for the next pause.
    fn save(&mut self, spec: &SaveSpec, descriptors: Vec<OwnedFd>) -> std::result::Result<Reply, Fault> {
        let fault = |code, detail: &str| Fault { code, detail: detail.to_owned() };
        if spec.live.is_none() && self.vmm.state() != MachineState::Paused {
            return Err(fault(FaultCode::WrongState, "the machine runs"));
        }
        self.give_up_settling();
        let mut files: Vec<Option<File>> = descriptors.into_iter().map(|fd| Some(File::from(fd))).collect();
        let mut take = |at: FdIndex| files.get_mut(usize::from(at.0)).and_then(Option::take);
        let (Some(state), Some(memory)) = (take(spec.state), take(spec.memory)) else {
            return Err(fault(FaultCode::Invalid, "a file is missing"));
        };
        let base = spec.base.map(|base| (take(base.state), base.root));
        if base.is_some() && self.guest == Guest::KnowsNoBase {
            return Err(fault(FaultCode::Invalid, "unknown field `base`"));
        }
        let base = base.map(|(state, root)| fake_memory::table(&state.expect("the state of the base"), root));
        let base = base.transpose().map_err(|detail| fault(FaultCode::Invalid, &detail))?;
        let files = SaveFiles { state, memory, base, is_live: spec.live.is_some() };
        match spec.live {
            Some(_) if lock(&self.vmm.inside).shared_quarters > 0 => {
                return Err(fault(FaultCode::Host, "cannot protect guest memory against writes"));
            }
            Some(_) => {
                lock(&self.vmm.inside).save = Some(SaveStatus::Armed);
                self.armed = Some(files);
            }
            None => {
                self.saves_still = self.guest == Guest::SavesForEver;
                self.write_save(files);
            }
        }
        Ok(Reply::Done)
    }

    fn write_save(&self, mut files: SaveFiles) {
        if self.guest == Guest::SavesForEver {
            lock(&self.vmm.inside).save = Some(SaveStatus::Copying { done_bytes: 1, total_bytes: 2 });
            return;
        }
        if self.guest == Guest::KeepsSaved {
            let twins = [&files.state, &files.memory].map(|file| file.try_clone().expect("a descriptor"));
            lock(&self.vmm.inside).kept.extend(twins);
        }
        let saves = self.kernel.saves.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let memory_bytes = self.vmm.spec().map_or(0, |spec| spec.memory_bytes);
        let memory = lock(&self.vmm.inside).memory.clone();
        let (table, memory_bytes) =
            fake_memory::write(&memory, memory_bytes, &files).expect("room for memory");
        let saved = Section { name: "saves", version: 1, bytes: saves.to_le_bytes().to_vec() };
        let state = form::join(&[saved, table.section()]);
        let root = Digest(Sha256::digest(&state).into());
        let written = files.state.write_all(&state);
        let state_bytes = state.len() as u64;
        let (waits, delay) = match files.is_live {
            true => (3, Some(WriteDelay { us_max: 40, us_sum: 90 })),
            false => (0, None),
        };
        let report = SaveReport { root, state_bytes, memory_bytes, stall_us: 0, waits, delay, total_us: 1 };
        let status = match written {
            Ok(()) if self.guest != Guest::CannotSave => SaveStatus::Saved(report),
            _ => SaveStatus::Failed { detail: "no space left on device".to_owned() },
        };
        lock(&self.vmm.inside).save = Some(status);
    }

    fn restore(&mut self, spec: RestoreSpec, descriptors: Vec<OwnedFd>) -> std::result::Result<Reply, Fault> {
        let invalid = |detail: String| Fault { code: FaultCode::Invalid, detail };
        spec.check(descriptors.len()).map_err(|cause| invalid(cause.to_string()))?;
        let restored = fake_memory::restored(&spec, &descriptors).map_err(invalid)?;
        self.build(spec.machine, descriptors)?;
        self.begin().0?;
        let mut inside = lock(&self.vmm.inside);
        inside.memory = restored;
        inside.restored = Some(spec.how);
        inside.shared_quarters = if spec.how == MemoryUse::Private { 4 } else { 0 };
        drop(inside);
        self.turn_to(match spec.then {
            Then::Run => MachineState::Running,
            Then::Stay => MachineState::Paused,
        })
    }

    fn receive(
        &mut self,
        spec: &ReceiveSpec,
        descriptors: Vec<OwnedFd>,
    ) -> std::result::Result<Reply, Fault> {
        let invalid = |detail: String| Fault { code: FaultCode::Invalid, detail };
        spec.check(descriptors.len()).map_err(|cause| invalid(cause.to_string()))?;
        let disk = spec.machine.disks.first().and_then(|disk| descriptors.get(usize::from(disk.file.0)));
        let disk = disk.and_then(|fd| fd.try_clone().ok()).and_then(|fd| File::from(fd).metadata().ok());
        let disk = disk.map(|meta| (meta.dev(), meta.ino()));
        if self.guest == Guest::CannotBoot {
            return Err(Fault { code: FaultCode::Host, detail: "KVM_CREATE_VM: no space left".to_owned() });
        }
        match spec.memory {
            // It is the other's until this one takes the machine.
            Some(_) => lock(&self.vmm.inside).handed = disk,
            None => self.claim(disk),
        }
        let taps = spec.machine.nics.iter().map(|nic| descriptors[usize::from(nic.tap.0)].try_clone());
        lock(&self.vmm.inside).taps = taps.filter_map(std::io::Result::ok).collect();
        let ring = descriptors[usize::from(spec.machine.console.ring.0)].try_clone().map(File::from);
        self.ring = ring.and_then(Ring::open).ok();
        let files = spec
            .machine
            .disks
            .iter()
            .map(|disk| descriptors[usize::from(disk.file.0)].try_clone().map(File::from));
        lock(&self.vmm.inside).disks = files.filter_map(std::result::Result::ok).collect();
        self.vmm.receive(spec, &descriptors)
    }

    /// Two machines must never have one disk.
    fn claim(&self, disk: Option<(u64, u64)>) {
        let Some(disk) = disk else { return };
        let mut state = lock(&self.kernel.state);
        let others: Vec<i32> = state
            .vmms
            .values()
            .filter(|other| other.pid != self.vmm.pid && lock(&other.inside).disk == Some(disk))
            .map(|other| other.pid)
            .collect();
        for other in others {
            state.violations.push(format!("VMMs {other} and {} have the same disk", self.vmm.pid));
        }
        lock(&self.vmm.inside).disk = Some(disk);
    }

    fn take_input(&mut self, data_base64: &str) -> u64 {
        if self.guest == Guest::Deaf {
            return 0;
        }
        let data = STANDARD.decode(data_base64).unwrap_or_default();
        // As small as a real FIFO, so that callers have to come again.
        let taken = data.len().min(16);
        lock(&self.vmm.inside).typed.extend_from_slice(&data[..taken]);
        self.print(&data[..taken]);
        taken as u64
    }

    fn give_up_settling(&self) {
        let mut inside = lock(&self.vmm.inside);
        if inside.settling == Some(SettleStage::UnderWay) {
            inside.settling = Some(SettleStage::Failed { detail: "it was given up".to_owned() });
        }
    }

    /// Whether it closes its connection instead of saying whose its memory is.
    fn is_shy(&self) -> bool {
        let mut inside = lock(&self.vmm.inside);
        match inside.settles {
            Settles::Shy(left @ 1..) => {
                inside.settles = Settles::Shy(left - 1);
                true
            }
            Settles::Mute => inside.settling == Some(SettleStage::UnderWay),
            _ => false,
        }
    }

    fn memory_status(&self) -> MemoryStatus {
        let mut inside = lock(&self.vmm.inside);
        let is_soon = matches!(inside.settles, Settles::Soon | Settles::Shy(_));
        if inside.settling == Some(SettleStage::UnderWay) && is_soon {
            match inside.shared_quarters.checked_sub(1) {
                Some(left) => inside.shared_quarters = left,
                // Disks after memory.
                None => inside.disk_quarters = inside.disk_quarters.saturating_sub(1),
            }
            if inside.shared_quarters == 0 && inside.disk_quarters == 0 {
                inside.fill_disks();
                inside.settling = Some(SettleStage::Settled);
            }
        }
        let total_bytes = inside.spec.as_ref().map_or(0, |spec| spec.memory_bytes);
        let of = |stage| Settling { stage, pauses: 1, longest_pause_us: 1, paused_us: 1, total_us: 1 };
        MemoryStatus {
            total_bytes,
            shared_bytes: total_bytes / 4 * inside.shared_quarters,
            disks_shared_bytes: inside.backed_bytes() / 4 * inside.disk_quarters,
            settling: inside.settling.clone().map(of),
        }
    }

    fn stats(&self) -> MachineStats {
        let parts = |spec: &MachineSpec| (usize::from(spec.vcpus), spec.disks.len(), spec.nics.len());
        let (vcpus, disks, nics) = self.vmm.spec().map_or((0, 0, 0), |spec| parts(&spec));
        MachineStats {
            running_ns: 5_000_000,
            resets: self.vmm.resets(),
            vcpus: vec![VcpuStats { exits: 7, cpu_ns: 3_000_000 }; vcpus],
            disks: vec![DiskStats { reads: 1, malformed: 1, ..DiskStats::default() }; disks],
            nics: vec![NicStats { rx_packets: 2, ..NicStats::default() }; nics],
            console_written: self.ring.as_ref().map_or(0, Ring::written),
            ..MachineStats::default()
        }
    }
}
