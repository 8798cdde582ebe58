use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::images::testing::Sample;

fn read(manifest: &Value) -> Result<Manifest, String> {
    Manifest::read(&serde_json::to_vec(manifest).unwrap())
}

#[test]
fn what_the_builder_writes_is_read() {
    let manifest = read(&Sample::new().manifest).unwrap();
    let names: Vec<(&str, Role)> = manifest.expected().iter().map(|e| (e.file, e.role)).collect();
    assert_eq!(names, [("root.raw", Role::Disk), ("vmlinuz", Role::Kernel), ("initrd", Role::Initrd)]);
}

#[test]
fn an_image_may_have_neither_disk_nor_initrd() {
    let mut sample = Sample::new().manifest;
    sample["disk"] = Value::Null;
    sample["initrd"] = Value::Null;
    assert_eq!(read(&sample).unwrap().expected().len(), 1);
}

#[test]
fn each_wrong_field_is_refused_by_name() {
    let long = "x".repeat(5000);
    let cases = [
        ("/format_version", json!(2), "format_version"),
        ("/architecture", json!("aarch64"), "architecture"),
        ("/title", json!("two\nlines"), "title"),
        ("/title", json!("\u{1b}[2J"), "title"),
        ("/description", json!(long), "description"),
        ("/cmdline", json!("a\0b"), "cmdline"),
        ("/cmdline", json!(long), "cmdline"),
        ("/kernel", Value::Null, "null"),
        ("/kernel/file", json!("../../etc/passwd"), "file names"),
        ("/kernel/file", json!("/etc/passwd"), "file names"),
        ("/kernel/file", json!(".hidden"), "file names"),
        ("/kernel/file", json!(""), "file names"),
        ("/kernel/file", json!("a b"), "file names"),
        ("/kernel/file", json!("image.json"), "cannot name itself"),
        ("/kernel/file", json!("initrd"), "named twice"),
        ("/kernel/sha256", json!("ABCDEF"), "sha256"),
        ("/kernel/sha256", json!("A".repeat(64)), "sha256"),
        ("/disk/format", json!("qcow2"), "qcow2"),
        ("/disk/size_bytes", json!(0), "size_bytes"),
        ("/disk/size_bytes", json!(513), "size_bytes"),
        ("/disk/size_bytes", json!(-1), "-1"),
        ("/disk/size_bytes", json!(u64::MAX - 511), "size_bytes"),
        ("/min_memory_bytes", json!(u64::MAX), "min_memory_bytes"),
        ("/min_disk_bytes", json!(u64::MAX), "min_disk_bytes"),
        ("/packages", json!([{ "name": "a" }]), "version"),
    ];
    for (pointer, value, told) in cases {
        let mut sample = Sample::new().manifest;
        *sample.pointer_mut(pointer).unwrap() = value.clone();
        let refused = read(&sample).expect_err(&format!("{pointer} = {value} was taken"));
        assert!(refused.contains(told), "{pointer} = {value}: {refused}");
    }
    let mut sample = Sample::new().manifest;
    sample["surprise"] = json!(1);
    assert!(read(&sample).unwrap_err().contains("surprise"));
}

proptest! {
    #[test]
    fn reading_anything_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Manifest::read(&bytes);
    }

    #[test]
    fn a_damaged_manifest_never_yields_a_name_that_leads_elsewhere(at in 0usize..900, byte in any::<u8>()) {
        let mut bytes = Sample::new().manifest_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(manifest) = Manifest::read(&bytes) {
            for expected in manifest.expected() {
                prop_assert!(!expected.file.contains('/') && !expected.file.starts_with('.'));
            }
        }
    }
}
