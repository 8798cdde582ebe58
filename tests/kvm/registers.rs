//! Registers of a processor that KVM itself has a say in, as they go from one to another.
use kvm::{Host, Irqchip, Vcpu, Vm};

const MEMORY_BYTES: u64 = 64 << 20;

/// Where KVM tells of page faults, and whether it polls, which is written later.
const PAGE_FAULTS: u32 = 0x4B56_4D02;
const POLLS: u32 = 0x4B56_4D05;
/// Stolen time, of which some bits are to be zero.
const STOLEN: u32 = 0x4B56_4D03;

#[test]
fn what_a_guest_was_refused_does_not_hold_it_where_it_is() {
    let host = Host::open("/dev/kvm").unwrap();
    let vm = Vm::new(&host, memory::new(MEMORY_BYTES).unwrap(), Irqchip::Kernel).unwrap();
    let vcpu = Vcpu::new(&vm, 0).unwrap();
    vcpu.show(&host.supported_cpuid().unwrap()).unwrap();
    let kept = host.kept_msrs().unwrap();
    let state = vcpu.save(&kept).unwrap();
    let with = |changed: &[(u32, u64)]| {
        let mut state = state.clone();
        for (register, value) in &mut state.msrs {
            let change = changed.iter().find(|(changed, _)| changed == register);
            *value = change.map_or(*value, |(_, value)| *value);
        }
        state
    };
    // Enabled, by interrupt, in memory that is not there.
    vcpu.restore(&with(&[(PAGE_FAULTS, MEMORY_BYTES | 0b1001), (POLLS, 0)])).unwrap();
    let registers = vcpu.save(&kept).unwrap().msrs;
    assert!(registers.contains(&(PAGE_FAULTS, 0)) && registers.contains(&(POLLS, 0)), "{registers:x?}");
    let refused = vcpu.restore(&with(&[(STOLEN, 0x3F)])).unwrap_err().to_string();
    assert!(refused.contains("register 0x4b564d03 cannot have the value"), "{refused}");
}
