use super::*;

/// Answers with the low byte of each offset and remembers what was written.
#[derive(Default)]
struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

impl Region for Echo {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = (offset as u8).wrapping_add(at as u8);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

#[test]
fn accesses_reach_the_region_with_the_offset_from_its_start() {
    let mut bus = Bus::new();
    let (low, high) = (Arc::new(Echo::default()), Arc::new(Echo::default()));
    bus.insert(0x2000, 0x100, high.clone()).unwrap();
    bus.insert(0x1000, 0x100, low.clone()).unwrap();
    let mut data = [0; 2];
    assert_eq!(bus.read(0x10FE, &mut data), Claim::Claimed);
    assert_eq!(data, [0xFE, 0xFF]);
    assert_eq!(bus.write(0x2000, &[7]), Claim::Claimed);
    assert_eq!(*high.0.lock().unwrap(), [(0, vec![7])]);
    assert!(low.0.lock().unwrap().is_empty());
}

#[test]
fn what_nothing_claims_reads_all_ones_and_swallows_writes() {
    let mut bus = Bus::new();
    bus.insert(0x1000, 0x100, Arc::new(Echo::default())).unwrap();
    for (address, length) in [(0xFFF, 1), (0x1100, 1), (0x10FF, 2), (0xFFF, 2), (u64::MAX, 8), (0, 4)] {
        let mut data = vec![0; length];
        assert_eq!(bus.read(address, &mut data), Claim::Unclaimed, "{address:#x}");
        assert!(data.iter().all(|byte| *byte == 0xFF));
        assert_eq!(bus.write(address, &data), Claim::Unclaimed);
    }
    assert_eq!(bus.read(0x1000, &mut []), Claim::Unclaimed);
}

#[test]
fn overlapping_and_impossible_ranges_are_refused() {
    let mut bus = Bus::new();
    let echo = Arc::new(Echo::default());
    bus.insert(0x1000, 0x100, echo.clone()).unwrap();
    for (base, length) in [(0x1000, 1), (0xFFF, 2), (0x10FF, 1), (0x0, 0x10_0000), (0x1000, 0x100)] {
        assert_eq!(bus.insert(base, length, echo.clone()), Err(BusError::Overlap { base, length }));
    }
    for (base, length) in [(0x5000, 0), (u64::MAX, 2)] {
        assert_eq!(bus.insert(base, length, echo.clone()), Err(BusError::Range { base, length }));
    }
    bus.insert(0xFFF, 1, echo.clone()).unwrap();
    bus.insert(0x1100, 1, echo.clone()).unwrap();
    bus.insert(u64::MAX, 1, echo).unwrap();
    assert_eq!(bus.read(u64::MAX, &mut [0]), Claim::Claimed);
}
