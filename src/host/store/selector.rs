//! Label selectors: comma-separated terms `key=value`, `key!=value`, `key`, `!key`, all of which must hold.
//! Each becomes one SQL term over the `labels` column of a table of records.
use crate::limits::SELECTOR_TERMS_MAX;

/// One term.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Term {
    /// The label has this value.
    Is(String, String),
    /// The label has another value or is absent.
    IsNot(String, String),
    /// The label is present.
    Has(String),
    /// The label is absent.
    HasNot(String),
}

/// Reads a selector; the error is a sentence for people.
pub fn parse(text: &str) -> Result<Vec<Term>, String> {
    let terms: Vec<&str> = text.split(',').map(str::trim).filter(|term| !term.is_empty()).collect();
    if terms.len() > SELECTOR_TERMS_MAX {
        return Err(format!("has {} terms, more than {SELECTOR_TERMS_MAX}", terms.len()));
    }
    terms.into_iter().map(parse_term).collect()
}

fn parse_term(text: &str) -> Result<Term, String> {
    let refused =
        || format!("cannot read {text:?}: terms are key=value, key!=value, key or !key, separated by commas");
    let word = |part: &str| {
        let sound = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b));
        if sound { Ok(part.to_owned()) } else { Err(refused()) }
    };
    let key = |part: &str| if part.is_empty() { Err(refused()) } else { word(part) };
    if let Some((name, value)) = text.split_once("!=") {
        return Ok(Term::IsNot(key(name.trim())?, word(value.trim())?));
    }
    if let Some((name, value)) = text.split_once('=') {
        // Both spellings of equality that people know from other tools.
        let value = value.strip_prefix('=').unwrap_or(value);
        return Ok(Term::Is(key(name.trim())?, word(value.trim())?));
    }
    match text.strip_prefix('!') {
        Some(name) => Ok(Term::HasNot(key(name.trim())?)),
        None => Ok(Term::Has(key(text)?)),
    }
}

impl Term {
    pub(super) fn sql(&self) -> &'static str {
        match self {
            Term::Is(..) => "EXISTS (SELECT 1 FROM json_each(labels) WHERE key = ? AND value = ?)",
            Term::IsNot(..) => "NOT EXISTS (SELECT 1 FROM json_each(labels) WHERE key = ? AND value = ?)",
            Term::Has(_) => "EXISTS (SELECT 1 FROM json_each(labels) WHERE key = ?)",
            Term::HasNot(_) => "NOT EXISTS (SELECT 1 FROM json_each(labels) WHERE key = ?)",
        }
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &str> {
        let (key, value) = match self {
            Term::Is(key, value) | Term::IsNot(key, value) => (key, Some(value.as_str())),
            Term::Has(key) | Term::HasNot(key) => (key, None),
        };
        std::iter::once(key.as_str()).chain(value)
    }
}
