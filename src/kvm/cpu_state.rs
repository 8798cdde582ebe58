//! A virtual processor as data: taken while it is parked, given to another on this host or the next. KVM's own
//! structures are kept as it lays them out, which its interface fixes; KVM checks what is in them. Checked here is what
//! it would take and should not: sizes, which registers are written at all, and the rate of the counter.
use std::io;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::failed;
use crate::{Error, Host, Vcpu, msrs};

/// One vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    /// `kvm_mp_state`: whether it runs, is halted or waits for its start-up interrupt.
    pub mp_state: u32,
    /// `kvm_regs`.
    pub regs: Vec<u8>,
    /// `kvm_sregs`.
    pub sregs: Vec<u8>,
    /// `kvm_xsave`, without the zeroes at its end.
    pub xsave: Vec<u8>,
    /// `kvm_xcrs`, without the zeroes at its end.
    pub xcrs: Vec<u8>,
    /// `kvm_debugregs`.
    pub debugregs: Vec<u8>,
    /// `kvm_lapic_state`, without the zeroes at its end.
    pub lapic: Vec<u8>,
    /// `kvm_vcpu_events`.
    pub events: Vec<u8>,
    /// Model-specific registers, in the order they are written.
    pub msrs: Vec<(u32, u64)>,
    /// Rate of the time stamp counter in kHz; 0 when KVM does not tell.
    pub tsc_khz: u32,
}

/// The same as KVM takes it.
struct Parts {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl CpuState {
    /// Checks all that can be checked without KVM, which a restore does before KVM is given anything.
    pub fn check(&self) -> Result<(), Error> {
        self.parts().map(drop)
    }

    fn parts(&self) -> Result<Parts, Error> {
        if !MP_STATES.contains(&self.mp_state) {
            return Err(Error::State(format!("a processor in state {} cannot be", self.mp_state)));
        }
        if let Some((msr, _)) = self.msrs.iter().find(|(msr, _)| !msrs::KEPT.contains(msr)) {
            return Err(Error::State(format!("register {msr:#x} is none that is kept")));
        }
        Ok(Parts {
            mp_state: kvm_mp_state { mp_state: self.mp_state },
            regs: read("regs", &self.regs)?,
            sregs: read("sregs", &self.sregs)?,
            xsave: fill("xsave", &self.xsave)?,
            xcrs: fill("xcrs", &self.xcrs)?,
            debugregs: read("debugregs", &self.debugregs)?,
            lapic: fill("lapic", &self.lapic)?,
            events: read("events", &self.events)?,
        })
    }
}

/// The largest difference between two counters' rates that still counts as the same, in millionths: what NTP corrects,
/// and what KVM itself tolerates.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Values of `mp_state` on x86 (KVM API, section 4.38): runnable, uninitialised, waits for SIPI, halted.
const MP_STATES: [u32; 4] = [0, 1, 2, 3];

impl Host {
    /// The model-specific registers that a machine on this host has and that are worth keeping.
    pub fn kept_msrs(&self) -> Result<Vec<u32>, Error> {
        let list = self.fd.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(msrs::KEPT.iter().copied().filter(|msr| list.as_slice().contains(msr)).collect())
    }
}

impl Vcpu {
    /// The processor as it stands; it is outside KVM_RUN. `msrs` is what [`Host::kept_msrs`] answers.
    pub fn save(&self, msrs: &[u32]) -> Result<CpuState, Error> {
        let fd = &self.fd;
        // First: asking for it makes KVM act on a start-up interrupt that has arrived.
        let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?.mp_state;
        Ok(CpuState {
            mp_state,
            regs: bytes(&fd.get_regs().map_err(failed("KVM_GET_REGS"))?),
            sregs: bytes(&fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?),
            xsave: cut(&fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?),
            xcrs: cut(&fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?),
            debugregs: bytes(&fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?),
            lapic: cut(&fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?),
            msrs: self.read_msrs(msrs)?,
            tsc_khz: fd.get_tsc_khz().unwrap_or_default(),
            events: bytes(&fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?),
        })
    }

    /// Makes this processor, which was shown its CPUID and has never run, what another was. Guest memory is complete:
    /// some registers make KVM write to it.
    pub fn restore(&self, state: &CpuState) -> Result<(), Error> {
        let parts = state.parts()?;
        self.check_rate(state.tsc_khz)?;
        let fd = &self.fd;
        fd.set_mp_state(parts.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        fd.set_regs(&parts.regs).map_err(failed("KVM_SET_REGS"))?;
        fd.set_sregs(&parts.sregs).map_err(failed("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads as many bytes as the process has asked features for. None that goes beyond `kvm_xsave`
        // is on before a process asks for it (arch_prctl), which no room of ours does.
        unsafe { fd.set_xsave(&parts.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&parts.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&parts.debugregs).map_err(failed("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&parts.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        // After the local APIC, which holds the mode that a deadline needs.
        self.write_msrs(&state.msrs)?;
        fd.set_vcpu_events(&parts.events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }

    /// How fast its time stamp counter runs, in thousands of ticks a second.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    fn check_rate(&self, saved_khz: u32) -> Result<(), Error> {
        let here_khz = self.fd.get_tsc_khz().unwrap_or_default();
        let apart = u64::from(saved_khz.abs_diff(here_khz)).saturating_mul(1_000_000);
        let is_same = apart <= u64::from(here_khz).saturating_mul(TSC_TOLERANCE_PPM);
        if is_same || saved_khz == 0 || here_khz == 0 || self.fd.set_tsc_khz(saved_khz).is_ok() {
            return Ok(());
        }
        Err(Error::State(format!(
            "its time stamp counter ran at {saved_khz} kHz, this host's runs at {here_khz} kHz and cannot be scaled"
        )))
    }

    fn read_msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
        let mut found = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let mut list = entries(rest.iter().map(|index| (*index, 0)))?;
            let count = self.fd.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
            found.extend(list.as_slice().iter().take(count).map(|entry| (entry.index, entry.data)));
            // KVM stops at the first that this machine does not have: its CPUID hides it.
            rest = rest.get(count + 1..).unwrap_or_default();
        }
        Ok(found)
    }

    fn write_msrs(&self, values: &[(u32, u64)]) -> Result<(), Error> {
        let write = |values: &[(u32, u64)]| {
            let list = entries(values.iter().copied())?;
            self.fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))
        };
        let mut rest = values;
        loop {
            let count = write(rest)?;
            let Some((index, value)) = rest.get(count) else { return Ok(()) };
            // Its guest was told that it does not have it. It could refuse to be moved otherwise.
            let is_off = msrs::KEPT_THOUGH_REFUSED.contains(index) && write(&[(*index, 0)])? == 1;
            if !is_off {
                return Err(Error::State(format!(
                    "register {index:#x} cannot have the value {value:#x} here"
                )));
            }
            rest = rest.get(count + 1..).unwrap_or_default();
        }
    }
}

fn entries(values: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, Error> {
    let entries: Vec<_> =
        values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::TooLong("MSR list"))
}

/// A structure of KVM's as it lies in memory.
pub(crate) fn bytes<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// The same without the zeroes at its end.
pub(crate) fn cut<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    let all = value.as_bytes();
    let end = all.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    all.get(..end).unwrap_or_default().to_vec()
}

/// Undoes [`bytes`].
pub(crate) fn read<T: FromBytes>(what: &'static str, saved: &[u8]) -> Result<T, Error> {
    T::read_from_bytes(saved).map_err(|_| {
        let cause = io::Error::from(io::ErrorKind::InvalidData);
        Error::State(format!("{what} of {} bytes: {cause}", saved.len()))
    })
}

/// Undoes [`cut`].
pub(crate) fn fill<T: FromBytes>(what: &'static str, saved: &[u8]) -> Result<T, Error> {
    if saved.len() > size_of::<T>() {
        return Err(Error::State(format!("{what} of {} bytes is too long", saved.len())));
    }
    let mut whole = saved.to_vec();
    whole.resize(size_of::<T>(), 0);
    read(what, &whole)
}
