//! The walls between rooms, as their manifests and sources state them. A new door is a line in `DOORS`, so
//! that opening one is a decision somebody reads.
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Every room with the rooms it may import.
const DOORS: [(&str, &[&str]); 10] = [
    ("sys", &[]),
    ("memory", &["sys"]),
    ("kvm", &["memory"]),
    ("devices", &["memory", "sys"]),
    ("wire", &["sys"]),
    ("vmm", &["devices", "kvm", "memory", "sys", "wire"]),
    ("model", &[]),
    ("host", &["model", "sys", "wire"]),
    ("http", &["host", "model"]),
    ("cli", &["model", "sys", "wire"]),
];

/// Rooms that may say `unsafe`.
const UNSAFE: [&str; 3] = ["sys", "memory", "kvm"];

/// Libraries that mark a family: the machine family has no async runtime and no HTTP, the control family no
/// KVM.
const FOREIGN: [(&[&str], &[&str]); 2] = [
    (
        &["sys", "memory", "kvm", "devices", "vmm", "wire"],
        &["tokio", "hyper", "axum", "rusqlite", "clap", "rustls", "utoipa"],
    ),
    (
        &["model", "host", "http", "cli"],
        &["kvm-ioctls", "kvm-bindings", "vm-memory", "virtio-queue", "linux-loader", "io-uring"],
    ),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn dependencies(room: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join("src").join(room).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    manifest["dependencies"].as_table().unwrap().keys().cloned().collect()
}

/// Every Rust source below `folder`.
pub(crate) fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn rooms_import_only_what_their_doors_allow() {
    let rooms: BTreeSet<&str> = DOORS.iter().map(|(room, _)| *room).collect();
    for (room, allowed) in DOORS {
        for dependency in dependencies(room) {
            if rooms.contains(dependency.as_str()) {
                assert!(allowed.contains(&dependency.as_str()), "{room} imports {dependency}");
            }
        }
    }
}

#[test]
fn every_room_is_listed() {
    let manifest: toml::Table = std::fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap();
    let members: BTreeSet<&str> = members.iter().filter_map(|m| m.as_str()?.strip_prefix("src/")).collect();
    assert_eq!(members, DOORS.iter().map(|(room, _)| *room).collect());
}

#[test]
fn families_keep_to_their_libraries() {
    for (rooms, foreign) in FOREIGN {
        for room in rooms {
            for dependency in dependencies(room) {
                assert!(!foreign.contains(&dependency.as_str()), "{room} uses {dependency}");
            }
        }
    }
}

#[test]
fn unsafe_stays_in_its_rooms() {
    for (room, _) in DOORS {
        let folder = root().join("src").join(room);
        let lib = std::fs::read_to_string(folder.join("lib.rs")).unwrap();
        assert_eq!(lib.contains("#![forbid(unsafe_code)]"), !UNSAFE.contains(&room), "{room}");
    }
    // A program's modules are under the same ban as its first file.
    for program in ["toft", "toftd", "toft-vmm"] {
        let path = root().join("src/bin").join(program).with_extension("rs");
        assert!(std::fs::read_to_string(&path).unwrap().contains("#![forbid(unsafe_code)]"), "{path:?}");
    }
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let long: Vec<_> = sources(&root().join("src"))
        .into_iter()
        .filter(|path| std::fs::read_to_string(path).unwrap().lines().count() > 600)
        .collect();
    assert!(long.is_empty(), "over 600 lines: {long:?}");
}
