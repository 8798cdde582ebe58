//! The end that is to have the machine. One thread for each stream takes memory as it comes; the first stream's also hears
//! what the source decides. Everything that is read is judged before it is believed.
use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};

use devices::virtio::block::Disk;
use memory::owed::Owed;
use memory::{Extent, Ram};
use vm_memory::ReadVolatile;
use wire::migration::{Phase, SendLimits, Side};
use wire::transfer::{BLOCK_BYTES_MAX, FrameError, Handed, Head, Kind, Open, Order, Word};

use super::gather::Gather;
use super::pack::Unpacker;
use super::phase::{Event, Said};
use super::source::copies;
use super::threads::Threads;
use super::{Error, Shared, Stream, disk, ram};
use crate::bell::Bell;
use crate::console::Console;
use crate::snapshot::{self, Contents};

/// A target from its begin on. Dropped, its streams are shut and its threads waited for. Only they have memory, as of a source.
pub(crate) struct Target {
    pub(crate) shared: Arc<Shared>,
    console: Arc<Console>,
    /// Streams of memory.
    count: usize,
    gather: Option<Arc<Gather>>,
    threads: Threads,
    /// Serves whoever touches what is owed.
    server: Threads,
}

impl Target {
    /// Begins to receive a machine into `ram`, which is all zeroes or was `handed` over, and these disks. The last of
    /// `streams` are the disks', in their order. Without `owed` all of memory comes before the machine.
    pub(crate) fn start(
        (ram, console): (&Arc<Ram>, &Arc<Console>),
        disks: Vec<(u16, Disk)>,
        streams: Vec<Stream>,
        is_held: bool,
        (handed, owed): (Option<Handed>, Option<Owed>),
        bell: &Arc<Bell>,
    ) -> Result<Target, Error> {
        if streams.is_empty() {
            return Err(Error::Streams { stream: 0 });
        }
        let owed = owed.map(Arc::new);
        let copied = copies(&streams)?;
        let shared = Shared::new(Side::Target, is_held, SendLimits::default(), bell, copied, owed.clone());
        let count = streams.len().saturating_sub(disks.len());
        let gather = owed.map(|owed| Arc::new(Gather::new(&shared, owed, ram::bytes(ram), count)));
        let mut target = Target {
            shared,
            console: Arc::clone(console),
            count,
            gather,
            threads: Threads::default(),
            server: Threads::default(),
        };
        if let Some(gather) = &target.gather {
            let gather = Arc::clone(gather);
            target.server.start(move || gather.serve())?;
        }
        let others_count = streams.len().saturating_sub(1);
        let mut disks = disks.into_iter();
        let (told, others) = channel();
        let mut others = Some(others);
        for (index, stream) in streams.into_iter().enumerate() {
            let listener = target.listener(ram, (stream, index), handed, (others_count, &told));
            let disk = if index < count { None } else { disks.next() };
            let others = others.take();
            target.threads.start(move || listener.run(others, disk))?;
        }
        Ok(target)
    }

    fn listener(
        &self,
        ram: &Arc<Ram>,
        (stream, index): (Stream, usize),
        handed: Option<Handed>,
        (others_count, told): (usize, &Sender<()>),
    ) -> Listener {
        Listener {
            shared: Arc::clone(&self.shared),
            ram: Arc::clone(ram),
            console: Arc::clone(&self.console),
            gather: self.gather.clone(),
            stream,
            unpacker: Unpacker::new(),
            index,
            count: self.count,
            handed,
            others_count,
            told: told.clone(),
        }
    }

    /// Goes on over other streams with what is still owed of `ram`.
    pub(crate) fn resume(&mut self, ram: &Arc<Ram>, streams: Vec<Stream>) -> Result<(), Error> {
        self.shared.shut();
        self.threads.join();
        self.shared.relink(copies(&streams)?);
        let (told, _) = channel();
        for (index, stream) in streams.into_iter().enumerate() {
            let listener = self.listener(ram, (stream, index), None, (0, &told));
            self.threads.start(move || listener.resume())?;
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
        if let Some(owed) = &self.shared.owed {
            owed.end();
        }
        self.server.join();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.end();
    }
}

/// Takes what comes over one stream.
struct Listener {
    shared: Arc<Shared>,
    ram: Arc<Ram>,
    console: Arc<Console>,
    gather: Option<Arc<Gather>>,
    stream: Stream,
    unpacker: Unpacker,
    index: usize,
    count: usize,
    /// The memory, where it is here already.
    handed: Option<Handed>,
    /// Streams beside the first.
    others_count: usize,
    told: Sender<()>,
}

impl Listener {
    fn run(mut self, others: Option<Receiver<()>>, disk: Option<(u16, Disk)>) {
        let result = match (&others, disk) {
            (Some(others), _) => self.decide(others),
            (None, Some((number, disk))) => self.take_disk(number, &disk),
            (None, None) => self.take_memory(),
        };
        if let Err(error) = result {
            self.shared.fail_with(&error);
            // Who still sends finds out.
            self.stream.shut();
        }
    }

    /// The first stream's thread.
    fn decide(&mut self, others: &Receiver<()>) -> Result<(), Error> {
        let mut order = self.open()?;
        self.wait_for_others(others)?;
        self.shared.done(Phase::Rounds)?;
        let contents = loop {
            match self.next(&mut order)? {
                Came::Memory => {}
                Came::Word(Word::Round { number, last }) => {
                    self.shared.hear_of_round(last);
                    self.shared.note(|progress| progress.rounds = number)
                }
                Came::Word(word) => return Err(self.unexpected(word)),
                Came::State(contents) => break contents,
            }
        };
        self.shared.put(*contents);
        // Any stream may say that memory is owed, until it has ended.
        self.wait_for_others(others)?;
        if self.shared.is_owing() {
            return self.decide_owing(&mut order);
        }
        self.stream.expect_soon();
        self.shared.give(Event::Heard(Said::State));
        // The main thread builds the machine, and says that it is ready. Whoever holds both ends may have had it run before this
        // thread came to see that; the source is still to be told so on this stream, which must not end before.
        if !matches!(self.shared.wait_through(Phase::State), Phase::Ready | Phase::Release) {
            return Err(Error::Over);
        }
        match self.next(&mut order)? {
            Came::Word(Word::Commit) if !self.shared.is_held => self.shared.give(Event::Heard(Said::Commit)),
            Came::Word(word) => return Err(self.unexpected(word)),
            _ => return Err(Error::Streams { stream: self.index }),
        };
        Ok(())
    }

    /// The rest of it where some of memory is owed: whoever builds the machine, or runs it, may wait for what comes here.
    fn decide_owing(&mut self, order: &mut Order) -> Result<(), Error> {
        if let Some(gather) = &self.gather {
            gather.is_told();
        }
        self.shared.give(Event::Heard(Said::State));
        self.gather(order)
    }

    /// Asks for what is owed of this stream's memory until all of it is here; on the first one, until nothing more is to be heard.
    fn gather(&mut self, order: &mut Order) -> Result<(), Error> {
        let Some(gather) = self.gather.clone() else { return Ok(()) };
        gather.begin(self.index);
        while !self.shared.is_over() && (self.index == 0 || gather.awaits(self.index)) {
            match gather.awaits(self.index) {
                true => self.stream.expect_soon(),
                // Only the link itself tells that it is gone.
                false => self.stream.expect_whenever(),
            }
            match self.next(order)? {
                Came::Memory => gather.ask(self.index),
                Came::Word(Word::Commit) if !self.shared.is_held => {
                    self.shared.give(Event::Heard(Said::Commit));
                }
                Came::Word(word) => return Err(self.unexpected(word)),
                Came::State(_) => return Err(Error::Streams { stream: self.index }),
            }
        }
        Ok(())
    }

    /// All that a stream is for that stands in for one that broke.
    fn resume(mut self) {
        let wanted = Open::resuming(self.index as u16, self.count as u16, ram::bytes(&self.ram));
        let gathered =
            open_as(&mut self.stream, &wanted, self.index).and_then(|mut order| self.gather(&mut order));
        if let Err(error) = gathered {
            self.shared.fail_with(&error);
        }
    }

    /// The threads of all others.
    fn take_memory(&mut self) -> Result<(), Error> {
        let mut order = self.open()?;
        // When nobody listens any more, the first stream has told why.
        let _ = self.told.send(());
        while !order.has_ended() {
            self.next(&mut order)?;
        }
        let _ = self.told.send(());
        self.gather(&mut order)
    }

    /// The thread of a disk.
    fn take_disk(&mut self, number: u16, disk: &Disk) -> Result<(), Error> {
        let wanted = Open::of_disk(number, disk.bytes());
        let mut order = open_as(&mut self.stream, &wanted, self.index)?;
        let _ = self.told.send(());
        while !order.has_ended() {
            if self.shared.is_over() {
                return Err(Error::Over);
            }
            let head = next_of_disk(&mut order, &mut self.stream, disk.file(), self.index)?;
            match head.kind {
                Kind::Sync => Word::Synced.write(&mut self.stream).map_err(Error::at(self.index))?,
                Kind::Block => self.came(head.length.into()),
                // What is zero, though it was written, had to be read at the source: it comes no faster than data.
                Kind::Hole => self.came(head.length.min(BLOCK_BYTES_MAX).into()),
                _ => {}
            }
        }
        let _ = self.told.send(());
        Ok(())
    }

    fn wait_for_others(&self, others: &Receiver<()>) -> Result<(), Error> {
        let mut missing = self.others_count;
        while missing > 0 && !self.shared.is_over() {
            // A stream that breaks ends the move, which ends the waiting.
            if others.recv_timeout(LOOK_EVERY).is_ok() {
                missing -= 1;
            }
        }
        if missing == 0 { Ok(()) } else { Err(Error::Over) }
    }

    fn open(&mut self) -> Result<Order, Error> {
        let memory_bytes = ram::bytes(&self.ram);
        let wanted = match self.handed {
            Some(memory) => Open::of_handed(memory_bytes, memory),
            None if self.gather.is_some() => Open::owing(self.index as u16, self.count as u16, memory_bytes),
            None => Open::new(self.index as u16, self.count as u16, memory_bytes),
        };
        open_as(&mut self.stream, &wanted, self.index)
    }

    fn next(&mut self, order: &mut Order) -> Result<Came, Error> {
        if self.shared.is_over() {
            return Err(Error::Over);
        }
        let (console, before) = (&self.console, order.carried_bytes());
        let mut place = Place {
            ram: &self.ram,
            gather: self.gather.as_deref(),
            unpacker: &mut self.unpacker,
            stream: self.index,
        };
        let came = next(order, &mut self.stream, &mut place, |position, data| {
            let put = console.adopt(position, data);
            put.map_err(|cause| Error::Host { doing: "write the console", cause })
        })?;
        if matches!(came, Came::Memory) {
            self.came(order.carried_bytes() - before);
        }
        Ok(came)
    }

    /// Counts what came, over all streams.
    fn came(&self, bytes: u64) {
        self.shared.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.shared.note(|_| ());
    }

    fn unexpected(&self, word: Word) -> Error {
        match word {
            Word::Abort { detail } => {
                let why = format!("the other end keeps the machine: {detail}");
                self.shared.fail(Event::Heard(Said::Abort), why);
                Error::Over
            }
            other => Error::Unexpected(other),
        }
    }
}

/// How often a thread that waits for others looks whether the move has ended.
const LOOK_EVERY: std::time::Duration = std::time::Duration::from_millis(5);

/// What came over a stream.
pub(super) enum Came {
    /// Memory or console output, which is where it belongs now, or the end of it.
    Memory,
    Word(Word),
    State(Box<Contents>),
}

/// Reads the first frame of a stream, which is the one that belongs here.
pub(super) fn open_as(from: &mut impl Read, wanted: &Open, index: usize) -> Result<Order, Error> {
    let at = Error::at(index);
    let head = Head::read(from).map_err(&at)?;
    if head.kind != Kind::Open {
        return Err(at(FrameError::Order(head.kind)));
    }
    let open = Open::parse(&head.read_body(from).map_err(&at)?).map_err(&at)?;
    if !open.is_for(wanted) {
        return Err(Error::Streams { stream: index });
    }
    Ok(Order::new(&open))
}

/// Where memory belongs that comes over a stream.
pub(super) struct Place<'a> {
    pub(super) ram: &'a Ram,
    /// Where some of it may be owed.
    pub(super) gather: Option<&'a Gather>,
    pub(super) unpacker: &'a mut Unpacker,
    pub(super) stream: usize,
}

impl Place<'_> {
    fn take(&mut self, head: &Head, from: &mut (impl Read + ReadVolatile)) -> Result<(), Error> {
        ram::take(self.ram, head, from, self.unpacker, self.stream)
    }
}

/// Reads one frame and puts memory where it belongs. This is all that ever reads what a source sends.
pub(super) fn next(
    order: &mut Order,
    from: &mut (impl Read + ReadVolatile),
    place: &mut Place<'_>,
    mut console: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<Came, Error> {
    let stream = place.stream;
    let at = Error::at(stream);
    let head = Head::read(from).map_err(&at)?;
    order.admit(&head).map_err(&at)?;
    match (head.kind, place.gather) {
        (Kind::Part | Kind::Packed | Kind::Zero, Some(gather)) if order.has_ended() => {
            gather.take(&head, from, place.unpacker, stream)?;
        }
        // Whoever puts memory that is owed would wait for itself.
        (Kind::Part | Kind::Packed | Kind::Zero, Some(gather))
            if gather.owes(Extent { offset: head.offset, bytes: head.length.into() }) =>
        {
            return Err(at(FrameError::Order(head.kind)));
        }
        (Kind::Part | Kind::Packed | Kind::Zero, _) => place.take(&head, from)?,
        (Kind::Console, _) => console(head.offset, &head.read_body(from).map_err(&at)?)?,
        (Kind::Word, _) => {
            return Ok(Came::Word(Word::parse(&head.read_body(from).map_err(&at)?).map_err(&at)?));
        }
        (Kind::State, _) => {
            let (contents, table) = snapshot::parse(&head.read_body(from).map_err(&at)?)?;
            // Memory came by itself.
            if !table.parts.is_empty() || table.memory_bytes != ram::bytes(place.ram) {
                return Err(Error::Streams { stream });
            }
            return Ok(Came::State(Box::new(contents)));
        }
        (Kind::Owed, Some(gather)) => gather.expect(&head, &head.read_body(from).map_err(&at)?)?,
        (Kind::Sync, Some(gather)) => gather.synced(stream)?,
        // Of the others the order admits only the end.
        _ => {}
    }
    Ok(Came::Memory)
}

/// Reads one frame of a disk and puts it where it belongs. Answers what it was.
pub(super) fn next_of_disk(
    order: &mut Order,
    from: &mut impl Read,
    file: &File,
    stream: usize,
) -> Result<Head, Error> {
    let at = Error::at(stream);
    let head = Head::read(from).map_err(&at)?;
    order.admit(&head).map_err(&at)?;
    disk::take(file, &head, from, stream)?;
    Ok(head)
}
