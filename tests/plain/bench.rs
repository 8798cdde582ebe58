//! What `scripts/bench` refuses, and that it does so before it installs, builds or measures anything.
use std::path::Path;
use std::process::{Command, Output};

fn bench(arguments: &[&str], from: &Path) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench");
    // Without what it would install and build with, so that what should have been refused ends at once.
    Command::new(script).args(arguments).current_dir(from).env("PATH", "/usr/bin:/bin").output().unwrap()
}

#[test]
fn what_it_cannot_do_is_refused_before_anything_is_built() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("rows.json");
    std::fs::write(&file, "older rows").unwrap();
    for (arguments, why) in [
        (&["nonsense"][..], "there is no group or option nonsense; groups: start "),
        (&["disk", "--long"], "there is no group or option --long"),
        (&["--json"], "--json wants a file"),
        (&["--json", "none/rows.json", "disk"], "/none/rows.json cannot be written"),
        (&["--json", ".", "disk"], " cannot be written"),
        (&["--json", "rows.json", "nonsense"], "there is no group or option nonsense"),
    ] {
        let output = bench(arguments, directory.path());
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
        assert!(told.starts_with("scripts/bench: ") && told.contains(why), "{arguments:?}: {told}");
        assert_eq!(told.lines().count(), 1, "{arguments:?}: {told}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"older rows");
}

#[test]
fn its_help_names_every_group() {
    let output = bench(&["--help"], Path::new("/"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let help = String::from_utf8(output.stdout).unwrap();
    let groups = help.lines().last().unwrap().strip_prefix("Groups: ").unwrap();
    let main = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/main.rs");
    let source = std::fs::read_to_string(main).unwrap();
    // Each group is a module with a function `run`.
    let runs: Vec<&str> = source.matches("::run").collect();
    assert_eq!(groups.split(' ').count(), runs.len(), "{help}");
    assert!(groups.split(' ').all(|group| source.contains(&format!("run: {group}::run"))), "{help}");
}
