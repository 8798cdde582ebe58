//! Conventions that hold for every resource, seen on networks: versions, keys, waiting, pages, projections.
use model::network::{Network, NetworkPlan, NetworkState};
use model::operation::{Accepted, Operation, OperationState};
use model::page::Page;
use model::{Code, NetworkId};
use serde_json::{Value, json};

use super::served::{Answer, Sent, Served};

fn network(name: &str) -> Sent {
    json!({ "name": name, "kind": "isolated" }).into()
}

/// Makes a network and waits until it is ready.
async fn made(served: &Served, name: &str) -> (Answer, Network) {
    let answer = served.call("POST", "/v1/networks", network(name).with("prefer", "wait=10")).await;
    let body: Accepted<Network> = answer.json(201);
    assert_eq!(body.operation.state, OperationState::Succeeded);
    (answer, body.resource.unwrap())
}

#[tokio::test]
async fn a_creation_is_accepted_and_its_operation_followed_to_the_end() {
    let served = Served::start().await;
    let answer = served.call("POST", "/v1/networks", network("a")).await;
    let accepted: Accepted<Network> = answer.json(202);
    let location = answer.header("location").to_owned();
    assert_eq!(location, format!("/v1/operations/{}", accepted.operation.id));
    let ended: Operation =
        served.call("GET", &format!("{location}?wait=10s"), Sent::nothing()).await.json(200);
    assert_eq!(ended.state, OperationState::Succeeded);
    let id = accepted.resource.unwrap().id;
    let answer = served.call("GET", &format!("/v1/networks/{id}"), Sent::nothing()).await;
    let network: Network = answer.json(200);
    assert_eq!(network.state, NetworkState::Ready);
    assert_eq!(answer.header("etag"), format!("\"{}\"", network.generation));
    served.stop().await;
}

#[tokio::test]
async fn a_caller_who_prefers_to_wait_gets_the_end_state_at_once() {
    let served = Served::start().await;
    let (answer, network) = made(&served, "a").await;
    assert_eq!(answer.header("location"), format!("/v1/networks/{}", network.id));
    assert_eq!(answer.header("preference-applied"), "wait=10");
    assert_eq!(answer.header("etag"), format!("\"{}\"", network.generation));
    let path = format!("/v1/networks/{}", network.id);
    let deleted = served.call("DELETE", &path, Sent::nothing().with("prefer", "wait=10")).await;
    let deleted: Accepted<Network> = deleted.json(200);
    assert_eq!((deleted.operation.state, deleted.resource), (OperationState::Succeeded, None));
    served.call("GET", &path, Sent::nothing()).await.problem(Code::NotFound);
    served.stop().await;
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_made_or_why_not_and_makes_nothing() {
    let served = Served::start().await;
    let plan = async |body: Value| served.call("POST", "/v1/networks?dry_run=true", body).await;
    let known: Page<Network> = served.call("GET", "/v1/networks", Sent::nothing()).await.json(200);
    let answer: NetworkPlan = plan(json!({ "name": "a", "ipv4_cidr": "10.99.0.0/24" })).await.json(200);
    assert_eq!((answer.network.name.as_str(), answer.network.ipv4_cidr.as_str()), ("a", "10.99.0.0/24"));
    assert!(answer.steps.len() >= 3, "{answer:?}");
    plan(json!({ "name": "default" })).await.problem(Code::AlreadyExists);
    let overlaps = plan(json!({ "name": "a", "ipv4_cidr": known.items[0].ipv4_cidr })).await;
    assert_eq!(overlaps.problem(Code::Invalid).errors[0].pointer, "/ipv4_cidr");
    let device = plan(json!({ "name": "a", "host_device": "eth*" })).await;
    assert_eq!(device.problem(Code::Invalid).errors[0].pointer, "/host_device");
    let after: Page<Network> = served.call("GET", "/v1/networks", Sent::nothing()).await.json(200);
    assert_eq!((after.items.len(), after.watch_cursor), (known.items.len(), known.watch_cursor));
    served.stop().await;
}

#[tokio::test]
async fn the_same_key_answers_the_same_and_does_nothing_twice() {
    let served = Served::start().await;
    let keyed = |name: &str| network(name).with("idempotency-key", "order-1");
    let first = served.call("POST", "/v1/networks", keyed("a")).await;
    let again = served.call("POST", "/v1/networks", keyed("a")).await;
    assert_eq!(first.header("idempotency-replayed"), "");
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(first.json::<Value>(202), again.json::<Value>(202));
    assert_eq!(first.header("location"), again.header("location"));
    served.call("POST", "/v1/networks", keyed("b")).await.problem(Code::IdempotencyMismatch);
    let elsewhere = served.call("DELETE", &format!("/v1/networks/{}", NetworkId::new()), keyed("a")).await;
    elsewhere.problem(Code::IdempotencyMismatch);
    let page: Page<Network> = served.call("GET", "/v1/networks?name=a", Sent::nothing()).await.json(200);
    assert_eq!(page.items.len(), 1);
    served.call("POST", "/v1/networks", network("a")).await.problem(Code::AlreadyExists);
    served.stop().await;
}

#[tokio::test]
async fn a_change_of_another_version_is_refused() {
    let served = Served::start().await;
    let (_, network) = made(&served, "a").await;
    let path = format!("/v1/networks/{}", network.id);
    let patch = |etag: &str| {
        Sent::text("application/merge-patch+json", r#"{"labels": {"a": "b"}}"#).with("if-match", etag)
    };
    let stale = format!("\"{}\"", network.generation + 7);
    served.call("PATCH", &path, patch(&stale)).await.problem(Code::StaleEtag);
    let delete = Sent::nothing().with("if-match", &stale);
    served.call("DELETE", &path, delete).await.problem(Code::StaleEtag);
    let current = format!("\"{}\"", network.generation);
    let answer = served.call("PATCH", &path, patch(&format!("{stale}, {current}"))).await;
    let changed: Network = answer.json(200);
    assert_eq!(changed.labels.value("a"), Some("b"));
    assert!(changed.generation > network.generation);
    assert_eq!(answer.header("etag"), format!("\"{}\"", changed.generation));
    let removal = Sent::text("application/merge-patch+json", r#"{"labels": {"a": null}}"#);
    let removed: Network = served.call("PATCH", &path, removal).await.json(200);
    assert!(removed.labels.is_empty());
    served.stop().await;
}

#[tokio::test]
async fn a_version_that_the_caller_has_is_not_sent_again() {
    let served = Served::start().await;
    let created = served.call("POST", "/v1/networks", network("a")).await;
    let path = format!("{}?wait=10s", created.header("location"));
    let etag = served.call("GET", &path, Sent::nothing()).await.header("etag").to_owned();
    for had in [etag.clone(), format!("W/{etag}"), format!("\"0\", {etag}"), "*".into()] {
        let answer = served.call("GET", &path, Sent::nothing().with("if-none-match", &had)).await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (304, 0), "{had}");
        assert_eq!(answer.header("etag"), etag);
    }
    let other = Sent::nothing().with("if-none-match", "\"0\"");
    served.call("GET", &path, other).await.json::<Operation>(200);
    served.stop().await;
}

#[tokio::test]
async fn pages_follow_each_other_and_hold_the_fields_asked_for() {
    let served = Served::start().await;
    for name in ["c", "a", "b"] {
        made(&served, name).await;
    }
    let mut names = Vec::new();
    let mut path = "/v1/networks?limit=2&sort=-name&fields=name,kind".to_owned();
    loop {
        let page: Value = served.call("GET", &path, Sent::nothing()).await.json(200);
        assert!(page["watch_cursor"].is_u64());
        for item in page["items"].as_array().unwrap() {
            let members: Vec<&String> = item.as_object().unwrap().keys().collect();
            assert_eq!(members, ["kind", "name"]);
            names.push(item["name"].as_str().unwrap().to_owned());
        }
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/v1/networks?limit=2&sort=-name&fields=name,kind&cursor={cursor}");
    }
    // The default network is made on the first start.
    assert_eq!(names, ["default", "c", "b", "a"]);
    let page: Page<Network> = served.call("GET", "/v1/networks?name=b", Sent::nothing()).await.json(200);
    let path = format!("/v1/networks/{}?fields=id", page.items[0].id);
    let one: Value = served.call("GET", &path, Sent::nothing()).await.json(200);
    assert_eq!(one, json!({ "id": page.items[0].id }));
    let problem = served.call("GET", "/v1/networks?cursor=zzzz", Sent::nothing()).await;
    problem.problem(Code::InvalidRequest);
    served.stop().await;
}

#[tokio::test]
async fn head_answers_as_get_without_a_body() {
    let served = Served::start().await;
    let answer = served.call("HEAD", "/v1/networks", Sent::nothing()).await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (200, 0));
    assert_eq!(answer.header("content-type"), "application/json");
    served.stop().await;
}
