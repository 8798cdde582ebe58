//! Makes files of a stream. Nothing in it is believed: each number is compared with what the head promised before it is used,
//! memory with the digests of its table, and the whole with the digest at its end. A stream that is refused has filled no
//! more than the head said, and the caller removes it.
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt};
use wire::saved::table::{PART_BYTES_MAX, Part, Table};
use wire::saved::{Digest, form};

use super::{
    DIGEST_BYTES, DISKS, END, FRAME_HEAD_BYTES, Head, MAGIC, MEMORY, PAGE_BYTES, Refusal, STATE, VERSION,
    check_head_bytes, file_name,
};
use crate::upload;
use crate::volumes::fill::Watch;

/// Reads the head, and answers it with the digest so far.
pub(in crate::snapshots) async fn read_head(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<(Head, Sha256), Refusal> {
    let mut start = [0; 16];
    fill(stream, &mut start).await?;
    let ([magic, numbers], _) = start.as_chunks::<8>() else {
        return Err(corrupt("it is too short"));
    };
    if magic != MAGIC {
        return Err(corrupt("it does not begin like an exported snapshot"));
    }
    let (version, bytes) = halves(*numbers);
    if version != VERSION {
        return Err(Refusal::Corrupt(format!("it has version {version}; this host reads version {VERSION}")));
    }
    let mut text = vec![0; check_head_bytes(bytes)?];
    fill(stream, &mut text).await?;
    let unreadable = |cause: serde_json::Error| {
        let told: String = cause.to_string().chars().take(crate::snapshots::limits::TEXT_CHARS_MAX).collect();
        Refusal::Corrupt(format!("its head cannot be read: {told}"))
    };
    let head: Head = serde_json::from_slice(&text).map_err(unreadable)?;
    head.check().map_err(Refusal::Corrupt)?;
    let mut digest = Sha256::new();
    digest.update(start);
    digest.update(text);
    Ok((head, digest))
}

async fn fill(stream: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> Result<(), Refusal> {
    match tokio::time::timeout(upload::SILENCE_MAX, stream.read_exact(buffer)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(cause)) => Err(unreadable(cause)),
        Err(_) => Err(Refusal::Source(io::ErrorKind::TimedOut.into())),
    }
}

/// Makes the files of what follows the head, in `directory`, which is empty. They are not flushed.
pub(in crate::snapshots) fn read_files(
    source: &mut dyn Read,
    digest: Sha256,
    head: &Head,
    directory: &Path,
    watch: &Watch,
) -> Result<(), Refusal> {
    watch.total.store(head.data_bytes, Ordering::Relaxed);
    let mut frames = Frames {
        source,
        digest,
        buffer: vec![0; PART_BYTES_MAX as usize],
        all: head.data_bytes,
        left: head.data_bytes,
    };
    let mut next = frames.next(watch)?;
    let mut table = None;
    for number in head.files() {
        let length = head.file_bytes(number).unwrap_or_default();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(directory.join(file_name(number))).map_err(Refusal::Store)?;
        file.set_len(length).map_err(Refusal::Store)?;
        let mut parts = Expected::of(number, table.take());
        let mut end = 0;
        while let Some(frame) = next.take_if(|frame| frame.file == number) {
            let bytes = frames.buffer.get(..frame.bytes).unwrap_or_default();
            let after = frame.offset.checked_add(frame.bytes as u64).filter(|after| *after <= length);
            let after = after.filter(|_| frame.offset >= end);
            end = after.ok_or_else(|| frame.wrong("is outside, or follows what comes after it"))?;
            parts.take(&frame, bytes)?;
            file.write_all_at(bytes, frame.offset).map_err(Refusal::Store)?;
            next = frames.next(watch)?;
        }
        if !parts.is_complete(end, length) {
            return Err(Refusal::Corrupt(format!("{} is not complete", file_name(number))));
        }
        if number == STATE {
            table = Some(read_table(&file, head)?);
        }
    }
    match next {
        None => frames.end(),
        Some(frame) => Err(frame.wrong("belongs to a file that is not to be, or came before")),
    }
}

/// Reads the state file for the table of memory's parts, after it was compared with its digest.
fn read_table(file: &File, head: &Head) -> Result<Vec<Part>, Refusal> {
    let Some(memory) = &head.memory else { return Ok(Vec::new()) };
    let mut bytes = vec![0; usize::try_from(memory.state_bytes).unwrap_or_default()];
    file.read_exact_at(&mut bytes, 0).map_err(Refusal::Store)?;
    if Digest(Sha256::digest(&bytes).into()) != memory.root {
        return Err(corrupt("the machine's state is not the one that its head names"));
    }
    let damaged = |cause: form::FormError| Refusal::Corrupt(cause.to_string());
    let table = Table::parse(&mut form::split(&bytes).map_err(damaged)?).map_err(damaged)?;
    if table.memory_bytes != head.memory_bytes {
        return Err(corrupt("the machine's state tells of another amount of memory"));
    }
    Ok(table.parts)
}

/// What a file's frames must be.
enum Expected {
    /// From the first byte to the last, without a gap.
    All,
    /// These and no others.
    Parts(std::vec::IntoIter<Part>),
    /// Whole pages, wherever there are any.
    Pages,
}

impl Expected {
    fn of(file: u32, table: Option<Vec<Part>>) -> Expected {
        match (file, table) {
            (STATE, _) => Expected::All,
            (MEMORY, table) => Expected::Parts(table.unwrap_or_default().into_iter()),
            _ => Expected::Pages,
        }
    }

    /// Compares a frame, which lies behind the one before it.
    fn take(&mut self, frame: &Frame, bytes: &[u8]) -> Result<(), Refusal> {
        let parts = match self {
            Expected::All => return Ok(()),
            // Crumbs would take far more of the disk than the head says.
            Expected::Pages => {
                let is_whole = frame.offset.is_multiple_of(PAGE_BYTES)
                    && (bytes.len() as u64).is_multiple_of(PAGE_BYTES);
                return if is_whole { Ok(()) } else { Err(frame.wrong("is not whole pages")) };
            }
            Expected::Parts(parts) => parts,
        };
        let next =
            parts.next().filter(|part| part.offset == frame.offset && part.bytes as usize == bytes.len());
        let part = next.ok_or_else(|| frame.wrong("is no part of the machine's memory"))?;
        match part.digest == Digest(Sha256::digest(bytes).into()) {
            true => Ok(()),
            false => Err(frame.wrong("is not what was saved there")),
        }
    }

    fn is_complete(&mut self, end: u64, length: u64) -> bool {
        match self {
            Expected::All => end == length,
            Expected::Parts(parts) => parts.next().is_none(),
            Expected::Pages => true,
        }
    }
}

/// A frame that was read into the buffer.
struct Frame {
    file: u32,
    bytes: usize,
    offset: u64,
}

impl Frame {
    fn wrong(&self, what: &str) -> Refusal {
        let place = match self.file {
            STATE => "the machine's state".to_owned(),
            MEMORY => "memory".to_owned(),
            disk => format!("disk {}", disk.saturating_sub(DISKS)),
        };
        Refusal::Corrupt(format!("{} bytes of {place} at {:#x}: this {what}", self.bytes, self.offset))
    }
}

struct Frames<'a> {
    source: &'a mut dyn Read,
    digest: Sha256,
    buffer: Vec<u8>,
    /// Bytes of data in all, and those that are still to come.
    all: u64,
    left: u64,
}

impl Frames<'_> {
    /// The next frame of data; none at the end mark, which is taken.
    fn next(&mut self, watch: &Watch) -> Result<Option<Frame>, Refusal> {
        watch.check().map_err(|_| Refusal::Cancelled)?;
        let mut start = [0; FRAME_HEAD_BYTES];
        self.source.read_exact(&mut start).map_err(unreadable)?;
        self.digest.update(start);
        let ([numbers, offset], _) = start.as_chunks::<8>() else { return Err(corrupt("it is too short")) };
        let ((file, bytes), offset) = (halves(*numbers), u64::from_le_bytes(*offset));
        if file == END {
            let sound = bytes as usize == DIGEST_BYTES && self.left == 0 && offset == self.all;
            return if sound { Ok(None) } else { Err(corrupt("it ends before all of its data has come")) };
        }
        let frame = Frame { file, bytes: bytes as usize, offset };
        if !(1..=PART_BYTES_MAX).contains(&bytes) {
            return Err(frame.wrong("cannot be one frame"));
        }
        let Some(left) = self.left.checked_sub(u64::from(bytes)) else {
            return Err(corrupt("it holds more data than its head says"));
        };
        let buffer = self.buffer.get_mut(..frame.bytes).unwrap_or_default();
        self.source.read_exact(buffer).map_err(unreadable)?;
        self.digest.update(buffer);
        self.left = left;
        watch.done.fetch_add(u64::from(bytes), Ordering::Relaxed);
        Ok(Some(frame))
    }

    /// Compares the digest, behind which nothing may follow.
    fn end(self) -> Result<(), Refusal> {
        let mut told = [0; DIGEST_BYTES];
        self.source.read_exact(&mut told).map_err(unreadable)?;
        if self.digest.finalize().as_slice() != told {
            return Err(corrupt("its digest is another: something in it was changed on the way"));
        }
        match self.source.read(&mut [0]).map_err(unreadable)? {
            0 => Ok(()),
            _ => Err(corrupt("something follows its end")),
        }
    }
}

fn halves(bytes: [u8; 8]) -> (u32, u32) {
    let number = u64::from_le_bytes(bytes);
    (number as u32, (number >> 32) as u32)
}

fn corrupt(detail: &str) -> Refusal {
    Refusal::Corrupt(detail.to_owned())
}

fn unreadable(cause: io::Error) -> Refusal {
    match cause.kind() {
        io::ErrorKind::UnexpectedEof => corrupt("the stream ends in the middle"),
        _ => Refusal::Source(cause),
    }
}
