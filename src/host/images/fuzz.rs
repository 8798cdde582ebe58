//! What fuzzers call for bundles: archives of any shape, from bytes alone or around a manifest whose sums are right.
//! What is taken is what its manifest says, and what is refused leaves nothing. No part of the daemon.
use std::fs;
use std::path::Path;

use arbitrary::Unstructured;
use model::ImageId;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use super::bundle::{Conditions, receive};
use super::directory;
use super::incoming::{Incoming, Refusal, hexadecimal};
use super::manifest::{self, Manifest};
use crate::volumes::fill::Watch;

/// Names in the order that an input counts them.
const NAMES: [&str; 8] =
    ["root.raw", "vmlinuz", "initrd", "image.json", "./initrd", "../kernel", "/etc/passwd", ""];

/// Receives an image made of `data` below `images`, an empty directory that is empty again afterwards.
pub fn image(data: &[u8], images: &Path) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 5 {
        0 => take(rest, images),
        1 => take(&built(rest), images),
        2 => read_manifest(rest),
        3 => read_manifest(&built_manifest(rest)),
        _ => {
            if let Ok(name) = std::str::from_utf8(rest) {
                let plain =
                    !name.contains(['/', '\0']) && !name.starts_with('.') && (1..=255).contains(&name.len());
                assert_eq!(directory::is_entry_name(name), plain);
            }
        }
    }
}

fn read_manifest(text: &[u8]) {
    let manifest = match Manifest::read(text) {
        Ok(manifest) => manifest,
        Err(detail) => return assert!(!detail.is_empty() && detail.len() < 8192),
    };
    let names: std::collections::BTreeSet<&str> =
        manifest.expected().iter().map(|expected| expected.file).collect();
    assert_eq!(names.len(), manifest.expected().len(), "a file is named twice");
    for expected in manifest.expected() {
        let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        assert!(
            expected.file.bytes().all(safe) && !expected.file.starts_with('.') && !expected.file.is_empty()
        );
        assert!(expected.file.len() <= 64 && expected.file != manifest::NAME && expected.sha256.len() == 64);
        assert!(expected.length.is_none_or(|length| length > 0 && length <= expected.bytes_max));
    }
    assert!(
        !manifest.cmdline.contains(['\0', '\n']) && manifest.cmdline.len() < wire::limits::CMDLINE_BYTES_MAX
    );
}

/// As many of `letters` as `count` says, which the input chooses.
fn spell(byte: &mut impl FnMut() -> u8, count: usize, letters: &[u8]) -> String {
    (0..count).map(|_| char::from(letters[usize::from(byte()) % letters.len()])).collect()
}

/// A manifest whose names and numbers are at their bounds, or one beyond.
fn built_manifest(data: &[u8]) -> Vec<u8> {
    let mut input = Unstructured::new(data);
    let mut byte = || input.arbitrary::<u8>().unwrap_or_default();
    let mut part = || {
        let length = [1, 2, 3, 8, 64, 65, 0][usize::from(byte() % 7)];
        let (file, sum) = (spell(&mut byte, length, b"a.-_9Z/"), spell(&mut byte, 1, b"0afgAF"));
        json!({ "file": file, "sha256": sum.repeat(64) })
    };
    let mut document = json!({
        "format_version": 1, "name": "s", "title": "t", "architecture": "x86_64", "min_memory_bytes": 1,
        "min_disk_bytes": 1, "default_user": "root", "kernel": part(), "initrd": part(), "disk": part(),
    });
    let sizes = [512, 0, 1, 513, 1 << 40, (1 << 40) + 512, u64::MAX, 1024];
    document["disk"]["format"] = Value::from("raw");
    document["disk"]["size_bytes"] = Value::from(sizes[usize::from(byte() % 8)]);
    document["cmdline"] = Value::from(spell(&mut byte, 8, b"ab= c\n\x00\x7f"));
    serde_json::to_vec(&document).expect("a value")
}

fn take(bundle: &[u8], images: &Path) {
    let incoming = Incoming::create(images, ImageId::new()).expect("a directory in memory");
    match receive(bundle, incoming, &Conditions::default(), &Watch::default()) {
        Ok(arrived) => {
            let places: Vec<_> = fs::read_dir(images).expect("it is there").flatten().collect();
            assert_eq!(places.len(), 1, "one image makes one directory");
            let place = places[0].path();
            for expected in arrived.manifest.expected() {
                let bytes = fs::read(place.join(expected.role.file_name())).expect("every file arrived");
                assert_eq!(hexadecimal(&Sha256::digest(&bytes)), expected.sha256);
                assert!(expected.length.is_none_or(|length| length == bytes.len() as u64));
                assert!(bytes.len() <= bundle.len(), "more came out than went in");
            }
            let kept = fs::read(place.join(manifest::NAME)).expect("the manifest arrived");
            assert_eq!(hexadecimal(&Sha256::digest(&kept)), arrived.sha256);
            let count = fs::read_dir(&place).expect("it is there").count();
            assert_eq!(count, 1 + arrived.manifest.expected().len(), "something else arrived");
            fs::remove_dir_all(&place).expect("it can be removed");
        }
        Err(Refusal::Corrupt(detail)) => assert!(!detail.is_empty() && detail.len() < 8192),
        Err(other) => panic!("a bundle that is wrong was told as {other:?}"),
    }
    assert_eq!(fs::read_dir(images).expect("it is there").count(), 0, "something was left");
}

/// A bundle whose files have the sums that its manifest says, unless the input wants something else.
fn built(data: &[u8]) -> Vec<u8> {
    let mut input = Unstructured::new(data);
    let mut byte = || input.arbitrary::<u8>().unwrap_or_default();
    let (parts, lies) = (byte(), byte());
    let files: Vec<(usize, Vec<u8>)> = (0..3)
        .filter(|at| parts & 1 << at != 0)
        .map(|at| {
            let (blocks, odd, fill) = (usize::from(byte() % 5), usize::from(byte()), byte());
            let length = if at == 0 { blocks * 512 } else { blocks * 4096 + odd };
            (at, vec![fill; length])
        })
        .collect();
    let sum = |content: &[u8]| hexadecimal(&Sha256::digest(content));
    let mut document = json!({
        "format_version": 1, "name": "s", "title": "t", "architecture": "x86_64", "cmdline": "c",
        "min_memory_bytes": 1, "min_disk_bytes": 1, "default_user": "root",
    });
    for (at, content) in &files {
        let key = ["disk", "kernel", "initrd"][*at];
        document[key] = json!({ "file": NAMES[*at], "sha256": sum(content) });
        if *at == 0 {
            document[key]["format"] = Value::from("raw");
            document[key]["size_bytes"] = Value::from(content.len() + usize::from(lies & 1));
        }
    }
    let mut builder = Builder::new(Vec::new());
    let mut entries = vec![(3, serde_json::to_vec(&document).expect("a value"))];
    entries.extend(files);
    if lies & 2 != 0 {
        entries.rotate_left(1);
    }
    let count = entries.len();
    for (name, mut content) in entries {
        let lie = byte();
        let (name, kind) = (if lie & 1 != 0 { usize::from(byte() % 8) } else { name }, byte());
        let mut header = Header::new_ustar();
        let text = NAMES[name].as_bytes();
        header.as_ustar_mut().expect("it is one").name[..text.len()].copy_from_slice(text);
        let stated = content.len() as u64;
        if lie & 2 != 0 {
            content.push(byte());
        }
        header.set_size(if lie & 4 != 0 { u64::from(byte()) << (byte() % 34) } else { stated });
        header.set_entry_type(if lie & 8 != 0 { EntryType::new(kind) } else { EntryType::Regular });
        header.set_cksum();
        builder.append(&header, &content[..]).expect("a vector takes all");
    }
    let mut bundle = builder.into_inner().expect("a vector takes all");
    let end = usize::from(byte()) << (byte() % 8);
    match lies >> 2 & 7 {
        1 => bundle.truncate(bundle.len().saturating_sub(end)),
        2 => bundle.extend(vec![byte(); end]),
        3 => {
            let (at, value) = (end % bundle.len(), byte());
            bundle[at] ^= value;
        }
        4 if count > 1 => bundle.extend_from_within(..),
        _ => {}
    }
    bundle
}
