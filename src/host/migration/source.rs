//! The end a server comes from, before it moves: what it would bring, and the question whether it could come.
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;

use model::image::Image;
use model::migration::{self, MigrationMode, MigrationPlan, ObstacleCode};
use model::{Code, ServerId};
use rusqlite::Connection;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use wire::migration::Mode;
use wire::peer::{Message, Obstacle, ObstacleKind, Offer, OfferedDisk, OfferedNic, Power};
use wire::saved::Digest;

use super::identity::Identity;
use super::link::{Link, Wire, out_of_turn};
use super::ticket::Ticket;
use super::{limits, link, obstacles_text};
use crate::config::Dirs;
use crate::cpu::Known;
use crate::error::{Error, Result};
use crate::servers::lifecycle::Phase;
use crate::servers::moving::parcel::Packed;
use crate::servers::record::ServerRecord;
use crate::store::records;
use crate::volumes::overlay::stored_bytes;

/// What server `id` would bring.
pub(super) fn offer(connection: &Connection, dirs: &Dirs, id: ServerId, processor: Known) -> Result<Offer> {
    let record: ServerRecord = records::one(connection, id.0)?;
    let image: Image = records::one(connection, record.image_id.0)?;
    let unreadable = |cause| Error::internal("a record of the host cannot be read", cause);
    let power = match record.life.phase {
        Phase::Hibernated { .. } if record.life.has_own_memory() => Power::Saved,
        _ if record.life.is_off() => Power::Off,
        _ => Power::On,
    };
    let held = record.held.clone();
    let is_at_rest = matches!(record.life.phase, Phase::Running { .. } | Phase::Paused { .. });
    let runs = is_at_rest && !record.is_changed();
    let packed = Packed::of(connection, record)?;
    let disks = packed.disks.iter().map(|disk| OfferedDisk {
        volume: disk.volume.name.to_string(),
        size_bytes: disk.volume.size_bytes,
        written_bytes: stored_bytes(&dirs.volume(disk.volume.id)).min(disk.volume.size_bytes),
    });
    let nics = packed.nics.iter().map(|nic| OfferedNic {
        network: nic.network.clone(),
        ipv4_cidr: nic.ipv4_cidr.clone(),
        ipv4: nic.ipv4,
        mac: nic.mac.clone(),
    });
    // That of a guest which came from elsewhere may be scaled, and it was shown what that host has.
    let cpu = match power {
        Power::Off => processor.cpu.offered(&packed.cpu, None, None),
        Power::Saved | Power::On => processor.of(&packed.cpu, &held),
    };
    Ok(Offer {
        server: packed.id.to_string(),
        name: packed.name.to_string(),
        external_ref: packed.external_ref.clone(),
        power,
        runs,
        // The machine that runs is the one that would move; what was changed since waits for its next start.
        vcpus: if power == Power::On { held.vcpus.max(1) } else { packed.vcpus },
        memory_bytes: if power == Power::On { held.memory_bytes.max(1) } else { packed.memory_bytes },
        saved_bytes: packed.saved.map_or(0, |saved| saved.stored_bytes),
        cpu,
        image: image.sha256.parse().map_err(unreadable)?,
        image_name: image.name.to_string(),
        disks: disks.collect(),
        nics: nics.collect(),
    })
}

/// Connects to the host of this fingerprint and no other. Fails with `host_unreachable`, or `invalid` when something else
/// is there.
pub(super) async fn connect(
    identity: &Identity,
    target: SocketAddr,
    host: Digest,
) -> Result<Link<TlsStream<Wire>>> {
    let stream = match timeout(limits::CONNECT, TcpStream::connect(target)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(cause)) => {
            let detail =
                format!("no host answers at {target}; is its toftd running with --migration-listen?");
            return Err(Error::new(Code::HostUnreachable, detail).caused_by(cause));
        }
        Err(_) => return Err(too_slow(target)),
    };
    let stream = link::set_up(stream)?;
    let connector = TlsConnector::from(Arc::new(identity.to(host)?));
    let shaken =
        timeout(limits::CONVERSATION, connector.connect(ServerName::IpAddress(target.ip().into()), stream));
    match shaken.await {
        Ok(Ok(mut stream)) => {
            stream.get_mut().1.set_buffer_limit(Some(limits::PUMP_BYTES));
            Ok(Link::new(stream))
        }
        Ok(Err(cause)) if matches!(cause.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
            let detail =
                format!("the host at {target} ended the connection at once; it may have too many, try again");
            Err(Error::new(Code::HostUnreachable, detail).caused_by(cause))
        }
        Ok(Err(cause)) => {
            let detail = format!(
                "what answers at {target} is not the host that made the ticket, or no host at all; check the address"
            );
            Err(Error::invalid("/ticket", "other_host", detail).caused_by(cause))
        }
        Err(_) => Err(too_slow(target)),
    }
}

/// What the target says of itself.
pub(super) struct Welcome {
    /// Its host name.
    pub(super) host: String,
    /// Version of its daemon.
    pub(super) program: String,
    /// Whether memory can be owed there.
    pub(super) may_owe: bool,
}

/// Shows the ticket. Fails with `invalid` when it is not good, and with `migration_blocked` when the target talks with this host enough.
pub(super) async fn greet(link: &mut Link<TlsStream<Wire>>, secret: String) -> Result<Welcome> {
    let (host, program) = (super::host_name(), env!("CARGO_PKG_VERSION").to_owned());
    link.send(&Message::Greet { host, program, ticket: secret }).await?;
    match link.message(limits::CONVERSATION).await? {
        Message::Welcome { host, program, may_owe } => Ok(Welcome { host, program, may_owe }),
        Message::Refuse { detail } => Err(Error::invalid("/ticket", "refused", detail)),
        // The ticket is good, and what is in the way is nothing of the server.
        Message::Verdict { blocked_by } => {
            Err(Error::new(Code::MigrationBlocked, obstacles_text(&blocked_by)))
        }
        _ => Err(out_of_turn()),
    }
}

/// Asks the target what is in the way there. Fails with `host_unreachable`, or `invalid` when the ticket is not good.
pub(super) async fn ask(
    identity: &Identity,
    target: SocketAddr,
    ticket: Ticket,
    offer: Offer,
    mode: MigrationMode,
) -> Result<MigrationPlan> {
    if target.ip().is_unspecified() {
        let detail =
            "all zeroes stand for every address of a host; give one of the target's that this host reaches";
        return Err(Error::invalid("/target", "not_valid", detail));
    }
    let mut link = connect(identity, target, ticket.host).await?;
    let Welcome { host, program, may_owe } = greet(&mut link, ticket.secret).await?;
    let (memory_bytes, disk_bytes) =
        (offer.memory_bytes, offer.disks.iter().map(|disk| disk.written_bytes).sum());
    let state = |detail: String| Some(Obstacle { kind: ObstacleKind::State, detail });
    let ours = match offer.power {
        Power::On if mode == MigrationMode::Cold => state(format!(
            "server {} is not off; stop it first, or hibernate it, or let it move as it is",
            offer.name
        )),
        Power::On if !offer.runs => state(format!(
            "server {} has a machine that is just changing, or has been given other CPUs or memory for its next start; \
             wait for what is being done to it, or reboot it, or change it back",
            offer.name
        )),
        Power::On if mode == MigrationMode::PostCopy && !may_owe => state(
            "the kernel of the target has no /dev/userfaultfd, by which memory could follow a machine; let it move as it is"
                .to_owned(),
        ),
        Power::Off | Power::Saved if needs_machine(mode) => {
            state(format!("server {} does not run; start it first, or let it move as it is", offer.name))
        }
        Power::On | Power::Saved if program != env!("CARGO_PKG_VERSION") => Some(Obstacle {
            kind: ObstacleKind::Version,
            detail: format!(
                "the memory of server {} is version {}'s and the target is {program}; upgrade the older, or stop the \
                 server",
                offer.name,
                env!("CARGO_PKG_VERSION")
            ),
        }),
        Power::On | Power::Saved | Power::Off => None,
    };
    let saved_bytes = offer.saved_bytes;
    link.send(&Message::Ask(Box::new(offer))).await?;
    let found = match link.message(limits::CONVERSATION).await? {
        Message::Verdict { blocked_by } => blocked_by,
        Message::Refuse { detail } => return Err(Error::new(Code::HostUnreachable, detail)),
        _ => return Err(out_of_turn()),
    };
    let blocked_by = found.into_iter().chain(ours).map(shown).collect();
    Ok(MigrationPlan {
        target: host,
        target_version: program,
        memory_bytes,
        disk_bytes,
        saved_bytes,
        blocked_by,
    })
}

/// Whether it is a way for machines that run or are paused, and no other.
fn needs_machine(mode: MigrationMode) -> bool {
    match mode {
        MigrationMode::Auto | MigrationMode::Cold => false,
        MigrationMode::Live | MigrationMode::PreCopy | MigrationMode::PostCopy => true,
    }
}

/// When memory comes in relation to the machine, to a target where it may be owed or not.
pub(super) fn memory_mode(mode: MigrationMode, may_owe: bool) -> Mode {
    match mode {
        MigrationMode::PostCopy => Mode::PostCopy,
        MigrationMode::Auto | MigrationMode::Live if may_owe => Mode::Auto,
        MigrationMode::Auto | MigrationMode::Live | MigrationMode::PreCopy | MigrationMode::Cold => {
            Mode::PreCopy
        }
    }
}

fn shown(obstacle: Obstacle) -> migration::Obstacle {
    let code = match obstacle.kind {
        ObstacleKind::CpuFeatures => ObstacleCode::CpuFeatures,
        ObstacleKind::Tsc => ObstacleCode::Tsc,
        ObstacleKind::Memory => ObstacleCode::Memory,
        ObstacleKind::Storage => ObstacleCode::Storage,
        ObstacleKind::Image => ObstacleCode::Image,
        ObstacleKind::Network => ObstacleCode::Network,
        ObstacleKind::Name => ObstacleCode::Name,
        ObstacleKind::Kvm => ObstacleCode::Kvm,
        ObstacleKind::State => ObstacleCode::State,
        ObstacleKind::Version => ObstacleCode::Version,
        ObstacleKind::Busy => ObstacleCode::Busy,
    };
    migration::Obstacle { code, detail: obstacle.detail }
}

fn too_slow(target: SocketAddr) -> Error {
    Error::new(Code::HostUnreachable, format!("the host at {target} does not answer in time; try again"))
}
