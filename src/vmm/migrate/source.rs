//! The end that has the machine. One thread decides and speaks on the first stream; one for each stream sends memory. They
//! end when the move does.
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use devices::virtio::block::Disk;
use kvm::DirtyLog;
use memory::{Pages, Ram, marks};
use wire::migration::{Mode, Phase, SendLimits, Side};
use wire::saved::table::Table;
use wire::transfer::{self, CONSOLE_PIECE_BYTES_MAX, Handed, Kind, Open, Word};

use super::answers::{Answers, hear, see_out, unexpected};
use super::converge::{Convergence, Decision, Next, Round};
use super::midway::Midway;
use super::pack::Packer;
use super::phase::{Event, Said};
use super::ram::{self, Sum};
use super::threads::Threads;
use super::worker::{Job, Share, Worker};
use super::{Error, Shared, Stream};
use crate::bell::Bell;
use crate::console::Console;
use crate::limits::{BRAKE_EVERY_MS, GLANCE_EVERY_MS, THROTTLED_BYTES_MIN, THROTTLED_MS_MAX};
use crate::snapshot;
use crate::vcpu::{Brake, Slot};

/// What of a machine a source needs.
pub(crate) struct Sources {
    pub(crate) ram: Arc<Ram>,
    /// Who has written what; nothing where the target has the memory itself.
    pub(crate) log: Option<DirtyLog>,
    pub(crate) console: Arc<Console>,
    pub(crate) brake: Brake,
    /// Those that go along, by their positions.
    pub(crate) disks: Vec<(u16, Disk)>,
}

/// A source from its begin on. Dropped, its streams are shut and its threads waited for. Only they have memory: how the move stands is
/// told for longer than that is the machine's.
pub(crate) struct Source {
    pub(crate) shared: Arc<Shared>,
    /// Streams of memory.
    count: usize,
    threads: Threads,
}

impl Source {
    /// Begins to move the machine over `streams`, of which the last ones are the disks', in their order.
    pub(crate) fn start(
        sources: Sources,
        streams: Vec<Stream>,
        is_held: bool,
        (limits, mode): (SendLimits, Mode),
        bell: &Arc<Bell>,
    ) -> Result<Source, Error> {
        let Sources { ram, log, console, brake, disks } = sources;
        let shared = Shared::new(Side::Source, is_held, limits, bell, copies(&streams)?, None);
        let count = streams.len().saturating_sub(disks.len());
        let memory_pages = ram::bytes(&ram) / marks::PAGE_BYTES;
        let mut source = Source { shared, count, threads: Threads::default() };
        let log = log.map(Arc::new);
        let (told, results) = channel();
        let mut jobs = Vec::new();
        let first = streams.first().map(Stream::copy).transpose();
        let first = first.map_err(|cause| Error::Host { doing: "copy a stream", cause })?;
        for (index, stream) in streams.into_iter().enumerate() {
            let (give, work) = channel();
            jobs.push(give);
            let worker = Worker {
                shared: Arc::clone(&source.shared),
                ram: Arc::clone(&ram),
                log: log.clone(),
                stream,
                packer: Packer::new(),
                index,
                share: match index.checked_sub(count).and_then(|at| disks.get(at)) {
                    Some((_, disk)) => Share::Disk(disk.clone()),
                    None => Share::Memory { count },
                },
                work,
                told: told.clone(),
            };
            source.threads.start(move || worker.run())?;
        }
        let Some(first) = first else { return Err(Error::Streams { stream: 0 }) };
        let shared = Arc::clone(&source.shared);
        let disks = disks.into_iter().map(|(_, disk)| disk).collect();
        let conductor = Conductor {
            shared,
            ram,
            log,
            console,
            brake,
            disks,
            first,
            jobs,
            results,
            mode,
            count,
            owed: Pages::of(memory_pages),
            convergence: Convergence::patient(mode),
            console_sent: None,
            standstill_ends: None,
        };
        source.threads.start(move || conductor.run())?;
        Ok(source)
    }
}

impl Source {
    /// Goes on over other streams, which have been opened, with what is still owed of `ram`.
    pub(crate) fn resume(&mut self, ram: &Arc<Ram>, streams: Vec<Stream>) -> Result<(), Error> {
        self.shared.shut();
        self.threads.join();
        self.shared.relink(copies(&streams)?);
        for (index, mut stream) in streams.into_iter().enumerate() {
            let mut answers = Answers::new(&self.shared, ram, index, self.count);
            let shared = Arc::clone(&self.shared);
            self.threads.start(move || {
                let ended = match index {
                    0 => see_out(&mut answers, &mut stream),
                    _ => answers.all(&mut stream),
                };
                if let Err(error) = ended {
                    shared.fail_with(&error);
                }
            })?;
        }
        Ok(())
    }

    /// How many streams memory has.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Ends it, whatever it is at, and lets go of the machine's memory.
    pub(crate) fn end(&mut self) {
        self.shared.give(Event::Failed);
        self.shared.shut();
        self.threads.join();
    }
}

/// Another of each.
pub(super) fn copies(streams: &[Stream]) -> Result<Vec<Stream>, Error> {
    let copies = streams.iter().map(Stream::copy).collect::<Result<_, _>>();
    copies.map_err(|cause| Error::Host { doing: "copy a stream", cause })
}

impl Drop for Source {
    fn drop(&mut self) {
        self.end();
    }
}

/// Decides, and speaks on the first stream whenever its worker does not.
struct Conductor {
    shared: Arc<Shared>,
    ram: Arc<Ram>,
    log: Option<Arc<DirtyLog>>,
    console: Arc<Console>,
    brake: Brake,
    disks: Vec<Disk>,
    first: Stream,
    jobs: Vec<Sender<Job>>,
    results: Receiver<Result<Sum, Error>>,
    mode: Mode,
    /// Streams of memory.
    count: usize,
    /// What the target was told that it is owed.
    owed: Pages,
    convergence: Convergence,
    /// Where the console goes on that was sent.
    console_sent: Option<u64>,
    /// When the guest will have stood still for too long, once it does, and how long that is in milliseconds.
    standstill_ends: Option<(Instant, u128)>,
}

impl Conductor {
    fn run(mut self) {
        if let Err(error) = self.conduct() {
            self.shared.fail_with(&error);
            // Whatever it was: nobody is left to bring it to an end, and after the commit nobody to hear of one. Then it is
            // in doubt, be the link whole or not.
            self.shared.give(Event::Failed);
            self.shared.give(Event::Lost);
        }
        if self.shared.phase() == Phase::Returned {
            let detail = self.shared.status().detail.unwrap_or_else(|| "it was cancelled".to_owned());
            // Only between frames; where a worker died within one, the other end finds that out.
            let _ = Word::Abort { detail }.write(&mut self.first);
        }
        // Those of disks, too: what waits for more of one at the other end would wait for ever.
        self.shared.shut();
        self.disks.iter().for_each(Disk::forget_changes);
        marks::stop(&self.ram);
    }

    fn conduct(&mut self) -> Result<(), Error> {
        if self.log.is_some() {
            // Before the rounds begin: who looks then is told of a whole.
            let disks_bytes: u64 = self.disks.iter().map(Disk::bytes).sum();
            self.shared.note_left(ram::bytes(&self.ram) + disks_bytes);
        }
        self.expect_prepared()?;
        let mut left = if self.log.is_some() { Some(self.rounds()?) } else { None };
        if let (Some(left), true) = (&mut left, self.shared.is_owing()) {
            self.announce(left)?;
        }
        self.shared.done(Phase::Pause)?;
        // The main thread stops the machine and gives what it is beside its memory.
        if self.shared.wait_through(Phase::Pause) != Phase::LastRound {
            return Err(Error::Over);
        }
        let ends = self.shared.standstill_ends();
        self.standstill_ends = Some(ends);
        self.first.hurry(ends.0);
        match left {
            Some(left) => self.last_round(left)?,
            None => drop(self.dispatch(&Job::End)?),
        }
        self.shared.done(Phase::State)?;
        self.state()?;
        self.shared.done(Phase::Ready)?;
        if self.shared.is_owing() {
            let mut answers = Answers::new(&self.shared, &self.ram, 0, self.count);
            return see_out(&mut answers, &mut self.first);
        }
        self.hand_over()
    }

    fn expect_prepared(&mut self) -> Result<(), Error> {
        match self.hear()? {
            Word::Prepared => self.shared.go_to(Phase::Rounds, Event::Heard(Said::Prepared)),
            other => Err(unexpected(&self.shared, other)),
        }
    }

    /// Sends all of memory and then what was written meanwhile, again and again. Answers what is left when the guest is to
    /// be stopped.
    fn rounds(&mut self) -> Result<Pages, Error> {
        let all = ram::bytes(&self.ram) / marks::PAGE_BYTES;
        let mut pages = Pages::all(all);
        let mut touched = Pages::of(all);
        for extent in memory::touched(&self.ram)? {
            let first = extent.offset / marks::PAGE_BYTES;
            touched.set_range(first, first + extent.bytes / marks::PAGE_BYTES);
        }
        let mut touched = Arc::new(touched);
        for number in 1_u32.. {
            self.say(&Word::Round { number, last: false })?;
            self.shared.note(|progress| progress.rounds = number);
            let began = Instant::now();
            let first = number == 1;
            let pages_sent = Arc::new(pages);
            let goes = if first { touched.clone() } else { pages_sent.clone() };
            let midway = Arc::new(Midway::new(&self.ram, goes, self.count));
            let sum =
                self.dispatch(&Job::Round { pages: pages_sent, touched, midway, first, last: false })?;
            (pages, touched) = (Pages::of(all), Arc::default());
            self.collect(&mut pages)?;
            let took = began.elapsed();
            self.console()?;
            // What memory will be owed does not hold the guest up.
            let left_bytes = if self.will_owe() { self.disks_bytes() } else { self.left_bytes(&pages) };
            let round = Round { number, took, sent_bytes: sum.sent_bytes, left_bytes };
            let Decision { next, bytes_per_s, dirtied_bytes_per_s, expected_downtime } =
                self.convergence.after(round, self.shared.limits());
            let expected = u64::try_from(expected_downtime.as_micros()).unwrap_or(u64::MAX);
            self.shared.note_left(left_bytes);
            self.shared.note(|progress| {
                progress.bytes_per_s = bytes_per_s;
                progress.dirtied_bytes_per_s = dirtied_bytes_per_s;
                progress.expected_downtime_us = expected;
            });
            match next {
                Next::Stop => break,
                Next::GiveUp if self.mode == Mode::Auto => {
                    // Held back as far as it goes, it has not come near: the rest will be owed.
                    (self.mode, self.convergence) = (Mode::PostCopy, Convergence::patient(Mode::PostCopy));
                    if self.disks.is_empty() {
                        break;
                    }
                }
                Next::GiveUp => return Err(Error::DoesNotConverge),
                Next::Again { throttle_percent } => {
                    self.shared.note(|progress| progress.throttle_percent = throttle_percent);
                }
            }
        }
        if self.will_owe() {
            self.shared.owes();
        }
        Ok(pages)
    }

    fn will_owe(&self) -> bool {
        self.mode == Mode::PostCopy
    }

    /// Tells what is owed so far, as the guest runs: to have it go takes the target a while. Then what was written meanwhile,
    /// which is little.
    fn announce(&mut self, left: &mut Pages) -> Result<(), Error> {
        // A page that has become zero is given back there, which is refused as soon as any memory is owed, over whichever stream.
        self.dispatch(&Job::Sync)?;
        for _ in 0..2 {
            self.collect(left)?;
            self.owe(left)?;
        }
        Ok(())
    }

    /// Tells of these pages that they are owed, as far as that is news.
    fn owe(&mut self, pages: &Pages) -> Result<(), Error> {
        let fresh = pages.without(&self.owed);
        self.owed.join(&fresh);
        self.dispatch(&Job::Owe(Arc::new(fresh))).map(drop)
    }

    fn last_round(&mut self, mut left: Pages) -> Result<(), Error> {
        self.collect(&mut left)?;
        let mut number = 0;
        self.shared.note(|progress| {
            progress.rounds += 1;
            number = progress.rounds;
        });
        self.shared.note_left(self.left_bytes(&left));
        self.say(&Word::Round { number, last: true })?;
        if self.shared.is_owing() {
            // Disks are all that goes now.
            self.owe(&std::mem::take(&mut left))?;
        }
        let pages = Arc::new(left);
        let midway = Arc::new(Midway::new(&self.ram, pages.clone(), self.count));
        self.dispatch(&Job::Round { pages, touched: Arc::default(), midway, first: false, last: true })?;
        self.console()?;
        self.dispatch(&Job::End)?;
        self.shared.note_left(self.owed.count() * marks::PAGE_BYTES);
        Ok(())
    }

    fn state(&mut self) -> Result<(), Error> {
        let contents = self.shared.take().ok_or(Error::Over)?;
        let table = Table { memory_bytes: ram::bytes(&self.ram), parts: Vec::new() };
        let bytes = snapshot::bytes(&contents, &table)?;
        transfer::write(&mut self.first, Kind::State, 0, &bytes).map_err(Error::at(0))
    }

    /// From here on the table alone says whose the machine is.
    fn hand_over(&mut self) -> Result<(), Error> {
        match self.hear()? {
            // Who holds both ends hears of it by another way, and tells this one meanwhile what to do.
            Word::Ready if self.shared.is_held => {}
            Word::Ready => {
                self.shared.go_to(Phase::Commit, Event::Heard(Said::Ready))?;
                self.say(&Word::Commit)?;
            }
            other => return Err(unexpected(&self.shared, other)),
        }
        match self.hear()? {
            Word::Released => self.shared.go_to(Phase::Moved, Event::Heard(Said::Released)),
            other => Err(unexpected(&self.shared, other)),
        }
    }

    /// Has every stream do its share of a job, and holds vCPUs back meanwhile.
    fn dispatch(&mut self, job: &Job) -> Result<Sum, Error> {
        for jobs in &self.jobs {
            jobs.send(job.clone()).map_err(|_| Error::Over)?;
        }
        let midway = match job {
            Job::Round { midway, last: false, .. } if !self.will_owe() => Some(Arc::clone(midway)),
            _ => None,
        };
        let mut glanced = Instant::now();
        let mut all = Sum::default();
        let (mut missing, mut failed) = (self.jobs.len(), None);
        let mut looked = (Instant::now(), self.shared.carried_bytes());
        let mut is_let_go = false;
        while missing > 0 {
            // Nobody waits for a stream that goes nowhere, or holds a guest back, when the move is over.
            if self.shared.is_over() {
                return Err(Error::Over);
            }
            if let Some((end, longest_ms)) = self.standstill_ends
                && Instant::now() > end
            {
                return Err(Error::StoodTooLong(longest_ms));
            }
            let going = midway.as_ref().filter(|midway| midway.goes());
            if midway.is_some() && going.is_none() && !std::mem::replace(&mut is_let_go, true) {
                // Until the next round.
                self.shared.note(|progress| progress.throttle_percent = 0);
            }
            if let (Some(midway), Some(log)) = (going, &self.log)
                && glanced.elapsed() > Duration::from_millis(GLANCE_EVERY_MS)
            {
                glanced = Instant::now();
                midway.look(&self.ram, log)?.into_iter().for_each(|glimpse| self.convergence.midway(glimpse));
                let throttle_percent = self.convergence.throttle_percent();
                self.shared.note(|progress| progress.throttle_percent = throttle_percent);
            }
            let throttle_percent = self.convergence.throttle_percent();
            let pause = match going {
                Some(_) if throttle_percent > 0 => self.hold_back(throttle_percent, &mut looked)?,
                _ => Duration::from_millis(BRAKE_EVERY_MS),
            };
            match self.results.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Over),
                Ok(Ok(sum)) => {
                    all.sent_bytes += sum.sent_bytes;
                    all.skipped_bytes += sum.skipped_bytes;
                }
                Ok(Err(error)) => failed = failed.or(Some(error)),
            }
            missing -= 1;
        }
        match failed {
            None => Ok(all),
            Some(error) => Err(error),
        }
    }

    /// Holds vCPUs back that have run for their share, and answers when to look again. Nobody may have that for nothing: `looked` is
    /// when the streams had last taken so much as to be worth it, and what they had taken then.
    fn hold_back(&mut self, throttle_percent: u8, looked: &mut (Instant, u64)) -> Result<Duration, Error> {
        let carried_bytes = self.shared.carried_bytes();
        if carried_bytes - looked.1 >= THROTTLED_BYTES_MIN {
            *looked = (Instant::now(), carried_bytes);
        }
        let patience = Duration::from_millis(THROTTLED_MS_MAX);
        if looked.0.elapsed() > patience {
            return Err(Error::Stalled(THROTTLED_BYTES_MIN, patience));
        }
        Ok(self.brake.hold(&Slot::new(throttle_percent)))
    }

    /// What was written since it was last sent, to memory and to disks.
    fn left_bytes(&self, pages: &Pages) -> u64 {
        pages.count() * marks::PAGE_BYTES + self.disks_bytes()
    }

    /// The same of disks alone.
    fn disks_bytes(&self) -> u64 {
        self.disks.iter().map(Disk::changed_bytes).sum()
    }

    /// What was written since it was last sent, by vCPUs and by devices.
    fn collect(&self, pages: &mut Pages) -> Result<(), Error> {
        if let Some(log) = &self.log {
            log.collect(pages)?;
        }
        pages.add(&marks::take(&self.ram));
        Ok(())
    }

    /// Sends what the console holds beyond what was sent.
    fn console(&mut self) -> Result<(), Error> {
        loop {
            let piece = self.console.read(self.console_sent.unwrap_or(0), CONSOLE_PIECE_BYTES_MAX as usize);
            let piece = piece.map_err(|cause| Error::Host { doing: "read the console", cause })?;
            // A guest that has lapped its ring leaves a gap; what lies in it is lost here, too.
            let next = self.console_sent.unwrap_or(piece.start);
            if piece.data.is_empty() || piece.start != next {
                self.console_sent = Some(piece.end());
                return Ok(());
            }
            transfer::write(&mut self.first, Kind::Console, piece.start, &piece.data)
                .map_err(Error::at(0))?;
            self.console_sent = Some(piece.end());
        }
    }

    fn say(&mut self, word: &Word) -> Result<(), Error> {
        word.write(&mut self.first).map_err(Error::at(0))
    }

    fn hear(&mut self) -> Result<Word, Error> {
        hear(&mut self.first, 0)
    }
}

/// Opens every stream towards the target, before any thread has them; the last ones are the disks'.
pub(crate) fn open(
    streams: &mut [Stream],
    memory_bytes: u64,
    disks: &[(u16, Disk)],
    handed: Option<Handed>,
    mode: Mode,
) -> Result<(), Error> {
    let count = streams.len().saturating_sub(disks.len());
    for (index, stream) in streams.iter_mut().enumerate() {
        let open = match index.checked_sub(count).and_then(|at| disks.get(at)) {
            Some((number, disk)) => Open::of_disk(*number, disk.bytes()),
            None => match handed {
                Some(memory) => Open::of_handed(memory_bytes, memory),
                None if mode.may_owe() => Open::owing(index as u16, count as u16, memory_bytes),
                None => Open::packing(index as u16, count as u16, memory_bytes),
            },
        };
        open.write(stream).map_err(Error::at(index))?;
    }
    Ok(())
}

/// The same of streams in the place of others that broke.
pub(crate) fn open_again(streams: &mut [Stream], memory_bytes: u64) -> Result<(), Error> {
    let count = streams.len() as u16;
    for (index, stream) in streams.iter_mut().enumerate() {
        let open = Open::resuming(index as u16, count, memory_bytes);
        open.write(stream).map_err(Error::at(index))?;
    }
    Ok(())
}
