//! Snapshots of servers that run, are parked, or are off, with the real daemon and VMM: the guest goes on, what is kept
//! is whole, and nothing is left of what expires or is deleted.
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{Stage, wait_for};
use crate::world::inside;

/// Waits for so many beats of a guest.
async fn beats_on(stage: &Stage, id: &str, more: u64) {
    let first = async || Some(stage.beats(id).await).filter(|(beats, _)| *beats > 0);
    let (beats, boots) = wait_for("a beat", first).await.unwrap();
    let further = wait_for("more beats", async || {
        let (now, boots_now) = stage.beats(id).await;
        assert_eq!(boots_now, boots, "it has booted again");
        (now >= beats + more).then_some(())
    });
    further.await.unwrap();
}

async fn act(stage: &Stage, id: &str, action: &str, key: &str, body: Option<Value>) -> Value {
    let path = format!("/v1/servers/{id}/actions/{action}");
    let answer = stage.call(Method::POST, &path, key, body).await;
    stage.succeeded(&answer.operation()).await.unwrap();
    answer.body
}

/// Takes a snapshot; answers it as it is then.
async fn taken(stage: &Stage, id: &str, name: &str, memory: bool) -> Value {
    let body = json!({ "name": name, "memory": memory });
    let accepted = act(stage, id, "snapshot", &format!("take-{name}"), Some(body)).await;
    stage.api().get(&format!("/v1/snapshots/{}", text(&accepted["resource"]["id"]))).await
}

async fn snapshots_in_every_state() {
    let stage = Stage::new();
    stage.open_well().await;
    stage.import().await;
    let id = stage.create("web1").await;
    beats_on(&stage, &id, 3).await;
    let vmm = stage.vmms()["web1"];
    for (name, memory) in [("disk", false), ("both", true), ("again", true)] {
        let snapshot = taken(&stage, &id, name, memory).await;
        assert_eq!(
            (&snapshot["state"], &snapshot["memory"]),
            (&json!("ready"), &json!(memory)),
            "{snapshot}"
        );
        let paused_ms = snapshot["paused_ms"].as_u64().expect("how long it stood still");
        println!("{name}: stood still for {paused_ms} ms, {} bytes", snapshot["stored_bytes"]);
        // Where writes can be told, those of a guest that runs are.
        let is_measured = snapshot["volumes"][0]["filled_by"] == "sparse_copy"
            || memory && std::path::Path::new("/dev/userfaultfd").exists();
        for figure in ["guest_writes_delayed", "guest_write_delay_us_max", "guest_write_delay_us_sum"] {
            assert_eq!(snapshot[figure].is_u64(), is_measured, "{snapshot}");
        }
        let directory = stage.scratch("state/snapshots").join(text(&snapshot["id"]));
        let disk = std::fs::read(directory.join("disk0.raw")).expect("its disk");
        assert!(disk.starts_with(b"disk"));
        assert_eq!(directory.join("machine.memory").exists(), memory);
        if memory {
            let length = std::fs::metadata(directory.join("machine.memory")).expect("its memory").len();
            assert_eq!(Some(length), snapshot["memory_bytes"].as_u64());
        }
        beats_on(&stage, &id, 3).await;
        assert_eq!(stage.vmms()["web1"], vmm);
    }
    act(&stage, &id, "pause", "pause", None).await;
    let parked = taken(&stage, &id, "parked", true).await;
    assert_eq!((&parked["state"], &parked["paused_ms"]), (&json!("ready"), &json!(0)), "{parked}");
    act(&stage, &id, "resume", "resume", None).await;
    beats_on(&stage, &id, 3).await;
    act(&stage, &id, "stop", "stop", Some(json!({ "grace_s": 0 }))).await;
    let off = taken(&stage, &id, "off", false).await;
    assert_eq!(off["state"], "ready", "{off}");
    assert!(stage.vmms().is_empty());

    // Another server begins with the disk as it was, whatever the first one does with its own.
    let spec = json!({ "name": "web2", "snapshot": "off", "memory_bytes": 64 << 20, "nics": [] });
    let accepted = stage.call(Method::POST, "/v1/servers", "make-web2", Some(spec)).await;
    stage.succeeded(&accepted.operation()).await.unwrap();
    let second = stage.api().get(&format!("/v1/servers/{}", text(&accepted.body["resource"]["id"]))).await;
    beats_on(&stage, text(&second["id"]).as_str(), 3).await;
    let volume = stage.scratch("state/volumes").join(text(&second["volumes"][0]["volume_id"]) + ".raw");
    assert!(std::fs::read(volume).expect("its disk").starts_with(b"disk"));
    let gone =
        stage.call(Method::DELETE, &format!("/v1/servers/{}", text(&second["id"])), "drop-web2", None).await;
    stage.succeeded(&gone.operation()).await.unwrap();

    // The machine with the memory of an earlier start is not in the way of the next one.
    act(&stage, &id, "start", "start", None).await;
    let soon = time_in(Duration::from_millis(300));
    let expiring = text(&off["id"]);
    let path = format!("/v1/snapshots/{expiring}");
    stage.call(Method::PATCH, &path, "expire", Some(json!({ "expires_at": soon }))).await;
    let gone = async || (stage.api().read(&path).await.ok()?.status == 404).then_some(());
    wait_for("the expiry", gone).await.unwrap();
    assert!(!stage.scratch("state/snapshots").join(expiring).exists());
    stage.close().await;
}

/// The time so much later, as RFC 3339 writes it.
fn time_in(later: Duration) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let at = now + later;
    let output = std::process::Command::new("date")
        .args(["-u", "+%Y-%m-%dT%H:%M:%S", "-d", &format!("@{}", at.as_secs())])
        .output()
        .expect("date can be started");
    let text = String::from_utf8(output.stdout).expect("a date");
    format!("{}.{:03}Z", text.trim(), at.subsec_millis())
}

#[test]
fn a_server_goes_on_while_snapshots_of_it_are_taken() {
    inside("snapshots::a_server_goes_on_while_snapshots_of_it_are_taken", snapshots_in_every_state());
}
