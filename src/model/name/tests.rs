//! What is a name and what is not.
use super::*;

#[test]
fn names_are_dns_labels() {
    for good in ["a", "web1", "a-b", "0", &"x".repeat(63)] {
        assert!(good.parse::<Name>().is_ok(), "{good}");
    }
    for bad in ["", "-a", "a-", "A", "a.b", "a b", "ä", "a/b", "a\0", &"x".repeat(64)] {
        assert!(bad.parse::<Name>().is_err(), "{bad:?}");
    }
}

#[test]
fn labels_are_bounded_and_plain() {
    let one = |key: &str, value: &str| Labels::try_from(BTreeMap::from([(key.into(), value.into())]));
    assert!(one("team/role", "web-1.a_b").is_ok());
    assert!(one("empty-value", "").is_ok());
    assert!(one("", "x").is_err());
    assert!(one("a=b", "x").is_err());
    assert!(one("a", &"x".repeat(64)).is_err());
    let many: BTreeMap<String, String> = (0..33).map(|n| (n.to_string(), String::new())).collect();
    assert_eq!(Labels::try_from(many), Err(BadLabels::TooMany(33)));
}
