//! Building a machine from what was saved, instead of from a kernel. What the files look like is in `snapshot`, what is
//! checked of each part where it is taken over; here is the order of things.
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use kvm::Host;
use memory::{Backing, Ram};
use wire::saved::table::Table;
use wire::saved::{Clock, Counters, Identity, LowerFiles, MemoryUse, RestoreSpec, Then};

use super::build::Origin;
use super::chassis::Chassis;
use super::save::{Files, shape, wall_ns};
use super::{Error, Machine, Run};
use crate::bell::Bell;
use crate::boot;
use crate::limits::MAPPED_RUNS_MAX;
use crate::snapshot::{self, MemoryFiles};

impl Machine {
    /// Builds the machine that was saved, on what is `ready` for it if anything is. `spec` has been checked against the
    /// number of descriptors.
    pub(crate) fn restore(
        host: &Host,
        spec: RestoreSpec,
        descriptors: Vec<OwnedFd>,
        bell: &Arc<Bell>,
        ready: Option<Chassis>,
    ) -> Result<Machine, Error> {
        let RestoreSpec { machine, state, root, memory, lower, how, clock, counters, identity, then } = spec;
        let mut files = Files::new(descriptors);
        let (state, memory) = (files.take("/state", state)?, files.take("/memory", memory)?);
        let memory = memory_files(&mut files, memory, lower, machine.memory_bytes)?;
        let (contents, table) = snapshot::read(&state, root, machine.memory_bytes)?;
        contents.shape.check(&shape(&machine)).map_err(snapshot::Error::from)?;
        if table.memory_bytes != machine.memory_bytes {
            let detail = format!("/state: its table is one of {} bytes of memory", table.memory_bytes);
            return Err(Error::Invalid { field: "/machine/memory_bytes".to_owned(), detail });
        }
        if (how, identity) == (MemoryUse::Adopt, Identity::New) {
            let detail = "memory that is adopted belongs to the same machine".to_owned();
            return Err(Error::Invalid { field: "/identity".to_owned(), detail });
        }
        let clock_ns = match clock {
            Clock::Continue => contents.machine.clock_ns,
            Clock::Advance => {
                let passed_ns = wall_ns().saturating_sub(contents.machine.wall_ns);
                contents.machine.clock_ns.saturating_add(passed_ns)
            }
        };
        let size = machine.chassis();
        let mut built = Machine::prepare(host, machine, files.0, bell)?;
        let chassis = match (how, ready) {
            (MemoryUse::Private, Some(ready)) => ready.over(&memory)?,
            (MemoryUse::Copy, Some(ready)) => {
                snapshot::copy_in(&ready.ram, &table, &memory)?;
                ready
            }
            _ => Chassis::around(host, size, fill(how, &memory, &table)?)?,
        };
        if identity == Identity::New {
            boot::renew_generation(&chassis.ram)?;
        }
        if counters == Counters::Continue {
            built.lasting.before = contents.counted.stats;
        }
        built.begin(host, Origin::Saved { chassis, state: &contents.machine, clock_ns })?;
        if how == MemoryUse::Private {
            built.below = memory.into_files();
        }
        if let (Identity::New, Some(parts)) = (identity, &built.parts) {
            parts.power.tell_generation();
            parts.functions.iter().for_each(|function| function.tell_new_owner());
        }
        built.run = Run::Paused { clock_ns, since: Instant::now(), clock };
        if then == Then::Run {
            built.resume()?;
        }
        Ok(built)
    }
}

/// The memory file with those below it.
fn memory_files(
    files: &mut Files,
    own: File,
    lower: Option<LowerFiles>,
    memory_bytes: u64,
) -> Result<MemoryFiles, Error> {
    let Some(LowerFiles { runs, digest, files: named }) = lower else { return Ok(MemoryFiles::one(own)) };
    let runs = files.take("/lower/runs", runs)?;
    let below = named.into_iter().map(|file| files.take("/lower/files", file)).collect::<Result<_, _>>()?;
    Ok(MemoryFiles::new(own, (&runs, digest), below, memory_bytes)?)
}

fn fill(how: MemoryUse, files: &MemoryFiles, table: &Table) -> Result<Arc<Ram>, Error> {
    let memory_bytes = table.memory_bytes;
    let own = || files.own.try_clone().map_err(|cause| Error::File { field: "/memory".to_owned(), cause });
    match how {
        MemoryUse::Private => {
            let ram = memory::build(memory_bytes, Backing::Private(own()?))?;
            files.lay_over(&ram, MAPPED_RUNS_MAX)?;
            Ok(ram)
        }
        MemoryUse::Adopt => Ok(memory::build(memory_bytes, Backing::Adopted(own()?))?),
        MemoryUse::Copy => {
            let ram = memory::new(memory_bytes)?;
            snapshot::copy_in(&ram, table, files)?;
            Ok(ram)
        }
    }
}
