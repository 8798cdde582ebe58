//! Nothing that a guest or a peer sends ends a process by a panic: the rooms that read it forbid every explicit one by
//! lints, and what lints do not see is looked for here. An exception is a line in `EXCEPTIONS` with its proof.
use std::path::{Path, PathBuf};

use crate::walls::sources;

/// Rooms with code that a guest's or a peer's bytes reach.
const ROOMS: [&str; 5] = ["devices", "memory", "kvm", "vmm", "wire"];

/// What each of them denies.
const LINTS: [&str; 5] = ["unwrap_used", "expect_used", "panic", "unreachable", "indexing_slicing"];

/// Arithmetic on a guest's numbers is here; elsewhere it has been turned into typed values.
const ARITHMETIC: [&str; 2] = ["devices", "wire"];

/// Files in which a lint is switched off, and why no guest gets there.
const EXCEPTIONS: [(&str, &str); 2] = [
    (
        "src/vmm/sandbox.rs",
        "a thread whose filter cannot be loaded ends before it has seen anything of the guest's",
    ),
    (
        "src/memory/ram.rs",
        "memory that may be unmapped ends its process; how often a guest has it mapped anew is bounded",
    ),
];

/// Macros and calls that panic. The lints see the calls in code; these are also looked for because an `assert!` is
/// no lint's business.
const WORDS: [&str; 10] = [
    "panic!(",
    "unreachable!(",
    "todo!(",
    "unimplemented!(",
    "assert!(",
    "assert_eq!(",
    "assert_ne!(",
    ".unwrap()",
    ".unwrap_err()",
    ".expect(\"",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Sources that are part of a program: no tests, nor what tests and fuzzers stand on.
fn programs(room: &str) -> Vec<PathBuf> {
    let room = root().join("src").join(room);
    let is_part = |path: &PathBuf| {
        let within = path.strip_prefix(&room).unwrap();
        let names = within.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs"));
        !names.into_iter().any(|name| ["tests", "fuzz", "bench", "hostile", "by_hand"].contains(&name))
    };
    sources(&room).into_iter().filter(is_part).collect()
}

/// Lines of code with their numbers; what is for tests only, at the end of a file, is left out.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let for_tests = ["#[cfg(test)]\nmod tests {", "#[cfg(test)]\nimpl "];
    let end = for_tests.iter().filter_map(|start| text.find(start)).min().unwrap_or(text.len());
    let lines = (1..).zip(text[..end].lines());
    lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
}

#[test]
fn rooms_that_read_hostile_bytes_forbid_panics() {
    for room in ROOMS {
        let lib = std::fs::read_to_string(root().join("src").join(room).join("lib.rs")).unwrap();
        let denied =
            lib.split("#![deny(").nth(1).and_then(|rest| rest.split(")]").next()).unwrap_or_default();
        let has = |lint: &str| denied.split(',').any(|word| word.trim() == format!("clippy::{lint}"));
        for lint in LINTS {
            assert!(has(lint), "src/{room}/lib.rs does not deny clippy::{lint}");
        }
        assert_eq!(has("arithmetic_side_effects"), ARITHMETIC.contains(&room), "src/{room}/lib.rs");
    }
}

#[test]
fn every_exception_is_named_with_its_proof() {
    let mut found = Vec::new();
    for room in ROOMS {
        for path in programs(room) {
            let text = std::fs::read_to_string(&path).unwrap();
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            // The attributes of `lib.rs` are about tests and fuzzers.
            let is_off = !name.ends_with("lib.rs")
                && LINTS.iter().any(|lint| text.contains(&format!("clippy::{lint}")));
            let panics: Vec<_> = code(&text)
                .filter(|(_, line)| WORDS.iter().any(|word| line.contains(word)))
                .map(|(number, line)| format!("{name}:{number}: {}", line.trim()))
                .collect();
            if is_off || !panics.is_empty() {
                found.push((name, panics));
            }
        }
    }
    let named: Vec<&str> = EXCEPTIONS.iter().map(|(file, _)| *file).collect();
    let unnamed: Vec<_> = found.iter().filter(|(name, _)| !named.contains(&name.as_str())).collect();
    assert!(unnamed.is_empty(), "a panic without a proof: {unnamed:#?}");
    for (file, proof) in EXCEPTIONS {
        assert!(found.iter().any(|(name, _)| name == file), "{file} needs no exception");
        assert!(proof.len() > 20, "{file}: {proof:?} is no proof");
    }
}
