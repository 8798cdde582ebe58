//! KVM's log of the pages that vCPUs, and KVM itself, have written: asked for whole, cleared piece by piece just before
//! a piece is copied. What devices write is not in it; `memory::marks` has that.
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use memory::{Extent, Pages};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::error::failed;
use crate::{Error, Vm};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, 0xAE, 0xC0, kvm_clear_dirty_log);

/// Bits of the capability's argument (KVM API, section 7.19): pages are protected when they are cleared, not when they
/// are asked for; and all of them count as written at first, so that nothing has to be protected at the start.
const MANUAL_PROTECT: u64 = 1;
const INITIALLY_SET: u64 = 2;

const PAGE_BYTES: u64 = memory::marks::PAGE_BYTES;

/// The log of one VM, from its start until it is dropped.
#[derive(Debug)]
pub struct DirtyLog {
    vm: Arc<Vm>,
    /// Whether pages stay in the log until they are cleared.
    manual: bool,
}

impl DirtyLog {
    /// Starts to log, with vCPUs running or not. Every page may count as written at first: whoever starts copies all
    /// of them anyway.
    pub fn start(vm: &Arc<Vm>) -> Result<DirtyLog, Error> {
        let wanted = [MANUAL_PROTECT | INITIALLY_SET, MANUAL_PROTECT];
        let enable = |argument: &u64| {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            cap.args = [*argument, 0, 0, 0];
            vm.fd.enable_cap(&cap).is_ok()
        };
        // A kernel without it clears pages when they are asked for, which is only slower.
        let log = DirtyLog { vm: Arc::clone(vm), manual: wanted.iter().any(enable) };
        vm.set_slots(KVM_MEM_LOG_DIRTY_PAGES)?;
        Ok(log)
    }

    /// Whether pages stay in it when they are asked for.
    pub fn keeps(&self) -> bool {
        self.manual
    }

    /// Adds what was written to `pages`. Where nothing has to be cleared, the log is empty then.
    pub fn collect(&self, pages: &mut Pages) -> Result<(), Error> {
        let mut found = Vec::new();
        for (slot, region) in (0u32..).zip(self.vm.memory.iter()) {
            let words = self.vm.fd.get_dirty_log(slot, region.len() as usize);
            found.push(words.map_err(failed("KVM_GET_DIRTY_LOG"))?);
        }
        pages.add(&found);
        Ok(())
    }

    /// Adds what was written of `part`, which lies in one region and begins and ends with a multiple of 64 pages, to `pages`. Where
    /// nothing has to be cleared, the log of that whole region is empty then.
    pub fn collect_part(&self, part: Extent, pages: &mut Pages) -> Result<(), Error> {
        let mut before = 0;
        for (slot, region) in (0u32..).zip(self.vm.memory.iter()) {
            let end = before + region.len();
            if (before..end).contains(&part.offset) {
                let words = self.vm.fd.get_dirty_log(slot, region.len() as usize);
                let words = words.map_err(failed("KVM_GET_DIRTY_LOG"))?;
                let word = |offset: u64| (offset / PAGE_BYTES / 64) as usize;
                let (from, to) = (part.offset - before, (part.offset + part.bytes).min(end) - before);
                pages.add_words(part.offset, words.get(word(from)..word(to)).unwrap_or_default());
            }
            before = end;
        }
        Ok(())
    }

    /// Takes the pages of `part` that are in `pages` out of the log: who writes to them from now on is logged again, so
    /// they are read after this. `part` begins and ends with a multiple of 64 pages.
    pub fn clear(&self, part: Extent, pages: &Pages) -> Result<(), Error> {
        if !self.manual {
            return Ok(());
        }
        let mut before = 0;
        for (slot, region) in (0u32..).zip(self.vm.memory.iter()) {
            let end = before + region.len();
            let (from, to) = (part.offset.max(before), (part.offset + part.bytes).min(end));
            if from < to {
                let words = pages.words_of(Extent { offset: from, bytes: to - from });
                self.clear_words(slot, (from - before) / PAGE_BYTES, words)?;
            }
            before = end;
        }
        Ok(())
    }

    fn clear_words(&self, slot: u32, first_page: u64, words: &[u64]) -> Result<(), Error> {
        if words.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let dirty_bitmap = words.as_ptr().cast_mut().cast();
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: words.len() as u32 * 64,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap },
        };
        // SAFETY: KVM reads one bit for each of `num_pages` pages, which is all of `words`, and writes nothing.
        match unsafe { ioctl_with_ref(&self.vm.fd, KVM_CLEAR_DIRTY_LOG(), &request) } {
            0 => Ok(()),
            _ => Err(failed("KVM_CLEAR_DIRTY_LOG")(vmm_sys_util::errno::Error::last())),
        }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // A log that goes on costs time and nothing else.
        let _ = self.vm.set_slots(0);
    }
}
