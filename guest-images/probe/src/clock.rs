//! Time: the TSC, its frequency, and KVM's paravirtual clock. Interrupts play no part.
//! Called by the words for deadlines and measurements.

use crate::cpu;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
const MSR_STEAL_TIME: u32 = 0x4b56_4d03;
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
const FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const FEATURE_STEAL_TIME: u32 = 1 << 5;
/// Used when nothing on the machine tells the frequency.
const TSC_KHZ_FALLBACK: u64 = 2_500_000;

static TSC_KHZ: AtomicU64 = AtomicU64::new(TSC_KHZ_FALLBACK);
static HAS_KVMCLOCK: AtomicBool = AtomicBool::new(false);
static HAS_STEAL_TIME: AtomicBool = AtomicBool::new(false);

/// `pvclock_vcpu_time_info`, Documentation/virt/kvm/x86/msr.rst.
#[repr(C, align(64))]
struct SystemTime {
    version: AtomicU32,
    pad: u32,
    tsc_timestamp: AtomicU64,
    system_time: AtomicU64,
    tsc_to_system_mul: AtomicU32,
    shift_and_flags: AtomicU32,
}

/// `pvclock_wall_clock`.
#[repr(C, align(64))]
struct WallClock {
    version: AtomicU32,
    seconds: AtomicU32,
    nanoseconds: AtomicU32,
}

/// `kvm_steal_time`.
#[repr(C, align(64))]
struct StealTime {
    steal: AtomicU64,
    version: AtomicU32,
    pad: [AtomicU32; 13],
}

static SYSTEM_TIME: SystemTime = SystemTime {
    version: AtomicU32::new(0),
    pad: 0,
    tsc_timestamp: AtomicU64::new(0),
    system_time: AtomicU64::new(0),
    tsc_to_system_mul: AtomicU32::new(0),
    shift_and_flags: AtomicU32::new(0),
};
static WALL_CLOCK: WallClock =
    WallClock { version: AtomicU32::new(0), seconds: AtomicU32::new(0), nanoseconds: AtomicU32::new(0) };
static STEAL_TIME: StealTime = StealTime {
    steal: AtomicU64::new(0),
    version: AtomicU32::new(0),
    pad: [const { AtomicU32::new(0) }; 13],
};

/// Flag of the paravirtual clock: the host paused the guest since the flag was last cleared.
pub const GUEST_STOPPED: u8 = 1 << 1;
pub const TSC_STABLE: u8 = 1 << 0;

/// Turns the paravirtual clock on when offered and finds the TSC's frequency.
pub fn set_up() {
    let features = kvm_features();
    if features & FEATURE_CLOCKSOURCE2 != 0 {
        let address = (&raw const SYSTEM_TIME) as u64;
        let on = cpu::write_msr(MSR_SYSTEM_TIME, address | 1).is_ok();
        HAS_KVMCLOCK
            .store(on && SYSTEM_TIME.tsc_to_system_mul.load(Ordering::Relaxed) != 0, Ordering::Relaxed);
    }
    if features & FEATURE_STEAL_TIME != 0 {
        let address = (&raw const STEAL_TIME) as u64;
        HAS_STEAL_TIME.store(cpu::write_msr(MSR_STEAL_TIME, address | 1).is_ok(), Ordering::Relaxed);
    }
    let khz = khz_from_kvmclock().or_else(khz_from_cpuid).or_else(khz_from_timer);
    TSC_KHZ.store(khz.unwrap_or(TSC_KHZ_FALLBACK), Ordering::Relaxed);
}

/// The hypervisor's twelve letters, zero when there is none.
pub fn hypervisor() -> [u8; 12] {
    let mut name = [0; 12];
    if cpu::cpuid(1)[2] >> 31 != 0 {
        let leaf = cpu::cpuid(0x4000_0000);
        for (index, register) in leaf[1..].iter().enumerate() {
            name[index * 4..index * 4 + 4].copy_from_slice(&register.to_le_bytes());
        }
    }
    name
}

fn kvm_features() -> u32 {
    if &hypervisor() == b"KVMKVMKVM\0\0\0" { cpu::cpuid(KVM_FEATURES_LEAF)[0] } else { 0 }
}

fn khz_from_kvmclock() -> Option<u64> {
    let multiplier = u64::from(SYSTEM_TIME.tsc_to_system_mul.load(Ordering::Relaxed));
    if !HAS_KVMCLOCK.load(Ordering::Relaxed) || multiplier == 0 {
        return None;
    }
    let shift = SYSTEM_TIME.shift_and_flags.load(Ordering::Relaxed) as i8;
    let khz = (1_000_000u64 << 32) / multiplier;
    Some(if shift < 0 { khz << shift.unsigned_abs() } else { khz >> shift })
}

fn khz_from_cpuid() -> Option<u64> {
    let hypervisor_leaves = cpu::cpuid(0x4000_0000)[0];
    if cpu::cpuid(1)[2] >> 31 != 0 && (0x4000_0010..0x4000_1000).contains(&hypervisor_leaves) {
        let khz = cpu::cpuid(0x4000_0010)[0];
        if khz != 0 {
            return Some(khz.into());
        }
    }
    if cpu::cpuid(0)[0] < 0x15 {
        return None;
    }
    let [denominator, numerator, crystal_hz, _] = cpu::cpuid(0x15);
    if denominator == 0 || numerator == 0 || crystal_hz == 0 {
        return None;
    }
    Some(u64::from(crystal_hz) * u64::from(numerator) / u64::from(denominator) / 1000)
}

/// Counts cycles while channel 2 of the 8254 counts 20 ms down. None where there is no 8254.
fn khz_from_timer() -> Option<u64> {
    const INPUT_HZ: u64 = 1_193_182;
    const COUNT: u64 = INPUT_HZ / 50;
    let gate = cpu::in8(0x61) & !0x02;
    cpu::out8(0x61, gate & !0x01);
    cpu::out8(0x43, 0xb0);
    cpu::out8(0x42, COUNT as u8);
    cpu::out8(0x42, (COUNT >> 8) as u8);
    cpu::out8(0x61, gate | 0x01);
    let start = cpu::tsc();
    if cpu::in8(0x61) & 0x20 != 0 {
        return None;
    }
    let ended = (0..1_000_000).any(|_| cpu::in8(0x61) & 0x20 != 0);
    ended.then(|| (cpu::tsc() - start) / 20)
}

pub fn tsc_khz() -> u64 {
    TSC_KHZ.load(Ordering::Relaxed)
}

pub fn cycles_to_us(cycles: u64) -> u64 {
    (u128::from(cycles) * 1000 / u128::from(tsc_khz())) as u64
}

/// A moment to give up at.
#[derive(Clone, Copy)]
pub struct Deadline(u64);

impl Deadline {
    pub fn in_ms(ms: u64) -> Self {
        Self(cpu::tsc().saturating_add(ms.saturating_mul(tsc_khz())))
    }

    pub fn passed(self) -> bool {
        cpu::tsc() >= self.0
    }
}

/// Spins until `done` holds; false when `timeout_ms` passed first.
pub fn spin_until(timeout_ms: u64, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Deadline::in_ms(timeout_ms);
    while !done() {
        if deadline.passed() {
            return done();
        }
        core::hint::spin_loop();
    }
    true
}

/// Lets `ms` pass.
pub fn pause_ms(ms: u64) {
    spin_until(ms, || false);
}

/// One reading of the paravirtual clock.
pub struct Reading {
    pub system_ns: u64,
    pub flags: u8,
}

/// Reads the paravirtual clock; None when it is not offered.
pub fn kvmclock() -> Option<Reading> {
    if !HAS_KVMCLOCK.load(Ordering::Relaxed) {
        return None;
    }
    loop {
        let version = SYSTEM_TIME.version.load(Ordering::SeqCst);
        let timestamp = SYSTEM_TIME.tsc_timestamp.load(Ordering::SeqCst);
        let base_ns = SYSTEM_TIME.system_time.load(Ordering::SeqCst);
        let multiplier = SYSTEM_TIME.tsc_to_system_mul.load(Ordering::SeqCst);
        let shift_and_flags = SYSTEM_TIME.shift_and_flags.load(Ordering::SeqCst);
        let now = cpu::tsc();
        fence(Ordering::SeqCst);
        if version & 1 != 0 || version != SYSTEM_TIME.version.load(Ordering::SeqCst) {
            continue;
        }
        let cycles = u128::from(now.wrapping_sub(timestamp));
        let shift = shift_and_flags as i8;
        let scaled = if shift < 0 { cycles >> shift.unsigned_abs() } else { cycles << shift };
        let ns = (scaled * u128::from(multiplier)) >> 32;
        return Some(Reading {
            system_ns: base_ns.wrapping_add(ns as u64),
            flags: (shift_and_flags >> 8) as u8,
        });
    }
}

/// Reads the clock that goes on while a machine moves: the paravirtual one, where it is offered. The TSC goes on where it stood.
pub fn lasting() -> Reading {
    kvmclock().unwrap_or_else(|| Reading { system_ns: cycles_to_us(cpu::tsc()) * 1000, flags: 0 })
}

/// Clears the flag by which the host tells of a pause.
pub fn clear_guest_stopped() {
    SYSTEM_TIME.shift_and_flags.fetch_and(!(u32::from(GUEST_STOPPED) << 8), Ordering::SeqCst);
}

/// Seconds since 1970 at the guest's boot, as the host tells them.
pub fn boot_wall_clock_s() -> Option<u32> {
    kvmclock()?;
    cpu::write_msr(MSR_WALL_CLOCK, (&raw const WALL_CLOCK) as u64).ok()?;
    Some(WALL_CLOCK.seconds.load(Ordering::SeqCst))
}

/// Time this processor was ready but not run; None when not offered.
pub fn steal_ns() -> Option<u64> {
    HAS_STEAL_TIME.load(Ordering::Relaxed).then(|| STEAL_TIME.steal.load(Ordering::SeqCst))
}
