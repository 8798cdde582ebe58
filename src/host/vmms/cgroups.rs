//! A control group for each VMM: its CPU time, memory and tasks are limited and counted in one. Version 2 where
//! the host has it, version 1 where it has that, each controller by itself where it has both. The launcher's child
//! joins; what is made here is named by the server or the shell that has it, made again at will, and gone when its VMM has been released.
//! Sources: the kernel's admin-guide/cgroup-v2 and admin-guide/cgroup-v1.
use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use sys::pidfd::PidFd;
use wire::isolation::{Item, Missing};

use super::Cell;
use crate::limits;

/// What is wanted of a server's groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Cpu,
    Memory,
    Pids,
}

impl Controller {
    const ALL: [Controller; 3] = [Controller::Cpu, Controller::Memory, Controller::Pids];

    fn name(self) -> &'static str {
        match self {
            Controller::Cpu => "cpu",
            Controller::Memory => "memory",
            Controller::Pids => "pids",
        }
    }

    fn item(self) -> Item {
        match self {
            Controller::Cpu => Item::CgroupCpu,
            Controller::Memory => Item::CgroupMemory,
            Controller::Pids => Item::CgroupPids,
        }
    }

    /// The file that holds its limit, and what is written there first and last.
    fn limit(self, version: Version, cell: &Cell) -> Vec<(&'static str, String)> {
        let period_us = limits::CPU_PERIOD_US;
        let quota_us = u64::from(cell.vcpus).saturating_add(limits::DEVICE_CPUS).saturating_mul(period_us);
        let tables = cell.memory_bytes / limits::VMM_TABLES_PART;
        let memory = cell.memory_bytes.saturating_add(limits::VMM_MEMORY_BYTES).saturating_add(tables);
        match (self, version) {
            (Controller::Cpu, Version::V2) => vec![("cpu.max", format!("{quota_us} {period_us}"))],
            // The period is what it is in every new group. For each write the kernel walks through all groups.
            (Controller::Cpu, Version::V1) => vec![("cpu.cfs_quota_us", quota_us.to_string())],
            // Without a word on swap, memory beyond the limit goes there, until the host has none left.
            (Controller::Memory, Version::V2) => {
                vec![("memory.max", memory.to_string()), (SWAP_V2, "0".to_owned())]
            }
            // Here memory and swap are limited together, never below the limit of memory alone, whatever stood before.
            (Controller::Memory, Version::V1) => vec![
                (SWAP_V1, "-1".to_owned()),
                ("memory.limit_in_bytes", memory.to_string()),
                (SWAP_V1, memory.to_string()),
            ],
            (Controller::Pids, _) => vec![("pids.max", limits::VMM_NPROC.to_string())],
        }
    }

    /// Whether the group's limit, as the kernel tells it, is one.
    fn is_limited(self, version: Version, directory: &Path) -> bool {
        let read = |name| fs::read_to_string(directory.join(name)).unwrap_or_default();
        match (self, version) {
            (Controller::Cpu, Version::V2) => {
                is_number(read("cpu.max").split(' ').next().unwrap_or_default())
            }
            (Controller::Cpu, Version::V1) => {
                read("cpu.cfs_quota_us").trim().parse().is_ok_and(|us: i64| us > 0)
            }
            (Controller::Memory, Version::V2) => {
                is_number(&read("memory.max"))
                    && (read(SWAP_V2).trim() == "0" || has_no_swap(&directory.join(SWAP_V2)))
            }
            // Without a limit the file shows the largest page-aligned number.
            (Controller::Memory, Version::V1) => {
                let is_bound = |name| read(name).trim().parse().is_ok_and(|bytes: u64| bytes < 1 << 62);
                is_bound("memory.limit_in_bytes")
                    && (is_bound(SWAP_V1) || has_no_swap(&directory.join(SWAP_V1)))
            }
            (Controller::Pids, _) => is_number(&read("pids.max")),
        }
    }
}

/// Where a group's use of swap is limited. Kernels that do not account swap have no such file.
const SWAP_V2: &str = "memory.swap.max";
const SWAP_V1: &str = "memory.memsw.limit_in_bytes";

/// Whether the file that would limit swap is missing, and so is swap.
fn has_no_swap(file: &Path) -> bool {
    // The first line says what is in the columns; a kernel that knows no swap has no such file either.
    !file.exists() && fs::read_to_string("/proc/swaps").unwrap_or_default().lines().count() <= 1
}

fn is_number(text: &str) -> bool {
    text.trim().parse::<u64>().is_ok()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// One hierarchy and what it controls.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    root: PathBuf,
    /// The group below which servers have theirs.
    parent: PathBuf,
    controllers: Vec<Controller>,
}

/// The host's hierarchies that matter here.
#[derive(Debug)]
pub(super) struct Cgroups {
    /// Name of the group below which servers have theirs. Nothing else of the host's is in it.
    parent: String,
    hierarchies: Vec<Hierarchy>,
}

/// Groups that are ready to be joined.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// The file of each into which a process writes itself.
    pub(super) joins: Vec<File>,
    /// What cannot be had, and why.
    pub(super) missing: Vec<Missing>,
}

impl Cgroups {
    /// Looks at what is mounted.
    pub(super) fn of_host(parent: &str) -> io::Result<Cgroups> {
        Ok(Cgroups::mounted(&fs::read_to_string("/proc/self/mountinfo")?, parent))
    }

    fn mounted(mountinfo: &str, parent: &str) -> Cgroups {
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        let mut left: Vec<Controller> = Controller::ALL.to_vec();
        // A controller of version 1 is taken from version 2 by the kernel itself, so those come first.
        for wanted in [Version::V1, Version::V2] {
            for (version, root, options) in mountinfo.lines().filter_map(mount) {
                if version != wanted {
                    continue;
                }
                let offered = match version {
                    Version::V1 => options.replace(',', " "),
                    Version::V2 => fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default(),
                };
                let has = |controller: &Controller| {
                    offered.split_whitespace().any(|name| name == controller.name())
                };
                let (controllers, others) = left.iter().partition(|controller| has(controller));
                left = others;
                let parent = root.join(parent);
                let hierarchy = Hierarchy { version, root, parent, controllers };
                if !hierarchy.controllers.is_empty() {
                    hierarchies.push(hierarchy);
                }
            }
        }
        Cgroups { parent: parent.to_owned(), hierarchies }
    }

    /// Makes the groups of `cell` with its limits. Repeatable. What the host refuses is told in the answer.
    pub(super) fn make(&self, cell: &Cell) -> Made {
        let mut made = Made::default();
        let mut left: Vec<Controller> = Controller::ALL.to_vec();
        for hierarchy in &self.hierarchies {
            left.retain(|controller| !hierarchy.controllers.contains(controller));
            let refused = match hierarchy.make(cell) {
                Ok((join, refused)) => {
                    made.joins.push(join);
                    refused
                }
                Err(cause) => {
                    let why = format!("no control group can be made: {cause}");
                    hierarchy.controllers.iter().map(|controller| (*controller, why.clone())).collect()
                }
            };
            made.missing.extend(refused.into_iter().map(|(what, why)| Missing { item: what.item(), why }));
        }
        let absent = |what: Controller| Missing {
            item: what.item(),
            why: format!("the host has no control groups for {}", what.name()),
        };
        made.missing.extend(left.into_iter().map(absent));
        made
    }

    /// Removes the groups named `key`, which nobody is in any more. Repeatable.
    pub(super) fn remove(&self, key: &str) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            let directory = hierarchy.directory(key);
            let mut tries = 0;
            loop {
                match fs::remove_dir(&directory) {
                    Ok(()) => break,
                    Err(cause) if cause.kind() == ErrorKind::NotFound => break,
                    // The last thread of a process that ended may still be on its way out.
                    Err(cause)
                        if cause.kind() == ErrorKind::ResourceBusy && tries < limits::CGROUP_REMOVE_TRIES =>
                    {
                        tries += 1;
                        std::thread::sleep(limits::CGROUP_REMOVE_AGAIN);
                    }
                    Err(cause) => return Err(cause),
                }
            }
            // Goes with the last server; while there are others the kernel refuses.
            let _ = fs::remove_dir(&hierarchy.parent);
        }
        Ok(())
    }

    /// Ends whatever is in groups whose names begin with `prefix`, but for those in `kept`, and removes the groups.
    pub(super) fn sweep(&self, prefix: &str, kept: &HashSet<String>) -> io::Result<()> {
        let mut strays = BTreeSet::new();
        for hierarchy in &self.hierarchies {
            let entries = match fs::read_dir(&hierarchy.parent) {
                Err(cause) if cause.kind() == ErrorKind::NotFound => continue,
                entries => entries?,
            };
            let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
            strays.extend(names.filter(|name| name.starts_with(prefix) && !kept.contains(name)));
        }
        for stray in &strays {
            tracing::info!("the VMM in the group {stray} is nobody's and is ended");
            self.hierarchies.iter().try_for_each(|hierarchy| hierarchy.empty(stray))?;
        }
        for stray in strays {
            // What a daemon cannot do without is not that another's leftovers are gone in time.
            if let Err(cause) = self.remove(&stray) {
                tracing::warn!("the group {stray} is removed at the next start: {cause}");
            }
        }
        Ok(())
    }

    /// How often the kernel ended a process in the group named `key` because its memory ran out.
    pub(super) fn oom_kills(&self, key: &str) -> u64 {
        let Some(hierarchy) = self.with(Controller::Memory) else { return 0 };
        let file = match hierarchy.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        let text = fs::read_to_string(hierarchy.directory(key).join(file)).unwrap_or_default();
        let counted = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        counted.unwrap_or_default()
    }

    /// What of `controller` a process has whose `/proc/<pid>/cgroup` is `membership`: its limit, or what lacks.
    pub(super) fn found(
        &self,
        key: &str,
        membership: &str,
        controller: Controller,
    ) -> Result<String, String> {
        let Some(hierarchy) = self.with(controller) else {
            return Err(format!("the host has no control groups for {}", controller.name()));
        };
        let path = format!("/{}/{key}", self.parent);
        let is_member = membership.lines().any(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (names, group) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
            let ours = match hierarchy.version {
                Version::V1 => names.split(',').any(|name| name == controller.name()),
                Version::V2 => names.is_empty(),
            };
            ours && group == path
        });
        if !is_member {
            return Err(format!("it is not in the group {path}"));
        }
        if !controller.is_limited(hierarchy.version, &hierarchy.directory(key)) {
            return Err(format!("the group {path} has no limit"));
        }
        Ok(format!("limited in {}", hierarchy.directory(key).display()))
    }

    fn with(&self, controller: Controller) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|hierarchy| hierarchy.controllers.contains(&controller))
    }
}

impl Hierarchy {
    fn directory(&self, key: &str) -> PathBuf {
        self.parent.join(key)
    }

    /// Kills every process of the group named `key`. Removing the group waits for their end.
    fn empty(&self, key: &str) -> io::Result<()> {
        let file = self.directory(key).join("cgroup.procs");
        let members = match fs::read_to_string(&file) {
            Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(()),
            members => members?,
        };
        for pid in members.lines().filter_map(|line| line.parse().ok()) {
            let Ok(process) = PidFd::open(pid) else { continue };
            // Looked at again after the pidfd is open: from here on the number cannot change hands.
            if fs::read_to_string(&file)?.lines().any(|line| line.parse() == Ok(pid)) {
                // One that has ended meanwhile is what was wanted.
                let _ = process.signal(Signal::SIGKILL);
            }
        }
        Ok(())
    }

    /// The file to join by, and limits that cannot be set.
    fn make(&self, cell: &Cell) -> io::Result<(File, Vec<(Controller, String)>)> {
        let directory = self.directory(&cell.key);
        let mut tries = 0;
        loop {
            match self.make_directories(&directory) {
                // Another server's end took the empty parent away meanwhile.
                Err(cause) if cause.kind() == ErrorKind::NotFound && tries < limits::CGROUP_REMOVE_TRIES => {
                    tries += 1
                }
                made => break made?,
            }
        }
        let mut refused = Vec::new();
        for controller in &self.controllers {
            for (name, value) in controller.limit(self.version, cell) {
                let file = directory.join(name);
                if let Err(cause) = write(&file, &value) {
                    if [SWAP_V1, SWAP_V2].contains(&name) && has_no_swap(&file) {
                        continue;
                    }
                    refused.push((*controller, format!("{name} cannot be set to {value}: {cause}")));
                    break;
                }
            }
        }
        let join = match self.version {
            // A single thread that moves itself does not stop the others of the host.
            Version::V1 => "tasks",
            Version::V2 => "cgroup.procs",
        };
        Ok((File::options().write(true).open(directory.join(join))?, refused))
    }

    fn make_directories(&self, directory: &Path) -> io::Result<()> {
        if self.version == Version::V2 {
            self.hand_down(&self.root)?;
        }
        existing(fs::create_dir(&self.parent))?;
        if self.version == Version::V2 {
            self.hand_down(&self.parent)?;
        }
        existing(fs::create_dir(directory))
    }

    /// Lets the groups below `group` have the controllers (cgroup-v2, "Enabling and Disabling").
    fn hand_down(&self, group: &Path) -> io::Result<()> {
        let file = group.join("cgroup.subtree_control");
        let has = fs::read_to_string(&file)?;
        let lacks = |controller: &&Controller| !has.split_whitespace().any(|name| name == controller.name());
        let wanted: Vec<String> = self
            .controllers
            .iter()
            .filter(lacks)
            .map(|controller| format!("+{}", controller.name()))
            .collect();
        if wanted.is_empty() { Ok(()) } else { write(&file, &wanted.join(" ")) }
    }
}

fn existing(made: io::Result<()>) -> io::Result<()> {
    match made {
        Err(cause) if cause.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// These files take each write whole, and none is made by writing.
fn write(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    File::options().write(true).open(path)?.write_all(value.as_bytes())
}

/// Version, mount point and options of a hierarchy that is mounted whole (proc_pid_mountinfo(5)).
fn mount(line: &str) -> Option<(Version, PathBuf, &str)> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    let mut rest = after.split(' ');
    let version = match rest.next()? {
        "cgroup" => Version::V1,
        "cgroup2" => Version::V2,
        _ => return None,
    };
    (root == "/").then_some((version, PathBuf::from(point), rest.nth(1)?))
}

#[cfg(test)]
mod tests;
