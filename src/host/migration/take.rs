//! The end a server comes to, once it comes: gives it a record before anything else, fills its files, and has it when the
//! source has let go. Whoever sends has shown a ticket, or is the host that this very move began with.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use model::image::{Image, ImageState};
use model::{Code, ServerId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use uuid::Uuid;
use wire::limits::DISKS_MAX;
use wire::peer::{Message, Offer, Parcel, Piece, Power, SavedFiles, Saying};
use wire::saved::Digest;

use super::link::{Link, Received, out_of_turn};
use super::strangers::Stranger;
use super::streams::Pumps;
use super::target::{against_records, busy, judge, too_many_talks};
use super::{Migrations, limits, ticket};
use crate::core::blocking;
use crate::cpu;
use crate::error::{Error, Result};
use crate::servers::make_directory;
use crate::servers::moving::parcel::Packed;
use crate::servers::moving::plan::{Effect, Event, Phase, Side, said};
use crate::servers::moving::{self, Move};
use crate::servers::saved;
use crate::store::{Tx, records};
use crate::volumes::files::{self, Unfinished};

/// A file that is being filled.
struct Filling {
    file: Arc<File>,
    unfinished: Unfinished,
    length: u64,
    /// How many bytes may still come: no more than it has.
    left: u64,
}

impl Filling {
    fn begin(place: &Path, length: u64) -> Result<Filling> {
        let mut unfinished = Unfinished::create(place).map_err(unwritable)?;
        unfinished.file().set_len(length).map_err(unwritable)?;
        let file = Arc::new(unfinished.file().try_clone().map_err(unwritable)?);
        Ok(Filling { file, unfinished, length, left: length })
    }
}

/// Pieces of files, on their way into them. One is written while the next one comes.
struct Pieces {
    filling: Vec<Filling>,
    writing: Option<JoinHandle<Result<()>>>,
    pace: Pace,
    came: u64,
}

/// How much has come of all that is to come.
#[derive(PartialEq, Eq)]
enum Sent {
    Some,
    Everything,
}

impl Pieces {
    fn into(filling: Vec<Filling>) -> Pieces {
        Pieces { filling, writing: None, pace: Pace::new(), came: 0 }
    }

    /// Takes what came next.
    async fn take(&mut self, received: Result<Received>) -> Result<Sent> {
        if let Some(written) = self.writing.take() {
            written.await.map_err(|cause| Error::internal("a piece was not written", cause))??;
        }
        let body = match received? {
            Received::Piece(body) => body,
            Received::Message(Message::Copied) => return Ok(Sent::Everything),
            Received::Message(_) => return Err(out_of_turn()),
        };
        let piece = Piece::read(&body).map_err(|_| out_of_turn())?;
        let outside = || Error::new(Code::InvalidRequest, "a piece lies outside of its file");
        let into = self.filling.get_mut(usize::from(piece.file)).ok_or_else(outside)?;
        let (offset, count) = (piece.offset, piece.bytes.len() as u64);
        let end = offset.checked_add(count).ok_or_else(outside)?;
        // More than a file has is sent by nobody who means well, and nothing only to keep a place.
        let fits = count > 0 && end <= into.length;
        into.left = into.left.checked_sub(count).filter(|_| fits).ok_or_else(outside)?;
        self.came = self.came.saturating_add(count);
        self.pace.came(self.came)?;
        let file = into.file.clone();
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let bytes = body.get(wire::peer::PIECE_HEAD_BYTES..).unwrap_or_default();
            file.write_all_at(bytes, offset).map_err(unwritable)
        }));
        Ok(Sent::Some)
    }
}

/// Of the files that come beside the disks.
struct Lengths {
    console_bytes: u64,
    saved: Option<SavedFiles>,
    live_streams: Option<u16>,
    may_owe: bool,
}

/// Whether what comes from another host comes fast enough to be worth waiting for.
pub(super) struct Pace {
    since: Instant,
    bytes: u64,
}

impl Pace {
    pub(super) fn new() -> Pace {
        Pace { since: Instant::now(), bytes: 0 }
    }

    /// So much has come in all. Fails with `host_unreachable` when that is too little.
    pub(super) fn came(&mut self, bytes: u64) -> Result<()> {
        if bytes.saturating_sub(self.bytes) >= limits::PACE_BYTES_MIN {
            (self.since, self.bytes) = (Instant::now(), bytes);
        }
        if self.since.elapsed() <= limits::PACE_EVERY {
            return Ok(());
        }
        let detail = format!(
            "the other host sent less than {} bytes in {:?}",
            limits::PACE_BYTES_MIN,
            limits::PACE_EVERY
        );
        Err(Error::new(Code::HostUnreachable, detail))
    }
}

/// Keeps others from coming for the same server.
struct Taking {
    migrations: Migrations,
    server: ServerId,
}

impl Taking {
    fn begin(migrations: &Migrations, server: ServerId) -> Result<Taking> {
        if migrations.taking.lock().unwrap_or_else(PoisonError::into_inner).insert(server) {
            return Ok(Taking { migrations: migrations.clone(), server });
        }
        let detail = "an earlier try to bring this server here has not ended yet; try again in a minute";
        Err(Error::new(Code::MigrationBlocked, detail))
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        self.migrations.taking.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.server);
    }
}

impl Migrations {
    /// Takes a server that this host has room for.
    pub(super) async fn take<S>(
        &self,
        link: &mut Link<S>,
        source: Digest,
        host: String,
        secret: String,
        parcel: Parcel,
    ) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let blocked_by = judge(self, parcel.offer.clone()).await?;
        if !blocked_by.is_empty() {
            return link.send(&Message::Verdict { blocked_by }).await;
        }
        let Ok(coming) = self.coming.clone().try_acquire_owned() else {
            return link.send(&Message::Verdict { blocked_by: vec![busy()] }).await;
        };
        let taking = Taking::begin(self, parcel.offer.server.parse().unwrap_or(ServerId(Uuid::nil())))?;
        let (begun, lengths, packed) = self.accept(source, host, secret, parcel).await?;
        let id = begun.id;
        if let Some(streams) = lengths.live_streams {
            self.core.checkpoint("move.recorded")?;
            let (arrived, pumps) =
                match self.receive_machine(link, &begun, &packed, (streams, lengths.may_owe)).await {
                    Ok((phase, pumps)) => (Ok(phase), Some(pumps)),
                    Err(cause) => (Err(cause), None),
                };
            // Its actor removes what there is of a machine that was dropped.
            self.hear_out(arrived, link, id).await?;
            // It may leave again at once.
            drop((taking, coming));
            if let Some(mut pumps) = pumps {
                if link.said == Some(Saying::Holding) {
                    return self.see_whole(link, &begun, pumps, None).await;
                }
                // What its VMM says last is carried to the source's.
                let ended = async { while pumps.join_next().await.is_some() {} };
                let _ = timeout(limits::CONVERSATION, ended).await;
            }
            return Ok(());
        }
        let filled = async {
            self.core.checkpoint("move.recorded")?;
            let filling = self.begin_files(&packed, lengths).await?;
            link.say(Saying::Copying).await?;
            let filling = self.fill(link, id, filling).await?;
            self.core.checkpoint("move.filled")?;
            self.finish_files(filling).await?;
            self.core.checkpoint("move.flushed")?;
            self.give(link, id, Event::Done).await
        };
        let outcome = self.hear_out(filled.await, link, id).await;
        self.clear(id, &packed).await?;
        outcome
    }

    /// Removes what may have been finished after the move was dropped, which is when its server was removed.
    async fn clear(&self, id: Uuid, packed: &Packed) -> Result<()> {
        let held = self.core.store.read(move |connection| moving::find(connection, id)).await?;
        if held.is_none_or(|held| held.phase != Phase::Dropped) {
            return Ok(());
        }
        let directory = self.core.dirs.server(packed.id);
        let disks: Vec<_> = packed.disks.iter().map(|disk| self.core.dirs.volume(disk.volume.id)).collect();
        blocking(move || {
            disks.iter().try_for_each(|disk| files::remove(disk)).map_err(unwritable)?;
            files::remove_tree(&directory).map_err(unwritable)
        })
        .await
    }

    /// Takes up a move whose connection was lost.
    pub(super) async fn take_up<S>(
        &self,
        link: &mut Link<S>,
        (source, stranger): (Digest, Stranger),
        (transfer, streams): (&str, u16),
    ) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let id = transfer.parse().unwrap_or(Uuid::nil());
        let held = self.core.store.read(move |connection| moving::find(connection, id)).await?;
        match held {
            Some(held) if held.side == Side::Target && held.peer == source => {
                let too_many = || Error::new(Code::MigrationBlocked, too_many_talks().detail);
                let _talk = self.talks.begin(source).ok_or_else(too_many)?;
                drop(stranger);
                // Where memory is owed, the source opens streams as soon as it hears of it.
                let has_all = matches!(held.phase, Phase::Ready | Phase::Moved) && self.is_latest(id).await?;
                let awaited = (has_all && (1..=limits::LIVE_STREAMS_MAX).contains(&streams))
                    .then(|| (self.await_streams(&held, streams.into()), streams.into()));
                let asked = self.give(link, id, Event::Asked).await;
                self.hear_out(asked, link, id).await?;
                match awaited {
                    Some(awaited) if link.said == Some(Saying::Holding) => {
                        self.see_whole(link, &held, Pumps::new(), Some(awaited)).await
                    }
                    _ => Ok(()),
                }
            }
            // Whoever asks for another's move learns no more than for one that never was.
            _ => link.say(Saying::Unknown).await,
        }
    }

    /// Hears what the source decides, until the move has ended here.
    async fn hear_out<S>(&self, before: Result<Phase>, link: &mut Link<S>, id: Uuid) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let heard = async {
            let mut phase = before?;
            // Not put off by a source that only says that it is there: what waits for its word is in doubt then.
            let end = Instant::now() + limits::SILENCE;
            while matches!(phase, Phase::Copy | Phase::Ready) {
                let word = match link.message(end.saturating_duration_since(Instant::now())).await? {
                    Message::Say(word @ (Saying::Commit | Saying::Abort)) => word,
                    // Said before it had heard that all is here.
                    Message::Say(Saying::Copying) => continue,
                    _ => return Err(out_of_turn()),
                };
                self.core.checkpoint("move.heard")?;
                phase = self.give(link, id, Event::Heard(word)).await?;
            }
            Ok(())
        };
        let outcome = heard.await;
        if let Err(cause) = &outcome
            && cause.code != Code::Draining
            && !self.core.store.is_dead()
        {
            let event = if cause.code == Code::HostUnreachable { Event::Lost } else { Event::Failed };
            self.tell(id, event, Some(cause)).await;
        }
        outcome
    }

    /// Saves what an event is to a move, and says what is to be said. Answers the phase from then on.
    pub(super) async fn give<S>(&self, link: &mut Link<S>, id: Uuid, event: Event) -> Result<Phase>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let given = self.core.store.write(move |tx| moving::give(tx, id, event, None)).await?;
        let Some(given) = given else { return Err(out_of_turn()) };
        self.core.checkpoint("move.decided")?;
        self.servers.wake(given.now.server);
        if given.now.phase == Phase::Moved && given.effects.contains(&Effect::Keep) {
            // Its actor would a little later; a server that has no machine has no move that knows of this.
            let _ = self.servers.let_run(given.now.server).await;
            self.core.checkpoint("move.run")?;
        }
        for effect in given.effects {
            if let Effect::Say(word) = effect {
                let is_owed = *word == Saying::Taken
                    && self.is_latest(id).await?
                    && self.servers.is_owed(given.now.server).await?;
                link.say(said(*word, is_owed)).await?;
                self.core.checkpoint("move.said")?;
            }
        }
        Ok(given.now.phase)
    }

    /// Whether the server has not come by another move since: who sent it once has no say in what it is owed now.
    async fn is_latest(&self, id: Uuid) -> Result<bool> {
        self.core.store.read(move |connection| moving::is_latest(connection, id)).await
    }

    /// Uses the ticket up and gives the server its records, in one transaction.
    async fn accept(
        &self,
        source: Digest,
        host: String,
        secret: String,
        parcel: Parcel,
    ) -> Result<(Move, Lengths, Packed)> {
        let Parcel { transfer, offer, record, console_bytes, saved, live_streams, may_owe } = parcel;
        let invalid =
            |what: &str| Error::new(Code::InvalidRequest, format!("the server's {what} is not valid"));
        let packed: Packed =
            serde_json::from_value(record).map_err(|cause| invalid("record").caused_by(cause))?;
        packed.check()?;
        if !is_what_was_offered(&packed, &offer) {
            return Err(invalid("record is not what was offered, which"));
        }
        if saved.is_some() != packed.saved.is_some() || live_streams.is_some() != packed.is_live() {
            return Err(invalid("memory"));
        }
        if live_streams.is_some_and(|streams| !(1..=limits::LIVE_STREAMS_MAX).contains(&streams)) {
            return Err(invalid("number of streams"));
        }
        let id: Uuid = transfer.parse().map_err(|_| invalid("move"))?;
        let begun = Move {
            id,
            server: packed.id,
            side: Side::Target,
            phase: Phase::Copy,
            peer: source,
            peer_name: host,
            address: None,
            streams: None,
        };
        let (kept, sent, capacity) = (begun.clone(), packed.clone(), self.capacity);
        let accept = move |tx: &Tx<'_>| {
            ticket::redeem(tx, &secret, source)?;
            if let Some(obstacle) = against_records(tx, capacity, &offer)?.into_iter().next() {
                return Err(Error::new(Code::MigrationBlocked, obstacle.detail));
            }
            let digest = offer.image.to_string();
            let image = records::all::<Image>(tx)?
                .into_iter()
                .find(|image| image.state == ImageState::Ready && image.sha256 == digest);
            let image = image.ok_or_else(|| invalid("image"))?;
            let (record, volumes) = sent.unpacked(tx, &image, &offer.cpu)?;
            moving::arrive(tx, &kept, &record, &volumes)
        };
        self.core.store.write(accept).await?;
        self.servers.arrived(begun.server);
        Ok((begun, Lengths { console_bytes, saved, live_streams, may_owe }, packed))
    }

    async fn begin_files(&self, packed: &Packed, lengths: Lengths) -> Result<Vec<Filling>> {
        let directory = self.core.dirs.server(packed.id);
        let mut places: Vec<_> = packed
            .disks
            .iter()
            .map(|disk| (self.core.dirs.volume(disk.volume.id), disk.volume.size_bytes))
            .collect();
        if lengths.console_bytes > 0 {
            places.push((directory.join("console.ring"), lengths.console_bytes));
        }
        if let Some(SavedFiles { state_bytes, memory_bytes }) = lengths.saved {
            places.push((directory.join(saved::STATE), state_bytes));
            places.push((directory.join(saved::MEMORY), memory_bytes));
        }
        blocking(move || {
            make_directory(&directory)?;
            places.into_iter().map(|(place, length)| Filling::begin(&place, length)).collect()
        })
        .await
    }

    /// Writes what comes where it belongs, until all has been sent.
    async fn fill<S>(&self, link: &mut Link<S>, id: Uuid, filling: Vec<Filling>) -> Result<Vec<Filling>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut pieces = Pieces::into(filling);
        let mut looked = Instant::now();
        loop {
            if looked.elapsed() >= limits::WANTED_EVERY {
                looked = Instant::now();
                let held = self.core.store.read(move |connection| moving::find(connection, id)).await?;
                if held.is_none_or(|held| held.phase != Phase::Copy) {
                    return Err(Error::new(Code::WrongState, "the server is not wanted here any more"));
                }
            }
            let received = timeout(limits::SILENCE, link.receive()).await;
            let received = received.map_err(|_| {
                Error::new(Code::HostUnreachable, "the other host has sent nothing for too long")
            })?;
            if pieces.take(received).await? == Sent::Everything {
                return Ok(pieces.filling);
            }
        }
    }

    async fn finish_files(&self, filling: Vec<Filling>) -> Result<()> {
        blocking(move || {
            for Filling { unfinished, .. } in filling {
                unfinished.finish().map_err(unwritable)?;
            }
            Ok(())
        })
        .await
    }
}

/// The question and the record are judged apart, so they must be about the same.
fn is_what_was_offered(packed: &Packed, offer: &Offer) -> bool {
    let disks = packed.disks.len() == offer.disks.len()
        && packed.disks.len() <= DISKS_MAX
        && packed.disks.iter().zip(&offer.disks).all(|(disk, offered)| {
            disk.volume.name.as_str() == offered.volume && disk.volume.size_bytes == offered.size_bytes
        });
    let nics = packed.nics.len() == offer.nics.len()
        && packed.nics.iter().zip(&offer.nics).all(|(nic, offered)| {
            nic.network == offered.network && nic.ipv4 == offered.ipv4 && nic.mac == offered.mac
        });
    let power = match (packed.is_live(), packed.saved) {
        (true, _) => Power::On,
        (false, Some(_)) => Power::Saved,
        (false, None) => Power::Off,
    };
    packed.id.to_string() == offer.server
        && packed.name.as_str() == offer.name
        && packed.external_ref == offer.external_ref
        && (packed.vcpus, packed.memory_bytes) == (offer.vcpus, offer.memory_bytes)
        && cpu::template(&packed.cpu) == offer.cpu.template
        && offer.power == power
        && disks
        && nics
}

fn unwritable(cause: std::io::Error) -> Error {
    Error::file("a file of the server cannot be written", cause)
}

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sends_next_to_nothing_is_not_waited_for() {
        let late = Instant::now().checked_sub(limits::PACE_EVERY * 2).unwrap();
        let mut pace = Pace { since: late, bytes: 5 };
        assert!(pace.came(4 + limits::PACE_BYTES_MIN).is_err());
        // What is enough counts from then on.
        pace.came(5 + limits::PACE_BYTES_MIN).unwrap();
        pace.came(6 + limits::PACE_BYTES_MIN).unwrap();
        pace.since = late;
        assert!(pace.came(6 + limits::PACE_BYTES_MIN).is_err());
    }
}
