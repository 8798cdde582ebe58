//! What of a VM is neither memory nor processor, as data: interrupt controllers, the timer chip, the clock.
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use crate::cpu_state::{bytes, cut, fill, read};
use crate::error::failed;
use crate::{Error, Vm};

/// A VM beside its memory and processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// `kvm_irqchip` of both legacy controllers and of the I/O APIC, without the zeroes at their ends.
    pub irqchips: [Vec<u8>; 3],
    /// `kvm_pit_state2`.
    pub pit: Vec<u8>,
}

const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl VmState {
    /// Checks all that can be checked without KVM, which a restore does before KVM is given anything.
    pub fn check(&self) -> Result<(), Error> {
        self.parts().map(drop)
    }

    fn parts(&self) -> Result<(Vec<kvm_irqchip>, kvm_pit_state2), Error> {
        let chip = |(chip_id, saved): (u32, &Vec<u8>)| {
            let chip = fill::<kvm_irqchip>("irqchip", saved)?;
            match chip.chip_id == chip_id {
                true => Ok(chip),
                false => Err(Error::State(format!("interrupt controller {} is out of place", chip.chip_id))),
            }
        };
        let chips = IRQCHIPS.into_iter().zip(&self.irqchips).map(chip).collect::<Result<_, _>>()?;
        Ok((chips, read("pit", &self.pit)?))
    }
}

impl Vm {
    /// The controllers as they stand. No vCPU runs and no device raises anything meanwhile.
    pub fn save(&self) -> Result<VmState, Error> {
        let mut irqchips = [const { Vec::new() }; 3];
        for (chip_id, saved) in IRQCHIPS.into_iter().zip(&mut irqchips) {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
            *saved = cut(&chip);
        }
        let pit = self.fd.get_pit2().map_err(failed("KVM_GET_PIT2"))?;
        Ok(VmState { irqchips, pit: bytes(&pit) })
    }

    /// Makes the controllers of a VM that has never run what another's were.
    pub fn restore(&self, state: &VmState) -> Result<(), Error> {
        let (chips, pit) = state.parts()?;
        for chip in &chips {
            self.fd.set_irqchip(chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
        self.fd.set_pit2(&pit).map_err(failed("KVM_SET_PIT2"))
    }
}
