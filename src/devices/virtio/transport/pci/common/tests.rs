use proptest::prelude::*;

use super::*;

const OFFERED: u64 = VERSION_1 | 1 << 29 | 1 << 5;

fn live(broken: bool) -> Live {
    Live { config_vector: 7, queue_vectors: vec![3, 4], generation: 9, broken }
}

fn common() -> Common {
    Common::new(OFFERED, &[256, 64])
}

fn write(common: &mut Common, offset: u64, value: u64, width: usize) -> Outcome {
    common.write(offset, &value.to_le_bytes()[..width], false)
}

fn read(common: &Common, offset: usize, width: usize) -> u64 {
    little_endian(&common.image(&live(false))[offset..offset + width])
}

fn agree(common: &mut Common, features: u64) -> u64 {
    write(common, 20, 3, 1);
    write(common, 8, 0, 4);
    write(common, 12, features & 0xFFFF_FFFF, 4);
    write(common, 8, 1, 4);
    write(common, 12, features >> 32, 4);
    write(common, 20, 11, 1);
    read(common, 20, 1)
}

#[test]
fn the_structure_lies_as_the_specification_says() {
    let mut common = common();
    write(&mut common, 0, 1, 4);
    write(&mut common, 22, 1, 2);
    assert_eq!((read(&common, 0, 4), read(&common, 4, 4)), (1, 1));
    assert_eq!((read(&common, 16, 2), read(&common, 18, 2)), (7, 2));
    assert_eq!((read(&common, 20, 1), read(&common, 21, 1)), (0, 9));
    assert_eq!((read(&common, 22, 2), read(&common, 24, 2), read(&common, 26, 2)), (1, 64, 4));
    assert_eq!((read(&common, 28, 2), read(&common, 30, 2)), (0, 1));
    assert_eq!(common.image(&live(true))[20], NEEDS_RESET);
    write(&mut common, 0, 2, 4);
    assert_eq!(read(&common, 4, 4), 0);
}

// virtio 1.2: 2.2.2-2
#[test]
fn features_are_agreed_on_only_as_a_subset_with_version_1() {
    let refused = [0, 1 << 5, VERSION_1 | 1 << 6, VERSION_1 | 1 << 63];
    for features in refused {
        assert_eq!(agree(&mut common(), features), 3, "{features:#x}");
    }
    for features in [VERSION_1, OFFERED] {
        let mut common = common();
        assert_eq!(agree(&mut common, features), 11, "{features:#x}");
        assert_eq!(common.features(), features);
        write(&mut common, 12, 0, 4);
        assert_eq!(common.features(), features, "features latch");
    }
    let mut common = common();
    write(&mut common, 8, 2, 4);
    write(&mut common, 12, 1, 4);
    assert_eq!(agree(&mut common, VERSION_1), 3, "bits beyond 64 are unknown");
}

#[test]
fn a_driver_that_is_ready_too_early_is_told_so() {
    assert!(matches!(write(&mut common(), 20, 7, 1), Outcome::Broken(_)));
    let mut common = common();
    agree(&mut common, OFFERED);
    assert_eq!(write(&mut common, 20, 15, 1), Outcome::Activate);
    assert_eq!(write(&mut common, 20, 15, 1), Outcome::Nothing, "ready is ready once");
    assert_eq!(write(&mut common, 20, 1, 1), Outcome::Nothing);
    assert_eq!(read(&common, 20, 1), 15, "bits are never taken back");
    assert_eq!(write(&mut common, 20, 128, 1), Outcome::Nothing);
    assert_eq!(read(&common, 20, 1), 143);
    assert_eq!(write(&mut common, 20, 0, 1), Outcome::Reset);
    assert_eq!(read(&common, 20, 1), 143, "status is 0 only when the reset is done");
    common.reset();
    assert_eq!((read(&common, 20, 1), common.features()), (0, 0));
}

#[test]
fn a_broken_device_takes_nothing_but_failure_and_reset() {
    let mut common = common();
    agree(&mut common, OFFERED);
    assert_eq!(common.write(20, &[15], true), Outcome::Nothing);
    assert_eq!(common.image(&live(true))[20], 11 | NEEDS_RESET);
    assert_eq!(common.write(20, &[0], true), Outcome::Reset);
}

// virtio 1.2: 4.1.3.2-1 4.1.4.3.1-10
#[test]
fn queue_registers_latch_when_the_queue_is_enabled() {
    let mut common = common();
    agree(&mut common, OFFERED);
    for bad in [0, 3, 512, 0xFFFF] {
        write(&mut common, 24, bad, 2);
        assert_eq!(read(&common, 24, 2), 256, "{bad}");
    }
    write(&mut common, 24, 16, 2);
    write(&mut common, 32, 0x1_2345_6780, 8);
    write(&mut common, 40, 0x1000, 4);
    write(&mut common, 44, 2, 4);
    write(&mut common, 52, 3, 4);
    let before = common.queues()[0].clone();
    assert_eq!(before.addresses, [0x1_2345_6780, 0x2_0000_1000, 0x3_0000_0000]);
    write(&mut common, 28, 1, 2);
    write(&mut common, 28, 0, 2);
    write(&mut common, 24, 32, 2);
    write(&mut common, 32, 0, 8);
    write(&mut common, 48, 0, 4);
    assert_eq!(common.queues()[0], QueueRegisters { enabled: true, ..before });
    assert_eq!(write(&mut common, 26, 5, 2), Outcome::QueueVector(0, 5));
}

#[test]
fn queues_that_are_not_enabled_in_time_stay_off() {
    let mut common = common();
    agree(&mut common, OFFERED);
    write(&mut common, 20, 15, 1);
    write(&mut common, 22, 1, 2);
    write(&mut common, 24, 16, 2);
    write(&mut common, 28, 1, 2);
    assert_eq!(common.queues(), Common::new(OFFERED, &[256, 64]).queues());
}

// virtio 1.2: 4.1.4.3.1-9
#[test]
fn a_queue_that_does_not_exist_reads_zero_and_takes_nothing() {
    let mut common = common();
    write(&mut common, 22, 2, 2);
    for offset in [24, 28, 30] {
        assert_eq!(read(&common, offset, 2), 0);
        assert_eq!(write(&mut common, offset as u64, 1, 2), Outcome::Nothing);
    }
    assert_eq!(write(&mut common, 26, 1, 2), Outcome::Nothing);
    assert_eq!(read(&common, 26, 2), u64::from(NO_VECTOR));
    write(&mut common, 32, 0xFFFF, 8);
    assert_eq!(read(&common, 32, 8), 0);
}

#[test]
fn odd_widths_and_alignments_change_nothing() {
    let mut common = common();
    let before = common.image(&live(false));
    for (offset, width) in [
        (0, 1),
        (0, 2),
        (0, 8),
        (1, 4),
        (12, 2),
        (20, 2),
        (20, 4),
        (22, 1),
        (24, 4),
        (28, 4),
        (32, 2),
        (34, 4),
        (36, 8),
        (56, 4),
        (56, 8),
        (60, 4),
        (100, 4),
        (u64::MAX, 4),
    ] {
        assert_eq!(write(&mut common, offset, 0x0101_0101_0101_0101, width), Outcome::Nothing);
        assert_eq!(common.image(&live(false)), before, "{offset} {width}");
    }
}

proptest! {
    /// The latch invariants under any driver: what is enabled, agreed on or started changes by reset only.
    // virtio 1.2: 4.1.4.3.1-10
    #[test]
    fn what_has_latched_stays_under_any_sequence_of_writes(
        steps in proptest::collection::vec(
            (
                prop_oneof![8 => (0_u64..16).prop_map(|at| [0, 8, 12, 16, 20, 22, 24, 26, 28, 32, 36, 40, 44, 48, 52, 20][at as usize]), 1 => 0_u64..70],
                prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)],
                prop_oneof![0_u64..16, Just(1 << 8), Just(OFFERED >> 32), Just(OFFERED & 0xFFFF_FFFF), any::<u64>()],
            ),
            0..200,
        )
    ) {
        let mut common = common();
        let mut running = false;
        for (offset, width, value) in steps {
            let (status, features) = (common.status, common.features());
            let queues = common.queues().to_vec();
            match write(&mut common, offset, value, width) {
                Outcome::Reset => {
                    common.reset();
                    running = false;
                    prop_assert!(common.queues().iter().all(|queue| !queue.enabled));
                    continue;
                }
                Outcome::Activate => {
                    prop_assert!(!running && common.status & FEATURES_OK != 0);
                    running = true;
                }
                _ => {}
            }
            prop_assert_eq!(common.status & status, status);
            prop_assert_eq!(common.status & NEEDS_RESET, 0);
            if status & FEATURES_OK != 0 {
                prop_assert_eq!(common.features(), features);
                prop_assert_eq!(features & !OFFERED, 0);
            }
            for (before, after) in queues.iter().zip(common.queues()) {
                if before.enabled || status & DRIVER_OK != 0 {
                    prop_assert_eq!(before, after);
                }
                prop_assert!(after.size.is_power_of_two() && after.size <= after.size_max);
            }
            common.image(&live(false));
        }
    }
}
