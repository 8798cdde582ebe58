//! DHCP and DNS of a network: one dnsmasq each, which outlives the daemon. It is found again by its pid file and
//! its command line. It knows no records and no devices. `HostPlumbing` uses it.
//!
//! Addresses are fixed by `dhcp-host` lines, so leases are worth nothing over a restart of dnsmasq: with
//! `dhcp-authoritative` a guest that renews is confirmed. But while it runs, dnsmasq refuses an address that it
//! has leased to another interface, even when that one is gone. `given` therefore remembers who had which address
//! since dnsmasq started; when an address changes hands, dnsmasq is started anew.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use model::network::NetworkKind;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::DOMAIN;
use super::limits::{DNSMASQ_MAX, LEASE_S, SOCKETS_AGAIN, SOCKETS_TRIES, UNRECORDED_LOOKS_MAX};
use super::plumbing::{PlumbingError, Port, Segment};
use super::program;
use crate::volumes::files::{self, Durability};

/// The dnsmasq of one network.
pub(super) struct Dnsmasq {
    pub(super) directory: PathBuf,
}

/// What dnsmasq is told, as the contents of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Files {
    /// Its configuration; a change needs a new start.
    pub(super) config: String,
    /// Who gets which address.
    pub(super) hosts: String,
    /// Which name has which address.
    pub(super) names: String,
}

/// What dnsmasq says when another socket has its address (strerror(3) of EADDRINUSE).
const IN_USE: &str = "Address already in use";

impl Dnsmasq {
    /// Its files are in `directory`, which every user can reach, because dnsmasq drops its privileges.
    pub(super) fn new(directory: PathBuf) -> Dnsmasq {
        Dnsmasq { directory }
    }

    /// The contents of its files for this network.
    pub(super) fn files(&self, segment: &Segment, ports: &[Port]) -> Files {
        let mut hosts = String::new();
        let mut names = String::new();
        for Port { mac, ipv4, name, .. } in ports {
            // Writing to a String cannot fail.
            let _ = writeln!(hosts, "{mac},{ipv4},{name},{LEASE_S}");
            let _ = writeln!(names, "{ipv4} {name}.{DOMAIN} {name}");
        }
        Files { config: self.config(segment), hosts, names }
    }

    fn config(&self, segment: &Segment) -> String {
        let file = |name: &str| self.directory.join(name).display().to_string();
        let (bridge, gateway) = (&segment.bridge, segment.cidr.gateway());
        let outward = match segment.kind {
            NetworkKind::Nat => format!("dhcp-option=option:router,{gateway}\n"),
            // An empty router option keeps dnsmasq from naming itself, and no resolver keeps names from leaking.
            NetworkKind::Isolated => "dhcp-option=option:router\nno-resolv\n".to_owned(),
        };
        format!(
            "interface={bridge}\nexcept-interface=lo\nbind-dynamic\nno-hosts\nno-ping\nquiet-dhcp\ndomain-needed\n\
             bogus-priv\ndomain={DOMAIN}\nlocal=/{DOMAIN}/\naddn-hosts={names}\ndhcp-authoritative\n\
             dhcp-range={base},static,{netmask},{LEASE_S}\ndhcp-lease-max={places}\ndhcp-hostsfile={hosts}\n\
             dhcp-leasefile={leases}\npid-file={pid}\ndhcp-option=option:dns-server,{gateway}\n\
             dhcp-option=option:mtu,{mtu}\n{outward}",
            names = file("names"),
            base = segment.cidr.base(),
            netmask = segment.cidr.netmask(),
            places = segment.cidr.places(),
            hosts = file("hosts"),
            leases = file("leases"),
            pid = file("pid"),
            mtu = segment.mtu,
        )
    }

    /// Whether it runs.
    pub(super) fn is_running(&self) -> bool {
        self.find().is_some()
    }

    /// Makes it run with `files`.
    pub(super) async fn serve(&self, files: &Files, ports: &[Port]) -> Result<(), PlumbingError> {
        let (told, wanted, of) = (Dnsmasq::new(self.directory.clone()), files.clone(), ports.to_vec());
        if waiting(move || told.tell(&wanted, &of)).await? {
            return Ok(());
        }
        let program = program::need("dnsmasq", "dnsmasq-base")?;
        self.stop().await?;
        self.end_unrecorded().await?;
        let failed = |cause: io::Error| self.unwritten(&cause);
        self.replace("given", &owners(ports)).map_err(failed)?;
        self.replace("hosts", &files.hosts).map_err(failed)?;
        self.replace("names", &files.names).map_err(failed)?;
        self.replace("config", &files.config).map_err(failed)?;
        self.replace("leases", "").map_err(failed)?;
        let config = self.config_argument();
        let mut tries = 0;
        loop {
            let started = program::run(&program, &[&config], "", DNSMASQ_MAX).await;
            match started {
                // Of one that somebody has killed nothing is to be seen for a moment before its sockets are closed.
                Err(PlumbingError::Failed(detail)) if detail.contains(IN_USE) && tries < SOCKETS_TRIES => {
                    tries += 1;
                    tokio::time::sleep(SOCKETS_AGAIN).await;
                }
                started => return started,
            }
        }
    }

    /// Tells one that runs of new `files`; false when it has to be started anew for them. Blocks.
    fn tell(&self, files: &Files, ports: &[Port]) -> Result<bool, PlumbingError> {
        make_reachable(&self.directory).map_err(|cause| self.unwritten(&cause))?;
        if let Some(barrier) = barrier(&self.directory) {
            return Err(PlumbingError::Unprepared(format!(
                "dnsmasq, which runs without privileges, cannot reach its files through {}; use a directory such as \
                 /run/toft, or `chmod a+x` that one",
                barrier.display()
            )));
        }
        let given = self.given();
        let changed_hands =
            ports.iter().any(|port| given.get(&port.ipv4).is_some_and(|mac| *mac != port.mac.to_string()));
        let reconfigured = self.read("config") != files.config;
        if changed_hands || reconfigured || !self.is_running() {
            return Ok(false);
        }
        let fresh: Vec<&Port> = ports.iter().filter(|port| !given.contains_key(&port.ipv4)).collect();
        let told = self.append("given", &owners(fresh));
        let told = told.and_then(|()| self.overwrite("hosts", &files.hosts));
        let told = told.and_then(|()| self.overwrite("names", &files.names));
        told.map_err(|cause| self.unwritten(&cause))?;
        self.signal(Signal::HUP).map(|()| true)
    }

    fn unwritten(&self, cause: &io::Error) -> PlumbingError {
        PlumbingError::Failed(format!("cannot write {}: {cause}", self.directory.display()))
    }

    /// Ends it and removes its files.
    pub(super) async fn remove(&self) -> Result<(), PlumbingError> {
        self.stop().await?;
        match std::fs::remove_dir_all(&self.directory) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                Err(PlumbingError::Failed(format!("cannot remove {}: {cause}", self.directory.display())))
            }
            _ => Ok(()),
        }
    }

    /// Ends it, and waits until the kernel has closed its sockets: a descriptor of a process says so, while its
    /// command line is gone before.
    pub(super) async fn stop(&self) -> Result<(), PlumbingError> {
        let Some(process) = self.find() else { return Ok(()) };
        // A daemon that follows one that died here must not count on a dnsmasq that is about to end.
        match std::fs::remove_file(self.directory.join("pid")) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                return Err(PlumbingError::Failed(format!("dnsmasq's pid file cannot be removed: {cause}")));
            }
            _ => {}
        }
        waiting(move || {
            send(&process, Signal::TERM)?;
            if has_ended(&process) {
                return Ok(());
            }
            send(&process, Signal::KILL)?;
            let detail = "dnsmasq did not end when it was asked to, and was killed";
            Err(PlumbingError::Failed(detail.to_owned()))
        })
        .await
    }

    /// Ends those that a daemon was starting or ending when it died: they have no pid file, and would keep the
    /// network's address from the next one. One that forks meanwhile is found by the next look.
    async fn end_unrecorded(&self) -> Result<(), PlumbingError> {
        let config = self.config_argument();
        waiting(move || {
            for _ in 0..UNRECORDED_LOOKS_MAX {
                let found = processes_with(&config);
                if found.is_empty() {
                    return Ok(());
                }
                for process in found {
                    send(&process, Signal::KILL)?;
                    has_ended(&process);
                }
            }
            Err(PlumbingError::Failed("a dnsmasq that nobody recorded does not end".to_owned()))
        })
        .await
    }

    /// Its process, if it runs.
    fn find(&self) -> Option<OwnedFd> {
        let number: i32 = self.read("pid").trim().parse().ok().filter(|number| *number > 0)?;
        process_with(number, &self.config_argument())
    }

    pub(super) fn signal(&self, signal: Signal) -> Result<(), PlumbingError> {
        self.find().map_or(Ok(()), |process| send(&process, signal))
    }

    /// Who had which address since dnsmasq started.
    fn given(&self) -> BTreeMap<Ipv4Addr, String> {
        let text = self.read("given");
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        pairs.filter_map(|(ipv4, mac)| Some((ipv4.parse().ok()?, mac.to_owned()))).collect()
    }

    fn config_argument(&self) -> String {
        format!("--conf-file={}", self.directory.join("config").display())
    }

    /// A file that is missing is empty: it is written next.
    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.join(name)).unwrap_or_default()
    }

    fn replace(&self, name: &str, content: &str) -> io::Result<()> {
        // What is not there is read as empty and must be made.
        if !content.is_empty() && self.read(name) == content {
            return Ok(());
        }
        let path = self.directory.join(name);
        // Nothing here outlives a restart of the host.
        files::replace(&path, content.as_bytes(), Durability::Process)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
    }

    /// Writes over what a file held. A dnsmasq that reads it meanwhile is told to read it again; what a daemon that dies here
    /// leaves, the next one writes anew. Three new files for each server that starts would take longer than the rest of this.
    fn overwrite(&self, name: &str, content: &str) -> io::Result<()> {
        match File::options().write(true).open(self.directory.join(name)) {
            Ok(file) => {
                file.write_all_at(content.as_bytes(), 0)?;
                file.set_len(content.len() as u64)
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => self.replace(name, content),
            Err(cause) => Err(cause),
        }
    }

    /// Adds to a file that is there.
    fn append(&self, name: &str, content: &str) -> io::Result<()> {
        if content.is_empty() {
            return Ok(());
        }
        File::options()
            .append(true)
            .create(true)
            .open(self.directory.join(name))?
            .write_all(content.as_bytes())
    }
}

/// Lines that say who has which address.
fn owners<'a>(ports: impl IntoIterator<Item = &'a Port>) -> String {
    ports.into_iter().map(|port| format!("{} {}\n", port.ipv4, port.mac)).collect()
}

/// The process of this number, if one of its arguments is this. The descriptor is opened before the command line is
/// read, so it is of the process whose command line that is, even when numbers are used again.
fn process_with(number: i32, argument: &str) -> Option<OwnedFd> {
    let process = pidfd_open(Pid::from_raw(number)?, PidfdFlags::empty()).ok()?;
    let command_line = std::fs::read(format!("/proc/{number}/cmdline")).ok()?;
    command_line.split(|byte| *byte == 0).any(|one| one == argument.as_bytes()).then_some(process)
}

/// Sends a signal; that the process has ended already is no error.
fn send(process: &OwnedFd, signal: Signal) -> Result<(), PlumbingError> {
    match pidfd_send_signal(process, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(cause) => Err(PlumbingError::Failed(format!("cannot signal dnsmasq: {cause}"))),
    }
}

/// Waits for a process's end; false when it does not come in time.
fn has_ended(process: &OwnedFd) -> bool {
    let mut descriptors = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(DNSMASQ_MAX).unwrap_or(PollTimeout::MAX);
    matches!(poll(&mut descriptors, limit), Ok(1..))
}

/// Does work that waits for processes or files where waiting is allowed.
async fn waiting<T, F>(work: F) -> Result<T, PlumbingError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, PlumbingError> + Send + 'static,
{
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|cause| Err(PlumbingError::Failed(format!("work on dnsmasq ended badly: {cause}"))))
}

/// All processes that have this argument. A number that is no process's is passed over.
fn processes_with(argument: &str) -> Vec<OwnedFd> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(|number| process_with(number, argument)).collect()
}

/// Makes the directory and those above it that are missing, open to every user: dnsmasq gives up its privileges
/// and reads its files again later.
pub(super) fn make_reachable(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        make_reachable(parent)?;
    }
    std::fs::create_dir(directory)?;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))
}

/// The directory at or above this one that keeps other users out, if there is one.
fn barrier(directory: &Path) -> Option<&Path> {
    directory.ancestors().find(|above| {
        std::fs::metadata(above).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 == 0)
    })
}

#[cfg(test)]
mod tests;
