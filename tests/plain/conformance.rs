//! Every MUST of virtio 1.2 that a driver can observe has a test that proves it, or a reason why nothing has to.
//! `tests/conformance/virtio-1.2.toml` lists them; a test says which it proves in a line `// virtio 1.2: ID...` above its
//! `#[test]`. The table made of both is kept in `src/devices/CONFORMANCE.md`: `UPDATE=1 cargo test --test plain` writes it
//! anew.
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::walls::sources;

const LIST: &str = "tests/conformance/virtio-1.2.toml";
const TABLE: &str = "src/devices/CONFORMANCE.md";
const MARK: &str = "// virtio 1.2:";

/// A test that says that it proves something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Proof {
    file: String,
    test: String,
}

struct Requirement {
    id: String,
    must: String,
    why_not: Option<String>,
}

struct Part {
    title: String,
    requirements: Vec<Requirement>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn list() -> Vec<Part> {
    let list: toml::Table = std::fs::read_to_string(root().join(LIST)).unwrap().parse().unwrap();
    let text = |value: &toml::Value, key: &str| value.get(key).map(|text| text.as_str().unwrap().to_owned());
    let requirement = |value: &toml::Value| Requirement {
        id: text(value, "id").unwrap(),
        must: text(value, "must").unwrap(),
        why_not: text(value, "why_not"),
    };
    let parts = list["part"].as_array().unwrap().iter();
    parts
        .map(|part| Part {
            title: text(part, "title").unwrap(),
            requirements: part["requirement"].as_array().unwrap().iter().map(requirement).collect(),
        })
        .collect()
}

/// For each requirement the tests that say that they prove it. A mark must stand above a test.
fn proofs() -> BTreeMap<String, BTreeSet<Proof>> {
    let mut proofs: BTreeMap<String, BTreeSet<Proof>> = BTreeMap::new();
    for path in ["src", "tests/kvm"].iter().flat_map(|folder| sources(&root().join(folder))) {
        let file = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        let (mut marked, mut is_test): (Vec<String>, bool) = (Vec::new(), false);
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            let line = line.trim();
            if let Some(ids) = line.strip_prefix(MARK) {
                marked.extend(ids.split_whitespace().map(str::to_owned));
            } else if line == "#[test]" {
                is_test = true;
            } else if !marked.is_empty() && !line.starts_with("//") {
                let name = line.strip_prefix("fn ").and_then(|rest| rest.split('(').next());
                let test =
                    name.filter(|_| is_test).unwrap_or_else(|| panic!("{file}: a mark above {line:?}"));
                for id in marked.drain(..) {
                    let proof = Proof { file: file.clone(), test: test.to_owned() };
                    assert!(
                        proofs.entry(id.clone()).or_default().insert(proof),
                        "{file}: {id} twice at {test}"
                    );
                }
                is_test = false;
            } else {
                is_test = false;
            }
        }
        assert!(marked.is_empty(), "{file}: a mark above nothing");
    }
    proofs
}

#[test]
fn each_requirement_has_a_proof_or_a_reason_and_each_mark_a_requirement() {
    let proofs = proofs();
    let mut known = BTreeSet::new();
    for Requirement { id, must, why_not } in list().into_iter().flat_map(|part| part.requirements) {
        let (section, number) =
            id.rsplit_once('-').unwrap_or_else(|| panic!("{id} is no section and number"));
        assert!(
            section.split('.').all(|part| part.parse::<u8>().is_ok()) && number.parse::<u8>().is_ok(),
            "{id}"
        );
        assert!(must.ends_with('.') && why_not.as_ref().is_none_or(|why| why.ends_with('.')), "{id}");
        match (&why_not, proofs.get(&id)) {
            (None, None) => panic!("{id} has neither a test that proves it nor a reason: {must}"),
            (Some(_), Some(proofs)) => panic!("{id} has a reason why not, and proofs: {proofs:?}"),
            _ => {}
        }
        assert!(known.insert(id.clone()), "{id} is listed twice");
    }
    let unknown: Vec<_> = proofs.iter().filter(|(id, _)| !known.contains(*id)).collect();
    assert!(unknown.is_empty(), "proofs of what is not in {LIST}: {unknown:?}");
}

#[test]
fn the_table_is_made_of_list_and_tests() {
    let proofs = proofs();
    let parts = list();
    let all: Vec<&Requirement> = parts.iter().flat_map(|part| &part.requirements).collect();
    let proven = all.iter().filter(|requirement| requirement.why_not.is_none()).count();
    let mut table = format!(
        "# What virtio 1.2 asks of a device, and what proves it\n\n\
         Every MUST of the specification that a driver can observe, in our own words, by section. Made of \
         `{LIST}` and the marks\nat the tests by `tests/plain/conformance.rs`, which also fails when they disagree. \
         {} in all: {proven} proven, {} that do not apply.\n",
        all.len(),
        all.len() - proven
    );
    for Part { title, requirements } in &parts {
        table += &format!("\n## {title}\n| section | what | proof, or why not |\n|---|---|---|\n");
        for Requirement { id, must, why_not } in requirements {
            let by = |proof: &Proof| format!("`{}` ({})", proof.test, proof.file);
            let proof = match (why_not, proofs.get(id)) {
                (Some(why), _) => format!("Not applicable: {why}"),
                (None, Some(proofs)) => proofs.iter().map(by).collect::<Vec<_>>().join(", "),
                (None, None) => "none".to_owned(),
            };
            table += &format!("| {id} | {must} | {proof} |\n");
        }
    }
    let path = root().join(TABLE);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &table).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == table, "{TABLE} differs: UPDATE=1 cargo test --test plain, then review it");
}
