use std::io;
use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;

use super::*;

const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

#[derive(Default)]
struct Count(AtomicUsize);

impl Interrupt for Count {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Clone, Default)]
struct Tape {
    bytes: Arc<Mutex<Vec<u8>>>,
    torn: bool,
}

impl Write for Tape {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.torn {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.lock().unwrap().extend(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serial(tape: &Tape) -> (Serial, Arc<Count>, Arc<AtomicUsize>) {
    let (count, rooms) = (Arc::new(Count::default()), Arc::new(AtomicUsize::new(0)));
    let room = Arc::clone(&rooms);
    let room = Box::new(move || {
        room.fetch_add(1, Ordering::SeqCst);
    });
    (Serial::with_room(count.clone(), Box::new(tape.clone()), room), count, rooms)
}

fn read(serial: &Serial, register: u64) -> u8 {
    let mut data = [0xAA];
    serial.read(register, &mut data);
    data[0]
}

#[test]
fn what_the_guest_sends_reaches_the_sink() {
    let tape = Tape::default();
    let (serial, count, _) = serial(&tape);
    for byte in b"hello" {
        assert_eq!(read(&serial, LSR) & 0x20, 0x20);
        serial.write(0, &[*byte]);
    }
    assert_eq!((&*tape.bytes.lock().unwrap(), serial.lost()), (&b"hello".to_vec(), 0));
    assert_eq!(count.0.load(Ordering::SeqCst), 0, "no interrupt that was not asked for");
    serial.write(IER, &[2]);
    serial.write(0, b"!");
    assert!(count.0.load(Ordering::SeqCst) >= 1);
    assert_eq!(read(&serial, IIR) & 0x0F, 2);
}

#[test]
fn input_is_taken_up_to_the_fifo_and_room_is_told_once_it_is_empty() {
    let tape = Tape::default();
    let (serial, count, rooms) = serial(&tape);
    serial.write(IER, &[1]);
    let input: Vec<u8> = (0..200).collect();
    let taken = serial.input(&input);
    assert!((1..200).contains(&taken), "{taken}");
    assert_eq!((serial.input(&input), count.0.load(Ordering::SeqCst)), (0, 1));
    let mut seen = Vec::new();
    while read(&serial, LSR) & 1 != 0 {
        assert_eq!(rooms.load(Ordering::SeqCst), 0);
        seen.push(read(&serial, 0));
    }
    assert_eq!((seen, rooms.load(Ordering::SeqCst)), (input[..taken].to_vec(), 1));
    read(&serial, 0);
    assert_eq!(rooms.load(Ordering::SeqCst), 1, "an empty FIFO is not emptied again");
    assert_eq!(serial.input(b"x"), 1);
    assert_eq!(count.0.load(Ordering::SeqCst), 2);
}

#[test]
fn a_sink_that_fails_loses_bytes_and_nothing_else() {
    let (serial, ..) = serial(&Tape { torn: true, ..Tape::default() });
    for _ in 0..1000 {
        serial.write(0, b"x");
    }
    assert_eq!((serial.lost(), read(&serial, LSR) & 0x60), (1000, 0x60));
}

#[test]
fn clearing_the_receive_fifo_drops_what_was_typed_before() {
    let (serial, _, rooms) = serial(&Tape::default());
    assert_eq!(serial.input(b"for the driver before"), 21);
    // Enabling alone keeps it; the transmitter keeps nothing.
    serial.write(FCR, &[0x01]);
    serial.write(FCR, &[0x05]);
    assert_eq!((read(&serial, LSR) & 1, rooms.load(Ordering::SeqCst)), (1, 0));
    // The register is the same whether the divisor is shown or not.
    serial.write(LCR, &[0x83]);
    serial.write(FCR, &[0x07]);
    assert_eq!(read(&serial, LCR), 0x83);
    serial.write(LCR, &[3]);
    assert_eq!((read(&serial, LSR) & 1, rooms.load(Ordering::SeqCst)), (0, 1));
    serial.write(FCR, &[0x07]);
    assert_eq!(rooms.load(Ordering::SeqCst), 1, "an empty FIFO is not emptied again");
    assert_eq!(serial.input(b"x"), 1);
    assert_eq!(read(&serial, 0), b'x');
}

#[test]
fn a_driver_finds_a_16550a() {
    let (serial, ..) = serial(&Tape::default());
    // What Linux looks for: scratch and interrupt registers that hold bits, modem lines in loopback, FIFO bits.
    serial.write(IER, &[0x0F]);
    assert_eq!(read(&serial, IER), 0x0F);
    serial.write(IER, &[0]);
    serial.write(MCR, &[0x10 | 0x0A]);
    assert_eq!(read(&serial, 6) & 0xF0, 0x90);
    serial.write(MCR, &[0]);
    serial.write(2, &[1]);
    assert_eq!(read(&serial, IIR) >> 6, 3);
    serial.write(LCR, &[0x83]);
    serial.write(0, &[1, 0]);
    let mut divisor = [0; 2];
    serial.read(0, &mut divisor);
    assert_eq!(divisor, [1, 0], "a wide access is two byte cycles");
    serial.write(LCR, &[3]);
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_makes_it_keep_more_than_the_fifo(
        steps in proptest::collection::vec((0_u8..3, 0_u64..10, 0_usize..9, any::<u8>()), 0..200),
    ) {
        let tape = Tape::default();
        let (serial, ..) = serial(&tape);
        for (what, offset, width, fill) in steps {
            let mut data = vec![fill; width];
            match what {
                0 => serial.write(offset, &data),
                1 => serial.read(offset, &mut data),
                _ => {
                    serial.input(&data);
                }
            }
        }
        serial.write(MCR, &[0]);
        prop_assert!(serial.input(&[0; 1000]) <= 64);
        serial.read(u64::MAX, &mut [0; 4]);
        serial.write(u64::MAX, &[0; 4]);
    }
}
