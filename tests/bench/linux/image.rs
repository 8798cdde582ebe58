//! The image that guests boot, as `guest-images/build bench` made it.
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::vmm::Vmm;

/// Where a bzImage has the number of 512-byte blocks before its code less one, where its payload begins after them, and the
/// payload's length (kernel: Documentation/arch/x86/boot.rst).
const SETUP_SECTS_AT: usize = 0x1f1;
const PAYLOAD_OFFSET_AT: usize = 0x248;
const PAYLOAD_LENGTH_AT: usize = 0x24c;

/// Files and words of the image.
pub(super) struct Image {
    /// A bzImage.
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) cmdline: String,
    /// The disk with fio and iperf3.
    pub(super) programs: PathBuf,
    /// The kernel as an ELF file, for VMMs that take nothing else.
    pub(super) elf: Option<PathBuf>,
}

impl Image {
    /// Reads the image's manifest. Unpacks the kernel into `scratch` when there are VMMs that need it so.
    pub(super) fn open(directory: &Path, needing_elf: &[Vmm], scratch: &Path) -> Image {
        let path = directory.join("image.json");
        let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let manifest: Value = serde_json::from_slice(&text).expect("a manifest");
        let word = |pointer: &str| {
            let word = manifest.pointer(pointer).and_then(Value::as_str);
            word.unwrap_or_else(|| panic!("no {pointer} in {}", path.display()))
        };
        let kernel = directory.join(word("/kernel/file"));
        let elf = (!needing_elf.is_empty()).then(|| unpack(&kernel, scratch.join("vmlinux")));
        Image {
            kernel,
            initrd: directory.join(word("/initrd/file")),
            cmdline: word("/cmdline").to_owned(),
            programs: directory.join(word("/disk/file")),
            elf,
        }
    }
}

/// The ELF file in a bzImage, which Debian compresses with LZ4.
fn unpack(bzimage: &Path, elf: PathBuf) -> PathBuf {
    let bytes = std::fs::read(bzimage).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
    let begin = (usize::from(bytes[SETUP_SECTS_AT]) + 1) * 512 + word(PAYLOAD_OFFSET_AT);
    let end = begin + word(PAYLOAD_LENGTH_AT);
    let mut lz4 = Command::new("lz4");
    let lz4 = lz4.args(["-d", "-c"]).stdin(Stdio::piped()).stdout(File::create(&elf).unwrap()).spawn();
    let mut lz4 = lz4.unwrap_or_else(|error| panic!("lz4 cannot be started: {error}"));
    // After the compressed bytes comes the length of what they hold.
    lz4.stdin.take().expect("it is piped").write_all(&bytes[begin..end - 4]).unwrap();
    assert!(lz4.wait().unwrap().success(), "{} is not compressed with LZ4", bzimage.display());
    assert_eq!(elf.metadata().unwrap().len() as usize, word(end - 4), "the kernel was not unpacked whole");
    elf
}
