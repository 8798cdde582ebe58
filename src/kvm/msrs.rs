//! Which model-specific registers make up a processor's state. An explicit list, as with CPUID: a register nobody has
//! thought about is neither kept nor written. References: Intel SDM volume 4; Documentation/virt/kvm/x86/msr.rst.

/// Every register that is kept, in the order they are written: the counter before what is measured by it, the deadline
/// last. On this list are those that a guest can change through what CPUID shows it; KVM leaves out what it hides.
pub(crate) const KEPT: &[u32] = &[
    // System calls and segments.
    0x174,
    0x175,
    0x176,
    0xC000_0081,
    0xC000_0082,
    0xC000_0083,
    0xC000_0084,
    0xC000_0102,
    // The counter, its adjustment, its companion.
    0x10,
    0x3B,
    0xC000_0103,
    // Features, speculation, supervisor state.
    0x3A,
    0x1A0,
    0x48,
    0x140,
    0xDA0,
    0x17A,
    0xC001_011F,
    // Memory types: page attributes, default, fixed and variable ranges.
    0x277,
    0x2FF,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26A,
    0x26B,
    0x26C,
    0x26D,
    0x26E,
    0x26F,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20A,
    0x20B,
    0x20C,
    0x20D,
    0x20E,
    0x20F,
    // KVM's own: clocks by their old and new numbers, page faults, stolen time, end of interrupt, polling.
    0x11,
    0x12,
    0x4B56_4D00,
    0x4B56_4D01,
    0x4B56_4D06,
    0x4B56_4D02,
    0x4B56_4D03,
    0x4B56_4D04,
    0x4B56_4D05,
    // The local timer's deadline.
    DEADLINE,
];

/// Page faults and end of interrupt: where a guest asks for one of them in memory that it does not have, some kernels keep what it wrote
/// and refuse it all the same.
pub(crate) const KEPT_THOUGH_REFUSED: &[u32] = &[0x4B56_4D02, 0x4B56_4D04];

/// IA32_TSC_DEADLINE.
const DEADLINE: u32 = 0x6E0;
