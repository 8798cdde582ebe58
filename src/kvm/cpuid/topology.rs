//! The leaves that tell how processors lie together: one socket, one thread per core, a shared last-level
//! cache. Intel's and AMD's leaves are both kept right, whichever the host has.
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, edx: more than one logical processor in the socket.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ecx: those are cores.
const CMP_LEGACY: u32 = 1 << 1;

/// Levels of leaves 0xB and 0x1F.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Writes what all processors answer alike.
pub(super) fn spread(entries: &mut Vec<kvm_cpuid_entry2>, count: u8) {
    let amd = entries.iter().any(|entry| entry.function == 0 && is_amd(entry));
    let has_v2_leaf = entries.iter().any(|entry| entry.function == 0x1F);
    // KVM offers only the first levels the host has; ours are rebuilt.
    entries.retain(|entry| !matches!(entry.function, 0xB | 0x1F | 0x8000_001E));
    entries.iter_mut().for_each(|entry| spread_one(entry, count, amd));
    for leaf in [Some(0xB), has_v2_leaf.then_some(0x1F)].into_iter().flatten() {
        entries.push(level(leaf, 0, 0, 1, LEVEL_THREAD));
        entries.push(level(leaf, 1, id_bits(count), count, LEVEL_CORE));
        entries.push(level(leaf, 2, 0, 0, 0));
    }
    if amd {
        entries.push(kvm_cpuid_entry2 { function: 0x8000_001E, ..Default::default() });
    }
}

/// Writes what only processor `index` answers.
pub(super) fn number(entry: &mut kvm_cpuid_entry2, index: u8) {
    let id = u32::from(index);
    match entry.function {
        1 => entry.ebx = entry.ebx & 0x00FF_FFFF | id << 24,
        0xB | 0x1F => entry.edx = id,
        // Extended APIC id; core id with one thread per core; node 0 of 1.
        0x8000_001E => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0),
        _ => (),
    }
}

fn spread_one(entry: &mut kvm_cpuid_entry2, count: u8, amd: bool) {
    let many = count > 1;
    match entry.function {
        1 => {
            // A power of two: how many ids the socket has room for.
            entry.ebx = entry.ebx & 0x0000_FFFF | 1 << id_bits(count) << 16;
            entry.edx = if many { entry.edx | HTT } else { entry.edx & !HTT };
        }
        4 if entry.eax & 0x1F != 0 => {
            let cores = (1 << id_bits(count)) - 1;
            entry.eax = entry.eax & 0x3FFF | sharing(entry.eax, count) << 14 | cores << 26;
        }
        0x8000_0001 if amd && many => entry.ecx |= CMP_LEGACY,
        0x8000_0001 => entry.ecx &= !CMP_LEGACY,
        // Number of cores less one, and bits of an APIC id; nothing else lives in the low half.
        0x8000_0008 if amd => entry.ecx = u32::from(count).saturating_sub(1) | id_bits(count) << 12,
        0x8000_0008 => entry.ecx = 0,
        0x8000_001D if entry.eax & 0x1F != 0 => {
            entry.eax = entry.eax & 0x3FFF | sharing(entry.eax, count) << 14;
        }
        _ => (),
    }
}

/// How many processors less one share a cache of this description: the third level has all of them.
fn sharing(description: u32, count: u8) -> u32 {
    let cache_level = description >> 5 & 0b111;
    if cache_level >= 3 { (1 << id_bits(count)) - 1 } else { 0 }
}

fn level(leaf: u32, at: u32, shift: u32, processors: u8, kind: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf,
        index: at,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors.into(),
        ecx: at | kind << 8,
        ..Default::default()
    }
}

/// Bits that tell the cores of the socket apart.
fn id_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// "AuthenticAMD" and "HygonGenuine".
fn is_amd(entry: &kvm_cpuid_entry2) -> bool {
    let name = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes).concat();
    name == b"AuthenticAMD" || name == b"HygonGenuine"
}
