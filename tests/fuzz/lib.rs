//! What every fuzz target stands on: libFuzzer's entry, and an allocator that takes one demand for a lot of memory as
//! what it is, somebody else's number believed.
pub use libfuzzer_sys::fuzz_target;
use std::alloc::{GlobalAlloc, Layout, System};

/// No input is longer than this, and nothing grows with more than its input but by a number it states; the largest
/// honest demand is the bounce buffer of an interface and the piece that a file is copied by.
const DEMAND_BYTES_MAX: usize = 32 << 20;

struct Bounded;

// SAFETY: every call goes on to the system's allocator with what it was given, or ends the process.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        judge(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        judge(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        judge(bytes);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn judge(bytes: usize) {
    assert!(bytes <= DEMAND_BYTES_MAX, "{bytes} bytes of memory were asked for at once");
}

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// A target around a function of its input.
#[macro_export]
macro_rules! target {
    (|$data:ident| $body:expr) => {
        $crate::fuzz_target!(|$data: &[u8]| $body);
    };
}
