//! What token buckets hold, as data. The limits themselves are not in it: whoever restores says which are in force.
use serde::{Deserialize, Serialize};

use super::NANO;

/// Both buckets of one direction; absent where there is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimiterState {
    /// Bytes.
    pub bandwidth: Option<LevelState>,
    /// Requests or packets.
    pub operations: Option<LevelState>,
}

/// What one bucket holds; below zero is a debt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LevelState {
    /// Whole tokens, rounded down.
    pub tokens: i64,
    /// Thousand millionths of a token above that.
    pub nano_tokens: u32,
}

impl LevelState {
    /// Of nano-tokens. What no limit in use comes near is cut.
    pub(super) fn of(nano_tokens: i128) -> LevelState {
        let whole = nano_tokens.div_euclid(NANO).clamp(i128::from(i64::MIN), i128::from(i64::MAX));
        let rest = nano_tokens.rem_euclid(NANO);
        LevelState {
            tokens: i64::try_from(whole).unwrap_or_default(),
            nano_tokens: u32::try_from(rest).unwrap_or_default(),
        }
    }

    /// Nano-tokens.
    pub(super) fn tokens(self) -> i128 {
        i128::from(self.tokens).saturating_mul(NANO).saturating_add(i128::from(self.nano_tokens))
    }
}
