//! The walls of a running VMM, as the kernel shows them: a filter on every thread, in every phase of its life.
use std::collections::BTreeMap;
use std::fs::File;
use std::time::Instant;

use wire::control::{Command, PROTOCOL, Reply, Sandbox};

use crate::probe_guest;
use crate::vmm_driver::{Machine, PATIENCE, Vmm};

/// For each thread by name: how many filters it has. Fails when one has none.
fn filters(vmm: &Vmm) -> BTreeMap<String, u32> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", vmm.pid())).unwrap();
    let status =
        threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim_start_matches(':').trim().to_owned()
    };
    status
        .map(|status| {
            let name = field(&status, "Name");
            assert_eq!(field(&status, "Seccomp"), "2", "{name} is not filtered");
            assert_eq!(field(&status, "NoNewPrivs"), "1", "{name}");
            (name, field(&status, "Seccomp_filters").parse().unwrap())
        })
        .collect()
}

fn sandbox(vmm: &mut Vmm) -> Sandbox {
    match vmm.command(Command::Hello { protocol: PROTOCOL }) {
        Ok(Reply::Hello { sandbox, .. }) => sandbox,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_thread_is_filtered_before_and_after_a_reset() {
    let mut vmm = Vmm::start();
    let told = sandbox(&mut vmm);
    assert!(told.seccomp && told.rings_restricted, "{told:?}");
    if let Ok(modules) = std::fs::read_to_string("/sys/kernel/security/lsm") {
        assert_eq!(told.landlock_abi > 0, modules.contains("landlock"), "{told:?} {modules}");
    }
    assert_eq!(filters(&vmm), BTreeMap::from([("toft-vmm".to_owned(), 2)]));

    let mut machine = Machine::new(probe_guest::path(), "blkbench=16,4096,3000,write spin");
    machine.spec.vcpus = 2;
    let file = tempfile::tempfile().unwrap();
    File::set_len(&file, 16 << 20).unwrap();
    machine.disk(file, |_| ());
    vmm.try_boot(machine).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while vmm.stats().disks[0].writes == 0 {
        assert!(Instant::now() < deadline, "the disk stands still\n{}", vmm.told());
    }
    // Threads of devices go with their driver; this one is at work.
    vmm.command(Command::Pause).unwrap();
    for reset in [false, true] {
        if reset {
            vmm.command(Command::Reset).unwrap();
        }
        // Two of the process, one that forbids rings, one of the thread's own once it has put it on.
        let filters = loop {
            let filters = filters(&vmm);
            if ["vcpu0", "vcpu1"].iter().all(|vcpu| filters.get(*vcpu) == Some(&4)) {
                break filters;
            }
            assert!(Instant::now() < deadline, "{filters:?}");
        };
        assert_eq!(filters.get("toft-vmm"), Some(&3), "{filters:?}");
        // A device's thread is started by a vCPU's.
        assert!(reset || filters.get("block") == Some(&5), "{filters:?}");
    }
    assert_eq!(sandbox(&mut vmm), told);
}
