use std::os::unix::fs::symlink;

use model::ImageId;

use super::*;
use crate::images::testing::Sample;

struct Import {
    directory: tempfile::TempDir,
    images: tempfile::TempDir,
}

impl Import {
    fn new() -> Import {
        Import { directory: tempfile::tempdir().unwrap(), images: tempfile::tempdir().unwrap() }
    }

    fn receive(&self, name: &str) -> Result<Arrived, Refusal> {
        let incoming = Incoming::create(self.images.path(), ImageId::new()).unwrap();
        receive(self.directory.path(), name, incoming, &Conditions::default(), &Watch::default())
    }

    fn refused(&self, name: &str) -> String {
        let refusal = self.receive(name).expect_err("it was taken").to_string();
        assert_eq!(std::fs::read_dir(self.images.path()).unwrap().count(), 0);
        refusal
    }
}

#[test]
fn a_directory_and_a_bundle_arrive_alike() {
    let import = Import::new();
    Sample::new().write(&import.directory.path().join("sample"));
    std::fs::write(import.directory.path().join("sample.tar"), Sample::new().bundle()).unwrap();
    let (one, other) = (import.receive("sample").unwrap(), import.receive("sample.tar").unwrap());
    assert_eq!((one.sha256, one.manifest), (other.sha256, other.manifest));
}

#[test]
fn what_a_recipe_built_is_taken_without_copying() {
    use std::os::unix::fs::MetadataExt;
    let images = tempfile::tempdir().unwrap();
    let incoming = Incoming::create(images.path(), ImageId::new()).unwrap();
    let built = incoming.path().join("built");
    Sample::new().write(&built);
    let before = std::fs::metadata(built.join("vmlinuz")).unwrap().ino();
    adopt(&built, incoming, &Conditions::default(), &Watch::default()).unwrap();
    let place = std::fs::read_dir(images.path()).unwrap().next().unwrap().unwrap().path();
    assert_eq!(std::fs::metadata(place.join("kernel")).unwrap().ino(), before);
    assert_eq!(std::fs::read_dir(place).unwrap().count(), 4);
}

#[test]
fn only_one_plain_name_is_an_entry() {
    for good in ["debian-12", "debian 12.tar", "ünïcode"] {
        assert!(is_entry_name(good), "{good:?}");
    }
    for bad in ["", ".", "..", ".hidden", "a/b", "/etc", "a\0b", &"x".repeat(256)] {
        assert!(!is_entry_name(bad), "{bad:?}");
    }
}

#[test]
fn links_pipes_and_strangers_are_refused_and_nothing_is_left() {
    let import = Import::new();
    let root = import.directory.path();
    let elsewhere = tempfile::tempdir().unwrap();
    Sample::new().write(&elsewhere.path().join("sample"));
    std::fs::write(elsewhere.path().join("sample.tar"), Sample::new().bundle()).unwrap();
    symlink(elsewhere.path().join("sample"), root.join("linked-directory")).unwrap();
    symlink(elsewhere.path().join("sample.tar"), root.join("linked-bundle")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    for name in ["linked-directory", "linked-bundle", "magic"] {
        assert!(import.refused(name).contains("link"), "{name}");
    }
    Sample::new().write(&root.join("linked-kernel"));
    std::fs::remove_file(root.join("linked-kernel/vmlinuz")).unwrap();
    symlink(elsewhere.path().join("sample/vmlinuz"), root.join("linked-kernel/vmlinuz")).unwrap();
    assert!(import.refused("linked-kernel").contains("vmlinuz is a link"));

    nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(import.refused("pipe").contains("neither"));
    std::fs::create_dir(root.join("empty")).unwrap();
    assert!(import.refused("empty").contains("image.json is missing"));
    assert!(import.refused("absent").contains("absent is missing"));
    Sample::new().write(&root.join("short"));
    std::fs::remove_file(root.join("short/initrd")).unwrap();
    assert!(import.refused("short").contains("initrd is missing"));
}
