//! What a stream of a move brings, without the threads of a move: for fuzzers, as the threads take it.
use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use memory::owed::Owed;
use memory::{Extent, Ram};
use wire::migration::{SendLimits, Side};
use wire::transfer::{FrameError, Head, Kind, Open, Word, stream_of};

use super::answers::Answers;
use super::gather::Gather;
use super::{Error, Shared, Stream, pack, ram, target};
use crate::bell::Bell;

fn told(error: Error) -> String {
    crate::log::chain(&error)
}

/// Takes everything that comes over the stream of a disk, as its thread does.
pub(crate) fn take_disk(from: &mut &[u8], file: &std::fs::File, bytes: u64) -> Result<(), String> {
    let mut order = target::open_as(from, &Open::of_disk(0, bytes), 0).map_err(told)?;
    while !from.is_empty() {
        target::next_of_disk(&mut order, from, file, 0).map_err(told)?;
    }
    Ok(())
}

/// Takes everything that comes over one stream, as its thread does. Answers the words that were said.
pub(crate) fn take_stream(
    from: &mut &[u8],
    ram: &Ram,
    index: usize,
    count: usize,
    mut console: impl FnMut(u64, &[u8]),
) -> Result<usize, String> {
    let wanted = Open::new(index as u16, count as u16, ram::bytes(ram));
    let mut order = target::open_as(from, &wanted, index).map_err(told)?;
    let (mut words, mut unpacker) = (0, pack::Unpacker::new());
    let mut place = target::Place { ram, gather: None, unpacker: &mut unpacker, stream: index };
    while !from.is_empty() {
        let put = |position, piece: &[u8]| {
            console(position, piece);
            Ok(())
        };
        if let target::Came::Word(_) = target::next(&mut order, from, &mut place, put).map_err(told)? {
            words += 1;
        }
    }
    Ok(words)
}

/// The same where memory may be owed, with whoever serves those that wait for it; `device` is `/dev/userfaultfd`. Answers how many
/// pages are owed at the end.
pub(crate) fn gather_stream(
    from: &mut &[u8],
    ram: &Arc<Ram>,
    device: BorrowedFd<'_>,
    index: usize,
    count: usize,
) -> Result<u64, String> {
    let owed = Arc::new(Owed::new(device, ram).expect("memory that can be owed"));
    let pairs: Vec<_> = (0..count).map(|_| UnixStream::pair().expect("sockets")).collect();
    // Whoever asks is heard by nobody, and waits for no answer.
    let (near, _far): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let near = near.into_iter().map(|near| Stream::new(near.into()).expect("a stream")).collect();
    let bell = Arc::new(Bell::new().expect("an event"));
    let shared = Shared::new(Side::Target, true, SendLimits::default(), &bell, near, Some(Arc::clone(&owed)));
    let gather = Arc::new(Gather::new(&shared, Arc::clone(&owed), ram::bytes(ram), count));
    let serving = Arc::clone(&gather);
    let server = std::thread::spawn(move || serving.serve());
    let mut take = || {
        let wanted = Open::owing(index as u16, count as u16, ram::bytes(ram));
        let mut order = target::open_as(from, &wanted, index)?;
        let (mut is_told, mut unpacker) = (false, pack::Unpacker::new());
        while !from.is_empty() {
            if order.has_ended() && !is_told {
                is_told = true;
                gather.is_told();
                gather.begin(index);
            }
            let mut place =
                target::Place { ram, gather: Some(&gather), unpacker: &mut unpacker, stream: index };
            target::next(&mut order, from, &mut place, |_, _| Ok(()))?;
            if is_told {
                gather.ask(index);
            }
        }
        Ok(owed.count())
    };
    let left = take();
    owed.end();
    server.join().expect("whoever serves comes to an end");
    left.map_err(told)
}

/// Has a source hear `asks` on one stream, and `judge` look at each frame of its answers. Ends where it refuses.
pub(crate) fn answer_stream(
    asks: &[u8],
    ram: &Arc<Ram>,
    index: usize,
    count: usize,
    mut judge: impl FnMut(&Head) + Send,
) {
    let (near, mut far) = UnixStream::pair().expect("sockets");
    far.write_all(asks).expect("room for what is asked");
    far.shutdown(Shutdown::Write).expect("an end of it");
    let bell = Arc::new(Bell::new().expect("an event"));
    let shared = Shared::new(Side::Source, true, SendLimits::default(), &bell, Vec::new(), None);
    let mut stream = Stream::new(near.into()).expect("a stream");
    let mut answers = Answers::new(&shared, ram, index, count);
    std::thread::scope(|threads| {
        threads.spawn(move || {
            let mut far = BufReader::new(far);
            loop {
                let head = match Head::read(&mut far) {
                    Ok(head) => head,
                    Err(FrameError::Link(_)) => return,
                    Err(strange) => panic!("a source wrote what is no frame: {strange}"),
                };
                judge(&head);
                if head.kind == Kind::Part {
                    let body = u64::from(head.length);
                    let came = std::io::copy(&mut far.by_ref().take(body), &mut std::io::sink());
                    assert_eq!(came.expect("what was announced"), body);
                }
            }
        });
        while answers.until_word(&mut stream).is_ok() {}
        drop(stream);
    });
}

/// What a source has to answer for: a second reading of the same.
pub(crate) fn asked_for(mut asks: &[u8], memory_bytes: u64, index: usize, count: usize) -> Vec<Extent> {
    let mut all = Vec::new();
    while let Ok(head) = Head::read(&mut asks) {
        let part = Extent { offset: head.offset, bytes: head.length.into() };
        let is_inside = part.offset.checked_add(part.bytes).is_some_and(|end| end <= memory_bytes);
        match head.kind {
            Kind::Word if head.read_body(&mut asks).is_ok_and(|body| Word::parse(&body).is_ok()) => {}
            Kind::Ask if is_inside && stream_of(part.offset, count as u64) == index as u64 => all.push(part),
            _ => break,
        }
    }
    all
}
