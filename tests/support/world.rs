//! Namespaces of a test's own, and all there is in them as lines of text: what a server leaves behind is the
//! difference of two looks. It knows no daemon; `daemon` calls it.
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Set in a test that runs inside.
const INSIDE: &str = "TOFT_TEST_INSIDE";

/// Runs the test `name` again, alone, in namespaces of its own: network, mounts, processes. A shell is the first
/// process there and reaps what is orphaned; whatever still runs when the test has ended, ends with it.
pub(crate) fn inside(name: &str, test: impl Future<Output = ()>) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return tokio::task::LocalSet::new().block_on(&runtime.expect("a runtime"), test);
    }
    let group = format!("toft-test-{}-{}", std::process::id(), name.replace("::", "-"));
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-c", "ip link set lo up; \"$@\"; exit $?", "sh"])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "yes")
        .env("TOFT_CGROUP", &group)
        .output()
        .expect("unshare can be started");
    // Servers that ran to the end have left theirs, empty.
    for directory in groups(&[group]).into_iter().rev() {
        for server in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(server.path());
        }
        let _ = std::fs::remove_dir(directory);
    }
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    // Indented, so that nobody counts the results of the tests inside among those outside. What is skipped there is skipped.
    for line in said.iter().flat_map(|text| text.lines()) {
        println!("  | {line}");
        if line.starts_with("skipped: ") {
            println!("{line}");
        }
    }
    assert!(output.status.success(), "{name} failed in its namespaces: {}", output.status);
    assert!(said[0].contains("test result: ok. 1 passed"), "there is no test {name}");
}

/// One look at processes, devices, rules, mounts, control groups and files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct World(BTreeSet<String>);

impl World {
    /// Looks. `roots` are directories whose files count; control groups count that carry one of `names`.
    pub(crate) fn look(roots: &[PathBuf], names: &[String]) -> World {
        let mut seen = BTreeSet::new();
        let mut count: BTreeMap<String, u32> = BTreeMap::new();
        for (_, line) in processes() {
            *count.entry(line).or_default() += 1;
        }
        seen.extend(count.iter().map(|(line, count)| format!("process {line} ({count})")));
        for line in run("ip", &["-o", "link"]).lines() {
            // The rest of a line has counters and states that change by themselves.
            let name = line.split(": ").nth(1).unwrap_or(line);
            seen.insert(format!("device {}", name.split('@').next().unwrap_or(name)));
        }
        let rules = run("nft", &["list", "ruleset"]);
        seen.extend(elements(&rules).map(|rule| format!("rule {rule}")));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        seen.extend(mounts.lines().map(|line| format!("mount {line}")));
        for group in groups(names) {
            seen.insert(format!("cgroup {}", group.display()));
        }
        for root in roots {
            files(root, &mut seen);
        }
        World(seen)
    }

    /// What is there and was not in `before`, and what was and is not.
    pub(crate) fn differs_from(&self, before: &World) -> Vec<String> {
        let more = self.0.difference(&before.0).map(|line| format!("left over: {line}"));
        let less = before.0.difference(&self.0).map(|line| format!("missing: {line}"));
        more.chain(less).collect()
    }
}

/// Every process here but this test and what it does to look, with its command line.
pub(crate) fn processes() -> Vec<(i32, String)> {
    let mut found = Vec::new();
    let us = [1, std::process::id() as i32];
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if us.contains(&pid) || stat.is_empty() {
            continue;
        }
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ").trim().to_owned();
        // Without a command line it has ended, or is a shell's child between fork and exec.
        if !line.is_empty() {
            found.push((pid, line));
        }
    }
    found
}

/// Words of rules: sets are printed many elements a line, broken anywhere.
fn elements(rules: &str) -> impl Iterator<Item = String> {
    let mut table = String::new();
    rules
        .lines()
        .flat_map(move |line| {
            let line = line.trim();
            if line.starts_with("table ") || line.starts_with("set ") || line.starts_with("chain ") {
                table = line.trim_end_matches(" {").to_owned();
            }
            let line = line.trim_start_matches("elements = {").trim_end_matches('}');
            let parts: Vec<String> =
                line.split(',').map(|part| format!("{table}: {}", part.trim())).collect();
            parts
        })
        .filter(|rule| !rule.ends_with(": "))
}

/// Control groups that carry one of `names`.
pub(crate) fn groups(names: &[String]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut ahead = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = ahead.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            if names.iter().any(|wanted| name.contains(wanted.as_str())) {
                found.push(entry.path());
            }
            ahead.push(entry.path());
        }
    }
    found
}

/// Files by their paths; small texts that the host writes for others also by their lines.
fn files(root: &Path, seen: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            seen.insert(format!("directory {}", path.display()));
            match name.strip_suffix(".d") {
                // What dnsmasq is told of who is new, and later with everybody: what it is counts, not in which file.
                Some(whole) => added(&path, &root.join(whole), seen),
                None => files(&path, seen),
            }
            continue;
        }
        // SQLite's own two come and go with its connections, and which memory a restore needs is written beside its snapshot whenever
        // the host has the time.
        if name.ends_with(".db-wal") || name.ends_with(".db-shm") || name == "machine.used" {
            continue;
        }
        seen.insert(format!("file {}", path.display()));
        if ["hosts", "names", "leases"].contains(&name.as_str()) {
            lines(&path, &path, seen);
        }
    }
}

/// Lines of all files of a directory, as if they were of the file `whole`.
fn added(directory: &Path, whole: &Path, seen: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        lines(&entry.path(), whole, seen);
    }
}

fn lines(path: &Path, shown: &Path, seen: &mut BTreeSet<String>) {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    seen.extend(text.lines().map(|line| format!("line {}: {line}", shown.display())));
}

/// What a program that must succeed says.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
