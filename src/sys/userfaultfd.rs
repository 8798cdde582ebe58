//! Faults of this process's own memory that it serves itself (userfaultfd(2)), of one of two kinds. Protect a range, and be
//! told of each page that somebody is about to write; or be told of each page that somebody touches and that is not there yet.
//! Whoever it is waits meanwhile. It knows no machine; `memory` uses it on guest RAM. Closing it lets everybody go on: writers
//! write, and what is missing is zero.
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

/// include/uapi/linux/userfaultfd.h.
const API: u64 = 0xAA;
const FEATURE_WRITE_PROTECT: u64 = 1 << 0;
/// Also memory of files, and pages of them that this process has never touched.
const FEATURE_SHARED_MEMORY: u64 = 1 << 12;
/// Pages that memory of files lacks.
const FEATURE_MISSING_SHARED: u64 = 1 << 5;
const MODE_MISSING: u64 = 1 << 0;
const MODE_WRITE_PROTECT: u64 = 1 << 1;
const PROTECT: u64 = 1 << 0;
const EVENT_PAGE_FAULT: u8 = 0x12;
const EVENT_BYTES: usize = 32;

const PAGE_BYTES: u64 = 4096;

/// Most events read at once.
const EVENTS_MAX: usize = 64;

/// `struct uffdio_api`.
#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    bytes: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    start: u64,
    bytes: u64,
    mode: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct Zero {
    start: u64,
    bytes: u64,
    mode: u64,
    zeroed: i64,
}

mod request {
    //! The requests as functions.
    use super::{Copy, Handshake, Range, Register, WriteProtect, Zero};

    nix::ioctl_readwrite!(api, 0xAA, 0x3F, Handshake);
    nix::ioctl_readwrite!(register, 0xAA, 0x00, Register);
    // What the kernel's header has as reads, although nothing comes back.
    nix::ioctl_read!(unregister, 0xAA, 0x01, Range);
    nix::ioctl_read!(wake, 0xAA, 0x02, Range);
    nix::ioctl_readwrite!(copy, 0xAA, 0x03, Copy);
    nix::ioctl_readwrite!(zero, 0xAA, 0x04, Zero);
    nix::ioctl_readwrite!(write_protect, 0xAA, 0x06, WriteProtect);
}

/// USERFAULTFD_IOC_NEW.
const NEW: u64 = 0xAA00;

/// One userfaultfd.
#[derive(Debug)]
pub struct UserFault {
    file: std::fs::File,
    mode: u64,
}

impl UserFault {
    /// Makes one that protects, for this process, with an open `/dev/userfaultfd`. Fails with `Unsupported` where the kernel
    /// cannot protect memory of files (before 5.19).
    pub fn new(device: BorrowedFd<'_>) -> io::Result<UserFault> {
        UserFault::open(device, FEATURE_WRITE_PROTECT | FEATURE_SHARED_MEMORY, MODE_WRITE_PROTECT)
    }

    /// Makes one that is told of missing pages, in the same way.
    pub fn missing(device: BorrowedFd<'_>) -> io::Result<UserFault> {
        UserFault::open(device, FEATURE_MISSING_SHARED, MODE_MISSING)
    }

    fn open(device: BorrowedFd<'_>, features: u64, mode: u64) -> io::Result<UserFault> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the request takes flags and no pointer, and answers a new descriptor; `device` is open.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut handshake = Handshake { api: API, features, ioctls: 0 };
        // SAFETY: the structure is the request's, alive and writable.
        let agreed = unsafe { request::api(fd.as_raw_fd(), &raw mut handshake) };
        agreed.map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        Ok(UserFault { file: fd.into(), mode })
    }

    /// Makes a range of memory one that can be protected, or whose missing pages are waited for. Whole pages.
    pub fn register(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut range = Register { start, bytes, mode: self.mode, ioctls: 0 };
        // SAFETY: the structure is the request's, alive and writable. A range that is not memory of this process is
        // refused; what is written to one that is waits, which breaks no promise of the language.
        unsafe { request::register(self.file.as_raw_fd(), &raw mut range) }?;
        Ok(())
    }

    /// Undoes [`UserFault::register`] for a part of it: it is not protected any more, and who waits there goes on. Closing
    /// does the same for all that is left at once, which holds up every fault of this process for as long as it takes:
    /// some 28 ms for 1 GiB.
    pub fn unregister(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut range = Range { start, bytes };
        // SAFETY: the structure is the request's, alive and writable. What is not registered stays as it is.
        unsafe { request::unregister(self.file.as_raw_fd(), &raw mut range) }?;
        // The kernel itself wakes those who wait for a page that is missing, and no others.
        self.wake(start, bytes)
    }

    /// From here on whoever writes to the range waits until [`UserFault::release`].
    pub fn protect(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.change(start, bytes, PROTECT)
    }

    /// Lets writes to the range pass, those that wait first.
    pub fn release(&self, start: u64, bytes: u64) -> io::Result<()> {
        match self.change(start, bytes, 0) {
            // Some of it is not registered any more, so is not protected either.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => self.wake(start, bytes),
            other => other,
        }
    }

    /// Puts `data` where pages are missing, and lets those who wait there go on. A page that is there stays as it is. Whole
    /// pages.
    ///
    /// # Safety
    /// What is missing in the range nobody takes for zeroes.
    pub unsafe fn fill(&self, start: u64, data: &[u8]) -> io::Result<()> {
        self.each_missing(start, data.len() as u64, |done, left| {
            let from = data.as_ptr() as u64 + done;
            let mut copy = Copy { to: start + done, from, bytes: left, mode: 0, copied: 0 };
            // SAFETY: the structure is the request's, alive and writable; `left` bytes of `data` lie behind `from`. The kernel puts
            // new pages where registered memory of this process has none, which is as the caller promises, and nowhere else.
            let answer = unsafe { request::copy(self.file.as_raw_fd(), &raw mut copy) };
            (answer.err(), copy.copied)
        })
    }

    /// The same with zeroes.
    pub fn fill_zero(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.each_missing(start, bytes, |done, left| {
            let mut zero = Zero { start: start + done, bytes: left, mode: 0, zeroed: 0 };
            // SAFETY: the structure is the request's, alive and writable; a page that is missing would be zero.
            let answer = unsafe { request::zero(self.file.as_raw_fd(), &raw mut zero) };
            (answer.err(), zero.zeroed)
        })
    }

    /// Asks again for what a request has left: it stops at pages that are there.
    fn each_missing(
        &self,
        start: u64,
        bytes: u64,
        mut put: impl FnMut(u64, u64) -> (Option<nix::errno::Errno>, i64),
    ) -> io::Result<()> {
        let mut done = 0;
        while done < bytes {
            let (error, count) = put(done, bytes - done);
            let put = u64::try_from(count).unwrap_or(0);
            match error {
                None => done = bytes,
                Some(nix::errno::Errno::EAGAIN) if put > 0 => done += put,
                Some(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
                Some(nix::errno::Errno::EEXIST) => {
                    self.wake(start + done, PAGE_BYTES)?;
                    done += PAGE_BYTES;
                }
                Some(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn wake(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut range = Range { start, bytes };
        // SAFETY: the structure is the request's, alive and writable; whoever is woken looks again.
        unsafe { request::wake(self.file.as_raw_fd(), &raw mut range) }?;
        Ok(())
    }

    fn change(&self, start: u64, bytes: u64, mode: u64) -> io::Result<()> {
        let mut range = WriteProtect { start, bytes, mode };
        loop {
            // SAFETY: the structure is the request's, alive and writable; otherwise as for `register`.
            match unsafe { request::write_protect(self.file.as_raw_fd(), &raw mut range) } {
                // The kernel was about to change the mappings; it asks to come again.
                Err(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
                other => return other.map(drop).map_err(io::Error::from),
            }
        }
    }

    /// Waits until somebody does, and answers the addresses; nothing once `ended` has been told.
    pub fn next(&self, ended: &EventFd) -> io::Result<Option<Vec<u64>>> {
        let mut asked =
            [PollFd::new(self.as_fd(), PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        match poll(&mut asked, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        match ended.read() {
            Ok(_) => Ok(None),
            Err(_) => self.waiting().map(Some),
        }
    }

    /// Addresses that somebody waits for; none when nobody does.
    pub fn waiting(&self) -> io::Result<Vec<u64>> {
        let mut events = [0; EVENTS_MAX * EVENT_BYTES];
        let bytes = match (&self.file).read(&mut events) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            other => other?,
        };
        let (events, _) = events[..bytes].as_chunks::<EVENT_BYTES>();
        let faults = events.iter().filter(|event| event[0] == EVENT_PAGE_FAULT);
        Ok(faults
            .map(|event| {
                let mut address = [0; 8];
                address.copy_from_slice(&event[16..24]);
                u64::from_ne_bytes(address)
            })
            .collect())
    }
}

impl AsFd for UserFault {
    /// Readable when somebody waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
