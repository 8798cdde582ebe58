//! The registers a boot processor starts with, for each way to enter a kernel. Memory (tables, parameters)
//! is prepared by `vmm::boot`; application processors need nothing, they wait for a start-up interrupt.
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

/// How the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// PVH (Xen's x86/HVM direct boot ABI): 32-bit protected mode with flat segments and no paging.
    Pvh {
        /// Physical entry point.
        entry: u64,
        /// Address of `hvm_start_info`, handed over in ebx.
        start_info: u64,
    },
    /// 64-bit boot protocol (Documentation/arch/x86/boot.rst, section 64-bit): long mode, identity mapped.
    Long {
        /// Entry point.
        entry: u64,
        /// Address of the zero page, handed over in rsi.
        zero_page: u64,
        /// Physical address of the top page table.
        page_tables: u64,
        /// Initial stack pointer.
        stack: u64,
        /// Address and length in bytes of the descriptor table that holds [`CODE64`] and [`DATA`].
        gdt: (u64, u16),
    },
}

/// Descriptor of the flat 64-bit code segment, selector 0x10 as the boot protocol wants.
pub const CODE64: u64 = 0x00AF_9B00_0000_FFFF;

/// Descriptor of the flat data segment, selector 0x18.
pub const DATA: u64 = 0x00CF_9300_0000_FFFF;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Bit 1 of the flags register is always set.
const RFLAGS: u64 = 2;

impl Start {
    /// General registers.
    pub(crate) fn regs(&self) -> kvm_regs {
        match *self {
            Start::Pvh { entry, start_info } => {
                kvm_regs { rip: entry, rbx: start_info, rflags: RFLAGS, ..Default::default() }
            }
            Start::Long { entry, zero_page, stack, .. } => kvm_regs {
                rip: entry,
                rsi: zero_page,
                rsp: stack,
                rbp: stack,
                rflags: RFLAGS,
                ..Default::default()
            },
        }
    }

    /// Control and segment registers, on top of what KVM made at reset.
    pub(crate) fn apply(&self, sregs: &mut kvm_sregs) {
        let wide = matches!(self, Start::Long { .. });
        sregs.cs = segment(0x10, 0xB, wide);
        let data = segment(0x18, 0x3, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, type_: 0xB, present: 1, ..Default::default() };
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        match *self {
            Start::Pvh { .. } => (),
            Start::Long { page_tables, gdt: (base, length), .. } => {
                sregs.gdt.base = base;
                sregs.gdt.limit = length.saturating_sub(1);
                sregs.cr3 = page_tables;
                sregs.cr4 = CR4_PAE;
                sregs.cr0 |= CR0_PG;
                sregs.efer = EFER_LME | EFER_LMA;
            }
        }
    }
}

/// The state of the floating-point unit after FNINIT, with every SSE exception masked.
pub(crate) fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37F, mxcsr: 0x1F80, ..Default::default() }
}

fn segment(selector: u16, type_: u8, wide: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!wide),
        s: 1,
        l: u8::from(wide),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
