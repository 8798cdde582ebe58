//! What callers rely on, a line each, and whether a change of the types keeps it. `api/promises.txt` holds every line
//! that was ever written: `UPDATE=1` adds those of new members and never takes one away.
//!
//! ```text
//! call POST /v1/servers                    an operation there is
//! query GET /v1/servers limit              a parameter it takes
//! needs POST /v1/servers: body             all that a request must have; nothing is added
//! answers GET /v1/servers/{id} 200 Server  what it answers
//! takes CreateServer.vcpus integer         a member of a request
//! most CreateServer.vcpus 32               a bound, which may only widen
//! gives Server.state ServerState           a member of an answer
//! always Server.state                      that is never missing
//! word RestartPolicy never                 a word of an enumeration
//! is ImportSource {catalogue: string}      one of the forms of what has no members of its own
//! ```
use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::document;

type Lines = BTreeSet<String>;

/// How a type is used: what may be added to it, and what may not, differs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    Request,
    Answer,
}

fn promises(document: &Value) -> Lines {
    let mut lines = Lines::new();
    let mut used = BTreeSet::new();
    for (path, item) in members(&document["paths"]) {
        for (method, operation) in members(item) {
            let call = format!("{} {path}", method.to_uppercase());
            operation_lines(&call, operation, &mut lines, &mut used);
        }
    }
    let schemas = &document["components"]["schemas"];
    let mut seen = BTreeSet::new();
    while let Some((name, how)) = used.pop_first() {
        if seen.insert((name.clone(), how)) {
            schema_lines(&name, how, &schemas[&name], &mut lines, &mut used);
        }
    }
    lines
}

fn operation_lines(call: &str, operation: &Value, lines: &mut Lines, used: &mut BTreeSet<(String, Use)>) {
    lines.insert(format!("call {call}"));
    let mut needs = Vec::new();
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        let name = parameter["name"].as_str().unwrap();
        lines.insert(format!("{} {call} {name}", parameter["in"].as_str().unwrap()));
        if parameter["required"] == true {
            needs.push(name);
        }
    }
    let body = &operation["requestBody"];
    if body["required"] == true {
        needs.push("body");
    }
    lines.insert(format!("needs {call}: {}", needs.join(" ")));
    for (kind, content) in members(&body["content"]) {
        let shape = shape(&content["schema"], Use::Request, used);
        lines.insert(format!("body {call} {kind} {shape}"));
    }
    for (status, response) in members(&operation["responses"]) {
        for (kind, content) in members(&response["content"]) {
            // Problems are the same for all paths.
            if status.starts_with('2') {
                let shape = shape(&content["schema"], Use::Answer, used);
                lines.insert(format!("answers {call} {status} {kind} {shape}"));
            }
        }
    }
}

fn schema_lines(name: &str, how: Use, schema: &Value, lines: &mut Lines, used: &mut BTreeSet<(String, Use)>) {
    for word in words(schema) {
        lines.insert(format!("word {name} {word}"));
    }
    let required: BTreeSet<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if members(&schema["properties"]).next().is_none() {
        // A line for each of several alternatives, so that one more breaks nothing.
        let shape = shape(schema, how, used);
        lines.extend(shape.split('|').map(|alternative| format!("is {name} {alternative}")));
        return;
    }
    if how == Use::Request {
        let needs: Vec<&str> = required.iter().copied().collect();
        lines.insert(format!("needs {name}: {}", needs.join(" ")));
    }
    for (member, schema) in members(&schema["properties"]) {
        let shape = shape(schema, how, used);
        let place = format!("{name}.{member}");
        match how {
            Use::Answer => {
                lines.insert(format!("gives {place} {shape}"));
                if required.contains(member.as_str()) {
                    lines.insert(format!("always {place}"));
                }
            }
            Use::Request => {
                lines.insert(format!("takes {place} {shape}"));
                for (kind, keyword) in [("most", "maximum"), ("most", "maxLength"), ("most", "maxItems")] {
                    lines.extend(schema[keyword].as_f64().map(|bound| format!("{kind} {place} {bound}")));
                }
                for (kind, keyword) in [("least", "minimum"), ("least", "minLength"), ("least", "minItems")] {
                    lines.extend(schema[keyword].as_f64().map(|bound| format!("{kind} {place} {bound}")));
                }
            }
        }
        for word in words(schema) {
            lines.insert(format!("word {place} {word}"));
        }
    }
}

/// The type in a few words; types with names are looked at later.
fn shape(schema: &Value, how: Use, used: &mut BTreeSet<(String, Use)>) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
        used.insert((name.to_owned(), how));
        return name.to_owned();
    }
    for several in ["oneOf", "anyOf", "allOf"] {
        if let Some(parts) = schema[several].as_array() {
            let shapes: BTreeSet<String> = parts.iter().map(|part| shape(part, how, used)).collect();
            return shapes.into_iter().collect::<Vec<_>>().join("|");
        }
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => vec!["any"],
    };
    let kinds = kinds.into_iter().map(|kind| match kind {
        "array" => format!("[{}]", shape(&schema["items"], how, used)),
        "object" if schema["additionalProperties"].is_object() => {
            format!("{{{}}}", shape(&schema["additionalProperties"], how, used))
        }
        "object" => {
            let inner = members(&schema["properties"])
                .map(|(name, inner)| format!("{name}: {}", shape(inner, how, used)));
            format!("{{{}}}", inner.collect::<Vec<_>>().join(", "))
        }
        kind => kind.to_owned(),
    });
    kinds.collect::<Vec<_>>().join("|")
}

fn words(schema: &Value) -> impl Iterator<Item = &str> {
    let alone = schema["enum"].as_array().into_iter().flatten();
    let described = schema["oneOf"].as_array().into_iter().flatten();
    alone
        .chain(described.flat_map(|one| one["enum"].as_array().into_iter().flatten()))
        .filter_map(Value::as_str)
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

/// A line for each alternative of a line that has several.
fn alternatives(line: &str) -> Option<impl Iterator<Item = String>> {
    let (name, shape) = line.strip_prefix("is ")?.split_once(' ')?;
    shape.contains('|').then(|| shape.split('|').map(move |one| format!("is {name} {one}")))
}

/// Lines of `kept` that do not hold any more.
fn broken(kept: &Lines, now: &Lines) -> Vec<String> {
    let bound = |line: &str| -> Option<(String, f64)> {
        let (place, number) = line.rsplit_once(' ')?;
        ["most ", "least "].iter().any(|kind| place.starts_with(kind)).then_some(())?;
        Some((place.to_owned(), number.parse().ok()?))
    };
    let needs = |line: &str| -> Option<(String, BTreeSet<String>)> {
        let (place, list) = line.strip_prefix("needs ")?.split_once(": ")?;
        Some((place.to_owned(), list.split_whitespace().map(str::to_owned).collect()))
    };
    let bounds: BTreeMap<String, f64> = now.iter().filter_map(|line| bound(line)).collect();
    let needed: BTreeMap<String, BTreeSet<String>> = now.iter().filter_map(|line| needs(line)).collect();
    let holds = |line: &String| match (bound(line), needs(line)) {
        // A bound that is no more is the widest.
        (Some((place, was)), _) => bounds.get(&place).is_none_or(|is| match place.starts_with("most ") {
            true => *is >= was,
            false => *is <= was,
        }),
        // What has gone altogether is missed by another line.
        (_, Some((place, was))) => needed.get(&place).is_none_or(|is| is.is_subset(&was)),
        _ => {
            now.contains(line) || alternatives(line).is_some_and(|mut all| all.all(|one| now.contains(&one)))
        }
    };
    kept.iter().filter(|line| !holds(line)).cloned().collect()
}

#[test]
fn every_promise_to_callers_is_kept() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../api/promises.txt");
    let kept: Lines = std::fs::read_to_string(&path).unwrap_or_default().lines().map(str::to_owned).collect();
    let now = promises(&serde_json::from_str(&document::openapi_json()).unwrap());
    let broken = broken(&kept, &now);
    assert!(
        broken.is_empty(),
        "callers rely on what this change takes away:\n  {}\nKeep it, or make a new version of the API.",
        broken.join("\n  ")
    );
    if std::env::var_os("UPDATE").is_some() {
        let text: String = now.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, text).unwrap();
        return;
    }
    let fresh: Vec<&String> = now.difference(&kept).collect();
    assert!(fresh.is_empty(), "api/promises.txt lacks {fresh:#?}: UPDATE=1 cargo test -p http-room");
}

#[test]
fn each_kind_of_breaking_change_is_found_and_no_other() {
    let before: Value = serde_json::from_str(&document::openapi_json()).unwrap();
    let lines = promises(&before);
    let schemas = "/components/schemas";
    let after = |change: &dyn Fn(&mut Value)| {
        let mut document = before.clone();
        change(&mut document);
        broken(&lines, &promises(&document))
    };
    let at = |document: &mut Value, pointer: &str, change: &dyn Fn(&mut Value)| {
        change(document.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer} is nowhere")));
    };
    let remove =
        |name: &'static str| move |value: &mut Value| drop(value.as_object_mut().unwrap().remove(name));
    type Change<'a> = (&'a str, String, Box<dyn Fn(&mut Value)>);
    let breaking: Vec<Change<'_>> = vec![
        ("call GET /v1/servers/{id}/metrics", "/paths".into(), Box::new(remove("/v1/servers/{id}/metrics"))),
        ("gives Server.vcpus", format!("{schemas}/Server/properties"), Box::new(remove("vcpus"))),
        ("takes CreateServer.vcpus", format!("{schemas}/CreateServer/properties"), Box::new(remove("vcpus"))),
        (
            "needs CreateServer",
            format!("{schemas}/CreateServer/required"),
            Box::new(|list: &mut Value| list.as_array_mut().unwrap().push(json!("vcpus"))),
        ),
        (
            "always Server.name",
            format!("{schemas}/Server/required"),
            Box::new(|list: &mut Value| list.as_array_mut().unwrap().retain(|name| name != "name")),
        ),
        (
            "most CreateServer.vcpus",
            format!("{schemas}/CreateServer/properties/vcpus/maximum"),
            Box::new(|bound: &mut Value| *bound = json!(16)),
        ),
        (
            "gives Server.vcpus",
            format!("{schemas}/Server/properties/vcpus/type"),
            Box::new(|kind: &mut Value| *kind = json!("string")),
        ),
    ];
    for (promise, pointer, change) in &breaking {
        let found = after(&|document| at(document, pointer, &**change));
        assert!(found.iter().any(|line| line.starts_with(promise)), "{promise} is not missed: {found:?}");
    }
    let harmless: [Change<'_>; 4] = [
        (
            "a member that need not be given any more",
            format!("{schemas}/CreateServer/required"),
            Box::new(|list: &mut Value| list.as_array_mut().unwrap().retain(|name| name != "image")),
        ),
        (
            "a new member of an answer",
            format!("{schemas}/Server/properties"),
            Box::new(|all: &mut Value| all["colour"] = json!({ "type": "string" })),
        ),
        (
            "a wider bound",
            format!("{schemas}/CreateServer/properties/vcpus/maximum"),
            Box::new(|bound: &mut Value| *bound = json!(64)),
        ),
        (
            "a new path",
            "/paths".into(),
            Box::new(|paths: &mut Value| paths["/v1/new"] = json!({ "get": { "responses": {} } })),
        ),
    ];
    for (what, pointer, change) in &harmless {
        assert_eq!(after(&|document| at(document, pointer, &**change)), Vec::<String>::new(), "{what}");
    }
}
