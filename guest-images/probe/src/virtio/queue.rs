//! A split virtqueue (virtio 1.2 section 2.7), driver side, with indirect tables and event index.
//! One owner, no lock. Called by the device words; the hostile ones write its memory themselves.

use crate::cpu::mmio::{read16, read32, write16, write32, write64};
use crate::failure::{Outcome, out_of_memory};
use crate::virtio::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT};
use crate::{check, clock, memory};
use core::sync::atomic::{Ordering, fence};

pub const SIZE_MAX: u16 = 256;
pub const DESCRIPTOR_NEXT: u16 = 1;
pub const DESCRIPTOR_WRITE: u16 = 2;
pub const DESCRIPTOR_INDIRECT: u16 = 4;
/// Segments of one indirect table; a table fills a quarter page.
pub const SEGMENTS_MAX: usize = 64;
const TABLE_BYTES: u64 = SEGMENTS_MAX as u64 * 16;
const AVAILABLE_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// One buffer of a request.
#[derive(Clone, Copy)]
pub enum Segment {
    Read { address: u64, bytes: u32 },
    Write { address: u64, bytes: u32 },
}

pub struct Queue {
    pub index: u16,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub doorbell: u64,
    tables: Option<u64>,
    uses_event_index: bool,
    wants_interrupts: bool,
    links: [u16; SIZE_MAX as usize],
    free_head: u16,
    free_count: u16,
    pub available_index: u16,
    kicked_index: u16,
    used_index: u16,
}

/// The device is done with a chain.
#[derive(Clone, Copy)]
pub struct Completion {
    pub head: u16,
    pub written: u32,
}

impl Queue {
    pub fn new(index: u16, size: u16, doorbell: u64, features: u64, wants_interrupts: bool) -> Outcome<Self> {
        let rings = memory::allocate(3).ok_or_else(out_of_memory)?;
        let tables = if features & FEATURE_INDIRECT != 0 {
            let pages = (u64::from(size) * TABLE_BYTES).div_ceil(memory::PAGE_BYTES);
            Some(memory::allocate(pages).ok_or_else(out_of_memory)?)
        } else {
            None
        };
        let mut links = [0; SIZE_MAX as usize];
        for (position, link) in links.iter_mut().enumerate() {
            *link = position as u16 + 1;
        }
        let queue = Self {
            index,
            size,
            descriptors: rings,
            available: rings + memory::PAGE_BYTES,
            used: rings + 2 * memory::PAGE_BYTES,
            doorbell,
            tables,
            uses_event_index: features & FEATURE_EVENT_INDEX != 0,
            wants_interrupts,
            links,
            free_head: 0,
            free_count: size,
            available_index: 0,
            kicked_index: 0,
            used_index: 0,
        };
        write16(queue.available, if wants_interrupts { 0 } else { AVAILABLE_NO_INTERRUPT });
        queue.arm_interrupt();
        Ok(queue)
    }

    /// Makes a request available; None while the ring is full. `kick` tells the device.
    pub fn add(&mut self, segments: &[Segment]) -> Option<u16> {
        let head = self.free_head;
        match self.tables {
            Some(tables) if segments.len() > 1 && segments.len() <= SEGMENTS_MAX => {
                let table = tables + u64::from(head) * TABLE_BYTES;
                for (position, segment) in segments.iter().enumerate() {
                    let is_last = position + 1 == segments.len();
                    write_descriptor(
                        table,
                        position as u16,
                        *segment,
                        (!is_last).then_some(position as u16 + 1),
                    );
                }
                self.take(1)?;
                let bytes = segments.len() as u32 * 16;
                write_raw(self.descriptors, head, table, bytes, DESCRIPTOR_INDIRECT, 0);
            }
            _ => {
                let mut position = head;
                self.take(segments.len() as u16)?;
                for (number, segment) in segments.iter().enumerate() {
                    let next = self.links[usize::from(position)];
                    let is_last = number + 1 == segments.len();
                    write_descriptor(self.descriptors, position, *segment, (!is_last).then_some(next));
                    position = next;
                }
            }
        }
        self.offer(head);
        Some(head)
    }

    /// Writes the descriptors of a chain from `head` on, whatever was there.
    pub fn place(&self, head: u16, segments: &[Segment]) {
        for (position, segment) in (head..).zip(segments) {
            let is_last = usize::from(position - head) + 1 == segments.len();
            write_descriptor(self.descriptors, position, *segment, (!is_last).then_some(position + 1));
        }
    }

    /// Puts `head` on the available ring, whatever its descriptors say.
    pub fn offer(&mut self, head: u16) {
        write16(self.available + 4 + u64::from(self.available_index % self.size) * 2, head);
        fence(Ordering::SeqCst);
        self.available_index = self.available_index.wrapping_add(1);
        write16(self.available + 2, self.available_index);
    }

    /// Unlinks `count` descriptors from the free list; the last one keeps its link to the rest.
    fn take(&mut self, count: u16) -> Option<()> {
        if count > self.free_count {
            return None;
        }
        for _ in 0..count {
            self.free_head = self.links[usize::from(self.free_head)];
        }
        self.free_count -= count;
        Some(())
    }

    /// Rings the doorbell unless the device said it is looking anyway.
    pub fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let needed = if self.uses_event_index {
            let event = read16(self.used + 4 + u64::from(self.size) * 8);
            let new = self.available_index;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.kicked_index)
        } else {
            read16(self.used) & USED_NO_NOTIFY == 0
        };
        self.kicked_index = self.available_index;
        if needed {
            self.ring();
        }
    }

    /// Rings the doorbell.
    pub fn ring(&self) {
        write16(self.doorbell, self.index);
    }

    /// Next chain the device is done with.
    pub fn poll(&mut self) -> Outcome<Option<Completion>> {
        if read16(self.used + 2) == self.used_index {
            return Ok(None);
        }
        fence(Ordering::SeqCst);
        let entry = self.used + 4 + u64::from(self.used_index % self.size) * 8;
        let (id, written) = (read32(entry), read32(entry + 4));
        check!(id < u32::from(self.size), "used ring names descriptor {id}");
        self.used_index = self.used_index.wrapping_add(1);
        self.arm_interrupt();
        self.free(id as u16);
        Ok(Some(Completion { head: id as u16, written }))
    }

    fn arm_interrupt(&self) {
        if self.uses_event_index {
            // Half the ring's range away is never reached: no interrupt is wanted.
            let event =
                if self.wants_interrupts { self.used_index } else { self.used_index.wrapping_sub(0x8000) };
            write16(self.available + 4 + u64::from(self.size) * 2, event);
        }
    }

    fn free(&mut self, head: u16) {
        let mut last = head;
        let mut count = 1;
        while self.flags(last) & DESCRIPTOR_NEXT != 0 && count < self.size {
            last = self.links[usize::from(last)];
            count += 1;
        }
        self.links[usize::from(last)] = self.free_head;
        self.free_head = head;
        self.free_count += count;
    }

    fn flags(&self, position: u16) -> u16 {
        read16(self.descriptors + u64::from(position) * 16 + 12)
    }

    /// Makes one request and spins until it is done; the bytes the device wrote.
    pub fn request(&mut self, segments: &[Segment], timeout_ms: u64) -> Outcome<u32> {
        let head = self.add(segments);
        check!(head.is_some(), "queue {} is full", self.index);
        self.kick();
        let mut completion = None;
        let mut broken = None;
        clock::spin_until(timeout_ms, || match self.poll() {
            Ok(next) => {
                completion = next;
                completion.is_some()
            }
            Err(failure) => {
                broken = Some(failure);
                true
            }
        });
        if let Some(failure) = broken {
            return Err(failure);
        }
        let Some(completion) = completion else {
            crate::fail!("queue {}: no completion after {timeout_ms} ms", self.index)
        };
        check!(Some(completion.head) == head, "queue {}: completion of another chain", self.index);
        Ok(completion.written)
    }
}

fn write_descriptor(table: u64, position: u16, segment: Segment, next: Option<u16>) {
    let (address, bytes, flags) = match segment {
        Segment::Read { address, bytes } => (address, bytes, 0),
        Segment::Write { address, bytes } => (address, bytes, DESCRIPTOR_WRITE),
    };
    let flags = if next.is_some() { flags | DESCRIPTOR_NEXT } else { flags };
    write_raw(table, position, address, bytes, flags, next.unwrap_or(0));
}

/// Writes one descriptor as told, sense or nonsense.
pub fn write_raw(table: u64, position: u16, address: u64, bytes: u32, flags: u16, next: u16) {
    let at = table + u64::from(position) * 16;
    write64(at, address);
    write32(at + 8, bytes);
    write16(at + 12, flags);
    write16(at + 14, next);
}
