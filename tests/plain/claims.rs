//! Pages that say what is tested where: what they name exists.
use std::path::PathBuf;

use crate::walls::sources;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn spans(page: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(page)).unwrap();
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_path_of_the_security_page_exists() {
    let is_path = |span: &String| {
        ["src/", "tests/", "scripts/", "api/"].iter().any(|folder| span.starts_with(folder))
            && span.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
    };
    let paths: Vec<String> = spans("SECURITY.md").into_iter().filter(is_path).collect();
    assert!(paths.len() > 10, "{paths:?}");
    let missing: Vec<&String> = paths.iter().filter(|path| !root().join(path).exists()).collect();
    assert!(missing.is_empty(), "SECURITY.md names what does not exist: {missing:?}");
}

/// A test is a code span of several words, with the module it lies in or without.
#[test]
fn every_test_that_is_named_exists() {
    let code: String = ["src", "tests"]
        .iter()
        .flat_map(|folder| sources(&root().join(folder)))
        .map(|source| std::fs::read_to_string(source).unwrap())
        .collect();
    let name = |span: &String| {
        let name = span.rsplit("::").next().unwrap_or_default().to_owned();
        let is_name = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        (is_name && name.matches('_').count() > 2 && !name.starts_with("test_")).then_some(name)
    };
    for page in ["SECURITY.md", "tests/jail/README.md"] {
        let names: Vec<String> = spans(page).iter().filter_map(name).collect();
        assert!(names.len() > 3, "{page}: {names:?}");
        let missing: Vec<&String> =
            names.iter().filter(|name| !code.contains(&format!("fn {name}("))).collect();
        assert!(missing.is_empty(), "{page} names tests that do not exist: {missing:?}");
    }
}
