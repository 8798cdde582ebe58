//! A machine's description made from a server's record, its files opened, and the command that boots it.
//! It decides nothing; `effects` calls it. Paths stay here: the VMM gets descriptors.
use std::fs::{DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::Code;
use model::server::{self, NicLimits, ServerNic};
use sys::beneath;
use wire::control::{Command, MachineState, PROTOCOL_OVERLAYS};
use wire::machine::{
    Access, Balloon, Boot, CacheMode, Chassis, Console, Disk, FdIndex, MachineSpec, Nic, OnReset, RateLimits,
    TokenBucket,
};

use super::effects::open_ring;
use super::isolation;
use super::limits;
use super::record::{self, ServerRecord};
use super::registry::{Entry, Workshop};
use crate::core::{blocking, in_place};
use crate::cpu;
use crate::error::{Error, Result};
use crate::images::BootFiles;
use crate::network::{Lease, Networks};
use crate::seed::{self, Seed, SeedNic};
use crate::vmms::Link;
use crate::vmms::link::{AskError, Asked};
use crate::volumes::Content;
use crate::volumes::layers::Layers;

/// Lets the machine of `record` run in the VMM at hand, which may have built it already. Repeatable: a machine that runs is
/// left alone.
pub(super) async fn boot(workshop: &Workshop, entry: &Entry, record: &ServerRecord) -> Result<()> {
    let building = entry.take_building();
    if building.is_none()
        && let Some((link, description)) = ready(workshop, entry, record).await?
    {
        return Ok(send(&link, description, Command::Boot).await?.done().await?);
    }
    // Of one that an earlier daemon had built it is not known with what limits.
    let is_current = building.as_ref().is_some_and(|building| is_same(&building.of, record));
    Ok(run(entry, record, building, is_current).await?)
}

/// Lets the machine at hand run, which its VMM may be `building` yet; if it `is_current`, it has the record's limits. What is being built
/// is not waited for then: commands are carried out one after the other, and where building fails there is nothing that could run.
pub(super) async fn run(
    entry: &Entry,
    record: &ServerRecord,
    building: Option<Building>,
    is_current: bool,
) -> std::result::Result<(), AskError> {
    let left = building.as_ref().map_or(Duration::ZERO, |building| building.asked.left());
    let built = async {
        match building {
            Some(building) => building.asked.done().await,
            None => Ok(()),
        }
    };
    let resumed =
        async { entry.link(limits::COMMAND).await?.order(Command::Resume, left + limits::PAUSE).await };
    if is_current {
        let (built, resumed) = tokio::join!(built, resumed);
        return built.and(resumed);
    }
    built.await?;
    entry.limit(record).await?;
    resumed.await
}

/// A machine that its VMM has been told to build, of its kernel or of what was saved. Nothing of it runs before [`run`].
pub struct Building {
    of: ServerRecord,
    asked: Asked,
}

impl Building {
    /// One that was asked for.
    pub(super) fn new(of: ServerRecord, asked: Asked) -> Building {
        Building { of, asked }
    }

    /// Has the VMM at hand build the machine of a record.
    pub(super) async fn begin(entry: &Entry, of: ServerRecord, description: Description) -> Result<Building> {
        let asked = send(&entry.link(limits::BOOT).await?, description, Command::Build).await?;
        Ok(Building { of, asked })
    }

    /// Whether it is what the server is to be now.
    pub(super) fn is_of(&self, record: &ServerRecord) -> bool {
        is_same(&self.of, record)
    }
}

/// Has the VMM make a machine as `how` says.
async fn send(
    link: &Link,
    Description { spec, descriptors }: Description,
    how: fn(Box<MachineSpec>) -> Command,
) -> Result<Asked> {
    check_build(link, &spec)?;
    spec.check(descriptors.0.len())
        .map_err(|cause| Error::internal(format!("the machine cannot be described: {cause}"), cause))?;
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.0.iter().map(AsFd::as_fd).collect();
    Ok(link.send(how(Box::new(spec)), &borrowed, limits::BOOT).await?)
}

/// Fails with `machine_failed` when a VMM is of a build that could not read a disk of the machine.
pub(super) fn check_build(link: &Link, spec: &MachineSpec) -> Result<()> {
    if link.protocol() < PROTOCOL_OVERLAYS && spec.disks.iter().any(|disk| disk.backing.is_some()) {
        let detail = "its disk lies in part in the file that it was made from, which its VMM is of too early a build to read: \
                      replace the VMM's program by the daemon's own";
        return Err(Error::new(Code::MachineFailed, detail));
    }
    Ok(())
}

/// A machine and the files that it names.
#[derive(Debug)]
pub(super) struct Description {
    pub(super) spec: MachineSpec,
    pub(super) descriptors: Packet,
}

/// The VMM at hand and the machine it is to build; nothing when it has one.
pub(super) async fn ready(
    workshop: &Workshop,
    entry: &Entry,
    record: &ServerRecord,
) -> Result<Option<(Link, Description)>> {
    let link = entry.link(limits::BOOT).await?;
    match link.greet(limits::COMMAND).await?.state {
        MachineState::Shell => {}
        MachineState::Running | MachineState::Paused => return Ok(None),
        MachineState::Exiting => return Err(Error::new(Code::MachineFailed, "the VMM is ending")),
    }
    if record.isolation == server::Isolation::Strict {
        isolation::require(workshop, entry, record).await?;
    }
    let prepared = match entry.take_prepared().filter(|kept| is_same(&kept.of, record)) {
        Some(prepared) => prepared,
        None => {
            // An earlier daemon filled its volumes, and what it recorded of that may be with the server yet.
            let is_recorded = record.life.unflushed.is_empty();
            let content = if is_recorded { Content::Recorded } else { Content::Filled };
            prepare(workshop, record, std::future::ready(Ok(content))).await?
        }
    };
    Ok(Some((link, prepared.description)))
}

/// A machine that only has to be sent.
pub struct Prepared {
    pub(super) of: ServerRecord,
    pub(super) description: Description,
}

/// Whether what was made of one record is what another of the server asks for: limits and names may have changed since.
fn is_same(of: &ServerRecord, record: &ServerRecord) -> bool {
    let ServerRecord { life, held, sandbox, cage, vmm_build, generation, updated_at, started_at, .. } =
        record.clone();
    let of = of.clone();
    // Of these a machine knows nothing; the record of its VMM changes them.
    let of = ServerRecord { life, held, sandbox, cage, vmm_build, generation, updated_at, started_at, ..of };
    of == *record
}

/// Opens and makes all that the machine of `record` needs but its VMM, its disks once they are `filled`. Repeatable.
pub(super) async fn prepare(
    workshop: &Workshop,
    record: &ServerRecord,
    filled: impl Future<Output = Result<Content>>,
) -> Result<Prepared> {
    let description = describe(workshop, record, filled).await?;
    workshop.core.checkpoint("server.plugged")?;
    Ok(Prepared { of: record.clone(), description })
}

/// Numbers descriptors as they are added.
#[derive(Debug, Default)]
pub(super) struct Packet(pub(super) Vec<OwnedFd>);

impl Packet {
    pub(super) fn add(&mut self, descriptor: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(descriptor.into());
        // The spec's own limits keep the count far below this; `MachineSpec::check` refuses more.
        FdIndex(u16::try_from(self.0.len() - 1).unwrap_or(u16::MAX))
    }
}

async fn describe(
    workshop: &Workshop,
    record: &ServerRecord,
    filled: impl Future<Output = Result<Content>>,
) -> Result<Description> {
    // None of them needs another, and each waits for something else. All are ended before an error is told: what goes on
    // behind it could make again what the next step removes. Files first, which another thread writes while this one asks for taps.
    let (files, taps, volumes) = tokio::join!(
        write_files(workshop, record),
        plug(workshop, record),
        open_volumes(workshop, record, filled),
    );
    let ((files, seed, ring), taps, volumes) = (files?, taps?, volumes?);
    workshop.core.checkpoint("server.seeded")?;
    let disks = volumes.into_iter().map(Plugged::from).chain([Plugged::from(OwnedFd::from(seed))]).collect();
    assemble(record, chassis(record), Parts { files, disks, taps, ring })
}

/// What a machine is made of.
struct Parts {
    files: BootFiles,
    /// The record's volumes and the seed disk.
    disks: Vec<Plugged>,
    /// Each with its network's largest packet.
    taps: Vec<(u16, OwnedFd)>,
    ring: File,
}

/// The file of a disk, and of an overlay the one below it.
struct Plugged {
    file: OwnedFd,
    backing: Option<OwnedFd>,
}

impl From<Layers> for Plugged {
    fn from(layers: Layers) -> Plugged {
        let (file, backing) = layers.into_own();
        Plugged { file: file.into(), backing: backing.map(OwnedFd::from) }
    }
}

impl From<OwnedFd> for Plugged {
    fn from(file: OwnedFd) -> Plugged {
        Plugged { file, backing: None }
    }
}

/// The machine that runs, for a VMM that takes it over: `handles` are its memory, so many taps, and so many disks. Answers it
/// with its memory.
pub(super) async fn describe_handed(
    workshop: &Workshop,
    record: &ServerRecord,
    handles: Vec<OwnedFd>,
    (nics, disks): (usize, usize),
) -> Result<(Description, FdIndex)> {
    let wanted = (record.nics.len(), record.disks.len() + 1);
    if (nics, disks) != wanted || handles.len() != 1 + nics + disks {
        let detail = format!("the VMM has {nics} interfaces and {disks} disks, and should have {wanted:?}");
        return Err(Error::new(Code::MachineFailed, detail));
    }
    let mut handles = handles.into_iter();
    let memory = handles.next();
    let mut taps = Vec::new();
    for (nic, tap) in record.nics.iter().zip(handles.by_ref()) {
        taps.push((lease(workshop, nic).await?.mtu, tap));
    }
    let ring = workshop.core.dirs.server(record.id).join("console.ring");
    let (images, image) = (workshop.images.clone(), record.image_id);
    let (files, ring) = in_place(move || Ok((images.boot_files(image)?, open_ring(&ring)?))).await?;
    // What is handed over is settled before.
    let parts = Parts { files, disks: handles.map(Plugged::from).collect(), taps, ring };
    // What it is now: the next one may be of another size.
    let record::Held { memory_bytes, vcpus, cpu, .. } = &record.held;
    let cpu = cpu::template(cpu.as_ref().unwrap_or(&record.cpu));
    let chassis = Chassis { memory_bytes: *memory_bytes, vcpus: *vcpus, cpu };
    let mut description = assemble(record, chassis, parts)?;
    let memory = memory.ok_or_else(|| Error::new(Code::MachineFailed, "the VMM has no memory"))?;
    let memory = description.descriptors.add(memory);
    Ok((description, memory))
}

fn assemble(record: &ServerRecord, chassis: Chassis, parts: Parts) -> Result<Description> {
    let Parts { files, disks, taps, ring } = parts;
    let mut packet = Packet::default();
    let boot = Boot {
        kernel: packet.add(files.kernel),
        initrd: files.initrd.map(|initrd| packet.add(initrd)),
        cmdline: files.cmdline,
    };
    let mut opened = disks.into_iter();
    let root = |(disk, plugged): (&record::Disk, Plugged)| Disk {
        file: packet.add(plugged.file),
        access: Access::ReadWrite,
        cache: match disk.cache {
            server::CacheMode::Writeback => CacheMode::Writeback,
            server::CacheMode::Writethrough => CacheMode::Writethrough,
        },
        serial: serial(disk.volume_id.0),
        limits: disk_limits(&disk.limits),
        backing: plugged.backing.map(|backing| packet.add(backing)),
    };
    let mut disks: Vec<Disk> = record.disks.iter().zip(opened.by_ref()).map(root).collect();
    disks.extend(opened.map(|seed| Disk {
        file: packet.add(seed.file),
        access: Access::ReadOnly,
        cache: CacheMode::Writeback,
        serial: "seed".to_owned(),
        limits: RateLimits::default(),
        backing: None,
    }));
    let mut nics = Vec::new();
    for (nic, (mtu, tap)) in record.nics.iter().zip(taps) {
        let (rx_limits, tx_limits) = nic_limits(&nic.limits);
        nics.push(Nic { tap: packet.add(tap), mac: mac(&nic.mac)?, mtu, rx_limits, tx_limits });
    }
    let Chassis { memory_bytes, vcpus, cpu } = chassis;
    let spec = MachineSpec {
        memory_bytes,
        vcpus,
        cpu,
        boot,
        disks,
        nics,
        balloon: Balloon::default(),
        console: Console { ring: packet.add(ring) },
        on_reset: OnReset::Rebuild,
    };
    Ok(Description { spec, descriptors: packet })
}

/// What of its machine does not depend on files.
pub(super) fn chassis(record: &ServerRecord) -> Chassis {
    Chassis { memory_bytes: record.memory_bytes, vcpus: record.vcpus, cpu: cpu::template(&record.cpu) }
}

/// Opens the record's volumes, in their order.
async fn open_volumes(
    workshop: &Workshop,
    record: &ServerRecord,
    filled: impl Future<Output = Result<Content>>,
) -> Result<Vec<Layers>> {
    let content = filled.await?;
    let mut files = Vec::new();
    for disk in &record.disks {
        files.push(workshop.volumes.open(disk.volume_id, content).await?);
    }
    Ok(files)
}

/// Makes the taps of the record's interfaces, in their order; answers each with its network's largest packet.
async fn plug(workshop: &Workshop, record: &ServerRecord) -> Result<Vec<(u16, OwnedFd)>> {
    let mut taps = Vec::new();
    for nic in &record.nics {
        taps.push(workshop.networks.plug(record.id, nic).await?);
    }
    Ok(taps)
}

async fn lease(workshop: &Workshop, nic: &ServerNic) -> Result<Lease> {
    let network = nic.network_id;
    workshop.core.store.glance(move |connection| Networks::lease(connection, network)).await
}

/// What a machine starts with, its seed disk, and its console: small files, all of them done in one go.
async fn write_files(workshop: &Workshop, record: &ServerRecord) -> Result<(BootFiles, File, File)> {
    let mut nics = Vec::new();
    for nic in &record.nics {
        let lease = lease(workshop, nic).await?;
        nics.push(SeedNic {
            mac: nic.mac.clone(),
            ipv4: nic.ipv4,
            prefix: lease.prefix,
            gateway: lease.gateway,
            mtu: lease.mtu,
            routed: lease.routed,
        });
    }
    let (record, images) = (record.clone(), workshop.images.clone());
    let directory = workshop.core.dirs.server(record.id);
    blocking(move || {
        let seed = Seed {
            server: record.id,
            name: &record.name,
            default_user: &record.default_user,
            ssh_keys: &record.ssh_keys,
            user_data: record.user_data.as_deref(),
            nics,
            descent: record.descent,
        };
        let seed = fresh_seed(&directory.join("seed.img"), &seed)?;
        Ok((images.boot_files(record.image_id)?, seed, open_ring(&directory.join("console.ring"))?))
    })
    .await
}

/// Writes the seed disk and opens what was written.
pub(super) fn fresh_seed(path: &Path, seed: &Seed<'_>) -> Result<File> {
    seed::write(path, seed)?;
    open_own(path, beneath::Access::Read)
        .map_err(|cause| Error::file(format!("cannot open {}", path.display()), cause))
}

/// What a guest sees as a disk's serial: the last 20 hexadecimal digits of the volume's id, which are the random
/// ones.
fn serial(id: uuid::Uuid) -> String {
    let digits = id.simple().to_string();
    digits[digits.len() - wire::limits::SERIAL_BYTES_MAX..].to_owned()
}

/// Limits of a disk as the VMM takes them.
pub(super) fn disk_limits(limits: &server::DiskLimits) -> RateLimits {
    RateLimits { bandwidth: limits.bandwidth_bytes.map(bucket), operations: limits.operations.map(bucket) }
}

pub(super) fn nic_limits(limits: &NicLimits) -> (RateLimits, RateLimits) {
    let rx = RateLimits { bandwidth: limits.rx_bytes.map(bucket), operations: limits.rx_packets.map(bucket) };
    let tx = RateLimits { bandwidth: limits.tx_bytes.map(bucket), operations: limits.tx_packets.map(bucket) };
    (rx, tx)
}

fn bucket(rate: server::Rate) -> TokenBucket {
    TokenBucket { per_second: rate.per_second, burst: rate.burst.unwrap_or(rate.per_second) }
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let mac: crate::network::mac::Mac =
        text.parse().map_err(|cause| Error::internal("a hardware address is not one", cause))?;
    Ok(mac.0)
}

/// Makes a server's directory with its console ring. Repeatable.
pub(crate) fn make_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|cause| Error::file(format!("cannot make {}", path.display()), cause))?;
    open_ring(&path.join("console.ring")).map(drop)
}

/// Removes a directory with all that is in it. Repeatable.
pub(super) fn remove_directory(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => {
            Err(Error::file(format!("cannot remove {}", path.display()), cause))
        }
        _ => Ok(()),
    }
}

/// Removes a file. Repeatable.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => {
            Err(Error::file(format!("cannot remove {}", path.display()), cause))
        }
        _ => Ok(()),
    }
}

/// Gives a file another name, in place of what has it. Repeatable.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    match std::fs::rename(from, to) {
        Err(cause) if cause.kind() != ErrorKind::NotFound => {
            Err(Error::file(format!("cannot rename {}", from.display()), cause))
        }
        _ => Ok(()),
    }
}

/// An empty file in place of what was there. It is a new file: a VMM that still holds the old one does not
/// write into this.
pub(super) fn fresh_file(path: &Path) -> Result<File> {
    let failed = |cause| Error::file(format!("cannot make {}", path.display()), cause);
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".unfinished");
    let unfinished = PathBuf::from(unfinished);
    remove_file(&unfinished)?;
    let made = File::options().read(true).write(true).create_new(true).mode(0o600).open(&unfinished);
    let file = made.map_err(failed)?;
    // What was there goes only when it can be replaced.
    std::fs::rename(&unfinished, path).map_err(|cause| {
        // An error leaves an empty file that the next one replaces.
        let _ = std::fs::remove_file(&unfinished);
        failed(cause)
    })?;
    Ok(file)
}

/// Opens a file in a server's directory, and nothing that a link in its place or in the directory's leads to.
pub(super) fn open_own(path: &Path, access: beneath::Access) -> io::Result<File> {
    let servers = path.parent().and_then(Path::parent).ok_or(ErrorKind::InvalidInput)?;
    let name = path.strip_prefix(servers).map_err(io::Error::other)?;
    beneath::open(servers, name, access)
}

/// The VMM's log, to append to. One that has grown long is set aside, in place of the one before it.
pub(super) fn open_log(path: &Path) -> Result<File> {
    let failed = |cause| Error::file(format!("cannot open {}", path.display()), cause);
    if std::fs::metadata(path).is_ok_and(|found| found.len() > limits::LOG_BYTES_MAX) {
        std::fs::rename(path, path.with_extension("log.old")).map_err(failed)?;
    }
    open_own(path, beneath::Access::Append).map_err(failed)
}
