//! What a caller changes of a server: it is checked as a whole, then written into the record. Called by the facade in the
//! transaction of the change.
use model::Code;
use model::server::{DiskLimits, PatchNicLimits, PatchServer};

use super::lifecycle::Phase;
use super::record::ServerRecord;
use super::{create, view};
use crate::error::{Error, Result};
use crate::labels;
use crate::network::Networks;
use crate::store::Tx;

/// Writes the change into the record; what it says of the next machine waits for the next start.
pub(super) fn apply(tx: &Tx<'_>, record: &mut ServerRecord, patch: PatchServer) -> Result<()> {
    let mut faults = create::Faults::default();
    faults.machine(patch.vcpus, patch.memory_bytes, patch.cpu.as_ref());
    faults.description(patch.description.as_deref().unwrap_or_default());
    if let Some(limits) = &patch.disk_limits {
        faults.disk_limits("/disk_limits", &limits.applied_to(DiskLimits::default()));
        faults.unless(!record.disks.is_empty(), "/disk_limits", "no_disk", || {
            "the server has no root volume".to_owned()
        });
    }
    let named = patch.nic_limits.as_deref().unwrap_or_default();
    for (at, PatchNicLimits { index, limits }) in named.iter().enumerate() {
        let pointer = format!("/nic_limits/{at}");
        faults.nic_limits(&format!("{pointer}/limits"), limits);
        let is_there = record.nics.iter().any(|nic| nic.index == *index);
        faults.unless(is_there, &format!("{pointer}/index"), "not_found", || {
            format!("the server has {} interfaces, counted from 0", record.nics.len())
        });
        let is_first = !named.iter().take(at).any(|other| other.index == *index);
        faults.unless(is_first, &format!("{pointer}/index"), "repeated", || {
            format!("interface {index} is named twice")
        });
    }
    faults.external_ref(patch.external_ref.as_ref().and_then(Option::as_deref));
    faults.end()?;
    if record.life.phase.is_moving() {
        let detail =
            format!("server {} is moving to another host; change it when it has arrived", record.name);
        return Err(Error::new(Code::WrongState, detail).with_actions(view::allowed_actions(record)));
    }
    let goes_on = record.life.saved.is_some() || record.life.awaited().is_some();
    let is_saved = goes_on || matches!(record.life.phase, Phase::Hibernating { .. });
    if is_saved && (patch.vcpus, patch.memory_bytes, patch.cpu.as_ref()) != (None, None, None) {
        let detail = "the server goes on from a memory, which belongs to the machine it was: wait until it runs, or start \
                      it, before its CPUs or memory are changed";
        return Err(Error::new(Code::WrongState, detail).with_actions(view::allowed_actions(record)));
    }
    if let Some(name) = patch.name {
        Networks::rename(tx, record.id, &name)?;
        record.name = name;
    }
    if let Some(changes) = patch.labels {
        record.labels = labels::merge(&record.labels, changes)?;
    }
    if let (Some(limits), Some(disk)) = (patch.disk_limits, record.disks.first_mut()) {
        disk.limits = limits.applied_to(disk.limits);
    }
    for PatchNicLimits { index, limits } in patch.nic_limits.into_iter().flatten() {
        if let Some(nic) = record.nics.iter_mut().find(|nic| nic.index == index) {
            nic.limits = limits;
        }
    }
    record.external_ref = patch.external_ref.unwrap_or(record.external_ref.take());
    record.description = patch.description.unwrap_or(std::mem::take(&mut record.description));
    record.vcpus = patch.vcpus.unwrap_or(record.vcpus);
    record.memory_bytes = patch.memory_bytes.unwrap_or(record.memory_bytes);
    record.cpu = patch.cpu.unwrap_or(std::mem::take(&mut record.cpu));
    record.restart_policy = patch.restart_policy.unwrap_or(record.restart_policy);
    record.isolation = patch.isolation.unwrap_or(record.isolation);
    Ok(())
}
