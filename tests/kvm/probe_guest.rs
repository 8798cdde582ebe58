//! The probe guest's ELF file: the one in `TOFT_PROBE`, else built once per run of the tests.
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Path of the ELF file.
pub(crate) fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| std::env::var_os("TOFT_PROBE").map_or_else(build, PathBuf::from))
}

fn build() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/probe/build");
    let output = Command::new(script).output().expect("guest-images/probe/build can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

/// The numbers that a guest told after each ` field=`, such as `ns`. One that is only told in part is none: a guest is
/// paused, saved and looked at in the midst of its lines, whose rest comes later or on another console.
pub(crate) fn numbers(console: &str, field: &str) -> Vec<u64> {
    let field = format!(" {field}=");
    let texts = console.split(&field).skip(1);
    texts.filter_map(|text| text.split_once(char::is_whitespace)?.0.parse().ok()).collect()
}
