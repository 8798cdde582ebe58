//! What fuzzers call: packets of every kind in both directions, the last will, the console's ring. No part of a
//! program. `tests/fuzz` calls it with new bytes, and the test here with the seeds kept there.
//!
//! What parses is written again and parses to the same; what a machine is built, moved or saved by keeps every bound
//! once it has passed its check; the ring answers what was written to it, and something bounded whatever its header says.
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sys::seqpacket::Socket;

use crate::channel::Channel;
use crate::console::Ring;
use crate::machine::{
    Access, Balloon, Boot, CacheMode, Console, CpuTemplate, Disk, FdIndex, MachineSpec, Nic, OnReset,
    RateLimits, SpecError, TokenBucket,
};
use crate::migration::{DiskStream, ReceiveSpec, SendLimits, SendSpec};
use crate::saved::{RestoreSpec, SaveSpec};
use crate::will::Will;
use crate::{control, launch, limits, peer};

/// Reads `data` as what its first byte says.
pub fn wire(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 13 {
        0 => again::<control::Request>(rest),
        1 => again::<control::Message>(rest),
        2 => again::<launch::Request>(rest),
        3 => again::<launch::Message>(rest),
        4 => specification(rest),
        5 => will(rest),
        6 => ring_as_found(rest),
        7 => ring_as_written(rest),
        8 => packet::<control::Request>(rest),
        9 => packet::<launch::Request>(rest),
        11 => frame(rest),
        12 => asked(rest),
        _ => built_specification(rest),
    }
}

fn again<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(text: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(text) else { return };
    let written = serde_json::to_vec(&value).expect("what was read can be written");
    let read: T = serde_json::from_slice(&written).expect("what was written can be read");
    assert_eq!(read, value);
}

/// A frame from another daemon: what is read is framed and read again as the same.
fn frame(data: &[u8]) {
    let Some((start, rest)) = data.split_first_chunk() else { return };
    let Ok((kind, length)) = peer::head(*start) else { return };
    assert!(length <= limits::FRAME_BYTES_MAX);
    let body = &rest[..length.min(rest.len())];
    if kind == peer::Kind::Piece {
        let Ok(piece) = peer::Piece::read(body) else { return };
        let framed = [piece.head().expect("what was read is short enough"), piece.bytes.to_vec()].concat();
        return assert_eq!(framed.get(peer::HEAD_BYTES..), Some(body));
    }
    let Ok(message) = peer::Message::read(body) else { return };
    let framed = message.frame().expect("what fits in a frame fits when written without spaces");
    let (start, rest) = framed.split_first_chunk().expect("a head");
    assert_eq!(peer::head(*start), Ok((peer::Kind::Document, rest.len())));
    assert_eq!(peer::Message::read(rest), Ok(message));
}

/// A specification that came with so many descriptors.
fn specification(data: &[u8]) {
    let Some((descriptors, text)) = data.split_first() else { return };
    let descriptors = usize::from(*descriptors) % (limits::DESCRIPTORS_MAX + 1);
    again::<MachineSpec>(text);
    let Ok(spec) = serde_json::from_slice::<MachineSpec>(text) else { return };
    judge(&spec, descriptors);
}

/// What a machine is sent, received, saved or restored by, as its first byte says, and came with so many descriptors.
fn asked(data: &[u8]) {
    let Some(([which, descriptors], text)) = data.split_first_chunk() else { return };
    let descriptors = usize::from(*descriptors) % (limits::DESCRIPTORS_MAX + 1);
    match which % 4 {
        0 => checked::<SendSpec>(text, descriptors, |spec, descriptors| {
            spec.check(descriptors)?;
            let SendLimits { downtime_ms, bandwidth_bytes_per_s, standstill_ms } = spec.limits;
            assert!((1..=limits::DOWNTIME_MS_MAX).contains(&downtime_ms));
            assert!((1..=limits::STANDSTILL_MS_MAX).contains(&standstill_ms));
            assert!(bandwidth_bytes_per_s.is_none_or(|rate| rate >= limits::BANDWIDTH_BYTES_MIN));
            Ok(judge_streams(&spec.streams, &spec.disks, spec.handed))
        }),
        1 => checked::<ReceiveSpec>(text, descriptors, |spec, descriptors| {
            spec.check(descriptors)?;
            judge(&spec.machine, descriptors);
            assert!(spec.disks.iter().all(|named| usize::from(named.disk) < spec.machine.disks.len()));
            let mut named = judge_streams(&spec.streams, &spec.disks, spec.memory.is_some());
            named.extend(spec.memory);
            named.extend(spec.machine.descriptors().into_iter().map(|(_, fd)| fd));
            Ok(named)
        }),
        2 => checked::<SaveSpec>(text, descriptors, |spec, descriptors| {
            spec.check(descriptors)?;
            let more = [spec.live.map(|live| live.userfaultfd), spec.base.map(|base| base.state)];
            Ok([spec.state, spec.memory].into_iter().chain(more.into_iter().flatten()).collect())
        }),
        _ => checked::<RestoreSpec>(text, descriptors, |spec, descriptors| {
            spec.check(descriptors)?;
            judge(&spec.machine, descriptors);
            let machine = spec.machine.descriptors().into_iter().map(|(_, fd)| fd);
            let lower = spec.lower.iter().flat_map(|lower| lower.files.iter().copied().chain([lower.runs]));
            Ok(machine.chain([spec.state, spec.memory]).chain(lower).collect())
        }),
    }
}

/// Reads a specification and has it checked: `check` answers every descriptor of one that passes.
fn checked<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    text: &[u8],
    descriptors: usize,
    check: impl FnOnce(&T, usize) -> Result<Vec<FdIndex>, SpecError>,
) {
    again::<T>(text);
    let Ok(spec) = serde_json::from_slice::<T>(text) else { return };
    match check(&spec, descriptors) {
        Ok(named) => judge_descriptors(&named, descriptors),
        Err(refused) => assert!(refused.field.starts_with('/') && !refused.detail.is_empty()),
    }
}

/// The descriptors of a move's streams, which are as many as may be, and each disk's once.
fn judge_streams(streams: &[FdIndex], disks: &[DiskStream], is_handed: bool) -> Vec<FdIndex> {
    let distinct: BTreeSet<u16> = disks.iter().map(|named| named.disk).collect();
    assert_eq!(distinct.len(), disks.len(), "a disk is named twice");
    assert!((1..=limits::STREAMS_MAX).contains(&streams.len()));
    assert!(!is_handed || (streams.len() == 1 && disks.is_empty()), "more than state goes over");
    streams.iter().copied().chain(disks.iter().map(|named| named.stream)).collect()
}

/// Each descriptor came, and is named once.
fn judge_descriptors(named: &[FdIndex], descriptors: usize) {
    let distinct: BTreeSet<u16> = named.iter().map(|fd| fd.0).collect();
    assert_eq!(distinct.len(), named.len(), "a descriptor is named twice");
    assert!(
        named.iter().all(|fd| usize::from(fd.0) < descriptors),
        "a descriptor is named that did not come"
    );
}

/// A specification whose numbers are at their bounds, or one beyond.
fn built_specification(data: &[u8]) {
    let mut numbers = Numbers(data);
    let descriptors = numbers.next(1) as usize % (limits::DESCRIPTORS_MAX + 1);
    let fd = |numbers: &mut Numbers<'_>| FdIndex(numbers.next(1) as u16 % 32);
    let bucket = |numbers: &mut Numbers<'_>| {
        let bucket = TokenBucket { per_second: numbers.next(1) % 4, burst: numbers.next(1) % 4 };
        (bucket.per_second < 3).then_some(bucket)
    };
    let rates =
        |numbers: &mut Numbers<'_>| RateLimits { bandwidth: bucket(numbers), operations: bucket(numbers) };
    let disk = |numbers: &mut Numbers<'_>| Disk {
        file: fd(numbers),
        access: Access::ReadWrite,
        cache: CacheMode::Writeback,
        serial: ["a", "", " ", "é", "twenty-one-characters", "twenty-characters-20"]
            [numbers.next(1) as usize % 6]
            .to_owned(),
        limits: rates(numbers),
        backing: numbers.next(1).is_multiple_of(8).then(|| fd(numbers)),
    };
    let nic = |numbers: &mut Numbers<'_>| Nic {
        tap: fd(numbers),
        mac: [numbers.next(1) as u8 % 4, 0, 0, 0, 0, numbers.next(1) as u8 % 2],
        mtu: [1500, 67, 68, 65521, 65522][numbers.next(1) as usize % 5],
        rx_limits: rates(numbers),
        tx_limits: rates(numbers),
    };
    let (least, most) = (limits::MEMORY_BYTES_MIN, limits::MEMORY_BYTES_MAX);
    let memory = [least, least - 1, least + 4096, most, most + (2 << 20), 128 << 20];
    let memory_bytes = memory[numbers.next(1) as usize % 6];
    let spec = MachineSpec {
        memory_bytes,
        vcpus: [1, 2, 0, limits::VCPUS_MAX, limits::VCPUS_MAX + 1][numbers.next(1) as usize % 5],
        cpu: CpuTemplate::Host,
        boot: Boot {
            kernel: fd(&mut numbers),
            initrd: (numbers.next(1) & 1 != 0).then(|| fd(&mut numbers)),
            cmdline: ["", "a=b", "\0"][numbers.next(1) as usize % 3].repeat(numbers.next(2) as usize % 800),
        },
        balloon: Balloon {
            target_bytes: [0, 4096, 1, memory_bytes, u64::MAX - 4095][numbers.next(1) as usize % 5],
        },
        console: Console { ring: fd(&mut numbers) },
        on_reset: OnReset::Exit,
        disks: (0..numbers.next(1) % 18).map(|_| disk(&mut numbers)).collect(),
        nics: (0..numbers.next(1) % 10).map(|_| nic(&mut numbers)).collect(),
    };
    let text = serde_json::to_vec(&spec).expect("it can be written");
    assert_eq!(serde_json::from_slice::<MachineSpec>(&text).ok().as_ref(), Some(&spec));
    judge(&spec, descriptors);
}

/// What passes its check keeps every bound.
fn judge(spec: &MachineSpec, descriptors: usize) {
    if let Err(refused) = spec.check(descriptors) {
        assert!(refused.field.starts_with('/') && !refused.detail.is_empty());
        return;
    }
    let named: Vec<FdIndex> = spec.descriptors().into_iter().map(|(_, fd)| fd).collect();
    judge_descriptors(&named, descriptors);
    let backings = spec.disks.iter().filter(|disk| disk.backing.is_some()).count();
    let initrds = usize::from(spec.boot.initrd.is_some());
    assert_eq!(named.len(), 2 + initrds + spec.disks.len() + backings + spec.nics.len());
    assert!((limits::MEMORY_BYTES_MIN..=limits::MEMORY_BYTES_MAX).contains(&spec.memory_bytes));
    assert!(spec.memory_bytes.is_multiple_of(2 << 20) && (1..=limits::VCPUS_MAX).contains(&spec.vcpus));
    assert!(spec.disks.len() <= limits::DISKS_MAX && spec.nics.len() <= limits::NICS_MAX);
    assert!(spec.boot.cmdline.len() < limits::CMDLINE_BYTES_MAX && !spec.boot.cmdline.contains('\0'));
    assert!(spec.balloon.target_bytes < spec.memory_bytes);
    assert!(
        spec.disks.iter().all(|disk| disk.serial.len() <= limits::SERIAL_BYTES_MAX && disk.serial.is_ascii())
    );
    assert!(spec.nics.iter().all(|nic| nic.mac[0] & 1 == 0 && nic.mtu >= 68));
    let limits = spec.disks.iter().map(|disk| disk.limits);
    let limits = limits.chain(spec.nics.iter().flat_map(|nic| [nic.rx_limits, nic.tx_limits]));
    for bucket in limits.flat_map(|limits| [limits.bandwidth, limits.operations]).flatten() {
        assert!(bucket.per_second > 0 && bucket.burst > 0, "a bucket that never fills");
    }
}

fn file(bytes: &[u8]) -> File {
    // In memory where there is such a place; a memfd of ours could not grow.
    let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile());
    let mut file = file.expect("a temporary file");
    file.write_all(bytes).expect("room for the input");
    file
}

fn will(text: &[u8]) {
    let file = file(text);
    let Some(found) = Will::read(&file).expect("a memory file can be read") else { return };
    again::<Will>(text);
    let (empty, other) = (self::file(&[]), Will { at_unix_ms: 1, ..found.clone() });
    found.write(&empty).expect("it can be written");
    other.write(&empty).expect("it can be asked for again");
    assert_eq!(Will::read(&empty).expect("it can be read"), Some(found), "the first will stands");
}

/// Numbers from the start of the input; zero when it has ended.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn next(&mut self, bytes: usize) -> u64 {
        let (taken, rest) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = rest;
        taken.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// Small, near a power of two, or anything.
    fn wide(&mut self) -> u64 {
        match self.next(1) {
            small @ 0..128 => small,
            shift @ 128..192 => (1_u64 << (shift - 128)).wrapping_add(self.next(1)).wrapping_sub(128),
            _ => self.next(8),
        }
    }
}

/// A ring as a VMM that somebody else has taken over may leave it, and change it while it is read.
fn ring_as_found(data: &[u8]) {
    let mut numbers = Numbers(data);
    let (capacity, written) = (numbers.wide(), numbers.wide());
    let length = if numbers.next(1) & 1 == 0 { capacity.wrapping_add(4096) } else { numbers.wide() };
    let file = file(b"TOFTCON1");
    file.write_all_at(&capacity.to_le_bytes(), 8).expect("a header");
    file.write_all_at(&written.to_le_bytes(), 16).expect("a header");
    // A file that cannot be so long stays short.
    let _ = file.set_len(length.min(limits::CONSOLE_RING_BYTES_MAX + 8192));
    let Ok(mut ring) = Ring::open(file.try_clone().expect("a descriptor")) else { return };
    assert!(capacity <= limits::CONSOLE_RING_BYTES_MAX && length == capacity + 4096);
    for _ in 0..16 {
        let (from, most) = (numbers.wide(), numbers.next(2) as usize);
        if let Ok(piece) = ring.read(from, most) {
            assert!(piece.data.len() <= most && piece.data.len() as u64 <= capacity);
            assert!(piece.end() >= piece.start && piece.end() <= ring.written().max(piece.start));
        }
        if numbers.next(1) & 1 != 0 {
            file.write_all_at(&numbers.wide().to_le_bytes(), 16).expect("a header");
        }
    }
}

/// A ring that is written as it should be answers what was written.
fn ring_as_written(data: &[u8]) {
    let mut numbers = Numbers(data);
    let capacity = limits::CONSOLE_RING_BYTES_MIN + numbers.next(2) % 4096;
    let file = file(&[]);
    let mut ring =
        Ring::create(file.try_clone().expect("a descriptor"), capacity).expect("the capacity is one");
    let mut reader = Ring::open(file).expect("it was just made");
    let mut model: Vec<u8> = Vec::new();
    for step in 0..32_u8 {
        if numbers.0.is_empty() {
            break;
        }
        let written: Vec<u8> =
            (0..numbers.next(2) % 6000).map(|at| (at as u8).wrapping_mul(7) ^ step).collect();
        model.extend(&written);
        assert_eq!(ring.append(&written).expect("there is room"), model.len() as u64);
        let (from, most) = (numbers.next(2), numbers.next(2) as usize);
        let piece = reader.read(from, most).expect("a memory file can be read");
        let (start, end) = (piece.start as usize, piece.end() as usize);
        assert_eq!(piece.data, model[start..end], "the ring answers something else than was written");
        assert!(start as u64 == from.min(model.len() as u64) || (start as u64) > from);
        assert!(!piece.data.is_empty() || most == 0 || from >= model.len() as u64, "there was more to read");
    }
}

/// A packet over a socket, with as many descriptors as its first byte says.
fn packet<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(data: &[u8]) {
    let Some((count, text)) = data.split_first() else { return };
    let (near, far) = Socket::pair().expect("a pair of sockets");
    let descriptor: OwnedFd = self::file(&[]).into();
    let descriptors = vec![descriptor.as_fd(); usize::from(*count % 80)];
    let sent = match near.send(text, &descriptors) {
        Err(cause) => return assert_ne!(cause.kind(), io::ErrorKind::BrokenPipe, "nobody closed it"),
        Ok(()) => text.len(),
    };
    match Channel::new(far).receive::<T>() {
        Ok(None) => assert_eq!(sent, 0, "a packet is not the end"),
        Ok(Some((_, taken))) => {
            assert_eq!(taken.len(), descriptors.len());
            assert!(taken.len() <= limits::DESCRIPTORS_MAX && sent <= limits::PACKET_BYTES_MAX);
            again::<T>(text);
        }
        Err(cause) => assert!(!cause.is_would_block()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_the_wire_hold() {
        seeds::replay("wire", super::wire);
    }

    #[test]
    fn inputs_near_the_seeds_of_the_wire_hold() {
        seeds::vary("wire", seeds::INPUTS, super::wire);
    }

    /// One that is no packet any more would reach nothing.
    #[test]
    fn seeds_that_are_packets_are_read() {
        let read = |kind: u8, text: &[u8]| match kind {
            0 => serde_json::from_slice::<control::Request>(text).map(drop),
            1 => serde_json::from_slice::<control::Message>(text).map(drop),
            2 => serde_json::from_slice::<launch::Request>(text).map(drop),
            _ => serde_json::from_slice::<launch::Message>(text).map(drop),
        };
        let mut count = 0;
        for (name, seed) in seeds::kept("wire") {
            let Some((kind @ ..=3, text)) = seed.split_first() else { continue };
            if ["nonsense", "deep"].contains(&name.as_str()) {
                assert!(read(*kind, text).is_err(), "{name}");
                continue;
            }
            read(*kind, text)
                .unwrap_or_else(|cause| panic!("{name}: {cause}; write it anew with make-seeds"));
            count += 1;
        }
        assert!(count > 40, "{count}");
    }

    /// A frame of another version is looked at no further than its head.
    #[test]
    fn seeds_that_are_frames_are_read() {
        let refused = ["longest", "too-long", "take-too-many-streams", "ask-too-many-vcpus"];
        let mut count = 0;
        for (name, seed) in seeds::kept("wire") {
            let Some(name) = name.strip_prefix("frame-") else { continue };
            let (start, body) = seed[1..].split_first_chunk().expect("a head");
            let is_read = peer::head(*start).is_ok_and(|(kind, length)| {
                length == body.len()
                    && match kind {
                        peer::Kind::Document => peer::Message::read(body).is_ok(),
                        peer::Kind::Piece => peer::Piece::read(body).is_ok(),
                    }
            });
            assert_eq!(is_read, !refused.contains(&name), "{name}; write it anew with make-seeds");
            count += 1;
        }
        assert!(count > 12, "{count}");
    }
}
