//! Puts a machine together from its plan, up to vCPUs that are parked before their first instruction. Slots on
//! the bus are fixed by position, so that a guest finds its disks where they were before a reset.
use std::io;
use std::sync::Arc;

use devices::pci::Function;
use devices::power::{self, Power, PowerEvents};
use devices::serial::{self, Serial};
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::{Balloon, BalloonControl, BalloonOptions};
use devices::virtio::block::{Block, BlockControl, BlockOptions, Disk};
use devices::virtio::net::{Link, Net, NetControl, NetOptions};
use devices::virtio::rng::Rng;
use devices::virtio::transport::pci::VirtioPci;
use devices::{Bus, Doorbells, Interrupt, Notices, Region, pci};
use kvm::{Host, Vcpu, Vm, cpuid};
use memory::{Ram, layout};

use super::chassis::Chassis;
use super::parts::Parts;
use super::plan::Plan;
use super::stats::Lasting;
use super::wiring::{Bells, Vectors, Wire};
use super::{Error, translate};
use crate::bell::{Bell, Ending};
use crate::boot;
use crate::console::Console;
use crate::snapshot::MachineState;
use crate::threads;
use crate::vcpu::{Buses, Crew};

/// Slots of the bus: 0 is the host bridge.
const SLOT_RNG: u8 = 1;

/// The address port and the data port.
const PCI_CONFIG_PORTS: u64 = 8;

/// What a machine begins with.
pub(super) enum Origin<'a> {
    /// The kernel of its plan, in memory that is all zeroes.
    Kernel {
        /// What was built ahead and fits.
        ready: Option<Chassis>,
    },
    /// What another was.
    Saved {
        /// With its memory, which is complete.
        chassis: Chassis,
        state: &'a MachineState,
        /// The guest's clock, before anything else is restored: some registers make KVM write what it shows.
        clock_ns: u64,
    },
}

/// Builds everything; nothing runs yet.
pub(super) fn build(
    host: &Host,
    plan: &Plan,
    lasting: &Lasting,
    console: &Arc<Console>,
    bell: &Arc<Bell>,
    origin: Origin<'_>,
) -> Result<Parts, Error> {
    let spec = &plan.spec;
    let (chassis, saved) = match origin {
        Origin::Kernel { ready: Some(chassis) } => (chassis.begin()?, None),
        Origin::Kernel { ready: None } => (Chassis::new(host, spec.chassis())?, None),
        Origin::Saved { chassis, state, clock_ns } => {
            let admit = |offered: &[_]| Ok(cpuid::admit(&state.cpuid, offered)?);
            (chassis.admitted(admit)?, Some((state, clock_ns)))
        }
    };
    let Chassis { vcpus, vm, ram, shown, .. } = chassis;

    let mut slots = Slots::new(&vm, &ram, bell);
    slots.attach(Box::new(Rng::new(Arc::clone(&lasting.rng))))?;
    let balloon = attach_balloon(&mut slots, plan, lasting)?;
    let disks = attach_disks(&mut slots, plan, lasting)?;
    let nics = attach_nics(&mut slots, plan, lasting)?;
    let Slots { root, functions, .. } = slots;

    let serial = Arc::new(Serial::new(line(&vm, layout::SERIAL_GSI)?, console.sink()));
    let power = Power::new(line(&vm, layout::EVENT_GSI)?, Arc::new(Guest(Arc::clone(bell))));
    let buses = Arc::new(Buses {
        memory: memory_bus(&root)?,
        ports: port_bus(&root, &serial, &power)?,
        unclaimed: Arc::clone(&lasting.unclaimed),
        bell: Arc::clone(bell),
    });

    match saved {
        None => load(plan, &ram, &vcpus)?,
        Some((state, clock_ns)) => {
            vm.set_clock_ns(clock_ns)?;
            take_over(state, &vm, &vcpus, &root, &functions)?;
            serial.restore(&state.serial)?;
            power.restore(state.events)?;
        }
    }
    let crew =
        Crew::start(vcpus, &buses).map_err(|cause| Error::Host { what: "vCPU threads".to_owned(), cause })?;
    let (msrs, cpuid) = (host.kept_msrs()?, cpuid::save(&shown));
    Ok(Parts { crew, root, serial, power, balloon, disks, nics, functions, ram, vm, msrs, cpuid })
}

/// Puts the kernel into memory and the first vCPU before it.
fn load(plan: &Plan, ram: &Ram, vcpus: &[Vcpu]) -> Result<(), Error> {
    let spec = &plan.spec;
    let read =
        |field: &str, at| plan.file(at).map_err(|cause| Error::File { field: field.to_owned(), cause });
    let source = boot::Source {
        kernel: read("/boot/kernel", spec.boot.kernel)?,
        initrd: spec.boot.initrd.map(|at| read("/boot/initrd", at)).transpose()?,
        cmdline: &spec.boot.cmdline,
        vcpus: spec.vcpus,
    };
    let start = boot::prepare(ram, &source)?;
    if let Some(first) = vcpus.first() {
        first.start(start)?;
    }
    Ok(())
}

/// Makes processors, controllers and functions what they were. Processors first: what a function has pending reaches
/// their controllers at once.
fn take_over(
    state: &MachineState,
    vm: &Vm,
    vcpus: &[Vcpu],
    root: &pci::Root,
    functions: &[Arc<VirtioPci>],
) -> Result<(), Error> {
    if state.cpus.len() != vcpus.len() || state.functions.len() != functions.len() {
        let detail = format!("{} processors and {} functions", state.cpus.len(), state.functions.len());
        return Err(Error::Invalid { field: "/state".to_owned(), detail });
    }
    for (vcpu, saved) in vcpus.iter().zip(&state.cpus) {
        vcpu.restore(saved)?;
        vcpu.mark_paused()?;
    }
    vm.restore(&state.vm)?;
    root.set_address(state.pci_address);
    for (function, saved) in functions.iter().zip(&state.functions) {
        function.restore(saved)?;
    }
    Ok(())
}

/// The bus being filled.
struct Slots {
    root: pci::Root,
    functions: Vec<Arc<VirtioPci>>,
    next: u8,
    vm: Arc<Vm>,
    ram: Arc<Ram>,
    doorbells: Arc<dyn Doorbells>,
    notices: Arc<dyn Notices>,
}

impl Slots {
    fn new(vm: &Arc<Vm>, ram: &Arc<Ram>, bell: &Arc<Bell>) -> Slots {
        Slots {
            root: pci::Root::new(),
            functions: Vec::new(),
            next: SLOT_RNG,
            vm: Arc::clone(vm),
            ram: Arc::clone(ram),
            doorbells: Arc::new(Bells(Arc::clone(vm))),
            notices: Arc::clone(bell) as Arc<dyn Notices>,
        }
    }

    /// Puts a device into the next slot, with a vector for each queue and one for its configuration.
    fn attach(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        let name = device.name().to_owned();
        let vectors = Vectors::new(&self.vm, device.queue_sizes().len() + 1)?;
        let function = VirtioPci::new(
            device,
            Arc::clone(&self.ram),
            Arc::new(vectors),
            Arc::clone(&self.doorbells),
            Arc::clone(&self.notices),
            threads::device_hook(),
        );
        let function = function.map_err(|cause| Error::Host { what: name.clone(), cause })?;
        let bar = layout::PCI_MMIO_START + u64::from(self.next) * layout::PCI_BAR_BYTES;
        let function = Arc::new(function);
        let attached = self.root.attach(self.next, Arc::clone(&function) as Arc<dyn Function>, bar);
        attached.map_err(|error| Error::Host { what: name, cause: io::Error::other(error) })?;
        self.functions.push(function);
        self.next += 1;
        Ok(())
    }
}

fn attach_balloon(slots: &mut Slots, plan: &Plan, lasting: &Lasting) -> Result<BalloonControl, Error> {
    let target_bytes = plan.spec.balloon.target_bytes;
    let (balloon, control) =
        Balloon::new(BalloonOptions { target_bytes, stats: Arc::clone(&lasting.balloon) });
    slots.attach(Box::new(balloon))?;
    Ok(control)
}

/// Opens the disks of a plan, each with its ring.
pub(super) fn open_disks(plan: &Plan) -> Result<Vec<Disk>, Error> {
    let open = |(at, disk): (usize, &wire::machine::Disk)| {
        let field = || format!("/disks/{at}/file");
        let file = plan.copy(disk.file).map_err(|cause| Error::File { field: field(), cause })?;
        let backing = disk.backing.map(|backing| plan.copy(backing)).transpose();
        let backing =
            backing.map_err(|cause| Error::File { field: format!("/disks/{at}/backing"), cause })?;
        let opened = Disk::new(file, backing, translate::access(disk.access));
        opened.map_err(|error| Error::File { field: field(), cause: io::Error::other(error) })
    };
    plan.spec.disks.iter().enumerate().map(open).collect()
}

fn attach_disks(slots: &mut Slots, plan: &Plan, lasting: &Lasting) -> Result<Vec<BlockControl>, Error> {
    let mut controls = Vec::new();
    let disks = plan.spec.disks.iter().zip(&lasting.drives).zip(&lasting.disks);
    for (at, ((disk, drive), stats)) in disks.enumerate() {
        let block = Block::new(BlockOptions {
            name: format!("disk{at}"),
            disk: drive.clone(),
            cache: translate::cache(disk.cache),
            serial: disk.serial.clone(),
            limits: translate::limits(disk.limits),
            stats: Arc::clone(stats),
        });
        let block = block.map_err(|cause| Error::Host { what: format!("disk{at}"), cause })?;
        controls.push(block.control());
        slots.attach(Box::new(block))?;
    }
    Ok(controls)
}

fn attach_nics(slots: &mut Slots, plan: &Plan, lasting: &Lasting) -> Result<Vec<NetControl>, Error> {
    let mut controls = Vec::new();
    for ((at, nic), stats) in plan.spec.nics.iter().enumerate().zip(&lasting.nics) {
        let field = || format!("/nics/{at}/tap");
        let tap = plan.copy(nic.tap).map_err(|cause| Error::File { field: field(), cause })?;
        let link = Link::new(tap);
        let link = link.map_err(|error| Error::File { field: field(), cause: io::Error::other(error) })?;
        let net = Net::new(NetOptions {
            name: format!("nic{at}"),
            link,
            mac: nic.mac,
            mtu: nic.mtu,
            rx_limits: translate::limits(nic.rx_limits),
            tx_limits: translate::limits(nic.tx_limits),
            stats: Arc::clone(stats),
        });
        let net = net.map_err(|cause| Error::Host { what: format!("nic{at}"), cause })?;
        controls.push(net.control());
        slots.attach(Box::new(net))?;
    }
    Ok(controls)
}

fn line(vm: &Vm, gsi: u32) -> Result<Arc<dyn Interrupt>, Error> {
    Ok(Arc::new(Wire(vm.line(gsi)?)))
}

fn memory_bus(root: &pci::Root) -> Result<Bus, Error> {
    let mut bus = Bus::new();
    place(&mut bus, layout::PCI_MMIO_START, layout::PCI_MMIO_BYTES, root.window())?;
    place(&mut bus, layout::PCI_ECAM_START, layout::PCI_ECAM_BYTES, root.ecam())?;
    Ok(bus)
}

fn port_bus(root: &pci::Root, serial: &Arc<Serial>, power: &Power) -> Result<Bus, Error> {
    let mut bus = Bus::new();
    place(&mut bus, layout::SERIAL_PORT.into(), serial::PORTS, Arc::clone(serial) as Arc<dyn Region>)?;
    place(&mut bus, layout::PCI_CONFIG_PORT.into(), PCI_CONFIG_PORTS, root.ports())?;
    place(&mut bus, layout::SLEEP_CONTROL_PORT.into(), power::REGISTER_PORTS, power.registers())?;
    place(&mut bus, layout::PVPANIC_PORT.into(), 1, power.panic_port())?;
    place(&mut bus, layout::I8042_COMMAND_PORT.into(), 1, power.keyboard_port())?;
    place(&mut bus, layout::POST_CODE_PORT.into(), 1, Arc::new(power::Nowhere))?;
    Ok(bus)
}

fn place(bus: &mut Bus, base: u64, length: u64, region: Arc<dyn Region>) -> Result<(), Error> {
    let placed = bus.insert(base, length, region);
    placed.map_err(|error| Error::Host {
        what: format!("the region at {base:#x}"),
        cause: io::Error::other(error),
    })
}

/// What the guest does with the power registers.
struct Guest(Arc<Bell>);

impl PowerEvents for Guest {
    fn powered_off(&self) {
        self.0.end(Ending::PoweredOff);
    }

    fn reset_asked(&self) {
        self.0.end(Ending::ResetAsked);
    }

    fn panicked(&self) {
        self.0.end(Ending::GuestPanicked);
    }
}
