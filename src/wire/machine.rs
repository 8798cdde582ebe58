//! A machine as data: what one VMM process is to emulate. Files are indices into the descriptors that
//! travel in the same packet; there is no path, name, tenant or address of the host in here.
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::limits;

/// Position of a descriptor in the packet that carries the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u16);

/// Everything the VMM needs to build one machine. Checked with [`MachineSpec::check`] by both ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Virtual CPUs, 1 to [`limits::VCPUS_MAX`].
    pub vcpus: u8,
    /// Which CPU the guest sees.
    #[serde(default)]
    pub cpu: CpuTemplate,
    /// What runs first.
    pub boot: Boot,
    /// Block devices in PCI slot order; the guest names them vda, vdb, …
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Network interfaces in PCI slot order.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// Memory balloon with free page reporting; always present so that unused memory returns to the host.
    #[serde(default)]
    pub balloon: Balloon,
    /// Serial console.
    pub console: Console,
    /// What to do when the guest asks for a reset.
    #[serde(default)]
    pub on_reset: OnReset,
}

/// What of a machine does not depend on its disks, interfaces and kernel, so that it can be built before they are known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chassis {
    /// See [`MachineSpec::memory_bytes`].
    pub memory_bytes: u64,
    /// See [`MachineSpec::vcpus`].
    pub vcpus: u8,
    /// See [`MachineSpec::cpu`].
    pub cpu: CpuTemplate,
}

/// A set of CPU features. `host` passes the host's, filtered to what a guest may keep; `v2` and `v3`
/// are the x86-64 psABI micro-architecture levels; a list is what several hosts have in common.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuTemplate {
    /// Every feature that KVM can virtualise here.
    #[default]
    Host,
    /// x86-64-v2: SSE4.2, POPCNT, CMPXCHG16B.
    X86_64V2,
    /// x86-64-v3: AVX2, BMI, FMA.
    X86_64V3,
    /// Exactly these, by the names of `kvm::cpuid`: protections and what KVM adds, too.
    Features(BTreeSet<String>),
}

/// What the boot processor starts with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// ELF with a PVH note, or bzImage; told apart by the magic number of the format.
    pub kernel: FdIndex,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd: Option<FdIndex>,
    /// Kernel command line, without a terminator.
    #[serde(default)]
    pub cmdline: String,
}

/// One virtio block device over a raw file or block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The open file; its length is the capacity and must be a multiple of 512.
    pub file: FdIndex,
    /// Whether the guest may write. A writable disk needs a descriptor open for writing.
    pub access: Access,
    /// What a completed write promises.
    #[serde(default)]
    pub cache: CacheMode,
    /// Identity the guest reads with VIRTIO_BLK_T_GET_ID, at most 20 bytes of printable ASCII.
    pub serial: String,
    /// Limits on what the guest may ask of the disk.
    #[serde(default)]
    pub limits: RateLimits,
    /// What the disk was made from, open for reading, which nobody changes: `file` is an overlay over it then. Whatever of `file`
    /// is a hole (lseek(2), `SEEK_DATA`) is read from here, as far as this reaches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<FdIndex>,
}

/// Whether a guest may change a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Writes answer VIRTIO_BLK_S_IOERR and VIRTIO_BLK_F_RO is offered.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// What a completed write promises (virtio 1.2, section 5.2.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheMode {
    /// A write is done when the host's page cache has it; durable after the guest's flush (fdatasync).
    #[default]
    Writeback,
    /// Every write is durable when it completes (RWF_DSYNC).
    Writethrough,
}

/// One virtio network device over a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// A tap opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, vnet header of 12 bytes, non-blocking.
    pub tap: FdIndex,
    /// Address the guest reads from the device, as six bytes.
    pub mac: [u8; 6],
    /// Largest packet the guest should send, in bytes.
    #[serde(default = "mtu_default")]
    pub mtu: u16,
    /// Limits on what the guest receives.
    #[serde(default)]
    pub rx_limits: RateLimits,
    /// Limits on what the guest sends.
    #[serde(default)]
    pub tx_limits: RateLimits,
}

fn mtu_default() -> u16 {
    1500
}

/// Token buckets for one direction of one device; absent means unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Requests or packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations: Option<TokenBucket>,
}

/// A rate with a burst: the bucket holds `burst` tokens, starts full and gains `per_second`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens gained per second, at least 1.
    pub per_second: u64,
    /// Most tokens the bucket holds, at least 1. A single larger request passes when the bucket is full.
    pub burst: u64,
}

/// The balloon's first target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Bytes the guest is asked to give back, a multiple of 4096.
    #[serde(default)]
    pub target_bytes: u64,
}

/// Where the serial console's output goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// A file made by [`crate::console::Ring::create`], open for reading and writing.
    pub ring: FdIndex,
}

/// What a guest's reset does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnReset {
    /// Build the machine again from this specification, in the same process.
    #[default]
    Rebuild,
    /// Write the last will and exit.
    Exit,
}

/// Why a specification cannot be built. The text says which field and what would do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {detail}")]
pub struct SpecError {
    /// JSON pointer of the field.
    pub field: String,
    /// What is wrong and what would be right.
    pub detail: String,
}

fn refuse(field: impl Into<String>, detail: impl Into<String>) -> Result<(), SpecError> {
    Err(SpecError { field: field.into(), detail: detail.into() })
}

impl CpuTemplate {
    /// What is wrong with the list of features, if it is one; whether a host knows them is another question.
    pub fn fault(&self) -> Option<String> {
        let CpuTemplate::Features(names) = self else { return None };
        (names.is_empty() || !are_features(names)).then(|| {
            format!(
                "must be 1 to {} names of 1 to {} lower case letters, digits and _",
                limits::CPU_FEATURES_MAX,
                limits::CPU_FEATURE_BYTES_MAX
            )
        })
    }
}

/// Whether these could be names of CPU features, and no more than there may be.
pub(crate) fn are_features(names: &BTreeSet<String>) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let is_name = |name: &String| {
        (1..=limits::CPU_FEATURE_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_letter)
    };
    names.len() <= limits::CPU_FEATURES_MAX && names.iter().all(is_name)
}

impl Chassis {
    /// Fails with the first field that no machine can have.
    pub fn check(&self) -> Result<(), SpecError> {
        if !(limits::MEMORY_BYTES_MIN..=limits::MEMORY_BYTES_MAX).contains(&self.memory_bytes)
            || !self.memory_bytes.is_multiple_of(2 << 20)
        {
            return refuse(
                "/memory_bytes",
                format!(
                    "{} is not a multiple of 2 MiB between {} and {}",
                    self.memory_bytes,
                    limits::MEMORY_BYTES_MIN,
                    limits::MEMORY_BYTES_MAX
                ),
            );
        }
        if !(1..=limits::VCPUS_MAX).contains(&self.vcpus) {
            return refuse("/vcpus", format!("{} is not between 1 and {}", self.vcpus, limits::VCPUS_MAX));
        }
        if let Some(detail) = self.cpu.fault() {
            return refuse("/cpu/features", detail);
        }
        Ok(())
    }
}

impl MachineSpec {
    /// What of it can be built ahead.
    pub fn chassis(&self) -> Chassis {
        Chassis { memory_bytes: self.memory_bytes, vcpus: self.vcpus, cpu: self.cpu.clone() }
    }

    /// Checks every number against its limit and every [`FdIndex`] against the `descriptors` that came in
    /// the packet. A descriptor may be named only once, so that no two devices write to one file.
    pub fn check(&self, descriptors: usize) -> Result<(), SpecError> {
        self.chassis().check()?;
        if self.disks.len() > limits::DISKS_MAX {
            return refuse("/disks", format!("more than {} disks", limits::DISKS_MAX));
        }
        if self.nics.len() > limits::NICS_MAX {
            return refuse("/nics", format!("more than {} interfaces", limits::NICS_MAX));
        }
        if self.boot.cmdline.len() >= limits::CMDLINE_BYTES_MAX || self.boot.cmdline.contains('\0') {
            return refuse(
                "/boot/cmdline",
                format!("must be shorter than {} bytes and hold no NUL", limits::CMDLINE_BYTES_MAX),
            );
        }
        if !self.balloon.target_bytes.is_multiple_of(4096) || self.balloon.target_bytes >= self.memory_bytes {
            return refuse("/balloon/target_bytes", "must be a multiple of 4096 below the memory's size");
        }
        for (at, disk) in self.disks.iter().enumerate() {
            let printable = disk.serial.bytes().all(|byte| byte.is_ascii_graphic());
            if disk.serial.len() > limits::SERIAL_BYTES_MAX || !printable {
                return refuse(format!("/disks/{at}/serial"), "must be at most 20 printable ASCII bytes");
            }
            disk.limits.check(&format!("/disks/{at}/limits"))?;
            if disk.backing.is_some() && disk.access == Access::ReadOnly {
                return refuse(format!("/disks/{at}/backing"), "a disk that is never written needs none");
            }
        }
        for (at, nic) in self.nics.iter().enumerate() {
            if nic.mac[0] & 1 != 0 || nic.mac == [0; 6] {
                return refuse(format!("/nics/{at}/mac"), "must be a unicast address");
            }
            if !(68..=65521).contains(&nic.mtu) {
                return refuse(format!("/nics/{at}/mtu"), "must be between 68 and 65521");
            }
            nic.rx_limits.check(&format!("/nics/{at}/rx_limits"))?;
            nic.tx_limits.check(&format!("/nics/{at}/tx_limits"))?;
        }
        check_descriptors(self.descriptors(), descriptors)
    }

    /// Every descriptor the specification names, with the field that names it.
    pub fn descriptors(&self) -> Vec<(String, FdIndex)> {
        let mut named = vec![
            ("/boot/kernel".to_owned(), self.boot.kernel),
            ("/console/ring".to_owned(), self.console.ring),
        ];
        named.extend(self.boot.initrd.map(|fd| ("/boot/initrd".to_owned(), fd)));
        for (at, disk) in self.disks.iter().enumerate() {
            named.push((format!("/disks/{at}/file"), disk.file));
            named.extend(disk.backing.map(|backing| (format!("/disks/{at}/backing"), backing)));
        }
        named.extend(self.nics.iter().enumerate().map(|(at, n)| (format!("/nics/{at}/tap"), n.tap)));
        named
    }
}

/// Checks that each of the `named` descriptors is one of those that came in the packet, and named once.
pub(crate) fn check_descriptors(named: Vec<(String, FdIndex)>, descriptors: usize) -> Result<(), SpecError> {
    let mut taken = vec![false; descriptors];
    for (field, FdIndex(index)) in named {
        match taken.get_mut(usize::from(index)) {
            None => {
                return refuse(field, format!("descriptor {index} did not arrive; {descriptors} did"));
            }
            Some(true) => return refuse(field, format!("descriptor {index} is named twice")),
            Some(slot) => *slot = true,
        }
    }
    Ok(())
}

impl RateLimits {
    fn check(&self, field: &str) -> Result<(), SpecError> {
        for (name, bucket) in [("bandwidth", self.bandwidth), ("operations", self.operations)] {
            if bucket.is_some_and(|bucket| bucket.per_second == 0 || bucket.burst == 0) {
                return refuse(format!("{field}/{name}"), "per_second and burst must be at least 1");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
