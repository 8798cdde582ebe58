//! The end a server comes from, once it moves: sends what it has, lets go of it when the target has all of it, and asks
//! again until it knows how that came out. `servers::moving` decides and keeps the records.
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::migration::MigrateServer;
use model::operation::Progress;
use model::{Code, OperationId};
use sys::beneath::{self, Access};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::sleep;
use tokio_rustls::client::TlsStream;
use uuid::Uuid;
use wire::limits::PIECE_BYTES_MAX;
use wire::peer::{Message, Parcel, Piece, SavedFiles, Saying};

use super::bounds::Pacer;
use super::link::{Link, Wire, out_of_turn};
use super::live::{streams_of, word};
use super::source::{connect, greet, memory_mode};
use super::streams::Pumps;
use super::ticket::Ticket;
use super::{Migrations, limits, obstacles_text, outlook};
use crate::core::blocking;
use crate::error::{Error, Result};
use crate::operations;
use crate::servers::lifecycle::{self, Trouble};
use crate::servers::moving::parcel::Packed;
use crate::servers::moving::plan::{Effect, Event, Phase, Side};
use crate::servers::moving::{self, Move};
use crate::servers::record::ServerRecord;
use crate::servers::saved;
use crate::store::records;
use crate::volumes::Content;
use crate::volumes::layers::Layers;

/// A file that moves.
struct Load {
    file: Layers,
    length: u64,
}

/// What has become of a word.
pub(super) struct Heeded {
    /// Whether something was said in return.
    has_answered: bool,
    /// Whether nothing is left to be said about the move.
    pub(super) is_forgotten: bool,
}

/// Everything that is sent, in this order.
#[derive(Default)]
struct Loads {
    disks: Vec<Load>,
    console: Option<Load>,
    saved: Option<[Load; 2]>,
}

impl Migrations {
    /// Carries a move that has just begun to its end.
    pub(super) async fn carry(
        self,
        begun: Move,
        ticket: Ticket,
        spec: MigrateServer,
        offer: wire::peer::Offer,
    ) {
        let carried = self.deliver(&begun, ticket, &spec, offer).await;
        self.take_back(&begun).await;
        if let Err(cause) = &carried {
            if cause.code == Code::Draining || self.core.store.is_dead() {
                return;
            }
            tracing::warn!(server = %begun.server, "its move does not go on: {}", cause.chain());
            match cause.code {
                Code::HostUnreachable => self.lose(&begun, Some(cause)).await,
                _ => self.tell(begun.id, Event::Failed, Some(cause)).await,
            }
        }
        self.see_to(begun.id).await;
    }

    /// Asks the target of a move until nothing is left to be said about it.
    pub(super) async fn see_to(self, id: Uuid) {
        self.ask_until_known(id).await;
        self.bounds.end(id);
    }

    async fn ask_until_known(&self, id: Uuid) {
        let mut pause = limits::ASK_AGAIN;
        loop {
            let found = self.core.store.read(move |connection| moving::find(connection, id)).await;
            let held = match found {
                Ok(Some(held)) if held.side == Side::Source => held,
                Ok(_) => return,
                Err(cause) if cause.code == Code::Draining || self.core.store.is_dead() => return,
                Err(cause) => {
                    tracing::warn!("the records of moves cannot be read: {}", cause.chain());
                    sleep(pause).await;
                    continue;
                }
            };
            let mut has_held = false;
            match self.ask_again(&held, &mut has_held).await {
                Ok(()) => return,
                Err(cause) if cause.code == Code::Draining || self.core.store.is_dead() => return,
                Err(cause) => {
                    if has_held {
                        pause = limits::ASK_AGAIN;
                    }
                    // Said once, and then as often as nobody minds.
                    if pause == limits::ASK_AGAIN || pause == limits::ASK_AGAIN_MAX {
                        let (server, host) = (held.server, &held.peer_name);
                        tracing::info!(%server, "host {host} is asked again what became of it: {}", cause.chain());
                    }
                    self.lose(&held, None).await;
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(limits::ASK_AGAIN_MAX);
        }
    }

    /// Begins another conversation about a move; says whether what is owed was kept for the target in it, however it ended.
    async fn ask_again(&self, held: &Move, has_held: &mut bool) -> Result<()> {
        let address = held.address.ok_or_else(out_of_turn)?;
        let mut link = connect(&self.identity, address, held.peer).await?;
        let (transfer, streams) = (held.id.to_string(), streams_of(held));
        link.send(&Message::Again { transfer, streams }).await?;
        let ended = self.listen_to(&mut link, held, None, limits::SILENCE).await;
        *has_held = link.has_held;
        ended
    }

    /// Hears what the target says and answers it, until the move needs no more of it.
    pub(super) async fn listen_to<S>(
        &self,
        link: &mut Link<S>,
        held: &Move,
        mut pumps: Option<Pumps>,
        mut patience: Duration,
    ) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut next = None;
        loop {
            let word = match next.take() {
                Some(word) => word,
                None => word(link.message(patience).await?)?,
            };
            patience = limits::SILENCE;
            self.core.checkpoint("move.heard")?;
            let heeded = self.heed(link, held.id, word).await?;
            if heeded.is_forgotten {
                return Ok(());
            }
            if word == Saying::Holding && !heeded.has_answered {
                next = Some(self.hold(link, held, &mut pumps).await?);
            } else if !heeded.has_answered {
                return Err(Error::new(Code::HostUnreachable, "the other host does not know more yet"));
            }
        }
    }

    /// Saves what a word is to a move, and answers it.
    pub(super) async fn heed<S>(&self, link: &mut Link<S>, id: Uuid, word: Saying) -> Result<Heeded>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if word == Saying::Taken {
            self.tell_stillness(id).await;
        }
        let given = self.core.store.write(move |tx| moving::give(tx, id, Event::Heard(word), None)).await?;
        let Some(given) = given else { return Err(out_of_turn()) };
        self.core.checkpoint("move.decided")?;
        self.servers.wake(given.now.server);
        let mut has_answered = false;
        for effect in given.effects {
            if let Effect::Say(word) = effect {
                link.say(*word).await?;
                self.core.checkpoint("move.said")?;
                has_answered = true;
            }
        }
        Ok(Heeded { has_answered, is_forgotten: given.effects.contains(&Effect::Forget) })
    }

    /// Writes down for how long a guest stood still, before its VMM here ends.
    async fn tell_stillness(&self, id: Uuid) {
        let found = self.core.store.read(move |connection| moving::find(connection, id)).await;
        let Ok(Some(Move { server, .. })) = found else { return };
        if let Ok(status) = self.servers.move_status(server).await {
            let wire::migration::Progress { downtime_us, total_us, sent_bytes, rounds, .. } = status.progress;
            tracing::info!(
                %server,
                "its guest stood still for {downtime_us} us; {sent_bytes} bytes in {rounds} rounds and {total_us} us"
            );
        }
    }

    /// A move that was called off may have been begun in the VMM just after its server's actor had looked there.
    async fn take_back(&self, begun: &Move) {
        let server = begun.server;
        let look = move |connection: &rusqlite::Connection| {
            // One that moves, or moves once more, is nobody's business here.
            let record = records::find::<ServerRecord>(connection, server.0)?;
            Ok(record.is_some_and(|record| {
                matches!(
                    record.life.phase,
                    lifecycle::Phase::Running { .. } | lifecycle::Phase::Paused { .. }
                )
            }))
        };
        let taken = async {
            match self.core.store.read(look).await? {
                true => self.servers.take_back(server).await,
                false => Ok(()),
            }
        };
        if let Err(cause) = taken.await
            && cause.code != Code::Draining
            && !self.core.store.is_dead()
        {
            tracing::warn!(%server, "its machine may stand still until the daemon starts again: {}", cause.chain());
        }
    }

    /// The connection is gone. The word that was lost may have come by another way.
    async fn lose(&self, held: &Move, cause: Option<&Error>) {
        let id = held.id;
        let found = self.core.store.read(move |connection| moving::find(connection, id)).await;
        // What the VMM knows is of the move that is under way, and counts when that has been decided here.
        let is_decided = matches!(found, Ok(Some(Move { phase: Phase::Commit, .. })));
        let event = match is_decided && self.servers.has_moved(held.server).await {
            true => Event::Heard(Saying::Taken),
            false => Event::Lost,
        };
        self.tell(id, event, cause).await;
    }

    /// Saves what an event is to a move. What cannot be saved now is found when the daemon starts again.
    pub(super) async fn tell(&self, id: Uuid, event: Event, cause: Option<&Error>) {
        let trouble = cause.map(Trouble::from);
        let told = self.core.insist("the record of a move", || {
            let trouble = trouble.clone();
            async {
                let given = self.core.store.write(move |tx| moving::give(tx, id, event, trouble)).await?;
                if let Some(given) = given {
                    self.servers.wake(given.now.server);
                }
                Ok(())
            }
        });
        if let Err(cause) = told.await {
            tracing::debug!("a move is taken up at the next start: {}", cause.chain());
        }
    }

    /// The first conversation of a move, from the ticket to the end.
    async fn deliver(
        &self,
        begun: &Move,
        ticket: Ticket,
        spec: &MigrateServer,
        offer: wire::peer::Offer,
    ) -> Result<()> {
        let id = begun.server;
        let look = move |connection: &rusqlite::Connection| {
            let record: ServerRecord = records::one(connection, id.0)?;
            let job = record.life.job.map(|job| job.id);
            Ok((job, Packed::of(connection, record)?))
        };
        let (job, packed) = self.core.store.read(look).await?;
        let live_streams = packed.is_live().then(|| streams_of(begun));
        // What a machine has open goes from VMM to VMM.
        let Loads { disks, console, saved } = match live_streams {
            Some(_) => Loads::default(),
            None => self.loads(&packed).await?,
        };
        let console_bytes = console.as_ref().map_or(0, |load| load.length);
        let saved_files = saved
            .as_ref()
            .map(|[state, memory]| SavedFiles { state_bytes: state.length, memory_bytes: memory.length });
        let loads = disks.into_iter().chain(console).chain(saved.into_iter().flatten()).collect();
        let mut link = connect(&self.identity, spec.target, ticket.host).await?;
        let welcome = greet(&mut link, ticket.secret).await?;
        let mode = memory_mode(spec.mode, welcome.may_owe);
        let record = serde_json::to_value(&packed)?;
        let parcel = Parcel {
            transfer: begun.id.to_string(),
            offer,
            record,
            console_bytes,
            saved: saved_files,
            live_streams,
            may_owe: live_streams.is_some() && mode.may_owe(),
        };
        link.send(&Message::Take(Box::new(parcel))).await?;
        match link.message(limits::SILENCE).await? {
            Message::Say(Saying::Copying) => {}
            Message::Verdict { blocked_by } => {
                return Err(Error::new(Code::MigrationBlocked, obstacles_text(&blocked_by)));
            }
            Message::Refuse { detail } => return Err(Error::new(Code::MigrationBlocked, detail)),
            _ => return Err(out_of_turn()),
        }
        self.core.checkpoint("move.accepted")?;
        if let Some(streams) = live_streams {
            let bounds = self.bounds.wanted(begun.id).unwrap_or_default();
            return self.send_machine(&mut link, begun, (bounds, mode), (&packed, streams, job)).await;
        }
        self.send_all(&mut link, loads, begun, job).await?;
        link.send(&Message::Copied).await?;
        self.core.checkpoint("move.copied")?;
        self.listen_to(&mut link, begun, None, limits::FLUSH).await
    }

    /// Opens everything that is sent: disks with their locks, so that no machine gets them, the console, and the memory.
    async fn loads(&self, packed: &Packed) -> Result<Loads> {
        let mut disks = Vec::new();
        for disk in &packed.disks {
            let file = self.volumes.open(disk.volume.id, Content::Recorded).await?;
            disks.push(Load { file, length: disk.volume.size_bytes });
        }
        let (directory, is_saved) = (self.core.dirs.server(packed.id), packed.saved.is_some());
        let own = move || {
            let open = |name: &str| {
                let file = beneath::open(&directory, Path::new(name), Access::Read)?;
                Ok::<_, std::io::Error>(Load { length: file.metadata()?.len(), file: Layers::one(file) })
            };
            let console = match open("console.ring") {
                Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => None,
                opened => Some(opened.map_err(unreadable)?),
            };
            let saved = match is_saved {
                true => {
                    Some([open(saved::STATE).map_err(unreadable)?, open(saved::MEMORY).map_err(unreadable)?])
                }
                false => None,
            };
            Ok((console, saved))
        };
        let (console, saved) = blocking(own).await?;
        Ok(Loads { disks, console, saved })
    }

    async fn send_all(
        &self,
        link: &mut Link<TlsStream<Wire>>,
        loads: Vec<Load>,
        begun: &Move,
        job: Option<OperationId>,
    ) -> Result<()> {
        let began = Instant::now();
        let (mut sent, mut told) = (0_u64, began);
        let mut pacer = Pacer::new(began);
        let total: u64 = loads.iter().map(|load| load.file.used_bytes().min(load.length)).sum();
        for (index, load) in (0_u16..).zip(loads) {
            let load = Arc::new(load);
            let mut next = read(load.clone(), 0).await?;
            while let Some((offset, bytes)) = next {
                let after = offset.saturating_add(bytes.len() as u64);
                let piece = Piece { file: index, offset, bytes: &bytes };
                // The next piece is read while this one travels.
                let (travelled, read) = tokio::join!(link.send_piece(piece), read(load.clone(), after));
                if let Err(cause) = travelled {
                    return Err(refusal(link).await.unwrap_or(cause));
                }
                next = read?;
                sent = sent.saturating_add(bytes.len() as u64);
                if told.elapsed() >= crate::servers::limits::PROGRESS_EVERY {
                    told = Instant::now();
                    let progress = outlook::of_files(sent, total, began.elapsed());
                    self.write_progress(begun, job, progress).await?;
                }
                let bandwidth = self.bounds.wanted(begun.id).and_then(|bounds| bounds.bandwidth_bytes_per_s);
                sleep(pacer.pause(bandwidth, sent, Instant::now())).await;
            }
        }
        self.write_progress(begun, job, outlook::of_files(sent, total, began.elapsed())).await
    }

    /// Writes down how far a move is. Fails when it is not wanted any more.
    pub(super) async fn write_progress(
        &self,
        begun: &Move,
        job: Option<OperationId>,
        progress: Progress,
    ) -> Result<()> {
        let id = begun.id;
        self.core
            .store
            .write(move |tx| {
                if moving::find(tx, id)?.is_none_or(|held| held.phase != Phase::Copy) {
                    return Err(Error::new(Code::WrongState, "the move is not wanted any more"));
                }
                job.map_or(Ok(()), |job| operations::progress(tx, job, progress))
            })
            .await
    }
}

/// Why the target takes nothing any more, if it has said so before it closed the connection.
async fn refusal(link: &mut Link<TlsStream<Wire>>) -> Option<Error> {
    match link.message(limits::FAREWELL).await {
        Ok(Message::Refuse { detail }) => Some(Error::new(Code::MigrationBlocked, detail)),
        _ => None,
    }
}

/// The next piece of a file's data from `at` on, with where it lies; holes are skipped (lseek(2)).
async fn read(load: Arc<Load>, at: u64) -> Result<Option<(u64, Vec<u8>)>> {
    blocking(move || {
        let Load { file, length } = &*load;
        let Some(found) = file.data(at..*length).next() else { return Ok(None) };
        let (Range { start, end }, lies_in) = found.map_err(unreadable)?;
        let count = usize::try_from(end - start).map_or(PIECE_BYTES_MAX, |count| count.min(PIECE_BYTES_MAX));
        let mut bytes = vec![0; count];
        file.file(lies_in).and_then(|file| file.read_exact_at(&mut bytes, start)).map_err(unreadable)?;
        Ok(Some((start, bytes)))
    })
    .await
}

fn unreadable(cause: std::io::Error) -> Error {
    Error::file("a file of the server cannot be read", cause)
}
