//! A stream socket of either kind. It is read and written as a file and waited for with poll(2), for which a thread needs
//! no system call that it would not need anyway.
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::limits::LINK_PATIENCE_MS;

/// One end of a connected stream.
pub(crate) struct Stream {
    file: File,
    control: UnixStream,
    /// How long to wait for something to read, if not for ever.
    patience_ms: Option<u16>,
    /// When nobody waits any more, to read or to write.
    until: Option<Instant>,
    /// How long was waited until more could be written, by this copy.
    waited: Duration,
}

impl Stream {
    /// Takes a socket over. Whoever writes to it waits no longer than is patient; whoever reads, for ever.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Stream> {
        let control = UnixStream::from(socket);
        control.set_nonblocking(true)?;
        let file = File::from(OwnedFd::from(control.try_clone()?));
        Ok(Stream { file, control, patience_ms: None, until: None, waited: Duration::ZERO })
    }

    /// Another descriptor for it, and the same patience.
    pub(crate) fn copy(&self) -> io::Result<Stream> {
        Ok(Stream {
            file: self.file.try_clone()?,
            control: self.control.try_clone()?,
            patience_ms: self.patience_ms,
            until: self.until,
            waited: Duration::ZERO,
        })
    }

    /// From now on, whoever reads here waits no longer than is patient either. Where nothing has to come for long, as in
    /// rounds that are for other streams, only the link itself tells that it is gone.
    pub(crate) fn expect_soon(&mut self) {
        self.patience_ms = Some(LINK_PATIENCE_MS);
    }

    /// From now on, whoever reads here waits for ever again.
    pub(crate) fn expect_whenever(&mut self) {
        self.patience_ms = None;
    }

    /// From now on, nobody waits here beyond this, whatever the patience.
    pub(crate) fn hurry(&mut self, until: Instant) {
        self.until = Some(until);
    }

    /// From now on, there is time again.
    pub(crate) fn take_time(&mut self) {
        self.until = None;
    }

    /// How long was waited until more could be written.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }

    /// Ends it for everybody who reads or writes it.
    pub(crate) fn shut(&self) {
        // One that is gone already is as good.
        let _ = self.control.shutdown(Shutdown::Both);
    }

    /// Waits for so many milliseconds, or for ever, and not beyond [`Stream::hurry`].
    fn wait_for(&self, what: PollFlags, patience_ms: Option<u16>) -> io::Result<()> {
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()).as_millis());
        let left_ms = left.map(|ms| u16::try_from(ms).unwrap_or(u16::MAX));
        let timeout =
            patience_ms.into_iter().chain(left_ms).min().map_or(PollTimeout::NONE, PollTimeout::from);
        match poll(&mut [PollFd::new(self.file.as_fd(), what)], timeout) {
            Ok(0) => Err(ErrorKind::TimedOut.into()),
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn wait_to_read(&self) -> io::Result<()> {
        self.wait_for(PollFlags::POLLIN, self.patience_ms)
    }

    fn wait_to_write(&mut self) -> io::Result<()> {
        let began = Instant::now();
        let waited = self.wait_for(PollFlags::POLLOUT, Some(LINK_PATIENCE_MS));
        self.waited += began.elapsed();
        waited
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait_to_read()?,
                other => return other,
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            match self.file.write(data) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait_to_write()?,
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadVolatile for Stream {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        slice: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        loop {
            match self.file.read_volatile(slice) {
                Err(error) if would_block(&error) => {
                    self.wait_to_read().map_err(VolatileMemoryError::IOError)?;
                }
                other => return other,
            }
        }
    }
}

impl WriteVolatile for Stream {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        loop {
            match self.file.write_volatile(slice) {
                Err(error) if would_block(&error) => {
                    self.wait_to_write().map_err(VolatileMemoryError::IOError)?;
                }
                other => return other,
            }
        }
    }
}

fn would_block(error: &VolatileMemoryError) -> bool {
    matches!(error, VolatileMemoryError::IOError(cause) if cause.kind() == ErrorKind::WouldBlock)
}
