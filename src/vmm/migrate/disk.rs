//! A disk on its way over a stream of its own: which parts go, and where those that come belong.
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use devices::virtio::block::{Disk, Part};
use wire::transfer::{self, BLOCK_BYTES_MAX, FrameError, HOLE_BYTES_MAX, Head, Kind};

use super::Error;
use super::ram::Sum;
use super::stream::Stream;

/// Where a disk's frames go.
pub(super) struct Blocks<'a> {
    pub(super) disk: &'a Disk,
    pub(super) stream: &'a mut Stream,
    pub(super) index: usize,
    /// Called before so many bytes go, or are skipped; an error ends it.
    pub(super) before: &'a dyn Fn(Sum) -> Result<(), Error>,
}

impl Blocks<'_> {
    /// Sends all of the disk, whose changes are marked already.
    pub(super) fn send_all(&mut self) -> Result<Sum, Error> {
        let (mut sum, mut at, end) = (Sum::default(), 0, self.disk.bytes());
        while at < end {
            let data = self.disk.next_data(at);
            let data = data.map_err(|cause| Error::Host { doing: "find the holes of a disk", cause })?;
            let (start, stop) = data.map_or((end, end), |(start, stop)| (start.min(end), stop.min(end)));
            self.hole(&mut sum, Part { offset: at, bytes: start - at })?;
            self.send(&mut sum, Part { offset: start, bytes: stop - start })?;
            at = stop;
        }
        Ok(sum)
    }

    /// Sends what was changed since it was last sent.
    pub(super) fn send_changes(&mut self) -> Result<Sum, Error> {
        let mut sum = Sum::default();
        for part in self.disk.take_changes() {
            self.send(&mut sum, part)?;
        }
        Ok(sum)
    }

    fn send(&mut self, sum: &mut Sum, part: Part) -> Result<(), Error> {
        let mut buffer = vec![0; BLOCK_BYTES_MAX as usize];
        for offset in (part.offset..part.offset + part.bytes).step_by(BLOCK_BYTES_MAX as usize) {
            let bytes = (part.offset + part.bytes - offset).min(BLOCK_BYTES_MAX.into());
            let piece = buffer.get_mut(..bytes as usize).unwrap_or_default();
            let read = self.disk.read_exact_at(piece, offset);
            read.map_err(|cause| Error::Host { doing: "read a disk", cause })?;
            if memory::is_zero(piece) {
                self.hole(sum, Part { offset, bytes })?;
            } else {
                (self.before)(Sum { sent_bytes: bytes, skipped_bytes: 0 })?;
                let sent = transfer::write(self.stream, Kind::Block, offset, piece);
                sent.map_err(Error::at(self.index))?;
                sum.sent_bytes += bytes;
            }
        }
        Ok(())
    }

    fn hole(&mut self, sum: &mut Sum, part: Part) -> Result<(), Error> {
        for offset in (part.offset..part.offset + part.bytes).step_by(HOLE_BYTES_MAX as usize) {
            let bytes = (part.offset + part.bytes - offset).min(HOLE_BYTES_MAX.into());
            (self.before)(Sum { sent_bytes: 0, skipped_bytes: bytes })?;
            let head = Head { kind: Kind::Hole, length: bytes as u32, offset };
            head.write(self.stream).map_err(Error::at(self.index))?;
            sum.skipped_bytes += bytes;
        }
        Ok(())
    }
}

/// Takes what an admitted head says of a disk. `from` stands behind the head.
pub(super) fn take(file: &File, head: &Head, from: &mut impl io::Read, stream: usize) -> Result<(), Error> {
    let writing = |cause| Error::Host { doing: "write a disk", cause };
    match head.kind {
        Kind::Block => {
            let body = head.read_body(from).map_err(Error::at(stream))?;
            file.write_all_at(&body, head.offset).map_err(writing)
        }
        Kind::Hole => clear(file, head.offset, head.length.into()).map_err(writing),
        // Durable before anybody is told that the machine could run: the guest was told that it is.
        Kind::Sync | Kind::End => {
            file.sync_data().map_err(|cause| Error::Host { doing: "make a disk durable", cause })
        }
        other => Err(Error::at(stream)(FrameError::Order(other))),
    }
}

/// Makes a part zero. Where a file system cannot give space back, zeroes are written.
fn clear(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    match sys::memfd::punch_hole(file, offset, bytes) {
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput) => {
            let zeroes = vec![0; BLOCK_BYTES_MAX as usize];
            for at in (offset..offset + bytes).step_by(zeroes.len()) {
                let left = (offset + bytes - at).min(BLOCK_BYTES_MAX.into()) as usize;
                file.write_all_at(zeroes.get(..left).unwrap_or_default(), at)?;
            }
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use devices::virtio::block::Access;
    use wire::transfer::{Open, Order};

    use super::*;

    fn disk(bytes: u64) -> Disk {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Disk::plain(file, None, Access::ReadWrite).unwrap()
    }

    #[test]
    fn all_of_a_disk_comes_to_be_in_a_file_that_held_something_else() {
        let bytes = (3 << 20) + 512;
        let (from, to) = (disk(bytes), tempfile::tempfile().unwrap());
        from.file().write_all_at(&[7; 100_000], 1 << 20).unwrap();
        from.file().write_all_at(&[8; 512], 3 << 20).unwrap();
        to.write_all_at(&vec![9; bytes as usize], 0).unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn(move || {
            let mut stream = Stream::new(OwnedFd::from(near)).unwrap();
            let told = std::cell::Cell::new(Sum::default());
            let before = |more: Sum| {
                let Sum { sent_bytes, skipped_bytes } = told.get();
                let skipped_bytes = skipped_bytes + more.skipped_bytes;
                told.set(Sum { sent_bytes: sent_bytes + more.sent_bytes, skipped_bytes });
                Ok(())
            };
            let mut blocks = Blocks { disk: &from, stream: &mut stream, index: 0, before: &before };
            let sum = blocks.send_all().unwrap();
            assert_eq!(told.get(), sum, "as it went");
            Head { kind: Kind::End, length: 0, offset: sum.sent_bytes }.write(&mut stream).unwrap();
            (from, sum)
        });
        let mut order = Order::new(&Open::of_disk(0, bytes));
        while !order.has_ended() {
            let head = Head::read(&mut far).unwrap();
            order.admit(&head).unwrap();
            take(&to, &head, &mut far, 0).unwrap();
        }
        let (from, sum) = sender.join().unwrap();
        assert_eq!(sum.sent_bytes + sum.skipped_bytes, bytes);
        assert!(sum.sent_bytes < 300_000, "{sum:?}");
        let all = |file: &File| {
            let mut data = vec![1; bytes as usize];
            file.read_exact_at(&mut data, 0).unwrap();
            data
        };
        assert!(all(from.file()) == all(&to));
    }
}
