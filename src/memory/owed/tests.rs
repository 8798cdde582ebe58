use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

use vm_memory::GuestAddress;

use super::*;
use crate::{discard, fill, new, read, receive, touched};

const BYTES: u64 = 32 << 20;
const PAGES: u64 = BYTES / PAGE_BYTES;
const ALL: Extent = Extent { offset: 0, bytes: BYTES };

/// Without the device these say why they cannot run.
fn owed(ram: &Arc<Ram>) -> Option<Owed> {
    match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => Some(Owed::new(device.as_fd(), ram).unwrap()),
        Err(cause) => {
            println!("skipped: /dev/userfaultfd: {cause}");
            None
        }
    }
}

fn page(offset: u64) -> Extent {
    Extent { offset, bytes: PAGE_BYTES }
}

fn content(offset: u64) -> [u8; PAGE_BYTES as usize] {
    [(offset / PAGE_BYTES % 251 + 1) as u8; PAGE_BYTES as usize]
}

fn byte(ram: &Ram, offset: u64) -> u8 {
    let mut bytes = [0];
    read(ram, offset + 77, &mut bytes).unwrap();
    bytes[0]
}

#[test]
fn who_touches_what_is_owed_has_what_came_and_not_what_was_there() {
    let ram = new(BYTES).unwrap();
    let Some(owed) = owed(&ram) else { return };
    (0..PAGES).for_each(|page| fill(&ram, page * PAGE_BYTES, &[0xEE; 8]).unwrap());
    // Every second page of the upper half.
    let half = Extent { offset: BYTES / 2, bytes: BYTES / 2 };
    owed.expect(half, &vec![0x5555_5555_5555_5555; (PAGES / 2 / 64) as usize]).unwrap();
    owed.expect(half, &vec![0x1111_1111_1111_1111; (PAGES / 2 / 64) as usize]).unwrap();
    assert_eq!(owed.count(), PAGES / 4);
    assert_eq!(owed.first(ALL), Some(page(BYTES / 2)));
    assert_eq!(touched(&ram).unwrap().first(), Some(&Extent { offset: 0, bytes: BYTES / 2 }));
    let (asked, asks) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| owed.serve(|offset| asked.send(offset).unwrap()).unwrap());
        // Comes for those who wait, the next ones of it as far as they are owed, too.
        scope.spawn(|| {
            for offset in asks {
                let part = Extent { offset, bytes: 3 * PAGE_BYTES };
                let data: Vec<u8> = (0..3).flat_map(|at| content(offset + at * PAGE_BYTES)).collect();
                owed.put(part, &data).unwrap();
                if owed.count() == 0 {
                    return owed.end();
                }
            }
        });
        let readers = (0..4).map(|first| {
            let ram = &ram;
            scope.spawn(move || {
                for page in (0..PAGES).map(|page| (page * 4099 + first * 1009) % PAGES) {
                    let offset = page * PAGE_BYTES;
                    let expected = match (offset < BYTES / 2, page % 2) {
                        (true, _) => 0,
                        (false, 0) => content(offset)[0],
                        (false, _) => 0,
                    };
                    assert_eq!(byte(ram, offset), expected, "page {page}");
                }
            })
        });
        let readers: Vec<_> = readers.collect();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    assert_eq!((owed.count(), owed.first(ALL)), (0, None));
}

#[test]
fn the_kernel_waits_as_well_and_what_is_nobodys_is_zero() {
    let ram = new(BYTES).unwrap();
    let Some(owed) = owed(&ram) else { return };
    owed.expect(Extent { offset: 0, bytes: 64 * PAGE_BYTES }, &[0b1010]).unwrap();
    let (asked, asks) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| owed.serve(|offset| asked.send(offset).unwrap()).unwrap());
        let writer = scope.spawn(|| {
            // As a device does: into two pages that are owed and one between them that is not.
            let (mut from, mut to) = UnixStream::pair().unwrap();
            from.write_all(&[9; 8192]).unwrap();
            receive(&ram, Extent { offset: PAGE_BYTES + 2048, bytes: 8192 }, &mut to).unwrap();
        });
        assert_eq!(asks.recv().unwrap(), PAGE_BYTES);
        assert_eq!(owed.wanted(), [PAGE_BYTES]);
        owed.put(page(PAGE_BYTES), &content(PAGE_BYTES)).unwrap();
        assert_eq!(asks.recv().unwrap(), 3 * PAGE_BYTES);
        // What is given back would be missing, and not owed.
        assert!(discard(&ram, GuestAddress(3 * PAGE_BYTES), PAGE_BYTES).is_err());
        owed.put_zero(Extent { offset: 0, bytes: 64 * PAGE_BYTES }).unwrap();
        writer.join().unwrap();
        assert_eq!((owed.count(), owed.wanted()), (0, vec![]));
        // A page that came twice is not written twice.
        fill(&ram, PAGE_BYTES, &[7]).unwrap();
        owed.put(page(PAGE_BYTES), &content(0)).unwrap();
        let mut found = [0; 8192];
        read(&ram, PAGE_BYTES, &mut found).unwrap();
        assert_eq!((found[0], found[1], found[2047], found[2048], found[8191]), (7, 2, 2, 9, 9));
        read(&ram, 3 * PAGE_BYTES, &mut found).unwrap();
        assert_eq!((found[2047], found[2048]), (9, 0), "what came as zero, and was written since");
        owed.end();
    });
    assert!(discard(&ram, GuestAddress(3 * PAGE_BYTES), PAGE_BYTES).is_ok());
}

#[test]
fn who_waits_is_let_go_when_it_ends() {
    let ram = new(BYTES).unwrap();
    let Some(owed) = owed(&ram) else { return };
    owed.expect(Extent { offset: 0, bytes: 64 * PAGE_BYTES }, &[u64::MAX]).unwrap();
    assert!(owed.expect(Extent { offset: 0, bytes: 64 * PAGE_BYTES }, &[0, 0]).is_err());
    assert!(owed.expect(Extent { offset: BYTES, bytes: 64 * PAGE_BYTES }, &[0]).is_err());
    let (asked, asks) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| owed.serve(|offset| asked.send(offset).unwrap()).unwrap());
        let reader = scope.spawn(|| byte(&ram, 5 * PAGE_BYTES));
        assert_eq!(asks.recv().unwrap(), 5 * PAGE_BYTES);
        owed.end();
        assert_eq!(reader.join().unwrap(), 0);
    });
}

#[test]
fn when_it_has_ended_it_has_no_memory_and_does_nothing_to_it() {
    let ram = new(BYTES).unwrap();
    let Some(owed) = owed(&ram) else { return };
    let half = Extent { offset: 0, bytes: BYTES / 2 };
    let all = vec![u64::MAX; (PAGES / 2 / 64) as usize];
    owed.expect(half, &all).unwrap();
    owed.end();
    assert_eq!((Arc::strong_count(&ram), owed.count()), (1, PAGES / 2));
    fill(&ram, 77, &[7]).unwrap();
    owed.expect(half, &all).unwrap();
    owed.put(page(0), &content(0)).unwrap();
    assert_eq!(byte(&ram, 0), 7);
    owed.end();
}
