//! A function taken over by another, and states that no function has ever had.
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::state::FunctionState;
use super::rig::{BASE, Rig};
use crate::limits::PAUSE_MAX;
use crate::pci::Function;
use crate::virtio::bench::Part;
use crate::virtio::transport::pci::layout;

fn saved(rig: &Rig) -> FunctionState {
    rig.function.pause(PAUSE_MAX).unwrap();
    rig.function.save().unwrap()
}

#[test]
fn buffers_go_on_in_another_function_where_they_stopped() {
    let mut rig = Rig::new();
    let [mut ring, _] = rig.start();
    for round in 0..40_u16 {
        let head = ring.chain(&[Part::Write(0x1000, 5)]);
        ring.offer(head);
        if round % 2 == 0 {
            rig.write(layout::NOTIFY, 0, 2);
            rig.wait("interrupt", |around| !around.raised.lock().unwrap().is_empty());
            while ring.take_used().is_none() {}
            rig.around.raised.lock().unwrap().clear();
        }
        let state = saved(&rig);
        rig.function.stop();
        // A thread that was let go just now may still have been on its first look, and found what was offered.
        let found = !rig.around.raised.lock().unwrap().is_empty();
        let next = rig.beside();
        next.function.restore(&state).unwrap();
        assert_eq!(saved(&next), state);
        assert_eq!(next.doorbells(), [BASE + 0x4000, BASE + 0x4004]);
        next.function.resume();
        if round % 2 == 1 {
            // No kick comes again for what was offered before.
            next.wait("interrupt", |around| found || !around.raised.lock().unwrap().is_empty());
            assert!(ring.take_used().is_some());
            assert_eq!(ring.take_used(), None);
            next.around.raised.lock().unwrap().clear();
        }
        assert!(next.faults().is_empty());
        rig = next;
    }
}

#[test]
fn what_was_pending_behind_a_mask_is_raised_when_the_mask_goes() {
    let mut rig = Rig::new();
    let [mut ring, _] = rig.start();
    rig.write(layout::TABLE + 16 + 12, 1, 4);
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    rig.write(layout::NOTIFY, 0, 2);
    while rig.read(layout::PENDING, 1) != 2 {
        std::thread::yield_now();
    }
    let state = saved(&rig);
    assert_eq!(state.msix.pending, [1]);
    rig.function.stop();
    let next = rig.beside();
    next.function.restore(&state).unwrap();
    assert_eq!(next.read(layout::PENDING, 1), 2);
    assert!(next.around.raised.lock().unwrap().is_empty());
    next.write(layout::TABLE + 16 + 12, 0, 4);
    assert_eq!(*next.around.raised.lock().unwrap(), [1]);
}

#[test]
fn a_function_is_saved_only_while_it_is_paused_and_restored_only_when_new() {
    let mut rig = Rig::new();
    rig.start();
    assert!(rig.function.save().unwrap_err().detail.contains("not paused"));
    let state = saved(&rig);
    assert!(rig.function.restore(&state).unwrap_err().detail.contains("serves a driver"));
    assert_eq!(rig.running.load(Ordering::SeqCst), 1);
}

#[test]
fn a_broken_function_stays_broken_until_its_driver_resets_it() {
    let mut rig = Rig::new();
    let [mut ring, _] = rig.start();
    let head = ring.chain(&[Part::Write(0x1000, 5)]);
    ring.offer(head);
    ring.offer(200);
    rig.write(layout::NOTIFY, 0, 2);
    while rig.faults().is_empty() {
        std::thread::yield_now();
    }
    let state = saved(&rig);
    assert!(state.signals.broken && state.stand.is_none());
    let mut next = rig.beside();
    next.function.restore(&state).unwrap();
    next.function.resume();
    assert_eq!(next.read(20, 1), 15 | 64);
    next.write(20, 0, 1);
    assert_eq!(next.read(20, 1), 0);
    next.start();
    assert_eq!(next.read(20, 1), 15);
}

#[test]
fn states_that_cannot_be_are_refused_by_what_is_wrong() {
    let mut rig = Rig::new();
    rig.start();
    let good = saved(&rig);
    type Change = fn(&mut FunctionState);
    let changes: [(&str, Change); 19] = [
        ("in its place", |state| state.device = "disk7".to_owned()),
        ("in its place", |state| state.device_type = 2),
        ("cannot be written", |state| state.config = vec![0xFF; 4]),
        ("cannot be written", |state| state.config = vec![0; 300]),
        ("queues were saved", |state| state.common.queues.truncate(1)),
        ("queue of 24", |state| state.common.queues[0].size = 24),
        ("queue of 32", |state| state.common.queues[0].size = 32),
        ("status of 0xcf", |state| state.common.status |= 0xC0),
        ("not offered", |state| state.common.features |= 1 << 40),
        ("before features", |state| state.common.status = 7),
        ("does not lie in guest memory", |state| state.common.queues[0].addresses[2] = 1 << 50),
        ("does not lie in guest memory", |state| state.common.queues[1].addresses = [u64::MAX - 15; 3]),
        ("vector 9 does not exist", |state| state.signals.config_vector = 9),
        ("queues have vectors", |state| state.signals.queue_vectors.push(0)),
        ("interrupt status", |state| state.signals.isr = 4),
        ("table has 1 vectors", |state| state.msix.entries.truncate(1)),
        ("pending and does not exist", |state| state.msix.pending = vec![3]),
        ("where each enabled queue stands", |state| state.stand.as_mut().unwrap().queues[0].0 = 1),
        ("exactly when it serves", |state| state.stand = None),
    ];
    for (wanted, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let next = rig.beside();
        let refused = next.function.restore(&bad).expect_err(wanted);
        assert!(refused.to_string().contains(wanted), "{refused} is not {wanted}");
        next.function.stop();
    }
}

proptest! {
    #[test]
    fn whatever_a_guest_has_written_is_restored_as_it_was(
        writes in prop::collection::vec((0..3_u8, 0..0x200_u64, any::<u64>(), 0..4_u32), 0..120)
    ) {
        let rig = Rig::new();
        for (where_to, offset, value, width) in writes {
            let width = 1_usize << width;
            match where_to {
                0 => rig.set_config((offset % 64) as u16 * 4, value as u32, width.min(4)),
                1 => rig.write(offset % 64, value, width),
                _ => rig.write(layout::TABLE + offset % 64, value, width),
            }
        }
        let state = saved(&rig);
        let next = rig.beside();
        next.function.restore(&state).unwrap();
        prop_assert_eq!(next.function.pause(PAUSE_MAX), Ok(()));
        prop_assert_eq!(next.function.save(), Ok(state));
        for offset in (0..64).step_by(4) {
            prop_assert_eq!(rig.config(offset, 4), next.config(offset, 4));
            prop_assert_eq!(rig.read(u64::from(offset), 4), next.read(u64::from(offset), 4));
        }
        rig.function.stop();
        next.function.stop();
    }
}
