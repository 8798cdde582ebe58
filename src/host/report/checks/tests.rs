use super::*;

struct Fake(tempfile::TempDir);

impl Fake {
    fn new(files: &[(&str, &str)]) -> Fake {
        let fake = Fake(tempfile::tempdir().unwrap());
        for (path, content) in files {
            let path = fake.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        fake
    }

    fn status(&self, name: &str) -> (CheckStatus, String) {
        let checks = System::new(self.0.path()).checks(self.0.path());
        let check = checks.into_iter().find(|check| check.name == name).unwrap();
        (check.status, check.detail)
    }
}

#[test]
fn each_check_tells_good_from_lesser() {
    let meltdown = "sys/devices/system/cpu/vulnerabilities/meltdown";
    let clock = "sys/devices/system/clocksource/clocksource0/current_clocksource";
    let swap = "Filename Type Size Used Priority\n";
    let cases = [
        ("mitigations", meltdown, "Mitigation: PTI\n", "Vulnerable: no microcode\n"),
        ("smt", "sys/devices/system/cpu/smt/active", "0\n", "1\n"),
        ("ksm", "sys/kernel/mm/ksm/run", "0\n", "1\n"),
        ("swap", "proc/swaps", swap, "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n"),
        ("user_namespaces", "proc/sys/user/max_user_namespaces", "5000\n", "0\n"),
        ("seccomp", "proc/sys/kernel/seccomp/actions_avail", "kill_process kill_thread log\n", "\n"),
        ("io_uring", "proc/sys/kernel/io_uring_disabled", "0\n", "1\n"),
        ("cgroups", "sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n", "hugetlb\n"),
        ("inotify", "proc/sys/fs/inotify/max_user_instances", "128\n", "16\n"),
        ("clock_source", clock, "tsc\n", "hpet\n"),
    ];
    for (name, path, well, ill) in cases {
        assert_eq!(Fake::new(&[(path, well)]).status(name).0, CheckStatus::Ok, "{name} of {well:?}");
        assert_eq!(Fake::new(&[(path, ill)]).status(name).0, CheckStatus::Degraded, "{name} of {ill:?}");
    }
}

#[test]
fn control_groups_of_either_version_are_told_by_what_they_lack() {
    let old = ["cpu", "memory", "pids"].map(|name| format!("sys/fs/cgroup/{name}/tasks"));
    let files: Vec<(&str, &str)> = old.iter().map(|path| (path.as_str(), "")).collect();
    let (status, detail) = Fake::new(&files).status("cgroups");
    assert_eq!(status, CheckStatus::Ok, "{detail}");
    assert!(detail.contains("version 1"), "{detail}");
    let (status, detail) = Fake::new(&files[..1]).status("cgroups");
    assert_eq!(status, CheckStatus::Degraded);
    assert!(detail.contains("memory, pids"), "{detail}");
}

#[test]
fn what_is_not_mitigated_is_named_in_order() {
    let directory = "sys/devices/system/cpu/vulnerabilities";
    let fake = Fake::new(&[
        (&format!("{directory}/spectre_v2"), "Vulnerable\n"),
        (&format!("{directory}/mds"), "Vulnerable: Clear CPU buffers attempted, no microcode\n"),
        (&format!("{directory}/l1tf"), "Not affected\n"),
    ]);
    assert!(fake.status("mitigations").1.starts_with("not mitigated: mds, spectre_v2; "));
}

#[test]
fn what_is_mitigated_in_part_is_told_by_part() {
    let cases = [
        ("Mitigation: PTE Inversion; VMX: conditional cache flushes, SMT vulnerable", None),
        ("Mitigation: PTE Inversion; VMX: vulnerable", Some(" (VMX: vulnerable)")),
        ("Mitigation: Clear CPU buffers; SMT Host state unknown", None),
        ("KVM: Mitigation: Split huge pages", None),
        ("KVM: Vulnerable", Some(" (KVM: Vulnerable)")),
        ("Processor vulnerable", Some(" (Processor vulnerable)")),
        ("Unknown: No mitigations", Some(" (Unknown: No mitigations)")),
        ("Mitigation: Enhanced IBRS; RSB filling; BHI: Vulnerable", Some(" (BHI: Vulnerable)")),
        ("Vulnerable; BHI: Vulnerable", Some("")),
        ("Not affected", None),
    ];
    for (text, expected) in cases {
        assert_eq!(unmitigated(text).as_deref(), expected, "{text}");
    }
}

#[test]
fn compressed_memory_is_no_disk() {
    let fake = Fake::new(&[("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 5\n")]);
    assert_eq!(fake.status("swap").0, CheckStatus::Ok);
}

#[test]
fn an_empty_host_has_every_check_and_a_remedy_for_each_that_is_not_good() {
    let fake = Fake::new(&[]);
    let checks = System::new(fake.0.path()).checks(fake.0.path());
    assert_eq!(checks.len(), 18);
    assert!(
        checks.iter().all(|check| check.status != CheckStatus::Failed && check.detail.len() > 15),
        "{checks:?}"
    );
}

#[test]
fn the_real_host_can_be_read_and_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let system = System::new(Path::new("/"));
    let names: Vec<String> = system.checks(directory.path()).into_iter().map(|check| check.name).collect();
    assert!(names.contains(&"reflink".to_owned()) && names.contains(&"storage".to_owned()));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_disk_that_is_nearly_full_is_told_before_and_when_nothing_can_be_made() {
    let of = |free_bytes| judge_storage(Space { total_bytes: 100 << 30, free_bytes, used_bytes: 0 });
    assert_eq!(of(50 << 30).0, CheckStatus::Ok);
    let (status, detail) = of(4 << 30);
    assert!(status == CheckStatus::Degraded && detail.contains("4096 MiB are free"), "{detail}");
    let (status, detail) = of(RESERVE_BYTES - 1);
    assert!(status == CheckStatus::Degraded && detail.contains("nothing can be made"), "{detail}");
}
