use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;
use wire::saved::lower::{Lower, Run};

use super::*;

const MIB: u64 = 1 << 20;

/// A file of so many bytes of which nothing is in the cache, and which is read page by page.
fn cold(directory: &Path, name: &str, bytes: u64) -> File {
    let path = directory.join(name);
    std::fs::write(&path, vec![1; bytes as usize]).unwrap();
    let file = File::open(&path).unwrap();
    fadvise(&file, 0, None, Advice::Random).unwrap();
    // What somebody in the kernel still holds is not forgotten at once. Each time another page of each MiB is looked at.
    for page in (0..MIB).step_by(8192) {
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        if (page..bytes).step_by(MIB as usize).all(|at| !is_cached(&file, at)) {
            return file;
        }
    }
    panic!("{} stays in the cache", path.display());
}

/// Whether a page is there to be read without the disk. To look brings it in: each can be looked at once.
fn is_cached(file: &File, offset: u64) -> bool {
    match preadv2(file, &mut [IoSliceMut::new(&mut [0])], offset, ReadWriteFlags::NOWAIT) {
        Ok(_) => true,
        Err(Errno::AGAIN) => false,
        Err(cause) => panic!("{cause}"),
    }
}

#[test]
fn what_was_used_is_read_from_whichever_file_it_lies_in_and_nothing_else() {
    // Beside the test's program, which lies on a disk: what lies in memory cannot be out of the cache.
    let directory = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let (mine, theirs) = (cold(directory.path(), "own", 64 * MIB), cold(directory.path(), "below", 64 * MIB));
    let lower =
        Lower { bytes: 64 * MIB, files: 1, runs: vec![Run { offset: 8 * MIB, bytes: 4 * MIB, file: 0 }] };
    let again = |name: &str| File::open(directory.path().join(name)).unwrap();
    let layers = Layers::new(again("own"), lower, vec![again("below")]).unwrap();
    // The last ends beyond the file, as only a damaged list could say.
    let used =
        Used { runs: vec![(0, 2 * MIB), (3 * MIB, MIB - 4096), (7 * MIB, 2 * MIB), (63 * MIB, u64::MAX)] };
    read_ahead(&layers, &used).unwrap();
    // Behind a long run the kernel has read on, for some MiB.
    for (file, at, wanted) in [
        (&mine, 0, true),
        (&mine, 1, true),
        (&mine, 3, true),
        (&mine, 7, true),
        (&mine, 40, false),
        (&mine, 63, true),
        (&theirs, 7, false),
        (&theirs, 8, true),
        (&theirs, 40, false),
        (&theirs, 63, false),
    ] {
        // Every other page is waited for, as nobody has yet; what was asked for with it is there, too, then.
        for page in (at * MIB..(at + 1) * MIB).step_by(8192) {
            file.read_exact_at(&mut [0], page).unwrap();
        }
        let pages = (at * MIB..(at + 1) * MIB).step_by(8192).map(|page| page + 4096);
        let cached = pages.filter(|page| is_cached(file, *page)).count();
        assert!(
            if wanted { cached > 120 } else { cached < 8 },
            "{cached} of 128 pages of MiB {at} of {file:?}"
        );
    }
}

#[test]
fn what_was_used_is_a_bounded_list_of_runs() {
    let page = |index: u64| index * 4096..(index + 1) * 4096;
    // Sixteen pages in between are read along, more are not.
    let used = Used::of(vec![page(100), page(0), page(1), page(18), page(60)]);
    assert_eq!(used.runs, [(0, 19 * 4096), (60 * 4096, 4096), (100 * 4096, 4096)]);
    assert_eq!(used.bytes(), 21 * 4096);

    let scattered = (0..3 * USED_RUNS_MAX as u64).map(|index| page(index * 20)).collect();
    let used = Used::of(scattered);
    assert!((1..=USED_RUNS_MAX).contains(&used.runs.len()), "{}", used.runs.len());
    assert_eq!(used.bytes(), ((3 * USED_RUNS_MAX as u64 - 1) * 20 + 1) * 4096, "something was left out");

    let longest = Used { runs: vec![(u64::MAX, u64::MAX); USED_RUNS_MAX] };
    let bytes = serde_json::to_vec(&longest).unwrap();
    assert!(bytes.len() as u64 <= USED_BYTES_MAX, "{}", bytes.len());
}

#[test]
fn a_damaged_list_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let dirs = Dirs::prepare(directory.path()).unwrap();
    let id = SnapshotId::new();
    std::fs::create_dir_all(dirs.snapshot(id)).unwrap();
    assert_eq!(Used::read(&dirs, id).unwrap_err().kind(), io::ErrorKind::NotFound);
    let used = Used::of(vec![0..4096, 5 * MIB..6 * MIB]);
    used.write(&dirs.snapshot(id)).unwrap();
    assert_eq!(Used::read(&dirs, id).unwrap(), used);
    let path = dirs.snapshot(id).join(USED);
    let whole = std::fs::read(&path).unwrap();
    for bad in [
        &whole[..whole.len() - 1],
        b"",
        b"{\"runs\":[[1]]}",
        b"{\"runs\":[[-1,1]]}",
        b"{\"runs\":[[0,9],[8,9]]}",
        &[b' '; 1 << 20],
    ] {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).truncate(true).mode(0o600);
        std::io::Write::write_all(&mut options.open(&path).unwrap(), bad).unwrap();
        assert_eq!(Used::read(&dirs, id).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

#[test]
fn a_line_of_a_process_s_mappings_is_taken_apart() {
    let line = "7f0a40000000-7f0a48000000 rw-p 00200000 fe:00 131                        /state/snapshots/x/machine.memory";
    let found = Mapping::parse(line).unwrap();
    assert_eq!(found.name, "7f0a40000000-7f0a48000000");
    assert_eq!(
        (found.addresses, found.offset, found.inode),
        (0x7f0a_4000_0000..0x7f0a_4800_0000, 2 * MIB, 131)
    );
    for none in ["", "x", "1-2", "1-2 rw-p 0 0:0 0", "1-2 rw-p 0 0:0 x", "1 rw-p 0 0:0 5", "1-2 rw-p z 0:0 5"]
    {
        assert!(Mapping::parse(none).is_none(), "{none}");
    }
}

#[test]
fn a_process_is_looked_at_within_its_file_and_not_for_ever() {
    const PRESENT: u64 = 1 << 63;
    let (first, length) = (0x1000u64, 64u64);
    let mut pages = tempfile::tempfile().unwrap();
    let mut entries = vec![0u64; (first + 4 * length) as usize];
    for page in [3, 4, 30, 63, 64, 100] {
        entries[(first + page) as usize] = PRESENT;
    }
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_ne_bytes()).collect();
    std::io::Write::write_all(&mut pages, &bytes).unwrap();
    let mapping = |count: u64, offset: u64| Mapping {
        name: "",
        addresses: first * PAGE_BYTES..(first + count) * PAGE_BYTES,
        offset: offset * PAGE_BYTES,
        inode: 1,
    };
    let found = || Found { length: length * PAGE_BYTES, left: 2 * length, ranges: Vec::new() };
    let page = |from: u64, to: u64| from * PAGE_BYTES..to * PAGE_BYTES;

    // What lies beyond the end of the file is not looked at, however far the mapping goes on.
    let mut all = found();
    all.look(&pages, &mapping(1 << 36, 0)).unwrap();
    assert_eq!(all.ranges, [page(3, 5), page(30, 31), page(63, 64)]);
    // Nor is what is mapped of a part.
    let mut part = found();
    part.look(&pages, &mapping(10, 40)).unwrap();
    part.look(&pages, &mapping(10, 60)).unwrap();
    part.look(&pages, &mapping(10, 70)).unwrap();
    assert_eq!(part.ranges, [page(43, 45), page(63, 64)]);
    // The whole file twice, and no third time.
    all.look(&pages, &mapping(length, 0)).unwrap();
    let cause = all.look(&pages, &mapping(length, 0)).unwrap_err();
    assert_eq!(cause.kind(), io::ErrorKind::InvalidData);
}
