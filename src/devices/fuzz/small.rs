//! The entropy device and the balloon.
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arbitrary::Unstructured;

use super::driver::{Guest, Manner, Piece, Step, Unheard, byte, word};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{Balloon, BalloonOptions, BalloonStats};
use crate::virtio::rng::{Rng, RngStats};

const PAGE_POISON: u64 = 1 << 4;
/// Where the driver writes what its free pages hold (virtio 1.2, section 5.5.4).
const PATTERN: u64 = 12;

/// Asks for entropy in any way.
pub fn rng(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut guest = Guest::new(&mut input, 1);
    let mut rng = Rng::new(Arc::new(RngStats::default()));
    let (_active, mut device) = guest.start(&mut rng, 0, Arc::new(Unheard));
    while let Some(step) = guest.next(&mut input) {
        match step {
            Step::Kick(queue) => guest.kick(&mut device, queue, Manner::Writes),
            Step::Pause => assert!(guest.judged(&mut device, Manner::Writes, |device| device.pause())),
            Step::Resume => guest.judged(&mut device, Manner::Writes, |device| device.resume()),
            Step::Own(offset) => {
                let mut space = [0xA5; 16];
                rng.read_config(u64::from(offset), &mut space);
                assert_eq!(space, [0; 16]);
            }
        }
    }
}

/// Gives and reports pages in any way. A report returns whole pages of its own buffers and nothing beside them.
pub fn balloon(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut guest = Guest::new(&mut input, 5);
    let stats = Arc::new(BalloonStats::default());
    let (mut balloon, control) = Balloon::new(BalloonOptions { target_bytes: 0, stats: Arc::clone(&stats) });
    let features = balloon.features() & u64::from(word(&mut input));
    let (_active, mut device) = guest.start(&mut balloon, features, Arc::new(Unheard));
    while let Some(step) = guest.next(&mut input) {
        let poisoned = features & PAGE_POISON != 0 && poison(&balloon) != 0;
        let reported = stats.reported_bytes.load(Ordering::Relaxed);
        match step {
            Step::Kick(queue @ (0 | 1 | 3)) => guest.kick(&mut device, queue, Manner::DiscardsAnything),
            Step::Kick(queue) => guest.kick(&mut device, queue, Manner::Discards),
            Step::Pause => {
                assert!(guest.judged(&mut device, Manner::DiscardsAnything, |device| device.pause()))
            }
            Step::Resume => guest.judged(&mut device, Manner::DiscardsAnything, |device| device.resume()),
            Step::Own(what) => match what % 4 {
                0 => {
                    control.set_target_bytes(u64::from(word(&mut input)) << (what % 32));
                    assert!(control.target_bytes().is_multiple_of(4096));
                }
                1 => {
                    let value = [byte(&mut input), 0, 0, byte(&mut input)];
                    balloon.write_config(u64::from(what / 4 % 20), &value[..1 + usize::from(what / 64)]);
                }
                2 => balloon.write_config(PATTERN, &[(); 4].map(|()| byte(&mut input))),
                _ => {
                    // A report that is right: a whole page of either region of buffers.
                    let page = u64::from(byte(&mut input) % 8);
                    let address = if page < 4 { 0x4000 } else { 0x8000 } + page * 0x1000;
                    guest.offer_pieces(2, &[Piece { address, length: 0x1000, writable: true }]);
                    guest.kick(&mut device, 2, Manner::Discards);
                }
            },
        }
        let now = stats.reported_bytes.load(Ordering::Relaxed);
        assert!(now >= reported && now.is_multiple_of(4096));
        assert!(!poisoned || now == reported, "pages with a pattern were returned");
        assert!(stats.inflated_bytes.load(Ordering::Relaxed).is_multiple_of(4096));
    }
}

fn poison(balloon: &Balloon) -> u32 {
    let mut value = [0; 4];
    balloon.read_config(PATTERN, &mut value);
    u32::from_le_bytes(value)
}
