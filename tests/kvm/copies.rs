//! Disks that are copied as they are at a moment, whose guests write on.
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use wire::control::{Command, Fault, FaultCode, Reply};
use wire::copies::{CopyReport, CopySpec, CopyStatus, DiskCopy};
use wire::machine::FdIndex;
use wire::migration::SendLimits;

use crate::migrate::{files, pairs, probe};
use crate::vmm_driver::Vmm;

const BYTES: u64 = 256 << 20;

fn fresh() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    file
}

/// A disk with something everywhere.
fn filled() -> File {
    let file = fresh();
    let piece: Vec<u8> = (0..1 << 20).map(|at| (at / 512 % 251) as u8 + 1).collect();
    (0..BYTES >> 20).for_each(|at| file.write_all_at(&piece, at << 20).unwrap());
    file
}

fn is_same(one: &File, other: &File) -> bool {
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    (0..BYTES >> 20).all(|at| {
        one.read_exact_at(&mut a, at << 20).unwrap();
        other.read_exact_at(&mut b, at << 20).unwrap();
        a == b
    })
}

fn copy(file: &File) -> File {
    let copy = tempfile::tempfile().unwrap();
    std::io::copy(&mut File::open(format!("/dev/fd/{}", fd(file))).unwrap(), &mut &copy).unwrap();
    copy
}

fn fd(file: &File) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(file)
}

fn begin(vmm: &mut Vmm, named: &[(u16, &File)]) -> Result<(), Fault> {
    let disks = (0..).zip(named).map(|(at, (disk, _))| DiskCopy { disk: *disk, file: FdIndex(at) }).collect();
    let files: Vec<_> = named.iter().map(|(_, file)| file.as_fd()).collect();
    let id = vmm.send(Command::CopyDisks(CopySpec { disks }), &files);
    vmm.reply(id).map(drop)
}

fn status(vmm: &mut Vmm) -> CopyStatus {
    match vmm.command(Command::CopyStatus) {
        Ok(Reply::Copy(status)) => status,
        other => panic!("{other:?}"),
    }
}

fn ended(vmm: &mut Vmm) -> Result<CopyReport, String> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        match status(vmm) {
            CopyStatus::Copying { done_bytes, total_bytes } => assert!(done_bytes <= total_bytes),
            CopyStatus::Copied(report) => return Ok(report),
            CopyStatus::Failed { detail } => return Err(detail),
            CopyStatus::None => panic!("{}", vmm.told()),
        }
        assert!(Instant::now() < until, "{}", vmm.told());
        std::thread::yield_now();
    }
}

#[test]
fn a_copy_is_of_the_moment_in_which_its_guest_stood_still() {
    let (file, other) = (filled(), fresh());
    // Other bytes each time, all over the disk: the end first, which is copied last.
    let words = "write=500001,1,20000 write=300000,2,9000 write=77,3,5000 \
                 write=500001,4,20000 write=300000,5,9000 write=77,6,5000 loop";
    let mut machine = probe(words, 64);
    machine.disk(file.try_clone().unwrap(), |_| {});
    machine.disk(other.try_clone().unwrap(), |_| {});
    let mut vmm = Vmm::boot(machine);
    assert_eq!(status(&mut vmm), CopyStatus::None);
    let mut waits = 0;
    for round in 1..=4 {
        vmm.wait_for_times("probe: write ok", 5 * round);
        let targets = [fresh(), fresh()];
        let fault = begin(&mut vmm, &[(0, &targets[0])]).unwrap_err();
        assert!(fault.code == FaultCode::WrongState && fault.detail.contains("park it first"), "{fault}");
        vmm.command(Command::Park).unwrap();
        let expected = copy(&file);
        begin(&mut vmm, &[(1, &targets[1]), (0, &targets[0])]).unwrap();
        vmm.command(Command::Resume).unwrap();
        let report = ended(&mut vmm).unwrap();
        println!("{report:?}");
        assert!(is_same(&targets[0], &expected), "round {round}");
        assert_eq!(targets[1].metadata().unwrap().blocks(), 0, "nothing is a hole");
        assert_eq!(report.written_bytes, BYTES);
        assert!(
            !files(&vmm, "/").contains(&targets[0].metadata().unwrap().ino()),
            "nobody needs it any more"
        );
        assert!(report.delay.us_sum >= report.delay.us_max);
        waits += report.waits;
    }
    assert!(waits > 0, "its guest writes all the time");
    assert!(!vmm.console().contains("FAILED"), "{}", vmm.console());
}

#[test]
fn it_can_be_given_up_goes_on_over_a_reset_and_lets_no_machine_move() {
    let file = filled();
    let mut machine = probe("write=77,3,5000 loop", 64);
    machine.disk(file.try_clone().unwrap(), |_| {});
    let mut vmm = Vmm::boot(machine);
    vmm.wait_for_console("probe: write ok");
    vmm.command(Command::CancelCopy).unwrap();
    vmm.command(Command::Park).unwrap();
    let target = fresh();
    for (named, field) in [
        (vec![], "/disks"),
        (vec![(1, &target)], "/disks/0/disk"),
        (vec![(0, &target), (0, &target)], "/disks/1/disk"),
    ] {
        let fault = begin(&mut vmm, &named).unwrap_err();
        assert!(fault.code == FaultCode::Invalid && fault.detail.contains(field), "{fault}");
    }
    let short = tempfile::tempfile().unwrap();
    assert!(begin(&mut vmm, &[(0, &short)]).unwrap_err().detail.contains("it has 0 bytes"));
    begin(&mut vmm, &[(0, &target)]).unwrap();
    vmm.command(Command::CancelCopy).unwrap();
    // It may have come to its end before.
    let first = ended(&mut vmm);
    assert!(first.is_ok() || first.unwrap_err().contains("given up"));
    let (target, expected) = (fresh(), copy(&file));
    begin(&mut vmm, &[(0, &target)]).unwrap();
    let sent = vmm.try_send(pairs(1).0, SendLimits::default());
    let again = begin(&mut vmm, &[(0, &fresh())]);
    // The machine is parked, and a copy of so much takes longer than to ask.
    for refused in [sent, again] {
        assert!(refused.as_ref().unwrap_err().detail.contains("disks are being copied"), "{refused:?}");
    }
    vmm.command(Command::Reset).unwrap();
    vmm.wait_for_times("probe: write ok", 3);
    ended(&mut vmm).unwrap();
    assert!(is_same(&target, &expected));
    // A file that cannot be written to is the copy's trouble alone.
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(BYTES).unwrap();
    vmm.command(Command::Park).unwrap();
    begin(&mut vmm, &[(0, &File::open(named.path()).unwrap())]).unwrap();
    vmm.command(Command::Resume).unwrap();
    ended(&mut vmm).unwrap_err();
    let seen = vmm.console().matches("probe: write ok").count();
    vmm.wait_for_times("probe: write ok", seen + 3);
    assert!(!vmm.console().contains("FAILED"), "{}", vmm.console());
}
