use std::os::unix::fs::symlink;

use super::*;

const MIB: u64 = 1 << 20;

/// A file of a pattern, of a length that need be no multiple of a block.
fn source(directory: &Path, length: u64) -> File {
    let path = directory.join("source");
    let bytes: Vec<u8> = (0..length).map(|at| (at / 997 % 251 + 1) as u8).collect();
    std::fs::write(&path, bytes).unwrap();
    File::open(path).unwrap()
}

fn bytes(layers: &Layers) -> Vec<u8> {
    let mut bytes = vec![0; layers.own.metadata().unwrap().len() as usize];
    layers.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn empty(directory: &Path) -> File {
    let options = File::options().read(true).write(true).create_new(true).clone();
    options.open(directory.join("own")).unwrap()
}

#[test]
fn an_overlay_is_holes_over_a_file_that_outlives_its_first_name() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    for (length, own_bytes) in [(MIB, 0), (MIB + 5000, 4096)] {
        let below = Layers::one(source(at, length));
        let (own, place) = (empty(at), at.join("own"));
        // What an earlier try has left.
        std::fs::write(backing(&place), "of another").unwrap();
        assert!(lay(&below, &own, &place, 4 * MIB).unwrap());
        assert_eq!((own.metadata().unwrap().len(), used_bytes(own.metadata())), (4 * MIB, own_bytes));
        let wanted = std::fs::read(at.join("source")).unwrap();
        std::fs::remove_file(at.join("source")).unwrap();
        let layers = Layers::over(own, File::open(backing(&place)).unwrap());
        let read = bytes(&layers);
        assert!(
            read[..length as usize] == wanted[..] && read[length as usize..].iter().all(|byte| *byte == 0)
        );
        assert_eq!(lies(FillMethod::Overlay, &place), FillMethod::Overlay);
        std::fs::remove_file(backing(&place)).unwrap();
        // It was filled anew, and whole, since its record was written.
        assert_eq!(lies(FillMethod::Overlay, &place), FillMethod::SparseCopy);
        assert_eq!(lies(FillMethod::Reflink, &place), FillMethod::Reflink);
        std::fs::remove_file(place).unwrap();
    }
}

#[test]
fn what_lies_in_several_files_or_on_another_file_system_is_no_overlay() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let place = at.join("own");
    let two = Layers::over(source(at, MIB), tempfile::tempfile().unwrap());
    assert!(!lay(&two, &empty(at), &place, MIB).unwrap());
    std::fs::remove_file(&place).unwrap();
    // A memfd is on a mount of the kernel's.
    let memory = rustix::fs::memfd_create("elsewhere", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let elsewhere = Layers::one(File::from(memory));
    assert!(!lay(&elsewhere, &empty(at), &place, MIB).unwrap());
    assert_eq!(place.metadata().unwrap().len(), 0);
    assert!(!backing(&place).exists());
}

#[test]
fn what_is_open_gets_the_name_and_not_what_its_first_name_leads_to_now() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let (below, place) = (source(at, MIB), at.join("own"));
    std::fs::rename(at.join("source"), at.join("moved")).unwrap();
    std::fs::write(at.join("secret"), "secret").unwrap();
    symlink(at.join("secret"), at.join("source")).unwrap();
    symlink(at.join("secret"), backing(&place)).unwrap();
    assert!(lay(&Layers::one(below), &empty(at), &place, MIB).unwrap());
    assert_eq!(std::fs::symlink_metadata(backing(&place)).unwrap().len(), MIB);
    assert_eq!(std::fs::read(at.join("secret")).unwrap(), b"secret");
}

#[test]
fn a_volume_takes_what_nobody_else_has_besides() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let (below, place) = (Layers::one(source(at, MIB)), at.join("own"));
    let own = empty(at);
    assert!(lay(&below, &own, &place, MIB).unwrap());
    own.write_all_at(&[1; 4096], 0).unwrap();
    assert_eq!((own_bytes(&place), stored_bytes(&place)), (4096, MIB + 4096));
    std::fs::remove_file(at.join("source")).unwrap();
    assert_eq!(own_bytes(&place), MIB + 4096);
}

#[test]
fn what_is_missing_of_an_overlay_is_neither_what_it_has_written_nor_a_hole() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let (below, place) = (source(at, MIB), at.join("own"));
    File::options().write(true).open(at.join("source")).unwrap().set_len(3 * MIB).unwrap();
    let own = empty(at);
    assert_eq!(lacking(&place), 0);
    assert!(lay(&Layers::one(below), &own, &place, 4 * MIB).unwrap());
    assert_eq!(lacking(&place), MIB);
    own.write_all_at(&[1; 3 << 18], 0).unwrap();
    assert_eq!(lacking(&place), MIB / 4);
    own.write_all_at(&[1; 3 << 18], MIB / 2).unwrap();
    assert_eq!(lacking(&place), 0);
    // Of what cannot be opened, all.
    std::fs::remove_file(&place).unwrap();
    assert_eq!(lacking(&place), MIB);
}

/// Holds of the file systems that tests run on.
#[test]
fn this_file_system_is_known() {
    let directory = tempfile::tempdir().unwrap();
    if statfs(directory.path()).unwrap().f_type == 0xEF53 {
        assert!(tells_holes(directory.path()).unwrap());
        assert!(!shares_blocks(directory.path(), directory.path()).unwrap());
    }
    let dirs = Dirs::prepare(&directory.path().join("state")).unwrap();
    let found = means(&dirs).unwrap();
    assert!(found == Means::Blocks || found == Means::Holes || !tells_holes(directory.path()).unwrap());
    assert_eq!(std::fs::read_dir(dirs.root().join("volumes")).unwrap().count(), 0, "nothing is left");
    // A file system that can share blocks of some files is asked for no holes.
    assert!(tells_holes(Path::new("/proc")).is_err() || !tells_holes(Path::new("/proc")).unwrap());
}
