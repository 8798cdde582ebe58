//! The end a server comes to: waits for other hosts, looks at their tickets, and says what is in the way here.
//! Whoever connects is hostile until its ticket holds, and bounded afterwards.
use model::image::{Image, ImageState};
use model::network::Network;
use model::volume::Volume;
use model::{Code, ServerId};
use rusqlite::Connection;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use wire::peer::{Message, Obstacle, ObstacleKind, Offer, OfferedNic, Power};
use wire::saved::Digest;

use super::link::Link;
use super::strangers::{Stranger, Strangers};
use super::{Migrations, identity, limits, link, ticket};
use crate::error::{Error, Result};
use crate::network::{self, cidr::Cidr, mac::Mac};
use crate::servers::capacity::Capacity;
use crate::servers::live;
use crate::servers::record::ServerRecord;
use crate::store::records;
use crate::volumes::space;

/// Waits for other hosts until it is dropped, and all their connections with it.
pub(super) async fn listen(migrations: Migrations, listener: TcpListener, acceptor: TlsAcceptor) {
    let mut conversations = JoinSet::new();
    let strangers = Strangers::default();
    loop {
        while conversations.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(cause) => {
                tracing::warn!("a connection of another host cannot be taken: {cause}");
                sleep(limits::ACCEPT_AGAIN).await;
                continue;
            }
        };
        let (migrations, acceptor) = (migrations.clone(), acceptor.clone());
        strangers.serve(&mut conversations, |stranger| async move {
            if let Err(cause) = converse(&migrations, acceptor, stream, stranger).await {
                tracing::info!(%peer, "another host was not served: {}", cause.chain());
            }
        });
    }
}

async fn converse(
    migrations: &Migrations,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    stranger: Stranger,
) -> Result<()> {
    let stream = link::set_up(stream)?;
    let shaken = timeout(limits::CONNECT, acceptor.accept(stream)).await;
    let mut stream = shaken
        .map_err(|_| Error::new(Code::Unauthenticated, "the handshake took too long"))?
        .map_err(|cause| Error::new(Code::Unauthenticated, "the handshake failed").caused_by(cause))?;
    stream.get_mut().1.set_buffer_limit(Some(limits::PUMP_BYTES));
    let host = identity::shown(stream.get_ref().1.peer_certificates())?;
    let mut link = Link::with_stranger(stream);
    let first = link.message(limits::CONNECT).await?;
    if let Message::Join { transfer, stream } = first {
        return migrations.join(link, (host, stranger), &transfer, stream).await;
    }
    let said = answer(migrations, &mut link, (host, stranger), first).await;
    if let Err(refused) = &said
        && refused.code != Code::HostUnreachable
    {
        // What the log says of it is ours; the other side learns what its operator can mend.
        let detail = refused.detail.clone();
        link.send(&Message::Refuse { detail }).await?;
    }
    link.end().await?;
    said
}

async fn answer<S>(
    migrations: &Migrations,
    link: &mut Link<S>,
    (source, stranger): (Digest, Stranger),
    first: Message,
) -> Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (host, secret) = match first {
        Message::Greet { host, ticket, .. } => (host, ticket),
        Message::Again { transfer, streams } => {
            return migrations.take_up(link, (source, stranger), (&transfer, streams)).await;
        }
        _ => return Err(out_of_turn()),
    };
    let shown = secret.clone();
    migrations.core.store.write(move |tx| ticket::present(tx, &shown, source)).await?;
    let Some(_talk) = migrations.talks.begin(source) else {
        return link.send(&Message::Verdict { blocked_by: vec![too_many_talks()] }).await;
    };
    drop(stranger);
    link.trust();
    let (host_here, program) = (super::host_name(), env!("CARGO_PKG_VERSION").to_owned());
    link.send(&Message::Welcome { host: host_here, program, may_owe: live::may_owe() }).await?;
    match link.message(limits::CONVERSATION).await? {
        Message::Ask(offer) => {
            let blocked_by = judge(migrations, *offer).await?;
            link.send(&Message::Verdict { blocked_by }).await
        }
        Message::Take(parcel) => {
            let host = host.chars().take(limits::HOST_CHARS_MAX).collect();
            migrations.take(link, source, host, secret, *parcel).await
        }
        _ => Err(out_of_turn()),
    }
}

/// What is in the way of a server when too many come.
pub(super) fn busy() -> Obstacle {
    let detail = format!(
        "{} servers are on their way to the target, and no more come at once; try again when one of them has arrived",
        limits::MOVES_MAX
    );
    Obstacle { kind: ObstacleKind::Busy, detail }
}

/// The same when the source has too many conversations with this host.
pub(super) fn too_many_talks() -> Obstacle {
    let detail = format!(
        "the target has {} connections from this source already, and takes no more; try again when some have ended",
        limits::TALKS_MAX
    );
    Obstacle { kind: ObstacleKind::Busy, detail }
}

fn out_of_turn() -> Error {
    Error::new(Code::InvalidRequest, "that message is out of turn; upgrade the older of the two hosts")
}

/// What is found here is told to people at the source.
fn at_target(detail: &str) -> String {
    format!("at the target: {detail}")
}

/// Everything that is in the way here.
pub(super) async fn judge(migrations: &Migrations, offer: Offer) -> Result<Vec<Obstacle>> {
    let mut found = Vec::new();
    let mut add = |kind, detail: String| found.push(Obstacle { kind, detail });
    if migrations.coming.available_permits() == 0 {
        let Obstacle { kind, detail } = busy();
        add(kind, detail);
    }
    if let Err(cause) = migrations.launcher.check() {
        add(ObstacleKind::Kvm, at_target(&cause.detail));
    }
    let here = migrations.processor.known().await;
    let begins_anew = offer.power == Power::Off;
    if let Some(detail) = here.cpu.misses(&offer.cpu, begins_anew) {
        let advice = match begins_anew {
            true => "choose another target, or give the server a lesser cpu",
            false => {
                "choose another target, shut the server down and move it while it is off, or give it a baseline of both \
                 hosts (`toft host cpu-baseline`) and start it anew"
            }
        };
        add(ObstacleKind::CpuFeatures, at_target(&format!("{detail}; {advice}")));
    }
    if let Some(detail) = here.clock.misfits(offer.cpu.tsc_khz) {
        let advice = "choose another target, or shut the server down and move it while it is off";
        add(ObstacleKind::Tsc, at_target(&format!("{detail}; {advice}")));
    }
    let size = offer.disks.iter().fold(0_u64, |sum, disk| sum.saturating_add(disk.size_bytes));
    let written =
        offer.disks.iter().fold(offer.saved_bytes, |sum, disk| sum.saturating_add(disk.written_bytes));
    if let Err(cause) = space::check(&migrations.core.dirs.root().join("volumes"), written, size) {
        add(ObstacleKind::Storage, at_target(&cause.detail));
    }
    let capacity = migrations.capacity;
    let recorded =
        migrations.core.store.read(move |connection| against_records(connection, capacity, &offer)).await?;
    found.extend(recorded);
    Ok(found)
}

pub(super) fn against_records(
    connection: &Connection,
    capacity: Capacity,
    offer: &Offer,
) -> Result<Vec<Obstacle>> {
    let mut found = Vec::new();
    let mut add = |kind, detail: String| found.push(Obstacle { kind, detail });
    let id: ServerId = offer.server.parse().map_err(|cause: uuid::Error| {
        Error::new(Code::InvalidRequest, "the server's id is none").caused_by(cause)
    })?;
    if records::find::<ServerRecord>(connection, id.0)?.is_some() {
        add(
            ObstacleKind::Name,
            format!("the target has a server {id} already; is it asked to take its own server?"),
        );
    } else if records::resolve::<ServerRecord>(connection, &offer.name)?.is_some() {
        add(
            ObstacleKind::Name,
            format!("the target has a server named {}; rename one of the two", offer.name),
        );
    }
    if let Some(reference) = &offer.external_ref {
        let taken: bool = connection
            .prepare_cached("SELECT 1 FROM servers WHERE external_ref = ?1 AND id != ?2")?
            .exists(rusqlite::params![reference, id.to_string()])?;
        if taken {
            let detail =
                format!("the target has a server with external_ref {reference:?}; change one of the two");
            add(ObstacleKind::Name, detail);
        }
    }
    for disk in &offer.disks {
        if records::resolve::<Volume>(connection, &disk.volume)?.is_some() {
            let detail =
                format!("the target has a volume named {}; rename or delete one of the two", disk.volume);
            add(ObstacleKind::Name, detail);
        }
    }
    let fits = match offer.power {
        Power::Off | Power::Saved => capacity.could_hold(&offer.name, offer.memory_bytes),
        Power::On => capacity.fits(connection, &offer.name, offer.memory_bytes),
    };
    if let Err(cause) = fits {
        add(ObstacleKind::Memory, at_target(&cause.detail));
    }
    let images: Vec<Image> = records::all(connection)?;
    let digest = offer.image.to_string();
    if !images.iter().any(|image| image.state == ImageState::Ready && image.sha256 == digest) {
        let detail = format!(
            "the target has no image with the content of {} (sha256 {digest}); import the same bundle there",
            offer.image_name
        );
        add(ObstacleKind::Image, detail);
    }
    for nic in &offer.nics {
        if let Some(detail) = against_networks(connection, nic)? {
            add(ObstacleKind::Network, detail);
        }
    }
    Ok(found)
}

/// Why an interface could not have its network and addresses here.
fn against_networks(connection: &Connection, nic: &OfferedNic) -> Result<Option<String>> {
    let name = &nic.network;
    let network =
        records::all::<Network>(connection)?.into_iter().find(|network| network.name.as_str() == name);
    let Some(network) = network else {
        return Ok(Some(format!(
            "the target has no network {name}; make it there with the range {}",
            nic.ipv4_cidr
        )));
    };
    let same = nic.ipv4_cidr.parse::<Cidr>().is_ok_and(|range| range.to_string() == network.ipv4_cidr);
    if !same {
        return Ok(Some(format!(
            "network {name} is {} at the target and {} at the source; the address {} would not fit",
            network.ipv4_cidr, nic.ipv4_cidr, nic.ipv4
        )));
    }
    if !Mac::is_of_some_server(&nic.mac) {
        return Ok(Some(format!("{:?} is no hardware address that a host gives a server", nic.mac)));
    }
    let owner = network::owner(connection, network.id, nic.ipv4, &nic.mac)?;
    Ok(owner.map(|owner| {
        format!(
            "server {owner} of the target has {} or {}; if it is of no use there, delete it there",
            nic.ipv4, nic.mac
        )
    }))
}
