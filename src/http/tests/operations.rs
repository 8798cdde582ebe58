//! Operations over HTTP: found, waited for, cancelled. An upload that does not go on is work that lasts.
use model::image::Image;
use model::network::Network;
use model::operation::{Accepted, Operation, OperationState};
use model::page::Page;
use model::{Code, NetworkId, OperationId, Problem};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::served::{Sent, Served, within};
use super::uploads::{begin_bare, begin_with};

/// Waits until the upload of this image is an operation.
async fn begun(served: &Served, name: &str) -> Operation {
    let path = format!("/v1/images?name={name}");
    let found = async {
        loop {
            let page: Page<Image> = served.call("GET", &path, Sent::nothing()).await.json(200);
            if let Some(image) = page.items.first() {
                return format!("/v1/operations/{}", image.operation_id.unwrap());
            }
            tokio::task::yield_now().await;
        }
    };
    let path = within(found).await;
    served.call("GET", &path, Sent::nothing()).await.json(200)
}

/// The problem that an upload is answered with.
async fn refused(mut stream: UnixStream) -> Problem {
    let mut answer = Vec::new();
    let _ = within(stream.read_to_end(&mut answer)).await;
    let text = String::from_utf8_lossy(&answer);
    assert!(text.starts_with("HTTP/1.1 409"), "{text}");
    serde_json::from_str(text.split("\r\n\r\n").nth(1).unwrap()).unwrap()
}

#[tokio::test]
async fn work_that_goes_on_is_cancelled_and_leaves_nothing() {
    let served = Served::start().await;
    let head = "idempotency-key: upload\r\nconnection: close\r\n";
    let stream = begin_with(&served, "sent", head).await;
    let operation = begun(&served, "sent").await;
    assert!(operation.cancellable && !operation.state.is_final(), "{operation:?}");
    let path = format!("/v1/operations/{}", operation.id);

    let stale = Sent::nothing().with("if-match", "\"999\"");
    served.call("DELETE", &path, stale).await.problem(Code::StaleEtag);
    let keyed = || Sent::nothing().with("idempotency-key", "k");
    let asked = served.call("DELETE", &path, keyed()).await;
    assert_eq!(asked.json::<Operation>(200).id, operation.id);
    assert!(!asked.header("etag").is_empty());
    let ended: Operation = served.call("GET", &format!("{path}?wait=20s"), Sent::nothing()).await.json(200);
    assert_eq!(ended.state, OperationState::Cancelled);
    assert!(ended.finished_at.is_some() && !ended.cancellable && ended.error.is_none());
    let again = served.call("DELETE", &path, keyed()).await;
    assert_eq!((again.header("idempotency-replayed"), &again.body), ("true", &asked.body));

    let problem = refused(stream).await;
    assert_eq!((problem.code, problem.allowed_actions), (Code::WrongState, Some(Vec::new())));
    let page: Page<Image> = served.call("GET", "/v1/images?name=sent", Sent::nothing()).await.json(200);
    assert_eq!(page.items, []);

    // One that has ended cannot be cancelled, and who waits for it hears what became of it.
    let problem = served.call("DELETE", &path, Sent::nothing()).await.problem(Code::WrongState);
    assert_eq!((problem.operation_id, problem.allowed_actions), (Some(operation.id), Some(Vec::new())));
    // So does who sends it once more, waiting or not.
    for mut repeated in [begin_with(&served, "sent", head).await, begin_bare(&served, "sent", head).await] {
        // Nothing of it is read.
        let _ = repeated.write_all(b"0\r\n\r\n").await;
        let problem = refused(repeated).await;
        assert_eq!((problem.code, problem.operation_id), (Code::WrongState, Some(operation.id)));
        assert_eq!(problem.allowed_actions, Some(Vec::new()));
    }
    served.stop().await;
}

#[tokio::test]
async fn operations_are_found_by_what_they_work_on() {
    let served = Served::start().await;
    let network =
        |name: &str| Sent::from(json!({ "name": name, "kind": "isolated" })).with("prefer", "wait=20");
    let made = async |name: &str| -> Accepted<Network> {
        served.call("POST", "/v1/networks", network(name)).await.json(201)
    };
    let (one, other) = (made("one").await, made("other").await);
    let id = one.resource.unwrap().id;
    let path = format!("/v1/networks/{id}");
    let sent = Sent::nothing().with("prefer", "wait=20");
    let deleted: Accepted<Network> = served.call("DELETE", &path, sent).await.json(200);
    let found = async |query: &str| -> Vec<OperationId> {
        let path = format!("/v1/operations?{query}");
        let page: Page<Operation> = served.call("GET", &path, Sent::nothing()).await.json(200);
        page.items.iter().map(|operation| operation.id).collect()
    };
    assert_eq!(found(&format!("resource_id={id}")).await, [one.operation.id, deleted.operation.id]);
    assert_eq!(found(&format!("resource_id={id}&sort=-created_at&limit=1")).await, [deleted.operation.id]);
    assert_eq!(found(&format!("resource_id={}", other.resource.unwrap().id)).await, [other.operation.id]);
    assert_eq!(found(&format!("resource_id={}", NetworkId::new())).await, []);
    served.stop().await;
}
