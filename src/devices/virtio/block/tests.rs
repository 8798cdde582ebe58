use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use memory::ring::Engine;
use virtio_bindings::bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::bench::{Bench, EVENT_IDX, Heard, Part, Ring};
use crate::virtio::{Active, VirtioDevice};

mod ahead;
mod hostile;
mod joined;
mod keep;
mod load;
mod overlay;

const SECTORS: u64 = 2048;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
/// What no device writes as a status.
const UNANSWERED: u8 = 0xa5;

/// How a driver's disk is set up.
struct Setup {
    access: Access,
    cache: CacheMode,
    limits: RateLimits,
    engine: Engine,
    backing: Option<File>,
    /// Features the driver does not agree to.
    without: u64,
    event_idx: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            access: Access::ReadWrite,
            cache: CacheMode::Writeback,
            limits: RateLimits::default(),
            engine: Engine::IoUring,
            backing: None,
            without: 0,
            event_idx: false,
        }
    }
}

/// A driver with its device and the file behind it.
struct Driver {
    bench: Bench,
    ring: Ring,
    heard: Arc<Heard>,
    file: File,
    disk: Disk,
    block: Block,
    active: Option<Box<dyn Active>>,
    stats: Arc<BlockStats>,
    /// Memory for requests, used from the start again by [`Driver::tidy`].
    arena: u64,
    arena_used: u64,
}

const ARENA_BYTES: u64 = 4 << 20;

/// A request in the making.
#[derive(Clone, Copy)]
struct Sent {
    head: u16,
    data: u64,
    status: u64,
}

impl Driver {
    fn new(setup: Setup) -> Driver {
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512) as u8).collect();
        file.write_all_at(&content, 0).unwrap();
        Driver::over(file, setup)
    }

    fn over(file: File, setup: Setup) -> Driver {
        let open = if setup.engine == Engine::IoUring { Disk::new } else { Disk::plain };
        let disk = open(file.try_clone().unwrap(), setup.backing, setup.access).unwrap();
        let stats = Arc::new(BlockStats::default());
        let mut block = Block::new(BlockOptions {
            name: "disk0".to_owned(),
            disk: disk.clone(),
            cache: setup.cache,
            serial: "the-serial-number-is-too-long".to_owned(),
            limits: setup.limits,
            stats: Arc::clone(&stats),
        })
        .unwrap();
        let mut bench = Bench::new();
        let ring = bench.ring(256);
        let features = block.features() & !setup.without | if setup.event_idx { EVENT_IDX } else { 0 };
        let (wiring, heard) = bench.wiring(&[&ring], features);
        let active = Some(block.activate(wiring).unwrap());
        let arena = bench.buffer(ARENA_BYTES);
        Driver { bench, ring, heard, file, disk, block, active, stats, arena, arena_used: 0 }
    }

    fn buffer(&mut self, bytes: u64) -> u64 {
        let address = self.arena + self.arena_used;
        self.arena_used += bytes.next_multiple_of(16);
        assert!(self.arena_used <= ARENA_BYTES, "the arena is full");
        address
    }

    fn filled(&mut self, data: &[u8]) -> u64 {
        let address = self.buffer(data.len() as u64);
        self.bench.memory.write_slice(data, GuestAddress(address)).unwrap();
        address
    }

    fn header(&mut self, kind: u32, sector: u64) -> u64 {
        let mut header = Vec::from(kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.filled(&header)
    }

    /// Sends a request whose chain is header, `readable`, `writable` bytes, status.
    fn send(&mut self, kind: u32, sector: u64, readable: &[u8], writable: u32) -> Sent {
        let header = self.header(kind, sector);
        let status = self.filled(&[UNANSWERED]);
        let data = self.filled(readable);
        let answer = self.buffer(u64::from(writable));
        let mut parts = vec![Part::Read(header, 16)];
        if !readable.is_empty() {
            parts.push(Part::Read(data, readable.len() as u32));
        }
        if writable > 0 {
            parts.push(Part::Write(answer, writable));
        }
        parts.push(Part::Write(status, 1));
        let head = self.ring.submit(&parts);
        Sent { head, data: if writable > 0 { answer } else { data }, status }
    }

    /// Sends one request and waits for it: its status and the length of its answer.
    fn ask(&mut self, kind: u32, sector: u64, readable: &[u8], writable: u32) -> (u8, u32, u64) {
        let sent = self.send(kind, sector, readable, writable);
        let (head, length) = self.ring.wait_used(&self.heard);
        assert_eq!(head, u32::from(sent.head));
        (self.bench.bytes(sent.status, 1)[0], length, sent.data)
    }

    fn read(&mut self, sector: u64, bytes: u32) -> (u8, Vec<u8>) {
        let (status, _, data) = self.ask(VIRTIO_BLK_T_IN, sector, &[], bytes);
        (status, self.bench.bytes(data, bytes as usize))
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.ask(VIRTIO_BLK_T_OUT, sector, data, 0).0
    }

    fn on_disk(&self, sector: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.file.read_exact_at(&mut data, sector * 512).unwrap();
        data
    }

    fn active(&mut self) -> &mut dyn Active {
        self.active.as_deref_mut().unwrap()
    }

    /// Makes all of the arena free again, once nothing is in flight.
    fn tidy(&mut self) {
        self.arena_used = 0;
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn seen(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn each_engine(test: impl Fn(Engine)) {
    test(Engine::Plain);
    test(Engine::IoUring);
}

// virtio 1.2: 2.7.8.2-2
#[test]
fn data_goes_both_ways_and_lengths_are_exact() {
    each_engine(|engine| {
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        let (status, length, _) = driver.ask(VIRTIO_BLK_T_OUT, 3, &[7; 1024], 0);
        assert_eq!((status, length), (OK, 1));
        assert_eq!(driver.on_disk(2, 2048), [vec![2; 512], vec![7; 1024], vec![5; 512]].concat());
        let (status, length, data) = driver.ask(VIRTIO_BLK_T_IN, 4, &[], 1024);
        assert_eq!((status, length), (OK, 1025));
        assert_eq!(driver.bench.bytes(data, 1024), [vec![7; 512], vec![5; 512]].concat());
        assert_eq!(driver.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
        let (status, length, data) = driver.ask(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
        assert_eq!((status, length), (OK, 21));
        assert_eq!(driver.bench.bytes(data, 20), b"the-serial-number-is");
        let stats = &driver.stats;
        let counted = [&stats.reads, &stats.read_bytes, &stats.writes, &stats.written_bytes, &stats.flushes];
        assert_eq!(counted.map(seen), [1, 1024, 1, 1024, 1]);
        assert_eq!([&stats.errors, &stats.malformed, &stats.throttled].map(seen), [0, 0, 0]);
        driver.active.take().unwrap().stop();
    });
}

// virtio 1.2: 5.2.6.2-2 5.2.6.2-3
#[test]
fn what_each_request_answers() {
    let last = SECTORS - 1;
    let zeroes = VIRTIO_BLK_T_WRITE_ZEROES;
    let discard = VIRTIO_BLK_T_DISCARD;
    let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
    type Row = (&'static str, u32, u64, Vec<u8>, u32, u8, u32);
    let table: Vec<Row> = vec![
        ("the last sector", read, last, vec![], 512, OK, 513),
        ("beyond the end", read, last, vec![], 1024, IOERR, 0),
        ("far beyond the end", read, SECTORS, vec![], 512, IOERR, 0),
        ("a sector whose byte wraps to 0", read, 1 << 55, vec![], 512, IOERR, 0),
        ("a sector whose end wraps to 0", read, u64::MAX, vec![], 512, IOERR, 0),
        ("half a sector", read, 0, vec![], 256, IOERR, 0),
        ("no data to read", read, 0, vec![], 0, IOERR, 1),
        ("data in both directions", read, 0, vec![0; 512], 512, IOERR, 0),
        ("a write beyond the end", write, last, vec![1; 1024], 0, IOERR, 1),
        ("a write that wraps", write, u64::MAX, vec![1; 512], 0, IOERR, 1),
        ("a write of half a sector", write, 0, vec![1; 100], 0, IOERR, 1),
        ("a write with room for an answer", write, 0, vec![1; 512], 8, IOERR, 0),
        ("no data to write", write, 0, vec![], 0, IOERR, 1),
        ("an identity that is too short", VIRTIO_BLK_T_GET_ID, 0, vec![], 19, IOERR, 0),
        ("an old SCSI command", VIRTIO_BLK_T_SCSI_CMD, 0, vec![], 0, UNSUPP, 1),
        ("a type of the future", 0xffff_ffff, 0, vec![], 0, UNSUPP, 1),
        ("secure erase", VIRTIO_BLK_T_SECURE_ERASE, 0, range(0, 8, 0), 0, UNSUPP, 1),
        ("a discard without a range", discard, 0, vec![], 0, IOERR, 1),
        ("a discard with a cut range", discard, 0, vec![0; 15], 0, IOERR, 1),
        ("a discard beyond the end", discard, 0, range(last, 2, 0), 0, IOERR, 1),
        ("a discard that wraps", discard, 0, range(u64::MAX, 1, 0), 0, IOERR, 1),
        ("a discard of nothing", discard, 0, range(0, 0, 0), 0, IOERR, 1),
        ("a discard with the flag of the other", discard, 0, range(0, 8, 1), 0, UNSUPP, 1),
        ("a discard with an unknown flag", discard, 0, range(0, 8, 1 << 31), 0, UNSUPP, 1),
        (
            "an unknown flag after nonsense",
            discard,
            0,
            [range(0, 0, 0), range(0, 8, 2)].concat(),
            0,
            UNSUPP,
            1,
        ),
        ("more ranges than allowed", discard, 0, range(0, 8, 0).repeat(17), 0, IOERR, 1),
        ("zeroes with an unknown flag", zeroes, 0, range(0, 8, 2), 0, UNSUPP, 1),
        ("zeroes beyond the end", zeroes, 0, range(0, SECTORS as u32 + 1, 0), 0, IOERR, 1),
        ("zeroes in two ranges", zeroes, 0, range(0, 8, 0).repeat(2), 0, IOERR, 1),
    ];
    let mut driver = Driver::new(Setup::default());
    let before = driver.on_disk(0, SECTORS as usize * 512);
    let malformed = table.iter().filter(|row| row.5 == IOERR).count() as u64;
    for (what, kind, sector, readable, writable, status, length) in table {
        let (answered, answer_length, _) = driver.ask(kind, sector, &readable, writable);
        assert_eq!((answered, answer_length), (status, length), "{what}");
        driver.tidy();
    }
    assert_eq!(driver.on_disk(0, SECTORS as usize * 512), before);
    assert_eq!(seen(&driver.stats.malformed), malformed);
    assert_eq!(seen(&driver.stats.errors), 0);
    assert!(driver.heard.log().broken.is_empty());
}

// virtio 1.2: 5.2.6.2-1
#[test]
fn a_read_only_disk_changes_nothing() {
    let mut driver = Driver::new(Setup { access: Access::ReadOnly, ..Setup::default() });
    assert_eq!(driver.block.features() & (1 << VIRTIO_BLK_F_RO), 1 << VIRTIO_BLK_F_RO);
    let changes = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES | 1 << VIRTIO_BLK_F_CONFIG_WCE;
    assert_eq!(driver.block.features() & changes, 0);
    assert_eq!(driver.write(0, &[1; 512]), IOERR);
    assert_eq!(driver.ask(VIRTIO_BLK_T_DISCARD, 0, &range(1, 8, 0), 0).0, IOERR);
    assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(1, 8, 0), 0).0, IOERR);
    assert_eq!(driver.ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
    assert_eq!(driver.read(1, 512), (OK, vec![1; 512]));
    assert_eq!(driver.on_disk(1, 512), [1; 512]);
}

#[test]
fn what_was_not_agreed_on_is_not_supported() {
    let without = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    let mut driver = Driver::new(Setup { without, ..Setup::default() });
    assert_eq!(driver.ask(VIRTIO_BLK_T_DISCARD, 0, &range(1, 8, 0), 0).0, UNSUPP);
    assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(1, 8, 0), 0).0, UNSUPP);
}

// virtio 1.2: 5.2.6.2-4
#[test]
fn discards_and_zeroes_read_zero_and_keep_the_length() {
    each_engine(|engine| {
        let mut driver = Driver::new(Setup { engine, cache: CacheMode::Writethrough, ..Setup::default() });
        let two = [range(8, 8, 0), range(24, 8, 0)].concat();
        assert_eq!(driver.ask(VIRTIO_BLK_T_DISCARD, 0, &two, 0).0, OK);
        assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(41, 3, 0), 0).0, OK);
        assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(50, 3, 1), 0).0, OK);
        for sector in 0..64 {
            let is_zero = matches!(sector, 0 | 8..16 | 24..32 | 41..44 | 50..53);
            assert_eq!(driver.read(sector, 512).1, vec![if is_zero { 0 } else { sector as u8 }; 512]);
            driver.tidy();
        }
        assert_eq!(driver.file.metadata().unwrap().len(), SECTORS * 512);
        assert_eq!(seen(&driver.stats.discards), 3);
    });
}

// virtio 1.2: 5.2.6.2-4
#[test]
fn zeroes_are_written_where_the_file_can_do_nothing_else() {
    // A memfd sealed against nothing cannot ZERO_RANGE: tmpfs only punches holes.
    let file = File::from(nix::sys::memfd::memfd_create("disk", nix::sys::memfd::MFdFlags::empty()).unwrap());
    file.write_all_at(&vec![9; SECTORS as usize * 512], 0).unwrap();
    let mut driver = Driver::over(file, Setup { cache: CacheMode::Writethrough, ..Setup::default() });
    for sector in [0, 100] {
        assert_eq!(driver.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(sector, 90, 0), 0).0, OK);
        assert_eq!(driver.on_disk(sector, 91 * 512), [vec![0; 90 * 512], vec![9; 512]].concat());
    }
    assert_eq!(seen(&driver.stats.errors), 0);
}

#[test]
fn errors_of_the_storage_are_told_and_counted() {
    each_engine(|engine| {
        let mut driver = Driver::new(Setup { engine, ..Setup::default() });
        // The file shrinks behind the device's back.
        driver.file.set_len(512 * 4).unwrap();
        let (status, length, _) = driver.ask(VIRTIO_BLK_T_IN, 2, &[], 512 * 4);
        assert_eq!((status, length), (IOERR, 0));
        assert_eq!(seen(&driver.stats.errors), 1);
        assert_eq!(seen(&driver.stats.reads), 0);
        assert_eq!(driver.read(3, 512), (OK, vec![3; 512]));
    });
}

#[test]
fn a_disk_of_broken_sectors_is_refused_with_its_length() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1000).unwrap();
    assert!(Disk::new(file, None, Access::ReadOnly).unwrap_err().to_string().contains("1000 bytes"));
}

// virtio 1.2: 4.1.3.2-1 5.2.5.2-3
#[test]
fn the_configuration_says_what_the_device_does() {
    let mut driver = Driver::new(Setup::default());
    let mut space = [0xff; 64];
    driver.block.read_config(0, &mut space);
    assert_eq!(space[..8], SECTORS.to_le_bytes());
    assert_eq!(space[20..24], 512_u32.to_le_bytes());
    assert_eq!(space[32..34], [1, 0]);
    assert_eq!(space[36..40], (1_u32 << 21).to_le_bytes());
    assert_eq!(space[56..], [1, 0, 0, 0, 0, 0, 0, 0]);
    let mut piece = [0xff; 4];
    driver.block.read_config(6, &mut piece);
    assert_eq!(piece, space[6..10]);
    for offset in [60, 4096, u64::MAX - 1, u64::MAX] {
        driver.block.read_config(offset, &mut piece);
        assert_eq!(piece, [0; 4]);
    }
    for (offset, data) in [(0, &[9][..]), (33, &[1]), (32, &[7]), (31, &[0, 0]), (u64::MAX, &[0]), (32, &[])]
    {
        driver.block.write_config(offset, data);
    }
    let mut unchanged = [0xff; 64];
    driver.block.read_config(0, &mut unchanged);
    assert_eq!(unchanged, space);

    driver.block.write_config(32, &[0]);
    driver.block.read_config(32, &mut piece[..1]);
    assert_eq!(piece[0], 0);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    driver.active.take().unwrap().stop();
    driver.block.read_config(32, &mut piece[..1]);
    assert_eq!(piece[0], 1, "a reset brings the default back");
}

// virtio 1.2: 5.2.6.2-5
#[test]
fn writes_are_durable_when_someone_relies_on_it() {
    use memory::ring::Durability::{Cached, Durable};
    let (flush, change) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
    // The operator's mode, what the driver agreed to, what it then wrote to the configuration.
    let table = [
        (CacheMode::Writeback, flush, None, Cached),
        (CacheMode::Writeback, flush | change, None, Cached),
        (CacheMode::Writeback, flush | change, Some(0), Durable),
        (CacheMode::Writeback, flush | change, Some(1), Cached),
        (CacheMode::Writeback, change, None, Durable),
        (CacheMode::Writeback, 0, None, Durable),
        (CacheMode::Writethrough, flush, None, Durable),
        (CacheMode::Writethrough, flush, Some(1), Durable),
        (CacheMode::Writethrough, 0, None, Durable),
    ];
    for (cache, features, written, durability) in table {
        let driver = Driver::new(Setup { cache, ..Setup::default() });
        driver.block.negotiated(features);
        let caching = driver.block.caching(features);
        if let Some(value) = written {
            driver.block.write_config(32, &[value]);
        }
        assert_eq!(caching.durability(), durability, "{cache:?}, {features:#x}, {written:?}");
    }
}

/// What the driver reads once features are agreed on, before it starts the device, and after a reset.
// virtio 1.2: 2.2.2-1 5.2.5.2-1 5.2.5.2-2
#[test]
fn a_cache_that_cannot_be_flushed_is_off_as_soon_as_that_is_agreed_on() {
    let (flush, change) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
    let driver = Driver::new(Setup::default());
    let shown = |features: u64| {
        driver.block.negotiated(features);
        let mut byte = [0xff];
        driver.block.read_config(32, &mut byte);
        byte[0]
    };
    for (features, expected) in [(change, 0), (flush | change, 1), (change, 0), (flush, 1), (0, 1)] {
        assert_eq!(shown(features), expected, "{features:#x}");
        driver.block.write_config(32, &[1 - expected]);
    }
    let offered = driver.block.features();
    assert!(offered & flush != 0 && offered & change != 0, "{offered:#x}");
}

#[test]
fn a_disk_written_through_does_not_let_the_guest_weaken_it() {
    let driver = Driver::new(Setup { cache: CacheMode::Writethrough, ..Setup::default() });
    assert_eq!(driver.block.features() & (1 << VIRTIO_BLK_F_CONFIG_WCE), 0);
    driver.block.write_config(32, &[1]);
    let mut byte = [0xff];
    driver.block.read_config(32, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn a_driver_resets_and_starts_again_with_the_same_ring() {
    let mut driver = Driver::new(Setup::default());
    for round in 0..4_u8 {
        assert_eq!(driver.write(u64::from(round), &[round; 512]), OK);
        assert!(!driver.disk.has_ring());
        driver.active.take().unwrap().stop();
        assert!(driver.disk.has_ring());
        driver.tidy();
        driver.ring = driver.bench.ring(256);
        let (wiring, heard) = driver.bench.wiring(&[&driver.ring], driver.block.features());
        (driver.active, driver.heard) = (Some(driver.block.activate(wiring).unwrap()), heard);
    }
    assert_eq!(driver.read(3, 512), (OK, vec![3; 512]));
}
