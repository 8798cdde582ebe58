//! Saving a machine: when the moment comes, and what of the machine is taken then. Memory is copied by a thread of `job`;
//! what the files look like is in `snapshot`.
//!
//! ```text
//! paused ───────────────────────── Save ──▶ moment ─▶ copying, the machine has to stay paused ─▶ saved
//! running ── Save(live) ─▶ arming ─▶ armed ─▶ moment ─▶ copying, the machine runs ─▶ saved
//! ```
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use memory::guard::Guard;
use wire::machine::{FdIndex, MachineSpec};
use wire::saved::{Moment, SaveSpec, SaveStatus};

use super::{Error, Machine, nanoseconds};
use crate::snapshot::{self, Contents, Counted, MachineState, Shape};

mod job;

use job::Outputs;
pub(super) use job::Save;

impl Machine {
    /// Begins to save the machine into the files of the packet.
    pub(crate) fn save(&mut self, spec: &SaveSpec, descriptors: Vec<OwnedFd>) -> Result<(), Error> {
        let began = Instant::now();
        self.check_not_moving()?;
        if self.save.as_ref().is_some_and(Save::is_under_way) {
            return Err(Error::State("a save is under way; wait for its end, or cancel it"));
        }
        if spec.live.is_none() && !self.is_paused() {
            return Err(Error::State(
                "the machine runs; pause it first, or send a descriptor of /dev/userfaultfd to save it as it runs",
            ));
        }
        self.cancel_settle();
        let mut files = Files::new(descriptors);
        let memory_bytes = self.plan.spec.memory_bytes;
        let base = spec.base.map(|base| {
            let state = files.take("/base/state", base.state)?;
            Ok::<_, Error>(snapshot::read_table(&state, base.root, memory_bytes)?)
        });
        let base = base.transpose()?;
        let outputs = Outputs {
            state: files.take("/state", spec.state)?,
            memory: files.take("/memory", spec.memory)?,
            memory_bytes,
            base,
            began,
        };
        let ram = Arc::clone(&self.parts.as_ref().ok_or(Error::Absent)?.ram);
        // The one before is let go of first: two must not guard the same memory.
        self.save = None;
        self.save = Some(match spec.live {
            Some(live) => {
                let device = files.take("/live/userfaultfd", live.userfaultfd)?;
                let guard = Arc::new(Guard::new(device.as_fd(), &ram)?);
                Save::live(outputs, guard, live.moment, &self.bell)?
            }
            None => {
                let (contents, extents) = (self.contents()?, memory::touched(&ram)?);
                Save::still(outputs, ram, extents, contents, &self.bell)?
            }
        });
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
        self.save.as_ref().map_or(SaveStatus::None, Save::status)
    }

    /// Takes the moment if it has come: memory is protected, and either nobody else says when, or the machine has been
    /// paused for it. A machine that runs stands still for the time of it.
    pub(crate) fn take_moment(&mut self) -> Result<(), Error> {
        let Some(moment) = self.save.as_ref().and_then(Save::awaits) else { return Ok(()) };
        if self.is_paused() {
            return self.take();
        }
        if moment == Moment::Pause {
            return Ok(());
        }
        let began = Instant::now();
        self.park()?;
        let taken = self.take();
        self.go_on()?;
        if let Some(save) = &self.save {
            save.stood_still(began.elapsed());
        }
        taken
    }

    fn take(&mut self) -> Result<(), Error> {
        let Some(save) = &self.save else { return Ok(()) };
        match self.contents() {
            Ok(contents) => {
                save.moment(contents);
                Ok(())
            }
            Err(error) => {
                save.fail(&error);
                Err(error)
            }
        }
    }

    /// Everything but memory, of a machine that is paused.
    pub(super) fn contents(&self) -> Result<Contents, Error> {
        // To the wall clock belongs what the guest's clock would show now.
        let clock_ns = self.stopped_ns().ok_or(Error::State("the machine runs"))?;
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
}

pub(super) fn shape(spec: &MachineSpec) -> Shape {
    Shape {
        memory_bytes: spec.memory_bytes,
        vcpus: spec.vcpus,
        disks: spec.disks.len() as u16,
        nics: spec.nics.len() as u16,
    }
}

/// The host's wall clock in nanoseconds since 1970.
pub(super) fn wall_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    nanoseconds(since)
}

/// The descriptors of a packet, each taken once.
pub(super) struct Files(pub(super) Vec<Option<OwnedFd>>);

impl Files {
    pub(super) fn new(descriptors: Vec<OwnedFd>) -> Files {
        Files(descriptors.into_iter().map(Some).collect())
    }

    pub(super) fn take(&mut self, field: &str, FdIndex(at): FdIndex) -> Result<File, Error> {
        let taken = self.0.get_mut(usize::from(at)).and_then(Option::take);
        let absent = || Error::File { field: field.to_owned(), cause: io::ErrorKind::NotFound.into() };
        taken.map(File::from).ok_or_else(absent)
    }
}
