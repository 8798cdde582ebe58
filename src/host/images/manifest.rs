//! The manifest of an image, `image.json`: what `guest-images/build` writes and strangers send. Pure.
//! Input may be anything; what comes out is bounded, and its file names are safe to use in a directory.
use std::collections::BTreeSet;

use serde::Deserialize;

use super::limits;

/// The manifest's own name, first in every bundle.
pub const NAME: &str = "image.json";

/// A manifest that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format: 1.
    pub format_version: u32,
    /// The recipe's name.
    pub name: String,
    /// One line for people.
    pub title: String,
    /// More for people.
    #[serde(default)]
    pub description: String,
    /// `x86_64`.
    pub architecture: String,
    /// Template of the root disk; an image without one runs from its initrd.
    pub disk: Option<Disk>,
    /// What is booted.
    pub kernel: Part,
    /// Initial RAM disk.
    pub initrd: Option<Part>,
    /// Kernel command line.
    pub cmdline: String,
    /// Least memory of a server, in bytes.
    pub min_memory_bytes: u64,
    /// Least size of its root volume, in bytes.
    pub min_disk_bytes: u64,
    /// User that ssh keys are given to.
    pub default_user: String,
    /// Device of the console, such as `ttyS0`; for people.
    #[serde(default)]
    pub console: Option<String>,
    /// What is in it.
    #[serde(default)]
    pub packages: Vec<Package>,
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name in the bundle or directory.
    pub file: String,
    /// SHA-256 of its bytes, lower-case hexadecimal.
    pub sha256: String,
}

/// The template of a root disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name in the bundle or directory.
    pub file: String,
    /// How its bytes lie: stated, never guessed from content.
    pub format: DiskFormat,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// SHA-256 of its bytes, lower-case hexadecimal.
    pub sha256: String,
}

/// How the bytes of a disk lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// Byte for byte.
    Raw,
}

/// A package of an image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// What a file of an image is for; also the name under which the host keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// `root.raw`
    Disk,
    /// `kernel`
    Kernel,
    /// `initrd`
    Initrd,
}

impl Role {
    /// The name under which the host keeps it.
    pub fn file_name(self) -> &'static str {
        match self {
            Role::Disk => "root.raw",
            Role::Kernel => "kernel",
            Role::Initrd => "initrd",
        }
    }
}

/// A file that an image must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected<'a> {
    /// What it is for.
    pub role: Role,
    /// Its name in the bundle or directory.
    pub file: &'a str,
    /// SHA-256 of its bytes.
    pub sha256: &'a str,
    /// Most bytes it may have.
    pub bytes_max: u64,
    /// Its length, where the manifest states it.
    pub length: Option<u64>,
}

impl Part {
    fn expected(&self, role: Role, bytes_max: u64) -> Expected<'_> {
        Expected { role, file: &self.file, sha256: &self.sha256, bytes_max, length: None }
    }
}

impl Manifest {
    /// Reads and checks a manifest. The error is a sentence that says what is wrong.
    pub fn read(bytes: &[u8]) -> Result<Manifest, String> {
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|cause| {
            let said: String = cause.to_string().chars().take(limits::COMPLAINT_CHARS_MAX).collect();
            format!("{NAME}: {said}")
        })?;
        manifest.check().map_err(|detail| format!("{NAME}: {detail}"))?;
        Ok(manifest)
    }

    /// The files it names.
    pub fn expected(&self) -> Vec<Expected<'_>> {
        let disk = self.disk.as_ref().map(|disk| Expected {
            role: Role::Disk,
            file: &disk.file,
            sha256: &disk.sha256,
            bytes_max: limits::DISK_BYTES_MAX,
            length: Some(disk.size_bytes),
        });
        let initrd =
            self.initrd.as_ref().map(|initrd| initrd.expected(Role::Initrd, limits::INITRD_BYTES_MAX));
        let kernel = self.kernel.expected(Role::Kernel, limits::KERNEL_BYTES_MAX);
        disk.into_iter().chain([kernel]).chain(initrd).collect()
    }

    fn check(&self) -> Result<(), String> {
        if self.format_version != 1 {
            return Err(format!("format_version is {}; this host reads version 1", self.format_version));
        }
        if self.architecture != "x86_64" {
            return Err("architecture must be x86_64".to_owned());
        }
        check_text("name", &self.name, limits::TEXT_CHARS_MAX)?;
        check_text("title", &self.title, limits::TEXT_CHARS_MAX)?;
        check_text("description", &self.description, limits::DESCRIPTION_CHARS_MAX)?;
        check_text("default_user", &self.default_user, limits::TEXT_CHARS_MAX)?;
        check_text("cmdline", &self.cmdline, wire::limits::CMDLINE_BYTES_MAX - 1)?;
        check_text("console", self.console.as_deref().unwrap_or_default(), limits::TEXT_CHARS_MAX)?;
        if self.min_memory_bytes > model::limits::MEMORY_BYTES_MAX {
            return Err("min_memory_bytes is more than any server can have".to_owned());
        }
        if self.min_disk_bytes > model::limits::VOLUME_BYTES_MAX {
            return Err("min_disk_bytes is more than any volume can have".to_owned());
        }
        if let Some(disk) = &self.disk
            && (disk.size_bytes == 0
                || !disk.size_bytes.is_multiple_of(512)
                || disk.size_bytes > limits::DISK_BYTES_MAX)
        {
            return Err(format!(
                "disk.size_bytes must be a multiple of 512 up to {}",
                limits::DISK_BYTES_MAX
            ));
        }
        if self.packages.len() > limits::PACKAGES_MAX {
            return Err(format!("more than {} packages", limits::PACKAGES_MAX));
        }
        let mut names = BTreeSet::new();
        for expected in self.expected() {
            check_file_name(expected.file)?;
            if !is_sha256(expected.sha256) {
                return Err(format!(
                    "the sha256 of {} is not 64 lower-case hexadecimal digits",
                    expected.file
                ));
            }
            if !names.insert(expected.file) {
                return Err(format!("{} is named twice", expected.file));
            }
        }
        Ok(())
    }
}

/// Texts are shown to people and, the command line, given to a kernel: no control characters.
fn check_text(field: &str, text: &str, chars_max: usize) -> Result<(), String> {
    if text.len() > chars_max || text.chars().any(char::is_control) {
        return Err(format!("{field} must be at most {chars_max} bytes without control characters"));
    }
    Ok(())
}

/// A plain file name: nothing that a path, a hidden file or a terminal could make of it.
fn check_file_name(name: &str) -> Result<(), String> {
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if name.is_empty() || name.len() > limits::FILE_NAME_BYTES_MAX || !plain || name.starts_with(['.', '-']) {
        return Err(
            "file names hold letters, digits, dots, hyphens and underscores, and begin with a letter"
                .to_owned(),
        );
    }
    if name == NAME {
        return Err(format!("{NAME} cannot name itself"));
    }
    Ok(())
}

/// Whether the text is a SHA-256 as this room writes it.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests;
