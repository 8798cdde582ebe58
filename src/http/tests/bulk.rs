//! One action on many servers over HTTP.
use model::Code;
use model::operation::{Accepted, OperationState};
use model::page::Page;
use model::server::{BulkActions, Server, ServerState};
use serde_json::{Value, json};

use super::served::{Answer, Sent, Served};
use crate::fake_vmm::Guest;

async fn made(served: &Served, name: &str, env: &str) -> Server {
    let body = json!({ "name": name, "image": "tiny", "memory_bytes": 128 << 20, "labels": { "env": env } });
    let answer = served.call("POST", "/v1/servers", Sent::from(body).with("prefer", "wait=20")).await;
    answer.json::<Accepted<Server>>(201).resource.unwrap()
}

async fn act(served: &Served, verb: &str, sent: Sent) -> Answer {
    served.call("POST", &format!("/v1/servers/actions/{verb}?label_selector=env%3Dtest"), sent).await
}

async fn states(served: &Served) -> Vec<ServerState> {
    let page: Page<Server> = served.call("GET", "/v1/servers", Sent::nothing()).await.json(200);
    page.items.into_iter().map(|server| server.state).collect()
}

fn waiting() -> Sent {
    Sent::nothing().with("prefer", "wait=20")
}

#[tokio::test]
async fn every_action_is_done_to_all_servers_with_the_labels() {
    use ServerState::{Hibernated, Paused, Running, Stopped};
    let served = Served::start().await;
    for (name, env) in [("one", "test"), ("two", "test"), ("other", "live")] {
        made(&served, name, env).await;
    }
    let grace = || Sent::from(json!({ "grace_s": 10 })).with("prefer", "wait=20");
    for (verb, sent, state) in [
        ("pause", waiting(), Paused),
        ("resume", waiting(), Running),
        ("hibernate", waiting(), Hibernated),
        ("start", waiting(), Running),
        ("reboot", grace(), Running),
        ("stop", grace(), Stopped),
    ] {
        let answer = act(&served, verb, sent).await;
        assert_eq!(answer.header("preference-applied"), "wait=20", "{verb}");
        let items = answer.json::<BulkActions>(200).items;
        assert_eq!(items.iter().map(|item| item.name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
        for item in &items {
            assert_eq!(item.operation.as_ref().unwrap().state, OperationState::Succeeded, "{verb}");
        }
        assert_eq!(states(&served).await, [state, state, Running], "{verb}");
    }
    assert_eq!(served.stage.launch.violations(), Vec::<String>::new());
    served.stop().await;
}

#[tokio::test]
async fn what_cannot_be_done_is_told_for_each_server() {
    let served = Served::start().await;
    let server = made(&served, "one", "test").await;
    made(&served, "two", "test").await;
    let stop = format!("/v1/servers/{}/actions/stop", server.id);
    served.call("POST", &stop, waiting()).await.json::<Value>(200);
    let answer = act(&served, "pause", Sent::nothing()).await;
    let items = answer.json::<BulkActions>(202).items;
    let problem = items[0].problem.as_ref().unwrap();
    assert_eq!(problem.code, Code::WrongState);
    assert!(problem.allowed_actions.as_ref().unwrap().contains(&"start".to_owned()));
    assert_eq!(problem.request_id, answer.header("x-request-id"));
    assert!(items[1].operation.is_some() && items[1].problem.is_none());
    // Work that fails has its end in the answer, and the answer is no failure of its own.
    served.stage.launch.set_guest(Guest::CannotBoot);
    let patch = Sent::text("application/merge-patch+json", r#"{"restart_policy": "never"}"#);
    served.call("PATCH", &format!("/v1/servers/{}", server.id), patch).await.json::<Value>(200);
    let items = act(&served, "start", waiting()).await.json::<BulkActions>(200).items;
    let failed = items[0].operation.as_ref().unwrap();
    assert_eq!(
        (failed.state, failed.error.as_ref().unwrap().code),
        (OperationState::Failed, Code::MachineFailed)
    );
    served.stop().await;
}

#[tokio::test]
async fn a_wait_that_is_too_short_is_answered_with_what_was_begun() {
    let served = Served::start().await;
    made(&served, "one", "test").await;
    served.stage.launch.set_guest(Guest::IgnoresButton);
    made(&served, "two", "test").await;
    let sent = Sent::from(json!({ "grace_s": 3600 })).with("prefer", "wait=0");
    let answer = act(&served, "stop", sent).await;
    assert_eq!(answer.header("preference-applied"), "");
    let items = answer.json::<BulkActions>(202).items;
    assert!(!items[1].operation.as_ref().unwrap().state.is_final());
    served.stop().await;
}

#[tokio::test]
async fn a_repeated_request_is_answered_as_the_first() {
    let served = Served::start().await;
    made(&served, "one", "test").await;
    let keyed = || Sent::nothing().with("idempotency-key", "k");
    let first = act(&served, "pause", keyed()).await;
    made(&served, "two", "test").await;
    let again = act(&served, "pause", keyed()).await;
    assert_eq!((first.header("idempotency-replayed"), again.header("idempotency-replayed")), ("", "true"));
    assert_eq!(first.json::<Value>(202), again.json::<Value>(202));
    act(&served, "resume", keyed()).await.problem(Code::IdempotencyMismatch);
    served.stop().await;
}

#[tokio::test]
async fn nobody_is_asked_without_a_selector() {
    let served = Served::start().await;
    made(&served, "one", "test").await;
    for query in ["", "?label_selector=", "?label_selector=%20", "?label_selector=,", "?label_selector=a%20b"]
    {
        let path = format!("/v1/servers/actions/stop{query}");
        let problem = served.call("POST", &path, Sent::nothing()).await.problem(Code::InvalidRequest);
        assert_eq!(problem.errors[0].pointer, "label_selector", "{query}");
    }
    let unknown = "/v1/servers/actions/delete?label_selector=env";
    served.call("POST", unknown, Sent::nothing()).await.problem(Code::NotFound);
    assert_eq!(states(&served).await, [ServerState::Running]);
    served.stop().await;
}
