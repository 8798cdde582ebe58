//! Snapshots over HTTP, with fake VMMs underneath.
use model::operation::Accepted;
use model::page::Page;
use model::server::Server;
use model::snapshot::{Snapshot, SnapshotState};
use model::{Code, ServerId, SnapshotId};
use serde_json::{Value, json};

use super::served::{Sent, Served};

fn waiting(body: Value) -> Sent {
    Sent::from(body).with("prefer", "wait=20")
}

#[tokio::test]
async fn a_snapshot_is_taken_read_changed_and_deleted() {
    let served = Served::start().await;
    let body = json!({ "name": "web1", "image": "tiny", "memory_bytes": 128 << 20 });
    let answer = served.call("POST", "/v1/servers", waiting(body)).await;
    let server = answer.json::<Accepted<Server>>(201).resource.unwrap();
    let action = format!("/v1/servers/{}/actions/snapshot", server.id);
    // A body is not needed.
    let answer = served.call("POST", &action, Sent::nothing().with("prefer", "wait=20")).await;
    let disk = answer.json::<Accepted<Snapshot>>(201).resource.unwrap();
    assert_eq!((disk.state, disk.memory), (SnapshotState::Ready, false));
    assert_eq!(answer.header("location"), format!("/v1/snapshots/{}", disk.id));
    let both = json!({ "name": "both", "memory": true, "expires_at": "2999-01-31T12:00:00Z", "labels": { "a": "b" } });
    let answer = served.call("POST", &action, waiting(both.clone())).await;
    let both_taken = answer.json::<Accepted<Snapshot>>(201).resource.unwrap();
    served.call("POST", &action, waiting(both)).await.problem(Code::AlreadyExists);
    let page: Page<Snapshot> =
        served.call("GET", "/v1/snapshots?label_selector=a%3Db", Sent::nothing()).await.json(200);
    assert_eq!(page.items, std::slice::from_ref(&both_taken));
    for (of, count) in [(server.id, 2), (ServerId::new(), 0)] {
        let path = format!("/v1/snapshots?server_id={of}");
        let page: Page<Snapshot> = served.call("GET", &path, Sent::nothing()).await.json(200);
        assert_eq!(page.items.len(), count);
    }

    let path = format!("/v1/snapshots/{}", both_taken.id);
    let answer = served.call("GET", &path, Sent::nothing()).await;
    let etag = answer.header("etag").to_owned();
    let same = served.call("GET", &path, Sent::nothing().with("if-none-match", &etag)).await;
    assert_eq!(same.status.as_u16(), 304);
    let patch = |text: &str| Sent::text("application/merge-patch+json", text).with("if-match", &etag);
    served.call("PATCH", &path, patch(r#"{"name": null}"#)).await.problem(Code::Invalid);
    let past = r#"{"expires_at": "2001-01-31T12:00:00Z"}"#;
    served.call("PATCH", &path, patch(past)).await.problem(Code::Invalid);
    let changed: Snapshot =
        served.call("PATCH", &path, patch(r#"{"expires_at": null, "name": "kept"}"#)).await.json(200);
    assert_eq!((changed.expires_at, changed.name.as_str()), (None, "kept"));
    served.call("PATCH", &path, patch(r#"{"name": "late"}"#)).await.problem(Code::StaleEtag);

    for id in [disk.id, both_taken.id] {
        let path = format!("/v1/snapshots/{id}");
        let deleted = served.call("DELETE", &path, Sent::nothing().with("prefer", "wait=20")).await;
        assert_eq!(deleted.json::<Accepted<Snapshot>>(200).resource, None);
        served.call("GET", &path, Sent::nothing()).await.problem(Code::NotFound);
    }
    let stopped = json!({ "grace_s": 0 });
    served
        .call("POST", &format!("/v1/servers/{}/actions/stop", server.id), waiting(stopped))
        .await
        .json::<Value>(200);
    let problem =
        served.call("POST", &action, waiting(json!({ "memory": true }))).await.problem(Code::WrongState);
    assert!(problem.detail.contains("no memory to save"), "{}", problem.detail);
    let nobody = format!("/v1/snapshots/{}", SnapshotId::new());
    served.call("DELETE", &nobody, Sent::nothing()).await.problem(Code::NotFound);
    served.stop().await;
}

/// What an exported snapshot is called on the wire.
const STREAM: &str = "application/octet-stream";

#[tokio::test]
async fn an_exported_snapshot_is_taken_in_again() {
    let served = Served::start().await;
    let body = json!({ "name": "web1", "image": "tiny", "memory_bytes": 128 << 20 });
    let answer = served.call("POST", "/v1/servers", waiting(body)).await;
    let server = answer.json::<Accepted<Server>>(201).resource.unwrap();
    let action = format!("/v1/servers/{}/actions/snapshot", server.id);
    let answer = served.call("POST", &action, waiting(json!({ "name": "kept", "memory": true }))).await;
    let kept = answer.json::<Accepted<Snapshot>>(201).resource.unwrap();
    let exported = served.call("GET", &format!("/v1/snapshots/{}/export", kept.id), Sent::nothing()).await;
    assert_eq!((exported.status.as_u16(), exported.header("content-type")), (200, STREAM));
    assert_eq!(exported.header("content-length"), exported.body.len().to_string());
    assert_eq!(exported.header("content-disposition"), "attachment; filename=\"kept.toftsnap\"");

    let send = |stream: &[u8]| Sent::text(STREAM, stream.to_vec()).with("prefer", "wait=20");
    let answer = served.call("POST", "/v1/snapshots?name=twin", send(&exported.body)).await;
    let twin = answer.json::<Accepted<Snapshot>>(201).resource.unwrap();
    assert_eq!(answer.header("location"), format!("/v1/snapshots/{}", twin.id));
    assert_eq!((twin.state, twin.memory, twin.taken_at), (SnapshotState::Ready, true, kept.taken_at));
    // The name that it was exported under is taken.
    served.call("POST", "/v1/snapshots", send(&exported.body)).await.problem(Code::AlreadyExists);
    let cut = &exported.body[..exported.body.len() - 1];
    let problem =
        served.call("POST", "/v1/snapshots?name=cut", send(cut)).await.problem(Code::SnapshotCorrupt);
    assert!(problem.operation_id.is_some(), "{problem:?}");
    served.call("POST", "/v1/snapshots?name=none", send(b"")).await.problem(Code::SnapshotCorrupt);
    let tar = Sent::text("application/x-tar", exported.body.to_vec());
    served.call("POST", "/v1/snapshots?name=tar", tar).await.problem(Code::UnsupportedMediaType);
    served.call("POST", "/v1/snapshots?name=No", send(&exported.body)).await.problem(Code::InvalidRequest);
    let page: Page<Snapshot> = served.call("GET", "/v1/snapshots", Sent::nothing()).await.json(200);
    assert_eq!(page.items.len(), 2);
    let nobody = format!("/v1/snapshots/{}/export", SnapshotId::new());
    served.call("GET", &nobody, Sent::nothing()).await.problem(Code::NotFound);
    served.stop().await;
}
