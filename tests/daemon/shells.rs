//! VMMs that are kept ready: a server that takes one is as any other, and whatever dies, none is left behind.
use std::path::PathBuf;

use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{Orders, Stage, server_body, wait_for};
use crate::world::{groups, inside};

const SHELLS: usize = 3;

fn orders() -> Orders {
    Orders { warm_shells: SHELLS, ..Orders::default() }
}

/// Processes that wait for a server.
fn shells(stage: &Stage) -> Vec<i32> {
    stage.vmms().into_iter().filter(|(label, _)| label.starts_with("shell-")).map(|(_, pid)| pid).collect()
}

/// Control groups of shells, those of this test alone.
fn shell_groups() -> Vec<PathBuf> {
    let parent = std::env::var("TOFT_CGROUP").expect("it is set inside");
    let is_ours = |path: &PathBuf| path.components().any(|part| part.as_os_str() == parent.as_str());
    groups(&["shell-".to_owned()]).into_iter().filter(is_ours).collect()
}

async fn ready(stage: &Stage, count: usize) -> Vec<i32> {
    let look = async || Some(shells(stage)).filter(|found| found.len() == count);
    let found = wait_for(&format!("{count} VMMs that are ready"), look).await;
    found.unwrap_or_else(|late| panic!("{late}\n{}", stage.log()))
}

/// Makes servers until one takes a process that waited: that is seen before it is whole, and then it is the server after which
/// takes it.
async fn on_a_shell(stage: &Stage, name: &str, mut body: impl FnMut(&str) -> Value) -> String {
    for number in 0..10 {
        let waiting = ready(stage, SHELLS).await;
        let name = format!("{name}-{number}");
        let answer = stage.call(Method::POST, "/v1/servers", &name, Some(body(&name))).await;
        stage.succeeded(&answer.operation()).await.unwrap();
        if waiting.contains(&stage.vmms()[&name]) {
            return text(&answer.body["resource"]["id"]);
        }
    }
    panic!("no server takes one of those that wait\n{}", stage.log());
}

async fn none_left(stage: &Stage) {
    ready(stage, 0).await;
    let directory = stage.scratch("state/shells");
    let gone = async || {
        let empty = std::fs::read_dir(&directory).map_or(true, |mut entries| entries.next().is_none());
        (empty && shell_groups().is_empty()).then_some(())
    };
    wait_for("the end of groups and directories", gone)
        .await
        .unwrap_or_else(|late| panic!("{late}: {:?}\n{}", shell_groups(), stage.log()));
}

#[test]
fn a_daemon_that_is_killed_leaves_its_shells_to_the_next_one() {
    inside("shells::a_daemon_that_is_killed_leaves_its_shells_to_the_next_one", async {
        let stage = Stage::new();
        stage.open_well_with(orders()).await;
        stage.import().await;
        assert!(shells(&stage).is_empty(), "an idle host has none");
        let id = stage.create("one").await;
        let before = ready(&stage, SHELLS).await;
        assert!(!shell_groups().is_empty());
        stage.kill().await;
        assert_eq!(ready(&stage, SHELLS).await, before, "they are nobody's now");
        stage.open_well().await;
        // Nothing but what waits is swept away.
        none_left(&stage).await;
        let (_, boots) = stage.beats(&id).await;
        assert_eq!(boots, 1);
        stage.end(Signal::SIGTERM).await;
        stage.open_well_with(orders()).await;
        stage.create("two").await;
        let three = on_a_shell(&stage, "three", server_body).await;
        stage.kill().await;
        stage.open_well_with(orders()).await;
        let (beats, boots) = stage.beats(&three).await;
        assert_eq!(boots, 1, "after {beats} beats");
        // A daemon that ends takes those that wait with it.
        stage.create("four").await;
        ready(&stage, SHELLS).await;
        stage.clear().await;
        stage.end(Signal::SIGTERM).await;
        none_left(&stage).await;
        stage.open_well().await;
        stage.close().await;
    });
}

#[test]
fn a_server_on_a_shell_has_every_wall_and_limit_of_its_own() {
    inside("shells::a_server_on_a_shell_has_every_wall_and_limit_of_its_own", async {
        let stage = Stage::new();
        stage.open_well_with(orders()).await;
        stage.import().await;
        let plain = stage.create("plain").await;
        let walls = async |id: &str| -> Vec<String> {
            let report = stage.api().read(&format!("/v1/servers/{id}/isolation")).await.unwrap().body;
            let items = report["items"].as_array().expect("items").iter();
            items.filter(|item| item["stands"] == false).map(|item| item["name"].to_string()).collect()
        };
        // A strict server asks more than a kernel without Landlock has.
        let lacks = walls(&plain).await;
        let isolation = if lacks.is_empty() { "strict" } else { "standard" };
        let other = on_a_shell(&stage, "other", |name| {
            let mut body = server_body(name);
            body["isolation"] = json!(isolation);
            body
        });
        let other = other.await;
        assert_eq!(walls(&other).await, lacks);
        // A server of another size has no use for those that wait, and the next of its size has one.
        let mut body = server_body("large");
        body["memory_bytes"] = json!(96 << 20);
        let before = ready(&stage, SHELLS).await;
        let answer = stage.call(Method::POST, "/v1/servers", "large", Some(body.clone())).await;
        stage.succeeded(&answer.operation()).await.unwrap();
        assert!(!before.contains(&stage.vmms()["large"]));
        let changed = async || {
            let now = shells(&stage);
            (now.len() == SHELLS && now.iter().any(|pid| !before.contains(pid))).then_some(now)
        };
        wait_for("one for servers of that size", changed).await.unwrap();
        on_a_shell(&stage, "next", |name| {
            body["name"] = json!(name);
            body.clone()
        })
        .await;
        // Whatever dies among them, servers start.
        let doomed = ready(&stage, SHELLS).await;
        for pid in &doomed {
            kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap();
        }
        let dead = async || shells(&stage).iter().all(|pid| !doomed.contains(pid)).then_some(());
        wait_for("their end", dead).await.unwrap();
        stage.create("after").await;
        ready(&stage, SHELLS).await;
        kill(Pid::from_raw(stage.launcher().expect("a launcher")), Signal::SIGKILL).unwrap();
        stage.create("again").await;
        ready(&stage, SHELLS).await;
        stage.clear().await;
        stage.end(Signal::SIGTERM).await;
        none_left(&stage).await;
        stage.open_well().await;
        stage.close().await;
    });
}
