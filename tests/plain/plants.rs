//! The bugs of `tests/fuzz/plants` fit the sources as they are: each can still be planted.
use std::path::Path;

#[test]
fn every_planted_bug_fits_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root.join("tests/fuzz/plants")).unwrap() {
        let path = entry.unwrap().path();
        let patch = std::fs::read_to_string(&path).unwrap();
        let mut source = String::new();
        let mut hunks: Vec<(String, String)> = Vec::new();
        for line in patch.lines() {
            match (line.split_at_checked(1), hunks.last_mut()) {
                _ if line.starts_with("--- a/") => {
                    source = std::fs::read_to_string(root.join(&line[6..])).unwrap();
                }
                _ if line.starts_with("+++ ") => {}
                _ if line.starts_with("@@") => hunks.push((source.clone(), String::new())),
                (Some((" " | "-", kept)), Some((_, before))) => before.extend([kept, "\n"]),
                // Some editors leave no space on an empty line.
                (None, Some((_, before))) => before.push('\n'),
                _ => {}
            }
        }
        assert!(!hunks.is_empty(), "{} plants nothing", path.display());
        for (source, before) in hunks {
            assert!(source.contains(&before), "{} does not fit any more:\n{before}", path.display());
        }
        let sentence = patch.lines().next().unwrap();
        assert!(sentence.ends_with('.'), "{} does not say what it plants: {sentence}", path.display());
        // `TARGET.patch`, or `TARGET-READER.patch` for another reader of the same target.
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        found.push(name.split('-').next().unwrap().to_owned());
    }
    let targets = std::fs::read_dir(root.join("tests/fuzz/targets")).unwrap();
    let targets: Vec<String> = targets
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    for name in &targets {
        assert!(found.contains(name), "no bug is planted for {name}");
    }
    for name in &found {
        assert!(targets.contains(name), "a bug is planted for {name}, which is no target");
    }
}
