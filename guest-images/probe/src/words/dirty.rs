//! `dirty=<mib>,<mib_per_s>[,<ms>[,<report_ms>]]`: keeps rewriting memory at a rate and checks on every pass
//! that the last one is still there, for snapshot and migration. A newline on the console ends it.

use crate::clock::Deadline;
use crate::console::{self, Line};
use crate::failure::Outcome;
use crate::words::note;
use crate::{Machine, check, clock, cpu, memory, say};

/// Pages written between two looks at the clock and the console.
const BATCH: u64 = 256;
const CONSOLE_MS: u64 = 100;
const REPORT_MS: u64 = 1000;

pub fn run(machine: &Machine, numbers: [Option<u64>; 4], report: &mut Line) -> Outcome {
    let [mib, mib_per_s, ms, report_ms] = numbers;
    let (mib, mib_per_s) = (mib.unwrap_or(16), mib_per_s.unwrap_or(0));
    let report_ms = report_ms.unwrap_or(REPORT_MS);
    let pages = (mib << 8).min(machine.free.pages());
    check!(pages > 0, "no free RAM");
    let end = ms.map(Deadline::in_ms);
    let mut look = Deadline::in_ms(CONSOLE_MS);
    let mut tell = Deadline::in_ms(report_ms);
    let start = cpu::tsc();
    let mut gaps = Gaps { seen_ns: clock::lasting().system_ns, longest_ns: 0, stopped_ns: 0 };
    let (mut written, mut index, mut pass) = (0u64, 0u64, 0u64);
    loop {
        for _ in 0..BATCH {
            let Some(page) = machine.free.page(index) else { crate::fail!("page {index} does not exist") };
            visit(page, pass)?;
            gaps.look();
            written += 1;
            index += 1;
            if index == pages {
                (index, pass) = (0, pass + 1);
            }
        }
        if mib_per_s != 0 {
            let due_cycles =
                u128::from(written) * u128::from(clock::tsc_khz()) * 1000 / u128::from(mib_per_s << 8);
            while u128::from(cpu::tsc() - start) < due_cycles {
                gaps.look();
                core::hint::spin_loop();
            }
        }
        if tell.passed() {
            tell = Deadline::in_ms(report_ms);
            let Gaps { seen_ns: ns, longest_ns, stopped_ns } = gaps;
            let (mib, gap_us, stopped_us) = (written >> 8, longest_ns / 1000, stopped_ns / 1000);
            say!(
                "probe: dirty pass {pass} written_mib={mib} ns={ns} gap_us={gap_us} stopped_us={stopped_us}"
            );
            (gaps.longest_ns, gaps.stopped_ns) = (0, 0);
            gaps.skip();
        }
        // However slow the machine is, what follows finds all of this memory written.
        if pass > 0 && end.is_some_and(Deadline::passed) {
            break;
        }
        if look.passed() {
            look = Deadline::in_ms(CONSOLE_MS);
            if matches!(console::read(), Some(b'\n' | b'\r')) {
                break;
            }
            gaps.skip();
        }
    }
    let elapsed_us = clock::cycles_to_us(cpu::tsc() - start).max(1);
    let rate = ((written << 12) / elapsed_us * 1_000_000) >> 20;
    note(
        report,
        format_args!("mib={} passes={pass} written_mib={} mib_per_s={rate}", pages >> 8, written >> 8),
    );
    Ok(())
}

/// The longest time without progress, and the longest in which the host says that it stopped us. Not by the TSC, which stands still with a
/// machine that moves.
struct Gaps {
    seen_ns: u64,
    longest_ns: u64,
    stopped_ns: u64,
}

impl Gaps {
    /// What the word itself has printed or read since it looked is no gap, unless the host stopped us meanwhile.
    fn skip(&mut self) {
        let now = clock::lasting();
        if now.flags & clock::GUEST_STOPPED == 0 {
            self.seen_ns = now.system_ns;
        }
    }

    fn look(&mut self) {
        let now = clock::lasting();
        let gap_ns = now.system_ns.saturating_sub(self.seen_ns);
        self.longest_ns = self.longest_ns.max(gap_ns);
        self.seen_ns = now.system_ns;
        if now.flags & clock::GUEST_STOPPED != 0 {
            self.stopped_ns = self.stopped_ns.max(gap_ns);
            clock::clear_guest_stopped();
        }
    }
}

/// Checks what the previous pass left at both ends of the page, then leaves this pass's mark. The first pass leaves noise between
/// them: a page that packs to nothing would make any link a quick one.
pub fn visit(page: u64, pass: u64) -> Outcome {
    let (first, last) = (page, page + memory::PAGE_BYTES - 8);
    if pass > 0 {
        let expected = memory::pattern(pass - 1, page);
        for at in [first, last] {
            let found = cpu::mmio::read64(at);
            check!(found == expected, "page {page:#x} holds {found:#x} in pass {pass}, not {expected:#x}");
        }
    }
    if pass == 0 {
        memory::fill(page, memory::PAGE_BYTES, page, 0);
    }
    let mark = memory::pattern(pass, page);
    cpu::mmio::write64(first, mark);
    cpu::mmio::write64(last, mark);
    Ok(())
}
