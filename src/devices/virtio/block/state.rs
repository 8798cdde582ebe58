//! What a disk keeps beside its queue. Names and checks of form only; `device` compares it with the file.
use crate::state::{Numbers, Refused};

const SECTORS: &str = "sectors";
const WRITEBACK: &str = "writeback";

/// A disk's own state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    /// The capacity that its driver knows.
    pub(super) sectors: u64,
    /// The configuration's `writeback`.
    pub(super) writeback: bool,
}

impl State {
    pub(super) fn numbers(self) -> Numbers {
        Numbers::of([(SECTORS, self.sectors), (WRITEBACK, self.writeback.into())])
    }

    pub(super) fn read(device: &str, numbers: &Numbers) -> Result<State, Refused> {
        let [sectors, writeback] = numbers.exactly(device, [SECTORS, WRITEBACK])?;
        if writeback > 1 {
            return Err(Refused::new(device, "writeback is neither 0 nor 1"));
        }
        Ok(State { sectors, writeback: writeback == 1 })
    }
}
