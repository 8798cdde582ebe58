use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use tokio::sync::oneshot;

use super::*;

/// Guest images whose builder is this script.
fn guest_images(script: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let build = directory.path().join("build");
    // Written by a process of its own: a program that any other test's child still has open for writing cannot
    // be run.
    let draft = directory.path().join("draft");
    std::fs::write(&draft, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(std::process::Command::new("cp").args([&draft, &build]).status().unwrap().success());
    directory
}

async fn run(script: &str) -> (Result<(), BuildError>, (String, u8), tempfile::TempDir) {
    let images = guest_images(script);
    let stage = Stage::default();
    let outcome =
        build(images.path(), "sample", &images.path().join("out"), &stage, std::future::pending()).await;
    (outcome, stage.now(), images)
}

#[tokio::test]
async fn the_builder_gets_recipe_and_place_and_its_progress_is_told() {
    let (outcome, stage, images) =
        run("mkdir \"$3\"; echo \"$1 $2\" > \"$3/asked\"; echo 'progress: fetch 42' >&2").await;
    outcome.unwrap();
    assert_eq!(stage, ("fetch".to_owned(), 42));
    assert_eq!(std::fs::read_to_string(images.path().join("out/asked")).unwrap(), "sample --out\n");
}

#[tokio::test]
async fn a_failed_build_ends_with_its_last_words_however_much_it_said() {
    let script = "for i in $(seq 20000); do echo \"line $i\" >&2; done; echo 'no mirror' >&2; exit 3";
    let refused = run(script).await.0.unwrap_err().to_string();
    assert!(refused.contains("no mirror") && refused.contains("exit status: 3"), "{refused}");
    assert!(refused.lines().count() <= RECIPE_LINES_KEPT, "{refused}");
}

#[tokio::test]
async fn a_line_without_end_is_bounded() {
    let refused = run("head -c 10000000 /dev/zero | tr '\\0' x >&2; exit 1").await.0.unwrap_err().to_string();
    assert!(refused.len() < RECIPE_LINES_KEPT * (RECIPE_LINE_BYTES_MAX + 2) + 200, "{}", refused.len());
}

#[tokio::test]
async fn a_missing_builder_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let stage = Stage::default();
    let outcome = build(directory.path(), "x", directory.path(), &stage, std::future::pending()).await;
    assert!(matches!(outcome, Err(BuildError::Run { .. })));
}

#[tokio::test]
async fn cancelling_ends_the_builder_and_what_it_started() {
    let images =
        guest_images("sleep 1000 & echo $! > \"$(dirname \"$0\")/child\"; echo 'progress: wait 1' >&2; wait");
    let stage = Stage::default();
    let (cancel, cancelled) = oneshot::channel::<()>();
    let out = images.path().join("out");
    let building = build(images.path(), "sample", &out, &stage, async {
        let _ = cancelled.await;
    });
    let told = async {
        while stage.now().1 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.send(()).unwrap();
    };
    let both = async { tokio::join!(building, told) };
    let (outcome, ()) = tokio::time::timeout(Duration::from_secs(20), both).await.expect("it did not end");
    assert!(matches!(outcome, Err(BuildError::Cancelled)));
    let child = std::fs::read_to_string(images.path().join("child")).unwrap();
    let stat = format!("/proc/{}/stat", child.trim());
    let gone = async {
        // The kernel carries a signal out when the process next runs.
        while let Ok(state) = std::fs::read_to_string(&stat) {
            if state.contains(") Z ") || state.contains(") X ") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the builder's child lives on");
}

#[test]
fn only_well_formed_progress_is_progress() {
    assert_eq!(progress("progress: fetch 7"), Some(("fetch".to_owned(), 7)));
    let long = format!("progress: {} 1", "a".repeat(33));
    for other in [
        "progress: fetch",
        "progress: fetch 101",
        "progress: Fetch 1",
        "progress:  1",
        "fetch 1",
        long.as_str(),
    ] {
        assert_eq!(progress(other), None, "{other}");
    }
}

#[test]
fn the_projects_own_catalogue_is_read() {
    let guest_images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-images");
    let entries = catalogue(&guest_images).unwrap();
    assert!(entries.iter().any(|entry| entry.name == "tiny" && !entry.title.is_empty()), "{entries:?}");
    // That one is for benchmarks.
    assert!(guest_images.join("recipes/bench").exists());
    assert!(entries.iter().all(|entry| entry.name != "bench"), "{entries:?}");
}
