//! What CPU the guest sees: KVM's offer, filtered by an explicit table and given this machine's topology.
//! Nothing here calls KVM; `vmm::vcpu` hands the result to a [`crate::Vcpu`].
//!
//! ```text
//! KVM_GET_SUPPORTED_CPUID ─▶ leaves we know ─▶ features of the template ─▶ save area ─▶ topology ─▶ guest
//! ```
//! What the table does not name is hidden, so a feature of a future host reaches no guest before somebody has
//! thought about its state. References: Intel SDM volume 2A (CPUID); AMD APM volume 3, appendix E;
//! Documentation/virt/kvm/x86/cpuid.rst.
use kvm_bindings::kvm_cpuid_entry2;

/// What one leaf answers.
pub use kvm_bindings::kvm_cpuid_entry2 as Entry;

mod features;
pub mod offer;
mod save_area;
mod saved;
mod topology;

use features::{Class, FEATURES, Register};
pub use saved::{Saved, admit, save};

/// A named set of CPU features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Template {
    /// Every feature that the table allows and KVM offers here.
    Host,
    /// x86-64-v2 of the psABI, exactly.
    X86_64V2,
    /// x86-64-v3 of the psABI, exactly.
    X86_64V3,
}

/// The processors of one machine: one socket, one thread per core, APIC ids from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processors {
    /// How many.
    pub count: u8,
    /// Whether KVM emulates the deadline mode of the local timer, which it does not tell in CPUID.
    pub tsc_deadline: bool,
}

/// The host cannot show the CPU of a template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("KVM on this host cannot show an {template} processor, it lacks {}; the template \"host\" takes what there is", .features.join(", "))]
pub struct Lacking {
    /// The template's name.
    pub template: &'static str,
    /// What is absent, by the names of the table.
    pub features: Vec<&'static str>,
}

const HYPERVISOR: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const EXTENDED: u32 = 0x8000_0000;

/// Leaves that reach the guest. Absent on purpose, among others: 5 (MONITOR), 0xA (performance counters), 0xF
/// and 0x10 (resource directors), 0x12 (SGX), 0x14 (trace), 0x15 and 0x16 (frequencies, which change when the
/// machine moves), 0x1D and 0x1E (AMX), 0x8000_000A (nested SVM), 0x8000_001F (memory encryption).
const LEAVES: &[u32] = &[
    0,
    1,
    2,
    4,
    6,
    7,
    0xB,
    0xD,
    0x1F,
    HYPERVISOR,
    KVM_FEATURES,
    EXTENDED,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    0x8000_0008,
    0x8000_001D,
    0x8000_001E,
    0x8000_0021,
];

/// The whole machine's CPUID from what KVM offers; [`for_processor`] completes it for each vCPU.
pub fn shape(
    offer: &[kvm_cpuid_entry2],
    template: Template,
    processors: Processors,
) -> Result<Vec<kvm_cpuid_entry2>, Lacking> {
    let mut entries: Vec<_> =
        offer.iter().filter(|entry| LEAVES.contains(&entry.function)).copied().collect();
    check(&entries, template)?;
    for entry in &mut entries {
        filter(entry, template, processors);
    }
    save_area::trim(&mut entries);
    topology::spread(&mut entries, processors.count);
    limit_leaves(&mut entries);
    Ok(entries)
}

/// Puts the number of one vCPU, which is its APIC id, wherever CPUID tells it.
pub fn for_processor(entries: &[kvm_cpuid_entry2], index: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries = entries.to_vec();
    entries.iter_mut().for_each(|entry| topology::number(entry, index));
    entries
}

impl Template {
    fn name(self) -> &'static str {
        match self {
            Template::Host => "host",
            Template::X86_64V2 => "x86_64_v2",
            Template::X86_64V3 => "x86_64_v3",
        }
    }

    /// Whether a guest of this template may see a feature of this class.
    fn allows(self, class: Class) -> bool {
        match class {
            Class::Base | Class::Platform | Class::Guard => true,
            Class::V2 => true,
            Class::V3 => matches!(self, Template::Host | Template::X86_64V3),
            Class::Host => self == Template::Host,
        }
    }

    /// Whether a template is a lie without the features of this class.
    fn needs(self, class: Class) -> bool {
        match class {
            Class::Base | Class::V2 => self != Template::Host,
            Class::V3 => self == Template::X86_64V3,
            Class::Platform | Class::Guard | Class::Host => false,
        }
    }
}

fn check(entries: &[kvm_cpuid_entry2], template: Template) -> Result<(), Lacking> {
    let absent = |feature: &&features::Feature| template.needs(feature.class) && !feature.is_in(entries);
    let mut features: Vec<_> = FEATURES.iter().filter(absent).map(|feature| feature.name).collect();
    features.sort_unstable();
    features.dedup();
    if features.is_empty() { Ok(()) } else { Err(Lacking { template: template.name(), features }) }
}

/// Registers whose bits are features. All others of the known leaves are numbers and texts.
const FEATURE_REGISTERS: &[(u32, u32, Register)] = &[
    (1, 0, Register::Ecx),
    (1, 0, Register::Edx),
    (6, 0, Register::Eax),
    (6, 0, Register::Ebx),
    (6, 0, Register::Ecx),
    (6, 0, Register::Edx),
    (7, 0, Register::Ebx),
    (7, 0, Register::Ecx),
    (7, 0, Register::Edx),
    (7, 1, Register::Eax),
    (7, 1, Register::Ebx),
    (7, 1, Register::Ecx),
    (7, 1, Register::Edx),
    (7, 2, Register::Eax),
    (7, 2, Register::Ebx),
    (7, 2, Register::Ecx),
    (7, 2, Register::Edx),
    (0xD, 1, Register::Eax),
    (KVM_FEATURES, 0, Register::Eax),
    // Hints, of which the only one promises that vCPUs are never preempted.
    (KVM_FEATURES, 0, Register::Edx),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0007, 0, Register::Eax),
    (0x8000_0007, 0, Register::Ebx),
    (0x8000_0007, 0, Register::Ecx),
    // Among these the invariant counter: with it a guest would rather trust the counter than the paravirtual
    // clock, and neither a pause nor a move to another host keeps the counter true.
    (0x8000_0007, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
    (0x8000_0021, 0, Register::Eax),
    (0x8000_0021, 0, Register::Ebx),
    (0x8000_0021, 0, Register::Ecx),
    (0x8000_0021, 0, Register::Edx),
];

fn filter(entry: &mut kvm_cpuid_entry2, template: Template, processors: Processors) {
    for (leaf, subleaf, register) in FEATURE_REGISTERS {
        if (entry.function, entry.index) != (*leaf, *subleaf) {
            continue;
        }
        let here = FEATURES.iter().filter(|feature| feature.is_at(*leaf, *subleaf, *register));
        let allowed = here.filter(|feature| template.allows(feature.class));
        let mask = allowed.fold(0, |mask, feature| mask | 1 << feature.bit);
        *register.of_mut(entry) &= mask;
    }
    if entry.function == 1 {
        entry.ecx |= 1 << features::HYPERVISOR_BIT;
        if processors.tsc_deadline {
            entry.ecx |= 1 << features::TSC_DEADLINE_BIT;
        }
    }
    if template != Template::Host {
        rename(entry, template);
    }
}

/// Gives a template's CPU the same name on every host: 48 bytes over three leaves.
fn rename(entry: &mut kvm_cpuid_entry2, template: Template) {
    let part = match entry.function {
        0x8000_0002..=0x8000_0004 => (entry.function - 0x8000_0002) as usize * 4,
        _ => return,
    };
    let mut name = format!("Toft processor ({})", template.name()).into_bytes();
    name.resize(48, 0);
    let (words, _) = name.as_chunks();
    let word = |at: usize| words.get(part + at).map_or(0, |bytes| u32::from_le_bytes(*bytes));
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word(0), word(1), word(2), word(3));
}

/// The first leaf of each range tells its last.
fn limit_leaves(entries: &mut [kvm_cpuid_entry2]) {
    let numbers: Vec<u32> = entries.iter().map(|entry| entry.function).collect();
    for first in [0, HYPERVISOR, EXTENDED] {
        let last = numbers.iter().filter(|leaf| **leaf & 0xF000_0000 == first).max().copied();
        let heads = entries.iter_mut().filter(|entry| entry.function == first);
        heads.for_each(|head| head.eax = last.unwrap_or(first));
    }
    let subleaves = entries.iter().filter(|entry| entry.function == 7).map(|entry| entry.index).max();
    let heads = entries.iter_mut().filter(|entry| entry.function == 7 && entry.index == 0);
    heads.for_each(|head| head.eax = subleaves.unwrap_or_default());
}

#[cfg(test)]
mod tests;
