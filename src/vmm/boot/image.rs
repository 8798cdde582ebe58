//! A file as the loader wants it: readable into guest memory, with a position of its own. The position of the
//! descriptor is left alone, because several machines may share one open file.
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// A file with a position of its own.
pub(crate) struct Image<'a> {
    file: &'a File,
    position: u64,
    bytes: u64,
}

impl<'a> Image<'a> {
    /// Starts at the beginning of a file, or of a block device.
    pub(crate) fn new(file: &'a File) -> io::Result<Image<'a>> {
        let mut end = file;
        let bytes = match file.metadata()?.len() {
            0 => end.seek(SeekFrom::End(0))?,
            bytes => bytes,
        };
        Ok(Image { file, position: 0, bytes })
    }

    /// Length of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Read for Image<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(data, self.position)?;
        self.position = self.position.saturating_add(read as u64);
        Ok(read)
    }
}

impl Seek for Image<'_> {
    /// A position beyond the end is refused: all offsets come from the file itself, and none of ours does.
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.bytes.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        match position.filter(|position| *position <= self.bytes) {
            Some(position) => {
                self.position = position;
                Ok(position)
            }
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, "an offset points outside the file")),
        }
    }
}

impl ReadVolatile for Image<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        to: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        // The loader asks once for all it wants and takes a short answer for the end of the file.
        let mut done = 0;
        while done < to.len() {
            let read = memory::read_file(self.file, self.position, &to.subslice(done, to.len() - done)?);
            let read = read.map_err(VolatileMemoryError::IOError)?;
            if read == 0 {
                break;
            }
            self.position = self.position.saturating_add(read as u64);
            done += read;
        }
        Ok(done)
    }
}
