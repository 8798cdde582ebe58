//! DHCP and DNS of a network: one dnsmasq each, which outlives the daemon. It is found again by its pid file and
//! its command line. It knows no records and no devices. `HostPlumbing` uses it.
//!
//! It reads two files with everything when it is signalled. Reading them takes the longer the more servers there are, so one
//! that is new has files of its own in the directories `hosts.d` and `names.d`, which dnsmasq watches and adds to what it
//! knows. What has gone or changed is told by the two files, into which the others are then taken: dnsmasq itself forgets
//! nothing of `hosts.d` before. Whatever a daemon that dies leaves, all files together name everybody that dnsmasq should
//! know, and the next daemon tells it everything once.
//!
//! Addresses are fixed by `dhcp-host` lines, so leases are worth nothing over a restart of dnsmasq: with
//! `dhcp-authoritative` a guest that renews is confirmed. But while it runs, dnsmasq refuses an address that it
//! has leased to another interface, even when that one is gone. `given` therefore remembers who had which address
//! since dnsmasq started; when an address changes hands, dnsmasq is started anew. Whose a lease is, a guest's hardware address
//! alone says, which the rules hold it to: by the identifier that it may call itself (`dhcp-ignore-clid`, since 2.81), clones of
//! one machine, or who says another's, would take leases from each other.
use std::collections::BTreeMap;
use std::fs::{File, Permissions};
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
use super::mac::Mac;
use super::plumbing::{PlumbingError, Port, Segment};
use super::program;
use crate::volumes::files::{self, Durability};

mod told;
use told::{News, Told};

/// The dnsmasq of one network.
pub(super) struct Dnsmasq {
    pub(super) directory: PathBuf,
}

/// One that runs, and what it was told.
pub(super) struct Served {
    process: OwnedFd,
    /// Its configuration; a change needs a new start.
    config: String,
    told: Told,
}

impl Served {
    fn runs(&self) -> bool {
        !ended_within(&self.process, PollTimeout::ZERO)
    }
}

/// Directories of files that dnsmasq reads when they appear: who gets which address, and which name has which.
const ADDED: [&str; 2] = ["hosts.d", "names.d"];

/// Where a file is written before it appears.
const UNFINISHED: &str = "added.unfinished";

/// What dnsmasq says when another socket has its address (strerror(3) of EADDRINUSE).
const IN_USE: &str = "Address already in use";

/// What dnsmasq says when root has all inotify instances that it may have (inotify(7)).
const NO_INOTIFY: &str = "failed to create inotify";

impl Dnsmasq {
    /// Its files are in `directory`, which every user can reach, because dnsmasq drops its privileges.
    pub(super) fn new(directory: PathBuf) -> Dnsmasq {
        Dnsmasq { directory }
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
             bogus-priv\ndomain={DOMAIN}\nlocal=/{DOMAIN}/\naddn-hosts={names}\nhostsdir={names}.d\n\
             dhcp-authoritative\ndhcp-ignore-names\ndhcp-range={base},static,{netmask},{LEASE_S}\ndhcp-lease-max={places}\n\
             dhcp-ignore-clid\ndhcp-hostsfile={hosts}\ndhcp-hostsdir={hosts}.d\n\
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
    #[cfg(test)]
    pub(super) fn is_running(&self) -> bool {
        self.find().is_some()
    }

    /// Makes it run and know exactly these; `served` is what was answered before, if this daemon has asked before.
    pub(super) async fn serve(
        &self,
        served: Option<Served>,
        segment: &Segment,
        ports: &[Port],
    ) -> Result<Served, PlumbingError> {
        let config = self.config(segment);
        if let Some(mut served) = served
            && let Some(added) = served.told.lacks(ports)
            && self.introduce(&mut served, segment, &added).await?
        {
            return Ok(served);
        }
        let (dnsmasq, wanted, of) = (Dnsmasq::new(self.directory.clone()), config.clone(), ports.to_vec());
        if let Some(served) = waiting(move || dnsmasq.tell(wanted, &of)).await? {
            return Ok(served);
        }
        let program = program::need("dnsmasq", "dnsmasq-base")?;
        self.stop().await?;
        self.end_unrecorded().await?;
        self.write_all(&config, ports).map_err(|cause| self.unwritten(&cause))?;
        let argument = self.config_argument();
        let mut tries = 0;
        loop {
            let started = program::run(&program, &[&argument], "", DNSMASQ_MAX).await;
            match started {
                // Of one that somebody has killed nothing is to be seen for a moment before its sockets are closed.
                Err(PlumbingError::Failed(detail)) if detail.contains(IN_USE) && tries < SOCKETS_TRIES => {
                    tries += 1;
                    tokio::time::sleep(SOCKETS_AGAIN).await;
                }
                Err(PlumbingError::Failed(detail)) if detail.contains(NO_INOTIFY) => {
                    return Err(PlumbingError::Unprepared(format!(
                        "root watches too much already for another dnsmasq ({detail}); allow more with `sysctl \
                         fs.inotify.max_user_instances=8192`"
                    )));
                }
                started => break started?,
            }
        }
        let ended = || PlumbingError::Failed("dnsmasq ended right after it was started".to_owned());
        let told = Told::exactly(ports, BTreeMap::new());
        Ok(Served { process: self.find().ok_or_else(ended)?, config, told })
    }

    /// Makes one that runs know these interfaces, too. False when it has to be told everything for that; what it was told
    /// then is no more than what it should know.
    pub(super) async fn introduce(
        &self,
        served: &mut Served,
        segment: &Segment,
        ports: &[Port],
    ) -> Result<bool, PlumbingError> {
        if served.config != self.config(segment) || !served.runs() {
            return Ok(false);
        }
        let mut added = Vec::new();
        for port in ports {
            match served.told.weigh(port) {
                News::Known => {}
                News::Contradicted => return Ok(false),
                News::Added => {
                    added.push((port.clone(), served.told.was_given(port.ipv4)));
                    served.told.add(port);
                }
            }
        }
        if added.is_empty() {
            return Ok(true);
        }
        let dnsmasq = Dnsmasq::new(self.directory.clone());
        let told = waiting(move || match added.iter().try_for_each(|(port, was)| dnsmasq.add(port, *was)) {
            Ok(()) => Ok(true),
            // Somebody has removed its directories, and it watches them no more.
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(cause) => Err(dnsmasq.unwritten(&cause)),
        });
        told.await
    }

    /// Its name comes last: with that, all of it is known.
    fn add(&self, port: &Port, is_given: bool) -> io::Result<()> {
        if !is_given {
            self.append("given", &owner(port))?;
        }
        for (directory, line) in ADDED.into_iter().zip([host(port), name(port)]) {
            let unfinished = self.directory.join(UNFINISHED);
            let mut file = File::create(&unfinished)?;
            file.write_all(line.as_bytes())?;
            file.set_permissions(readable())?;
            std::fs::rename(unfinished, self.directory.join(directory).join(port.ipv4.to_string()))?;
        }
        Ok(())
    }

    /// The files that it is started with.
    fn write_all(&self, config: &str, ports: &[Port]) -> io::Result<()> {
        for directory in ADDED.map(|name| self.directory.join(name)) {
            make_reachable(&directory)?;
            self.remove_added(&directory, |_, _| true)?;
        }
        self.replace("given", &lines(ports, owner))?;
        self.replace("hosts", &lines(ports, host))?;
        self.replace("names", &lines(ports, name))?;
        self.replace("config", config)?;
        self.replace("leases", "")
    }

    /// Tells one that runs exactly these; nothing when it has to be started anew for them. Blocks.
    fn tell(&self, config: String, ports: &[Port]) -> Result<Option<Served>, PlumbingError> {
        let unwritten = |cause| self.unwritten(&cause);
        make_reachable(&self.directory).map_err(unwritten)?;
        if let Some(barrier) = barrier(&self.directory) {
            return Err(PlumbingError::Unprepared(format!(
                "dnsmasq, which runs without privileges, cannot reach its files through {}; start toftd with a \
                 `--run-dir` such as /run/toft, or `chmod a+x` that directory",
                barrier.display()
            )));
        }
        let given = self.given();
        let changed_hands =
            ports.iter().any(|port| given.get(&port.ipv4).is_some_and(|mac| *mac != port.mac));
        let watches = ADDED.iter().all(|name| self.directory.join(name).is_dir());
        if changed_hands || !watches || self.read("config") != config {
            return Ok(None);
        }
        let Some(process) = self.find() else { return Ok(None) };
        let fresh = ports.iter().filter(|port| !given.contains_key(&port.ipv4));
        self.append("given", &lines(fresh, owner)).map_err(unwritten)?;
        files::remove(&self.directory.join(UNFINISHED)).map_err(unwritten)?;
        self.overwrite("hosts", &lines(ports, host)).map_err(unwritten)?;
        self.overwrite("names", &lines(ports, name)).map_err(unwritten)?;
        // What the two files have, too, goes from `names.d` only when dnsmasq has been told to read them: it forgets what is
        // removed there at once. Of `hosts.d` it would take the same address twice for a mistake.
        let [hosts, names] = ADDED.map(|name| self.directory.join(name));
        let wanted: BTreeMap<String, String> =
            ports.iter().map(|port| (port.ipv4.to_string(), name(port))).collect();
        self.remove_added(&hosts, |_, _| true).map_err(unwritten)?;
        self.remove_added(&names, |file, line| wanted.get(file).is_none_or(|wanted| wanted != line))
            .map_err(unwritten)?;
        send(&process, Signal::HUP)?;
        self.remove_added(&names, |_, _| true).map_err(unwritten)?;
        Ok(Some(Served { process, config, told: Told::exactly(ports, given) }))
    }

    /// Removes the files of a directory of [`ADDED`] of which `is_doomed` says so, by name and content.
    fn remove_added(&self, directory: &Path, is_doomed: impl Fn(&str, &str) -> bool) -> io::Result<()> {
        for entry in std::fs::read_dir(directory)? {
            let (path, file) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            // What cannot be read is none of ours.
            let line = std::fs::read_to_string(&path).unwrap_or_default();
            if is_doomed(&file.to_string_lossy(), &line) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
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

    #[cfg(test)]
    pub(super) fn signal(&self, signal: Signal) -> Result<(), PlumbingError> {
        self.find().map_or(Ok(()), |process| send(&process, signal))
    }

    /// Who had which address since dnsmasq started.
    fn given(&self) -> BTreeMap<Ipv4Addr, Mac> {
        let text = self.read("given");
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        pairs.filter_map(|(ipv4, mac)| Some((ipv4.parse().ok()?, mac.parse().ok()?))).collect()
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
        std::fs::set_permissions(path, readable())
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

/// A line for each.
fn lines<'a>(ports: impl IntoIterator<Item = &'a Port>, line: fn(&Port) -> String) -> String {
    ports.into_iter().map(line).collect()
}

/// Who has which address.
fn owner(Port { mac, ipv4, .. }: &Port) -> String {
    format!("{ipv4} {mac}\n")
}

/// Who gets which address, for dnsmasq. Guests are told the name that their address has: with names here, too, dnsmasq would look
/// each of them up whenever there is one more.
fn host(Port { mac, ipv4, .. }: &Port) -> String {
    format!("{mac},{ipv4},{LEASE_S}\n")
}

/// Which name has which address, for dnsmasq.
fn name(Port { ipv4, name, .. }: &Port) -> String {
    format!("{ipv4} {name}.{DOMAIN} {name}\n")
}

/// dnsmasq reads files as a user without privileges.
fn readable() -> Permissions {
    Permissions::from_mode(0o644)
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
    ended_within(process, PollTimeout::try_from(DNSMASQ_MAX).unwrap_or(PollTimeout::MAX))
}

fn ended_within(process: &OwnedFd, limit: PollTimeout) -> bool {
    let mut descriptors = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
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
    std::fs::set_permissions(directory, Permissions::from_mode(0o755))
}

/// The directory at or above this one that keeps other users out, if there is one.
fn barrier(directory: &Path) -> Option<&Path> {
    directory.ancestors().find(|above| {
        std::fs::metadata(above).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 == 0)
    })
}

#[cfg(test)]
mod tests;
