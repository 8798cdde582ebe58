//! Whether the machine itself stands still: a thread that the scheduler prefers to all others, sleeps for half a
//! millisecond at a time, and notes when it was kept from waking. What it was kept from, everything was: a machine that is a
//! guest itself is stopped as a whole when it has used up the share of processors it may have.
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const NAP: Duration = Duration::from_micros(500);

/// The thread, which ends with this.
pub(crate) struct Witness {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    ended: AtomicBool,
    longest_us: AtomicU64,
}

impl Witness {
    pub(crate) fn start() -> Witness {
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let thread = nix::unistd::gettid().to_string();
            let preferred = Command::new("chrt").args(["--fifo", "--pid", "1", &thread]).status();
            assert!(preferred.is_ok_and(|status| status.success()), "chrt has not preferred a thread");
            while !seen.ended.load(Ordering::Relaxed) {
                let began = Instant::now();
                std::thread::sleep(NAP);
                let late = began.elapsed().saturating_sub(NAP);
                seen.longest_us.fetch_max(late.as_micros() as u64, Ordering::Relaxed);
            }
        });
        Witness { shared, thread: Some(thread) }
    }

    /// The longest time since this was last asked in which nothing on the machine ran, in milliseconds.
    pub(crate) fn longest_ms(&self) -> f64 {
        self.shared.longest_us.swap(0, Ordering::Relaxed) as f64 / 1e3
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(Err(cause)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(cause);
        }
    }
}
