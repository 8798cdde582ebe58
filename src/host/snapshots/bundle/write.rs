//! Makes a stream of a snapshot's files. How long it is going to be is known before the first byte.
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use wire::saved::form;
use wire::saved::table::{PART_BYTES_MAX, Table};

use super::{DIGEST_BYTES, END, FRAME_HEAD_BYTES, Head, MEMORY, STATE, file_name, frame_head, preamble};
use crate::volumes::fill;

/// A stream that can be written.
pub(in crate::snapshots) struct Plan {
    head: Head,
    files: Vec<(u32, File, Vec<Range<u64>>)>,
}

impl Plan {
    /// Opens the files in `directory`, which never change, and looks where their data is. `data_bytes` of `head` is
    /// filled in.
    pub(in crate::snapshots) fn of(directory: &Path, mut head: Head) -> io::Result<Plan> {
        let mut files: Vec<(u32, File, Vec<Range<u64>>)> = Vec::new();
        for number in head.files() {
            let file = File::open(directory.join(file_name(number)))?;
            let length = head.file_bytes(number).unwrap_or_default();
            if file.metadata()?.len() != length {
                let detail = format!("{} does not have the {length} bytes it had", file_name(number));
                return Err(io::Error::new(io::ErrorKind::InvalidData, detail));
            }
            let extents = match (number, files.last()) {
                (MEMORY, Some((STATE, state, _))) => {
                    parts(state, head.file_bytes(STATE).unwrap_or_default())?
                }
                (STATE, _) => pieces(std::iter::once(0..length)),
                _ => pieces(fill::extents(&file, length)?),
            };
            files.push((number, file, extents));
        }
        head.data_bytes =
            files.iter().flat_map(|(.., extents)| extents).map(|extent| extent.end - extent.start).sum();
        Ok(Plan { head, files })
    }

    /// Length of the stream in bytes.
    pub(in crate::snapshots) fn bytes(&self) -> io::Result<u64> {
        let frames: usize = self.files.iter().map(|(.., extents)| extents.len()).sum();
        let around = preamble(&self.head)?.len() + (frames + 1) * FRAME_HEAD_BYTES + DIGEST_BYTES;
        Ok(self.head.data_bytes + around as u64)
    }

    /// Writes the stream.
    pub(in crate::snapshots) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut to = Hashing { to, digest: Sha256::new() };
        to.write_all(&preamble(&self.head)?)?;
        let mut buffer = Vec::new();
        for (number, file, extents) in &self.files {
            for extent in extents {
                let bytes = u32::try_from(extent.end - extent.start).map_err(io::Error::other)?;
                buffer.resize(bytes as usize, 0);
                file.read_exact_at(&mut buffer, extent.start)?;
                to.write_all(&frame_head(*number, bytes, extent.start))?;
                to.write_all(&buffer)?;
            }
        }
        to.write_all(&frame_head(END, DIGEST_BYTES as u32, self.head.data_bytes))?;
        let digest = to.digest.finalize();
        to.to.write_all(&digest)
    }
}

/// The parts of memory, as the state file tells them.
fn parts(state: &File, state_bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut bytes = vec![0; usize::try_from(state_bytes).map_err(io::Error::other)?];
    state.read_exact_at(&mut bytes, 0)?;
    let invalid = |cause| io::Error::new(io::ErrorKind::InvalidData, cause);
    let table = Table::parse(&mut form::split(&bytes).map_err(invalid)?).map_err(invalid)?;
    let ranges = table.parts.iter().map(|part| part.offset..part.offset + u64::from(part.bytes));
    Ok(ranges.collect())
}

/// The same bytes, in pieces that fit into a frame.
fn pieces(extents: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let step = u64::from(PART_BYTES_MAX);
    let cut = |extent: Range<u64>| {
        (extent.start..extent.end)
            .step_by(PART_BYTES_MAX as usize)
            .map(move |at| at..extent.end.min(at + step))
    };
    extents.into_iter().flat_map(cut).collect()
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
