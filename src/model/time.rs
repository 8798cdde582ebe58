//! A moment, as RFC 3339 in UTC with milliseconds.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A moment. JSON: `"2026-01-31T12:00:00.000Z"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
#[schema(value_type = String, format = DateTime)]
pub struct Time(jiff::Timestamp);

impl Time {
    /// The present, cut to milliseconds so that what is stored equals what was answered.
    pub fn now() -> Time {
        Time::from_unix_ms(jiff::Timestamp::now().as_millisecond())
    }

    /// From milliseconds since the Unix epoch; out of range becomes the nearest moment that can be written.
    pub fn from_unix_ms(unix_ms: i64) -> Time {
        let clamped =
            unix_ms.clamp(jiff::Timestamp::MIN.as_millisecond(), jiff::Timestamp::MAX.as_millisecond());
        Time(jiff::Timestamp::from_millisecond(clamped).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
    }

    /// Milliseconds since the Unix epoch.
    pub fn unix_ms(self) -> i64 {
        self.0.as_millisecond()
    }
}

/// The text is not a moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a time, such as 2031-01-31T12:00:00Z")]
pub struct BadTime(String);

impl std::str::FromStr for Time {
    type Err = BadTime;

    /// As RFC 3339 writes it.
    fn from_str(text: &str) -> Result<Time, BadTime> {
        text.parse().map(Time).map_err(|_| BadTime(text.chars().take(40).collect()))
    }
}

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Time, D::Error> {
        jiff::Timestamp::deserialize(deserializer).map(Time)
    }
}
