//! What a source does when it has told which pages of memory it owes: it answers for those that are asked for, as they are. Its
//! machine stands still, so they do not change. On the first stream it hears words in between.
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::{Extent, Pages, Ram};
use wire::migration::Phase;
use wire::transfer::{FrameError, Head, Kind, Open, Order, Word};

use super::pack::Packer;
use super::phase::{Event, Said};
use super::ram::{self, Frames};
use super::{Error, Shared, Stream};

/// Answers for the memory that one stream has.
pub(super) struct Answers {
    shared: Arc<Shared>,
    ram: Arc<Ram>,
    index: usize,
    order: Order,
    packer: Packer,
}

impl Answers {
    pub(super) fn new(shared: &Arc<Shared>, ram: &Arc<Ram>, index: usize, count: usize) -> Answers {
        let open = Open::resuming(index as u16, count as u16, ram::bytes(ram));
        let (shared, ram) = (Arc::clone(shared), Arc::clone(ram));
        Answers { shared, ram, index, order: Order::new(&open), packer: Packer::new() }
    }

    /// Answers until the stream ends.
    pub(super) fn all(&mut self, stream: &mut Stream) -> Result<(), Error> {
        stream.expect_whenever();
        while !self.shared.is_over() {
            let head = Head::read(stream).map_err(Error::at(self.index))?;
            self.one(&head, stream)?;
        }
        Ok(())
    }

    /// Answers until a word comes, and answers that.
    pub(super) fn until_word(&mut self, stream: &mut Stream) -> Result<Word, Error> {
        loop {
            let at = Error::at(self.index);
            let head = Head::read(stream).map_err(&at)?;
            if head.kind == Kind::Word {
                return Word::parse(&head.read_body(stream).map_err(&at)?).map_err(&at);
            }
            self.one(&head, stream)?;
        }
    }

    fn one(&mut self, ask: &Head, stream: &mut Stream) -> Result<(), Error> {
        self.order.admit_ask(ask).map_err(Error::at(self.index))?;
        let shared = Arc::clone(&self.shared);
        let pace = |bytes| shared.pace(bytes);
        let mut frames =
            Frames { ram: &self.ram, stream, packer: &mut self.packer, index: self.index, before: &pace };
        let part = Extent { offset: ask.offset, bytes: ask.length.into() };
        let sum = ram::walk_row(&self.ram, part, &Pages::default(), false, &mut frames)?;
        self.shared.sent_bytes.fetch_add(sum.sent_bytes, Ordering::Relaxed);
        self.shared.skipped_bytes.fetch_add(sum.skipped_bytes, Ordering::Relaxed);
        self.shared.note(|_| ());
        Ok(())
    }
}

/// The end of a source that owes memory, on the first stream: from the target's *ready*, or from where a link was found again, until
/// it has all.
pub(super) fn see_out(answers: &mut Answers, stream: &mut Stream) -> Result<(), Error> {
    let shared = Arc::clone(&answers.shared);
    stream.expect_whenever();
    loop {
        match answers.until_word(stream)? {
            // Who holds both ends hears of it by another way, and tells this one meanwhile what to do.
            Word::Ready if shared.is_held => {}
            Word::Ready => {
                shared.go_to(Phase::Commit, Event::Heard(Said::Ready))?;
                Word::Commit.write(stream).map_err(Error::at(0))?;
            }
            Word::Released => {
                shared.give(Event::Heard(Said::Released));
                stream.take_time();
            }
            Word::Whole => {
                shared.note_left(0);
                let moved = shared.go_to(Phase::Moved, Event::Heard(Said::Whole));
                shared.shut();
                return moved;
            }
            other => return Err(unexpected(&shared, other)),
        }
    }
}

/// A refusal counts in every phase; anything else is nonsense.
pub(super) fn unexpected(shared: &Shared, word: Word) -> Error {
    match word {
        Word::Refused { detail } => {
            let why = format!("the other end refused: {detail}");
            shared.fail(Event::Heard(Said::Refused), why);
            Error::Over
        }
        other => Error::Unexpected(other),
    }
}

/// What the other end says on a stream.
pub(super) fn hear(stream: &mut Stream, index: usize) -> Result<Word, Error> {
    let at = Error::at(index);
    let head = Head::read(stream).map_err(&at)?;
    if head.kind != Kind::Word {
        return Err(at(FrameError::Order(head.kind)));
    }
    Word::parse(&head.read_body(stream).map_err(&at)?).map_err(&at)
}
