//! What may follow what on which stream, whoever writes it. Nothing is read here.
use super::{ASK_BYTES_MAX, FrameError, Head, Kind, Open, PAGE_BYTES, stream_of};

/// What may come next on a stream from the source, once it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    is_disk: bool,
    is_handed: bool,
    packs: bool,
    owes: bool,
    stream: u64,
    streams: u64,
    memory_bytes: u64,
    carried_bytes: u64,
    /// Where the console goes on, once some of it has come.
    console: Option<u64>,
    /// Whether some of memory was said to be owed since it was last waited for that it goes.
    owed_goes: bool,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Memory,
    /// On the first stream the state may come.
    Ended,
    /// Only words.
    Told,
}

impl Order {
    /// For a stream that was opened as the receiver expected.
    pub fn new(open: &Open) -> Order {
        Order {
            is_disk: open.disk.is_some(),
            is_handed: open.handed.is_some(),
            packs: open.packs,
            owes: open.owes,
            stream: open.stream.into(),
            streams: u64::from(open.streams).max(1),
            memory_bytes: open.memory_bytes,
            carried_bytes: 0,
            console: None,
            owed_goes: false,
            stage: if open.resumes { Stage::Told } else { Stage::Memory },
        }
    }

    /// Whether all of memory has come but what is owed.
    pub fn has_ended(&self) -> bool {
        self.stage != Stage::Memory
    }

    /// Bytes of memory, or of the disk, that came.
    pub fn carried_bytes(&self) -> u64 {
        self.carried_bytes
    }

    /// Judges the next head; what it says may be believed after that.
    pub fn admit(&mut self, head: &Head) -> Result<(), FrameError> {
        let Head { kind, length, offset } = *head;
        let refused = FrameError::Bounds { kind, length, offset };
        if self.is_disk {
            return self.admit_of_disk(head);
        }
        let is_first = self.stream == 0;
        match (kind, self.stage) {
            (Kind::Part | Kind::Packed | Kind::Zero | Kind::Console, _) if self.is_handed => {
                return Err(FrameError::Order(kind));
            }
            (Kind::Packed, _) if !self.packs => return Err(FrameError::Order(kind)),
            (Kind::Part | Kind::Packed | Kind::Zero, stage) if stage == Stage::Memory || self.owes => {
                if !self.is_ours(offset, length.into()) {
                    return Err(refused);
                }
                if stage != Stage::Memory && kind != Kind::Zero && length > ASK_BYTES_MAX {
                    return Err(refused);
                }
                if kind != Kind::Zero {
                    self.carried_bytes = self.carried_bytes.saturating_add(u64::from(length));
                }
            }
            (Kind::Owed, Stage::Memory) if self.owes => {
                if !self.is_ours(offset, u64::from(length).saturating_mul(8 * PAGE_BYTES)) {
                    return Err(refused);
                }
                self.owed_goes = true;
            }
            (Kind::Sync, Stage::Memory) if self.owes => self.owed_goes = false,
            (Kind::Console, Stage::Memory | Stage::Ended) if is_first => {
                if self.console.is_some_and(|next| next != offset) {
                    return Err(refused);
                }
                self.console = offset.checked_add(u64::from(length));
            }
            (Kind::End, Stage::Memory) if self.owed_goes => return Err(FrameError::Order(kind)),
            (Kind::End, Stage::Memory) if offset == self.carried_bytes => self.stage = Stage::Ended,
            (Kind::End, Stage::Memory) => return Err(refused),
            (Kind::State, Stage::Ended) if is_first => self.stage = Stage::Told,
            (Kind::Word, _) if is_first => (),
            _ => return Err(FrameError::Order(kind)),
        }
        Ok(())
    }

    /// Judges the head of what a target asks for.
    pub fn admit_ask(&self, head: &Head) -> Result<(), FrameError> {
        let Head { kind, length, offset } = *head;
        match kind {
            Kind::Ask if self.is_ours(offset, length.into()) => Ok(()),
            Kind::Ask => Err(FrameError::Bounds { kind, length, offset }),
            _ => Err(FrameError::Order(kind)),
        }
    }

    /// Whether a part of memory lies inside and goes over this stream.
    fn is_ours(&self, offset: u64, bytes: u64) -> bool {
        let is_inside = offset.checked_add(bytes).is_some_and(|end| end <= self.memory_bytes);
        is_inside && stream_of(offset, self.streams) == self.stream
    }

    fn admit_of_disk(&mut self, head: &Head) -> Result<(), FrameError> {
        let Head { kind, length, offset } = *head;
        let refused = FrameError::Bounds { kind, length, offset };
        match (kind, self.stage) {
            (Kind::Block | Kind::Hole, Stage::Memory) => {
                let end = offset.checked_add(u64::from(length));
                if end.is_none_or(|end| end > self.memory_bytes) {
                    return Err(refused);
                }
                if kind == Kind::Block {
                    self.carried_bytes = self.carried_bytes.saturating_add(u64::from(length));
                }
            }
            (Kind::Sync, Stage::Memory) => (),
            (Kind::End, Stage::Memory) if offset == self.carried_bytes => self.stage = Stage::Ended,
            (Kind::End, Stage::Memory) => return Err(refused),
            _ => return Err(FrameError::Order(kind)),
        }
        Ok(())
    }
}
