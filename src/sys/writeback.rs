//! Writing a file's data down without its metadata, or anybody else's.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Writes what is dirty of a file to its device and waits for that. Nothing is durable by this alone (`sync_file_range(2)`):
/// neither are its blocks and its length written down, nor is the device's own cache. Fails where the device does, and for
/// what is no ordinary file.
pub fn write_out(file: &File) -> io::Result<()> {
    let all =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open for the length of the call; the other arguments are numbers, of which a length of 0 is all there is.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, all) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_written_out_and_stays_what_it_is() {
        let mut file = tempfile::tempfile().unwrap();
        write_out(&file).unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        write_out(&file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 10_000);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(write_out(&null).unwrap_err().raw_os_error(), Some(libc::ESPIPE));
    }
}
