//! How children of the launcher are started: the same program in another mode, in a jail, in a session of its own,
//! with nothing but the descriptors it is to have.
use std::error::Error as _;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use sys::jail::{self, EmptyNamespaces, Jail, Program, Refused, Started, Step};
use sys::pidfd::PidFd;
use wire::isolation::{Item, Missing};
use wire::launch::{self, JailUser, fd};

/// The running program, even when the file it was started from has been replaced by a newer one.
const SELF: &str = "/proc/self/exe";
const STDOUT: i32 = 1;
const STDERR: i32 = 2;

/// A VMM that runs in its jail.
pub(super) struct Vmm {
    pub(super) pid: i32,
    pub(super) pidfd: PidFd,
    pub(super) missing: Vec<Missing>,
}

/// Starts a VMM with its control listener, KVM, will and log, and with what KVM offers, in cgroups.
pub(super) fn start_vmm(
    label: &str,
    wanted: &launch::Jail,
    descriptors: &[OwnedFd; 4],
    offer: Option<BorrowedFd<'_>>,
    cgroups: &[OwnedFd],
    empty: Option<&EmptyNamespaces>,
) -> Result<Vmm, String> {
    let [control, kvm, will, log] = descriptors;
    let cgroups: Vec<_> = cgroups.iter().map(AsFd::as_fd).collect();
    let mut placed = vec![
        (log.as_fd(), STDOUT),
        (log.as_fd(), STDERR),
        (control.as_fd(), fd::CONTROL),
        (kvm.as_fd(), fd::KVM),
        (will.as_fd(), fd::WILL),
    ];
    placed.extend(offer.map(|offer| (offer, fd::OFFER)));
    let started = start(&["machine", "--label", label], &placed, &jail_of(wanted, &cgroups, empty)?)?;
    let caller = (wanted.user == JailUser::Caller)
        .then(|| Missing { item: Item::Uid, why: "it runs with the ids of whoever started it".to_owned() });
    let refused = started.refused.iter().flat_map(|(step, cause)| {
        items(*step).iter().map(move |item| Missing { item: *item, why: format!("{step}: {cause}") })
    });
    let mut missing: Vec<Missing> = caller.into_iter().chain(refused).collect();
    missing.sort_by_key(|missing| missing.item);
    missing.dedup_by_key(|missing| missing.item);
    Ok(Vmm { pid: started.pid, pidfd: started.pidfd, missing })
}

/// Starts a probe; its report, or what it complains about, comes through the file. It works on nothing of anybody's,
/// so it is kept in whatever the host allows.
pub(super) fn start_probe(kvm: &OwnedFd) -> Result<(i32, PidFd, File), String> {
    let (output, input) = io::pipe().map_err(|cause| format!("no pipe can be made: {cause}"))?;
    let placed = [(input.as_fd(), STDOUT), (input.as_fd(), STDERR), (kvm.as_fd(), fd::KVM)];
    let jail = Jail {
        user: jail::User::Caller,
        cgroups: &[],
        rlimits: PROBE_RLIMITS,
        empty: None,
        refused: Refused::LeftOut,
        left_out: &[],
    };
    let started = start(&["probe"], &placed, &jail)?;
    Ok((started.pid, started.pidfd, File::from(OwnedFd::from(output))))
}

/// Ample for one tiny guest.
const PROBE_RLIMITS: jail::Rlimits = jail::Rlimits { nofile: 64, fsize_bytes: 64 << 20, nproc: u64::MAX };

fn start(arguments: &[&str], placed: &[(BorrowedFd<'_>, i32)], jail: &Jail<'_>) -> Result<Started, String> {
    let opened = |path| move |cause| format!("{path} cannot be opened: {cause}");
    let null = File::open("/dev/null").map_err(opened("/dev/null"))?;
    let executable = File::open(SELF).map_err(opened(SELF))?;
    let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    let mut descriptors = vec![(null.as_fd(), fd::STDIN)];
    descriptors.extend_from_slice(placed);
    let program = Program {
        executable: executable.as_fd(),
        name: OsStr::new("toft-vmm"),
        arguments: &arguments,
        descriptors: &descriptors,
    };
    jail::spawn(&program, jail).map_err(|error| match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    })
}

/// The jail that a VMM gets of what was asked for.
pub fn jail_of<'a>(
    wanted: &launch::Jail,
    cgroups: &'a [BorrowedFd<'a>],
    empty: Option<&'a EmptyNamespaces>,
) -> Result<Jail<'a>, String> {
    let user = match wanted.user {
        // With the ids of root it could do what root can wherever capabilities do not matter: open root's files.
        JailUser::Own { uid: 0, .. } | JailUser::Own { gid: 0, .. } => {
            return Err("a VMM's own user and group ids are not those of root".to_owned());
        }
        JailUser::Own { uid, gid } => jail::User::Own { uid, gid },
        JailUser::Caller if wanted.required => {
            return Err(format!("the jail is not whole: {}: a VMM needs ids of its own", Item::Uid));
        }
        JailUser::Caller => jail::User::Caller,
    };
    let launch::Rlimits { nofile, fsize_bytes, nproc } = wanted.rlimits;
    let refused = if wanted.required { Refused::Fails } else { Refused::LeftOut };
    let rlimits = jail::Rlimits { nofile, fsize_bytes, nproc };
    Ok(Jail { user, cgroups, rlimits, empty, refused, left_out: &[] })
}

/// What a VMM is without when this step was refused.
fn items(step: Step) -> &'static [Item] {
    match step {
        // Which controller a descriptor stood for is the daemon's knowledge.
        Step::Cgroups => &[Item::CgroupCpu, Item::CgroupMemory, Item::CgroupPids],
        Step::PidNamespace => &[Item::PidNamespace],
        Step::MountNamespace => &[Item::MountNamespace],
        Step::NetNamespace => &[Item::NetNamespace],
        Step::IpcNamespace => &[Item::IpcNamespace],
        Step::UtsNamespace => &[Item::UtsNamespace],
        Step::Root => &[Item::Root],
        Step::Rlimits => &[Item::Rlimits],
        Step::Ids | Step::UserNamespace | Step::Keyring => &[Item::Uid],
        Step::Capabilities => &[Item::Capabilities],
        Step::NoNewPrivs => &[Item::NoNewPrivs],
        // These end the spawn, so nothing runs without them.
        Step::Prepare | Step::Descriptors | Step::Execute => &[],
    }
}
