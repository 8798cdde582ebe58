//! Bundles and image directories for tests: small, right, and easy to make wrong.
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use super::incoming::hexadecimal;

/// An image of three small files. Its disk has a hole in the middle.
#[derive(Clone)]
pub(crate) struct Sample {
    pub(crate) manifest: Value,
    pub(crate) files: Vec<(String, Vec<u8>)>,
}

pub(crate) const DISK_BYTES: usize = 1 << 20;

impl Sample {
    pub(crate) fn new() -> Sample {
        let mut disk = vec![0; DISK_BYTES];
        disk[..5000].fill(0x11);
        disk[DISK_BYTES - 700..].fill(0x22);
        let files = vec![
            ("root.raw".to_owned(), disk),
            ("vmlinuz".to_owned(), b"a kernel".repeat(1000)),
            ("initrd".to_owned(), b"an initrd".repeat(77)),
        ];
        let sum = |at: usize| sha256(&files[at].1);
        let manifest = json!({
            "format_version": 1, "name": "sample", "title": "A sample", "description": "For tests.",
            "architecture": "x86_64",
            "disk": { "file": "root.raw", "format": "raw", "size_bytes": DISK_BYTES, "sha256": sum(0) },
            "kernel": { "file": "vmlinuz", "sha256": sum(1) },
            "initrd": { "file": "initrd", "sha256": sum(2) },
            "cmdline": "console=ttyS0", "min_memory_bytes": 67108864, "min_disk_bytes": DISK_BYTES,
            "default_user": "root", "console": "ttyS0", "packages": [{ "name": "linux", "version": "6.1-1" }],
        });
        Sample { manifest, files }
    }

    pub(crate) fn manifest_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(&self.manifest).unwrap()
    }

    /// The entries of its bundle.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let manifest = ("image.json".to_owned(), self.manifest_bytes());
        let all = std::iter::once(manifest).chain(self.files.clone());
        all.map(|(name, content)| Entry { name, content, kind: EntryType::Regular }).collect()
    }

    /// Its bundle.
    pub(crate) fn bundle(&self) -> Vec<u8> {
        bundle(&self.entries())
    }

    /// Writes it as a directory.
    pub(crate) fn write(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("image.json"), self.manifest_bytes()).unwrap();
        for (name, content) in &self.files {
            std::fs::write(directory.join(name), content).unwrap();
        }
    }
}

/// One entry of a tar, as wrong as a test likes.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
    pub(crate) kind: EntryType,
}

/// A tar of these entries. Names are written into the header as they are.
pub(crate) fn bundle(entries: &[Entry]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for entry in entries {
        let mut header = Header::new_ustar();
        let name = entry.name.as_bytes();
        header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name);
        header.set_size(entry.content.len() as u64);
        header.set_mode(0o644);
        header.set_entry_type(entry.kind);
        if entry.kind != EntryType::Regular {
            header.as_ustar_mut().unwrap().linkname[..11].copy_from_slice(b"/etc/passwd");
        }
        header.set_cksum();
        builder.append(&header, &entry.content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}
