//! CPUID that moves with its machine: a guest finds the processor it was started on, or is not taken. What is text and
//! numbers may differ from host to host, features that this host cannot show may not.
use std::collections::BTreeSet;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use super::{FEATURE_REGISTERS, FEATURES, LEAVES, Register, WITH_SUBLEAVES};
use crate::Error;

/// Leaf, subleaf, whether the subleaf counts, and the four registers.
pub type Saved = (u32, u32, bool, [u32; 4]);

/// The machine's CPUID as data, before each vCPU's number is put in.
pub fn save(entries: &[kvm_cpuid_entry2]) -> Vec<Saved> {
    let one = |entry: &kvm_cpuid_entry2| {
        let counts = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        (entry.function, entry.index, counts, [entry.eax, entry.ebx, entry.ecx, entry.edx])
    };
    entries.iter().map(one).collect()
}

/// What was saved, if a machine that this host would start could show it too: `here` is what [`super::shape`] gives.
pub fn admit(saved: &[Saved], here: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, Error> {
    if saved.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(Error::TooLong("CPUID"));
    }
    let mut entries = Vec::with_capacity(saved.len());
    let (mut lacks, mut seen) = (Vec::new(), BTreeSet::new());
    for (leaf, subleaf, counts, [eax, ebx, ecx, edx]) in saved.iter().copied() {
        if !LEAVES.contains(&leaf) {
            return Err(Error::State(format!("CPUID leaf {leaf:#x} is none that a machine has")));
        }
        // What is looked at here is what the guest finds: the first entry of a leaf answers for all of it where KVM asks for the leaf
        // alone, and one whose subleaf does not count answers for every subleaf.
        let is_found = if WITH_SUBLEAVES.contains(&leaf) { counts } else { subleaf == 0 };
        if !is_found || !seen.insert((leaf, subleaf)) {
            return Err(Error::State(format!(
                "CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, is not as KVM has it"
            )));
        }
        let flags = if counts { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        let entry = kvm_cpuid_entry2 {
            function: leaf,
            index: subleaf,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        lacks.extend(lacking(&entry, here));
        entries.push(entry);
    }
    lacks.sort_unstable();
    lacks.dedup();
    if lacks.is_empty() {
        return Ok(entries);
    }
    Err(Error::State(format!(
        "the machine was shown features of a processor that this host lacks: {}",
        lacks.join(", ")
    )))
}

const NAMELESS: &str = "a feature without a name";

/// Features that `entry` shows and nothing here does.
fn lacking(entry: &kvm_cpuid_entry2, here: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    let at = |other: &&kvm_cpuid_entry2| (other.function, other.index) == (entry.function, entry.index);
    let other = here.iter().find(at).copied().unwrap_or_default();
    let mut names = Vec::new();
    for (leaf, subleaf, register) in FEATURE_REGISTERS {
        if (entry.function, entry.index) != (*leaf, *subleaf) {
            continue;
        }
        let more = register.of(entry) & !register.of(&other);
        for bit in (0..32).filter(|bit| more >> bit & 1 == 1) {
            let known = FEATURES
                .iter()
                .find(|feature| feature.bit == bit && feature.is_at(*leaf, *subleaf, *register));
            names.push(known.map_or(NAMELESS, |feature| feature.name));
        }
    }
    // All that this leaf has are features, also in subleaves that are not known yet.
    let more = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx]
        .map(|register| register.of(entry) & !register.of(&other));
    if entry.function == 7 && entry.index > 2 && more != [0; 4] {
        names.push(NAMELESS);
    }
    // Parts of the extended processor state that can be turned on.
    let more = entry.eax & !other.eax | entry.edx & !other.edx;
    if (entry.function, entry.index) == (0xD, 0) && more != 0 {
        names.push("a part of the extended state");
    }
    // How long it is and where: a guest lays out what it saves by it, and so does this host's processor by its own.
    if entry.function == 0xD && entry.index >= 2 && (entry.eax, entry.ebx) != (other.eax, other.ebx) {
        names.push("a part of the extended state in its place");
    }
    names
}
