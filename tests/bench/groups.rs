//! Control groups of the bench's own, which go when they are dropped. Version 1 where it has the controller, else version 2.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

const ROOT: &str = "/sys/fs/cgroup";

/// What a daemon limits of a VMM; each is a hierarchy of its own in version 1.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Only groups of version 1 have it.
const TASKS: &str = "tasks";

/// One group.
pub(crate) struct Group {
    directory: PathBuf,
    is_first: bool,
}

impl Group {
    /// A group in which this controller counts.
    pub(crate) fn make(controller: &str) -> Group {
        Group::below(&root(controller))
    }

    /// As many as a daemon makes for one VMM.
    pub(crate) fn of_a_vmm() -> Vec<Group> {
        let mut roots = CONTROLLERS.map(root).to_vec();
        // In version 2 one hierarchy has several.
        roots.sort();
        roots.dedup();
        roots.iter().map(|root| Group::below(root)).collect()
    }

    fn below(root: &Path) -> Group {
        let directory = root.join(format!("toft-bench-{}", unique()));
        fs::create_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let is_first = directory.join(TASKS).is_file();
        Group { directory, is_first }
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
        if self.is_first { TASKS } else { "cgroup.procs" }
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

/// The hierarchy in which this controller counts. Of a VMM whose host has none the daemon's jail is not whole, and the bench measures none
/// such.
fn root(controller: &str) -> PathBuf {
    let first = Path::new(ROOT).join(controller);
    if first.join(TASKS).is_file() {
        return first;
    }
    let has = |root: &PathBuf| {
        let offered = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        offered.split_whitespace().any(|name| name == controller)
    };
    // Beside those of version 1 that of version 2 lies one deeper.
    let seconds = [PathBuf::from(ROOT), Path::new(ROOT).join("unified")];
    let found = seconds.into_iter().find(has);
    found.unwrap_or_else(|| panic!("this host has no control groups for {controller} below {ROOT}"))
}

fn open(path: &Path) -> File {
    File::options().write(true).open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A name that no other bench on this host has, whose processes may count from 1 as ours do.
fn unique() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/uuid").expect("the kernel's numbers");
    text.trim().to_owned()
}
