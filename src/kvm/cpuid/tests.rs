use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

use super::*;

fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    let flags = if WITH_SUBLEAVES.contains(&function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

/// A host that claims every bit of every leaf that is about features.
fn boastful(vendor: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    let all = [u32::MAX; 4];
    vec![
        entry(0, 0, [0x24, word(0), word(8), word(4)]),
        entry(1, 0, all),
        entry(4, 0, [0xFC00_4121, 0, 0, 0]),
        entry(4, 3, [0xFC00_4163, 0, 0, 0]),
        entry(5, 0, all),
        entry(6, 0, all),
        entry(7, 0, all),
        entry(7, 1, all),
        entry(7, 2, all),
        entry(0xA, 0, all),
        entry(0xB, 0, [1, 2, 0x100, 7]),
        entry(0xD, 0, [0x6_02FF, 11008, 11008, u32::MAX]),
        entry(0xD, 1, all),
        entry(0xD, 2, [256, 576, 0, 0]),
        entry(0xD, 5, [64, 1088, 0, 0]),
        entry(0xD, 6, [512, 1152, 0, 0]),
        entry(0xD, 7, [1024, 1664, 0, 0]),
        entry(0xD, 9, [8, 2688, 0, 0]),
        entry(0xD, 18, [8192, 2816, 6, 0]),
        entry(0x12, 0, all),
        entry(0x1F, 0, [1, 2, 0x100, 7]),
        entry(HYPERVISOR, 0, [KVM_FEATURES, 0, 0, 0]),
        entry(KVM_FEATURES, 0, all),
        entry(EXTENDED, 0, [0x8000_0026, 0, 0, 0]),
        entry(0x8000_0001, 0, all),
        entry(0x8000_0002, 0, all),
        entry(0x8000_0007, 0, all),
        entry(0x8000_0008, 0, [0x3030, u32::MAX, u32::MAX, 0]),
        entry(0x8000_000A, 0, all),
        entry(0x8000_001E, 0, all),
    ]
}

const TWO: Processors = Processors { count: 2, tsc_deadline: true };

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    let found = entries.iter().find(|entry| (entry.function, entry.index) == (function, index));
    *found.unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
}

#[test]
fn no_guest_sees_what_is_not_virtualised() {
    for template in [Template::Host, Template::X86_64V2, Template::X86_64V3] {
        let entries = shape(&boastful(b"GenuineIntel"), &template, TWO).unwrap();
        let (one, seven, extended) =
            (find(&entries, 1, 0), find(&entries, 7, 0), find(&entries, 0x8000_0001, 0));
        let hidden = [
            ("monitor", one.ecx, 3),
            ("vmx", one.ecx, 5),
            ("pdcm", one.ecx, 15),
            ("ds", one.edx, 21),
            ("hle", seven.ebx, 4),
            ("rtm", seven.ebx, 11),
            ("sgx", seven.ebx, 2),
            ("pt", seven.ebx, 25),
            ("waitpkg", seven.ecx, 5),
            ("cet", seven.ecx, 7),
            ("amx_tile", seven.edx, 24),
            ("svm", extended.ecx, 2),
            ("perfctr_core", extended.ecx, 23),
            ("mwaitx", extended.ecx, 29),
            ("invtsc", find(&entries, 0x8000_0007, 0).edx, 8),
            ("realtime hint", find(&entries, KVM_FEATURES, 0).edx, 0),
        ];
        for (name, register, bit) in hidden {
            assert_eq!(register >> bit & 1, 0, "{name} with {template:?}");
        }
        for leaf in [5, 0xA, 0x12, 0x8000_000A] {
            assert!(entries.iter().all(|entry| entry.function != leaf), "leaf {leaf:#x} with {template:?}");
        }
    }
}

#[test]
fn the_host_template_keeps_what_a_guest_can_use() {
    let entries = shape(&boastful(b"GenuineIntel"), &Template::Host, TWO).unwrap();
    let names = features(&entries);
    for name in
        ["avx512f", "aes", "rdrand", "pku", "cx16", "kvmclock2", "kvm_steal_time", "x2apic", "tsc_deadline"]
    {
        assert!(names.contains(name), "{name}");
    }
}

#[test]
fn a_template_shows_the_same_programs_on_every_host() {
    let rich = shape(&boastful(b"GenuineIntel"), &Template::X86_64V2, TWO).unwrap();
    let shown = features(&rich);
    for name in ["sse4_2", "popcnt", "cx16", "lahf_lm"] {
        assert!(shown.contains(name), "{name}");
    }
    for name in ["avx", "avx2", "aes", "rdrand", "xsave", "bmi1", "pku", "erms"] {
        assert!(!shown.contains(name), "{name}");
    }
    assert!(rich.iter().all(|entry| entry.function != 0xD), "no save area without xsave");
    let third = features(&shape(&boastful(b"GenuineIntel"), &Template::X86_64V3, TWO).unwrap());
    for name in ["avx2", "fma", "bmi2", "movbe", "lzcnt", "f16c", "xsave"] {
        assert!(third.contains(name), "{name}");
    }
    assert!(!third.contains("avx512f") && !third.contains("aes"));
}

#[test]
fn a_template_the_host_cannot_show_is_refused_by_name() {
    let mut offer = boastful(b"GenuineIntel");
    for entry in &mut offer {
        if entry.function == 1 {
            entry.ecx &= !(1 << 0 | 1 << 13);
        }
    }
    let lacking = shape(&offer, &Template::X86_64V2, TWO).unwrap_err();
    assert_eq!(lacking.features, ["cx16", "sse3"]);
    assert!(lacking.to_string().contains("it lacks cx16, sse3"), "{lacking}");
    assert!(shape(&offer, &Template::Host, TWO).is_ok());
}

#[test]
fn a_list_of_features_is_shown_exactly_and_on_a_richer_host_the_same() {
    let mut poor = boastful(b"GenuineIntel");
    for entry in &mut poor {
        match (entry.function, entry.index) {
            (1, 0) => entry.ecx &= !(0b11 << 24),
            (7, 0) => (entry.ebx, entry.edx) = (entry.ebx & !(0xD023 << 16), 0),
            (KVM_FEATURES, 0) => entry.eax &= !(1 << 24),
            _ => {}
        }
    }
    let no_deadline = Processors { tsc_deadline: false, ..TWO };
    let here = shape(&poor, &Template::Host, no_deadline).unwrap();
    let list: BTreeSet<String> = features(&here).into_iter().map(str::to_owned).collect();
    for name in ["aes", "avx512f", "spec_ctrl", "kvmclock_stable", "tsc_deadline"] {
        assert!(!list.contains(name), "{name}");
    }
    let template = Template::Features(list.clone());
    let there = shape(&boastful(b"GenuineIntel"), &template, TWO).unwrap();
    assert_eq!(features(&there), features(&here));
    assert_eq!(find(&there, 0xD, 0).eax, find(&here, 0xD, 0).eax, "the save area follows");
    assert!(admit(&save(&there), &here).is_ok() && admit(&save(&here), &there).is_ok());
    let mut elsewhere = here.clone();
    elsewhere
        .iter_mut()
        .filter(|entry| (entry.function, entry.index) == (0xD, 2))
        .for_each(|part| part.ebx += 64);
    let refused = admit(&save(&there), &elsewhere).unwrap_err().to_string();
    assert!(refused.contains("a part of the extended state in its place"), "{refused}");
    let name = find(&there, 0x8000_0002, 0);
    assert_eq!(name.eax.to_le_bytes(), *b"Toft");

    let mut few = list.clone();
    few.remove("nx");
    let lacking = shape(&poor, &Template::Features(few), no_deadline).unwrap_err();
    assert_eq!(lacking.features, ["nx"]);
    assert!(lacking.to_string().contains("a list of features that is incomplete, it lacks nx"));
    let lists = [("aes", "aes"), ("tsc_deadline", "tsc_deadline"), ("warp_drive", "warp_drive")];
    for (more, lacks) in lists {
        let template = Template::Features(list.iter().cloned().chain([more.to_owned()]).collect());
        let lacking = shape(&poor, &template, no_deadline).unwrap_err();
        assert_eq!(lacking.features, [lacks]);
        assert!(lacking.to_string().starts_with("KVM on this host cannot show a processor with these"));
    }
}

/// KVM finds an entry by rules of its own: whatever it would find is what was looked at.
#[test]
fn nothing_hidden_is_shown_by_an_entry_that_is_found_in_another_way() {
    let here = shape(&boastful(b"GenuineIntel"), &Template::Host, TWO).unwrap();
    let own = save(&here);
    assert!(admit(&own, &here).is_ok());
    let all = [u32::MAX; 4];
    let hostile: &[(u32, u32, bool, [u32; 4])] = &[
        (1, 7, false, all),
        (1, 7, true, all),
        (0x8000_0001, 1, true, all),
        (0x8000_0001, 1, false, all),
        (7, 0, false, all),
        (7, 3, true, all),
        (7, 3, false, all),
        (0xD, 1, false, all),
        (0xD, 1, true, [0, 0, 1 << 8, 0]),
        (0xD, 1, true, [0, 0, 0, 1]),
        (0xD, 0, true, [0, 0, 0, 1]),
    ];
    for more in hostile {
        // In place of what was there, where KVM finds it before that, and where it does not.
        let others = own.iter().copied().filter(|(leaf, subleaf, ..)| (*leaf, *subleaf) != (more.0, more.1));
        let placed: [Vec<Saved>; 3] = [
            [*more].into_iter().chain(others).collect(),
            [*more].into_iter().chain(own.iter().copied()).collect(),
            own.iter().copied().chain([*more]).collect(),
        ];
        for saved in placed {
            assert!(admit(&saved, &here).is_err(), "{more:x?}");
        }
    }
    for twice in &own {
        let saved: Vec<Saved> = own.iter().chain([twice]).copied().collect();
        let refused = admit(&saved, &here).unwrap_err().to_string();
        assert!(refused.contains("is not as KVM has it"), "{refused}");
    }
}

#[test]
fn a_processor_says_its_vendor_and_its_protections() {
    let offer = boastful(b"AuthenticAMD");
    assert_eq!((vendor(&offer).as_str(), vendor(&[]).as_str()), ("AuthenticAMD", ""));
    let shown = shape(&offer, &Template::X86_64V2, TWO).unwrap();
    assert!(protections(&shown).is_superset(&["ibpb", "smep", "spec_ctrl"].into()));
    assert!(!protections(&shown).contains("sse3"));
}

#[test]
fn the_save_area_holds_what_is_kept_and_no_tiles() {
    let entries = shape(&boastful(b"GenuineIntel"), &Template::Host, TWO).unwrap();
    let area = find(&entries, 0xD, 0);
    assert_eq!(area.eax, 0b10_1110_0111);
    assert_eq!(area.ecx, 2696);
    assert!(entries.iter().all(|entry| entry.function != 0xD || entry.index < 17));
    assert_eq!(find(&entries, 0xD, 1).ecx, 0, "no supervisor states");
    let entries = shape(&boastful(b"GenuineIntel"), &Template::X86_64V3, TWO).unwrap();
    assert_eq!((find(&entries, 0xD, 0).eax, find(&entries, 0xD, 0).ecx), (0b111, 832));
}

#[test]
fn every_processor_finds_itself_in_one_socket_of_cores() {
    for count in [1, 2, 3, 4, 32] {
        let processors = Processors { count, tsc_deadline: true };
        let entries = shape(&boastful(b"GenuineIntel"), &Template::Host, processors).unwrap();
        for index in [0, count - 1] {
            let own = for_processor(&entries, index);
            let one = find(&own, 1, 0);
            assert_eq!(one.ebx >> 24, u32::from(index));
            assert_eq!(one.edx >> 28 & 1 == 1, count > 1);
            for leaf in [0xB, 0x1F] {
                let (thread, core) = (find(&own, leaf, 0), find(&own, leaf, 1));
                assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
                assert_eq!((core.ebx, core.ecx, core.edx), (count.into(), 0x201, index.into()));
                assert!(1u32 << core.eax >= count.into(), "every id fits");
            }
            let caches = (find(&own, 4, 0).eax >> 14 & 0xFFF, find(&own, 4, 3).eax >> 14 & 0xFFF);
            assert_eq!(caches, (0, u32::from(count).next_power_of_two() - 1));
        }
    }
}

#[test]
fn an_amd_guest_finds_the_same_in_its_own_leaves() {
    let processors = Processors { count: 4, tsc_deadline: true };
    let entries = shape(&boastful(b"AuthenticAMD"), &Template::Host, processors).unwrap();
    let own = for_processor(&entries, 3);
    assert_eq!(find(&own, 0x8000_0008, 0).ecx, 3 | 2 << 12);
    assert_eq!(find(&own, 0x8000_0001, 0).ecx & 2, 2);
    let extended = find(&own, 0x8000_001E, 0);
    assert_eq!((extended.eax, extended.ebx, extended.ecx), (3, 3, 0));
}

#[test]
fn ranges_end_where_their_heads_say() {
    let entries = shape(&boastful(b"GenuineIntel"), &Template::Host, TWO).unwrap();
    for (head, last) in [(0, 0x1F), (HYPERVISOR, KVM_FEATURES), (EXTENDED, 0x8000_0008)] {
        assert_eq!(find(&entries, head, 0).eax, last);
    }
    assert_eq!(find(&entries, 7, 0).eax, 2);
}

#[test]
fn the_deadline_timer_shows_only_where_kvm_has_it() {
    let processors = Processors { count: 1, tsc_deadline: false };
    let mut offer = boastful(b"GenuineIntel");
    offer.iter_mut().filter(|entry| entry.function == 1).for_each(|entry| entry.ecx &= !(1 << 24));
    let entries = shape(&offer, &Template::Host, processors).unwrap();
    assert_eq!(find(&entries, 1, 0).ecx >> 24 & 1, 0);
    assert_eq!(find(&entries, 1, 0).ecx >> 31, 1);
}

#[test]
fn a_feature_has_one_row() {
    for (at, one) in FEATURES.iter().enumerate() {
        for other in &FEATURES[at + 1..] {
            assert_ne!(one.name, other.name);
        }
        assert!(
            FEATURE_REGISTERS.iter().any(|(leaf, subleaf, register)| one.is_at(*leaf, *subleaf, *register))
        );
    }
}
