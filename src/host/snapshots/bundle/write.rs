//! Makes a stream of a snapshot's files. How long it is going to be is known before the first byte.
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use sha2::{Digest as _, Sha256};
use wire::saved::form;
use wire::saved::table::{PART_BYTES_MAX, Table};

use super::{
    DIGEST_BYTES, END, FRAME_HEAD_BYTES, Head, MEMORY, PAGE_BYTES, STATE, file_name, frame_head, preamble,
};
use crate::volumes::layers::Layers;

/// A stream that can be written.
pub(in crate::snapshots) struct Plan {
    head: Head,
    files: Vec<(u32, Layers)>,
    frames: u64,
}

impl Plan {
    /// Opens the files by their names, which never change, and counts their data. `data_bytes` of `head` is filled in.
    pub(in crate::snapshots) fn of(
        open: impl Fn(&str) -> io::Result<Layers>,
        head: Head,
    ) -> io::Result<Plan> {
        let mut files = Vec::new();
        for number in head.files() {
            let file = open(&file_name(number))?;
            let length = head.file_bytes(number).unwrap_or_default();
            if file.own.metadata()?.len() != length {
                let detail = format!("{} does not have the {length} bytes it had", file_name(number));
                return Err(io::Error::new(io::ErrorKind::InvalidData, detail));
            }
            files.push((number, file));
        }
        let mut plan = Plan { head, files, frames: 0 };
        let (mut frames, mut data_bytes) = (0, 0);
        plan.pieces(|_, _, piece| {
            frames += 1;
            data_bytes += piece.end - piece.start;
            Ok(())
        })?;
        (plan.frames, plan.head.data_bytes) = (frames, data_bytes);
        Ok(plan)
    }

    /// Length of the stream in bytes.
    pub(in crate::snapshots) fn bytes(&self) -> io::Result<u64> {
        let around = preamble(&self.head)?.len() + DIGEST_BYTES;
        Ok(self.head.data_bytes + around as u64 + (self.frames + 1) * FRAME_HEAD_BYTES as u64)
    }

    /// Writes the stream.
    pub(in crate::snapshots) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut to = Hashing { to, digest: Sha256::new() };
        to.write_all(&preamble(&self.head)?)?;
        let mut buffer = Vec::new();
        self.pieces(|number, file, piece| {
            let bytes = u32::try_from(piece.end - piece.start).map_err(io::Error::other)?;
            buffer.resize(bytes as usize, 0);
            file.read_exact_at(&mut buffer, piece.start)?;
            to.write_all(&frame_head(number, bytes, piece.start))?;
            to.write_all(&buffer)
        })?;
        to.write_all(&frame_head(END, DIGEST_BYTES as u32, self.head.data_bytes))?;
        let digest = to.digest.finalize();
        to.to.write_all(&digest)
    }

    /// Gives each piece of data that is to be a frame, in order.
    fn pieces(&self, mut give: impl FnMut(u32, &Layers, Range<u64>) -> io::Result<()>) -> io::Result<()> {
        for (number, file) in &self.files {
            let length = self.head.file_bytes(*number).unwrap_or_default();
            match (*number, self.files.first()) {
                (STATE, _) => cut(0..length).try_for_each(|piece| give(STATE, file, piece))?,
                (MEMORY, Some((STATE, state))) => {
                    for part in table(&state.own, self.head.file_bytes(STATE).unwrap_or_default())?.parts {
                        give(MEMORY, file, part.offset..part.offset + u64::from(part.bytes))?;
                    }
                }
                (disk, _) => {
                    // Data in blocks smaller than a page: no page is given twice.
                    let mut given = 0;
                    for extent in file.data(0..length) {
                        let (extent, _) = extent?;
                        let start = (extent.start - extent.start % PAGE_BYTES).max(given);
                        let end = extent.end.next_multiple_of(PAGE_BYTES).min(length);
                        cut(start..end).try_for_each(|piece| give(disk, file, piece))?;
                        given = given.max(end);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The table of memory's parts in a state file.
fn table(state: &File, state_bytes: u64) -> io::Result<Table> {
    let mut bytes = vec![0; usize::try_from(state_bytes).map_err(io::Error::other)?];
    state.read_exact_at(&mut bytes, 0)?;
    let invalid = |cause| io::Error::new(io::ErrorKind::InvalidData, cause);
    Table::parse(&mut form::split(&bytes).map_err(invalid)?).map_err(invalid)
}

/// The same bytes, in pieces that fit into a frame.
fn cut(extent: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = extent.end;
    let cut = move |at: u64| at..end.min(at + u64::from(PART_BYTES_MAX));
    extent.step_by(PART_BYTES_MAX as usize).map(cut)
}

/// Hashes what is written through it.
struct Hashing<'a> {
    to: &'a mut dyn Write,
    digest: Sha256,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.digest.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
