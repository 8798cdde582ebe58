//! A virtio network device, driver side (virtio 1.2 section 5.1): frames in, frames out.
//! Takes frames spread over several receive buffers. Called by the network words.

use crate::cpu::mmio::{read16, write8, write16};
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::queue::{Queue, Segment};
use crate::virtio::{self, Device};
use crate::{check, memory};

pub const FEATURE_CHECKSUM: u64 = 1 << 0;
pub const FEATURE_GUEST_CHECKSUM: u64 = 1 << 1;
pub const FEATURE_MTU: u64 = 1 << 3;
pub const FEATURE_MAC: u64 = 1 << 5;
pub const FEATURE_MERGEABLE: u64 = 1 << 15;
pub const FEATURE_STATUS: u64 = 1 << 16;
const WANTED: u64 = FEATURE_CHECKSUM
    | FEATURE_GUEST_CHECKSUM
    | FEATURE_MTU
    | FEATURE_MAC
    | FEATURE_MERGEABLE
    | FEATURE_STATUS;

pub const HEADER_BYTES: u64 = 12;
const NEEDS_CHECKSUM: u8 = 1;
pub const FRAME_BYTES_MAX: usize = 16 << 10;
const BUFFERS: u16 = 64;
/// Small where frames may be merged from several, so that a full-size frame takes two.
const BUFFER_BYTES_MERGEABLE: u64 = 1024;
const BUFFER_BYTES: u64 = 2048;
const SEND_MS: u64 = 5000;

pub struct Nic {
    pub device: Device,
    pub receive: Queue,
    pub transmit: Queue,
    pub mac: [u8; 6],
    buffers: u64,
    buffer_bytes: u64,
    buffer_of_head: [u16; 256],
    send_buffer: u64,
    /// Receive buffers the largest frame so far was spread over.
    pub merged_max: u16,
}

/// Where the device shall put a checksum: over everything from `start`, at `start + offset`.
pub struct PartialChecksum {
    pub start: u16,
    pub offset: u16,
}

impl Nic {
    /// The `index`th card, ready and listening.
    pub fn require(index: usize) -> Outcome<Self> {
        let mut nic = Self::without_buffers(index)?;
        nic.fill()?;
        Ok(nic)
    }

    /// Gives the device every receive buffer.
    pub fn fill(&mut self) -> Outcome {
        for buffer in 0..BUFFERS.min(self.receive.size) {
            self.offer(buffer)?;
        }
        self.receive.kick();
        Ok(())
    }

    /// As `require`, but with an empty receive queue.
    pub fn without_buffers(index: usize) -> Outcome<Self> {
        let mut device = Device::require(virtio::NET, index)?;
        device.negotiate(WANTED)?;
        let receive = device.queue(0, 256)?;
        let transmit = device.queue(1, 256)?;
        device.ready()?;
        let buffer_bytes = if device.has(FEATURE_MERGEABLE) { BUFFER_BYTES_MERGEABLE } else { BUFFER_BYTES };
        let pages = u64::from(BUFFERS) * buffer_bytes / memory::PAGE_BYTES;
        let buffers = memory::allocate(pages).ok_or_else(out_of_memory)?;
        let send_pages = (FRAME_BYTES_MAX as u64).div_ceil(memory::PAGE_BYTES) + 1;
        let send_buffer = memory::allocate(send_pages).ok_or_else(out_of_memory)?;
        let mut mac = [0x02, 0, 0, 0, 0, 0x01];
        if device.has(FEATURE_MAC) {
            mac = core::array::from_fn(|index| device.config8(index as u64));
        }
        Ok(Self {
            device,
            receive,
            transmit,
            mac,
            buffers,
            buffer_bytes,
            buffer_of_head: [0; 256],
            send_buffer,
            merged_max: 0,
        })
    }

    pub fn link_is_up(&self) -> bool {
        !self.device.has(FEATURE_STATUS) || self.device.config16(6) & 1 != 0
    }

    pub fn mtu(&self) -> Option<u16> {
        self.device.has(FEATURE_MTU).then(|| self.device.config16(10))
    }

    fn offer(&mut self, buffer: u16) -> Outcome {
        let address = self.buffers + u64::from(buffer) * self.buffer_bytes;
        let segment = Segment::Write { address, bytes: self.buffer_bytes as u32 };
        match self.receive.add(&[segment]) {
            Some(head) => self.buffer_of_head[usize::from(head)] = buffer,
            None => crate::fail!("the receive queue is full"),
        }
        Ok(())
    }

    /// Copies the next frame that arrived to `frame`; its length, or None when there is none.
    pub fn poll(&mut self, frame: &mut [u8; FRAME_BYTES_MAX]) -> Outcome<Option<usize>> {
        let (mut length, mut buffers, mut expected) = (0usize, 0u16, 1u16);
        while buffers < expected {
            let Some(completion) = self.receive.poll()? else {
                check!(buffers == 0, "a frame of {expected} buffers ended after {buffers}");
                return Ok(None);
            };
            let buffer = self.buffer_of_head[usize::from(completion.head)];
            let address = self.buffers + u64::from(buffer) * self.buffer_bytes;
            let mut written = u64::from(completion.written);
            check!(written <= self.buffer_bytes, "{written} bytes in {}", self.buffer_bytes);
            let mut start = address;
            if buffers == 0 {
                check!(written >= HEADER_BYTES, "a frame of {written} bytes has no header");
                if self.device.has(FEATURE_MERGEABLE) {
                    expected = read16(address + 10);
                    check!((1..=BUFFERS).contains(&expected), "num_buffers is {expected}");
                }
                start += HEADER_BYTES;
                written -= HEADER_BYTES;
            }
            let taken = (written as usize).min(FRAME_BYTES_MAX - length);
            frame[length..length + taken].copy_from_slice(&memory::bytes(start, written)[..taken]);
            length += taken;
            buffers += 1;
            self.offer(buffer)?;
        }
        self.merged_max = self.merged_max.max(buffers);
        self.receive.kick();
        Ok(Some(length))
    }

    /// Sends a frame and waits until the device has taken it.
    pub fn send(&mut self, frame: &[u8], checksum: Option<PartialChecksum>) -> Outcome {
        let header = self.send_buffer;
        memory::bytes_mut(header, HEADER_BYTES).fill(0);
        if let Some(PartialChecksum { start, offset }) = checksum {
            write8(header, NEEDS_CHECKSUM);
            write16(header + 6, start);
            write16(header + 8, offset);
        }
        check!(frame.len() <= FRAME_BYTES_MAX, "a frame of {} bytes is too long", frame.len());
        let data = header + HEADER_BYTES;
        memory::bytes_mut(data, frame.len() as u64).copy_from_slice(frame);
        let segments = [
            Segment::Read { address: header, bytes: HEADER_BYTES as u32 },
            Segment::Read { address: data, bytes: frame.len() as u32 },
        ];
        self.transmit.request(&segments, SEND_MS).map(drop)
    }
}
