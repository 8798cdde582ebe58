//! Runs a program of the host that ends soon, with its input, and keeps what it complains about.
//! It knows no networks. `nft` and `dnsmasq` use it.
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::limits::COMPLAINT_BYTES_MAX;
use super::plumbing::PlumbingError;

/// Where system programs lie. A daemon's PATH often lacks the last two.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Where the program is, if it is installed.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let fixed = DIRECTORIES.iter().map(PathBuf::from);
    std::env::split_paths(&path).filter(|directory| directory.is_absolute()).chain(fixed).find_map(
        |directory| {
            let program = directory.join(name);
            program.is_file().then_some(program)
        },
    )
}

/// Where the program is; the error says which package has it.
pub(super) fn need(name: &str, package: &str) -> Result<PathBuf, PlumbingError> {
    find(name).ok_or_else(|| {
        PlumbingError::Unprepared(format!(
            "the program {name} is missing; install it with `apt install {package}`"
        ))
    })
}

/// Runs it to its end, or kills it after `longest`.
pub(super) async fn run(
    program: &Path,
    arguments: &[&str],
    input: &str,
    longest: Duration,
) -> Result<(), PlumbingError> {
    let name = program.display();
    let failed =
        |what: &str, cause: std::io::Error| PlumbingError::Failed(format!("cannot {what} {name}: {cause}"));
    let mut child = Command::new(program)
        .args(arguments)
        // What it says is read by people and told apart by us, so in one language.
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|cause| failed("start", cause))?;
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let work = async {
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A program that ends early says why; that it did not read on is no news.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        let listen = async {
            let mut complaint = Vec::new();
            if let Some(stderr) = stderr {
                let _ = stderr.take(COMPLAINT_BYTES_MAX as u64).read_to_end(&mut complaint).await;
            }
            complaint
        };
        let ((), complaint) = tokio::join!(feed, listen);
        (child.wait().await, complaint)
    };
    let (status, complaint) = tokio::time::timeout(longest, work)
        .await
        .map_err(|_| PlumbingError::Failed(format!("{name} did not end within {} s", longest.as_secs())))?;
    let status = status.map_err(|cause| failed("wait for", cause))?;
    if status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&complaint);
    let complaint = complaint.trim();
    if complaint.contains("Operation not permitted") {
        return Err(PlumbingError::Unprepared(format!(
            "{name} lacks privilege ({complaint}); run toftd as root"
        )));
    }
    Err(PlumbingError::Failed(format!("{name} failed ({status}): {complaint}")))
}
