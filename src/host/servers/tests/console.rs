//! Consoles on fakes: readers, keyboards, tickets.
use model::console::{ConsoleToken, CreateConsoleToken};
use model::{Code, EventId, ServerId};

use super::super::{ConsoleStream, limits};
use super::{START, delete, stop};
use crate::fake_vmm::Guest;
use crate::stage::{SOON, Stage, created, keyed, server, succeeded};
use crate::{Call, Host, Idempotency};

#[tokio::test]
async fn two_readers_of_a_console_see_the_same_bytes_and_one_types() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let mut one = open_console(&host, id, false).await;
    let mut two = open_console(&host, id, true).await;
    one.keyboard().write(b"a line that is longer than the guest's FIFO\r").await.unwrap();
    let refused = two.keyboard().write(b"x").await.unwrap_err();
    assert_eq!(refused.code, Code::Forbidden);
    let wanted = b"fake guest: booted\r\na line that is longer than the guest's FIFO\r";
    for reader in [&mut one, &mut two] {
        let mut seen = Vec::new();
        while seen.len() < wanted.len() {
            let piece = tokio::time::timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap();
            assert_eq!(piece.start, seen.len() as u64);
            seen.extend(piece.data);
        }
        assert_eq!(seen, wanted);
    }
    // More output wakes a reader that waits.
    let waiting = tokio::spawn(async move { one.next().await });
    stage.launch.only().print("login: ");
    let piece = tokio::time::timeout(SOON, waiting).await.unwrap().unwrap().unwrap().unwrap();
    assert_eq!(piece.data, b"login: ");
    let log = host.servers().console_log(id, None, 7).await.unwrap();
    assert_eq!(log.data, b"login: ");
    host.close().await;
}

#[tokio::test]
async fn a_console_ticket_opens_once_and_readers_are_bounded() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let secret = ticket(&host, id, false).await;
    let first = host.servers().console_open(id, &secret).await.unwrap();
    let again = host.servers().console_open(id, &secret).await.err().unwrap();
    assert_eq!(again.code, Code::Unauthenticated);
    let mut readers = vec![first];
    while readers.len() < limits::CONSOLE_READERS_MAX {
        readers.push(open_console(&host, id, true).await);
    }
    let secret = ticket(&host, id, true).await;
    let refused = host.servers().console_open(id, &secret).await.err().unwrap();
    assert_eq!(refused.code, Code::TooMany);
    readers.pop();
    host.servers().console_open(id, &secret).await.unwrap();
    host.close().await;
}

#[tokio::test]
async fn a_console_is_followed_across_a_restart_of_the_machine() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let mut reader = open_console(&host, id, true).await;
    reader.next().await.unwrap().unwrap();
    let stopped = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    let started = host.servers().act(&Call::by_host(), id, START).await.unwrap();
    succeeded(&host, started.body.operation.id).await;
    let piece = tokio::time::timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(piece.data, b"fake guest: booted\r\n");
    delete(&host, id).await;
    let end = tokio::time::timeout(SOON, reader.next()).await.unwrap();
    assert_eq!(end.ok().flatten(), None);
    host.close().await;
}

#[tokio::test]
async fn a_reader_that_stalls_finds_the_newest_output_and_sees_the_gap() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let mut reader = open_console(&host, id, true).await;
    let line = "x".repeat(64 * 1024);
    let total = 20 + 20 * line.len() as u64 + 4;
    for _ in 0..20 {
        stage.launch.only().print(&line);
    }
    stage.launch.only().print("end.");
    // Waits by position until the guest has written everything.
    let mut watcher = open_console(&host, id, true).await;
    let mut position = 0;
    while position < total {
        let piece = tokio::time::timeout(SOON, watcher.next()).await.unwrap().unwrap().unwrap();
        position = piece.start + piece.data.len() as u64;
    }
    let first = tokio::time::timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap();
    // The oldest bytes of a full ring are not given out, because the writer may be at them.
    let held = total - first.start;
    let full = wire::limits::CONSOLE_RING_BYTES;
    assert!((full - 4096..=full).contains(&held), "the oldest byte that is held, {held} of {full}");
    assert!(first.data.len() <= limits::CONSOLE_PIECE_BYTES);
    host.close().await;
}

#[tokio::test]
async fn a_console_of_a_server_without_a_machine_is_read_and_not_typed_on() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("web1");
    spec.start = false;
    let id = created(&host, spec).await.id;
    let reader = open_console(&host, id, false).await;
    let refused = reader.keyboard().write(b"x").await.unwrap_err();
    assert_eq!(refused.code, Code::WrongState);
    assert_eq!(host.servers().console_log(id, None, 100).await.unwrap().data, b"");
    host.close().await;
}

#[tokio::test]
async fn a_ticket_of_another_server_opens_nothing_and_stays_good() {
    let stage = Stage::new();
    stage.launch.set_guest(Guest::Deaf);
    let host = stage.open_with_image().await;
    let one = created(&host, server("one")).await.id;
    let two = created(&host, server("two")).await.id;
    let secret = ticket(&host, one, false).await;
    let refused = host.servers().console_open(two, &secret).await.err().unwrap();
    assert_eq!(refused.code, Code::Unauthenticated);
    host.servers().console_open(one, &secret).await.unwrap();
    host.close().await;
}

#[tokio::test]
async fn a_ticket_that_has_expired_opens_nothing() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let secret = ticket(&host, id, false).await;
    // Time passes for the record alone.
    let records = rusqlite::Connection::open(stage.state_dir().join("toft.db")).unwrap();
    let lifetime_ms = limits::CONSOLE_TOKEN.as_millis() as i64 + 1;
    records.execute("UPDATE console_tokens SET expires_ms = expires_ms - ?1", [lifetime_ms]).unwrap();
    let refused = host.servers().console_open(id, &secret).await.err().unwrap();
    assert_eq!(refused.code, Code::Unauthenticated);
    records.execute("UPDATE console_tokens SET expires_ms = expires_ms + ?1", [lifetime_ms]).unwrap();
    host.servers().console_open(id, &secret).await.unwrap();
    host.close().await;
}

#[tokio::test]
async fn readers_are_known_by_who_let_them_in_and_are_kicked_one_by_one_or_all() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    assert_eq!(host.servers().console_readers(id).await.unwrap().items, []);
    let first = open_console(&host, id, false).await;
    let second = open_console(&host, id, true).await;
    let third = open_console(&host, id, true).await;
    let unused = ticket(&host, id, false).await;
    let seen = host.servers().console_readers(id).await.unwrap().items;
    let told: Vec<_> = seen.iter().map(|reader| (reader.read_only, reader.opened_by.as_str())).collect();
    assert_eq!(told, [(false, "host"), (true, "host"), (true, "host")]);
    drop(third);
    assert_eq!(host.servers().console_readers(id).await.unwrap().items, seen[..2]);

    let call = Call::by_host();
    let gone = host.servers().console_kick(&call, id, Some(seen[2].id)).await.unwrap_err();
    assert_eq!(gone.code, Code::NotFound);
    let kicked = host.servers().console_kick(&call, id, Some(seen[0].id)).await.unwrap().body;
    assert_eq!(kicked.items, seen[..1]);
    tokio::time::timeout(SOON, first.kicked().wait()).await.unwrap();
    assert_eq!(host.servers().console_readers(id).await.unwrap().items, seen[1..2]);
    let refused = host.servers().console_open(id, &unused).await.err().unwrap();
    assert_eq!(refused.code, Code::Unauthenticated, "a kick takes tickets that are on their way");

    // A repeated kick is answered as before and puts nobody out who came since.
    let idempotency = Idempotency { key: "k".into(), fingerprint: "f".into() };
    let keyed = Call { idempotency: Some(idempotency), ..Call::by_host() };
    let kicked = host.servers().console_kick(&keyed, id, None).await.unwrap().body;
    assert_eq!(kicked.items, seen[1..2]);
    tokio::time::timeout(SOON, second.kicked().wait()).await.unwrap();
    let late = open_console(&host, id, true).await;
    let again = host.servers().console_kick(&keyed, id, None).await.unwrap();
    assert_eq!((again.replayed, again.body), (true, kicked));
    assert_eq!(host.servers().console_readers(id).await.unwrap().items.len(), 1);
    drop(late);
    let told = host.events().page(EventId(0), 1000).await.unwrap();
    let times = |kind: &str| told.iter().filter(|event| event.kind == kind).count();
    assert_eq!((times("server.console_opened"), times("server.console_kicked")), (4, 2));
    host.close().await;
}

#[tokio::test]
async fn a_repeated_call_is_told_the_same_ticket_and_nothing_readable_is_kept() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let (call, spec) = (keyed("k"), CreateConsoleToken::default());
    let first = host.servers().console_token(&call, id, spec).await.unwrap();
    let again = host.servers().console_token(&call, id, spec).await.unwrap();
    assert_eq!((first.replayed, again.replayed), (false, true));
    assert_eq!(first.body, again.body);
    let mut other = call.clone();
    other.idempotency.as_mut().unwrap().fingerprint = "another body".to_owned();
    let refused = host.servers().console_token(&other, id, spec).await.unwrap_err();
    assert_eq!(refused.code, Code::IdempotencyMismatch);
    let unkeyed = host.servers().console_token(&Call::by_host(), id, spec).await.unwrap().body;
    for file in ["toft.db", "toft.db-wal"] {
        let kept = std::fs::read(stage.state_dir().join(file)).unwrap();
        for token in [&first.body, &unkeyed] {
            let secret = secret(token).as_bytes();
            assert!(!kept.windows(secret.len()).any(|piece| piece == secret), "{file} holds a secret");
        }
    }
    host.servers().console_open(id, secret(&first.body)).await.unwrap();
    // The call did what it did: told again, the ticket is still used up.
    let told = host.servers().console_token(&call, id, spec).await.unwrap().body;
    let refused = host.servers().console_open(id, secret(&told)).await.err().unwrap();
    assert_eq!(refused.code, Code::Unauthenticated);
    host.close().await;
}

#[tokio::test]
async fn a_daemon_that_cannot_know_a_ticket_any_more_replaces_it() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let (call, spec) = (keyed("k"), CreateConsoleToken::default());
    let first = host.servers().console_token(&call, id, spec).await.unwrap().body;
    host.close().await;
    drop(host);
    let host = stage.open().await;
    let second = host.servers().console_token(&call, id, spec).await.unwrap();
    assert!(!second.replayed);
    let third = host.servers().console_token(&call, id, spec).await.unwrap();
    assert!(third.replayed);
    assert_eq!(second.body, third.body);
    let refused = host.servers().console_open(id, secret(&first)).await.err().unwrap();
    assert_eq!(refused.code, Code::Unauthenticated);
    host.servers().console_open(id, secret(&second.body)).await.unwrap();
    host.close().await;
}

#[tokio::test]
async fn a_ticket_is_made_for_the_version_that_its_caller_saw() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let made = created(&host, server("web1")).await;
    let call = |generation| Call { if_match: Some(crate::call::etag(generation)), ..Call::by_host() };
    let spec = CreateConsoleToken::default();
    let refused = host.servers().console_token(&call(made.generation + 1), made.id, spec).await.unwrap_err();
    assert_eq!(refused.code, Code::StaleEtag);
    host.servers().console_token(&call(made.generation), made.id, spec).await.unwrap();
    host.close().await;
}

fn secret(token: &ConsoleToken) -> &str {
    token.url.split_once("token=").unwrap().1
}

#[tokio::test]
async fn a_console_that_a_power_cut_left_without_its_content_is_begun_anew() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("web1");
    spec.start = false;
    let id = created(&host, spec).await.id;
    let ring = stage.state_dir().join("servers").join(id.to_string()).join("console.ring");
    let length = std::fs::metadata(&ring).unwrap().len();
    for left in [0, length] {
        std::fs::write(&ring, vec![0; usize::try_from(left).unwrap()]).unwrap();
        assert_eq!(host.servers().console_log(id, None, 100).await.unwrap().data, b"");
        std::fs::write(&ring, vec![0; usize::try_from(left).unwrap()]).unwrap();
        let started = host.servers().act(&Call::by_host(), id, START).await.unwrap();
        succeeded(&host, started.body.operation.id).await;
        let log = host.servers().console_log(id, None, 100).await.unwrap();
        assert_eq!(log.data, b"fake guest: booted\r\n");
        let stopped = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
        succeeded(&host, stopped.body.operation.id).await;
    }
    host.close().await;
}

async fn ticket(host: &Host, id: ServerId, read_only: bool) -> String {
    let spec = CreateConsoleToken { read_only, from: None };
    let token = host.servers().console_token(&Call::by_host(), id, spec).await.unwrap().body;
    secret(&token).to_owned()
}

async fn open_console(host: &Host, id: ServerId, read_only: bool) -> ConsoleStream {
    let secret = ticket(host, id, read_only).await;
    host.servers().console_open(id, &secret).await.unwrap()
}
