//! Ways into a server.
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How long a command may take, in seconds. Without a limit, a guest that answers ssh but no longer its own programs is waited for for ever.
const COMMAND_S_MAX: &str = "300";

/// A user of a server, who comes from here or from another network.
pub(crate) struct Ssh {
    /// What `ssh` is started with, as `ip netns exec NAME`.
    pub(crate) from: &'static [&'static str],
    pub(crate) key: PathBuf,
    pub(crate) target: String,
}

impl Ssh {
    /// A session that runs a line of shell.
    pub(crate) fn command(&self, line: &str) -> Command {
        let words = [self.from, &["ssh"]].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg("-i").arg(&self.key);
        command
            .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"])
            .args(["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10", "-o", "BatchMode=yes"])
            // A server that is gone in the middle of a command says no more.
            .args(["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=6"])
            .args([&self.target, line]);
        command
    }

    /// What a line of shell says, if it works and ends in time.
    pub(crate) fn run(&self, line: &str) -> Option<String> {
        let ssh = self.command(line);
        let mut command = Command::new("timeout");
        command.arg(COMMAND_S_MAX).arg(ssh.get_program()).args(ssh.get_args());
        let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().unwrap();
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

/// Makes a key below `directory`: its file, and the file of its public half.
pub(crate) fn make_key(directory: &Path) -> (PathBuf, String) {
    let key = directory.join("key");
    let mut command = Command::new("ssh-keygen");
    let made = command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status().unwrap();
    assert!(made.success());
    let public = key.with_extension("pub").to_str().unwrap().to_owned();
    (key, public)
}
