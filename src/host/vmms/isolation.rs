//! What keeps a running VMM apart, as found on its process and not as it was asked for. `/proc` says most of it
//! (proc(5)); what it does not show, the VMM says of itself. It decides nothing: `servers` shows and judges it.
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use wire::control::Sandbox;
use wire::isolation::Item;
use wire::launch;

use super::cgroups::{Cgroups, Controller};
use crate::limits;

/// One item as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which.
    pub item: Item,
    /// What stands for it, or what is missing; for people.
    pub found: Result<String, String>,
}

/// What to look at.
pub(super) struct Subject<'a> {
    pub(super) pid: i32,
    /// Name of its control groups.
    pub(super) key: &'a str,
    /// What it said before it had a guest.
    pub(super) sandbox: Option<Sandbox>,
    /// Files it may hold, and directories whose files it may hold.
    pub(super) files: &'a [PathBuf],
}

/// Looks at each item. Fails when the process cannot be read, as when it has ended.
pub(super) fn examine(subject: &Subject<'_>, cgroups: &Cgroups) -> io::Result<Vec<Finding>> {
    let process = Process::read(subject.pid)?;
    let membership = fs::read_to_string(process.path("cgroup"))?;
    let group = |controller| cgroups.found(subject.key, &membership, controller);
    let said = || subject.sandbox.ok_or_else(|| "it was not asked before its guest ran".to_owned());
    let found =
        |item| -> Result<String, String> {
            match item {
                Item::Uid => process.own_ids(),
                Item::Capabilities => process.no_capabilities(),
                Item::NoNewPrivs => process.shows("NoNewPrivs", "1", "nothing it executes gains a right"),
                Item::MountNamespace => process.own_namespace("mnt"),
                Item::PidNamespace => process.own_namespace("pid"),
                Item::NetNamespace => {
                    process.own_namespace("net").and_then(|own| process.no_devices().map(|()| own))
                }
                Item::IpcNamespace => process.own_namespace("ipc"),
                Item::UtsNamespace => process.own_namespace("uts"),
                Item::Root => process.empty_root(),
                Item::Rlimits => process.limited(),
                Item::Landlock => match said()?.landlock_abi {
                    0 => Err("the kernel has no Landlock, or it is switched off (kernel parameter lsm=)"
                        .to_owned()),
                    abi => Ok(format!("a domain that allows nothing, version {abi} of the interface")),
                },
                Item::CgroupCpu => group(Controller::Cpu),
                Item::CgroupMemory => group(Controller::Memory),
                Item::CgroupPids => group(Controller::Pids),
                Item::Seccomp => process.filtered(subject.sandbox.is_none_or(|sandbox| sandbox.seccomp)),
                Item::IoUring => match said()?.rings_restricted {
                    true => Ok("each ring does what its one file needs, and no other can be made".to_owned()),
                    false => Err("the kernel cannot restrict rings (it can since 5.10)".to_owned()),
                },
                Item::Descriptors => process.known_descriptors(subject.files),
            }
        };
    let findings = Item::ALL.into_iter().map(|item| Finding { item, found: found(item) }).collect();
    // What vanished meanwhile would have looked like a missing wall.
    fs::metadata(process.path("status")).map(|_| findings)
}

/// A process by its number, with the fields of its `status`.
struct Process {
    directory: PathBuf,
    status: String,
}

impl Process {
    fn read(pid: i32) -> io::Result<Process> {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let status = fs::read_to_string(directory.join("status"))?;
        Ok(Process { directory, status })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// One that nobody else on the host has, and no further groups.
    fn own_ids(&self) -> Result<String, String> {
        let ids = |name| -> BTreeSet<&str> { field(&self.status, name).split_whitespace().collect() };
        let (users, groups, further) = (ids("Uid"), ids("Gid"), ids("Groups"));
        let one = |set: &BTreeSet<&str>| {
            (set.len() == 1).then(|| set.iter().next().copied().unwrap_or_default().to_owned())
        };
        let (Some(user), Some(group)) = (one(&users), one(&groups)) else {
            return Err(format!("it has the user ids {users:?} and the group ids {groups:?}"));
        };
        if user == "0" || group == "0" {
            return Err("it runs as root".to_owned());
        }
        // A group that is the own one again gives nothing.
        if further.iter().any(|further| **further != *group) {
            return Err(format!("it has the further groups {further:?}"));
        }
        match self.sharers(&user) {
            0 => Ok(format!("user {user} and group {group}, which no other process has")),
            others => Err(format!("{others} other processes have its user id {user}")),
        }
    }

    /// Other processes with this user id.
    fn sharers(&self, user: &str) -> usize {
        let Ok(entries) = fs::read_dir("/proc") else { return 0 };
        let is_process = |name: &OsStr| name.as_encoded_bytes().first().is_some_and(u8::is_ascii_digit);
        let others = entries
            .flatten()
            .filter(|entry| is_process(&entry.file_name()) && entry.path() != self.directory);
        // One that ends meanwhile has no id any more.
        others.filter(|entry| entry.metadata().is_ok_and(|found| found.uid().to_string() == user)).count()
    }

    fn no_capabilities(&self) -> Result<String, String> {
        let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
        let held: Vec<String> = sets
            .iter()
            .map(|set| (set, field(&self.status, set)))
            .filter(|(_, value)| value.bytes().any(|digit| digit != b'0') || value.is_empty())
            .map(|(set, value)| format!("{set} {value}"))
            .collect();
        match held.as_slice() {
            [] => Ok("none in any set".to_owned()),
            held => Err(format!("it holds {}", held.join(", "))),
        }
    }

    fn shows(&self, name: &str, wanted: &str, words: &str) -> Result<String, String> {
        match field(&self.status, name) {
            value if value == wanted => Ok(words.to_owned()),
            value => Err(format!("{name} is {value:?} and not {wanted}")),
        }
    }

    fn own_namespace(&self, name: &str) -> Result<String, String> {
        let read = |path: PathBuf| {
            fs::read_link(&path).map_err(|cause| format!("{} cannot be read: {cause}", path.display()))
        };
        let (theirs, ours) =
            (read(self.path("ns").join(name))?, read(Path::new("/proc/self/ns").join(name))?);
        match theirs == ours {
            true => Err(format!("it shares {} with the daemon", theirs.display())),
            false => Ok(theirs.display().to_string()),
        }
    }

    fn no_devices(&self) -> Result<(), String> {
        let path = self.path("net/dev");
        let text = fs::read_to_string(&path)
            .map_err(|cause| format!("{} cannot be read: {cause}", path.display()))?;
        let devices: Vec<&str> =
            text.lines().skip(2).filter_map(|line| line.split(':').next()).map(str::trim).collect();
        match devices.iter().all(|device| *device == "lo") {
            true => Ok(()),
            false => Err(format!("its network namespace has the devices {}", devices.join(", "))),
        }
    }

    fn empty_root(&self) -> Result<String, String> {
        let failed = |cause: io::Error| format!("its root cannot be read: {cause}");
        if let Some(entry) = fs::read_dir(self.path("root")).map_err(failed)?.next() {
            let name = entry.map_err(failed)?.file_name();
            return Err(format!("its root is not empty: it has {}", name.to_string_lossy()));
        }
        let mounts = fs::read_to_string(self.path("mountinfo")).map_err(failed)?;
        let mounts: Vec<&str> = mounts.lines().collect();
        let [mount] = mounts.as_slice() else {
            return Err(format!("it sees {} mounts and not one", mounts.len()));
        };
        match mount.split(' ').nth(5).is_some_and(|options| options.split(',').any(|option| option == "ro")) {
            true => Ok("empty and read-only, and the only mount".to_owned()),
            false => Err("its root can be written".to_owned()),
        }
    }

    fn limited(&self) -> Result<String, String> {
        let text = fs::read_to_string(self.path("limits"))
            .map_err(|cause| format!("its limits cannot be read: {cause}"))?;
        let bounds = [
            ("Max open files", limits::VMM_NOFILE),
            ("Max processes", limits::VMM_NPROC),
            ("Max core file size", 0),
            ("Max locked memory", launch::MEMLOCK_BYTES),
            ("Max file size", u64::MAX),
        ];
        for (name, most) in bounds {
            let hard = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().nth(1))
                .unwrap_or("unreadable");
            if !hard.parse().is_ok_and(|hard: u64| hard <= most) {
                return Err(format!("{name} is {hard}"));
            }
        }
        Ok("open files, file size, tasks, core dumps and locked memory".to_owned())
    }

    /// Filters are the thread's, so each is looked at.
    fn filtered(&self, said: bool) -> Result<String, String> {
        if !said {
            return Err("the kernel filters no system calls".to_owned());
        }
        let tasks = fs::read_dir(self.path("task"))
            .map_err(|cause| format!("its threads cannot be listed: {cause}"))?;
        let mut count = 0;
        for task in tasks.flatten() {
            // A thread that ends meanwhile makes no more calls.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let (mode, name) = (field(&status, "Seccomp"), field(&status, "Name"));
            if mode != "2"
                && !fs::read_to_string(task.path().join("stat")).is_ok_and(|stat| is_ring_worker(&stat))
            {
                return Err(format!("thread {name} has no filter"));
            }
            count += 1;
        }
        Ok(format!("a filter on each of {count} threads"))
    }

    fn known_descriptors(&self, files: &[PathBuf]) -> Result<String, String> {
        let listed = fs::read_dir(self.path("fd"))
            .map_err(|cause| format!("its descriptors cannot be listed: {cause}"))?;
        let files = behind_links(files);
        let mut count = 0;
        for entry in listed.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let is_directory = fs::metadata(entry.path()).is_ok_and(|found| found.is_dir());
            if is_directory || !is_known(&target, &files) {
                return Err(format!("it holds {}", target.display()));
            }
            count += 1;
        }
        Ok(format!("{count}, each of a kind that a machine has"))
    }
}

/// Whether `stat` is that of one of io_uring's workers. They are the kernel's: they make no system calls and cannot carry a
/// filter of their own. Told by a flag (PF_IO_WORKER of the kernel's include/linux/sched.h), since a thread names itself.
fn is_ring_worker(stat: &str) -> bool {
    const IO_WORKER: u32 = 0x10;
    // The name stands in parentheses and may hold anything; the flags are the seventh field behind it.
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6));
    flags.and_then(|flags| flags.parse::<u32>().ok()).is_some_and(|flags| flags & IO_WORKER != 0)
}

/// What a machine is made of besides files of its server.
const KINDS: [&str; 12] = [
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:[timerfd]",
    "anon_inode:[io_uring]",
    "anon_inode:kvm-vm",
    "anon_inode:kvm-vcpu",
    "anon_inode:[userfaultfd]",
    "socket:[",
    "/memfd:",
    "/dev/kvm",
    "/dev/null",
    "/dev/net/tun",
];

/// As the kernel shows them: an operator may have put links on the way to the state directory. Files that are gone may be open still.
fn behind_links(files: &[PathBuf]) -> Vec<PathBuf> {
    let gone = |file: &PathBuf| Some(fs::canonicalize(file.parent()?).ok()?.join(file.file_name()?));
    let resolved = |file: &PathBuf| fs::canonicalize(file).ok().or_else(|| gone(file));
    files.iter().map(|file| resolved(file).unwrap_or_else(|| file.clone())).collect()
}

fn is_known(target: &Path, files: &[PathBuf]) -> bool {
    let text = target.to_string_lossy();
    if KINDS.iter().any(|kind| text.starts_with(kind)) {
        return true;
    }
    // A file that was replaced is shown with a word behind its name.
    let path = Path::new(text.strip_suffix(" (deleted)").unwrap_or(&text));
    files.iter().any(|file| path == file || path.parent() == Some(file))
}

/// The value of a field of `status`; empty when there is none.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_outside_any_jail_is_found_without_walls() {
        let sandbox = Some(Sandbox::default());
        let pid = i32::try_from(std::process::id()).unwrap();
        let subject = Subject { pid, key: "nobody", sandbox, files: &[] };
        let findings = examine(&subject, &Cgroups::of_host("toft").unwrap()).unwrap();
        assert_eq!(findings.iter().map(|finding| finding.item).collect::<Vec<_>>(), Item::ALL);
        for item in [Item::MountNamespace, Item::PidNamespace, Item::Root, Item::Seccomp, Item::CgroupMemory]
        {
            let finding = findings.iter().find(|finding| finding.item == item).unwrap();
            assert!(finding.found.is_err(), "{finding:?}");
        }
    }

    #[test]
    fn what_a_vmm_was_not_asked_in_time_does_not_stand() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let subject = Subject { pid, key: "nobody", sandbox: None, files: &[] };
        let findings = examine(&subject, &Cgroups::of_host("toft").unwrap()).unwrap();
        for item in [Item::Landlock, Item::IoUring] {
            let finding = findings.iter().find(|finding| finding.item == item).unwrap();
            assert_eq!(finding.found, Err("it was not asked before its guest ran".to_owned()), "{item}");
        }
    }

    #[test]
    fn a_process_that_has_ended_is_an_error() {
        let subject = Subject { pid: i32::MAX, key: "nobody", sandbox: None, files: &[] };
        assert!(examine(&subject, &Cgroups::of_host("toft").unwrap()).is_err());
    }

    #[test]
    fn a_ring_worker_is_told_by_its_flag_and_not_by_its_name() {
        let stat = |name: &str, flags: u32| format!("71 ({name}) S 1 70 70 0 -1 {flags} 0 0 0");
        assert!(is_ring_worker(&stat("iou-wrk-70", 0x40 | 0x10)));
        assert!(is_ring_worker(&stat("a) S 0 0 0 0 0 0", 0x10)));
        for (name, flags) in [("iou-wrk-70", 0x40), ("a) S 1 1 1 1 1 16 0", 0x40)] {
            assert!(!is_ring_worker(&stat(name, flags)), "{name}");
        }
        assert!(!is_ring_worker(""));
        let own = fs::read_to_string("/proc/thread-self/stat").unwrap();
        assert!(!is_ring_worker(&own), "{own}");
    }

    #[test]
    fn files_behind_a_link_on_the_way_are_known() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let shown = fs::canonicalize(&real).unwrap().join("log");
        assert!(!is_known(&shown, std::slice::from_ref(&link)));
        assert!(is_known(&shown, &behind_links(&[link])));
        // What has gone keeps its name, where that was.
        let gone = fs::canonicalize(&real).unwrap().join("gone.raw (deleted)");
        assert!(is_known(&gone, &behind_links(&[directory.path().join("link/gone.raw")])));
        let nowhere = directory.path().join("gone/with/its/directory");
        assert_eq!(behind_links(std::slice::from_ref(&nowhere)), [nowhere]);
    }

    #[test]
    fn files_are_known_by_name_or_by_their_directory() {
        let files = [PathBuf::from("/s/servers/a"), PathBuf::from("/s/volumes/v.raw")];
        for (target, known) in [
            ("/s/servers/a/will.json", true),
            ("/s/servers/a/seed.img (deleted)", true),
            ("/s/volumes/v.raw", true),
            ("/s/volumes/other.raw", false),
            ("/s/servers/ab/will.json", false),
            ("/s/servers/a/deep/file", false),
            ("/etc/shadow", false),
            ("anon_inode:[eventfd]", true),
            ("anon_inode:[perf_event]", false),
            ("/memfd:guest (deleted)", true),
        ] {
            assert_eq!(is_known(Path::new(target), &files), known, "{target}");
        }
    }
}
