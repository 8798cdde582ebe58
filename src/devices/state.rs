//! What every saved state of this room is made of: plain data that serialises, and one kind of refusal. Nothing here
//! knows a device. Each device has a shelf `state`; the transport asks them, and `vmm` keeps what they say.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Why a saved state is not taken over. The state may have been written by anybody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {detail}")]
pub struct Refused {
    /// Which device, as operators call it.
    pub device: String,
    /// What does not hold.
    pub detail: String,
}

impl Refused {
    /// For `device`.
    pub fn new(device: &str, detail: impl Into<String>) -> Refused {
        Refused { device: device.to_owned(), detail: detail.into() }
    }
}

/// What a device keeps beside its registers and queues: numbers by name. A name that a later version adds is absent
/// in older states; one that is not known is refused.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Numbers(BTreeMap<String, u64>);

impl Numbers {
    /// These numbers.
    pub fn of<const N: usize>(numbers: [(&str, u64); N]) -> Numbers {
        Numbers(numbers.into_iter().map(|(name, number)| (name.to_owned(), number)).collect())
    }

    /// The numbers of exactly these names, in their order.
    pub fn exactly<const N: usize>(&self, device: &str, names: [&str; N]) -> Result<[u64; N], Refused> {
        if let Some(name) = self.0.keys().find(|name| !names.contains(&name.as_str())) {
            let name: String = name.chars().take(NAME_CHARS_MAX).collect();
            return Err(Refused::new(device, format!("nothing is known of {name:?} in its state")));
        }
        let mut numbers = [0; N];
        for (number, name) in numbers.iter_mut().zip(names) {
            let saved = self.0.get(name);
            *number = *saved.ok_or_else(|| Refused::new(device, format!("its state lacks {name}")))?;
        }
        Ok(numbers)
    }
}

#[cfg(any(test, fuzzing))]
impl Numbers {
    /// Has the number in this place be another, or one be there of which nobody knows.
    pub(crate) fn change(&mut self, at: usize, value: u64) {
        match self.0.values_mut().nth(at) {
            Some(number) => *number = value,
            None => drop(self.0.insert("strange".to_owned(), value)),
        }
    }
}

/// How much of a name that somebody made up is told.
const NAME_CHARS_MAX: usize = 32;
