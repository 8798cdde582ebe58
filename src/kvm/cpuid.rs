//! What CPU the guest sees: KVM's offer, filtered by an explicit table and given this machine's topology.
//! Nothing here calls KVM; `vmm::vcpu` hands the result to a [`crate::Vcpu`].
//!
//! ```text
//! KVM_GET_SUPPORTED_CPUID ─▶ leaves we know ─▶ features of the template ─▶ save area ─▶ topology ─▶ guest
//! ```
//! What the table does not name is hidden, so a feature of a future host reaches no guest before somebody has
//! thought about its state. References: Intel SDM volume 2A (CPUID); AMD APM volume 3, appendix E;
//! Documentation/virt/kvm/x86/cpuid.rst.
use std::collections::BTreeSet;

use kvm_bindings::kvm_cpuid_entry2;

/// What one leaf answers.
pub use kvm_bindings::kvm_cpuid_entry2 as Entry;

mod features;
pub mod offer;
mod save_area;
mod saved;
mod topology;

use features::{Class, FEATURES, Feature, Register};
pub use saved::{Saved, admit, save};

/// A set of CPU features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Template {
    /// Every feature that the table allows and KVM offers here.
    Host,
    /// x86-64-v2 of the psABI, exactly.
    X86_64V2,
    /// x86-64-v3 of the psABI, exactly.
    X86_64V3,
    /// These by the names of the table, exactly: protections and KVM's own, too.
    Features(BTreeSet<String>),
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
#[error("KVM on this host cannot show {template}, it lacks {}; the cpu \"host\" takes what there is", .features.join(", "))]
pub struct Lacking {
    /// What was to be shown.
    pub template: &'static str,
    /// What is absent, by the names of the table, or what the table does not know.
    pub features: Vec<String>,
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

/// Those of them that answer by subleaf, which KVM marks so. It looks up the others by leaf alone.
const WITH_SUBLEAVES: &[u32] = &[4, 7, 0xB, 0xD, 0x1F, 0x8000_001D];

/// The whole machine's CPUID from what KVM offers; [`for_processor`] completes it for each vCPU.
pub fn shape(
    offer: &[kvm_cpuid_entry2],
    template: &Template,
    processors: Processors,
) -> Result<Vec<kvm_cpuid_entry2>, Lacking> {
    let mut entries: Vec<_> =
        offer.iter().filter(|entry| LEAVES.contains(&entry.function)).copied().collect();
    check(&entries, template, processors)?;
    for entry in &mut entries {
        filter(entry, template, processors);
    }
    save_area::trim(&mut entries);
    topology::spread(&mut entries, processors.count);
    limit_leaves(&mut entries);
    Ok(entries)
}

/// Names of the features that these entries show, in their order.
pub fn features(entries: &[kvm_cpuid_entry2]) -> BTreeSet<&'static str> {
    FEATURES.iter().filter(|feature| feature.is_in(entries)).map(|feature| feature.name).collect()
}

/// Those of them that protect a guest from its own programs or from the processor's leaks.
pub fn protections(entries: &[kvm_cpuid_entry2]) -> BTreeSet<&'static str> {
    let guards = FEATURES.iter().filter(|feature| feature.class == Class::Guard);
    guards.filter(|feature| feature.is_in(entries)).map(|feature| feature.name).collect()
}

/// The vendor as the processor names itself: twelve letters. Empty where it does not say.
pub fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let words =
        entries.iter().find(|entry| entry.function == 0).map(|entry| [entry.ebx, entry.edx, entry.ecx]);
    let bytes = words.into_iter().flatten().flat_map(u32::to_le_bytes);
    bytes.filter(u8::is_ascii_graphic).map(char::from).collect()
}

/// Puts the number of one vCPU, which is its APIC id, wherever CPUID tells it.
pub fn for_processor(entries: &[kvm_cpuid_entry2], index: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries = entries.to_vec();
    entries.iter_mut().for_each(|entry| topology::number(entry, index));
    entries
}

impl Template {
    fn name(&self) -> &'static str {
        match self {
            Template::Host => "host",
            Template::X86_64V2 => "x86_64_v2",
            Template::X86_64V3 => "x86_64_v3",
            Template::Features(_) => "baseline",
        }
    }

    /// Whether a guest of this template may see a feature.
    fn allows(&self, feature: &Feature) -> bool {
        match (self, feature.class) {
            (Template::Features(names), _) => names.contains(feature.name),
            (_, Class::Base | Class::Platform | Class::Guard | Class::V2) => true,
            (_, Class::V3) => matches!(self, Template::Host | Template::X86_64V3),
            (_, Class::Host) => *self == Template::Host,
        }
    }

    /// Whether the template is a lie without a feature.
    fn needs(&self, feature: &Feature) -> bool {
        match (self, feature.class) {
            (Template::Features(names), _) => names.contains(feature.name),
            (_, Class::Base | Class::V2) => *self != Template::Host,
            (_, Class::V3) => *self == Template::X86_64V3,
            (_, Class::Platform | Class::Guard | Class::Host) => false,
        }
    }
}

fn check(entries: &[kvm_cpuid_entry2], template: &Template, processors: Processors) -> Result<(), Lacking> {
    let is_shown = |feature: &Feature| match feature.name {
        features::HYPERVISOR => true,
        features::TSC_DEADLINE => processors.tsc_deadline || feature.is_in(entries),
        _ => feature.is_in(entries),
    };
    let absent = FEATURES.iter().filter(|feature| template.needs(feature) && !is_shown(feature));
    let mut lacks: BTreeSet<String> = absent.map(|feature| feature.name.to_owned()).collect();
    let template = match template {
        Template::Host => "the processor of a host",
        Template::X86_64V2 => "an x86_64_v2 processor",
        Template::X86_64V3 => "an x86_64_v3 processor",
        Template::Features(names) => {
            let is_known = |name: &String| FEATURES.iter().any(|feature| feature.name == name);
            lacks.extend(names.iter().filter(|name| !is_known(name)).cloned());
            let base = FEATURES.iter().filter(|feature| feature.class == Class::Base);
            let unlisted = base.map(|feature| feature.name.to_owned()).filter(|name| !names.contains(name));
            let unlisted: Vec<String> = unlisted.collect();
            if !unlisted.is_empty() {
                let template = "what every 64-bit guest needs by a list of features that is incomplete";
                return Err(Lacking { template, features: unlisted });
            }
            "a processor with these features"
        }
    };
    if lacks.is_empty() { Ok(()) } else { Err(Lacking { template, features: lacks.into_iter().collect() }) }
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
    // Supervisor states.
    (0xD, 1, Register::Ecx),
    (0xD, 1, Register::Edx),
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

fn filter(entry: &mut kvm_cpuid_entry2, template: &Template, processors: Processors) {
    for (leaf, subleaf, register) in FEATURE_REGISTERS {
        if (entry.function, entry.index) != (*leaf, *subleaf) {
            continue;
        }
        let here = FEATURES.iter().filter(|feature| feature.is_at(*leaf, *subleaf, *register));
        let allowed = here.filter(|feature| template.allows(feature));
        let mask = allowed.fold(0, |mask, feature| mask | 1 << feature.bit);
        *register.of_mut(entry) &= mask;
    }
    if entry.function == 1 {
        entry.ecx |= 1 << features::HYPERVISOR_BIT;
        let hides = matches!(template, Template::Features(names) if !names.contains(features::TSC_DEADLINE));
        if processors.tsc_deadline && !hides {
            entry.ecx |= 1 << features::TSC_DEADLINE_BIT;
        }
    }
    if *template != Template::Host {
        rename(entry, template);
    }
}

/// Gives a template's CPU the same name on every host: 48 bytes over three leaves.
fn rename(entry: &mut kvm_cpuid_entry2, template: &Template) {
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
