//! Plays the daemon for one VMM: makes the files it is given, starts it with the descriptors of the wire, and
//! commands it. Everything lies in a directory that goes with the driver, and so does the process.
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sys::jail::{EmptyNamespaces, Jail, Program, Refused, Rlimits, Step, User, spawn};
use sys::pidfd::{Ended, PidFd, Signal};
use sys::seqpacket::{Listener, Socket};
use wire::channel::{Channel, Error};
use wire::console::Ring;
use wire::control::{Command, Fault, MachineStats, Message, Notice, Reply, Request};
use wire::launch::fd;
use wire::limits::CONSOLE_RING_BYTES;
use wire::machine::{Balloon, Boot, Console, CpuTemplate, Disk, FdIndex, MachineSpec, Nic, OnReset};
use wire::migration::{DiskStream, MigrationStatus, Mode, ReceiveSpec, ReconnectSpec, SendLimits, SendSpec};
use wire::saved::{Base, Live, MemoryUse, Moment, RestoreSpec, SaveReport, SaveSpec, SaveStatus, Then};
use wire::will::Will;

/// How long anything may take. A machine that runs probe guests answers in milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test.
pub(crate) fn program() -> PathBuf {
    // Only tests of the package that owns the program are told where it is.
    match (std::env::var_os("TOFT_BIN"), option_env!("CARGO_BIN_EXE_toft-vmm")) {
        (Some(directory), _) => Path::new(&directory).join("toft-vmm"),
        (None, Some(path)) => path.into(),
        (None, None) => panic!("TOFT_BIN is not set: it names the directory of the binaries"),
    }
}

/// Bounds that no machine of the tests comes near.
pub(crate) const RLIMITS: Rlimits = Rlimits { nofile: 1_024, fsize_bytes: u64::MAX, nproc: 4_096 };

static STARTED: AtomicU32 = AtomicU32::new(0);

/// A VMM process and the connection to it.
pub(crate) struct Vmm {
    pid: i32,
    /// When the program was executed, the jail around it being whole.
    #[allow(dead_code, reason = "only benchmarks look at the clock")]
    pub(crate) executed_at: Instant,
    /// What this host refuses of its jail.
    #[allow(dead_code, reason = "only benchmarks insist on all of it")]
    pub(crate) refused: Vec<Step>,
    pidfd: PidFd,
    channel: Channel,
    directory: tempfile::TempDir,
    console: Option<Ring>,
    ring: Option<File>,
    next_id: u64,
    notices: VecDeque<Notice>,
    /// When memory comes in a move from here; a target is given what it takes to be owed some.
    #[allow(dead_code, reason = "benchmarks of other things leave it alone")]
    pub(crate) mode: Mode,
    /// Whether its moves are decided by the test.
    #[allow(dead_code, reason = "benchmarks leave it to the ends")]
    pub(crate) is_held: bool,
    /// Whether machines are moved as ones that are paused.
    pub(crate) is_paused: bool,
}

/// A machine as files.
pub(crate) struct Saved {
    pub(crate) state: File,
    pub(crate) memory: File,
    pub(crate) report: SaveReport,
}

/// A machine to boot: the specification is changed freely before [`Vmm::boot`].
pub(crate) struct Machine {
    pub(crate) spec: MachineSpec,
    pub(crate) files: Vec<File>,
    /// Bytes of output that the console keeps.
    pub(crate) console_bytes: u64,
}

impl Machine {
    /// One vCPU, 64 MiB, no devices but those that are always there.
    pub(crate) fn new(kernel: &Path, cmdline: &str) -> Machine {
        Machine {
            spec: MachineSpec {
                memory_bytes: 64 << 20,
                vcpus: 1,
                cpu: CpuTemplate::Host,
                boot: Boot { kernel: FdIndex(0), initrd: None, cmdline: cmdline.to_owned() },
                disks: Vec::new(),
                nics: Vec::new(),
                balloon: Balloon::default(),
                // Replaced when the console's file is made.
                console: Console { ring: FdIndex(u16::MAX) },
                on_reset: OnReset::Rebuild,
            },
            files: vec![File::open(kernel).unwrap()],
            console_bytes: CONSOLE_RING_BYTES,
        }
    }

    /// Adds a descriptor; answers its place in the packet.
    pub(crate) fn add(&mut self, file: File) -> FdIndex {
        self.files.push(file);
        FdIndex(self.files.len() as u16 - 1)
    }

    /// Adds a disk.
    pub(crate) fn disk(&mut self, file: File, change: impl FnOnce(&mut Disk)) {
        let file = self.add(file);
        let mut disk = Disk {
            file,
            access: wire::machine::Access::ReadWrite,
            cache: Default::default(),
            serial: format!("disk-{}", self.spec.disks.len()),
            limits: Default::default(),
            backing: None,
        };
        change(&mut disk);
        self.spec.disks.push(disk);
    }

    /// Adds an interface over a tap.
    pub(crate) fn nic(&mut self, tap: File) {
        let tap = self.add(tap);
        let last = self.spec.nics.len() as u8;
        self.spec.nics.push(Nic {
            tap,
            mac: [0x02, 0, 0, 0, 0, last],
            mtu: 1500,
            rx_limits: Default::default(),
            tx_limits: Default::default(),
        });
    }
}

impl Vmm {
    /// Starts a VMM in its jail, as far as this host and user allow one, and connects to it.
    pub(crate) fn start() -> Vmm {
        Vmm::start_limited(RLIMITS)
    }

    /// Starts a VMM with these limits.
    pub(crate) fn start_limited(rlimits: Rlimits) -> Vmm {
        let directory = tempfile::Builder::new().prefix("toft-vmm").tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let listener: OwnedFd = Listener::bind(&path("control.sock")).unwrap().into();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("these tests need /dev/kvm");
        let will = File::create(path("will.json")).unwrap();
        let log = File::create(path("vmm.log")).unwrap();
        let null = File::open("/dev/null").unwrap();
        let executable = File::open(program()).unwrap();
        let program = Program {
            executable: executable.as_fd(),
            name: "toft-vmm".as_ref(),
            arguments: &["machine".as_ref(), "--label".as_ref(), "test".as_ref()],
            descriptors: &[
                (null.as_fd(), fd::STDIN),
                (log.as_fd(), 1),
                (log.as_fd(), 2),
                (listener.as_fd(), fd::CONTROL),
                (kvm.as_fd(), fd::KVM),
                (will.as_fd(), fd::WILL),
            ],
        };
        let root = nix::unistd::geteuid().is_root();
        // Ids that no process on this host has.
        let id = 0x7000_0000 + std::process::id() * 64 + STARTED.fetch_add(1, Ordering::Relaxed) % 64;
        let user = if root { User::Own { uid: id, gid: id } } else { User::Caller };
        // What VMMs have in common, as a launcher's do.
        static EMPTY: LazyLock<Option<EmptyNamespaces>> = LazyLock::new(|| EmptyNamespaces::make().ok());
        let empty = EMPTY.as_ref();
        let jail = Jail { user, cgroups: &[], rlimits, empty, refused: Refused::LeftOut, left_out: &[] };
        let started = spawn(&program, &jail).unwrap_or_else(|error| panic!("{error}: {}", error.cause));
        let (pid, pidfd, executed_at) = (started.pid, started.pidfd, started.executed_at);
        let refused = started.refused.into_iter().map(|(step, _)| step).collect();
        let channel = Channel::new(Socket::connect(&path("control.sock")).unwrap());
        Vmm {
            pid,
            executed_at,
            refused,
            pidfd,
            channel,
            directory,
            console: None,
            ring: None,
            next_id: 0,
            notices: VecDeque::new(),
            mode: Mode::PreCopy,
            is_held: false,
            is_paused: false,
        }
    }

    /// Starts a VMM and boots a machine in it.
    pub(crate) fn boot(machine: Machine) -> Vmm {
        let mut vmm = Vmm::start();
        vmm.try_boot(machine).unwrap();
        vmm
    }

    /// Boots a machine; gives the refusal back.
    pub(crate) fn try_boot(&mut self, mut machine: Machine) -> Result<(), Fault> {
        machine.spec.console = Console { ring: machine.add(self.make_console(machine.console_bytes)) };
        let descriptors: Vec<_> = machine.files.iter().map(File::as_fd).collect();
        let id = self.send(Command::Boot(Box::new(machine.spec)), &descriptors);
        self.reply(id).map(drop)
    }

    /// Saves the machine, which is paused, into two files and waits for the end of it.
    pub(crate) fn save(&mut self) -> Saved {
        let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let report =
            self.save_into(&state, &memory).unwrap_or_else(|detail| panic!("{detail}\n{}", self.told()));
        Saved { state, memory, report }
    }

    /// Saves the machine, which is paused, without the parts of memory that `base` has.
    pub(crate) fn save_on(&mut self, base: &Saved) -> Result<Saved, String> {
        let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let named = Some(Base { state: FdIndex(2), root: base.report.root });
        let spec = SaveSpec { state: FdIndex(0), memory: FdIndex(1), base: named, live: None };
        let id = self.send(Command::Save(spec), &[state.as_fd(), memory.as_fd(), base.state.as_fd()]);
        self.reply(id).map_err(|fault| fault.detail)?;
        let report = self.end_of_save()?;
        Ok(Saved { state, memory, report })
    }

    /// Saves the machine into these files; answers what came of it.
    pub(crate) fn save_into(&mut self, state: &File, memory: &File) -> Result<SaveReport, String> {
        self.begin_save(state, memory).map_err(|fault| fault.detail)?;
        self.end_of_save()
    }

    /// Saves the machine as it runs and waits for the end of it.
    pub(crate) fn save_live(&mut self) -> Saved {
        let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        self.begin_live(&state, &memory, Moment::Soon).unwrap();
        let report = self.end_of_save().unwrap_or_else(|detail| panic!("{detail}\n{}", self.told()));
        Saved { state, memory, report }
    }

    /// Begins to save the machine as it runs.
    pub(crate) fn begin_live(&mut self, state: &File, memory: &File, moment: Moment) -> Result<(), Fault> {
        let device = File::options().read(true).write(true).open("/dev/userfaultfd");
        let device = device.expect("a live save needs /dev/userfaultfd");
        let live = Some(Live { userfaultfd: FdIndex(2), moment });
        let spec = SaveSpec { state: FdIndex(0), memory: FdIndex(1), base: None, live };
        let id = self.send(Command::Save(spec), &[state.as_fd(), memory.as_fd(), device.as_fd()]);
        self.reply(id).map(drop)
    }

    /// Begins to save.
    pub(crate) fn begin_save(&mut self, state: &File, memory: &File) -> Result<(), Fault> {
        let spec = SaveSpec { state: FdIndex(0), memory: FdIndex(1), base: None, live: None };
        let id = self.send(Command::Save(spec), &[state.as_fd(), memory.as_fd()]);
        self.reply(id).map(drop)
    }

    /// Waits for the end of the save that is under way.
    pub(crate) fn end_of_save(&mut self) -> Result<SaveReport, String> {
        let ends = |notice: &Notice| {
            matches!(notice, Notice::Save(SaveStatus::Saved(_) | SaveStatus::Failed { .. }))
        };
        match self.wait_for_notice("the end of the save", ends) {
            Notice::Save(SaveStatus::Saved(report)) => Ok(report),
            Notice::Save(SaveStatus::Failed { detail }) => Err(detail),
            other => panic!("{other:?}"),
        }
    }

    /// Builds a machine from what was saved; gives the refusal back. `change` is for what is not usual.
    pub(crate) fn try_restore(
        &mut self,
        mut machine: Machine,
        saved: &Saved,
        change: impl FnOnce(&mut RestoreSpec),
    ) -> Result<(), Fault> {
        machine.spec.console = Console { ring: machine.add(self.make_console(machine.console_bytes)) };
        let state = machine.add(saved.state.try_clone().unwrap());
        let memory = machine.add(saved.memory.try_clone().unwrap());
        let mut spec = RestoreSpec {
            machine: machine.spec,
            state,
            root: saved.report.root,
            memory,
            lower: None,
            how: MemoryUse::Private,
            clock: Default::default(),
            counters: Default::default(),
            identity: Default::default(),
            then: Then::Run,
        };
        change(&mut spec);
        let descriptors: Vec<_> = machine.files.iter().map(File::as_fd).collect();
        let id = self.send(Command::Restore(Box::new(spec)), &descriptors);
        self.reply(id).map(drop)
    }

    /// Starts a VMM and restores a machine in it.
    pub(crate) fn restore(machine: Machine, saved: &Saved, change: impl FnOnce(&mut RestoreSpec)) -> Vmm {
        let mut vmm = Vmm::start();
        if let Err(fault) = vmm.try_restore(machine, saved, change) {
            panic!("cannot restore: {fault}\n{}", vmm.told());
        }
        vmm
    }

    fn make_console(&mut self, bytes: u64) -> File {
        let path = self.directory.path().join("console.ring");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        Ring::create(file.try_clone().unwrap(), bytes).unwrap();
        self.console = Some(Ring::open(file.try_clone().unwrap()).unwrap());
        self.ring = Some(file.try_clone().unwrap());
        file
    }

    /// Builds everything for a machine that comes over these streams; gives the refusal back.
    pub(crate) fn try_receive(&mut self, machine: Machine, streams: Vec<OwnedFd>) -> Result<(), Fault> {
        self.try_receive_with_disks(machine, streams, Vec::new())
    }

    /// The same, and the contents of its first disks over streams of their own.
    pub(crate) fn try_receive_with_disks(
        &mut self,
        mut machine: Machine,
        streams: Vec<OwnedFd>,
        disks: Vec<OwnedFd>,
    ) -> Result<(), Fault> {
        machine.spec.console = Console { ring: machine.add(self.make_console(machine.console_bytes)) };
        let streams = streams.into_iter().map(|stream| machine.add(File::from(stream))).collect();
        let disks = (0..).zip(disks).map(|(disk, stream)| {
            let stream = machine.add(File::from(stream));
            DiskStream { disk, stream }
        });
        let disks = disks.collect();
        let userfaultfd = self.mode.may_owe().then(|| {
            let device = File::options().read(true).write(true).open("/dev/userfaultfd");
            machine.add(device.expect("memory that is owed needs /dev/userfaultfd"))
        });
        let (memory, held, paused) = (None, self.is_held, self.is_paused);
        let spec = ReceiveSpec { machine: machine.spec, memory, streams, disks, userfaultfd, held, paused };
        let descriptors: Vec<_> = machine.files.iter().map(File::as_fd).collect();
        let id = self.send(Command::Receive(Box::new(spec)), &descriptors);
        self.reply(id).map(drop)
    }

    /// Begins to send the machine over these streams.
    pub(crate) fn try_send(&mut self, streams: Vec<OwnedFd>, limits: SendLimits) -> Result<(), Fault> {
        self.try_send_with_disks(streams, Vec::new(), limits)
    }

    /// The same, and the contents of its first disks over streams of their own.
    pub(crate) fn try_send_with_disks(
        &mut self,
        streams: Vec<OwnedFd>,
        disks: Vec<OwnedFd>,
        limits: SendLimits,
    ) -> Result<(), Fault> {
        let count = streams.len() as u16;
        let named = (0..count).map(FdIndex).collect();
        let of_disk = |disk| DiskStream { disk, stream: FdIndex(count + disk) };
        let of_disks = (0..disks.len() as u16).map(of_disk).collect();
        let descriptors: Vec<_> = streams.iter().chain(&disks).map(OwnedFd::as_fd).collect();
        let (mode, held, paused) = (self.mode, self.is_held, self.is_paused);
        let spec = SendSpec { streams: named, disks: of_disks, handed: false, limits, mode, held, paused };
        self.begin_send(spec, &descriptors)
    }

    fn begin_send(&mut self, spec: SendSpec, descriptors: &[BorrowedFd<'_>]) -> Result<(), Fault> {
        let id = self.send(Command::Send(spec), descriptors);
        let begun = self.reply(id).map(drop);
        if begun.is_ok() {
            // Of the move before.
            self.notices.retain(|notice| !matches!(notice, Notice::Migration(_)));
        }
        begun
    }

    /// Memory and taps of the machine.
    pub(crate) fn handles(&mut self) -> Result<Vec<File>, Fault> {
        let id = self.send(Command::Handles, &[]);
        let (reply, descriptors) = self.reply_with(id);
        let Reply::Handles { nics, disks } = reply? else {
            panic!("handles were answered with something else")
        };
        let disks = usize::from(disks.expect("how many disks"));
        assert_eq!(descriptors.len(), usize::from(nics) + disks + 1);
        Ok(descriptors.into_iter().map(File::from).collect())
    }

    /// Makes this VMM the one that takes a machine of this host over, whose handles these are, from one that has the other
    /// end of `stream`. The interfaces of `machine` are without taps yet, and its disks get the openings that are handed over.
    pub(crate) fn try_take_over(
        &mut self,
        mut machine: Machine,
        source: &Vmm,
        handles: &[File],
        stream: OwnedFd,
    ) -> Result<(), Fault> {
        let copy = |file: &File| file.try_clone().unwrap();
        let ring = source.ring();
        self.console = Some(Ring::open(copy(&ring)).unwrap());
        self.ring = Some(copy(&ring));
        machine.spec.console = Console { ring: machine.add(ring) };
        let (memory, others) = handles.split_first().expect("memory comes first");
        let (taps, disks) = others.split_at(others.len().saturating_sub(machine.spec.disks.len()));
        taps.iter().for_each(|tap| machine.nic(copy(tap)));
        for (disk, opening) in machine.spec.disks.iter().zip(disks) {
            machine.files[usize::from(disk.file.0)] = copy(opening);
        }
        let memory = Some(machine.add(copy(memory)));
        let streams = vec![machine.add(File::from(stream))];
        let (disks, userfaultfd, held, paused) = (Vec::new(), None, self.is_held, self.is_paused);
        let spec = ReceiveSpec { machine: machine.spec, memory, streams, disks, userfaultfd, held, paused };
        let descriptors: Vec<_> = machine.files.iter().map(File::as_fd).collect();
        let id = self.send(Command::Receive(Box::new(spec)), &descriptors);
        self.reply(id).map(drop)
    }

    /// Begins to give the machine to another VMM of this host, which has its memory.
    pub(crate) fn try_hand_over(&mut self, stream: &OwnedFd) -> Result<(), Fault> {
        let spec = SendSpec {
            streams: vec![FdIndex(0)],
            disks: Vec::new(),
            handed: true,
            limits: SendLimits::default(),
            mode: Mode::PreCopy,
            held: self.is_held,
            paused: self.is_paused,
        };
        self.begin_send(spec, &[stream.as_fd()])
    }

    /// Goes on with a move whose link broke, over these streams.
    #[allow(dead_code, reason = "benchmarks break no links")]
    pub(crate) fn try_reconnect(&mut self, streams: &[OwnedFd]) -> Result<(), Fault> {
        let descriptors: Vec<_> = streams.iter().map(OwnedFd::as_fd).collect();
        let spec = ReconnectSpec { streams: (0..streams.len() as u16).map(FdIndex).collect() };
        let id = self.send(Command::Reconnect(spec), &descriptors);
        self.reply(id).map(drop)
    }

    /// How the move stands.
    pub(crate) fn migration(&mut self) -> MigrationStatus {
        match self.command(Command::MigrationStatus) {
            Ok(Reply::Migration(Some(status))) => *status,
            other => panic!("no move: {other:?}"),
        }
    }

    /// Waits until a move is told to have come so far.
    pub(crate) fn wait_for_move(
        &mut self,
        what: &str,
        fits: impl Fn(&MigrationStatus) -> bool,
    ) -> MigrationStatus {
        let told = |notice: &Notice| matches!(notice, Notice::Migration(status) if fits(status));
        match self.wait_for_notice(what, told) {
            Notice::Migration(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// What a VMM that has ended told of its move.
    pub(crate) fn last_words(&mut self) -> Vec<MigrationStatus> {
        while let Ok(Some((Message::Notice(notice), _))) = self.channel.receive() {
            self.notices.push_back(notice);
        }
        let told = self.notices.drain(..).filter_map(|notice| match notice {
            Notice::Migration(status) => Some(*status),
            _ => None,
        });
        told.collect()
    }

    /// The console's file.
    pub(crate) fn ring(&self) -> File {
        self.ring.as_ref().expect("the machine was booted").try_clone().unwrap()
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Another connection to the same VMM.
    pub(crate) fn connect(&self) -> Channel {
        Channel::new(Socket::connect(&self.directory.path().join("control.sock")).unwrap())
    }

    /// Gives a command and waits for its answer.
    pub(crate) fn command(&mut self, command: Command) -> Result<Reply, Fault> {
        let id = self.send(command, &[]);
        self.reply(id)
    }

    /// The machine's counters.
    pub(crate) fn stats(&mut self) -> MachineStats {
        match self.command(Command::Stats) {
            Ok(Reply::Stats(stats)) => *stats,
            other => panic!("no stats: {other:?}"),
        }
    }

    /// Everything the console holds.
    pub(crate) fn console(&mut self) -> String {
        let ring = self.console.as_mut().expect("the machine was booted");
        let piece = ring.read(0, CONSOLE_RING_BYTES as usize).unwrap();
        String::from_utf8_lossy(&piece.data).into_owned()
    }

    /// Waits until the console holds `text`; answers all of it.
    pub(crate) fn wait_for_console(&mut self, text: &str) -> String {
        self.wait_for_times(text, 1)
    }

    /// Waits until the console holds `text` so many times; answers all of it.
    pub(crate) fn wait_for_times(&mut self, text: &str, times: usize) -> String {
        self.wait_for_times_within(text, times, PATIENCE)
    }

    /// The same with a patience of its own: Linux on an emulated host needs more.
    #[allow(dead_code, reason = "only benchmarks boot Linux without a daemon")]
    pub(crate) fn wait_for_times_within(&mut self, text: &str, times: usize, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        loop {
            let seen = self.console.as_mut().unwrap().read(u64::MAX, 0).unwrap().start;
            let all = self.console();
            if all.matches(text).count() >= times {
                return all;
            }
            // The watch fires for whatever came after the total was read.
            let id = self.send(Command::WatchConsole { seen }, &[]);
            if let Err(fault) = self.reply(id) {
                panic!("cannot watch the console: {fault}");
            }
            self.notice_before(deadline, text, |notice| matches!(notice, Notice::Console { .. }));
        }
    }

    /// Types a line.
    pub(crate) fn type_line(&mut self, line: &str) {
        let mut rest = format!("{line}\n").into_bytes();
        let deadline = Instant::now() + PATIENCE;
        while !rest.is_empty() {
            assert!(Instant::now() < deadline, "the console takes no input\n{}", self.console());
            match self.command(Command::ConsoleInput { data_base64: STANDARD.encode(&rest) }) {
                Ok(Reply::Taken { bytes }) => drop(rest.drain(..bytes as usize)),
                other => panic!("cannot type: {other:?}"),
            }
        }
    }

    /// Waits for a notice that fits.
    pub(crate) fn wait_for_notice(&mut self, what: &str, fits: impl Fn(&Notice) -> bool) -> Notice {
        self.notice_before(Instant::now() + PATIENCE, what, fits)
    }

    /// Waits until the process has ended by itself; answers how, and its last will.
    pub(crate) fn wait_for_end(&mut self) -> (Ended, Option<Will>) {
        assert!(
            readable(self.pidfd.as_fd(), Instant::now() + PATIENCE),
            "the VMM does not end\n{}",
            self.told()
        );
        let ended = self.pidfd.reap().unwrap().expect("its descriptor is readable");
        (ended, self.will())
    }

    /// The last will, when there is one.
    pub(crate) fn will(&self) -> Option<Will> {
        Will::read(&File::open(self.directory.path().join("will.json")).unwrap()).unwrap()
    }

    /// Sends a signal to the process.
    pub(crate) fn signal(&self, signal: Signal) {
        self.pidfd.signal(signal).unwrap();
    }

    /// The VMM's log and console, for a failure's text.
    pub(crate) fn told(&mut self) -> String {
        let log = std::fs::read_to_string(self.directory.path().join("vmm.log")).unwrap_or_default();
        let console = if self.console.is_some() { self.console() } else { String::new() };
        format!("log:\n{log}\nconsole:\n{console}")
    }

    pub(crate) fn send(&mut self, command: Command, descriptors: &[BorrowedFd<'_>]) -> u64 {
        self.next_id += 1;
        let request = Request { id: self.next_id, command };
        self.channel.send(&request, descriptors).unwrap_or_else(|error| panic!("{error:?}\n{}", self.told()));
        self.next_id
    }

    pub(crate) fn reply(&mut self, wanted: u64) -> Result<Reply, Fault> {
        self.reply_with(wanted).0
    }

    /// A reply with its descriptors.
    fn reply_with(&mut self, wanted: u64) -> (Result<Reply, Fault>, Vec<OwnedFd>) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.receive(deadline, "a reply") {
                (Message::Reply { id, result }, descriptors) if id == wanted => return (result, descriptors),
                (Message::Reply { id, .. }, _) => panic!("reply to {id}, not to {wanted}"),
                (Message::Notice(notice), _) => self.notices.push_back(notice),
            }
        }
    }

    fn notice_before(&mut self, deadline: Instant, what: &str, fits: impl Fn(&Notice) -> bool) -> Notice {
        loop {
            if let Some(at) = self.notices.iter().position(&fits) {
                return self.notices.remove(at).expect("the position was just found");
            }
            match self.receive(deadline, what).0 {
                Message::Notice(notice) => self.notices.push_back(notice),
                Message::Reply { id, .. } => panic!("unexpected reply to {id}"),
            }
        }
    }

    fn receive(&mut self, deadline: Instant, what: &str) -> (Message, Vec<OwnedFd>) {
        if !readable(self.channel.as_fd(), deadline) {
            panic!("{what} did not come\n{}", self.told());
        }
        loop {
            match self.channel.receive() {
                Ok(Some(message)) => return message,
                // A peer that ends with something of ours unread is told first; what it sent comes after.
                Err(Error::Socket(cause)) if cause.kind() == io::ErrorKind::ConnectionReset => continue,
                other => panic!(
                    "{what} did not come: {:?}\n{:?}\n{}",
                    other.map(|_| "closed"),
                    self.will(),
                    self.told()
                ),
            }
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        match self.pidfd.signal(Signal::SIGKILL) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => eprintln!("cannot end the VMM: {error}"),
            _ => {
                readable(self.pidfd.as_fd(), Instant::now() + PATIENCE);
                let _ = self.pidfd.reap();
            }
        }
    }
}

/// Waits for a descriptor; answers whether it became readable in time.
pub(crate) fn readable(fd: std::os::fd::BorrowedFd<'_>, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(0) if left.is_zero() => return false,
            Ok(0) => continue,
            Ok(_) => return true,
            Err(error) => panic!("poll: {error}"),
        }
    }
}
