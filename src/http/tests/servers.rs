//! A server's whole life over HTTP, with fake VMMs underneath.
use model::image::Image;
use model::operation::Accepted;
use model::page::Page;
use model::server::{
    CpuTemplate, Isolation, Server, ServerIsolation, ServerMetrics, ServerPlan, ServerState,
};
use model::volume::Volume;
use model::{Code, ServerId};
use serde_json::{Value, json};

use super::served::{Answer, Sent, Served};
use crate::fake_vmm::Guest;

fn waiting(body: Value) -> Sent {
    Sent::from(body).with("prefer", "wait=20")
}

/// Makes a server and waits until it runs.
async fn made(served: &Served, name: &str) -> Server {
    let body = json!({ "name": name, "image": "tiny", "memory_bytes": 128 << 20 });
    let answer = served.call("POST", "/v1/servers", waiting(body)).await;
    answer.json::<Accepted<Server>>(201).resource.unwrap()
}

async fn act(served: &Served, id: ServerId, verb: &str, body: Option<Value>) -> Answer {
    let sent = body.map_or_else(Sent::nothing, Sent::from).with("prefer", "wait=20");
    served.call("POST", &format!("/v1/servers/{id}/actions/{verb}"), sent).await
}

fn state(answer: &Answer) -> ServerState {
    answer.json::<Accepted<Server>>(200).resource.unwrap().state
}

#[tokio::test]
async fn a_server_lives_its_whole_life() {
    let served = Served::start().await;
    let server = made(&served, "web1").await;
    assert_eq!(server.state, ServerState::Running);
    let path = format!("/v1/servers/{}", server.id);
    assert_eq!(state(&act(&served, server.id, "pause", None).await), ServerState::Paused);
    assert_eq!(state(&act(&served, server.id, "resume", Some(json!({}))).await), ServerState::Running);
    assert_eq!(
        state(&act(&served, server.id, "reboot", Some(json!({ "grace_s": 0 }))).await),
        ServerState::Running
    );
    assert_eq!(
        state(&act(&served, server.id, "stop", Some(json!({ "grace_s": 10 }))).await),
        ServerState::Stopped
    );

    let patch = r#"{"vcpus": 2, "cpu": "x86_64_v2", "description": "d", "labels": {"tier": "small"}}"#;
    let answer = served.call("PATCH", &path, Sent::text("application/merge-patch+json", patch)).await;
    let changed: Server = answer.json(200);
    assert_eq!((changed.vcpus, changed.cpu, changed.description.as_str()), (2, CpuTemplate::X86_64V2, "d"));
    let removal = Sent::text("application/merge-patch+json", r#"{"description": null, "cpu": null}"#);
    let removed: Server = served.call("PATCH", &path, removal).await.json(200);
    assert_eq!((removed.vcpus, removed.cpu, removed.description.as_str()), (2, CpuTemplate::Host, ""));

    assert_eq!(state(&act(&served, server.id, "start", None).await), ServerState::Running);
    let deleted = served.call("DELETE", &path, Sent::nothing().with("prefer", "wait=20")).await;
    assert_eq!(deleted.json::<Accepted<Server>>(200).resource, None);
    served.call("GET", &path, Sent::nothing()).await.problem(Code::NotFound);
    assert_eq!(served.stage.launch.violations(), Vec::<String>::new());
    served.stop().await;
}

#[tokio::test]
async fn a_wrong_state_says_what_can_be_done() {
    let served = Served::start().await;
    let server = made(&served, "web1").await;
    act(&served, server.id, "stop", Some(json!({ "grace_s": 0 }))).await;
    let problem = act(&served, server.id, "pause", None).await.problem(Code::WrongState);
    assert!(problem.allowed_actions.unwrap().contains(&"start".to_owned()));
    let unknown = format!("/v1/servers/{}/actions/start", ServerId::new());
    served.call("POST", &unknown, Sent::nothing()).await.problem(Code::NotFound);
    let body = json!({ "grace_s": 1, "force": true });
    let problem = act(&served, server.id, "stop", Some(body)).await.problem(Code::Invalid);
    assert_eq!(problem.errors[0].pointer, "/force");
    served.stop().await;
}

#[tokio::test]
async fn waiting_for_work_that_fails_is_answered_with_its_problem() {
    let served = Served::start().await;
    served.stage.launch.set_guest(Guest::CannotBoot);
    let body =
        json!({ "name": "web1", "image": "tiny", "memory_bytes": 128 << 20, "restart_policy": "never" });
    let answer = served.call("POST", "/v1/servers", waiting(body)).await;
    let problem = answer.problem(Code::MachineFailed);
    let operation = format!("/v1/operations/{}", problem.operation_id.unwrap());
    let operation: Value = served.call("GET", &operation, Sent::nothing()).await.json(200);
    assert_eq!(operation["state"], "failed");
    assert_eq!(operation["error"]["code"], "machine_failed");
    served.stop().await;
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_made_and_makes_nothing() {
    let served = Served::start().await;
    let body = json!({ "name": "web1", "image": "tiny", "memory_bytes": 128 << 20 });
    let answer = served.call("POST", "/v1/servers?dry_run=true", body).await;
    let plan: ServerPlan = answer.json(200);
    assert_eq!(plan.server.name.as_str(), "web1");
    assert!(!plan.steps.is_empty());
    let page: Page<Server> = served.call("GET", "/v1/servers", Sent::nothing()).await.json(200);
    assert_eq!(page.items, []);
    served.stop().await;
}

#[tokio::test]
async fn a_reference_is_set_found_kept_unique_and_removed() {
    let served = Served::start().await;
    let (one, other) = (made(&served, "one").await, made(&served, "other").await);
    let patch = async |server: &Server, reference: Value| {
        let body = json!({ "external_ref": reference }).to_string();
        let path = format!("/v1/servers/{}", server.id);
        served.call("PATCH", &path, Sent::text("application/merge-patch+json", body)).await
    };
    let found = async |reference: &str| -> Vec<ServerId> {
        let path = format!("/v1/servers?external_ref={reference}");
        let page: Page<Server> = served.call("GET", &path, Sent::nothing()).await.json(200);
        page.items.iter().map(|server| server.id).collect()
    };
    assert_eq!(patch(&one, json!("order 17")).await.json::<Server>(200).external_ref.unwrap(), "order 17");
    assert_eq!((found("order%2017").await, found("order").await), (vec![one.id], vec![]));
    patch(&other, json!("order 17")).await.problem(Code::AlreadyExists);
    for bad in ["", &"x".repeat(129)] {
        let problem = patch(&other, json!(bad)).await.problem(Code::Invalid);
        assert_eq!(problem.errors[0].pointer, "/external_ref");
    }
    // Left out, it stays.
    let path = format!("/v1/servers/{}", one.id);
    let words = Sent::text("application/merge-patch+json", r#"{"description": "d"}"#);
    let kept: Server = served.call("PATCH", &path, words).await.json(200);
    assert_eq!(kept.external_ref.as_deref(), Some("order 17"));
    assert_eq!(patch(&one, Value::Null).await.json::<Server>(200).external_ref, None);
    assert_eq!(found("order%2017").await, []);
    patch(&other, json!("order 17")).await.json::<Server>(200);
    assert_eq!(found("order%2017").await, [other.id]);
    served.stop().await;
}

#[tokio::test]
async fn isolation_is_answered_while_there_is_a_machine() {
    let served = Served::start().await;
    let server = made(&served, "web1").await;
    assert_eq!(server.isolation, Isolation::Standard);
    let path = format!("/v1/servers/{}/isolation", server.id);
    let found: ServerIsolation = served.call("GET", &path, Sent::nothing()).await.json(200);
    assert!(found.complete && found.items.len() > 10, "{found:?}");
    act(&served, server.id, "stop", Some(json!({ "grace_s": 0 }))).await;
    served.call("GET", &path, Sent::nothing()).await.problem(Code::WrongState);
    served.stop().await;
}

#[tokio::test]
async fn metrics_are_answered_for_one_server_and_for_prometheus() {
    let served = Served::start().await;
    let server = made(&served, "web1").await;
    let path = format!("/v1/servers/{}/metrics", server.id);
    let metrics: ServerMetrics = served.call("GET", &path, Sent::nothing()).await.json(200);
    assert_eq!(metrics.vcpu_exits.len(), 1);
    let answer = served.call("GET", "/metrics", Sent::nothing()).await;
    assert_eq!(answer.status, 200);
    let page = String::from_utf8(answer.body.to_vec()).unwrap();
    assert!(page.contains("toft_servers{state=\"running\"} 1\n"), "{page}");
    let labels = format!("{{id=\"{}\",name=\"web1\"}}", server.id);
    assert!(page.contains(&format!("toft_server_running_ms_total{labels} ")), "{page}");
    // Of a server that has all of its memory, too: a figure that is not there could be one that nobody knows.
    assert!(page.contains(&format!("toft_server_memory_owed_bytes{labels} 0\n")), "{page}");
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let value = line.rsplit(' ').next().unwrap();
        assert!(line.starts_with("toft_") && value.parse::<u64>().is_ok(), "{line}");
    }
    act(&served, server.id, "stop", Some(json!({ "grace_s": 0 }))).await;
    served.call("GET", &path, Sent::nothing()).await.problem(Code::WrongState);
    served.stop().await;
}

#[tokio::test]
async fn the_console_log_is_read_in_pieces() {
    let served = Served::start().await;
    let server = made(&served, "web1").await;
    let path = format!("/v1/servers/{}/console-log", server.id);
    served.stage.launch.only().print("to be read in pieces\n");
    let whole = loop {
        let answer = served.call("GET", &path, Sent::nothing()).await;
        if answer.body.ends_with(b"pieces\n") {
            break answer;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(whole.header("content-type"), "text/plain; charset=utf-8");
    let end: u64 = whole.header("toft-console-next").parse().unwrap();
    assert_eq!(whole.header("toft-console-start"), "0");
    assert_eq!(whole.header("toft-console-written"), end.to_string());
    let tail = served.call("GET", &format!("{path}?tail_bytes=7"), Sent::nothing()).await;
    assert_eq!(
        (&tail.body[..], tail.header("toft-console-start")),
        (&b"pieces\n"[..], &*(end - 7).to_string())
    );
    let rest = served.call("GET", &format!("{path}?from={}", end - 3), Sent::nothing()).await;
    assert_eq!(&rest.body[..], b"es\n");
    served.stop().await;
}

#[tokio::test]
async fn volumes_and_images_are_seen_and_refuse_what_would_break_a_server() {
    let served = Served::start().await;
    let server = made(&served, "web1").await;
    let page: Page<Volume> = served.call("GET", "/v1/volumes", Sent::nothing()).await.json(200);
    assert_eq!(page.items[0].server_id, Some(server.id));
    let path = format!("/v1/volumes/{}", page.items[0].id);
    served.call("DELETE", &path, Sent::nothing()).await.problem(Code::InUse);
    let larger = Sent::text("application/json", json!({ "size_bytes": 8 << 20 }).to_string());
    let problem = served.call("PATCH", &path, larger).await.problem(Code::WrongState);
    assert!(
        problem.allowed_actions.unwrap().contains(&"stop".to_owned()),
        "of the server that is in the way"
    );
    let images: Page<Image> = served.call("GET", "/v1/images?name=tiny", Sent::nothing()).await.json(200);
    assert_eq!(images.items.len(), 1);
    let answer = served.call("GET", "/v1/host", Sent::nothing()).await;
    assert_eq!(answer.json::<Value>(200)["servers"]["running"], 1);
    let about: Value = served.call("GET", "/v1", Sent::nothing()).await.json(200);
    assert_eq!((about["product"].as_str(), about["api"].as_str()), (Some("toft"), Some("v1")));
    let probe: Value = served.call("POST", "/v1/host/actions/probe", Sent::nothing()).await.json(200);
    assert_eq!(probe["works"], true);
    let probe = || Sent::nothing().with("idempotency-key", "k");
    let first = served.call("POST", "/v1/host/actions/probe", probe()).await;
    let again = served.call("POST", "/v1/host/actions/probe", probe()).await;
    assert_eq!(first.json::<Value>(200)["works"], true);
    assert_eq!((again.header("idempotency-replayed"), &again.body), ("true", &first.body));
    served.stop().await;
}

#[tokio::test]
async fn a_damaged_upload_is_refused_and_leaves_no_image() {
    let served = Served::start().await;
    let bundle = Sent::text("application/x-tar", vec![0x55; 4096]).with("prefer", "wait=20");
    let answer = served.call("POST", "/v1/images?name=broken", bundle).await;
    answer.problem(Code::ImageCorrupt);
    let images: Page<Image> = served.call("GET", "/v1/images?name=broken", Sent::nothing()).await.json(200);
    assert_eq!(images.items, []);
    served.stop().await;
}

#[tokio::test]
async fn an_answer_that_was_kept_is_never_an_old_one() {
    let served = Served::start().await;
    let server = made(&served, "web1").await;
    let path = format!("/v1/servers/{}", server.id);
    for round in 0..4 {
        let patch = format!(r#"{{"description": "round {round}"}}"#);
        let changed =
            served.call("PATCH", &path, Sent::text("application/merge-patch+json", patch.as_str())).await;
        for _ in 0..2 {
            let answer = served.call("GET", &path, Sent::nothing()).await;
            assert_eq!(answer.header("etag"), changed.header("etag"));
            let read: Server = answer.json(200);
            assert_eq!(read.description, format!("round {round}"));
            let page: Page<Server> =
                served.call("GET", "/v1/servers?limit=5", Sent::nothing()).await.json(200);
            assert_eq!(page.items, [read]);
            let part: Value =
                served.call("GET", &format!("{path}?fields=description"), Sent::nothing()).await.json(200);
            assert_eq!(part, json!({ "description": format!("round {round}") }));
            let had = Sent::nothing().with("if-none-match", answer.header("etag"));
            assert_eq!(served.call("GET", &path, had).await.status, 304);
        }
    }
    let first = served.call("GET", &path, Sent::nothing()).await;
    let second = served.call("GET", &path, Sent::nothing()).await;
    assert_ne!(
        first.header("x-request-id"),
        second.header("x-request-id"),
        "each caller has an id of its own"
    );
    served.stop().await;
}
