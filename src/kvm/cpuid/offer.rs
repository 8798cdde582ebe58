//! KVM's offer as bytes, for a process that has asked to tell others: it is the same as long as the host is up, and asking
//! takes a good part of what a small machine's start does. Called by the launcher and by the VMMs that it starts.
use super::Entry;

/// Bytes of an entry, which is `struct kvm_cpuid_entry2` (KVM API, section 4.46): ten words, the last three of them padding.
const ENTRY_BYTES: usize = 40;

/// Most bytes of an offer: of as many entries as KVM gives.
pub const BYTES_MAX: usize = ENTRY_BYTES * kvm_bindings::KVM_MAX_CPUID_ENTRIES;

/// The bytes that [`decode`] reads.
pub fn encode(offer: &[Entry]) -> Vec<u8> {
    let words = offer.iter().flat_map(|entry| {
        let Entry { function, index, flags, eax, ebx, ecx, edx, padding: [a, b, c] } = *entry;
        [function, index, flags, eax, ebx, ecx, edx, a, b, c]
    });
    words.flat_map(u32::to_ne_bytes).collect()
}

/// The offer in these bytes; nothing when there is none in them.
pub fn decode(bytes: &[u8]) -> Option<Vec<Entry>> {
    let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
    if entries.is_empty() || !rest.is_empty() || bytes.len() > BYTES_MAX {
        return None;
    }
    entries
        .iter()
        .map(|entry| {
            let mut words = [0; ENTRY_BYTES / 4];
            for (word, bytes) in words.iter_mut().zip(entry.as_chunks().0) {
                *word = u32::from_ne_bytes(*bytes);
            }
            let [function, index, flags, eax, ebx, ecx, edx, a, b, c] = words;
            Some(Entry { function, index, flags, eax, ebx, ecx, edx, padding: [a, b, c] })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_read_as_it_was_written_and_anything_else_is_none() {
        let entry =
            |function| Entry { function, index: 1, flags: 2, eax: 3, edx: u32::MAX, ..Entry::default() };
        let offer: Vec<Entry> = (0..kvm_bindings::KVM_MAX_CPUID_ENTRIES as u32).map(entry).collect();
        let bytes = encode(&offer);
        assert_eq!(decode(&bytes), Some(offer));
        assert_eq!(decode(&[bytes.clone(), bytes[..ENTRY_BYTES].to_vec()].concat()), None);
        assert_eq!((decode(&bytes[1..]), decode(&[])), (None, None));
    }
}
