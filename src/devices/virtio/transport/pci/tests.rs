use proptest::prelude::*;

use super::*;
use crate::limits::PAUSE_MAX;
use crate::virtio::bench::{PATIENCE, Part, Ring};

mod rig;
mod state;

use rig::{Around, BASE, Rig};

// virtio 1.2: 2.5.2-1 4.1.2.1-1 4.1.4.2-1 4.1.4.3.1-1 4.1.4.3.1-2 4.1.4.4.1-1 4.1.4.4.1-2 4.1.4.4.1-3
// virtio 1.2: 4.1.4.5.1-1 4.1.4.6.1-1 4.1.5.1.2.1-1
#[test]
fn a_driver_finds_every_structure_through_the_capabilities() {
    let rig = Rig::new();
    assert_eq!((rig.config(0, 4), rig.config(8, 4)), (0x1044_1AF4, 0x00FF_0001));
    let structures = [(1, 0, 60), (3, 0x1000, 1), (4, 0x2000, 0x1000), (2, 0x4000, 8)];
    for (kind, offset, length) in structures {
        let at = rig.virtio_capability(kind);
        let bytes = if kind == 2 { 20 } else { 16 };
        assert_eq!(
            (rig.config(at + 2, 1), rig.config(at + 4, 1), rig.config(at + 8, 4), rig.config(at + 12, 4)),
            (bytes, 0, offset, length)
        );
    }
    assert_eq!(rig.config(rig.virtio_capability(2) + 16, 4), 4);
    let msix = rig.capabilities()[0].1;
    assert_eq!(
        (rig.config(msix + 2, 2), rig.config(msix + 4, 4), rig.config(msix + 8, 4)),
        (2, 0x8000, 0xC000)
    );
    assert_eq!(rig.read(0x2000, 8), u64::from_le_bytes(*b"toftecho"));
    assert_eq!(rig.read(0x2006, 4), u64::from(b'h') | u64::from(b'o') << 8);
}

#[test]
fn buffers_go_round_from_a_kick_to_an_interrupt() {
    let mut rig = Rig::new();
    let [mut ring, _] = rig.start();
    assert_eq!(rig.read(20, 1), 15);
    assert_eq!(rig.doorbells(), [BASE + 0x4000, BASE + 0x4004]);
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY, 0, 2);
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [1]);
    assert_eq!(ring.take_used(), Some((0, 5)));
    assert_eq!(rig.read(layout::ISR, 1), 0);
    assert!(rig.faults().is_empty());
}

// virtio 1.2: 2.4.1-1 2.4.1-2
#[test]
fn a_reset_ends_the_thread_before_status_reads_zero() {
    let mut rig = Rig::new();
    rig.start();
    assert_eq!(rig.running.load(Ordering::SeqCst), 1);
    rig.write(20, 0, 1);
    assert_eq!(rig.running.load(Ordering::SeqCst), 0);
    assert_eq!((rig.read(20, 1), rig.read(16, 2)), (0, 0xFFFF));
    assert!(rig.doorbells().is_empty());
    let [_, mut ring] = rig.start();
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY + 4, 1, 4);
    rig.wait("interrupt", |around| around.raised.lock().unwrap().last() == Some(&2));
    rig.function.stop();
    assert_eq!(rig.running.load(Ordering::SeqCst), 0);
}

// virtio 1.2: 2.4.1-2 4.1.4.3.1-6
#[test]
fn a_reset_of_a_device_that_hangs_holds_no_vcpu_and_is_done_when_status_says_so() {
    let mut rig = Rig::new();
    rig.start();
    rig.hung.begin();
    let started = std::time::Instant::now();
    rig.write(20, 0, 1);
    assert!(started.elapsed() < PATIENCE / 2, "the vCPU was held for {:?}", started.elapsed());
    assert_eq!((rig.read(20, 1), rig.running.load(Ordering::SeqCst)), (15, 1));
    assert!(rig.doorbells().is_empty());
    // Until then the device takes nothing, not even another reset or start.
    for (offset, value, width) in [(20, 0, 1), (20, 15, 1), (22, 1, 2), (26, 2, 2)] {
        rig.write(offset, value, width);
    }
    assert_eq!((rig.read(22, 2), rig.read(26, 2)), (1, 2));
    rig.hung.end();
    rig.wait("end of the reset", |_| rig.read(20, 1) == 0);
    assert_eq!((rig.running.load(Ordering::SeqCst), rig.read(26, 2)), (0, 0xFFFF));
    let [mut ring, _] = rig.start();
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY, 0, 2);
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [1]);
}

#[test]
fn a_device_that_hangs_in_its_reset_is_not_drained() {
    let mut rig = Rig::new();
    rig.start();
    rig.hung.begin();
    rig.write(20, 0, 1);
    let patience = Duration::from_millis(50);
    assert_eq!(rig.function.pause(patience), Err(NotDrained { device: "echo".to_owned(), in_flight: 1 }));
    rig.function.resume();
    rig.hung.end();
    rig.function.pause(PAUSE_MAX).unwrap();
    assert_eq!(rig.read(20, 1), 0);
    rig.function.stop();
}

#[test]
fn a_device_that_hangs_holds_no_vcpu_that_takes_its_memory_away() {
    const MEMORY: u32 = 2;
    const MASTER: u32 = 4;
    let mut rig = Rig::new();
    let [mut ring, _] = rig.start();
    rig.hung.begin();
    let started = std::time::Instant::now();
    rig.set_config(4, MEMORY, 2);
    assert!(started.elapsed().as_millis() < u128::from(DRAIN_MS_MAX), "held for {:?}", started.elapsed());
    // It takes nothing new while it hangs, nor when what hung has ended.
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY, 0, 2);
    rig.hung.end();
    rig.function.pause(PAUSE_MAX).unwrap();
    rig.function.resume();
    rig.function.pause(PAUSE_MAX).unwrap();
    assert_eq!(ring.take_used(), None);
    rig.function.resume();
    rig.set_config(4, MEMORY | MASTER, 2);
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [1]);
}

#[test]
fn doorbells_follow_the_bar_and_the_command_register() {
    let mut rig = Rig::new();
    rig.start();
    rig.set_config(4, 4, 2);
    assert!(rig.doorbells().is_empty());
    assert_eq!(rig.function.decoded(), None);
    rig.set_config(0x10, 0xC123_0000, 4);
    rig.set_config(4, 6, 2);
    assert_eq!(rig.doorbells(), [0xC123_4000, 0xC123_4004]);
    assert_eq!(rig.function.decoded(), Some(Decoded { base: 0xC123_0000, length: 0x1_0000 }));
    // Sizing with decoding on, and places outside the window, are nowhere.
    for nowhere in [0xFFFF_FFFF, 0xB000_0000, 0xE000_0000] {
        rig.set_config(0x10, nowhere, 4);
        assert!(rig.doorbells().is_empty() && rig.function.decoded().is_none(), "{nowhere:#x}");
    }
    rig.set_config(0x14, 1, 4);
    rig.set_config(0x10, 0xC123_0000, 4);
    assert!(rig.doorbells().is_empty());
    rig.set_config(0x14, 0, 4);
    assert_eq!(rig.doorbells().len(), 2);
}

#[test]
fn kicks_arrive_without_doorbells_too() {
    let mut rig = Rig::with(Around { refuse_doorbells: true, ..Around::default() }, false);
    let [mut ring, _] = rig.start();
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY, 0, 2);
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [1]);
    rig.write(20, 0, 1);
}

#[test]
fn queues_outside_memory_break_the_device_until_it_is_reset() {
    for (which, address) in [(0, 0x80_0000), (1, 0x80_0000 - 8), (2, !3), (0, 8), (1, 1), (2, 2), (1, 0)] {
        let mut rig = Rig::new();
        let mut ring = rig.bench.ring(16);
        *[&mut ring.table, &mut ring.avail, &mut ring.used][which] = address;
        rig.agree();
        rig.enable(0, &ring);
        rig.write(20, 15, 1);
        assert_eq!(rig.read(20, 1), 15 | 64, "{which} {address:#x}");
        assert_eq!(rig.faults().len(), 1);
        assert!(rig.faults()[0].starts_with("echo: queue 0: "), "{:?}", rig.faults());
        assert_eq!(*rig.around.raised.lock().unwrap(), [0]);
        assert_eq!(rig.running.load(Ordering::SeqCst), 0);
        rig.write(20, 0, 1);
        rig.start();
        assert_eq!(rig.read(20, 1), 15);
    }
}

#[test]
fn a_device_that_cannot_start_says_why() {
    let mut rig = Rig::with(Around::default(), true);
    let ring = rig.bench.ring(16);
    rig.agree();
    rig.enable(0, &ring);
    rig.write(20, 15, 1);
    assert_eq!(rig.read(20, 1), 15 | 64);
    assert_eq!(rig.faults(), ["echo: queue 1 is not enabled"]);
    assert!(rig.doorbells().is_empty());
}

// virtio 1.2: 2.1.2-2
#[test]
fn a_broken_ring_needs_a_reset_and_tells_once() {
    let mut rig = Rig::new();
    let [mut ring, _] = rig.start();
    ring.offer_index(9999);
    rig.write(layout::NOTIFY, 0, 2);
    rig.wait("fault", |around| !around.faults.lock().unwrap().is_empty());
    rig.write(layout::NOTIFY, 0, 2);
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [0]);
    assert_eq!(rig.read(20, 1), 15 | 64);
    rig.write(20, 0, 1);
    assert_eq!((rig.read(20, 1), rig.faults().len()), (0, 1));
}

// virtio 1.2: 4.1.4.5.1-2 4.1.5.4.1-1
#[test]
fn configuration_changes_interrupt_a_running_driver() {
    let mut rig = Rig::new();
    rig.function.signals.config_changed();
    assert_eq!(rig.around.raised.lock().unwrap().len(), 0);
    rig.start();
    rig.function.signals.config_changed();
    assert_eq!(rig.around.raised.lock().unwrap().clone(), [0]);
    // With MSI-X too, and by reading it goes.
    assert_eq!((rig.read(layout::ISR, 1), rig.read(layout::ISR, 1)), (2, 0));
    rig.write(16, 0xFFFF, 2);
    rig.function.signals.config_changed();
    assert_eq!(
        rig.around.raised.lock().unwrap().clone(),
        [0],
        "an event that is not mapped interrupts nobody"
    );
}

/// Any number of changes between two reads, also those that an eight-bit count would not show.
// virtio 1.2: 4.1.4.3.1-5
#[test]
fn the_generation_changes_with_the_first_read_after_a_change() {
    let rig = Rig::new();
    let mut last = rig.read(21, 1);
    rig.read(0x2000, 4);
    assert_eq!(rig.read(21, 1), last, "a first read changes nothing");
    for changes in [1, 2, 255, 256, 257, 512] {
        for at in 0..changes {
            rig.host_config.lock().unwrap()[7] = (at & 0xFF) as u8 ^ 0x55;
            rig.function.signals.config_changed();
        }
        *rig.host_config.lock().unwrap() = [(changes & 0xFF) as u8 | 0x80; 8];
        assert_eq!(rig.read(0x2000, 1), changes & 0xFF | 0x80);
        let now = rig.read(21, 1);
        assert_ne!(now, last, "{changes} changes");
        // The same again is no change.
        rig.read(0x2004, 4);
        assert_eq!(rig.read(21, 1), now);
        last = now;
    }
    // A change in what was read before counts, whichever part is read now.
    rig.host_config.lock().unwrap()[0] ^= 1;
    rig.read(0x2007, 1);
    assert_ne!(rig.read(21, 1), last);
}

// virtio 1.2: 5.2.5.2-2
#[test]
fn a_device_is_told_once_what_was_agreed_on_before_it_starts() {
    let mut rig = Rig::new();
    rig.agree();
    assert_eq!(
        (rig.negotiated.lock().unwrap().clone(), rig.running.load(Ordering::SeqCst)),
        (vec![1 << 32 | 8], 0)
    );
    rig.start();
    assert_eq!(*rig.negotiated.lock().unwrap(), [1 << 32 | 8, 1 << 32 | 8]);
    // A driver that says everything at once.
    let rig = Rig::new();
    for (offset, value, width) in [(20, 3, 1), (8, 1, 4), (12, 1, 4), (20, 15, 1)] {
        rig.write(offset, value, width);
    }
    assert_eq!((rig.negotiated.lock().unwrap().clone(), rig.read(20, 1)), (vec![1 << 32], 15));
    // One that is refused.
    let rig = Rig::new();
    for (offset, value, width) in [(20, 3, 1), (12, 1 << 9, 4), (20, 11, 1)] {
        rig.write(offset, value, width);
    }
    assert_eq!((rig.negotiated.lock().unwrap().len(), rig.read(20, 1)), (0, 3));
}

// virtio 1.2: 4.1.4.5.1-3 4.1.4.5.1-4 4.1.4.5.1-5
#[test]
fn without_msix_the_status_register_tells_and_reading_clears() {
    let mut rig = Rig::new();
    let [mut ring, _] = rig.start();
    let msix = rig.capabilities()[0].1;
    rig.set_config(msix + 2, 0, 2);
    rig.function.signals.config_changed();
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY, 0, 2);
    rig.wait("used buffer", |_| ring.take_used().is_some());
    // The status register of configuration space says what the line, if there were one, would.
    assert_eq!((rig.config(6, 2), rig.config(4, 4) >> 16), (0x18, 0x18));
    let mut seen = 0;
    rig.wait("status", |_| {
        seen |= rig.read(layout::ISR, 1);
        seen == 3
    });
    assert_eq!((rig.read(layout::ISR, 1), rig.config(6, 2)), (0, 0x10));
    assert!(rig.around.raised.lock().unwrap().is_empty());
}

// virtio 1.2: 4.1.5.1.2.1-5
#[test]
fn vectors_out_of_range_read_back_as_none() {
    let rig = Rig::new();
    rig.write(16, 2, 2);
    rig.write(26, 3, 2);
    assert_eq!((rig.read(16, 2), rig.read(26, 2)), (2, 0xFFFF));
}

// virtio 1.2: 4.1.4.3.1-7 4.1.5.1.2.1-2 4.1.5.1.2.1-3 4.1.5.1.2.1-4 4.1.5.3.1-1 4.1.5.4.1-1
#[test]
fn any_event_takes_any_vector_or_none_and_a_reset_takes_it_away() {
    let mut rig = Rig::new();
    let msix = rig.capabilities()[0].1;
    let vectors = rig.config(msix + 2, 2) + 1;
    let [mut ring, _] = rig.start();
    let mut used = |rig: &Rig| {
        let head = ring.chain(&[Part::Write(0x1000, 5)]);
        ring.offer(head);
        rig.write(layout::NOTIFY, 0, 2);
        rig.wait("used buffer", |_| ring.take_used().is_some());
        // The signal follows the buffer; a pause ends after both.
        rig.function.pause(PAUSE_MAX).unwrap();
        rig.function.resume();
        std::mem::take(&mut *rig.around.raised.lock().unwrap())
    };
    rig.write(22, 0, 2);
    for vector in (0..vectors).chain([0xFFFF]) {
        rig.write(26, vector, 2);
        rig.write(16, vector, 2);
        assert_eq!((rig.read(26, 2), rig.read(16, 2)), (vector, vector));
        let expected: Vec<u16> = if vector == 0xFFFF { vec![] } else { vec![vector as u16] };
        assert_eq!(used(&rig), expected);
        rig.function.signals.config_changed();
        assert_eq!(std::mem::take(&mut *rig.around.raised.lock().unwrap()), expected);
    }
    rig.write(26, 1, 2);
    rig.write(16, 1, 2);
    rig.write(20, 0, 1);
    for queue in 0..2 {
        rig.write(22, queue, 2);
        assert_eq!((rig.read(26, 2), rig.read(28, 2), rig.read(16, 2)), (0xFFFF, 0, 0xFFFF));
    }
}

// virtio 1.2: 2.1.2-1 4.1.4.3.1-3 4.1.4.3.1-4 6.2-1
#[test]
fn buffers_wait_until_the_driver_is_ready_and_features_show_what_was_written() {
    let mut rig = Rig::new();
    let mut ring = rig.bench.ring(16);
    rig.agree();
    for (select, features) in [(0, 8), (1, 1), (2, 0), (u64::from(u32::MAX), 0)] {
        rig.write(8, select, 4);
        assert_eq!(rig.read(12, 4), features, "{select}");
    }
    for (select, features) in [(0, 8 | 3 << 28), (1, 1), (2, 0), (3, 0), (u64::from(u32::MAX), 0)] {
        rig.write(0, select, 4);
        assert_eq!(rig.read(4, 4), features, "{select}");
    }
    rig.enable(0, &ring);
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY, 0, 2);
    assert_eq!((ring.take_used(), rig.running.load(Ordering::SeqCst)), (None, 0));
    assert!(rig.around.raised.lock().unwrap().is_empty());
    rig.write(20, 15, 1);
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [1]);
    assert_eq!(ring.take_used(), Some((0, 5)));
}

// virtio 1.2: 4.1.4.9.1-1 4.1.4.9.1-2 4.1.4.9.1-3
#[test]
fn the_indirect_window_reaches_the_bar() {
    let rig = Rig::new();
    let at = rig.virtio_capability(5);
    let point = |bar: u32, offset: u32, length: u32| {
        rig.set_config(at + 4, bar, 1);
        rig.set_config(at + 8, offset, 4);
        rig.set_config(at + 12, length, 4);
    };
    point(0, 0x2000, 4);
    assert_eq!(rig.config(at + 16, 4), u64::from(u32::from_le_bytes(*b"toft")));
    rig.set_config(at + 16, u32::from_le_bytes(*b"loft"), 4);
    assert_eq!(rig.read(0x2000, 4), u64::from(u32::from_le_bytes(*b"loft")));
    // The access has the window's width, whatever the width it is asked for with.
    rig.write(0x2000, u64::from(u32::from_le_bytes(*b"toft")), 4);
    point(0, 0x2001, 1);
    assert_eq!(rig.config(at + 16, 4) & 0xFF, u64::from(b'o'));
    rig.set_config(at + 16, u32::from_le_bytes(*b"aXYZ"), 4);
    assert_eq!(rig.read(0x2000, 4), u64::from(u32::from_le_bytes(*b"taft")));
    point(0, 0x2002, 2);
    rig.set_config(at + 16, u32::from(b'p'), 1);
    rig.set_config(at + 17, u32::from(b'q'), 1);
    assert_eq!(rig.read(0x2000, 4), u64::from(u32::from_le_bytes(*b"tapq")));
    assert_eq!(rig.config(at + 17, 1), u64::from(b'q'));
    rig.write(0x2000, u64::from(u32::from_le_bytes(*b"loft")), 4);
    point(0, 20, 1);
    rig.set_config(at + 16, 1, 1);
    assert_eq!((rig.read(20, 1), rig.config(at + 16, 1)), (1, 1));
    // What cannot be an access changes nothing.
    for (bar, offset, length) in
        [(1, 20, 1), (0, 21, 2), (0, 0x1_0000, 4), (0, 20, 3), (0, 20, 0), (0, 20, 8)]
    {
        point(bar, offset, length);
        rig.set_config(at + 16, 0xFF, 1);
        rig.set_config(at + 16, 0xFFFF_FFFF, 4);
        rig.config(at + 16, 4);
        assert_eq!(rig.read(20, 1), 1, "{bar} {offset} {length}");
    }
}

#[test]
fn a_pause_reaches_the_device_and_work_goes_on_after_it() {
    let mut rig = Rig::new();
    rig.function.pause(PAUSE_MAX).unwrap();
    rig.function.resume();
    let [mut ring, _] = rig.start();
    rig.function.pause(PAUSE_MAX).unwrap();
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY, 0, 2);
    rig.function.pause(PAUSE_MAX).unwrap();
    assert_eq!(ring.take_used(), None);
    rig.function.resume();
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [1]);
}

#[test]
fn a_function_that_is_no_bus_master_leaves_memory_alone() {
    const MEMORY: u32 = 2;
    const MASTER: u32 = 4;
    let mut rig = Rig::new();
    let [mut ring, _] = rig.start();
    let offer = |rig: &Rig, ring: &mut Ring| {
        let head = ring.chain(&[Part::Write(0x1000, 5)]);
        ring.offer(head);
        rig.write(layout::NOTIFY, 0, 2);
    };
    // What a kernel does with every device before it starts another kernel.
    rig.set_config(4, MEMORY, 2);
    offer(&rig, &mut ring);
    // A pause of the machine ends after everything that the device would have begun.
    rig.function.pause(PAUSE_MAX).unwrap();
    rig.function.resume();
    rig.function.pause(PAUSE_MAX).unwrap();
    assert_eq!(ring.take_used(), None);
    // Mastering again does not undo the machine's pause, and the pause's end does not wait for another kick.
    rig.set_config(4, MEMORY | MASTER, 2);
    rig.function.pause(PAUSE_MAX).unwrap();
    assert_eq!(ring.take_used(), None);
    rig.function.resume();
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [1]);
    assert_eq!(ring.take_used(), Some((0, 5)));

    rig.write(20, 0, 1);
    let [mut ring, _] = rig.start();
    rig.set_config(4, MEMORY, 2);
    offer(&rig, &mut ring);
    rig.set_config(4, MEMORY | MASTER, 2);
    rig.wait("interrupt", |around| *around.raised.lock().unwrap() == [1, 1]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any driver at all: registers of every width at every place, queues anywhere. Nothing panics, the device
    /// runs at most once, and doorbells exist only for a running device with a decoded BAR.
    #[test]
    fn no_sequence_of_accesses_confuses_the_function(
        steps in proptest::collection::vec(
            (
                0_u8..6,
                prop_oneof![0_u64..64, 0x1000_u64..0x1008, 0x2000_u64..0x2010, 0x4000_u64..0x4010, 0x8000_u64..0x8040, 0xC000_u64..0xC008, any::<u64>()],
                prop_oneof![Just(1_usize), Just(2), Just(4), Just(8), 0_usize..9],
                prop_oneof![0_u64..16, Just(0xC000_0000), Just(0x10_0000), any::<u64>()],
            ),
            0..80,
        ),
        well_behaved_at in proptest::option::of(0_usize..80),
    ) {
        let mut rig = Rig::new();
        for (at, (what, offset, width, value)) in steps.into_iter().enumerate() {
            if well_behaved_at == Some(at) {
                rig.set_config(0x10, BASE as u32, 4);
                rig.set_config(0x14, 0, 4);
                rig.start();
            }
            let mut data = value.to_le_bytes();
            match what {
                0 | 1 => rig.function.write_memory(offset, &data[..width]),
                2 => rig.function.read_memory(offset, &mut data[..width]),
                3 => rig.write(20, value & 0x8F, 1),
                4 => rig.function.write_config((offset % 0x100) as u16 & !3, &data[..4]),
                _ => rig.function.read_config((offset % 0x1000) as u16 & !3, &mut data[..4]),
            }
            let state = rig.function.state.lock().unwrap();
            let (running, ending) = (state.active.is_some(), state.ending.is_some());
            drop(state);
            // One that is being reset has its time to end.
            let count = rig.running.load(Ordering::SeqCst);
            prop_assert!(count == usize::from(running) || (ending && count == 1), "{count} run");
            if !running || rig.function.decoded().is_none() {
                prop_assert!(rig.doorbells().is_empty());
            }
        }
        rig.function.stop();
        prop_assert_eq!(rig.running.load(Ordering::SeqCst), 0);
        prop_assert!(rig.doorbells().is_empty());
    }
}
