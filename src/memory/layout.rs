//! Where things lie in the guest's physical address space and its port space. Constants only; `devices`
//! and `vmm` put things there, and the ACPI tables tell the guest.
//!
//! ```text
//! 0           0xA_0000     1 MiB            3 GiB       3.5 GiB   +1 MiB     0xFEC0_0000      4 GiB
//! │ RAM, boot │ (reserved) │ RAM            │ PCI BARs  │ ECAM  │ nothing │ IOAPIC, LAPIC, KVM │ RAM …
//! ```

/// End of conventional memory as the firmware map tells it; the kilobyte below 640 KiB is where an extended
/// BIOS data area would be.
pub const LOW_RAM_END: u64 = 0x9_FC00;

/// Start of RAM above the legacy hole.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// RAM below 4 GiB ends here at the latest.
pub const RAM_BELOW_4G_MAX: u64 = 3 << 30;

/// RAM that does not fit below continues here.
pub const RAM_ABOVE_4G_START: u64 = 4 << 30;

/// PVH `hvm_start_info`, or the zero page of the 64-bit boot protocol.
pub const START_INFO: u64 = 0x6000;

/// PVH memory map and module list.
pub const MEMORY_MAP: u64 = 0x7000;

/// Zero page of the 64-bit boot protocol.
pub const ZERO_PAGE: u64 = 0x8000;

/// Descriptor table for the 64-bit boot protocol.
pub const BOOT_GDT: u64 = 0x500;

/// Three levels of page tables for the 64-bit boot protocol, 4 KiB each: the first, the second, and four
/// of the third.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;

/// Initial stack pointer; nothing is pushed before the kernel sets its own.
pub const BOOT_STACK: u64 = 0x8FF0;

/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;

/// ACPI tables, the root pointer first: in the area that firmware searches (ACPI 6.5, section 5.2.5.1).
pub const ACPI_TABLES: u64 = 0xE_0000;

/// End of the area for ACPI tables.
pub const ACPI_TABLES_END: u64 = GENERATION_ID;

/// Sixteen bytes by which a guest knows that it has become another machine than the one that was saved.
pub const GENERATION_ID: u64 = 0xF_0000;

/// Where real mode starts after a reset: the last 16 bytes below 1 MiB hold code that asks for one. A kernel on
/// hardware-reduced ACPI without EFI jumps here to restart instead of using the reset register.
pub const RESET_VECTOR: u64 = 0xF_FFF0;

/// PCI memory window for BARs.
pub const PCI_MMIO_START: u64 = 0xC000_0000;

/// Size of the PCI memory window in bytes.
pub const PCI_MMIO_BYTES: u64 = 0x2000_0000;

/// Size of the memory BAR of each function in bytes.
pub const PCI_BAR_BYTES: u64 = 0x1_0000;

/// Enhanced configuration access for bus 0.
pub const PCI_ECAM_START: u64 = 0xE000_0000;

/// Size of the ECAM area: one bus of 32 devices with 8 functions of 4 KiB.
pub const PCI_ECAM_BYTES: u64 = 0x10_0000;

/// Type-1 configuration address and data ports, eight bytes from here.
pub const PCI_CONFIG_PORT: u16 = 0xCF8;

/// I/O APIC registers.
pub const IOAPIC: u64 = 0xFEC0_0000;

/// Local APIC registers.
pub const LAPIC: u64 = 0xFEE0_0000;

/// One page in which KVM keeps an identity page table on processors that need it.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;

/// Three pages in which KVM keeps a task state segment on processors that need it.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// 16550 serial port, eight ports from here.
pub const SERIAL_PORT: u16 = 0x3F8;

/// Global system interrupt of the serial port.
pub const SERIAL_GSI: u32 = 4;

/// Sleep control register; sleep status, reset and the event device's register follow.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;

/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;

/// Reset register: writing 1 resets.
pub const RESET_PORT: u16 = 0x602;

/// Event register of the generic event device: 32 bits, reading clears.
pub const EVENT_PORT: u16 = 0x604;

/// Global system interrupt of the generic event device.
pub const EVENT_GSI: u32 = 5;

/// Bit of the event register for the power button.
pub const EVENT_POWER_BUTTON: u32 = 1;

/// Bit of the event register for a generation id that has changed.
pub const EVENT_GENERATION: u32 = 2;

/// Sleep type that powers off, as `\_S5` tells the guest.
pub const SLEEP_TYPE_S5: u8 = 5;

/// pvpanic: one byte of events.
pub const PVPANIC_PORT: u16 = 0x505;

/// Command port of the keyboard controller, of which only the reset line exists.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// Where firmware reports progress; writes go nowhere.
pub const POST_CODE_PORT: u16 = 0x80;

/// First global system interrupt that is not a pin of the I/O APIC: those for MSI start here.
pub const GSI_MSI_FIRST: u32 = 24;

/// The RAM ranges of a machine with `memory_bytes` of memory, as (start, bytes), ascending.
pub fn ram_ranges(memory_bytes: u64) -> Vec<(u64, u64)> {
    let below = memory_bytes.min(RAM_BELOW_4G_MAX);
    let mut ranges = vec![(0, below)];
    if memory_bytes > below {
        ranges.push((RAM_ABOVE_4G_START, memory_bytes - below));
    }
    ranges
}
