use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use memory::layout::{EVENT_PORT, RESET_PORT, SLEEP_CONTROL_PORT};
use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct Told {
    log: Mutex<Vec<&'static str>>,
    raised: AtomicUsize,
}

impl PowerEvents for Told {
    fn powered_off(&self) {
        self.log.lock().unwrap().push("off");
    }
    fn reset_asked(&self) {
        self.log.lock().unwrap().push("reset");
    }
    fn panicked(&self) {
        self.log.lock().unwrap().push("panic");
    }
}

impl Interrupt for Told {
    fn raise(&self) {
        self.raised.fetch_add(1, Ordering::SeqCst);
    }
}

fn power() -> (Power, Arc<Told>) {
    let told = Arc::new(Told::default());
    (Power::new(told.clone(), told.clone()), told)
}

impl Told {
    fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

#[test]
fn the_registers_lie_where_the_tables_say() {
    assert_eq!(u64::from(RESET_PORT - SLEEP_CONTROL_PORT), RESET);
    assert_eq!(u64::from(EVENT_PORT - SLEEP_CONTROL_PORT), EVENT);
}

#[test]
fn only_the_soft_off_state_switches_off() {
    let (power, told) = power();
    let registers = power.registers();
    for value in 0..=u8::MAX {
        registers.write(SLEEP_CONTROL, &[value]);
        let off = value & 0x20 != 0 && (value >> 2) & 7 == 5;
        assert_eq!(told.take(), if off { vec!["off"] } else { vec![] }, "{value:#x}");
    }
    registers.write(SLEEP_CONTROL, &[0x34, 0]);
    registers.write(1, &[0x34]);
    assert!(told.take().is_empty());
}

#[test]
fn reset_is_asked_for_by_the_register_and_by_the_keyboard_controller() {
    let (power, told) = power();
    power.registers().write(RESET, &[0]);
    power.keyboard_port().write(0, &[0xAA]);
    assert!(told.take().is_empty());
    power.registers().write(RESET, &[1]);
    power.keyboard_port().write(0, &[0xFE]);
    assert_eq!(told.take(), ["reset", "reset"]);
    let mut status = [0xFF];
    power.keyboard_port().read(0, &mut status);
    assert_eq!(status[0] & 2, 0, "ready for a command");
}

#[test]
fn a_pressed_button_is_an_event_that_is_read_once() {
    let (power, told) = power();
    let registers = power.registers();
    let event = |width: usize| {
        let mut data = vec![0xFF; width];
        registers.read(EVENT, &mut data);
        data
    };
    assert_eq!(event(4), [0; 4]);
    power.press_power_button();
    power.press_power_button();
    assert_eq!(told.raised.load(Ordering::SeqCst), 2);
    assert_eq!((event(1), event(2)), (vec![0], vec![0, 0]));
    assert_eq!((event(4), event(4)), (vec![1, 0, 0, 0], vec![0; 4]));
}

#[test]
fn events_that_were_not_read_are_taken_over_and_told_again() {
    let (first, _) = power();
    first.press_power_button();
    first.tell_generation();
    assert_eq!(first.save(), 3);
    let (second, told) = power();
    second.restore(3).unwrap();
    assert_eq!((second.save(), told.raised.load(Ordering::SeqCst)), (3, 1));
    second.restore(0).unwrap();
    assert_eq!(told.raised.load(Ordering::SeqCst), 1);
    assert!(second.restore(4).unwrap_err().detail.contains("0x4"));
}

#[test]
fn a_panic_is_told() {
    let (power, told) = power();
    let port = power.panic_port();
    let mut events = [0];
    port.read(0, &mut events);
    assert_eq!(events, [PANICKED]);
    port.write(0, &[2]);
    port.write(0, &[]);
    assert!(told.take().is_empty());
    port.write(0, &[1]);
    assert_eq!(told.take(), ["panic"]);
}

proptest! {
    #[test]
    fn any_access_is_survived(offset in any::<u64>(), near in 0_u64..8, data in proptest::collection::vec(any::<u8>(), 0..9)) {
        let (power, _) = power();
        let ports: [Arc<dyn Region>; 4] =
            [power.registers(), power.panic_port(), power.keyboard_port(), Arc::new(Nowhere)];
        for port in ports {
            for offset in [offset, near] {
                port.write(offset, &data);
                port.read(offset, &mut data.clone());
            }
        }
    }
}
