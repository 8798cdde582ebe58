//! `src/README.md` is the map: what it names exists, and every room is on it.
use std::path::Path;

#[test]
fn every_path_on_the_map_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let map = std::fs::read_to_string(root.join("src/README.md")).unwrap();
    // A path is a code span with a slash and nothing that a path would not have.
    let spans = map.split('`').skip(1).step_by(2);
    let paths = spans.filter(|span| {
        span.contains('/')
            && !span.starts_with('/')
            && span.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
    });
    let missing: Vec<&str> = paths.filter(|path| !root.join(path).exists()).collect();
    assert!(missing.is_empty(), "the map names what does not exist: {missing:?}");
}

#[test]
fn every_room_is_on_the_map() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let map = std::fs::read_to_string(root.join("src/README.md")).unwrap();
    for entry in std::fs::read_dir(root.join("src")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            assert!(map.contains(&format!("`src/{name}`")), "src/{name} is not on the map");
        }
    }
}
