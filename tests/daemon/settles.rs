//! A clone becomes a server like any other, with real daemons and VMMs: its guest writes over 256 MiB again and again, and checks
//! before each write that its last one is there.
use hyper::Method;
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{Stage, wait_for};
use crate::moves::Hosts;
use crate::world::inside;

const IMAGE: &str = "writer";
const MEMORY_BYTES: u64 = 384 << 20;

/// Passes that a guest has told of since its console was begun, and how often it has booted there.
fn passes(stage: &Stage, server: &str) -> (usize, usize) {
    let path = stage.scratch("state/servers").join(server).join("console.ring");
    let ring = std::fs::File::open(path).and_then(wire::console::Ring::open);
    let Ok(piece) = ring.and_then(|mut ring| ring.read(0, 8 << 20)) else { return (0, 0) };
    let log = String::from_utf8_lossy(&piece.data).into_owned();
    assert!(!log.contains("FAILED") && !log.contains("broken"), "{log}");
    (log.matches("probe: dirty pass").count(), log.matches("probe: hello").count())
}

/// Waits until a guest has written all of its memory since its console was begun.
async fn begins(stage: &Stage, server: &str) {
    let begun = async || (passes(stage, server).0 >= 2).then_some(());
    wait_for("a guest that writes", begun).await.unwrap();
}

async fn goes_on(stage: &Stage, server: &str, what: &str) {
    let (before, boots) = passes(stage, server);
    // The first of them may have begun before.
    let further = async || (passes(stage, server).0 >= before + 2).then_some(());
    wait_for(&format!("the guest to go on {what}"), further).await.unwrap();
    assert_eq!(passes(stage, server).1, boots, "it has started afresh {what}");
}

async fn act(stage: &Stage, path: &str, key: &str, body: Value) -> Value {
    let answer = stage.call(Method::POST, path, key, Some(body)).await;
    assert_eq!(answer.status, 202, "{path}: {}", answer.body);
    let operation = answer.operation();
    stage.succeeded(&operation).await.unwrap_or_else(|why| panic!("{path}: {why}\n{}", stage.log()));
    answer.body
}

async fn cloned(stage: &Stage, of: &str, name: &str) -> String {
    let body = act(stage, &format!("/v1/{of}/actions/clone"), name, json!({ "name": name })).await;
    let id = text(&body["items"][0]["server_id"]);
    stage.knows(&id);
    begins(stage, &id).await;
    id
}

/// What its machine shares, by the server and by its counters.
async fn shares(stage: &Stage, server: &str) -> (Value, u64) {
    let path = format!("/v1/servers/{server}");
    let metrics = stage.api().get(&format!("{path}/metrics")).await;
    println!("{}", metrics["settling"]);
    let bytes = metrics["memory_shared_bytes"].as_u64().expect("a figure");
    (stage.api().get(&path).await["shares_memory_of"].clone(), bytes)
}

async fn in_turn() {
    let hosts = Hosts::new().await;
    for (stage, _) in hosts.sides() {
        stage.import_another(IMAGE, "dirty=256,200,3000000").await;
    }
    let stage = &hosts.source;
    let spec = json!({ "name": "web1", "image": IMAGE, "memory_bytes": MEMORY_BYTES });
    let first = text(&act(stage, "/v1/servers", "make", spec).await["resource"]["id"]);
    stage.knows(&first);
    begins(stage, &first).await;
    let spec = json!({ "name": "then", "memory": true });
    let taken = act(stage, &format!("/v1/servers/{first}/actions/snapshot"), "take", spec).await;
    let snapshot = text(&taken["resource"]["id"]);
    act(stage, &format!("/v1/servers/{first}/actions/stop"), "stop", json!({ "grace_s": 0 })).await;

    let clone = cloned(stage, &format!("snapshots/{snapshot}"), "twin").await;
    let path = format!("/v1/servers/{clone}");
    assert_eq!(shares(stage, &clone).await, (json!(snapshot), MEMORY_BYTES));
    act(stage, &format!("{path}/actions/settle-memory"), "settle", json!({})).await;
    assert_eq!(shares(stage, &clone).await, (Value::Null, 0));
    goes_on(stage, &clone, "when it was settled").await;
    act(stage, &format!("{path}/actions/upgrade-vmm"), "upgrade", json!({})).await;
    goes_on(stage, &clone, "in its new VMM").await;
    let fork = cloned(stage, &format!("servers/{clone}"), "fork").await;
    goes_on(stage, &clone, "when it was forked").await;

    // The fork is forked in its turn, for which it is settled, and so it is for its new VMM.
    assert_eq!(shares(stage, &fork).await.1, MEMORY_BYTES);
    let last = cloned(stage, &format!("servers/{fork}"), "fork-of-fork").await;
    assert_eq!(shares(stage, &fork).await, (Value::Null, 0));
    goes_on(stage, &fork, "when it was forked").await;
    act(stage, &format!("/v1/servers/{last}/actions/upgrade-vmm"), "upgrade-last", json!({})).await;
    assert_eq!(shares(stage, &last).await, (Value::Null, 0));
    goes_on(stage, &last, "in its new VMM").await;
    for (id, key) in [(&fork, "end-fork"), (&last, "end-last")] {
        let ended = stage.call(Method::DELETE, &format!("/v1/servers/{id}"), key, None).await;
        stage.succeeded(&ended.operation()).await.unwrap();
    }

    let [_, (target, address)] = hosts.sides();
    target.knows(&clone);
    let mut body = hosts.body_to(target, address).await;
    body["downtime_ms"] = json!(100);
    act(stage, &format!("{path}/actions/migrate"), "move", body).await;
    goes_on(target, &clone, "on the other host").await;
    hosts.close().await;
}

#[test]
fn a_clone_is_settled_upgraded_forked_and_migrated_in_turn() {
    inside("settles::a_clone_is_settled_upgraded_forked_and_migrated_in_turn", in_turn());
}
