//! Names and labels, checked when they are read so that nothing downstream has to.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::{LABEL_CHARS_MAX, LABELS_MAX, NAME_CHARS_MAX};

/// A resource's name: one DNS label (lower-case letters, digits and inner hyphens, at most 63), unique among
/// the resources of its kind. A server's name is its host name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", example = "web1")]
pub struct Name(String);

/// The text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a name: use 1 to 63 lower-case letters, digits and hyphens, with no hyphen at either end"
)]
pub struct BadName(String);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = BadName;

    fn try_from(text: String) -> Result<Name, BadName> {
        let allowed = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let edges = text.starts_with('-') || text.ends_with('-');
        if text.is_empty() || text.len() > NAME_CHARS_MAX || !allowed || edges {
            return Err(BadName(text.chars().take(NAME_CHARS_MAX).collect()));
        }
        Ok(Name(text))
    }
}

impl std::str::FromStr for Name {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Name, BadName> {
        Name::try_from(text.to_owned())
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Key and value pairs for the caller's own use and for `label_selector`. Keys and values hold letters,
/// digits and `._/-`, at most 63 characters; values may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
#[schema(value_type = BTreeMap<String, String>)]
pub struct Labels(BTreeMap<String, String>);

/// The map is not a set of labels.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadLabels {
    /// Too many.
    #[error("{0} labels are more than {LABELS_MAX}")]
    TooMany(usize),
    /// One of them.
    #[error(
        "label {0:?} is not valid: keys and values hold letters, digits and `._/-`, at most 63 characters, and \
         a key is not empty"
    )]
    Invalid(String),
}

impl Labels {
    /// The pairs, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The value of `key`.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = BadLabels;

    fn try_from(map: BTreeMap<String, String>) -> Result<Labels, BadLabels> {
        if map.len() > LABELS_MAX {
            return Err(BadLabels::TooMany(map.len()));
        }
        let sound = |text: &str| {
            text.len() <= LABEL_CHARS_MAX
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b))
        };
        match map.iter().find(|(key, value)| key.is_empty() || !sound(key) || !sound(value)) {
            Some((key, _)) => Err(BadLabels::Invalid(key.chars().take(LABEL_CHARS_MAX).collect())),
            None => Ok(Labels(map)),
        }
    }
}

impl From<Labels> for BTreeMap<String, String> {
    fn from(labels: Labels) -> BTreeMap<String, String> {
        labels.0
    }
}

#[cfg(test)]
mod tests;
