//! Labels under a merge patch (RFC 7396): a value sets a label, null removes it.
//! Pure. Every facade whose noun has labels uses it.
use std::collections::BTreeMap;

use model::Labels;

use crate::error::{Error, Result};

/// `labels` with `changes` applied. Fails with `invalid` when the result has too many or a bad one is set.
pub(crate) fn merge(labels: &Labels, changes: BTreeMap<String, Option<String>>) -> Result<Labels> {
    let mut merged = BTreeMap::from(labels.clone());
    for (key, value) in changes {
        match value {
            Some(value) => merged.insert(key, value),
            None => merged.remove(&key),
        };
    }
    Labels::try_from(merged).map_err(|bad| Error::invalid("/labels", "invalid", bad.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    #[test]
    fn a_value_sets_null_removes_and_the_rest_stays() {
        let labels = Labels::try_from(map(&[("a", "1"), ("b", "2"), ("c", "3")])).unwrap();
        let changes = [("b", None), ("c", Some("4")), ("d", Some("5")), ("e", None)];
        let changes = changes.map(|(key, value)| (key.to_owned(), value.map(str::to_owned)));
        let merged = merge(&labels, changes.into()).unwrap();
        assert_eq!(BTreeMap::from(merged), map(&[("a", "1"), ("c", "4"), ("d", "5")]));
    }

    #[test]
    fn a_bad_label_is_refused_with_its_place() {
        let refused =
            merge(&Labels::default(), [("no spaces".to_owned(), Some(String::new()))].into()).unwrap_err();
        assert_eq!(refused.errors[0].pointer, "/labels");
    }
}
