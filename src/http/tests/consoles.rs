//! Consoles over real WebSockets: replay, several readers, typing, and what a reader who stalls costs.
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use model::Code;
use model::console::{ConsoleReaders, ConsoleToken};
use model::operation::Accepted;
use model::server::Server;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::served::{Sent, Served, within};

type Socket = WebSocketStream<UnixStream>;

async fn running(served: &Served) -> Server {
    let body = json!({ "name": "web1", "image": "tiny", "memory_bytes": 128 << 20 });
    let answer = served.call("POST", "/v1/servers", Sent::from(body).with("prefer", "wait=20")).await;
    answer.json::<Accepted<Server>>(201).resource.unwrap()
}

async fn ticket(served: &Served, server: &Server, body: Value) -> String {
    let path = format!("/v1/servers/{}/console-tokens", server.id);
    let answer = served.call("POST", &path, body).await;
    let token: ConsoleToken = answer.json(201);
    assert_eq!(answer.header("location"), token.url);
    token.url
}

async fn connect(served: &Served, url: &str) -> Result<Socket, Error> {
    let stream = UnixStream::connect(served.socket()).await.unwrap();
    within(tokio_tungstenite::client_async(format!("ws://toft{url}"), stream)).await.map(|(socket, _)| socket)
}

async fn open(served: &Served, server: &Server, body: Value) -> Socket {
    let url = ticket(served, server, body).await;
    connect(served, &url).await.unwrap()
}

/// Reads binary frames until their bytes end so; text frames are returned beside.
async fn read_until(socket: &mut Socket, end: &str) -> (String, Vec<Value>) {
    let reading = async {
        let (mut bytes, mut notices) = (Vec::new(), Vec::new());
        while !bytes.ends_with(end.as_bytes()) {
            match socket.next().await.expect("the console was closed").unwrap() {
                Message::Binary(data) => bytes.extend_from_slice(&data),
                Message::Text(text) => notices.push(serde_json::from_str(text.as_str()).unwrap()),
                _ => {}
            }
        }
        (String::from_utf8(bytes).unwrap(), notices)
    };
    within(reading).await
}

#[tokio::test]
async fn two_readers_see_the_same_bytes_from_the_first_on() {
    let served = Served::start().await;
    let server = running(&served).await;
    let mut first = open(&served, &server, json!({})).await;
    served.stage.launch.only().print("one two ");
    let (early, _) = read_until(&mut first, "one two ").await;
    let mut second = open(&served, &server, json!({ "read_only": true })).await;
    served.stage.launch.only().print("three\n");
    let (late, _) = read_until(&mut first, "three\n").await;
    let (all, notices) = read_until(&mut second, "three\n").await;
    assert_eq!(format!("{early}{late}"), all);
    assert_eq!(notices, Vec::<Value>::new());
    let from = json!({ "from": early.len() });
    let mut third = open(&served, &server, from).await;
    assert_eq!(read_until(&mut third, "three\n").await.0, "three\n");
    served.stop().await;
}

#[tokio::test]
async fn a_reader_may_begin_at_the_end_wherever_that_is() {
    let served = Served::start().await;
    let server = running(&served).await;
    let path = format!("/v1/servers/{}/console-tokens", server.id);
    for beyond in [u64::MAX, i64::MAX as u64 + 1] {
        let answer = served.call("POST", &path, json!({ "from": beyond })).await;
        connect(&served, &answer.json::<ConsoleToken>(201).url).await.unwrap();
    }
    served.stop().await;
}

#[tokio::test]
async fn a_ticket_opens_one_console_once() {
    let served = Served::start().await;
    let server = running(&served).await;
    let url = ticket(&served, &server, json!({})).await;
    // A request that cannot become a WebSocket does not cost the ticket.
    assert_eq!(served.call("GET", &url, Sent::nothing()).await.status, 400);
    let _open = connect(&served, &url).await.unwrap();
    for used in [url.as_str(), &format!("/v1/servers/{}/console?token=x", server.id)] {
        match connect(&served, used).await {
            Err(Error::Http(response)) => assert_eq!(response.status(), 401, "{used}"),
            other => panic!("{used}: {other:?}"),
        }
    }
    served.stop().await;
}

#[tokio::test]
async fn a_repeated_request_for_a_ticket_is_answered_with_the_same() {
    let served = Served::start().await;
    let server = running(&served).await;
    let path = format!("/v1/servers/{}/console-tokens", server.id);
    let sent = |body: Value| Sent::from(body).with("idempotency-key", "k");
    let first = served.call("POST", &path, sent(json!({}))).await;
    let again = served.call("POST", &path, sent(json!({}))).await;
    assert_eq!((first.header("idempotency-replayed"), again.header("idempotency-replayed")), ("", "true"));
    assert_eq!(first.json::<ConsoleToken>(201), again.json::<ConsoleToken>(201));
    let other = served.call("POST", &path, sent(json!({ "read_only": true }))).await;
    other.problem(Code::IdempotencyMismatch);
    let stale = Sent::nothing().with("if-match", "\"999\"");
    served.call("POST", &path, stale).await.problem(Code::StaleEtag);
    served.stop().await;
}

#[tokio::test]
async fn what_is_typed_reaches_the_guest_but_not_from_one_who_may_only_look() {
    let served = Served::start().await;
    let server = running(&served).await;
    let vmm = served.stage.launch.only();
    let mut reader = open(&served, &server, json!({ "read_only": true })).await;
    reader.send(Message::text("rm")).await.unwrap();
    let refused = loop {
        match within(reader.next()).await.unwrap().unwrap() {
            Message::Text(text) => break text,
            _ => continue,
        }
    };
    assert_eq!(refused.as_str(), r#"{"refused":"forbidden"}"#);
    let mut typist = open(&served, &server, json!({})).await;
    typist.send(Message::text("ls")).await.unwrap();
    typist.send(Message::binary(b"\r".to_vec())).await.unwrap();
    let typed = async {
        while vmm.typed() != b"ls\r" {
            tokio::task::yield_now().await;
        }
    };
    within(typed).await;
    served.stop().await;
}

#[tokio::test]
async fn what_was_typed_last_reaches_the_guest_when_its_reader_has_gone() {
    let served = Served::start().await;
    let server = running(&served).await;
    let vmm = served.stage.launch.only();
    // So that there is more to show than a closed connection takes.
    vmm.print(&"x".repeat(600_000));
    let mut all = String::new();
    for number in 0..40 {
        let mut typist = open(&served, &server, json!({})).await;
        for letter in ["a", "b"] {
            all += &format!("{letter}{number} ");
            typist.send(Message::text(format!("{letter}{number} "))).await.unwrap();
        }
        drop(typist);
        let typed = async {
            while vmm.typed() != all.as_bytes() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        within(typed).await;
    }
    served.stop().await;
}

#[tokio::test]
async fn a_reader_who_stalls_is_told_what_was_lost_and_the_others_lose_nothing() {
    let served = Served::start().await;
    let server = running(&served).await;
    let vmm = served.stage.launch.only();
    let mut stalled = open(&served, &server, json!({})).await;
    let mut lively = open(&served, &server, json!({})).await;
    // Several times what the console keeps, and far more than sockets and daemon hold for one reader.
    let line = "x".repeat(1023) + "\n";
    let (rounds, lines) = (16, 512);
    let mut seen = 0;
    for round in 0..rounds {
        for _ in 0..lines {
            vmm.print(&line);
        }
        let mark = format!("end of round {round}\n");
        vmm.print(&mark);
        let (text, notices) = read_until(&mut lively, &mark).await;
        assert_eq!(notices, Vec::<Value>::new());
        seen += text.len();
    }
    assert!(seen >= rounds * lines * 1024);
    let (text, notices) = read_until(&mut stalled, "end of round 15\n").await;
    let lost: u64 = notices.iter().map(|notice| notice["gap_bytes"].as_u64().unwrap()).sum();
    assert!(lost > 0, "nothing was lost, so {} bytes were held for a reader who took none", text.len());
    assert_eq!(text.len() as u64 + lost, seen as u64);
    served.stop().await;
}

#[tokio::test]
async fn a_console_is_closed_with_a_reason_when_its_server_or_the_daemon_goes() {
    let served = Served::start().await;
    let server = running(&served).await;
    let close = async |socket: &mut Socket| loop {
        match within(socket.next()).await.expect("it should say why it closes").unwrap() {
            Message::Close(frame) => return u16::from(frame.unwrap().code),
            _ => continue,
        }
    };
    let mut socket = open(&served, &server, json!({})).await;
    let path = format!("/v1/servers/{}", server.id);
    served.call("DELETE", &path, Sent::nothing().with("prefer", "wait=20")).await;
    assert_eq!(close(&mut socket).await, 1000);
    drop(socket);

    let server = running(&served).await;
    let mut socket = open(&served, &server, json!({})).await;
    let (code, ()) = tokio::join!(close(&mut socket), served.stop());
    assert_eq!(code, 1001);
}

#[tokio::test]
async fn a_reader_is_kicked_even_one_who_takes_nothing() {
    let served = Served::start().await;
    let server = running(&served).await;
    let vmm = served.stage.launch.only();
    // Enough to fill the sockets of one who does not read, so that its task is in the middle of sending.
    let mut stalled = open(&served, &server, json!({})).await;
    for _ in 0..1024 {
        vmm.print(&("x".repeat(1023) + "\n"));
    }
    let mut looker = open(&served, &server, json!({ "read_only": true })).await;
    vmm.print("end\n");
    read_until(&mut looker, "end\n").await;
    let path = format!("/v1/servers/{}/console-readers", server.id);
    let readers: ConsoleReaders = served.call("GET", &path, Sent::nothing()).await.json(200);
    assert_eq!(readers.items.iter().map(|reader| reader.read_only).collect::<Vec<_>>(), [false, true]);
    let one = format!("{path}?reader={}", readers.items[1].id);
    let kicked: ConsoleReaders = served.call("DELETE", &one, Sent::nothing()).await.json(200);
    assert_eq!(kicked.items, readers.items[1..]);
    let code = async |socket: &mut Socket| loop {
        match within(socket.next()).await {
            Some(Ok(Message::Close(frame))) => return Some(u16::from(frame.unwrap().code)),
            Some(Ok(_)) => continue,
            Some(Err(_)) | None => return None,
        }
    };
    assert_eq!(code(&mut looker).await, Some(1008));
    let kicked: ConsoleReaders = served.call("DELETE", &path, Sent::nothing()).await.json(200);
    assert_eq!(kicked.items, readers.items[..1]);
    // One whose sockets are full may never see the frame, but sees the end.
    assert!(matches!(code(&mut stalled).await, Some(1008) | None));
    assert_eq!(served.call("DELETE", &one, Sent::nothing()).await.status, 404);
    let bad = served.call("DELETE", &format!("{path}?reader=one"), Sent::nothing()).await;
    assert_eq!(bad.status, 400);
    served.stop().await;
}

#[tokio::test]
async fn a_message_longer_than_a_large_paste_ends_the_console() {
    let served = Served::start().await;
    let server = running(&served).await;
    let mut socket = open(&served, &server, json!({})).await;
    let long = vec![b'x'; crate::limits::CONSOLE_INPUT_BYTES_MAX + 1];
    let _ = socket.send(Message::binary(long)).await;
    let ended = async { while let Some(Ok(_)) = socket.next().await {} };
    tokio::time::timeout(Duration::from_secs(20), ended).await.unwrap();
    assert!(served.stage.launch.only().typed().is_empty());
    served.stop().await;
}
