//! `toft run`: the machine runs in a jail as root and without root, and what the jail is without is told.
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::probe_guest;
use crate::vmm_driver::program;

/// Copies a program. Not in this process: what any other test's child still has open for writing cannot be run.
pub(crate) fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").args([from, to]).status();
    assert!(copied.expect("cp can be started").success(), "{} was not copied", from.display());
}

/// A directory that anybody may enter, with what a machine needs.
fn stage() -> tempfile::TempDir {
    let directory = tempfile::Builder::new().prefix("toft-run").tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::copy(probe_guest::path(), path("probe")).unwrap();
    let document = r#"{"memory_bytes": 67108864, "kernel": "probe", "cmdline": "mem rng"}"#;
    std::fs::write(path("machine.json"), document).unwrap();
    for name in ["toft", "toft-vmm"] {
        copy_program(&program().with_file_name(name), &path(name));
        std::fs::set_permissions(path(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    directory
}

fn toft_run(directory: &Path) -> Command {
    let mut command = Command::new(directory.join("toft"));
    command.arg("run").arg(directory.join("machine.json")).stdin(std::process::Stdio::null());
    command
}

/// Standard output and error of a machine that powered itself off with nothing amiss.
fn told(output: Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("probe: done failed=0"), "{out}\n{err}");
    err
}

#[test]
fn a_machine_runs_and_the_absence_of_cgroups_is_told() {
    let directory = stage();
    let errors = told(toft_run(directory.path()).output().unwrap());
    assert!(errors.contains("without cgroup_cpu, cgroup_memory, cgroup_pids"), "{errors}");
    if nix::unistd::geteuid().is_root() {
        assert!(!errors.contains("without uid"), "{errors}");
    }
}

#[test]
fn without_root_a_machine_runs_with_what_is_left() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: toft run without root: it is what the other test runs here");
    }
    let directory = stage();
    let kvm = directory.path().join("kvm");
    // KVM's own number, for a user who is in no group.
    let made =
        Command::new("mknod").arg("-m").arg("666").arg(&kvm).args(["c", "10", "232"]).status().unwrap();
    assert!(made.success());
    let user = 0x7100_0000 + std::process::id();
    let mut command = toft_run(directory.path());
    command.arg("--kvm").arg(&kvm).uid(user).gid(user).env("TMPDIR", std::env::temp_dir());
    let errors = told(command.output().unwrap());
    assert!(errors.contains("without uid: it runs with the ids of whoever started it"), "{errors}");
}

#[test]
fn a_vmm_that_others_may_not_execute_is_told_so() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: a VMM for root alone: needs root");
    }
    let directory = stage();
    let vmm = directory.path().join("toft-vmm");
    std::fs::set_permissions(&vmm, PermissionsExt::from_mode(0o700)).unwrap();
    let output = toft_run(directory.path()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains("that others may execute"), "{errors}");
}
