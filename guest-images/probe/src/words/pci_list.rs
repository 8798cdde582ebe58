//! `pci`: prints every function and compares ECAM with ports 0xcf8/0xcfc.

use crate::console::Line;
use crate::failure::Outcome;
use crate::pci::{self, Access, Function};
use crate::words::note;
use crate::{check, say};

/// What ports read as where no configuration mechanism answers.
const NOTHING: u32 = 0xffff_ffff;

pub fn run(report: &mut Line) -> Outcome {
    let mut functions = 0;
    let mut differing = None;
    let mut has_ports = false;
    pci::scan(|function, identity| {
        functions += 1;
        say!(
            "probe: pci-function {:02x}:{:02x}.{} id={:04x}:{:04x} class={:06x}",
            function.bus,
            function.device,
            function.function,
            identity & 0xffff,
            identity >> 16,
            function.read32(8) >> 8,
        );
        bars(function);
        for offset in (0..0x40).step_by(4) {
            let by_ports = function.read32_by(Access::Ports, offset);
            has_ports |= by_ports != NOTHING;
            if has_ports && by_ports != function.read32(offset) {
                differing = Some((function, offset));
            }
        }
        false
    });
    check!(functions > 0, "no PCI function answers");
    if let Some((function, offset)) = differing {
        crate::fail!("{:02x}:{:02x} offset {offset:#x} differs by ports", function.bus, function.device);
    }
    let access = if pci::access() == Access::Ecam { "ecam" } else { "ports" };
    note(report, format_args!("functions={functions} access={access} ports={}", u8::from(has_ports)));
    Ok(())
}

/// Prints each BAR with its size; the upper half of a 64-bit one does not count.
fn bars(function: Function) {
    const HEADER_NORMAL: u8 = 0;
    let count = if function.read8(0x0e) & 0x7f == HEADER_NORMAL { 6 } else { 2 };
    let mut index = 0;
    while index < count {
        let low = function.read32(0x10 + u16::from(index) * 4);
        let is_64_bit = low & 0x7 == 0x4;
        let bytes = function.bar_bytes(index);
        if bytes != 0 {
            let high = if is_64_bit { function.read32(0x14 + u16::from(index) * 4) } else { 0 };
            let address = u64::from(high) << 32 | u64::from(low);
            say!("probe: pci-bar {index} register={address:#x} bytes={bytes:#x}");
        }
        index += if is_64_bit { 2 } else { 1 };
    }
}
