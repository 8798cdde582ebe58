use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::Value;

use super::*;

#[derive(Debug, PartialEq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Source {
    Upload,
    Named(String),
}

#[derive(Debug, Default, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    rate: Option<u64>,
}

#[derive(Debug, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    source: Source,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    labels: BTreeMap<String, Option<String>>,
}

fn read(text: &str) -> Result<Body, String> {
    let json: Json = serde_json::from_str(text).map_err(|cause| cause.to_string())?;
    Body::deserialize(json).map_err(|cause| cause.to_string())
}

#[test]
fn what_fits_is_read() {
    let body =
        read(r#"{"source": {"named": "a"}, "limits": {"rate": null}, "labels": {"a": null, "b": "c"}}"#);
    let labels = BTreeMap::from([("a".into(), None), ("b".into(), Some("c".into()))]);
    assert_eq!(body, Ok(Body { source: Source::Named("a".into()), limits: Limits::default(), labels }));
    assert_eq!(
        read(r#"{"source": "upload", "limits": {"rate": 18446744073709551615}}"#).unwrap().limits.rate,
        Some(u64::MAX)
    );
}

#[test]
fn only_an_object_is_an_object() {
    for text in [
        "[]",
        r#"["upload"]"#,
        r#"{"source": "upload", "limits": []}"#,
        r#"{"source": "upload", "limits": [1]}"#,
        r#"{"source": "upload", "limits": null}"#,
        r#"{"source": "upload", "labels": [["a", "b"]]}"#,
        r#"{"source": {"named": "a", "upload": null}}"#,
        r#"{"source": {}}"#,
        r#"{"source": ["named", "a"]}"#,
        r#"{"source": {"named": ["a"]}}"#,
        r#"{"source": "upload", "limits": {"rate": 1.5}}"#,
        r#"{"source": "upload", "limits": {"rate": 18446744073709551616}}"#,
        r#"{"source": "upload", "limits": {"rates": 1}}"#,
    ] {
        assert!(read(text).is_err(), "{text} was taken");
    }
}

#[test]
fn a_name_that_comes_twice_is_found_at_any_depth() {
    for (text, pointer) in [
        (r#"{"a": 1, "a": 1}"#, Some("/a")),
        (r#"{"a": [{}, {"b/c": 1, "b/c": 2}]}"#, Some("/a/1/b~1c")),
        (r#"{"a": {"b": 1}, "b": {"a": 1}}"#, None),
        ("[1, 1]", None),
    ] {
        let json: Json = serde_json::from_str(text).unwrap();
        assert_eq!(json.repeated().as_deref(), pointer, "{text}");
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e9..1e9).prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 64, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(".*", inner, 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn every_value_is_read_as_it_was_written(value in any_value()) {
        // Compared with serde_json's own reading, which rounds some fractions.
        let text = value.to_string();
        let json: Json = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(json.repeated(), None);
        prop_assert_eq!(Value::deserialize(json).unwrap(), serde_json::from_str::<Value>(&text).unwrap());
    }
}
