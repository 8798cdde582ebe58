use proptest::prelude::*;

use super::*;

/// Remembers what was routed and raised.
#[derive(Default)]
struct Sent {
    routes: Mutex<Vec<(u16, Option<MsiMessage>)>>,
    raised: Mutex<Vec<u16>>,
}

impl Msi for Sent {
    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        self.routes.lock().unwrap().push((vector, message));
    }
    fn raise(&self, vector: u16) {
        self.raised.lock().unwrap().push(vector);
    }
}

impl Sent {
    fn raised(&self) -> Vec<u16> {
        std::mem::take(&mut self.raised.lock().unwrap())
    }
    fn routes(&self) -> Vec<(u16, Option<MsiMessage>)> {
        std::mem::take(&mut self.routes.lock().unwrap())
    }
}

fn msix(count: u16) -> (Msix, Arc<Sent>) {
    let sent = Arc::new(Sent::default());
    (Msix::new(count, sent.clone()), sent)
}

fn program(msix: &Msix, vector: u64, message: MsiMessage, control: u32) {
    msix.write_table(vector * 16, &message.address.to_le_bytes());
    msix.write_table(vector * 16 + 8, &message.data.to_le_bytes());
    msix.write_table(vector * 16 + 12, &control.to_le_bytes());
}

const MESSAGE: MsiMessage = MsiMessage { address: 0x1_FEE0_1000, data: 0x4031 };

fn pending(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.read_pending(0, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn an_unmasked_vector_is_routed_once_and_raised_each_time() {
    let (msix, sent) = msix(3);
    program(&msix, 1, MESSAGE, 0);
    assert!(sent.routes().is_empty());
    msix.raise(1);
    assert_eq!((sent.raised(), pending(&msix)), (vec![], 0));
    msix.control(CONTROL_ENABLE);
    assert_eq!(sent.routes(), [(1, Some(MESSAGE))]);
    msix.raise(1);
    msix.raise(1);
    assert_eq!(sent.raised(), [1, 1]);
    program(&msix, 1, MESSAGE, 0);
    assert!(sent.routes().is_empty());
    msix.raise(3);
    msix.raise(u16::MAX);
    assert!(sent.raised().is_empty());
}

#[test]
fn what_is_raised_while_masked_comes_once_after_unmasking() {
    let (msix, sent) = msix(70);
    msix.control(CONTROL_ENABLE);
    program(&msix, 65, MESSAGE, 1);
    msix.raise(65);
    msix.raise(65);
    assert!(sent.raised().is_empty());
    let mut bits = [0; 16];
    msix.read_pending(0, &mut bits);
    assert_eq!(u128::from_le_bytes(bits), 1 << 65);
    let moved = MsiMessage { data: 0x4032, ..MESSAGE };
    program(&msix, 65, moved, 0);
    assert_eq!(sent.routes(), [(65, Some(moved))]);
    assert_eq!((sent.raised(), pending(&msix)), (vec![65], 0));
}

#[test]
fn the_function_mask_holds_every_vector_back() {
    let (msix, sent) = msix(2);
    program(&msix, 0, MESSAGE, 0);
    program(&msix, 1, MESSAGE, 0);
    msix.control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
    msix.raise(0);
    msix.raise(1);
    assert_eq!((sent.raised(), pending(&msix)), (vec![], 3));
    msix.control(CONTROL_ENABLE);
    assert_eq!((sent.raised(), pending(&msix)), (vec![0, 1], 0));
}

#[test]
fn disabling_forgets_routes_and_pending_bits() {
    let (msix, sent) = msix(2);
    program(&msix, 0, MESSAGE, 0);
    msix.control(CONTROL_ENABLE);
    msix.raise(1);
    sent.routes();
    msix.control(0);
    assert_eq!((sent.routes(), pending(&msix)), (vec![(0, None)], 0));
    msix.raise(0);
    msix.control(CONTROL_ENABLE);
    assert_eq!((sent.routes(), sent.raised()), (vec![(0, Some(MESSAGE))], vec![]));
}

/// The raise has found it enabled, and marks what it finds masked when it is not any more.
#[test]
fn a_raise_that_disabling_overtakes_is_not_saved() {
    let (msix, _) = msix(2);
    msix.control(CONTROL_ENABLE);
    msix.control(0);
    msix.vectors[1].pending.store(true, Ordering::SeqCst);
    let state = msix.save();
    assert!(state.pending.is_empty());
    assert_eq!(self::msix(2).0.restore("disk 0", &state, 0), Ok(()));
}

#[test]
fn the_table_reads_back_and_ignores_undefined_widths() {
    let (msix, _) = msix(2);
    let read = |offset, length| {
        let mut data = vec![0xAA; length];
        msix.read_table(offset, &mut data);
        data
    };
    assert_eq!(read(12, 4), [1, 0, 0, 0]);
    program(&msix, 1, MESSAGE, 1);
    assert_eq!(read(16, 8), MESSAGE.address.to_le_bytes());
    assert_eq!(read(26, 2), [0, 0]);
    for (offset, length) in [(16, 1), (16, 2), (18, 4), (20, 8), (16, 16), (17, 4)] {
        msix.write_table(offset, &vec![0xFF; length]);
    }
    msix.write_table(32, &[0xFF; 8]);
    msix.write_table(u64::MAX - 7, &[0xFF; 8]);
    assert_eq!(read(16, 8), MESSAGE.address.to_le_bytes());
    assert_eq!(read(32, 8), [0; 8]);
    assert_eq!(read(u64::MAX - 3, 8), [0; 8]);
}

#[test]
fn nothing_is_lost_when_masking_races_with_raising() {
    const ROUNDS: usize = 20_000;
    let (msix, sent) = msix(1);
    program(&msix, 0, MESSAGE, 0);
    msix.control(CONTROL_ENABLE);
    std::thread::scope(|scope| {
        let masking = scope.spawn(|| {
            for round in 0..ROUNDS {
                program(&msix, 0, MESSAGE, (round % 2) as u32);
            }
            program(&msix, 0, MESSAGE, 0);
        });
        for _ in 0..ROUNDS {
            sent.raised();
            msix.raise(0);
            // Either it was sent, or it waits for the unmask that is still to come.
            while sent.raised.lock().unwrap().is_empty() {
                assert!(
                    pending(&msix) == 1 || !masking.is_finished() || !sent.raised.lock().unwrap().is_empty()
                );
                std::hint::spin_loop();
            }
        }
    });
    assert_eq!(pending(&msix), 0);
}

proptest! {
    #[test]
    fn any_sequence_of_accesses_is_survived_and_a_pending_bit_means_masked(
        steps in proptest::collection::vec((0_u8..4, 0_u64..80, 0_usize..17, any::<u8>(), any::<u16>()), 0..60),
    ) {
        let (msix, _) = msix(4);
        for (what, offset, length, fill, number) in steps {
            let mut data = vec![fill; length];
            match what {
                0 => msix.write_table(offset, &data),
                1 => msix.control(number),
                2 => msix.raise(number % 6),
                _ => {
                    msix.read_table(offset, &mut data);
                    msix.read_pending(offset, &mut data);
                }
            }
            for (vector, state) in msix.vectors.iter().enumerate() {
                let table = msix.table.lock().unwrap();
                let masked = table.function_mask || table.entries[vector].is_masked();
                prop_assert!(!state.pending.load(Ordering::SeqCst) || (msix.is_enabled() && masked));
            }
        }
    }
}
