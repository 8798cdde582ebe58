//! Images with the probe guest, whole and spoiled in every way a test asks for. It knows no daemon.
use std::fs::File;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Bytes of an image's disk.
pub(crate) const DISK_BYTES: usize = 1 << 20;

/// Memory of a server that is made of one, in bytes.
pub(crate) const MEMORY_BYTES: u64 = 64 << 20;

/// Writes an image's directory; its guest does what `words` say.
pub(crate) fn write(directory: &Path, words: &str) {
    std::fs::create_dir_all(directory).unwrap();
    let probe = std::env::var_os("TOFT_PROBE").expect("set TOFT_PROBE, as scripts/test does");
    std::fs::copy(probe, directory.join("kernel")).unwrap();
    let mut disk = vec![0; DISK_BYTES];
    disk[..4].copy_from_slice(b"disk");
    std::fs::write(directory.join("root.raw"), disk).unwrap();
    let manifest = json!({
        "format_version": 1,
        "name": "probe",
        "title": "The probe guest",
        "architecture": "x86_64",
        "disk": {
            "file": "root.raw", "format": "raw", "size_bytes": DISK_BYTES,
            "sha256": sum(&directory.join("root.raw")),
        },
        "kernel": { "file": "kernel", "sha256": sum(&directory.join("kernel")) },
        "cmdline": words,
        "min_memory_bytes": MEMORY_BYTES,
        "min_disk_bytes": DISK_BYTES,
        "default_user": "root",
    });
    std::fs::write(directory.join("image.json"), manifest.to_string()).unwrap();
}

/// Changes the manifest of an image's directory.
pub(crate) fn edit(directory: &Path, change: impl FnOnce(&mut Value)) {
    let path = directory.join("image.json");
    let mut manifest = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    std::fs::write(path, manifest.to_string()).unwrap();
}

/// Makes a bundle of an image's directory.
pub(crate) fn bundle(directory: &Path, bundle: &Path) {
    let mut tar = Command::new("tar");
    tar.args(["--format=ustar", "-cf"]).arg(bundle).arg("-C").arg(directory);
    assert!(tar.args(["image.json", "root.raw", "kernel"]).status().unwrap().success());
}

/// Makes a file shorter.
pub(crate) fn cut(path: &Path, bytes: u64) {
    File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

/// SHA-256 of a file in hexadecimal.
pub(crate) fn sum(path: &Path) -> String {
    Sha256::digest(std::fs::read(path).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect()
}
