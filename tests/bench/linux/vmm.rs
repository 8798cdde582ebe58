//! The VMMs that boot a Linux guest, and how each is told what the guest gets. A machine's disks and interface are
//! virtio, over PCI or MMIO as the VMM has it.
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::image::Image;
use super::{INIT, PATIENCE_LINUX, ip};
use crate::ground::Ground;
use crate::guest::Host;
use crate::process::Process;
use crate::toft::start_vmm_until;
use crate::vmm_driver::{self, Machine};

/// A VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vmm {
    Toft,
    /// QEMU's smallest machine, for starting.
    QemuMicrovm,
    /// QEMU's q35, its disk with io_uring and an iothread, its interface served by QEMU.
    Qemu,
    /// The same with its interface served by the kernel.
    QemuVhost,
    Firecracker,
    CloudHypervisor,
}

impl Vmm {
    /// Those that are measured where somebody brought them: Debian has neither.
    pub(super) const PEERS: [Vmm; 2] = [Vmm::Firecracker, Vmm::CloudHypervisor];

    /// Its name in rows. That of a peer is its program's.
    pub(super) fn who(self) -> &'static str {
        match self {
            Vmm::Toft => "toft",
            Vmm::QemuMicrovm | Vmm::Qemu => "qemu",
            Vmm::QemuVhost => "qemu-vhost",
            Vmm::Firecracker => "firecracker",
            Vmm::CloudHypervisor => "cloud-hypervisor",
        }
    }
}

/// A guest to be.
pub(super) struct Plan {
    pub(super) vmm: Vmm,
    pub(super) vcpus: u8,
    pub(super) memory_mib: u32,
    /// In the guest's order.
    pub(super) disks: Vec<Disk>,
    pub(super) tap: Option<Tap>,
}

/// A raw disk.
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) is_writable: bool,
}

/// A tap, up and with an address at the host's end.
pub(super) struct Tap {
    name: String,
    /// Toft is given the tap itself; other VMMs open it by name.
    file: Option<File>,
}

impl Tap {
    pub(super) fn create(vmm: Vmm, name: &str, address: &str) -> Tap {
        let file = match vmm {
            Vmm::Toft => Some(OwnedFd::from(sys::tap::Tap::create(name).unwrap()).into()),
            _ => {
                ip(&format!("tuntap add dev {name} mode tap vnet_hdr"));
                None
            }
        };
        ip(&format!("address add {address}/24 dev {name}"));
        ip(&format!("link set {name} up"));
        Tap { name: name.to_owned(), file }
    }
}

impl Plan {
    /// Milliseconds from the VMM's exec to the first line of the guest's first process. The guest ends with that.
    pub(super) fn first_line_ms(self, ground: &Ground, image: &Image, scratch: &Path) -> f64 {
        if self.vmm == Vmm::Toft {
            return start_vmm_until(self.machine(image), INIT, PATIENCE_LINUX).1;
        }
        let mut process = self.process(ground, image, scratch);
        process.wait_for(INIT, 1, PATIENCE_LINUX);
        process.executed_at.elapsed().as_secs_f64() * 1e3
    }

    /// Boots it.
    pub(super) fn boot(self, ground: &Ground, image: &Image, scratch: &Path) -> Host {
        match self.vmm {
            Vmm::Toft => Host::Toft(Box::new(vmm_driver::Vmm::boot(self.machine(image)))),
            _ => Host::Other(Box::new(self.process(ground, image, scratch))),
        }
    }

    fn machine(self, image: &Image) -> Machine {
        let mut machine = Machine::new(&image.kernel, &image.cmdline);
        let initrd = machine.add(File::open(&image.initrd).unwrap());
        machine.spec.boot.initrd = Some(initrd);
        machine.spec.memory_bytes = u64::from(self.memory_mib) << 20;
        machine.spec.vcpus = self.vcpus;
        for disk in self.disks {
            let file = File::options().read(true).write(disk.is_writable).open(&disk.path).unwrap();
            machine.disk(file, |made| {
                if !disk.is_writable {
                    made.access = wire::machine::Access::ReadOnly;
                }
            });
        }
        if let Some(tap) = self.tap {
            machine.nic(tap.file.expect("Toft's tap was opened"));
        }
        machine
    }

    fn process(&self, ground: &Ground, image: &Image, scratch: &Path) -> Process {
        let (program, arguments) = match self.vmm {
            Vmm::Toft => unreachable!("Toft is commanded over its socket"),
            Vmm::QemuMicrovm | Vmm::Qemu | Vmm::QemuVhost => ("qemu-system-x86_64", self.qemu(image)),
            Vmm::Firecracker => ("firecracker", self.firecracker(image, scratch)),
            Vmm::CloudHypervisor => ("cloud-hypervisor", self.cloud_hypervisor(image)),
        };
        let program = ground.on_path(program).unwrap_or_else(|| panic!("{program} is not on PATH"));
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        Process::start(&program, &arguments)
    }

    fn qemu(&self, image: &Image) -> Vec<String> {
        let machine = match self.vmm {
            // As QEMU's documentation of microvm recommends it for a kernel that has kvmclock.
            Vmm::QemuMicrovm => "microvm,x-option-roms=off,pit=off,pic=off,rtc=off",
            _ => "q35",
        };
        let (memory, vcpus) = (self.memory_mib.to_string(), self.vcpus.to_string());
        let fixed = format!(
            "-M {machine} -accel kvm -cpu host -m {memory} -smp {vcpus} -nodefaults -no-user-config -display none \
             -no-reboot -serial stdio -nic none"
        );
        let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
        let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        add("-kernel", plain(&image.kernel));
        add("-initrd", plain(&image.initrd));
        add("-append", image.cmdline.clone());
        for (number, disk) in self.disks.iter().enumerate() {
            let path = plain(&disk.path);
            let access = if disk.is_writable { "off" } else { "on" };
            let drive = format!(
                "if=none,id=d{number},file={path},format=raw,readonly={access},cache=writeback,aio=io_uring,\
                 file.locking=off"
            );
            add("-object", format!("iothread,id=t{number}"));
            add("-drive", drive);
            add("-device", format!("virtio-blk-pci,drive=d{number},iothread=t{number},disable-legacy=on"));
        }
        if let Some(Tap { name, .. }) = &self.tap {
            let vhost = if self.vmm == Vmm::QemuVhost { "on" } else { "off" };
            add("-netdev", format!("tap,id=n,ifname={name},script=no,downscript=no,vhost={vhost}"));
            add("-device", "virtio-net-pci,netdev=n,disable-legacy=on,romfile=".to_owned());
        }
        arguments
    }

    fn firecracker(&self, image: &Image, scratch: &Path) -> Vec<String> {
        let drives = self.disks.iter().enumerate().map(|(number, disk)| {
            serde_json::json!({
                "drive_id": format!("d{number}"), "path_on_host": disk.path, "is_root_device": false,
                "is_read_only": !disk.is_writable, "cache_type": "Writeback", "io_engine": "Async",
            })
        });
        let interfaces =
            self.tap.iter().map(|tap| serde_json::json!({ "iface_id": "eth0", "host_dev_name": tap.name }));
        let document = serde_json::json!({
            "boot-source": {
                "kernel_image_path": image.elf, "initrd_path": image.initrd, "boot_args": image.cmdline,
            },
            "machine-config": { "vcpu_count": self.vcpus, "mem_size_mib": self.memory_mib },
            "drives": drives.collect::<Vec<_>>(),
            "network-interfaces": interfaces.collect::<Vec<_>>(),
        });
        let config = scratch.join("firecracker.json");
        std::fs::write(&config, document.to_string()).unwrap();
        vec!["--no-api".to_owned(), "--config-file".to_owned(), plain(&config)]
    }

    fn cloud_hypervisor(&self, image: &Image) -> Vec<String> {
        let elf = plain(image.elf.as_deref().expect("it was unpacked for this VMM"));
        let mut arguments = vec!["--kernel".to_owned(), elf];
        let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        add("--initramfs", plain(&image.initrd));
        add("--cmdline", image.cmdline.clone());
        add("--cpus", format!("boot={}", self.vcpus));
        add("--memory", format!("size={}M", self.memory_mib));
        add("--serial", "tty".to_owned());
        add("--console", "off".to_owned());
        if let Some(tap) = &self.tap {
            add("--net", format!("tap={}", tap.name));
        }
        let disk = |disk: &Disk| {
            let access = if disk.is_writable { "off" } else { "on" };
            format!("path={},readonly={access}", plain(&disk.path))
        };
        if !self.disks.is_empty() {
            arguments.push("--disk".to_owned());
            arguments.extend(self.disks.iter().map(disk));
        }
        arguments
    }
}

/// A path as a word of a command line.
fn plain(path: &Path) -> String {
    path.to_str().expect("the bench's own paths are plain").to_owned()
}
