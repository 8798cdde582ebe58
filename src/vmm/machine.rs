//! One machine: built from a specification and descriptors, paused, reset and counted. What its parts are is in
//! `parts`, how they are put together in `build`. The control loop owns it; nothing here knows a socket.
//!
//! ```text
//! build: memory ─▶ VM ─▶ devices ─▶ buses ─▶ boot ─▶ vCPUs parked ─▶ run       rebuild: stop, drop, build
//! ```
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::pause::NotDrained;
use kvm::Host;
use wire::console::Ring;
use wire::control::{FaultCode, MachineStats};
use wire::machine::{MachineSpec, OnReset, RateLimits};
use wire::saved::Clock;

use crate::bell::Bell;
use crate::boot;
use crate::console::Console;
use crate::migrate;
use crate::sandbox;
use crate::snapshot;
use crate::vcpu::NotParked;

mod build;
mod chassis;
mod copy;
mod moving;
mod parts;
mod plan;
mod restore;
mod save;
mod settle;
mod stats;
pub(crate) mod translate;
mod wiring;

use build::Origin;
pub(crate) use chassis::Chassis;
use copy::Copying;
use moving::Moving;
use parts::Parts;
use plan::Plan;
use save::Save;
use settle::Settle;
use stats::Lasting;

/// One machine, for the life of its process.
pub(crate) struct Machine {
    plan: Plan,
    console: Arc<Console>,
    bell: Arc<Bell>,
    lasting: Lasting,
    /// Absent only between the end of one build and the next.
    parts: Option<Parts>,
    run: Run,
    /// The save that is under way, or the last one.
    save: Option<Save>,
    /// The move that is under way, or the last one.
    moving: Option<Moving>,
    /// The settling of its memory that is under way, or the last one.
    settle: Option<Settle>,
    /// The copy of its disks that is under way, or the last one.
    copying: Option<Copying>,
    /// Files that its memory is mapped from, until it is settled, behind all that may use memory still. A mapping alone does not tell
    /// everywhere that a file is in use: on an overlay it is of the file below.
    below: Vec<File>,
}

/// Whether vCPUs run.
enum Run {
    Running {
        since: Instant,
    },
    Paused {
        /// The guest's paravirtual clock when it stopped.
        clock_ns: u64,
        /// When that was.
        since: Instant,
        /// Whether the time since then is the guest's.
        clock: Clock,
    },
}

/// Why a machine cannot be built or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{field}: {detail}")]
    Invalid { field: String, detail: String },
    #[error("{field}")]
    File {
        field: String,
        #[source]
        cause: io::Error,
    },
    #[error("/boot: {0}")]
    Boot(#[from] boot::Error),
    #[error("/cpu: {0}")]
    Cpu(kvm::cpuid::Lacking),
    #[error(transparent)]
    Kvm(kvm::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error("cannot make {what}")]
    Host {
        what: String,
        #[source]
        cause: io::Error,
    },
    #[error(transparent)]
    NotParked(#[from] NotParked),
    #[error(transparent)]
    NotDrained(#[from] NotDrained),
    #[error(transparent)]
    Device(#[from] devices::Refused),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error(transparent)]
    Move(#[from] migrate::Error),
    #[error("the machine is being built")]
    Absent,
    #[error("{0}")]
    State(&'static str),
}

impl From<kvm::Error> for Error {
    fn from(error: kvm::Error) -> Error {
        match error {
            kvm::Error::Cpuid(lacking) => Error::Cpu(lacking),
            other => Error::Kvm(other),
        }
    }
}

impl Error {
    /// Whose fault it is.
    pub(crate) fn code(&self) -> FaultCode {
        match self {
            Error::Invalid { .. } | Error::File { .. } | Error::Boot(_) | Error::Cpu(_) => FaultCode::Invalid,
            Error::Kvm(kvm::Error::State(_)) | Error::Device(_) => FaultCode::Invalid,
            Error::Snapshot(error) if error.is_of_the_host() => FaultCode::Host,
            Error::Snapshot(_) => FaultCode::Invalid,
            Error::Move(_) | Error::Kvm(_) | Error::Memory(_) | Error::Host { .. } => FaultCode::Host,
            Error::NotParked(_) | Error::NotDrained(_) => FaultCode::Timeout,
            Error::Absent | Error::State(_) => FaultCode::WrongState,
        }
    }
}

impl Machine {
    /// Builds a machine, on what is `ready` for it if anything is, with its vCPUs parked. `spec` has been checked against
    /// the number of descriptors.
    pub(crate) fn build(
        host: &Host,
        spec: MachineSpec,
        descriptors: Vec<OwnedFd>,
        bell: &Arc<Bell>,
        ready: Option<Chassis>,
    ) -> Result<Machine, Error> {
        let descriptors = descriptors.into_iter().map(Some).collect();
        let mut machine = Machine::prepare(host, spec, descriptors, bell)?;
        machine.begin(host, Origin::Kernel { ready })?;
        Ok(machine)
    }

    /// Everything that is done once for a machine, whatever it begins with.
    fn prepare(
        host: &Host,
        spec: MachineSpec,
        descriptors: Vec<Option<OwnedFd>>,
        bell: &Arc<Bell>,
    ) -> Result<Machine, Error> {
        host.check()?;
        let plan = Plan::new(spec, descriptors)?;
        let ring = plan.console().and_then(Ring::open);
        let ring = ring.map_err(|cause| Error::File { field: "/console/ring".to_owned(), cause })?;
        let console = Console::new(ring, Arc::clone(bell));
        let lasting = Lasting::new(&plan.spec, build::open_disks(&plan)?);
        sandbox::close_rings().map_err(|error| Error::Host {
            what: "the sandbox".to_owned(),
            cause: io::Error::other(error),
        })?;
        let run = Run::Paused { clock_ns: 0, since: Instant::now(), clock: Clock::Continue };
        Ok(Machine {
            plan,
            console,
            bell: Arc::clone(bell),
            lasting,
            parts: None,
            run,
            save: None,
            moving: None,
            below: Vec::new(),
            settle: None,
            copying: None,
        })
    }

    fn begin(&mut self, host: &Host, origin: Origin<'_>) -> Result<(), Error> {
        let parts = build::build(host, &self.plan, &self.lasting, &self.console, &self.bell, origin)?;
        self.parts = Some(parts);
        Ok(())
    }

    fn run(&mut self) {
        if let Some(parts) = &self.parts {
            parts.crew.open();
        }
        self.run = Run::Running { since: Instant::now() };
    }

    /// Ends the machine and builds it again as it was specified, with the limits in force. Answers how many
    /// times that was done. The old memory goes first, so that there is never twice of it.
    pub(crate) fn rebuild(&mut self, host: &Host) -> Result<u64, Error> {
        if let Some(save) = &mut self.save {
            save.cancel_before_moment();
        }
        self.abandon_move("the machine was reset");
        // The next memory is its own.
        self.settle = None;
        self.stop();
        // A save may still read the old one.
        if !self.save.as_ref().is_some_and(Save::is_under_way) {
            self.below.clear();
        }
        // What the old guest still had to say is not the new one's; how a save stands is nobody's but the daemon's.
        let news = self.bell.take();
        if news.save {
            self.bell.save();
        }
        if news.moving {
            self.bell.moving();
        }
        self.lasting.resets += 1;
        self.begin(host, Origin::Kernel { ready: None })?;
        self.run();
        Ok(self.lasting.resets)
    }

    /// Ends vCPUs and devices; what is in flight is finished first.
    pub(crate) fn stop(&mut self) {
        self.cancel_settle();
        if let Some(mut parts) = self.parts.take() {
            self.lasting.count_run(&self.run);
            self.run = Run::Paused { clock_ns: 0, since: Instant::now(), clock: Clock::Continue };
            parts.crew.leave();
            self.lasting.count_vcpus(&parts.crew);
            parts.root.stop();
        }
    }

    /// Ends it for good. The kernel takes some 15 ms for the last reference to a VM and 20 for that to a tap: it is given both
    /// at once.
    pub(crate) fn close(self) {
        let vm = self.parts.as_ref().map(|parts| Arc::clone(&parts.vm));
        let taps: Vec<_> = self.plan.spec.nics.iter().map(|nic| self.plan.copy(nic.tap)).collect();
        drop(self);
        std::thread::scope(|scope| {
            // Without the thread it is closed here.
            let _ = std::thread::Builder::new().name("close".to_owned()).spawn_scoped(scope, || drop(vm));
            drop(taps);
        });
    }

    /// Stops vCPUs, then drains devices. When that fails, the machine runs on. A save that waits for this moment has
    /// it then; when that fails, the save tells. `clock` says whether the time is the guest's: that of a pause that somebody
    /// asked for is not, and of a machine that is parked already it is not from here on.
    pub(crate) fn pause(&mut self, clock: Clock) -> Result<(), Error> {
        // It came paused, though not all of its memory is here.
        if self.is_owed() && self.is_paused() {
            return Ok(());
        }
        self.check_not_moving()?;
        self.park()?;
        if let (Clock::Continue, Some(clock_ns)) = (clock, self.stopped_ns()) {
            self.run = Run::Paused { clock_ns, since: Instant::now(), clock };
        }
        let _ = self.take_moment();
        Ok(())
    }

    /// The same for ourselves: the time passes for the guest, which would fall behind a little more each time.
    fn park(&mut self) -> Result<(), Error> {
        if self.is_paused() {
            return Ok(());
        }
        let parts = self.parts.as_ref().ok_or(Error::Absent)?;
        parts.crew.park()?;
        let since = Instant::now();
        let drained = match parts.vm.clock_ns() {
            Ok(clock_ns) => parts.root.pause().map(|()| clock_ns).map_err(Error::from),
            Err(error) => Err(error.into()),
        };
        match drained {
            Ok(clock_ns) => {
                self.lasting.count_run(&self.run);
                self.run = Run::Paused { clock_ns, since, clock: Clock::Advance };
                Ok(())
            }
            Err(error) => {
                parts.crew.open();
                Err(error)
            }
        }
    }

    /// What the clock of a guest that stands still would show now, if it went on. Nothing while it runs.
    fn stopped_ns(&self) -> Option<u64> {
        match self.run {
            Run::Running { .. } => None,
            Run::Paused { clock_ns, clock: Clock::Continue, .. } => Some(clock_ns),
            Run::Paused { clock_ns, since, clock: Clock::Advance } => {
                Some(clock_ns.saturating_add(nanoseconds(since.elapsed())))
            }
        }
    }

    /// Lets devices and then vCPUs go on. A thread that is parked waits for no CPU, so none of the time is stolen either.
    pub(crate) fn resume(&mut self) -> Result<(), Error> {
        // It goes on already, though not all of its memory is here.
        if self.is_owed() && !self.is_paused() {
            return Ok(());
        }
        self.check_not_moving()?;
        self.go_on()
    }

    fn go_on(&mut self) -> Result<(), Error> {
        let Some(clock_ns) = self.stopped_ns() else { return Ok(()) };
        if self.save.as_ref().is_some_and(Save::needs_stillness) {
            return Err(Error::State("memory is being saved; wait for the end of that, or cancel it"));
        }
        let parts = self.parts.as_ref().ok_or(Error::Absent)?;
        parts.vm.set_clock_ns(clock_ns)?;
        parts.root.resume();
        parts.crew.open();
        self.run = Run::Running { since: Instant::now() };
        Ok(())
    }

    pub(crate) fn is_paused(&self) -> bool {
        matches!(self.run, Run::Paused { .. })
    }

    pub(crate) fn on_reset(&self) -> OnReset {
        self.plan.spec.on_reset
    }

    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    /// Types on the console; answers how many bytes were taken.
    pub(crate) fn type_on_console(&self, bytes: &[u8]) -> usize {
        self.parts.as_ref().map_or(0, |parts| parts.serial.input(bytes))
    }

    pub(crate) fn press_power_button(&self) {
        if let Some(parts) = &self.parts {
            parts.power.press_power_button();
        }
    }

    /// Asks the guest for memory, now and after every reset.
    pub(crate) fn set_balloon(&mut self, target_bytes: u64) -> Result<(), Error> {
        let balloon = wire::machine::Balloon { target_bytes };
        self.plan.change(|spec| spec.balloon = balloon)?;
        if let Some(parts) = &self.parts {
            parts.balloon.set_target_bytes(target_bytes);
        }
        Ok(())
    }

    /// Replaces the limits of a disk, now and after every reset.
    pub(crate) fn limit_disk(&mut self, disk: u16, limits: RateLimits) -> Result<(), Error> {
        let at = usize::from(disk);
        let has = self.plan.spec.disks.len();
        self.plan
            .change(|spec| spec.disks.iter_mut().skip(at).take(1).for_each(|disk| disk.limits = limits))?;
        match self.parts.as_ref().and_then(|parts| parts.disks.get(at)) {
            Some(control) => control.set_limits(translate::limits(limits)),
            None => return Err(none_such("disk", disk, has)),
        }
        Ok(())
    }

    /// Replaces the limits of an interface, now and after every reset.
    pub(crate) fn limit_nic(&mut self, nic: u16, rx: RateLimits, tx: RateLimits) -> Result<(), Error> {
        let at = usize::from(nic);
        let has = self.plan.spec.nics.len();
        self.plan.change(|spec| {
            spec.nics.iter_mut().skip(at).take(1).for_each(|nic| (nic.rx_limits, nic.tx_limits) = (rx, tx));
        })?;
        match self.parts.as_ref().and_then(|parts| parts.nics.get(at)) {
            Some(control) => control.set_limits(translate::limits(rx), translate::limits(tx)),
            None => return Err(none_such("nic", nic, has)),
        }
        Ok(())
    }

    pub(crate) fn stats(&self) -> MachineStats {
        self.lasting.report(&self.run, self.parts.as_ref(), &self.plan.spec, &self.console)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn none_such(what: &str, number: u16, has: usize) -> Error {
    Error::Invalid {
        field: format!("/{what}"),
        detail: format!("there is no {what} {number}; the machine has {has}"),
    }
}
