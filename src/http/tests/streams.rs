//! Event streams: both formats, from a position or from now on, to their end when the daemon closes.
use http_body_util::BodyExt;
use hyper::body::Incoming;
use model::Code;
use model::event::Event;
use model::network::Network;
use model::page::Page;
use serde_json::json;

use super::served::{Sent, Served, within};

/// Reads a stream until `enough` of it is there.
async fn read_until(body: &mut Incoming, mut text: String, enough: impl Fn(&str) -> bool) -> String {
    while !enough(&text) {
        let frame = within(body.frame()).await.expect("the stream ended early").unwrap();
        text.push_str(std::str::from_utf8(&frame.into_data().unwrap()).unwrap());
    }
    text
}

fn events(ndjson: &str) -> Vec<Event> {
    ndjson.lines().filter(|line| !line.is_empty()).map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn make_network(served: &Served, name: &str) {
    let body = Sent::from(json!({ "name": name, "kind": "isolated" })).with("prefer", "wait=10");
    assert_eq!(served.call("POST", "/v1/networks", body).await.status, 201);
}

#[tokio::test]
async fn what_is_there_is_read_to_its_end_in_order() {
    let served = Served::start().await;
    make_network(&served, "a").await;
    let answer = served.call("GET", "/v1/events?follow=false&format=ndjson", Sent::nothing()).await;
    assert_eq!(answer.header("content-type"), "application/x-ndjson");
    let all = events(std::str::from_utf8(&answer.body).unwrap());
    assert!(all.iter().zip(1..).all(|(event, position)| event.id.0 == position), "{all:?}");
    assert!(all.iter().any(|event| event.kind.starts_with("network.")), "{all:?}");
    let page: Page<Network> = served.call("GET", "/v1/networks", Sent::nothing()).await.json(200);
    assert_eq!(page.watch_cursor, all.last().unwrap().id);

    let after = all[all.len() - 2].id.0;
    let path = format!("/v1/events?follow=false&after={after}");
    let accept = Sent::nothing().with("accept", "application/x-ndjson");
    let rest = served.call("GET", &path, accept).await;
    assert_eq!(events(std::str::from_utf8(&rest.body).unwrap()), all[all.len() - 1..]);
    for beyond in [all.len() as u64 + 5, i64::MAX as u64 + 1, u64::MAX] {
        for follow in [true, false] {
            let path = format!("/v1/events?after={beyond}&follow={follow}");
            served.call("GET", &path, Sent::nothing()).await.problem(Code::CursorExpired);
        }
    }
    served.stop().await;
}

#[tokio::test]
async fn a_follower_hears_of_what_comes_and_can_take_up_where_it_stopped() {
    let served = Served::start().await;
    let response = served.open("/v1/events", Sent::nothing()).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut body = response.into_body();
    // The heartbeat at the start: from here on nothing is missed.
    read_until(&mut body, String::new(), |text| text.contains(": alive\n\n")).await;
    make_network(&served, "a").await;
    let text =
        read_until(&mut body, String::new(), |text| text.contains("event: operation.succeeded\n")).await;
    drop(body);
    let first = text.split("\n\n").find(|block| block.starts_with("id: ")).unwrap();
    let id: u64 = first.lines().next().unwrap()[4..].parse().unwrap();
    let data = first.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
    let event: Event = serde_json::from_str(data).unwrap();
    assert_eq!(event.id.0, id);
    assert!(first.contains(&format!("event: {}\n", event.kind)));

    let again = served.open("/v1/events", Sent::nothing().with("last-event-id", &id.to_string())).await;
    let next = format!("id: {}\n", id + 1);
    let text = read_until(&mut again.into_body(), String::new(), |text| text.contains("\nid: ")).await;
    assert!(text.contains(&next) && !text.contains(&format!("id: {id}\n")), "{text}");
    served.stop().await;
}

#[tokio::test]
async fn streams_end_when_the_daemon_closes() {
    let served = Served::start().await;
    let mut body = served.open("/v1/events?format=ndjson", Sent::nothing()).await.into_body();
    read_until(&mut body, String::new(), |text| text.contains('\n')).await;
    let reading = tokio::spawn(async move {
        while let Some(frame) = body.frame().await {
            frame.unwrap();
        }
    });
    served.stop().await;
    within(reading).await.unwrap();
}

#[tokio::test]
async fn more_streams_than_there_is_room_for_are_told_to_wait() {
    let served = Served::start().await;
    let mut open = Vec::new();
    for _ in 0..crate::limits::EVENT_STREAMS_MAX {
        open.push(served.open("/v1/events", Sent::nothing()).await);
    }
    let answer = served.call("GET", "/v1/events", Sent::nothing()).await;
    answer.problem(Code::TooMany);
    assert!(answer.header("retry-after").parse::<u64>().unwrap() > 0);
    open.pop();
    // The place is free again as soon as the daemon notices.
    let path = "/v1/events?follow=false";
    let freed = async { while served.call("GET", path, Sent::nothing()).await.status != 200 {} };
    within(freed).await;
    drop(open);
    served.stop().await;
}
