//! Saving a machine and building one from what was saved. What lies still while it is paused is taken at once; memory is
//! copied by a thread of its own, which tells through the bell how far it is. What the files look like is in `snapshot`.
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm::Host;
use memory::{Backing, Extent, Ram};
use wire::machine::{FdIndex, MachineSpec};
use wire::saved::{Clock, Counters, MemoryUse, RestoreSpec, SaveReport, SaveSpec, SaveStatus, Then};

use super::build::Origin;
use super::{Error, Machine, Run};
use crate::bell::Bell;
use crate::limits::SAVE_TOLD_EVERY_MS;
use crate::log;
use crate::snapshot::{self, Contents, Counted, MachineState, Shape, Table};
use crate::threads::{self, ThreadKind};

/// A save from its begin on. Dropped, it is cancelled and waited for.
pub(super) struct Save {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and the others see.
struct Shared {
    cancelled: AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: u64,
    /// There when it has ended.
    result: Mutex<Option<Result<SaveReport, String>>>,
    bell: Arc<Bell>,
}

/// What the thread works on.
struct Work {
    contents: Contents,
    ram: Arc<Ram>,
    extents: Vec<Extent>,
    state: File,
    memory: File,
    began: Instant,
}

impl Machine {
    /// Begins to save a machine that is paused, into the files of the packet.
    pub(crate) fn save(&mut self, spec: &SaveSpec, descriptors: Vec<OwnedFd>) -> Result<(), Error> {
        let began = Instant::now();
        if self.save.as_ref().is_some_and(Save::is_under_way) {
            return Err(Error::State("a save is under way; wait for its end, or cancel it"));
        }
        if !self.is_paused() {
            return Err(Error::State("the machine runs; pause it first"));
        }
        let mut files = Files::new(descriptors);
        let (state, memory) = (files.take("/state", spec.state)?, files.take("/memory", spec.memory)?);
        let contents = self.contents()?;
        let parts = self.parts.as_ref().ok_or(Error::Absent)?;
        let ram = Arc::clone(&parts.ram);
        let extents = memory::touched(&ram)?;
        let work = Work { contents, ram, extents, state, memory, began };
        self.save = Some(Save::begin(work, &self.bell)?);
        Ok(())
    }

    /// Gives up the save that is under way, if one is.
    pub(crate) fn cancel_save(&mut self) {
        if let Some(save) = &mut self.save {
            save.cancel();
        }
    }

    /// How the save that is under way, or the last one, stands.
    pub(crate) fn save_status(&self) -> SaveStatus {
        self.save.as_ref().map_or(SaveStatus::None, |save| save.shared.status())
    }

    /// Everything but memory, of a machine that is paused.
    fn contents(&self) -> Result<Contents, Error> {
        let Run::Paused { clock_ns } = self.run else { return Err(Error::State("the machine runs")) };
        let parts = self.parts.as_ref().ok_or(Error::Absent)?;
        let functions = parts.functions.iter().map(|function| function.save());
        Ok(Contents {
            shape: shape(&self.plan.spec),
            machine: MachineState {
                cpuid: parts.cpuid.clone(),
                cpus: parts.crew.save(&parts.msrs)?,
                vm: parts.vm.save()?,
                clock_ns,
                wall_ns: wall_ns(),
                pci_address: parts.root.address(),
                functions: functions.collect::<Result<_, _>>()?,
                serial: parts.serial.save(),
                events: parts.power.save(),
            },
            counted: Counted { stats: self.stats() },
        })
    }

    /// Builds the machine that was saved. `spec` has been checked against the number of descriptors.
    pub(crate) fn restore(
        host: &Host,
        spec: RestoreSpec,
        descriptors: Vec<OwnedFd>,
        bell: &Arc<Bell>,
    ) -> Result<Machine, Error> {
        let RestoreSpec { machine, state, root, memory, how, clock, counters, then } = spec;
        let mut files = Files::new(descriptors);
        let (state, memory) = (files.take("/state", state)?, files.take("/memory", memory)?);
        let (contents, table) = snapshot::read(&state, root, machine.memory_bytes)?;
        contents.shape.check(&shape(&machine))?;
        let ram = fill(how, memory, &table, machine.memory_bytes)?;
        let clock_ns = match clock {
            Clock::Continue => contents.machine.clock_ns,
            Clock::Advance => {
                let passed_ns = wall_ns().saturating_sub(contents.machine.wall_ns);
                contents.machine.clock_ns.saturating_add(passed_ns)
            }
        };
        let mut built = Machine::prepare(host, machine, files.0, bell)?;
        if counters == Counters::Continue {
            built.lasting.before = contents.counted.stats;
        }
        built.begin(host, Origin::Saved { ram, state: &contents.machine, clock_ns })?;
        built.run = Run::Paused { clock_ns };
        if then == Then::Run {
            built.resume()?;
        }
        Ok(built)
    }
}

fn shape(spec: &MachineSpec) -> Shape {
    Shape {
        memory_bytes: spec.memory_bytes,
        vcpus: spec.vcpus,
        disks: spec.disks.len() as u16,
        nics: spec.nics.len() as u16,
    }
}

/// The host's wall clock in nanoseconds since 1970.
fn wall_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn fill(how: MemoryUse, file: File, table: &Table, memory_bytes: u64) -> Result<Arc<Ram>, Error> {
    if table.memory_bytes != memory_bytes {
        let detail = format!("/state: its table is one of {} bytes of memory", table.memory_bytes);
        return Err(Error::Invalid { field: "/machine/memory_bytes".to_owned(), detail });
    }
    match how {
        MemoryUse::Private => Ok(memory::build(memory_bytes, Backing::Private(file))?),
        MemoryUse::Adopt => Ok(memory::build(memory_bytes, Backing::Adopted(file))?),
        MemoryUse::Copy => {
            let ram = memory::new(memory_bytes)?;
            snapshot::copy_in(&ram, table, &file)?;
            Ok(ram)
        }
    }
}

/// The descriptors of a packet, each taken once.
struct Files(Vec<Option<OwnedFd>>);

impl Files {
    fn new(descriptors: Vec<OwnedFd>) -> Files {
        Files(descriptors.into_iter().map(Some).collect())
    }

    fn take(&mut self, field: &str, FdIndex(at): FdIndex) -> Result<File, Error> {
        let taken = self.0.get_mut(usize::from(at)).and_then(Option::take);
        let absent = || Error::File { field: field.to_owned(), cause: io::ErrorKind::NotFound.into() };
        taken.map(File::from).ok_or_else(absent)
    }
}

impl Save {
    fn begin(work: Work, bell: &Arc<Bell>) -> Result<Save, Error> {
        let shared = Arc::new(Shared {
            cancelled: AtomicBool::new(false),
            done_bytes: AtomicU64::new(0),
            total_bytes: work.extents.iter().map(|extent| extent.bytes).sum(),
            result: Mutex::new(None),
            bell: Arc::clone(bell),
        });
        let seen = Arc::clone(&shared);
        let run = move || {
            threads::enter(ThreadKind::Save);
            let result = seen.copy(&work).map_err(|error| log::chain(&error));
            drop(work);
            *seen.result() = Some(result);
            seen.bell.save();
        };
        let thread = std::thread::Builder::new().name("save".to_owned()).spawn(run);
        let thread = thread.map_err(|cause| Error::Host { what: "the save thread".to_owned(), cause })?;
        Ok(Save { shared, thread: Some(thread) })
    }

    /// Whether it has not come to its end.
    pub(super) fn is_under_way(&self) -> bool {
        self.shared.result().is_none()
    }

    /// Whether the machine has to stay paused for it.
    pub(super) fn needs_stillness(&self) -> bool {
        self.is_under_way()
    }

    fn cancel(&mut self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // A panic has aborted the process before it could get here.
            let _ = thread.join();
        }
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Shared {
    fn copy(&self, work: &Work) -> Result<SaveReport, snapshot::Error> {
        let mut told = Instant::now();
        let memory_bytes = work.contents.shape.memory_bytes;
        let table = snapshot::copy_out(&work.ram, memory_bytes, &work.extents, &work.memory, |bytes| {
            self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
            if told.elapsed() > Duration::from_millis(SAVE_TOLD_EVERY_MS) {
                told = Instant::now();
                self.bell.save();
            }
            !self.cancelled.load(Ordering::SeqCst)
        })?;
        let (root, state_bytes) = snapshot::write(&work.state, &work.contents, &table)?;
        Ok(SaveReport {
            root,
            state_bytes,
            memory_bytes: table.bytes(),
            stall_us: 0,
            total_us: u64::try_from(work.began.elapsed().as_micros()).unwrap_or(u64::MAX),
        })
    }

    fn status(&self) -> SaveStatus {
        match &*self.result() {
            Some(Ok(report)) => SaveStatus::Saved(report.clone()),
            Some(Err(detail)) => SaveStatus::Failed { detail: detail.clone() },
            None => SaveStatus::Copying {
                done_bytes: self.done_bytes.load(Ordering::Relaxed),
                total_bytes: self.total_bytes,
            },
        }
    }

    fn result(&self) -> std::sync::MutexGuard<'_, Option<Result<SaveReport, String>>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
