use std::collections::BTreeMap;

use super::*;

const OLD: &str = "\
33 25 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct
34 25 0:29 / /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory
35 25 0:30 /part /elsewhere/pids rw shared:12 - cgroup cgroup rw,pids
36 25 0:30 / /sys/fs/cgroup/pids rw shared:12 - cgroup cgroup rw,pids
37 25 0:31 / /sys/fs/cgroup/systemd rw shared:13 - cgroup cgroup rw,name=systemd
38 25 0:32 / /nowhere/unified rw shared:14 - cgroup2 cgroup2 rw,nsdelegate
";

fn cell(key: &str) -> Cell {
    Cell { key: key.to_owned(), memory_bytes: 64 << 20, vcpus: 2, file_bytes_max: 1 << 30 }
}

#[test]
fn each_controller_is_taken_from_the_hierarchy_that_has_it() {
    let found = Cgroups::mounted(OLD, "toft");
    let shown: Vec<(&str, &[Controller])> = found
        .hierarchies
        .iter()
        .map(|hierarchy| (hierarchy.root.to_str().unwrap(), hierarchy.controllers.as_slice()))
        .collect();
    assert_eq!(
        shown,
        [
            ("/sys/fs/cgroup/cpu,cpuacct", [Controller::Cpu].as_slice()),
            ("/sys/fs/cgroup/memory", &[Controller::Memory]),
            ("/sys/fs/cgroup/pids", &[Controller::Pids]),
        ]
    );
    assert!(found.hierarchies.iter().all(|hierarchy| hierarchy.version == Version::V1));
}

#[test]
fn a_host_without_groups_is_told_by_each_item() {
    let made = Cgroups::mounted("", "toft").make(&cell("none"));
    assert!(made.joins.is_empty());
    let items: Vec<Item> = made.missing.iter().map(|missing| missing.item).collect();
    assert_eq!(items, [Item::CgroupCpu, Item::CgroupMemory, Item::CgroupPids]);
}

#[test]
fn membership_counts_only_in_the_right_hierarchy_and_group() {
    let found = Cgroups::mounted(OLD, "toft");
    for (membership, why) in [
        ("3:memory:/\n", "it is not in the group /toft/a"),
        ("3:memory:/toft/b\n", "it is not in the group /toft/a"),
        ("3:pids:/toft/a\n0::/toft/a\n", "it is not in the group /toft/a"),
        // It is in a group that this machine does not have, so no limit can be read.
        ("3:memory:/toft/a\n", "the group /toft/a has no limit"),
    ] {
        assert_eq!(found.found("a", membership, Controller::Memory), Err(why.to_owned()), "{membership}");
    }
}

/// What a hierarchy of this version comes to hold, made of plain files in place of the kernel's. `absent` is not among them.
fn written(version: Version, absent: Option<&str>) -> (BTreeMap<String, String>, bool, usize) {
    let root = tempfile::tempdir().unwrap();
    let parent = root.path().join("toft");
    let directory = parent.join("one");
    fs::create_dir_all(&directory).unwrap();
    for group in [root.path(), &parent] {
        fs::write(group.join("cgroup.subtree_control"), "memory").unwrap();
    }
    let files = ["memory.max", SWAP_V2, "memory.limit_in_bytes", SWAP_V1, "cgroup.procs", "tasks"];
    for file in files.into_iter().filter(|file| Some(*file) != absent) {
        fs::write(directory.join(file), "").unwrap();
    }
    let root = root.path().to_owned();
    let hierarchy = Hierarchy { version, root, parent, controllers: vec![Controller::Memory] };
    let (_, refused) = hierarchy.make(&cell("one")).unwrap();
    let content = |file: &str| Some((file.to_owned(), fs::read_to_string(directory.join(file)).ok()?));
    let contents = files.into_iter().filter_map(content).filter(|(_, content)| !content.is_empty()).collect();
    (contents, Controller::Memory.is_limited(version, &directory), refused.len())
}

#[test]
fn memory_beyond_the_limit_does_not_go_to_swap() {
    let bytes = ((64 << 20) + (256 << 10) + limits::VMM_MEMORY_BYTES).to_string();
    let (contents, is_limited, refused) = written(Version::V2, None);
    assert_eq!(contents, BTreeMap::from([("memory.max", &*bytes), (SWAP_V2, "0")].map(owned)));
    assert_eq!((is_limited, refused), (true, 0));
    let (contents, is_limited, refused) = written(Version::V1, None);
    assert_eq!(contents, BTreeMap::from([("memory.limit_in_bytes", &*bytes), (SWAP_V1, &*bytes)].map(owned)));
    assert_eq!((is_limited, refused), (true, 0));
    // A kernel that cannot limit it is told of only where there is swap.
    let is_free = fs::read_to_string("/proc/swaps").unwrap_or_default().lines().count() <= 1;
    for (version, file) in [(Version::V2, SWAP_V2), (Version::V1, SWAP_V1)] {
        let (_, is_limited, refused) = written(version, Some(file));
        assert_eq!((is_limited, refused == 0), (is_free, is_free), "{version:?}");
    }
}

fn owned((name, content): (&str, &str)) -> (String, String) {
    (name.to_owned(), content.to_owned())
}

#[test]
fn a_group_whose_swap_was_given_free_is_not_limited() {
    for (version, limit, swap) in
        [(Version::V2, "memory.max", SWAP_V2), (Version::V1, "memory.limit_in_bytes", SWAP_V1)]
    {
        let group = tempfile::tempdir().unwrap();
        fs::write(group.path().join(limit), "4096").unwrap();
        for (content, is_limited) in [("max", false), ("9223372036854771712", false), ("0", true)] {
            fs::write(group.path().join(swap), content).unwrap();
            let found = Controller::Memory.is_limited(version, group.path());
            assert_eq!(found, is_limited, "{version:?} {content}");
        }
    }
}

/// On the groups of this host, where they can be made.
#[test]
fn groups_are_made_limited_counted_and_removed() {
    let host = Cgroups::of_host(&format!("toft-test-{}", std::process::id())).unwrap();
    let made = host.make(&cell("one"));
    let lacking: BTreeMap<Item, &str> =
        made.missing.iter().map(|missing| (missing.item, missing.why.as_str())).collect();
    if !lacking.is_empty() {
        println!("skipped: control groups as a server has them: {lacking:?}");
    } else {
        // Made again, it is the same group.
        assert_eq!(host.make(&cell("one")).missing, []);
        for controller in Controller::ALL {
            let hierarchy = host.with(controller).unwrap();
            assert!(controller.is_limited(hierarchy.version, &hierarchy.directory("one")), "{controller:?}");
        }
        assert_eq!(host.oom_kills("one"), 0);
        // With more memory than before, and with less.
        for memory_bytes in [128 << 20, 32 << 20] {
            assert_eq!(host.make(&Cell { memory_bytes, ..cell("one") }).missing, []);
        }
    }
    host.remove("one").unwrap();
    host.remove("one").unwrap();
    assert!(host.hierarchies.iter().all(|hierarchy| !hierarchy.parent.exists()));
}
