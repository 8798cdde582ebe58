//! The threads of a source that send memory, or a disk, each over one stream: what they are told by the one that decides. Where
//! some of memory is owed, they end by answering for it.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};

use devices::virtio::block::Disk;
use kvm::DirtyLog;
use memory::{Pages, Ram};
use wire::transfer::{self, Head, Kind, Word};

use super::answers::{Answers, hear, unexpected};
use super::disk::Blocks;
use super::midway::Midway;
use super::pack::Packer;
use super::ram::{self, Frames, Sum};
use super::{Error, Shared, Stream};

/// What a stream's thread is to do.
#[derive(Clone)]
pub(super) enum Job {
    Round {
        pages: Arc<Pages>,
        /// See [`ram::walk`].
        touched: Arc<Pages>,
        midway: Arc<Midway>,
        first: bool,
        /// The guest stands still: nothing is held up, and nothing has to be logged again.
        last: bool,
    },
    /// The other end is to be done with all that went of memory before anything else is begun.
    Sync,
    /// What is in this set is owed from now on.
    Owe(Arc<Pages>),
    /// No more comes but what is asked for.
    End,
}

/// What goes over one stream.
pub(super) enum Share {
    /// Each so manieth piece of memory.
    Memory {
        count: usize,
    },
    Disk(Disk),
}

/// Sends memory, or a disk, over one stream.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) ram: Arc<Ram>,
    pub(super) log: Option<Arc<DirtyLog>>,
    pub(super) stream: Stream,
    pub(super) packer: Packer,
    pub(super) index: usize,
    pub(super) share: Share,
    pub(super) work: Receiver<Job>,
    pub(super) told: Sender<Result<Sum, Error>>,
}

impl Worker {
    pub(super) fn run(mut self) {
        let mut carried_bytes = 0;
        while let Ok(job) = self.work.recv() {
            let result = self.work(&job, &mut carried_bytes);
            if let Err(error) = &result {
                // At once, so that nobody waits for the others of this round.
                self.shared.fail_with(error);
            }
            if self.told.send(result).is_err() {
                return;
            }
            if matches!(job, Job::End) && self.index > 0 && self.shared.is_owing() {
                return self.serve();
            }
        }
    }

    /// Answers for what is asked for on this stream, to the end of it.
    fn serve(mut self) {
        let Share::Memory { count } = self.share else { return };
        let mut answers = Answers::new(&self.shared, &self.ram, self.index, count);
        if let Err(error) = answers.all(&mut self.stream) {
            self.shared.fail_with(&error);
        }
    }

    fn work(&mut self, job: &Job, carried_bytes: &mut u64) -> Result<Sum, Error> {
        match job {
            Job::Round { pages, touched, midway, first, last } => {
                let sum = match &self.share {
                    Share::Memory { count } => self.round(*count, (pages, touched), midway, *first, *last)?,
                    Share::Disk(disk) => self.disk_round(&disk.clone(), *first, *last)?,
                };
                *carried_bytes += sum.sent_bytes;
                Ok(sum)
            }
            Job::Sync => {
                if let Share::Memory { .. } = self.share {
                    self.sync()?;
                }
                Ok(Sum::default())
            }
            Job::Owe(pages) => {
                if let Share::Memory { count } = self.share {
                    self.owe(count, pages)?;
                }
                Ok(Sum::default())
            }
            Job::End => {
                let end = Head { kind: Kind::End, length: 0, offset: *carried_bytes };
                end.write(&mut self.stream).map_err(Error::at(self.index))?;
                Ok(Sum::default())
            }
        }
    }

    fn disk_round(&mut self, disk: &Disk, first: bool, last: bool) -> Result<Sum, Error> {
        let shared = Arc::clone(&self.shared);
        let before = |Sum { sent_bytes, skipped_bytes }: Sum| {
            if !last {
                shared.pace(sent_bytes);
            }
            shared.sent_bytes.fetch_add(sent_bytes, Ordering::Relaxed);
            shared.skipped_bytes.fetch_add(skipped_bytes, Ordering::Relaxed);
            if shared.is_over() { Err(Error::Over) } else { Ok(()) }
        };
        let mut blocks = Blocks { disk, stream: &mut self.stream, index: self.index, before: &before };
        let sum = if first { blocks.send_all()? } else { blocks.send_changes()? };
        // The last changes are made durable at the end, and little is left to do then.
        if !last && sum.sent_bytes + sum.skipped_bytes > 0 {
            self.sync()?;
        }
        Ok(sum)
    }

    /// Waits until what was sent is done with.
    fn sync(&mut self) -> Result<(), Error> {
        let sync = Head { kind: Kind::Sync, length: 0, offset: 0 };
        sync.write(&mut self.stream).map_err(Error::at(self.index))?;
        match hear(&mut self.stream, self.index)? {
            Word::Synced => Ok(()),
            other => Err(unexpected(&self.shared, other)),
        }
    }

    /// Tells which pages are owed, and waits until nothing of them is there.
    fn owe(&mut self, count: usize, pages: &Pages) -> Result<(), Error> {
        for shard in ram::shards(ram::bytes(&self.ram), self.index, count) {
            let words = pages.words_of(shard);
            if words.iter().any(|word| *word != 0) {
                let bits: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let told = transfer::write(&mut self.stream, Kind::Owed, shard.offset, &bits);
                told.map_err(Error::at(self.index))?;
            }
        }
        self.sync()
    }

    fn round(
        &mut self,
        count: usize,
        (pages, touched): (&Pages, &Pages),
        midway: &Midway,
        first: bool,
        last: bool,
    ) -> Result<Sum, Error> {
        let mut all = Sum::default();
        let shared = Arc::clone(&self.shared);
        let pace = |bytes| {
            if !last {
                shared.pace(bytes)
            }
        };
        let mut frames = Frames {
            ram: &self.ram,
            stream: &mut self.stream,
            packer: &mut self.packer,
            index: self.index,
            before: &pace,
        };
        for shard in ram::shards(ram::bytes(&self.ram), self.index, count) {
            if pages.words_of(shard).iter().all(|word| *word == 0) {
                continue;
            }
            if self.shared.is_over() {
                return Err(Error::Over);
            }
            if let (false, Some(log)) = (last, &self.log) {
                // Before it is read: what is written from now on is found again.
                log.clear(shard, pages)?;
            }
            let sum = ram::walk(&self.ram, shard, pages, touched, first, &mut frames)?;
            self.shared.sent_bytes.fetch_add(sum.sent_bytes, Ordering::Relaxed);
            self.shared.skipped_bytes.fetch_add(sum.skipped_bytes, Ordering::Relaxed);
            all.sent_bytes += sum.sent_bytes;
            all.skipped_bytes += sum.skipped_bytes;
            midway.has_gone(shard);
        }
        midway.is_through();
        Ok(all)
    }
}
