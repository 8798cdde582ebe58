use memory::layout::RAM_BELOW_4G_MAX;

use super::*;

const BYTES: u64 = RAM_BELOW_4G_MAX + (64 << 20);

#[derive(Default)]
struct Seen {
    parts: Vec<(u64, u64)>,
    zeroes: Vec<(u64, u64)>,
}

impl Outlet for Seen {
    fn part(&mut self, part: Extent) -> Result<(), Error> {
        self.parts.push((part.offset, part.bytes));
        Ok(())
    }

    fn zero(&mut self, part: Extent) -> Result<(), Error> {
        self.zeroes.push((part.offset, part.bytes));
        Ok(())
    }
}

/// What was touched before.
fn touched(ram: &Ram) -> Pages {
    let mut pages = Pages::of(BYTES / 4096);
    for extent in memory::touched(ram).unwrap() {
        pages.set_range(extent.offset / 4096, (extent.offset + extent.bytes) / 4096);
    }
    pages
}

fn walked(ram: &Ram, shard: u64, pages: &Pages, first: bool) -> (Seen, Sum) {
    let mut seen = Seen::default();
    let shard = Extent { offset: shard, bytes: SHARD_BYTES };
    let known = if first { touched(ram) } else { Pages::default() };
    let sum = walk(ram, shard, pages, &known, first, &mut seen).unwrap();
    (seen, sum)
}

#[test]
fn only_pages_that_hold_something_go_and_looking_makes_none() {
    let ram = memory::new(BYTES).unwrap();
    let shard = RAM_BELOW_4G_MAX;
    memory::fill(&ram, shard + 4096 + 4000, &[1; 200]).unwrap();
    memory::fill(&ram, shard + 5 * 4096, &[0; 4096]).unwrap();
    memory::fill(&ram, shard + 9 * 4096 + 4095, &[1]).unwrap();
    let (seen, sum) = walked(&ram, shard, &Pages::all(BYTES / 4096), true);
    assert_eq!(seen.parts, [(shard + 4096, 8192), (shard + 9 * 4096, 4096)]);
    assert!(seen.zeroes.is_empty());
    assert_eq!(sum, Sum { sent_bytes: 12288, skipped_bytes: SHARD_BYTES - 12288 });
    assert_eq!(memory::touched(&ram).unwrap().iter().map(|extent| extent.bytes).sum::<u64>(), 4 * 4096);
}

#[test]
fn later_only_what_changed_goes_and_zeroes_are_told() {
    let ram = memory::new(BYTES).unwrap();
    memory::fill(&ram, 4096, &[1; 3 * 4096]).unwrap();
    memory::fill(&ram, 8 * 4096, &[0; 4096]).unwrap();
    let mut pages = Pages::of(BYTES / 4096);
    [1, 2, 8, 9, 511, 512].into_iter().for_each(|page| pages.set(page));
    let (seen, sum) = walked(&ram, 0, &pages, false);
    assert_eq!(seen.parts, [(4096, 8192)]);
    assert_eq!(seen.zeroes, [(8 * 4096, 8192), (511 * 4096, 4096)]);
    assert_eq!(sum, Sum { sent_bytes: 8192, skipped_bytes: 3 * 4096 });
}

#[test]
fn every_shard_has_one_stream() {
    for streams in 1..=5 {
        let mut all: Vec<_> = (0..streams).flat_map(|stream| shards(BYTES, stream, streams)).collect();
        all.sort_by_key(|shard| shard.offset);
        let mut at = 0;
        for shard in &all {
            assert_eq!(shard.offset, at);
            at += shard.bytes;
        }
        assert_eq!(at, BYTES);
        for stream in 0..streams {
            let ours =
                |shard: Extent| wire::transfer::stream_of(shard.offset, streams as u64) == stream as u64;
            assert!(shards(BYTES, stream, streams).all(ours));
        }
    }
}

#[test]
fn what_is_taken_is_where_it_was_and_zeroes_are_holes_again() {
    let (from, to) = (memory::new(BYTES).unwrap(), memory::new(BYTES).unwrap());
    let part = Extent { offset: RAM_BELOW_4G_MAX - 8192, bytes: 8192 };
    memory::fill(&from, part.offset, &[7; 8192]).unwrap();
    let mut sent = Vec::new();
    memory::send(&from, part, &mut sent).unwrap();
    let head = |kind| Head { kind, length: 8192, offset: part.offset };
    take(&to, &head(Kind::Part), &mut sent.as_slice(), &mut Unpacker::new(), 0).unwrap();
    let mut found = [0; 8192];
    memory::read(&to, part.offset, &mut found).unwrap();
    assert!(found == [7; 8192]);
    assert!(take(&to, &head(Kind::Part), &mut &sent[..5000], &mut Unpacker::new(), 0).is_err());
    take(&to, &head(Kind::Zero), &mut [].as_slice(), &mut Unpacker::new(), 0).unwrap();
    assert!(memory::touched(&to).unwrap().is_empty());
}

#[test]
fn over_a_link_that_is_slower_than_this_processor_memory_goes_packed_and_is_the_same() {
    const MEMORY: u64 = 64 << 20;
    let (from, to) = (memory::new(MEMORY).unwrap(), memory::new(MEMORY).unwrap());
    let text: Vec<u8> = (0..MEMORY / 8).flat_map(|number| (number / 16).to_le_bytes()).collect();
    memory::fill(&from, 0, &text).unwrap();
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut far = Stream::new(far.into()).unwrap();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut stream = Stream::new(near.into()).unwrap();
            let mut packer = Packer::new();
            let went = std::cell::Cell::new(0);
            // 32 MB a second, so that packing is quicker on a busy machine, too.
            let before = |bytes: u64| {
                went.set(went.get() + bytes);
                let until = Instant::now() + Duration::from_nanos(bytes * 32);
                while Instant::now() < until {
                    std::thread::yield_now();
                }
            };
            let mut frames =
                Frames { ram: &from, stream: &mut stream, packer: &mut packer, index: 0, before: &before };
            for shard in shards(MEMORY, 0, 1) {
                frames.part(shard).unwrap();
            }
            let end = Head { kind: Kind::End, length: 0, offset: MEMORY };
            end.write(&mut stream).unwrap();
            went.get()
        });
        let mut order = transfer::Order::new(&transfer::Open::packing(0, 1, MEMORY));
        let mut unpacker = Unpacker::new();
        while !order.has_ended() {
            let head = Head::read(&mut far).unwrap();
            order.admit(&head).unwrap();
            take(&to, &head, &mut far, &mut unpacker, 0).unwrap();
        }
        let went = sender.join().unwrap();
        assert!(went < MEMORY / 2, "{} MiB", went >> 20);
    });
    let mut came = vec![0; text.len()];
    memory::read(&to, 0, &mut came).unwrap();
    assert!(came == text);
}
