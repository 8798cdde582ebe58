//! The table of every CPU feature a guest may see. A feature that is not here is hidden.
//! Hidden on purpose, among others: VMX and SVM (no nesting), MONITOR and MWAIT, the performance counters and
//! debug store, TSX, SGX, processor trace, protection keys for supervisors, user interrupts, AMX, CET,
//! and the invariant time stamp counter.
use kvm_bindings::kvm_cpuid_entry2;

/// When a guest sees a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Belongs to the x86-64 baseline of the psABI.
    Base,
    /// Belongs to x86-64-v2.
    V2,
    /// Belongs to x86-64-v3.
    V3,
    /// What a kernel finds in nearly every processor or KVM emulates on any: always, where it is offered.
    Platform,
    /// Protects the guest from its own programs or from the processor's leaks: always, because losing a
    /// protection is worse than losing a host to move to.
    Guard,
    /// Only with the template `host`.
    Host,
}

/// One of the four registers of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One bit of one answer.
#[derive(Debug)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    leaf: u32,
    subleaf: u32,
    register: Register,
    pub(super) bit: u32,
    pub(super) class: Class,
}

impl Register {
    pub(super) fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }

    pub(super) fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        }
    }
}

impl Feature {
    pub(super) fn is_at(&self, leaf: u32, subleaf: u32, register: Register) -> bool {
        (self.leaf, self.subleaf, self.register) == (leaf, subleaf, register)
    }

    pub(super) fn is_in(&self, entries: &[kvm_cpuid_entry2]) -> bool {
        let here = entries.iter().filter(|entry| (entry.function, entry.index) == (self.leaf, self.subleaf));
        here.into_iter().any(|entry| self.register.of(entry) & 1 << self.bit != 0)
    }
}

pub(super) const HYPERVISOR_BIT: u32 = 31;
pub(super) const TSC_DEADLINE_BIT: u32 = 24;

/// What KVM does not offer in CPUID and a machine has all the same, by name.
pub(super) const HYPERVISOR: &str = "hypervisor";
pub(super) const TSC_DEADLINE: &str = "tsc_deadline";

/// Features that the save area depends on, by name.
pub(super) const XSAVE: &str = "xsave";
pub(super) const AVX: &str = "avx";
pub(super) const AVX512F: &str = "avx512f";
pub(super) const PKU: &str = "pku";

/// Whether the guest of these entries sees the feature of this name.
pub(super) fn shown(entries: &[kvm_cpuid_entry2], name: &str) -> bool {
    FEATURES.iter().any(|feature| feature.name == name && feature.is_in(entries))
}

const fn row(
    leaf: u32,
    subleaf: u32,
    register: Register,
    bit: u32,
    name: &'static str,
    class: Class,
) -> Feature {
    Feature { name, leaf, subleaf, register, bit, class }
}

use Class::{Base, Guard, Host, Platform, V2, V3};
use Register::{Eax, Ebx, Ecx, Edx};

const KVM: u32 = super::KVM_FEATURES;

pub(super) const FEATURES: &[Feature] = &[
    // Leaf 1.
    row(1, 0, Edx, 0, "fpu", Base),
    row(1, 0, Edx, 1, "vme", Platform),
    row(1, 0, Edx, 2, "de", Platform),
    row(1, 0, Edx, 3, "pse", Platform),
    row(1, 0, Edx, 4, "tsc", Platform),
    row(1, 0, Edx, 5, "msr", Platform),
    row(1, 0, Edx, 6, "pae", Platform),
    row(1, 0, Edx, 7, "mce", Platform),
    row(1, 0, Edx, 8, "cx8", Base),
    row(1, 0, Edx, 9, "apic", Platform),
    row(1, 0, Edx, 11, "sep", Platform),
    row(1, 0, Edx, 12, "mtrr", Platform),
    row(1, 0, Edx, 13, "pge", Platform),
    row(1, 0, Edx, 14, "mca", Platform),
    row(1, 0, Edx, 15, "cmov", Base),
    row(1, 0, Edx, 16, "pat", Platform),
    row(1, 0, Edx, 17, "pse36", Platform),
    row(1, 0, Edx, 19, "clflush", Platform),
    row(1, 0, Edx, 23, "mmx", Base),
    row(1, 0, Edx, 24, "fxsr", Base),
    row(1, 0, Edx, 25, "sse", Base),
    row(1, 0, Edx, 26, "sse2", Base),
    row(1, 0, Edx, 27, "ss", Host),
    row(1, 0, Ecx, 0, "sse3", V2),
    row(1, 0, Ecx, 1, "pclmulqdq", Host),
    row(1, 0, Ecx, 9, "ssse3", V2),
    row(1, 0, Ecx, 12, "fma", V3),
    row(1, 0, Ecx, 13, "cx16", V2),
    row(1, 0, Ecx, 17, "pcid", Host),
    row(1, 0, Ecx, 19, "sse4_1", V2),
    row(1, 0, Ecx, 20, "sse4_2", V2),
    row(1, 0, Ecx, 21, "x2apic", Platform),
    row(1, 0, Ecx, 22, "movbe", V3),
    row(1, 0, Ecx, 23, "popcnt", V2),
    row(1, 0, Ecx, TSC_DEADLINE_BIT, TSC_DEADLINE, Platform),
    row(1, 0, Ecx, 25, "aes", Host),
    row(1, 0, Ecx, 26, XSAVE, V3),
    row(1, 0, Ecx, 28, AVX, V3),
    row(1, 0, Ecx, 29, "f16c", V3),
    row(1, 0, Ecx, 30, "rdrand", Host),
    row(1, 0, Ecx, HYPERVISOR_BIT, HYPERVISOR, Platform),
    // Leaf 6: the local timer does not stop.
    row(6, 0, Eax, 2, "arat", Platform),
    // Leaf 7.
    row(7, 0, Ebx, 0, "fsgsbase", Host),
    row(7, 0, Ebx, 1, "tsc_adjust", Platform),
    row(7, 0, Ebx, 3, "bmi1", V3),
    row(7, 0, Ebx, 5, "avx2", V3),
    row(7, 0, Ebx, 6, "fdp_excptn_only", Host),
    row(7, 0, Ebx, 7, "smep", Guard),
    row(7, 0, Ebx, 8, "bmi2", V3),
    row(7, 0, Ebx, 9, "erms", Host),
    row(7, 0, Ebx, 10, "invpcid", Host),
    row(7, 0, Ebx, 13, "zero_fcs_fds", Host),
    row(7, 0, Ebx, 16, AVX512F, Host),
    row(7, 0, Ebx, 17, "avx512dq", Host),
    row(7, 0, Ebx, 18, "rdseed", Host),
    row(7, 0, Ebx, 19, "adx", Host),
    row(7, 0, Ebx, 20, "smap", Guard),
    row(7, 0, Ebx, 21, "avx512ifma", Host),
    row(7, 0, Ebx, 23, "clflushopt", Host),
    row(7, 0, Ebx, 24, "clwb", Host),
    row(7, 0, Ebx, 28, "avx512cd", Host),
    row(7, 0, Ebx, 29, "sha_ni", Host),
    row(7, 0, Ebx, 30, "avx512bw", Host),
    row(7, 0, Ebx, 31, "avx512vl", Host),
    row(7, 0, Ecx, 1, "avx512vbmi", Host),
    row(7, 0, Ecx, 2, "umip", Guard),
    row(7, 0, Ecx, 3, PKU, Host),
    row(7, 0, Ecx, 6, "avx512_vbmi2", Host),
    row(7, 0, Ecx, 8, "gfni", Host),
    row(7, 0, Ecx, 9, "vaes", Host),
    row(7, 0, Ecx, 10, "vpclmulqdq", Host),
    row(7, 0, Ecx, 11, "avx512_vnni", Host),
    row(7, 0, Ecx, 12, "avx512_bitalg", Host),
    row(7, 0, Ecx, 14, "avx512_vpopcntdq", Host),
    row(7, 0, Ecx, 16, "la57", Host),
    row(7, 0, Ecx, 22, "rdpid", Host),
    row(7, 0, Ecx, 25, "cldemote", Host),
    row(7, 0, Ecx, 27, "movdiri", Host),
    row(7, 0, Ecx, 28, "movdir64b", Host),
    row(7, 0, Edx, 4, "fsrm", Host),
    row(7, 0, Edx, 8, "avx512_vp2intersect", Host),
    row(7, 0, Edx, 10, "md_clear", Guard),
    row(7, 0, Edx, 14, "serialize", Host),
    row(7, 0, Edx, 23, "avx512_fp16", Host),
    row(7, 0, Edx, 26, "spec_ctrl", Guard),
    row(7, 0, Edx, 27, "intel_stibp", Guard),
    row(7, 0, Edx, 28, "flush_l1d", Guard),
    row(7, 0, Edx, 29, "arch_capabilities", Guard),
    row(7, 0, Edx, 31, "spec_ctrl_ssbd", Guard),
    row(7, 1, Eax, 4, "avx_vnni", Host),
    row(7, 1, Eax, 5, "avx512_bf16", Host),
    row(7, 1, Eax, 7, "cmpccxadd", Host),
    row(7, 1, Eax, 10, "fzrm", Host),
    row(7, 1, Eax, 11, "fsrs", Host),
    row(7, 1, Eax, 12, "fsrc", Host),
    row(7, 1, Eax, 23, "avx_ifma", Host),
    row(7, 1, Edx, 4, "avx_vnni_int8", Host),
    row(7, 1, Edx, 5, "avx_ne_convert", Host),
    row(7, 1, Edx, 14, "prefetchiti", Host),
    row(7, 2, Edx, 0, "intel_psfd", Guard),
    row(7, 2, Edx, 1, "ipred_ctrl", Guard),
    row(7, 2, Edx, 2, "rrsba_ctrl", Guard),
    row(7, 2, Edx, 3, "ddpd_u", Guard),
    row(7, 2, Edx, 4, "bhi_ctrl", Guard),
    row(7, 2, Edx, 5, "mcdt_no", Guard),
    // Leaf 0xD: ways to save state.
    row(0xD, 1, Eax, 0, "xsaveopt", Host),
    row(0xD, 1, Eax, 1, "xsavec", Host),
    row(0xD, 1, Eax, 2, "xgetbv1", Host),
    row(0xD, 1, Eax, 3, "xsaves", Host),
    // KVM's own. Not asynchronous faults delivered as exits, nor anything for encrypted or Xen guests.
    row(KVM, 0, Eax, 0, "kvmclock", Platform),
    row(KVM, 0, Eax, 1, "kvm_nop_io_delay", Platform),
    row(KVM, 0, Eax, 3, "kvmclock2", Platform),
    row(KVM, 0, Eax, 4, "kvm_async_pf", Platform),
    row(KVM, 0, Eax, 5, "kvm_steal_time", Platform),
    row(KVM, 0, Eax, 6, "kvm_pv_eoi", Platform),
    row(KVM, 0, Eax, 7, "kvm_pv_unhalt", Platform),
    row(KVM, 0, Eax, 9, "kvm_pv_tlb_flush", Platform),
    row(KVM, 0, Eax, 11, "kvm_pv_send_ipi", Platform),
    row(KVM, 0, Eax, 12, "kvm_poll_control", Platform),
    row(KVM, 0, Eax, 13, "kvm_pv_sched_yield", Platform),
    row(KVM, 0, Eax, 14, "kvm_async_pf_int", Platform),
    row(KVM, 0, Eax, 24, "kvmclock_stable", Platform),
    // Extended leaf 1. AMD repeats the baseline there.
    row(0x8000_0001, 0, Ecx, 0, "lahf_lm", V2),
    row(0x8000_0001, 0, Ecx, 4, "cr8_legacy", Host),
    row(0x8000_0001, 0, Ecx, 5, "lzcnt", V3),
    row(0x8000_0001, 0, Ecx, 6, "sse4a", Host),
    row(0x8000_0001, 0, Ecx, 7, "misalignsse", Host),
    row(0x8000_0001, 0, Ecx, 8, "3dnowprefetch", Host),
    row(0x8000_0001, 0, Ecx, 9, "osvw", Host),
    row(0x8000_0001, 0, Ecx, 11, "xop", Host),
    row(0x8000_0001, 0, Ecx, 16, "fma4", Host),
    row(0x8000_0001, 0, Ecx, 21, "tbm", Host),
    row(0x8000_0001, 0, Ecx, 22, "topoext", Host),
    row(0x8000_0001, 0, Edx, 0, "amd_fpu", Platform),
    row(0x8000_0001, 0, Edx, 1, "amd_vme", Platform),
    row(0x8000_0001, 0, Edx, 2, "amd_de", Platform),
    row(0x8000_0001, 0, Edx, 3, "amd_pse", Platform),
    row(0x8000_0001, 0, Edx, 4, "amd_tsc", Platform),
    row(0x8000_0001, 0, Edx, 5, "amd_msr", Platform),
    row(0x8000_0001, 0, Edx, 6, "amd_pae", Platform),
    row(0x8000_0001, 0, Edx, 7, "amd_mce", Platform),
    row(0x8000_0001, 0, Edx, 8, "amd_cx8", Platform),
    row(0x8000_0001, 0, Edx, 9, "amd_apic", Platform),
    row(0x8000_0001, 0, Edx, 11, "syscall", Base),
    row(0x8000_0001, 0, Edx, 12, "amd_mtrr", Platform),
    row(0x8000_0001, 0, Edx, 13, "amd_pge", Platform),
    row(0x8000_0001, 0, Edx, 14, "amd_mca", Platform),
    row(0x8000_0001, 0, Edx, 15, "amd_cmov", Platform),
    row(0x8000_0001, 0, Edx, 16, "amd_pat", Platform),
    row(0x8000_0001, 0, Edx, 17, "amd_pse36", Platform),
    row(0x8000_0001, 0, Edx, 20, "nx", Base),
    row(0x8000_0001, 0, Edx, 22, "mmxext", Host),
    row(0x8000_0001, 0, Edx, 23, "amd_mmx", Platform),
    row(0x8000_0001, 0, Edx, 24, "amd_fxsr", Platform),
    row(0x8000_0001, 0, Edx, 25, "fxsr_opt", Host),
    row(0x8000_0001, 0, Edx, 26, "pdpe1gb", Host),
    row(0x8000_0001, 0, Edx, 27, "rdtscp", Host),
    row(0x8000_0001, 0, Edx, 29, "lm", Base),
    // Extended leaf 8.
    row(0x8000_0008, 0, Ebx, 0, "clzero", Host),
    row(0x8000_0008, 0, Ebx, 2, "xsaveerptr", Host),
    row(0x8000_0008, 0, Ebx, 9, "wbnoinvd", Host),
    row(0x8000_0008, 0, Ebx, 12, "ibpb", Guard),
    row(0x8000_0008, 0, Ebx, 14, "ibrs", Guard),
    row(0x8000_0008, 0, Ebx, 15, "stibp", Guard),
    row(0x8000_0008, 0, Ebx, 17, "stibp_always_on", Guard),
    row(0x8000_0008, 0, Ebx, 19, "ibrs_same_mode", Guard),
    row(0x8000_0008, 0, Ebx, 24, "amd_ssbd", Guard),
    row(0x8000_0008, 0, Ebx, 25, "virt_ssbd", Guard),
    row(0x8000_0008, 0, Ebx, 26, "amd_ssb_no", Guard),
    row(0x8000_0008, 0, Ebx, 28, "amd_psfd", Guard),
    row(0x8000_0008, 0, Ebx, 29, "btc_no", Guard),
    row(0x8000_0008, 0, Ebx, 30, "ibpb_ret", Guard),
    // Extended leaf 0x21.
    row(0x8000_0021, 0, Eax, 0, "no_nested_data_bp", Host),
    row(0x8000_0021, 0, Eax, 2, "lfence_rdtsc", Guard),
    row(0x8000_0021, 0, Eax, 5, "verw_clear", Guard),
    row(0x8000_0021, 0, Eax, 6, "null_sel_clears_base", Host),
    row(0x8000_0021, 0, Eax, 8, "autoibrs", Guard),
    row(0x8000_0021, 0, Eax, 27, "sbpb", Guard),
    row(0x8000_0021, 0, Eax, 28, "ibpb_brtype", Guard),
    row(0x8000_0021, 0, Eax, 29, "srso_no", Guard),
    row(0x8000_0021, 0, Ecx, 1, "tsa_sq_no", Guard),
    row(0x8000_0021, 0, Ecx, 2, "tsa_l1_no", Guard),
];
