//! `rng`: 64 KiB of random bytes that look like it.

use crate::console::Line;
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::queue::Segment;
use crate::virtio::{self, Device};
use crate::words::note;
use crate::{check, memory};

const BYTES: u64 = 64 << 10;
const TIMEOUT_MS: u64 = 5000;
/// 64 KiB hold each value 256 times on average; 16 standard deviations is never chance.
const EACH_MAX: u32 = 256 + 256;

pub fn run(report: &mut Line) -> Outcome {
    let mut device = Device::require(virtio::RNG, 0)?;
    device.negotiate(0)?;
    let mut queue = device.queue(0, 16)?;
    device.ready()?;
    let buffer = memory::allocate(BYTES / memory::PAGE_BYTES).ok_or_else(out_of_memory)?;
    let (mut filled, mut requests) = (0, 0);
    while filled < BYTES {
        let bytes = (BYTES - filled).min(4096) as u32;
        let written = queue.request(&[Segment::Write { address: buffer + filled, bytes }], TIMEOUT_MS)?;
        check!(written > 0 && written <= bytes, "{written} bytes written into {bytes}");
        filled += u64::from(written);
        requests += 1;
    }
    device.reset()?;
    let mut counts = [0u32; 256];
    memory::bytes(buffer, BYTES).iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let (least, most) = counts.iter().fold((u32::MAX, 0), |(low, high), n| (low.min(*n), high.max(*n)));
    check!(least > 0 && most < EACH_MAX, "values occur {least} to {most} times in {BYTES} bytes");
    note(report, format_args!("bytes={BYTES} requests={requests} least={least} most={most}"));
    Ok(())
}
