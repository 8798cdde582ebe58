//! `machine.json`: a machine with paths, for people. It becomes a specification with descriptors.
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sys::tap::Tap;
use wire::machine::{
    Access, Balloon, Boot, CacheMode, Console, CpuTemplate, Disk, FdIndex, MachineSpec, Nic, OnReset,
    RateLimits,
};

use crate::error::Error;
use crate::target;

/// The format, for `toft run --help`.
pub(super) const HELP: &str = r#"machine.json, with paths relative to it; only "kernel" and "memory_bytes" are needed:

  {
    "memory_bytes": 536870912,
    "vcpus": 2,
    "cpu": "host",
    "kernel": "vmlinuz",
    "initrd": "initrd",
    "cmdline": "console=ttyS0 root=/dev/vda rw",
    "disks": [{"path": "root.raw", "read_only": false, "cache": "writeback", "serial": "root",
               "limits": {"bandwidth": {"per_second": 104857600, "burst": 524288000}}}],
    "nics": [{"tap": "tap0", "mac": "52:54:00:12:34:56", "mtu": 1500,
              "tx_limits": {"operations": {"per_second": 10000, "burst": 10000}}}],
    "on_reset": "rebuild"
  }

"limits" of a disk, "rx_limits" and "tx_limits" of a nic hold "bandwidth" (bytes) and
"operations" (requests or packets), each with both numbers; what is absent is unlimited.

A disk with "backing" is an overlay: what "path" has holes for is read from that file, to which
nothing is written. "path" is a sparse file at least as long, on ext4, XFS or tmpfs.

A tap is made for each nic and lasts as long as the machine; put it on a bridge yourself.
The exit status is 0 when the guest powered itself off and 1 when the machine ended in any
other way.

The VMM is kept in a jail: namespaces and an empty root directory of its own, no capability,
a system call filter. As root it also gets a user id of its own; otherwise it runs with
yours, in a user namespace where the host allows that. What the jail is without is told on
standard error before the machine starts. Only the daemon limits a machine's CPU time and
memory."#;

/// The document.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Machine {
    memory_bytes: u64,
    #[serde(default = "one")]
    vcpus: u8,
    #[serde(default)]
    cpu: CpuTemplate,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    #[serde(default)]
    cmdline: String,
    #[serde(default)]
    disks: Vec<DiskDocument>,
    #[serde(default)]
    nics: Vec<NicDocument>,
    #[serde(default)]
    on_reset: OnReset,
    #[serde(skip)]
    folder: PathBuf,
}

fn one() -> u8 {
    1
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskDocument {
    path: PathBuf,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    cache: CacheMode,
    #[serde(default)]
    serial: String,
    #[serde(default)]
    limits: RateLimits,
    #[serde(default)]
    backing: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NicDocument {
    tap: String,
    mac: String,
    #[serde(default = "ethernet")]
    mtu: u16,
    #[serde(default)]
    rx_limits: RateLimits,
    #[serde(default)]
    tx_limits: RateLimits,
}

fn ethernet() -> u16 {
    1500
}

/// A specification and the files its indices mean.
pub(super) struct Opened {
    pub(super) spec: MachineSpec,
    pub(super) files: Vec<File>,
}

impl Machine {
    pub(super) fn read(path: &Path) -> Result<Machine, Error> {
        let text = target::read_text(path)?;
        let mut machine: Machine = serde_json::from_str(&text)
            .map_err(|error| Error::Usage(format!("{}: {error}", path.display())))?;
        machine.folder = path.parent().map(Path::to_owned).unwrap_or_default();
        Ok(machine)
    }

    /// Opens every file and tap. `console` is the ring.
    pub(super) fn open(self, console: File) -> Result<Opened, Error> {
        let mut files = vec![console];
        let mut add = |file: File| {
            files.push(file);
            FdIndex((files.len() - 1) as u16)
        };
        let boot = Boot {
            kernel: add(open(&self.folder, &self.kernel, Access::ReadOnly)?),
            initrd: match &self.initrd {
                Some(path) => Some(add(open(&self.folder, path, Access::ReadOnly)?)),
                None => None,
            },
            cmdline: self.cmdline,
        };
        let mut disks = Vec::new();
        for disk in self.disks {
            let access = if disk.read_only { Access::ReadOnly } else { Access::ReadWrite };
            let file = open(&self.folder, &disk.path, access)?;
            if disk.backing.is_some() && !disk.read_only {
                // What a loss of power has left would be taken for what was written.
                let cleared = sys::holes::clear_unwritten(&file);
                cleared.map_err(|cause| Error::Read { path: self.folder.join(&disk.path), cause })?;
            }
            let file = add(file);
            let backing = disk.backing.map(|path| open(&self.folder, &path, Access::ReadOnly)).transpose()?;
            disks.push(Disk {
                file,
                access,
                cache: disk.cache,
                serial: disk.serial,
                limits: disk.limits,
                backing: backing.map(&mut add),
            });
        }
        let mut nics = Vec::new();
        for nic in self.nics {
            let tap = Tap::create(&nic.tap).map_err(|cause| Error::Machine {
                doing: format!("cannot make the tap {} (root?)", nic.tap),
                cause: cause.into(),
            })?;
            nics.push(Nic {
                tap: add(File::from(OwnedFd::from(tap))),
                mac: mac(&nic.mac)?,
                mtu: nic.mtu,
                rx_limits: nic.rx_limits,
                tx_limits: nic.tx_limits,
            });
        }
        let spec = MachineSpec {
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            cpu: self.cpu,
            boot,
            disks,
            nics,
            balloon: Balloon::default(),
            console: Console { ring: FdIndex(0) },
            on_reset: self.on_reset,
        };
        spec.check(files.len()).map_err(|error| Error::Usage(error.to_string()))?;
        Ok(Opened { spec, files })
    }
}

fn open(folder: &Path, path: &Path, access: Access) -> Result<File, Error> {
    let path = folder.join(path);
    let write = access == Access::ReadWrite;
    // A named pipe in place of a disk would otherwise wait for its other end for ever.
    let options = File::options().read(true).write(write).custom_flags(nix::libc::O_NONBLOCK).open(&path);
    options.map_err(|cause| Error::Read { path, cause })
}

fn mac(text: &str) -> Result<[u8; 6], Error> {
    let bytes: Vec<u8> = text
        .split(':')
        .map_while(|pair| u8::from_str_radix(pair, 16).ok().filter(|_| pair.len() == 2))
        .collect();
    let whole = bytes.len() == text.split(':').count();
    match bytes.try_into() {
        Ok(mac) if whole => Ok(mac),
        _ => Err(Error::Usage(format!("{text:?} is not a hardware address, such as 52:54:00:12:34:56"))),
    }
}
