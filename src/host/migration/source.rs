//! The end a server comes from: what it would bring, and the question whether it could come.
use std::net::SocketAddr;
use std::sync::Arc;

use model::image::Image;
use model::migration::{self, MigrationPlan, ObstacleCode};
use model::network::Network;
use model::server::CpuTemplate;
use model::volume::Volume;
use model::{Code, ServerId};
use rusqlite::Connection;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use wire::peer::{Message, Obstacle, ObstacleKind, Offer, OfferedCpu, OfferedDisk, OfferedNic};

use super::cpu::Cpu;
use super::identity::Identity;
use super::limits;
use super::link::Link;
use super::ticket::Ticket;
use crate::config::Dirs;
use crate::error::{Error, Result};
use crate::servers::record::ServerRecord;
use crate::store::records;
use crate::volumes::used_bytes;

/// What server `id` would bring.
pub(super) fn offer(connection: &Connection, dirs: &Dirs, id: ServerId, cpu: Cpu) -> Result<Offer> {
    let record: ServerRecord = records::one(connection, id.0)?;
    let image: Image = records::one(connection, record.image_id.0)?;
    let unreadable = |cause| Error::internal("a record of the host cannot be read", cause);
    let disks = record.disks.iter().map(|disk| {
        let volume: Volume = records::one(connection, disk.volume_id.0)?;
        let file = std::fs::symlink_metadata(dirs.volume(volume.id));
        Ok(OfferedDisk { size_bytes: volume.size_bytes, written_bytes: used_bytes(file) })
    });
    let nics = record.nics.iter().map(|nic| {
        let network: Network = records::one(connection, nic.network_id.0)?;
        Ok(OfferedNic {
            network: network.name.to_string(),
            ipv4_cidr: network.ipv4_cidr,
            ipv4: nic.ipv4,
            mac: nic.mac.clone(),
        })
    });
    Ok(Offer {
        server: record.id.to_string(),
        name: record.name.to_string(),
        // The machine that runs is the one that moves; what was changed since waits for its next start.
        vcpus: if record.life.is_off() { record.vcpus } else { record.held.vcpus.max(1) },
        memory_bytes: if record.life.is_off() { record.memory_bytes } else { record.held.memory_bytes },
        cpu: OfferedCpu {
            template: template(record.cpu),
            vendor: cpu.vendor,
            features: cpu.features.into_iter().collect(),
        },
        image: image.sha256.parse().map_err(unreadable)?,
        image_name: image.name.to_string(),
        disks: disks.collect::<Result<_>>()?,
        nics: nics.collect::<Result<_>>()?,
    })
}

fn template(cpu: CpuTemplate) -> wire::machine::CpuTemplate {
    match cpu {
        CpuTemplate::Host => wire::machine::CpuTemplate::Host,
        CpuTemplate::X86_64V2 => wire::machine::CpuTemplate::X86_64V2,
        CpuTemplate::X86_64V3 => wire::machine::CpuTemplate::X86_64V3,
    }
}

/// Asks the target what is in the way there. Fails with `host_unreachable`, or `invalid` when the ticket is not good.
pub(super) async fn ask(
    identity: &Identity,
    target: SocketAddr,
    ticket: Ticket,
    offer: Offer,
) -> Result<MigrationPlan> {
    let connecting = timeout(limits::CONNECT, TcpStream::connect(target)).await;
    let stream = match connecting {
        Ok(Ok(stream)) => stream,
        Ok(Err(cause)) => {
            let detail =
                format!("no host answers at {target}; is its toftd running with --migration-listen?");
            return Err(Error::new(Code::HostUnreachable, detail).caused_by(cause));
        }
        Err(_) => return Err(too_slow(target)),
    };
    timeout(limits::CONVERSATION, converse(identity, target, stream, ticket, offer))
        .await
        .unwrap_or_else(|_| Err(too_slow(target)))
}

async fn converse(
    identity: &Identity,
    target: SocketAddr,
    stream: TcpStream,
    ticket: Ticket,
    offer: Offer,
) -> Result<MigrationPlan> {
    let config = identity.to(ticket.host)?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(ServerName::IpAddress(target.ip().into()), stream)
        .await
        .map_err(|cause| {
            let detail = format!(
                "what answers at {target} is not the host that made the ticket, or no host at all; check the address"
            );
            Error::invalid("/ticket", "other_host", detail).caused_by(cause)
        })?;
    let mut link = Link::new(stream);
    link.send(&Message::Greet { program: env!("CARGO_PKG_VERSION").to_owned(), ticket: ticket.secret })
        .await?;
    let (host, program) = match link.receive().await? {
        Message::Welcome { host, program } => (host, program),
        Message::Refuse { detail } => return Err(Error::invalid("/ticket", "refused", detail)),
        _ => return Err(out_of_turn()),
    };
    let (memory_bytes, disk_bytes) =
        (offer.memory_bytes, offer.disks.iter().map(|disk| disk.written_bytes).sum());
    link.send(&Message::Ask(Box::new(offer))).await?;
    let found = match link.receive().await? {
        Message::Verdict { blocked_by } => blocked_by,
        Message::Refuse { detail } => return Err(Error::new(Code::HostUnreachable, detail)),
        _ => return Err(out_of_turn()),
    };
    let ours = Obstacle {
        kind: ObstacleKind::Vmm,
        detail: format!(
            "version {} of toft can say what is in the way of a move, but cannot move a server yet",
            env!("CARGO_PKG_VERSION")
        ),
    };
    let blocked_by = found.into_iter().chain([ours]).map(shown).collect();
    Ok(MigrationPlan { target: host, target_version: program, memory_bytes, disk_bytes, blocked_by })
}

fn shown(obstacle: Obstacle) -> migration::Obstacle {
    let code = match obstacle.kind {
        ObstacleKind::CpuFeatures => ObstacleCode::CpuFeatures,
        ObstacleKind::Memory => ObstacleCode::Memory,
        ObstacleKind::Storage => ObstacleCode::Storage,
        ObstacleKind::Image => ObstacleCode::Image,
        ObstacleKind::Network => ObstacleCode::Network,
        ObstacleKind::Name => ObstacleCode::Name,
        ObstacleKind::Kvm => ObstacleCode::Kvm,
        ObstacleKind::Vmm => ObstacleCode::Vmm,
    };
    migration::Obstacle { code, detail: obstacle.detail }
}

fn too_slow(target: SocketAddr) -> Error {
    Error::new(Code::HostUnreachable, format!("the host at {target} does not answer in time; try again"))
}

fn out_of_turn() -> Error {
    Error::new(Code::HostUnreachable, "the other host answered out of turn; upgrade the older of the two")
}
