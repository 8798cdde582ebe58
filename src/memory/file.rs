//! Reads of a file straight into guest memory, with no copy of ours in between. Many at once are `ring`'s business.
//! `vmm::boot` loads kernels with it.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Reads from `position` into the beginning of `to`, as far as one call of the kernel gets; answers how many bytes that
/// is, 0 at the end of the file. The file's own position is left alone.
pub fn read_file<B: BitmapSlice>(file: &File, position: u64, to: &VolatileSlice<'_, B>) -> io::Result<usize> {
    let offset = libc::off_t::try_from(position).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let guard = to.ptr_guard_mut();
    loop {
        // SAFETY: the guard gives `to.len()` bytes of a mapping that lives as long as the slice and takes writes from
        // anybody at any time; `file` is open.
        let read = unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), to.len(), offset) };
        match usize::try_from(read) {
            Ok(read) => {
                to.bitmap().mark_dirty(0, read);
                return Ok(read);
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
