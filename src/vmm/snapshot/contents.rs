//! What a state file says of a machine beside its memory, as plain data. Each section has a version of its own; a
//! reader takes every version that was ever released and turns it into the newest.
use devices::serial::SerialState;
use devices::virtio::transport::pci::FunctionState;
use kvm::{CpuState, VmState, cpuid};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use wire::control::MachineStats;
use wire::saved::form::{FormError, Section, Sections};

const SHAPE: &str = "shape";
const MACHINE: &str = "machine";
const COUNTERS: &str = "counters";
const VERSION: u32 = 1;

/// Everything but memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) shape: Shape,
    pub(crate) machine: MachineState,
    pub(crate) counted: Counted,
}

/// What a machine must be like to take this over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Shape {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    pub(crate) disks: u16,
    pub(crate) nics: u16,
}

/// The machine as it stood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineState {
    /// What CPU its guest sees.
    pub(crate) cpuid: Vec<cpuid::Saved>,
    /// By vCPU.
    pub(crate) cpus: Vec<CpuState>,
    pub(crate) vm: VmState,
    /// The guest's paravirtual clock, and the host's wall clock at that moment; both in nanoseconds.
    pub(crate) clock_ns: u64,
    pub(crate) wall_ns: u64,
    /// The configuration address port.
    pub(crate) pci_address: u32,
    /// By slot of the bus, from the first after the bridge.
    pub(crate) functions: Vec<FunctionState>,
    pub(crate) serial: SerialState,
    /// The event register behind the power button.
    pub(crate) events: u32,
}

/// What the machine has done so far.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Counted {
    pub(crate) stats: MachineStats,
}

impl Contents {
    pub(super) fn sections(&self) -> Result<Vec<Section>, FormError> {
        Ok(vec![
            section(SHAPE, &self.shape)?,
            section(MACHINE, &self.machine)?,
            section(COUNTERS, &self.counted)?,
        ])
    }

    pub(super) fn parse(sections: &mut Sections<'_>) -> Result<Contents, FormError> {
        Ok(Contents {
            shape: open(sections, SHAPE)?,
            machine: open(sections, MACHINE)?,
            counted: open(sections, COUNTERS)?,
        })
    }
}

impl Shape {
    /// Says what differs from the machine that is to be built.
    pub(crate) fn check(&self, wanted: &Shape) -> Result<(), FormError> {
        let numbers =
            |shape: &Shape| [shape.memory_bytes, shape.vcpus.into(), shape.disks.into(), shape.nics.into()];
        let names = ["bytes of memory", "vCPUs", "disks", "interfaces"];
        let pairs = numbers(self).into_iter().zip(numbers(wanted));
        match names.into_iter().zip(pairs).find(|(_, (saved, wanted))| saved != wanted) {
            None => Ok(()),
            Some((name, (saved, wanted))) => {
                let detail = format!("the saved machine has {saved} {name}, the specification {wanted}");
                Err(FormError::Section { section: SHAPE, detail })
            }
        }
    }
}

fn section<T: Serialize>(name: &'static str, value: &T) -> Result<Section, FormError> {
    let bytes = serde_json::to_vec(value);
    let bytes = bytes.map_err(|error| FormError::Section { section: name, detail: error.to_string() })?;
    Ok(Section { name, version: VERSION, bytes })
}

fn open<T: DeserializeOwned>(sections: &mut Sections<'_>, name: &'static str) -> Result<T, FormError> {
    let refuse = |detail| FormError::Section { section: name, detail };
    match sections.take(name)? {
        (VERSION, bytes) => {
            // The text may repeat a name that somebody made up.
            let told = |error: serde_json::Error| error.to_string().chars().take(200).collect();
            serde_json::from_slice(bytes).map_err(|error| refuse(told(error)))
        }
        (version, _) => Err(refuse(format!("it has version {version}; this program reads up to {VERSION}"))),
    }
}
