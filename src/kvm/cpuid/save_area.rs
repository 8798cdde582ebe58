//! Leaf 0xD: which parts of the extended processor state the guest may turn on. Follows the features that
//! were kept; AMX tiles and every supervisor state are left out.
use kvm_bindings::kvm_cpuid_entry2;

use super::features::{AVX, AVX512F, PKU, XSAVE, shown};

/// x87 and SSE: always there, in the legacy area.
const LEGACY: u32 = 0b11;
const AVX_BIT: u32 = 1 << 2;
const AVX512_BITS: u32 = 0b111 << 5;
const PKRU_BIT: u32 = 1 << 9;

/// Size of the legacy area and the header (Intel SDM volume 1, section 13.4).
const LEGACY_BYTES: u32 = 512 + 64;

pub(super) fn trim(entries: &mut Vec<kvm_cpuid_entry2>) {
    if !shown(entries, XSAVE) {
        return entries.retain(|entry| entry.function != 0xD);
    }
    let mut parts = LEGACY;
    for (feature, bits) in [(AVX, AVX_BIT), (AVX512F, AVX512_BITS), (PKU, PKRU_BIT)] {
        if shown(entries, feature) {
            parts |= bits;
        }
    }
    entries.retain(|entry| {
        let kept = 1u32.checked_shl(entry.index).is_some_and(|bit| parts & bit != 0);
        entry.function != 0xD || entry.index < 2 || kept
    });
    let ends = entries.iter().filter(|entry| entry.function == 0xD && entry.index >= 2);
    let area_bytes =
        ends.map(|part| part.eax.saturating_add(part.ebx)).max().unwrap_or_default().max(LEGACY_BYTES);
    for entry in entries.iter_mut().filter(|entry| entry.function == 0xD) {
        match entry.index {
            // KVM keeps ebx, the size for what is turned on, up to date itself.
            0 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) =
                    (entry.eax & parts, LEGACY_BYTES, area_bytes, 0)
            }
            1 => (entry.ecx, entry.edx) = (0, 0),
            _ => (),
        }
    }
}
