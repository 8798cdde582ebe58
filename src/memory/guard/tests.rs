use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::{discard, fill, new, read, receive, touched};

const BYTES: u64 = 32 << 20;
const PAGES: u64 = BYTES / PAGE_BYTES;

/// Without the device these say why they cannot run.
fn guard(ram: &Arc<Ram>) -> Option<Guard> {
    let device = match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => device,
        Err(cause) => {
            println!("skipped: /dev/userfaultfd: {cause}");
            return None;
        }
    };
    Some(Guard::new(device.as_fd(), ram).unwrap())
}

/// Whoever waits is let go, also when a test fails.
struct Ends<'a>(&'a Guard);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Lets some time pass.
fn pass() {
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(20) {
        std::thread::yield_now();
    }
}

fn word(ram: &Ram, page: u64) -> u64 {
    let mut bytes = [0; 8];
    read(ram, page * PAGE_BYTES, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn set(ram: &Ram, page: u64, value: u64) {
    fill(ram, page * PAGE_BYTES, &value.to_le_bytes()).unwrap();
}

#[test]
fn memory_is_taken_as_it_was_while_others_write_to_it() {
    let ram = new(BYTES).unwrap();
    let Some(guard) = guard(&ram) else { return };
    (0..PAGES / 2).for_each(|page| set(&ram, page, page + 1));
    let (stop, passes) = (AtomicBool::new(false), AtomicU64::new(0));
    let (paused, is_still) = (AtomicBool::new(false), AtomicBool::new(false));
    let (mut from, mut to) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| guard.serve().unwrap());
        // Writes all over, in a scattered order; the pages above half are touched by it alone.
        let writer = scope.spawn(|| {
            let mut at = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                if paused.load(Ordering::SeqCst) {
                    is_still.store(true, Ordering::SeqCst);
                    std::thread::yield_now();
                    continue;
                }
                is_still.store(false, Ordering::SeqCst);
                at = (at + 4099) % (PAGES * 3 / 4);
                let next = word(&ram, at) + PAGES * 2;
                if at.is_multiple_of(2) {
                    set(&ram, at, next);
                } else {
                    // As a device does: the kernel writes.
                    from.write_all(&next.to_le_bytes()).unwrap();
                    receive(&ram, Extent { offset: at * PAGE_BYTES, bytes: 8 }, &mut to).unwrap();
                }
                passes.fetch_add(1, Ordering::SeqCst);
            }
        });
        assert!(guard.arm(|| true).unwrap());
        guard.expect(&touched(&ram).unwrap());
        for wanted in [500, 1000, 1500, 2000] {
            while passes.load(Ordering::SeqCst) < wanted {
                std::thread::yield_now();
            }
            guard.rearm().unwrap();
        }
        paused.store(true, Ordering::SeqCst);
        while !is_still.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let wanted: Vec<u64> = (0..PAGES).map(|page| word(&ram, page)).collect();
        guard.begin().unwrap();
        paused.store(false, Ordering::SeqCst);
        let before = passes.load(Ordering::SeqCst);
        while passes.load(Ordering::SeqCst) < before + 500 {
            std::thread::yield_now();
        }
        let mut found = vec![0; PAGES as usize];
        for extent in guard.extents() {
            let mut data = vec![0; extent.bytes as usize];
            guard.take(extent, &mut data).unwrap();
            for (page, bytes) in (extent.offset / PAGE_BYTES..).zip(data.chunks(PAGE_BYTES as usize)) {
                found[page as usize] = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            }
        }
        assert!(found == wanted, "pages differ");
        assert!(guard.waits().count > 0);
        // The end finds a writer at work, and nobody serves it any more then.
        guard.end();
        server.join().unwrap();
        let before = passes.load(Ordering::SeqCst);
        while passes.load(Ordering::SeqCst) < before + PAGES {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap();
    });
}

#[test]
fn nothing_goes_back_to_the_host_meanwhile() {
    let ram = new(BYTES).unwrap();
    let Some(guard) = guard(&ram) else { return };
    let refused = discard(&ram, vm_memory::GuestAddress(0), 4096);
    assert!(matches!(refused, Err(Error::Discard(_))));
    drop(guard);
    discard(&ram, vm_memory::GuestAddress(0), 4096).unwrap();
}

#[test]
fn a_guard_that_is_dropped_lets_everybody_go_on() {
    let ram = new(BYTES).unwrap();
    let Some(guard) = guard(&ram) else { return };
    set(&ram, 5, 1);
    assert!(guard.arm(|| true).unwrap());
    assert!(!guard.arm(|| false).unwrap());
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| set(&ram, 5, 2));
        while guard.fault.waiting().unwrap().is_empty() {
            std::thread::yield_now();
        }
        drop(guard);
        writer.join().unwrap();
    });
    assert_eq!(word(&ram, 5), 2);
}

#[test]
fn every_write_that_waits_counts_before_the_moment_and_after_it() {
    let ram = new(BYTES).unwrap();
    let Some(guard) = guard(&ram) else { return };
    (0..2).for_each(|page| set(&ram, page, 1));
    assert!(guard.arm(|| true).unwrap());
    guard.expect(&touched(&ram).unwrap());
    let began = Instant::now();
    for page in 0..2 {
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| set(&ram, page, 2));
            let address = loop {
                if let [address] = guard.fault.waiting().unwrap()[..] {
                    break address;
                }
                std::thread::yield_now();
            };
            let since = Instant::now();
            pass();
            guard.let_write(address, since).unwrap();
            writer.join().unwrap();
        });
        let waits = guard.waits();
        assert_eq!(waits.count, page + 1);
        assert!(waits.longest >= Duration::from_millis(20) && waits.longest <= waits.sum, "{waits:?}");
        assert!(waits.sum >= waits.count as u32 * Duration::from_millis(20), "{waits:?}");
        assert!(waits.sum < began.elapsed(), "{waits:?}");
        if page == 0 {
            guard.begin().unwrap();
        }
    }
}

/// A guard whose moment was, with as many pages kept as can be, and a writer who waits for the page after them; each page's word
/// was its number and one at the moment, and is nothing now.
fn when_no_more_is_kept(test: impl FnOnce(&Guard, &Ram, &dyn Fn() -> bool)) {
    let last = u64::from(KEPT_PAGES_MAX);
    let ram = new(((last + 1) * PAGE_BYTES).next_multiple_of(2 << 20)).unwrap();
    let Some(guard) = guard(&ram) else { return };
    (0..=last).for_each(|page| set(&ram, page, page + 1));
    std::thread::scope(|scope| {
        let ends = Ends(&guard);
        let server = scope.spawn(|| guard.serve().unwrap());
        assert!(guard.arm(|| true).unwrap());
        guard.expect(&touched(&ram).unwrap());
        guard.begin().unwrap();
        let writer = scope.spawn(|| (0..=last).for_each(|page| set(&ram, page, 0)));
        let offset = loop {
            match guard.urgent() {
                Some(offset) => break offset,
                None => std::thread::yield_now(),
            }
        };
        assert_eq!(offset, last * PAGE_BYTES);
        test(&guard, &ram, &|| writer.is_finished());
        drop(ends);
        server.join().unwrap();
    });
}

fn take_page(guard: &Guard, page: u64) -> u64 {
    let mut data = [0; PAGE_BYTES as usize];
    guard.take(Extent { offset: page * PAGE_BYTES, bytes: PAGE_BYTES }, &mut data).unwrap();
    u64::from_le_bytes(data[..8].try_into().unwrap())
}

fn until(done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "it does not come");
        std::thread::yield_now();
    }
}

#[test]
fn a_writer_waits_for_its_part_when_no_more_is_kept_and_goes_on_when_that_is_taken() {
    when_no_more_is_kept(|guard, ram, has_written| {
        let (since, last) = (Instant::now(), u64::from(KEPT_PAGES_MAX));
        // Another's part is as it was, and whoever waits for this one does not go on.
        assert_eq!(take_page(guard, 0), 1);
        pass();
        assert_eq!((word(ram, last), guard.waits().count), (last + 1, last));
        let waited = since.elapsed();
        assert_eq!(take_page(guard, last), last + 1);
        until(has_written);
        assert_eq!(word(ram, last), 0);
        let waits = guard.waits();
        assert_eq!(waits.count, last + 1);
        assert!(waits.longest >= waited && waits.sum >= waits.longest, "{waits:?} of {waited:?}");
    });
}

#[test]
fn a_writer_who_waits_goes_on_with_one_for_whom_its_page_is_kept() {
    when_no_more_is_kept(|guard, ram, has_written| {
        let last = u64::from(KEPT_PAGES_MAX);
        // There is room for one now.
        assert_eq!(take_page(guard, 0), 1);
        set(ram, last, 7);
        until(has_written);
        until(|| guard.waits().count == last + 2);
        let waits = guard.waits();
        pass();
        assert_eq!(take_page(guard, last), last + 1);
        assert_eq!(guard.waits(), waits, "who has gone on waits no longer");
    });
}
