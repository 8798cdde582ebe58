//! Whatever is wrong with a request, the answer is a problem document that says so.
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::middleware::from_fn;
use axum::routing::get;
use http_body_util::BodyExt;
use model::{Code, Problem};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::ServiceExt;

use super::served::{Sent, Served, within};

const NOBODY: &str = "01900000-0000-7000-8000-000000000000";

#[tokio::test]
async fn unknown_paths_are_problems() {
    let served = Served::start().await;
    for path in
        ["/", "/v2", "/v1/", "/v1/nothing", "/v1/servers/", "/v1/servers/x/y/z", "/%ff", "/v1/servers%2f"]
    {
        let problem = served.call("GET", path, Sent::nothing()).await.problem(Code::NotFound);
        assert_eq!(problem.instance, path);
    }
    served.stop().await;
}

#[tokio::test]
async fn a_wrong_method_is_told_which_are_right() {
    let served = Served::start().await;
    for (method, path, allowed) in [
        ("DELETE", "/v1/servers", "GET,HEAD,POST"),
        ("PUT", "/v1/volumes", "GET,HEAD"),
        ("GET", &format!("/v1/servers/{NOBODY}/actions/start"), "POST"),
        ("TRACE", "/v1", "GET,HEAD"),
        ("BREW", "/v1/images", "GET,HEAD,POST"),
    ] {
        let answer = served.call(method, path, Sent::nothing()).await;
        answer.problem(Code::MethodNotAllowed);
        assert_eq!(answer.header("allow"), allowed, "{method} {path}");
    }
    served.stop().await;
}

#[tokio::test]
async fn a_mistake_in_a_body_is_pointed_at() {
    let served = Served::start().await;
    for (body, code, pointer) in [
        ("", Code::InvalidRequest, None),
        ("{", Code::InvalidRequest, Some("")),
        ("\u{0}", Code::InvalidRequest, Some("")),
        (r#"{"name": "a", "image": "b"} x"#, Code::InvalidRequest, Some("")),
        ("[]", Code::Invalid, Some("")),
        (r#"["a", "b"]"#, Code::Invalid, Some("")),
        (r#"{"name": "a", "image": "b", "disk_limits": []}"#, Code::Invalid, Some("/disk_limits")),
        (r#"{"name": "a", "image": "b", "labels": {"a": "", "a": ""}}"#, Code::Invalid, Some("/labels/a")),
        ("null", Code::Invalid, Some("")),
        ("{}", Code::Invalid, Some("/name")),
        (
            r#"{"name": "a", "image": "b", "disk_limits": {"operations": {}}}"#,
            Code::Invalid,
            Some("/disk_limits/operations/per_second"),
        ),
        (r#"{"name": "A", "image": "b"}"#, Code::Invalid, Some("/name")),
        (r#"{"name": "a", "image": 1}"#, Code::Invalid, Some("/image")),
        (r#"{"name": "a"}"#, Code::Invalid, Some("/image")),
        (r#"{"name": "a", "image": "b", "snapshot": "c"}"#, Code::Invalid, Some("/snapshot")),
        (r#"{"name": "a", "snapshot": "c"}"#, Code::Invalid, Some("/snapshot")),
        (r#"{"name": "a", "image": "b", "vcpus": -1}"#, Code::Invalid, Some("/vcpus")),
        (r#"{"name": "a", "image": "b", "nope": 1}"#, Code::Invalid, Some("/nope")),
        (r#"{"name": "a", "name": "b", "image": "b"}"#, Code::Invalid, Some("/name")),
        (r#"{"name": "a", "image": "b", "nics": [{}, {"ipv4": "x"}]}"#, Code::Invalid, Some("/nics/1/ipv4")),
        (r#"{"name": "a", "image": "b", "labels": {"ä": ""}}"#, Code::Invalid, Some("/labels")),
    ] {
        let answer = served.call("POST", "/v1/servers", Sent::text("application/json", body)).await;
        let problem = answer.problem(code);
        assert_eq!(
            problem.errors.first().map(|error| error.pointer.as_str()),
            pointer,
            "{body}: {problem:?}"
        );
    }
    served.stop().await;
}

#[tokio::test]
async fn deep_nesting_is_refused_and_not_followed() {
    let served = Served::start().await;
    let deep = "[".repeat(100_000);
    let body = format!("{{\"name\": \"a\", \"image\": \"b\", \"nope\": {deep}");
    let answer = served.call("POST", "/v1/servers", Sent::text("application/json", body)).await;
    assert!(answer.status.is_client_error(), "{answer:?}");
    let body = format!("{{\"labels\": {deep}");
    let path = format!("/v1/servers/{NOBODY}");
    let answer = served.call("PATCH", &path, Sent::text("application/merge-patch+json", body)).await;
    assert!(answer.status.is_client_error(), "{answer:?}");
    served.stop().await;
}

#[tokio::test]
async fn a_merge_patch_says_what_null_cannot_remove() {
    let served = Served::start().await;
    let path = format!("/v1/servers/{NOBODY}");
    let patch = Sent::text("application/merge-patch+json", r#"{"description": null, "vcpus": null}"#);
    let problem = served.call("PATCH", &path, patch).await.problem(Code::Invalid);
    assert_eq!(problem.errors[0].pointer, "/vcpus");
    let repeated = Sent::text("application/merge-patch+json", r#"{"vcpus": 1, "vcpus": 2}"#);
    served.call("PATCH", &path, repeated).await.problem(Code::Invalid);
    served.stop().await;
}

#[tokio::test]
async fn only_the_content_types_of_a_path_are_taken() {
    let served = Served::start().await;
    let body = r#"{"name": "a", "image": "b"}"#;
    for content_type in ["text/plain", "application/xml", "application/x-www-form-urlencoded", "x"] {
        let answer = served.call("POST", "/v1/servers", Sent::text(content_type, body)).await;
        answer.problem(Code::UnsupportedMediaType);
    }
    let none = Sent::text("application/octet-stream", body);
    served.call("POST", "/v1/images", none).await.problem(Code::UnsupportedMediaType);
    let path = format!("/v1/servers/{NOBODY}/actions/stop");
    served.call("POST", &path, Sent::text("text/plain", "{}")).await.problem(Code::UnsupportedMediaType);
    served.stop().await;
}

#[tokio::test]
async fn a_long_body_is_refused_whether_it_says_its_length_or_not() {
    let served = Served::start().await;
    let long = vec![b' '; model::limits::BODY_BYTES_MAX + 1];
    served
        .call("POST", "/v1/servers", Sent::text("application/json", long))
        .await
        .problem(Code::BodyTooLarge);

    let mut stream = tokio::net::UnixStream::connect(served.socket()).await.unwrap();
    let head = "POST /v1/servers HTTP/1.1\r\nhost: toft\r\ncontent-type: application/json\r\n\
                transfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let piece = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
    for _ in 0..5 {
        // The daemon may answer and close before all is written.
        let _ = stream.write_all(piece.as_bytes()).await;
    }
    let mut answer = vec![0; 12];
    within(stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 413");
    served.stop().await;
}

#[tokio::test]
async fn a_mistake_in_a_query_names_the_parameter() {
    let served = Served::start().await;
    for (path, pointer) in [
        ("/v1/servers?limit=0", "limit"),
        ("/v1/servers?limit=201", "limit"),
        ("/v1/servers?limit=", "limit"),
        ("/v1/servers?limit=-1", "limit"),
        ("/v1/servers?limit=1&limit=2", "limit"),
        ("/v1/servers?nope=1", "nope"),
        ("/v1/servers?cursor=", "cursor"),
        ("/v1/servers?cursor=%00", "cursor"),
        ("/v1/servers?sort=size", "sort"),
        ("/v1/servers?name=A", "name"),
        ("/v1/servers?external_ref=", "external_ref"),
        ("/v1/volumes?external_ref=a", "external_ref"),
        ("/v1/servers?label_selector=", "label_selector"),
        ("/v1/servers?label_selector=a%3Db%2C", "label_selector"),
        ("/v1/servers?label_selector=a%3Db%3Dc", "label_selector"),
        ("/v1/servers?fields=id,nope", "fields"),
        ("/v1/servers?fields=", "fields"),
        ("/v1/operations?name=a", "name"),
        ("/v1/operations?label_selector=a", "label_selector"),
        ("/v1/operations?sort=name", "sort"),
        ("/v1/operations?resource_id=web1", "resource_id"),
        ("/v1/snapshots?server_id=web1", "server_id"),
        ("/v1/images/catalogue?sort=created_at", "sort"),
        ("/v1/images/catalogue?limit=0", "limit"),
        ("/v1/images/catalogue?cursor=YWFh", "cursor"),
        ("/v1/images/catalogue?fields=nope", "fields"),
        ("/v1/events?after=x", "after"),
        ("/v1/events?follow=maybe", "follow"),
        ("/v1/events?format=xml", "format"),
        ("/v1?x=1", "x"),
        (&format!("/v1/operations/{NOBODY}?wait=30"), "wait"),
        (&format!("/v1/operations/{NOBODY}?wait=61s"), "wait"),
        (&format!("/v1/servers/{NOBODY}/console-log?from=1&tail_bytes=1"), "tail_bytes"),
        (&format!("/v1/servers/{NOBODY}/console-log?tail_bytes=1048577"), "tail_bytes"),
    ] {
        let problem = served.call("GET", path, Sent::nothing()).await.problem(Code::InvalidRequest);
        assert_eq!(problem.errors[0].pointer, pointer, "{path}: {problem:?}");
        assert!(!problem.instance.contains('?'));
    }
    served.stop().await;
}

#[tokio::test]
async fn a_mistake_in_a_header_names_the_header() {
    let served = Served::start().await;
    let path = format!("/v1/servers/{NOBODY}");
    for (name, value) in [
        ("idempotency-key", "".to_owned()),
        ("idempotency-key", "a b".to_owned()),
        ("idempotency-key", "x".repeat(129)),
        ("if-match", "3".to_owned()),
        ("if-match", "W/\"3\"".to_owned()),
        ("if-match", "\"3".to_owned()),
    ] {
        let answer = served.call("DELETE", &path, Sent::nothing().with(name, &value)).await;
        let problem = answer.problem(Code::InvalidRequest);
        assert_eq!(problem.errors[0].pointer, name, "{value}");
    }
    let twice = Sent::nothing().with("idempotency-key", "a").with("idempotency-key", "b");
    served.call("DELETE", &path, twice).await.problem(Code::InvalidRequest);
    let event = Sent::nothing().with("last-event-id", "x");
    let problem = served.call("GET", "/v1/events", event).await.problem(Code::InvalidRequest);
    assert_eq!(problem.errors[0].pointer, "last-event-id");
    served.stop().await;
}

#[tokio::test]
async fn a_name_in_place_of_an_id_is_told_how_to_find_the_id() {
    let served = Served::start().await;
    for id in ["web1", "01900000000070008000000000000000", "%ff", "{01900000-0000-7000-8000-0000000000}"] {
        let answer = served.call("GET", &format!("/v1/servers/{id}"), Sent::nothing()).await;
        let problem = answer.problem(Code::InvalidRequest);
        assert_eq!(problem.errors[0].pointer, "id");
        assert!(problem.detail.contains("?name="), "{problem:?}");
    }
    served.stop().await;
}

#[tokio::test]
async fn an_upload_says_its_name_in_the_query_and_an_import_in_the_body() {
    let served = Served::start().await;
    let bundle = || Sent::text("application/x-tar", "not really");
    for path in ["/v1/images", "/v1/images?sha256=00", "/v1/images?name=A", "/v1/images?name=a&sha256=0"] {
        served.call("POST", path, bundle()).await.problem(Code::InvalidRequest);
    }
    let import = json!({ "name": "a", "source": { "catalogue": "debian-12" } });
    served.call("POST", "/v1/images?name=a", import).await.problem(Code::InvalidRequest);
    served.stop().await;
}

#[tokio::test]
async fn a_console_without_a_websocket_is_told_to_upgrade() {
    let served = Served::start().await;
    let path = format!("/v1/servers/{NOBODY}/console?token=x");
    let answer = served.call("GET", &path, Sent::nothing()).await;
    let problem = answer.problem(Code::InvalidRequest);
    assert!(problem.detail.contains("WebSocket") && !problem.instance.contains("token"));
    assert_eq!(answer.header("upgrade"), "websocket");
    served.stop().await;
}

#[tokio::test]
async fn a_panic_is_an_internal_error_that_says_nothing_of_itself() {
    let router: Router = Router::new()
        .route("/panics", get(async || -> &'static str { panic!("the secret is 42") }))
        .layer(from_fn(crate::edge::around));
    let request = Request::get("/panics").body(Body::empty()).unwrap();
    let response = router.oneshot(request).await.unwrap();
    assert_eq!(response.status(), 500);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let problem: Problem = serde_json::from_slice(&body).unwrap();
    assert_eq!((problem.code, problem.instance.as_str()), (Code::Internal, "/panics"));
    assert!(!String::from_utf8_lossy(&body).contains("secret"));
}

#[tokio::test]
async fn a_panic_in_a_change_is_an_internal_error() {
    let changed = crate::answer::undisturbed::<()>(async { panic!("the secret is 42") }).await;
    assert_eq!(changed.unwrap_err().code(), Code::Internal);
}

#[tokio::test]
async fn a_change_goes_on_when_its_caller_hangs_up() {
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (go_on, told) = tokio::sync::oneshot::channel::<()>();
    let (ended, has_ended) = tokio::sync::oneshot::channel();
    let caller = tokio::spawn(crate::answer::undisturbed(async move {
        begun.send(()).unwrap();
        told.await.unwrap();
        ended.send(()).unwrap();
        Ok(())
    }));
    within(has_begun).await.unwrap();
    caller.abort();
    assert!(within(caller).await.unwrap_err().is_cancelled());
    go_on.send(()).unwrap();
    within(has_ended).await.unwrap();
}
