//! System calls for attacks, which no library wraps because nobody should want them.
use std::io;

/// Any system call. What it does to memory is the caller's affair: arguments that are addresses must lead to what
/// the call expects, for as long as it runs.
pub(crate) fn call(number: libc::c_long, arguments: &[usize]) -> io::Result<usize> {
    let mut six = [0; 6];
    six[..arguments.len()].copy_from_slice(arguments);
    let [a, b, c, d, e, f] = six;
    // SAFETY: the callers in this program pass integers, or addresses of buffers that outlive the call.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}

/// A number as the kernel reads a signed argument.
pub(crate) fn signed(number: i32) -> usize {
    number as isize as usize
}

/// Opens a file through io_uring, which no system call filter sees.
pub(crate) fn open_through_ring(path: &std::ffi::CStr) -> io::Result<i32> {
    let mut ring = io_uring::IoUring::new(4)?;
    let open = io_uring::opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), path.as_ptr());
    let entry = open.flags(libc::O_RDONLY).build();
    // SAFETY: the path outlives the request, which is awaited below.
    let pushed = unsafe { ring.submission().push(&entry) };
    pushed.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().ok_or_else(|| io::Error::other("no completion"))?.result();
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}
