//! Threads as the kernel knows them: their numbers, names and CPU time. It starts none.
use std::ffi::CString;
use std::io;

/// No thread's number reaches this (PID_MAX_LIMIT in include/linux/threads.h).
const PID_LIMIT: i32 = 4 << 20;

/// The kernel's id of the calling thread.
pub fn id() -> i32 {
    nix::unistd::gettid().as_raw()
}

/// Names the calling thread, as `ps` and `/proc` show it; the kernel keeps 15 bytes.
pub fn set_name(name: &str) {
    let bytes: Vec<u8> = name.bytes().filter(|byte| *byte != 0).collect();
    if let Ok(name) = CString::new(bytes) {
        // SAFETY: the kernel copies at most 16 bytes of a string that ends with NUL.
        unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    }
}

/// Lets the threads of this process share so many heaps (M_ARENA_MAX of mallopt(3)). Left alone, glibc gives every thread one
/// until there are eight for each processor, and each keeps what the thread once needed. With more than one it opens files: to
/// count processors when a ninth thread wants a heap, to learn of overcommitment when a thread's heap shrinks. A thread
/// under a filter may not. Call it before the first thread is started.
pub fn share_heaps(count: u8) {
    // SAFETY: two integers; glibc takes its own lock.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, count.max(1).into()) };
}

/// CPU time that a thread of this process has used, in nanoseconds. Fails when there is no such thread.
pub fn cpu_time_ns(thread: i32) -> io::Result<u64> {
    if !(1..PID_LIMIT).contains(&thread) {
        return Err(io::ErrorKind::NotFound.into());
    }
    // The kernel's encoding of a thread's clock (CPUCLOCK_PERTHREAD_MASK and CPUCLOCK_SCHED in
    // include/linux/posix-timers.h); glibc offers it only for threads it started itself.
    let clock = (!thread << 3) | 0b110;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writes and outlives the call.
    if unsafe { libc::clock_gettime(clock, &mut time) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec.unsigned_abs().saturating_mul(1_000_000_000).saturating_add(time.tv_nsec.unsigned_abs()))
}

#[cfg(test)]
mod tests;
