use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use memory::layout::PCI_BAR_BYTES;

use super::*;
use crate::pci::config::{ConfigSpace, Identity};

/// A function that logs what its BAR is asked and can refuse to pause.
struct Card {
    config: Mutex<ConfigSpace>,
    memory: Mutex<Vec<(u64, Vec<u8>)>>,
    stuck: bool,
    pauses: AtomicUsize,
    resumes: AtomicUsize,
    /// What was done to end it, in order.
    endings: Mutex<Vec<&'static str>>,
}

impl Card {
    fn new(device: u16, stuck: bool) -> Arc<Card> {
        let identity =
            Identity { vendor: 0x1AF4, device, revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut config = ConfigSpace::new(identity);
        config.add_memory_bar(PCI_BAR_BYTES);
        Arc::new(Card {
            config: Mutex::new(config),
            memory: Mutex::default(),
            stuck,
            pauses: AtomicUsize::new(0),
            resumes: AtomicUsize::new(0),
            endings: Mutex::default(),
        })
    }
}

impl Function for Card {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        assert!(is_one_cycle(u64::from(offset), data.len()) && offset < 4096);
        self.config.lock().unwrap().read(offset, data);
    }
    fn write_config(&self, offset: u16, data: &[u8]) {
        assert!(is_one_cycle(u64::from(offset), data.len()) && offset < 4096);
        self.config.lock().unwrap().write(offset, data);
    }
    fn assign(&self, address: u64) {
        self.config.lock().unwrap().assign_memory_bar(address);
    }
    fn decoded(&self) -> Option<Decoded> {
        let base = self.config.lock().unwrap().memory_bar()?;
        Some(Decoded { base, length: PCI_BAR_BYTES })
    }
    fn read_memory(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_memory(&self, offset: u64, data: &[u8]) {
        self.memory.lock().unwrap().push((offset, data.to_vec()));
    }
    fn pause(&self, _patience: Duration) -> Result<(), NotDrained> {
        self.pauses.fetch_add(1, Ordering::SeqCst);
        if self.stuck { Err(NotDrained { device: "card".to_owned(), in_flight: 1 }) } else { Ok(()) }
    }
    fn resume(&self) {
        self.resumes.fetch_add(1, Ordering::SeqCst);
    }
    fn ask_to_stop(&self) {
        self.endings.lock().unwrap().push("ask");
    }
    fn stop(&self) {
        self.endings.lock().unwrap().push("stop");
    }
}

fn read(region: &dyn Region, offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0xA5; length];
    region.read(offset, &mut data);
    data
}

#[test]
fn ecam_reaches_each_slot_and_nothing_else() {
    let root = Root::new();
    root.attach(3, Card::new(0x1042, false), 0xC003_0000).unwrap();
    let ecam = root.ecam();
    assert_eq!(read(&*ecam, 0, 4), [0x36, 0x1B, 0x08, 0x00]);
    assert_eq!(read(&*ecam, 3 << 15, 4), [0xF4, 0x1A, 0x42, 0x10]);
    assert_eq!(read(&*ecam, 3 << 15 | 2, 2), [0x42, 0x10]);
    assert_eq!(read(&*ecam, 3 << 15 | 3, 1), [0x10]);
    assert_eq!(read(&*ecam, 3 << 15 | 0x10, 8), [4, 0, 3, 0xC0, 0, 0, 0, 0]);
    // Extended configuration space is there and empty.
    assert_eq!(read(&*ecam, 3 << 15 | 0x100, 4), [0; 4]);
    assert_eq!(read(&*ecam, 3 << 15 | 0xFFC, 4), [0; 4]);
    for absent in [3 << 15 | 1 << 12, 4 << 15, 31 << 15 | 7 << 12, 1 << 20, u64::MAX - 3] {
        assert_eq!(read(&*ecam, absent, 4), [0xFF; 4], "{absent:#x}");
    }
}

#[test]
fn accesses_that_no_configuration_cycle_can_make_read_all_ones() {
    let root = Root::new();
    root.attach(1, Card::new(0x1042, false), 0xC001_0000).unwrap();
    let (ecam, ports) = (root.ecam(), root.ports());
    ports.write(0, &(ADDRESS_ENABLE | 1 << 11).to_le_bytes());
    for (offset, length) in [(1, 4), (3, 2), (1, 3), (0, 3)] {
        assert_eq!(read(&*ecam, 1 << 15 | offset, length), vec![0xFF; length]);
        assert_eq!(read(&*ports, 4 + offset, length), vec![0xFF; length]);
        ecam.write(1 << 15 | offset, &vec![0; length]);
        ports.write(4 + offset, &vec![0; length]);
    }
    assert_eq!(read(&*ports, 2, 4), [0xFF; 4]);
    assert_eq!(read(&*ports, 0, 8), [0xFF; 8]);
}

#[test]
fn the_ports_reach_what_ecam_reaches() {
    let root = Root::new();
    root.attach(31, Card::new(0x1041, false), 0xC01F_0000).unwrap();
    let ports = root.ports();
    let select = |address: u32| ports.write(0, &address.to_le_bytes());
    assert_eq!(read(&*ports, 4, 4), [0xFF; 4]);
    select(u32::MAX);
    assert_eq!(read(&*ports, 0, 4), ADDRESS_BITS.to_le_bytes());
    select(ADDRESS_ENABLE | 31 << 11);
    assert_eq!(read(&*ports, 4, 4), [0xF4, 0x1A, 0x41, 0x10]);
    assert_eq!(read(&*ports, 6, 2), [0x41, 0x10]);
    assert_eq!(read(&*ports, 7, 1), [0x10]);
    select(ADDRESS_ENABLE | 31 << 11 | 4);
    ports.write(4, &[0xFF, 0xFF]);
    assert_eq!(read(&*ports, 4, 2), [0x06, 0x04]);
    for absent in
        [31 << 11, ADDRESS_ENABLE | 1 << 16, ADDRESS_ENABLE | 30 << 11, ADDRESS_ENABLE | 31 << 11 | 1 << 8]
    {
        select(absent);
        assert_eq!(read(&*ports, 4, 4), [0xFF; 4], "{absent:#x}");
    }
    // A byte of the address port is not the address register; Linux probes with one.
    select(ADDRESS_ENABLE);
    ports.write(3, &[1]);
    assert_eq!(read(&*ports, 0, 4), ADDRESS_ENABLE.to_le_bytes());
}

#[test]
fn memory_reaches_a_bar_where_the_guest_has_put_it() {
    let root = Root::new();
    let card = Card::new(0x1042, false);
    root.attach(2, card.clone(), 0xC002_0000).unwrap();
    let (ecam, window) = (root.ecam(), root.window());
    assert_eq!(read(&*window, 0x2_0000, 4), [0xFF; 4]);
    ecam.write(2 << 15 | 4, &[2, 0]);
    assert_eq!(read(&*window, 0x2_0010, 4), [0x10; 4]);
    window.write(0x2_FFFC, &[1, 2, 3, 4]);
    window.write(0x2_FFFD, &[1, 2, 3, 4]);
    ecam.write(2 << 15 | 0x10, &0xC100_0000_u32.to_le_bytes());
    assert_eq!(read(&*window, 0x2_0010, 4), [0xFF; 4]);
    window.write(0x100_0008, &[9]);
    assert_eq!(*card.memory.lock().unwrap(), [(0xFFFC, vec![1, 2, 3, 4]), (8, vec![9])]);
}

#[test]
fn a_slot_takes_one_function() {
    let root = Root::new();
    let card = Card::new(0x1042, false);
    assert_eq!(root.attach(32, card.clone(), 0), Err(AttachError::NoSlot(32)));
    assert_eq!(root.attach(0, card.clone(), 0), Err(AttachError::Taken(0)));
    root.attach(1, card.clone(), 0).unwrap();
    assert_eq!(root.attach(1, card, 0), Err(AttachError::Taken(1)));
}

#[test]
fn a_pause_that_fails_lets_everything_go_on() {
    let root = Root::new();
    let cards = [Card::new(1, false), Card::new(2, true), Card::new(3, false)];
    for (slot, card) in (1..).zip(&cards) {
        root.attach(slot, card.clone(), 0).unwrap();
    }
    assert_eq!(root.pause().unwrap_err().in_flight, 1);
    let count = |counter: fn(&Card) -> &AtomicUsize| {
        cards.each_ref().map(|card| counter(card).load(Ordering::SeqCst))
    };
    assert_eq!(count(|card| &card.pauses), [1, 1, 0]);
    assert_eq!(count(|card| &card.resumes), [1, 1, 0]);
}

#[test]
fn every_function_is_asked_to_stop_before_one_is_waited_for() {
    let root = Root::new();
    let cards = [Card::new(1, false), Card::new(2, false)];
    /// Sees, when it is waited for, what the other was asked.
    struct Last(Arc<Card>, Mutex<Vec<&'static str>>);
    impl Function for Last {
        fn read_config(&self, _offset: u16, _data: &mut [u8]) {}
        fn write_config(&self, _offset: u16, _data: &[u8]) {}
        fn assign(&self, _address: u64) {}
        fn decoded(&self) -> Option<Decoded> {
            None
        }
        fn read_memory(&self, _offset: u64, _data: &mut [u8]) {}
        fn write_memory(&self, _offset: u64, _data: &[u8]) {}
        fn pause(&self, _patience: Duration) -> Result<(), NotDrained> {
            Ok(())
        }
        fn resume(&self) {}
        fn ask_to_stop(&self) {}
        fn stop(&self) {
            self.1.lock().unwrap().extend(self.0.endings.lock().unwrap().iter());
        }
    }
    let first = Arc::new(Last(Arc::clone(&cards[1]), Mutex::default()));
    root.attach(1, first.clone(), 0).unwrap();
    root.attach(2, cards[0].clone(), 0xC001_0000).unwrap();
    root.attach(3, cards[1].clone(), 0xC002_0000).unwrap();
    root.stop();
    assert_eq!(*first.1.lock().unwrap(), ["ask"]);
    for card in cards {
        assert_eq!(*card.endings.lock().unwrap(), ["ask", "stop"]);
    }
}
