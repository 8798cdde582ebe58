//! The last word of this process's command line, as `ps` shows it. It can be put in another's place that is no longer.
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

static WORD: AtomicPtr<c_char> = AtomicPtr::new(std::ptr::null_mut());
static BYTES: AtomicUsize = AtomicUsize::new(0);

/// glibc calls what stands in this section before `main`, with the arguments of `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn(c_int, *const *mut c_char, *const *mut c_char) = remember;

extern "C" fn remember(count: c_int, words: *const *mut c_char, _environment: *const *mut c_char) {
    let Some(last) = usize::try_from(count).ok().and_then(|count| count.checked_sub(1)) else { return };
    if words.is_null() {
        return;
    }
    // SAFETY: there are `count` words (execve(2)), so this is a place in their list.
    let place = unsafe { words.add(last) };
    // SAFETY: as above; nothing has changed the list this early.
    let word = unsafe { *place };
    if word.is_null() {
        return;
    }
    // SAFETY: a word ends with NUL.
    BYTES.store(unsafe { CStr::from_ptr(word) }.count_bytes(), Ordering::Relaxed);
    WORD.store(word, Ordering::Release);
}

/// Shows `text` in place of the last word, cut to the length that the word had at first. For one thread at a time of a process
/// that has read its arguments and will not again.
pub fn set_last_word(text: &str) {
    let (word, bytes) = (WORD.load(Ordering::Acquire), BYTES.load(Ordering::Relaxed));
    if word.is_null() {
        return;
    }
    let shown = text.bytes().filter(|byte| *byte != 0).chain(std::iter::repeat(0));
    for (at, byte) in shown.take(bytes).enumerate() {
        // SAFETY: the word has so many bytes.
        let place = unsafe { word.add(at) };
        // SAFETY: the kernel made the word writable on the first thread's stack, where it lies as long as the process lives.
        unsafe { place.cast::<u8>().write_volatile(byte) };
    }
}

#[cfg(test)]
mod tests {
    /// In a child, because the words of a test's program are read by others.
    #[test]
    fn another_word_is_shown_and_never_a_longer_one() {
        if std::env::args().next_back().as_deref() != Some("title::tests") {
            let program = std::env::current_exe().unwrap();
            let output = std::process::Command::new(program).args(["--nocapture", "title::tests"]).output();
            return assert!(output.unwrap().status.success());
        }
        let shown = || {
            let line = std::fs::read("/proc/self/cmdline").unwrap();
            let line = String::from_utf8(line).unwrap();
            line.trim_end_matches('\0').rsplit('\0').next().unwrap_or_default().to_owned()
        };
        super::set_last_word("short");
        assert_eq!(shown(), "short");
        super::set_last_word("longer than it was");
        assert_eq!(shown(), "longer than ");
    }
}
