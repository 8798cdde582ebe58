//! What can be read of the host's kernel, and what to do where it is not good. Each check reads a file or two and
//! judges them; nothing is changed. `report` collects them.
use std::fs;
use std::path::{Path, PathBuf};

use model::host::{Check, CheckStatus};

use crate::network::program;
use crate::volumes::limits::RESERVE_BYTES;
use crate::volumes::overlay::shares_blocks;
use crate::volumes::space::{self, Space};

/// The files of a host, below a root that tests choose.
pub(super) struct System {
    root: PathBuf,
}

/// Fewer inotify instances than Linux lets a user have by itself.
const INOTIFY_INSTANCES_FEW: u32 = 128;

/// How a check came out, before it has its name.
type Finding = (CheckStatus, String);

fn good(detail: impl Into<String>) -> Finding {
    (CheckStatus::Ok, detail.into())
}

fn lesser(detail: impl Into<String>) -> Finding {
    (CheckStatus::Degraded, detail.into())
}

impl System {
    pub(super) fn new(root: &Path) -> System {
        System { root: root.to_owned() }
    }

    /// Every check, in the order people read them: safety, then what is needed, then speed.
    pub(super) fn checks(&self, volumes: &Path) -> Vec<Check> {
        let findings = [
            ("mitigations", self.mitigations()),
            ("smt", self.smt()),
            ("ksm", self.ksm()),
            ("swap", self.swap()),
            ("user_namespaces", self.user_namespaces()),
            ("seccomp", self.seccomp()),
            ("io_uring", self.io_uring()),
            ("cgroups", self.cgroups()),
            ("tun", self.tun()),
            (
                "nft",
                installed("nft", "nftables", "packets of servers cannot be filtered, so they get no network"),
            ),
            ("dnsmasq", installed("dnsmasq", "dnsmasq-base", "networks have neither DHCP nor DNS")),
            ("inotify", self.inotify()),
            ("ip_forward", self.forwarding()),
            ("storage", storage(volumes)),
            ("reflink", reflink(volumes)),
            ("clock_source", self.clock_source()),
            ("huge_pages", self.huge_pages()),
            ("transparent_huge_pages", self.transparent_huge_pages()),
        ];
        findings
            .into_iter()
            .map(|(name, (status, detail))| Check { name: name.to_owned(), status, detail })
            .collect()
    }

    /// Documentation/admin-guide/hw-vuln: each file says `Not affected`, `Mitigation: …` or `Vulnerable…`, and for
    /// some parts of its own, such as `Mitigation: PTE Inversion; VMX: vulnerable`.
    fn mitigations(&self) -> Finding {
        let Ok(entries) = fs::read_dir(self.root.join("sys/devices/system/cpu/vulnerabilities")) else {
            return lesser("the kernel does not say what the processor is vulnerable to; use a newer kernel");
        };
        let mut vulnerable: Vec<String> = entries
            .flatten()
            .filter_map(|entry| {
                let text = fs::read_to_string(entry.path()).ok()?;
                Some(format!("{}{}", entry.file_name().to_string_lossy(), unmitigated(&text)?))
            })
            .collect();
        vulnerable.sort();
        match vulnerable.as_slice() {
            [] => good("the kernel mitigates what the processor is vulnerable to"),
            list => lesser(format!(
                "not mitigated: {}; a guest may read what is not its own. Update the kernel and the microcode, and \
                 boot without mitigations=off",
                list.join(", ")
            )),
        }
    }

    fn smt(&self) -> Finding {
        match self.read("sys/devices/system/cpu/smt/active").as_deref() {
            Some("1") => lesser(
                "hyper-threading is on: two servers can share a core and watch each other's caches. Boot with nosmt \
                 where tenants do not trust each other",
            ),
            _ => good("hyper-threading is off or absent"),
        }
    }

    fn ksm(&self) -> Finding {
        match self.read("sys/kernel/mm/ksm/run").as_deref() {
            Some("1") => lesser(
                "kernel samepage merging is on: by timing a write a server can tell what another has in memory. \
                 Switch it off with `echo 2 > /sys/kernel/mm/ksm/run`",
            ),
            _ => good("kernel samepage merging is off"),
        }
    }

    fn swap(&self) -> Finding {
        let text = self.read("proc/swaps").unwrap_or_default();
        let used = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        let on_disk: Vec<&str> = used.filter(|device| !device.contains("zram")).collect();
        match on_disk.as_slice() {
            [] => good("no memory of servers is written to a disk"),
            devices => lesser(format!(
                "memory of servers can be written to {}; encrypt it, or switch it off with `swapoff`",
                devices.join(", ")
            )),
        }
    }

    fn user_namespaces(&self) -> Finding {
        match self.read("proc/sys/user/max_user_namespaces").as_deref() {
            Some("0") => {
                lesser("user namespaces are off; allow them with `sysctl user.max_user_namespaces=10000`")
            }
            Some(_) => good("user namespaces can be made"),
            None => lesser("the kernel has no user namespaces, which jails use; use another kernel"),
        }
    }

    /// seccomp(2): the list of actions is there from Linux 4.14 on, where filters are.
    fn seccomp(&self) -> Finding {
        let actions = self.read("proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
        match actions.split_whitespace().any(|action| action == "kill_process") {
            true => good("each thread of a VMM can be held to the system calls it needs"),
            false => {
                lesser("the kernel has no system call filters, so servers cannot run; use another kernel")
            }
        }
    }

    /// Documentation/admin-guide/sysctl/kernel.rst, `io_uring_disabled`; kernels before 6.6 have no such switch.
    fn io_uring(&self) -> Finding {
        match self.read("proc/sys/kernel/io_uring_disabled").as_deref() {
            Some("2") => lesser(
                "io_uring is switched off, so disks do one request after the other; allow it with `sysctl \
                 kernel.io_uring_disabled=0`",
            ),
            Some("1") => lesser(
                "io_uring is kept to privileged processes, which VMMs are not, so disks do one request after the other; \
                 allow it with `sysctl kernel.io_uring_disabled=0`",
            ),
            _ => good("disks can work without waiting for each other"),
        }
    }

    fn cgroups(&self) -> Finding {
        let unified = self.read("sys/fs/cgroup/cgroup.controllers");
        let version = if unified.is_some() { 2 } else { 1 };
        let has = |wanted: &str| match &unified {
            Some(controllers) => controllers.split_whitespace().any(|controller| controller == wanted),
            None => self.root.join("sys/fs/cgroup").join(wanted).is_dir(),
        };
        let missing: Vec<&str> =
            ["cpu", "memory", "pids"].into_iter().filter(|wanted| !has(wanted)).collect();
        match missing.as_slice() {
            [] => good(format!(
                "control groups are version {version}; each server's CPU, memory and tasks are limited"
            )),
            list => lesser(format!(
                "control groups (version {version}) lack {}, so the kernel does not limit that of servers; mount them, \
                 or enable them for the root group (kernel parameter cgroup_enable=)",
                list.join(", ")
            )),
        }
    }

    fn tun(&self) -> Finding {
        match self.root.join("dev/net/tun").exists() {
            true => good("taps can be made"),
            false => {
                lesser("/dev/net/tun is missing, so servers get no network; load it with `modprobe tun`")
            }
        }
    }

    /// inotify(7): what root may have of it, of which each network's dnsmasq takes one.
    fn inotify(&self) -> Finding {
        let instances =
            self.read("proc/sys/fs/inotify/max_user_instances").and_then(|text| text.parse().ok());
        match instances.unwrap_or(0_u32) {
            0 => lesser(
                "the kernel has no inotify, by which networks are told of new servers; use another kernel",
            ),
            few if few < INOTIFY_INSTANCES_FEW => lesser(format!(
                "all networks of this host together, and whatever else root runs, can watch {few} times, and each network does \
                 once; allow more with `sysctl fs.inotify.max_user_instances=8192`"
            )),
            many => good(format!(
                "{many} networks can be told of new servers, less what else root runs; more with `sysctl \
                 fs.inotify.max_user_instances=8192`"
            )),
        }
    }

    fn forwarding(&self) -> Finding {
        match self.read("proc/sys/net/ipv4/ip_forward").as_deref() {
            Some("0") => good("the host forwards nothing but what Toft's NAT networks need"),
            Some(_) => {
                good("somebody made the host forward between all its devices; Toft leaves that as it is")
            }
            None => lesser("the kernel has no IPv4, which networks need; use another kernel"),
        }
    }

    fn clock_source(&self) -> Finding {
        let path = "sys/devices/system/clocksource/clocksource0/current_clocksource";
        match self.read(path).as_deref() {
            Some(source @ ("tsc" | "kvm-clock" | "hyperv_clocksource_tsc_page")) => {
                good(format!("the clock is {source}, which guests can read by themselves"))
            }
            Some(source) => lesser(format!(
                "the clock is {source}, so guests read the time slowly; look in `dmesg` for why the TSC was given up"
            )),
            None => lesser("the kernel does not say what its clock is"),
        }
    }

    fn huge_pages(&self) -> Finding {
        let text = self.read("proc/meminfo").unwrap_or_default();
        let reserved = text.lines().find_map(|line| line.strip_prefix("HugePages_Total:")).map(str::trim);
        match reserved {
            Some("0") | None => good("none are reserved; servers do not need them"),
            Some(count) => good(format!("{count} are reserved, which servers do not use")),
        }
    }

    fn transparent_huge_pages(&self) -> Finding {
        let text = self.read("sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
        let chosen = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
        match chosen {
            Some("never" | "deny") | None => good(
                "off for shared memory; `echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled` makes \
                 large servers faster",
            ),
            Some(chosen) => good(format!("{chosen} for shared memory")),
        }
    }

    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }
}

/// What one file of vulnerabilities admits: nothing, all of it (an empty text), or some parts, in brackets. What
/// hyper-threading leaves open is the check of hyper-threading's to tell.
fn unmitigated(text: &str) -> Option<String> {
    let text = text.trim();
    if text.starts_with("Vulnerable") {
        return Some(String::new());
    }
    // `Unknown: No mitigations` is what processors too old to be looked into get.
    let open = |part: &&str| {
        let part = part.to_ascii_lowercase();
        part.contains("vulnerable") && !part.contains("smt vulnerable") || part.starts_with("unknown")
    };
    let parts: Vec<&str> = text.split([';', ',']).map(str::trim).filter(open).collect();
    (!parts.is_empty()).then(|| format!(" ({})", parts.join(", ")))
}

fn installed(name: &str, package: &str, without: &str) -> Finding {
    match program::find(name) {
        Some(path) => good(format!("found at {}", path.display())),
        None => lesser(format!("{name} is missing: {without}; install it with `apt install {package}`")),
    }
}

/// Whether anything can be made still, and whether it is about to end.
fn storage(directory: &Path) -> Finding {
    match space::look(directory) {
        Ok(space) => judge_storage(space),
        Err(cause) => lesser(format!("{} cannot be looked at: {cause}", directory.display())),
    }
}

fn judge_storage(Space { total_bytes, free_bytes, .. }: Space) -> Finding {
    let free = format!("{} MiB are free", free_bytes >> 20);
    if free_bytes < RESERVE_BYTES {
        lesser(format!(
            "{free}, and the last {} MiB are kept for the host's records: nothing can be made. Delete snapshots, images or \
             volumes, or add space",
            RESERVE_BYTES >> 20
        ))
    } else if free_bytes < total_bytes / 20 {
        lesser(format!(
            "{free}, less than a twentieth; a guest whose disk cannot grow gets errors. Add space"
        ))
    } else {
        good(free)
    }
}

fn reflink(directory: &Path) -> Finding {
    match shares_blocks(directory, directory) {
        Ok(true) => good("disks are made from images without copying"),
        _ => lesser(format!(
            "the file system of {} cannot share blocks, so every disk is copied from its image; use XFS or btrfs",
            directory.display()
        )),
    }
}

#[cfg(test)]
mod tests;
