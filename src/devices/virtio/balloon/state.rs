//! What a balloon keeps beside its queues. Every number is one that the driver may write itself, so all are taken.
use crate::state::{Numbers, Refused};

const TARGET: &str = "target_pages";
const ACTUAL: &str = "actual_pages";
const POISON: &str = "poison";

/// A balloon's own state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    pub(super) target_pages: u32,
    pub(super) actual_pages: u32,
    pub(super) poison: u32,
}

impl State {
    pub(super) fn numbers(self) -> Numbers {
        Numbers::of([
            (TARGET, self.target_pages.into()),
            (ACTUAL, self.actual_pages.into()),
            (POISON, self.poison.into()),
        ])
    }

    pub(super) fn read(device: &str, numbers: &Numbers) -> Result<State, Refused> {
        let fit = |number| {
            u32::try_from(number).map_err(|_| Refused::new(device, format!("{number} is no number of pages")))
        };
        let [target, actual, poison] = numbers.exactly(device, [TARGET, ACTUAL, POISON])?;
        Ok(State { target_pages: fit(target)?, actual_pages: fit(actual)?, poison: fit(poison)? })
    }
}
