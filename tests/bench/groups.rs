//! Control groups of the bench's own, which go when they are dropped. Version 1 where it has the controller, else version 2.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

const ROOT: &str = "/sys/fs/cgroup";

/// What a daemon limits of a VMM; each is a hierarchy of its own in version 1.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// One group.
pub(crate) struct Group {
    directory: PathBuf,
    is_first: bool,
}

impl Group {
    /// A group in which this controller counts.
    pub(crate) fn make(controller: &str) -> Group {
        let first = Path::new(ROOT).join(controller);
        let is_first = first.is_dir();
        let root = if is_first { first } else { PathBuf::from(ROOT) };
        let directory = root.join(format!("toft-bench-{}", unique()));
        fs::create_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        Group { directory, is_first }
    }

    /// As many as a daemon makes for one VMM.
    pub(crate) fn of_a_vmm() -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for controller in CONTROLLERS {
            if groups.iter().all(|group| group.is_first) {
                groups.push(Group::make(controller));
            }
        }
        groups
    }

    /// The file into which a process writes itself, or a thread in version 1.
    pub(crate) fn joining(&self) -> File {
        open(&self.directory.join(self.join()))
    }

    /// The same of the group around it.
    pub(crate) fn leaving(&self) -> File {
        open(&self.directory.with_file_name(self.join()))
    }

    fn join(&self) -> &'static str {
        if self.is_first { "tasks" } else { "cgroup.procs" }
    }

    /// KiB that a group of the controller for memory is charged.
    pub(crate) fn charged_kb(&self) -> f64 {
        let name = if self.is_first { "memory.usage_in_bytes" } else { "memory.current" };
        let text = fs::read_to_string(self.directory.join(name)).expect("a group that is charged");
        text.trim().parse::<f64>().expect("a number") / 1024.0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last thread of a process that ended may still be on its way out.
        for _ in 0..100 {
            if fs::remove_dir(&self.directory).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("bench: {} is left behind", self.directory.display());
    }
}

fn open(path: &Path) -> File {
    File::options().write(true).open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A name that no other bench on this host has, whose processes may count from 1 as ours do.
fn unique() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/uuid").expect("the kernel's numbers");
    text.trim().to_owned()
}
