//! The store itself: commits, views, pages, selectors, waiting, keys, tokens. On a database in a temporary file.
use std::collections::BTreeMap;
use std::time::Duration;

use model::event::EventData;
use model::page::{ListQuery, Sort};
use model::{EventId, Labels, Name, OperationId, TokenId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::records::Record;
use super::*;
use crate::call::{Actor, Call};
use crate::core::{AlwaysLive, Fate};
use crate::operations::{self, NewOperation, Outcome};
use crate::stage::{SOON, Stage, keyed};
use crate::{events, idempotency, limits};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Thing {
    id: Uuid,
    name: Name,
    labels: Labels,
    generation: u64,
}

impl Record for Thing {
    // The shape of every noun's table is the same, and volumes need nothing else.
    const TABLE: &'static str = "volumes";
    const NOUN: &'static str = "thing";
    fn id(&self) -> Uuid {
        self.id
    }
    fn name(&self) -> &Name {
        &self.name
    }
    fn labels(&self) -> &Labels {
        &self.labels
    }
    fn touch(&mut self) {
        self.generation += 1;
    }
}

fn thing(name: &str, labels: &[(&str, &str)]) -> Thing {
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Thing {
        id: Uuid::now_v7(),
        name: name.parse().unwrap(),
        labels: Labels::try_from(labels).unwrap(),
        generation: 1,
    }
}

async fn store() -> (Store, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    (Store::open(&directory.path().join("toft.db"), Arc::new(AlwaysLive)).await.unwrap(), directory)
}

async fn filled(things: Vec<Thing>) -> (Store, tempfile::TempDir) {
    let (store, directory) = store().await;
    store.write(move |tx| things.iter().try_for_each(|thing| records::insert(tx, thing))).await.unwrap();
    (store, directory)
}

#[tokio::test]
async fn what_fails_leaves_nothing_behind() {
    let (store, _directory) = store().await;
    let failed: Result<()> = store
        .write(|tx| {
            records::insert(tx, &thing("one", &[]))?;
            events::append(tx, "thing.created", EventData::default())?;
            Err(Error::new(Code::InUse, "no"))
        })
        .await;
    assert_eq!(failed.unwrap_err().code, Code::InUse);
    assert_eq!(store.read(records::all::<Thing>).await.unwrap(), []);
    assert_eq!(*store.signals().events().borrow(), 0);
}

#[tokio::test]
async fn what_a_part_that_fails_has_used_up_is_put_back_and_no_more() {
    let (store, _directory) = store().await;
    let back = Arc::new(Mutex::new(Vec::new()));
    let put = back.clone();
    let change = move |tx: &Tx<'_>| {
        let uses = |what: &'static str, outcome: Result<()>| {
            let put = put.clone();
            tx.unless_kept(move || lock(&put).push(what));
            outcome
        };
        uses("before", Ok(()))?;
        let failed = tx.attempt(|| uses("one", Ok(())).and_then(|()| uses("two", Err(draining()))))?;
        tx.attempt(|| uses("three", Ok(())))??;
        assert_eq!((failed.unwrap_err().code, lock(&put).clone()), (Code::Draining, vec!["one", "two"]));
        uses("after", Ok(()))
    };
    store.write(change).await.unwrap();
    assert_eq!(*lock(&back), ["one", "two"]);
}

#[tokio::test]
async fn a_panic_inside_a_transaction_harms_nobody_else() {
    let (store, _directory) = store().await;
    let panicked: Result<()> = store
        .write(|tx| {
            records::insert(tx, &thing("one", &[]))?;
            panic!("a bug of ours")
        })
        .await;
    assert_eq!(panicked.unwrap_err().code, Code::Internal);
    store.write(|tx| records::insert(tx, &thing("one", &[]))).await.unwrap();
    assert_eq!(store.read(records::all::<Thing>).await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_is_committed_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("toft.db");
    let one = thing("one", &[("a", "b")]);
    let kept = one.clone();
    let store = Store::open(&path, Arc::new(AlwaysLive)).await.unwrap();
    store.write(move |tx| records::insert(tx, &one)).await.unwrap();
    store.close().await;
    assert_eq!(store.read(records::all::<Thing>).await.unwrap_err().code, Code::Draining);
    let store = Store::open(&path, Arc::new(AlwaysLive)).await.unwrap();
    assert_eq!(store.read(records::all::<Thing>).await.unwrap(), [kept]);
}

#[tokio::test]
async fn the_log_is_as_long_as_it_gets_from_the_beginning_and_zeroes_behind_its_end_are_no_records() {
    let (before, after) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let [path, later] = [&before, &after].map(|directory| directory.path().join("toft.db"));
    let length = |path: &Path| std::fs::metadata(beside(path, "-wal")).unwrap().len();
    let store = Store::open(&path, Arc::new(AlwaysLive)).await.unwrap();
    assert_eq!(length(&path), limits::LOG_BYTES);
    let things: Vec<Thing> = (0..50).map(|at| thing(&format!("thing-{at}"), &[])).collect();
    for thing in things.clone() {
        store.write(move |tx| records::insert(tx, &thing)).await.unwrap();
    }
    assert_eq!(length(&path), limits::LOG_BYTES);
    // As a daemon leaves it that is killed.
    for suffix in ["", "-wal"] {
        std::fs::copy(beside(&path, suffix), beside(&later, suffix)).unwrap();
    }
    let store = Store::open(&later, Arc::new(AlwaysLive)).await.unwrap();
    let mut found = store.read(records::all::<Thing>).await.unwrap();
    found.sort_by_key(|thing| thing.id);
    assert_eq!(found, things);
    // A log that lost its end is made long again, and what it still has is kept.
    drop(store);
    std::fs::copy(&path, &later).unwrap();
    std::fs::copy(beside(&path, "-wal"), beside(&later, "-wal")).unwrap();
    let log = File::options().write(true).open(beside(&later, "-wal")).unwrap();
    log.set_len(limits::LOG_BYTES / 2).unwrap();
    let store = Store::open(&later, Arc::new(AlwaysLive)).await.unwrap();
    assert_eq!(length(&later), limits::LOG_BYTES);
    assert_eq!(store.read(records::all::<Thing>).await.unwrap().len(), 50);
}

#[tokio::test]
async fn nobody_but_its_owner_reads_the_database_whatever_it_was_before() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("toft.db");
    let modes = || {
        let entries = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap());
        let mode = |entry: std::fs::DirEntry| entry.metadata().unwrap().permissions().mode() & 0o777;
        entries
            .map(|entry| (entry.file_name().into_string().unwrap(), mode(entry)))
            .collect::<BTreeMap<_, _>>()
    };
    let expected = ["toft.db", "toft.db-shm", "toft.db-wal"].map(|name| (name.to_owned(), 0o600));
    let store = Store::open(&path, Arc::new(AlwaysLive)).await.unwrap();
    store.write(|tx| records::insert(tx, &thing("one", &[]))).await.unwrap();
    assert_eq!(modes(), BTreeMap::from(expected.clone()));
    // As an earlier daemon under another umask would have left them, killed in the middle.
    for (name, _) in &expected {
        std::fs::set_permissions(directory.path().join(name), Permissions::from_mode(0o644)).unwrap();
    }
    let next = Store::open(&path, Arc::new(AlwaysLive)).await.unwrap();
    assert_eq!(next.read(records::all::<Thing>).await.unwrap().len(), 1);
    assert_eq!(modes(), BTreeMap::from(expected));
}

#[tokio::test]
async fn a_database_of_a_later_version_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("toft.db");
    Store::open(&path, Arc::new(AlwaysLive)).await.unwrap().close().await;
    let raw = Connection::open(&path).unwrap();
    raw.pragma_update(None, "user_version", 99).unwrap();
    drop(raw);
    let refused = Store::open(&path, Arc::new(AlwaysLive)).await.err().unwrap();
    assert_eq!(refused.code, Code::HostUnprepared);
    assert!(refused.detail.contains("99"), "{}", refused.detail);
}

#[tokio::test]
async fn what_earlier_daemons_cannot_read_is_refused_by_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("toft.db");
    Store::open(&path, Arc::new(AlwaysLive)).await.unwrap().close().await;
    // Those that know no overlays refuse what is beyond 7.
    let version: i64 =
        Connection::open(&path).unwrap().query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    assert!(version > 7, "{version}");
}

#[tokio::test]
async fn a_taken_name_is_told_from_other_trouble() {
    let (store, _directory) = filled(vec![thing("one", &[]), thing("two", &[])]).await;
    let refused = store.write(|tx| records::insert(tx, &thing("one", &[]))).await.unwrap_err();
    assert_eq!(refused.code, Code::AlreadyExists);
    let refused = store
        .write(|tx| {
            let mut two: Thing = records::resolve(tx, "two")?.unwrap();
            two.name = "one".parse().unwrap();
            records::save(tx, &mut two)
        })
        .await
        .unwrap_err();
    assert_eq!(refused.code, Code::AlreadyExists);
}

#[tokio::test]
async fn pages_follow_each_other_without_gap_or_repeat_in_every_order() {
    let things: Vec<Thing> = (0..23).map(|at| thing(&format!("n{:02}", (at * 7) % 23), &[])).collect();
    let (store, _directory) = filled(things.clone()).await;
    for sort in [Sort::CreatedAt, Sort::CreatedAtDescending, Sort::Name, Sort::NameDescending] {
        let mut names = Vec::new();
        let mut cursor = None;
        loop {
            let query = ListQuery { limit: Some(5), cursor, sort, ..ListQuery::default() };
            let page =
                store.read(move |connection| records::page::<Thing>(connection, &query)).await.unwrap();
            names.extend(page.items.iter().map(|thing| thing.name.to_string()));
            cursor = page.next_cursor;
            if cursor.is_none() {
                break;
            }
        }
        let mut wanted: Vec<String> = things.iter().map(|thing| thing.name.to_string()).collect();
        if matches!(sort, Sort::Name | Sort::NameDescending) {
            wanted.sort();
        }
        if matches!(sort, Sort::CreatedAtDescending | Sort::NameDescending) {
            wanted.reverse();
        }
        assert_eq!(names, wanted, "{sort:?}");
    }
}

#[tokio::test]
async fn a_list_that_cannot_be_is_refused_by_the_parameter() {
    let (store, _directory) = store().await;
    let cursor = Some(records::cursor("x", Sort::Name));
    let queries = [
        (ListQuery { limit: Some(0), ..ListQuery::default() }, "limit"),
        (ListQuery { limit: Some(201), ..ListQuery::default() }, "limit"),
        (ListQuery { cursor: Some("!".to_owned()), ..ListQuery::default() }, "cursor"),
        // A cursor of another order would start anywhere.
        (ListQuery { cursor, ..ListQuery::default() }, "cursor"),
        (ListQuery { label_selector: Some("a b".to_owned()), ..ListQuery::default() }, "label_selector"),
    ];
    for (query, parameter) in queries {
        let refused =
            store.read(move |connection| records::page::<Thing>(connection, &query)).await.unwrap_err();
        assert_eq!((refused.code, refused.errors[0].pointer.as_str()), (Code::InvalidRequest, parameter));
    }
}

#[tokio::test]
async fn selectors_choose_by_all_their_terms() {
    let (store, _directory) = filled(vec![
        thing("bare", &[]),
        thing("web", &[("role", "web"), ("env", "live")]),
        thing("db", &[("role", "db"), ("env", "live"), ("dot.ted/k_y", "")]),
        thing("test", &[("role", "web"), ("env", "test")]),
    ])
    .await;
    let table = [
        ("role=web", vec!["web", "test"]),
        ("role==web,env=live", vec!["web"]),
        ("role!=web", vec!["bare", "db"]),
        ("env", vec!["web", "db", "test"]),
        ("!env", vec!["bare"]),
        ("env, role!=db", vec!["web", "test"]),
        ("dot.ted/k_y=", vec!["db"]),
        ("", vec!["bare", "web", "db", "test"]),
        ("role=' OR 1", vec![]),
    ];
    for (text, wanted) in table {
        let query = ListQuery { label_selector: Some(text.to_owned()), ..ListQuery::default() };
        let page = store.read(move |connection| records::page::<Thing>(connection, &query)).await;
        match page {
            Ok(page) => {
                let names: Vec<&str> = page.items.iter().map(|thing| thing.name.as_str()).collect();
                assert_eq!(names, wanted, "{text}");
            }
            Err(cause) => assert!(wanted.is_empty() && cause.code == Code::InvalidRequest, "{text}"),
        }
    }
}

#[tokio::test]
async fn a_follower_hears_each_event_once_and_in_order() {
    let stage = Stage::new();
    let host = stage.open().await;
    let start = host.events().last();
    let mut follower = host.events().follow(Some(start)).await.unwrap();
    let reading = tokio::spawn(async move {
        let mut ids = Vec::new();
        while ids.len() < 300 {
            ids.extend(follower.next().await.unwrap().into_iter().map(|event| event.id.0));
        }
        ids
    });
    for _ in 0..3 {
        let writers: Vec<_> = (0..10)
            .map(|_| {
                let host = host.clone();
                tokio::spawn(async move { append_many(&host, 10).await })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
    }
    let ids = tokio::time::timeout(SOON, reading).await.unwrap().unwrap();
    assert_eq!(ids, (start.0 + 1..=start.0 + 300).collect::<Vec<_>>());
    host.close().await;
}

async fn append_many(host: &crate::Host, count: usize) {
    for _ in 0..count {
        let written = host.store().write(|tx| events::append(tx, "test.event", EventData::default())).await;
        written.unwrap();
    }
}

#[tokio::test]
async fn a_cursor_older_or_newer_than_the_log_has_expired() {
    let stage = Stage::new();
    let host = stage.open().await;
    append_many(&host, 3).await;
    host.store().write(|tx| Ok(tx.execute("DELETE FROM events WHERE id < 3", [])?)).await.unwrap();
    for after in [0, 1, 1_000_000] {
        let refused = host.events().page(EventId(after), 10).await.unwrap_err();
        assert_eq!(refused.code, Code::CursorExpired, "{after}");
        assert_eq!(host.events().follow(Some(EventId(after))).await.err().unwrap().code, Code::CursorExpired);
    }
    assert!(!host.events().page(EventId(2), 10).await.unwrap().is_empty());
    host.close().await;
}

#[tokio::test]
async fn the_log_is_cut_to_its_bound() {
    let (store, _directory) = store().await;
    let last = limits::EVENTS_KEPT + limits::EVENTS_CUT_EVERY;
    store
        .write(move |tx| {
            tx.execute(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1 - 1)
                 INSERT INTO events (id, kind, subject, time_ms, data) SELECT i, 'k', 's', 0, '{}' FROM n",
                [last],
            )?;
            events::append(tx, "last", EventData::default())
        })
        .await
        .unwrap();
    let count: u64 = store
        .read(|connection| Ok(connection.query_row("SELECT count(*) FROM events", [], |row| row.get(0))?))
        .await
        .unwrap();
    assert_eq!(count, limits::EVENTS_KEPT);
}

#[tokio::test]
async fn a_long_poll_ends_with_its_operation_or_its_time() {
    let stage = Stage::new();
    let host = stage.open().await;
    let new = |tx: &Tx<'_>| {
        operations::accept(
            tx,
            NewOperation { kind: "test", resources: Vec::new(), actor: &Actor::Host, cancellable: false },
        )
    };
    let id = host.store().write(new).await.unwrap().id;
    let unfinished = host.operations().one(id, Some(Duration::from_millis(20))).await.unwrap();
    assert!(!unfinished.state.is_final());
    let (waiter, waited) = (host.clone(), id);
    let waiting = tokio::spawn(async move { waiter.operations().one(waited, Some(SOON)).await });
    let outcome = Outcome::Failed(Error::new(Code::DiskFull, "no room"));
    host.store().write(move |tx| operations::finish(tx, id, outcome)).await.unwrap();
    let ended = waiting.await.unwrap().unwrap();
    assert!(ended.state.is_final());
    assert_eq!(ended.error.unwrap().code, Code::DiskFull);
    // The first end stands.
    host.store().write(move |tx| operations::finish(tx, id, Outcome::Succeeded)).await.unwrap();
    let again = host.operations().one(id, None).await.unwrap();
    assert_eq!(again.state, model::operation::OperationState::Failed);
    let refused = host.operations().cancel(&Call::by_host(), id).await.unwrap_err();
    assert_eq!((refused.code, refused.operation_id), (Code::WrongState, Some(id)));
    assert_eq!(host.operations().one(OperationId::new(), None).await.unwrap_err().code, Code::NotFound);
    host.close().await;
}

#[tokio::test]
async fn operations_are_listed_in_both_orders() {
    let stage = Stage::new();
    let host = stage.open().await;
    for _ in 0..5 {
        let made = host.store().write(|tx| {
            operations::accept(
                tx,
                NewOperation { kind: "test", resources: Vec::new(), actor: &Actor::Host, cancellable: false },
            )
        });
        made.await.unwrap();
    }
    for sort in [Sort::CreatedAt, Sort::CreatedAtDescending] {
        let first = ListQuery { limit: Some(3), sort, ..ListQuery::default() };
        let first = host.operations().list(first).await.unwrap();
        let second = ListQuery { cursor: first.next_cursor.clone(), sort, ..ListQuery::default() };
        let second = host.operations().list(second).await.unwrap();
        let ids: Vec<OperationId> =
            first.items.iter().chain(&second.items).map(|operation| operation.id).collect();
        assert_eq!(ids.len(), 5);
        assert!(ids.is_sorted() || ids.iter().rev().is_sorted());
        assert_eq!(ids.is_sorted(), sort == Sort::CreatedAt);
    }
    let sorted = ListQuery { sort: Sort::Name, ..ListQuery::default() };
    assert_eq!(host.operations().list(sorted).await.unwrap_err().code, Code::InvalidRequest);
    host.close().await;
}

#[tokio::test]
async fn a_key_belongs_to_one_caller_and_one_request() {
    let (store, _directory) = store().await;
    let first = keyed("k");
    let call = first.clone();
    store.write(move |tx| idempotency::keep(tx, &call, &"answer")).await.unwrap();
    let replay = |call: Call| store.write(move |tx| idempotency::replay::<String>(tx, &call));
    assert_eq!(replay(first.clone()).await.unwrap().as_deref(), Some("answer"));
    let other_actor = Call { actor: Actor::Token { id: TokenId::new() }, ..first.clone() };
    assert_eq!(replay(other_actor).await.unwrap(), None);
    let mut other_body = first;
    other_body.idempotency.as_mut().unwrap().fingerprint = "other".to_owned();
    assert_eq!(replay(other_body).await.unwrap_err().code, Code::IdempotencyMismatch);
}

#[tokio::test]
async fn long_work_with_a_key_is_done_once_and_says_while_it_runs() {
    let stage = Stage::new();
    let host = stage.open().await;
    let core = host.core();
    let (finish, finished) = tokio::sync::oneshot::channel();
    let long = tokio::spawn({
        let core = core.clone();
        async move { core.once(&keyed("k"), async { Ok(finished.await.unwrap()) }).await }
    });
    // `begin` fails from the moment on that the work holds the key.
    while core.underway.begin(&keyed("k")).is_ok() {
        tokio::task::yield_now().await;
    }
    let running = core.once(&keyed("k"), async { Ok(0) }).await.unwrap_err();
    assert_eq!(running.code, Code::IdempotencyRunning);
    assert!(running.code.retryable());
    let running = core.mutate(&keyed("k"), |_| Ok(0)).await.unwrap_err();
    assert_eq!(running.code, Code::IdempotencyRunning);
    let mut other = keyed("k");
    other.idempotency.as_mut().unwrap().fingerprint = "other".to_owned();
    let mismatch = core.once(&other, async { Ok(0) }).await.unwrap_err();
    assert_eq!(mismatch.code, Code::IdempotencyMismatch);
    assert_eq!(core.once(&keyed("another"), async { Ok(1) }).await.unwrap().body, 1);

    finish.send(7).unwrap();
    let first = long.await.unwrap().unwrap();
    let again = core.once(&keyed("k"), async { Ok(8) }).await.unwrap();
    assert_eq!((first.body, first.replayed, again.body, again.replayed), (7, false, 7, true));

    let failed = || async { Err::<u32, _>(Error::new(Code::MachineFailed, "no")) };
    assert_eq!(core.once(&keyed("f"), failed()).await.unwrap_err().code, Code::MachineFailed);
    assert_eq!(core.once(&keyed("f"), async { Ok(3) }).await.unwrap().body, 3, "a failure is not kept");
    host.close().await;
}

#[tokio::test]
async fn tokens_open_until_they_are_revoked_and_are_not_stored_readably() {
    let stage = Stage::new();
    let host = stage.open().await;
    let tokens = host.tokens();
    let (token, secret) = tokens.create("panel", None).await.unwrap();
    assert_eq!(tokens.verify(&secret).await.unwrap(), Actor::Token { id: token.id });
    assert_eq!(tokens.verify("toft_0").await.unwrap_err().code, Code::Unauthenticated);
    let expired = Some(model::Time::from_unix_ms(1));
    let (_, old) = tokens.create("old", expired).await.unwrap();
    assert_eq!(tokens.verify(&old).await.unwrap_err().code, Code::Unauthenticated);
    assert_eq!(tokens.list().await.unwrap().len(), 2);
    tokens.revoke(token.id).await.unwrap();
    assert_eq!(tokens.verify(&secret).await.unwrap_err().code, Code::Unauthenticated);
    assert_eq!(tokens.revoke(token.id).await.unwrap_err().code, Code::NotFound);
    host.close().await;
    let bytes = std::fs::read(stage.state_dir().join("toft.db")).unwrap();
    let digits = secret.trim_start_matches("toft_").as_bytes();
    assert!(!bytes.windows(digits.len()).any(|window| window == digits));
}

#[tokio::test]
async fn a_store_that_died_does_nothing_more() {
    struct DieAtFirst;
    impl Checkpoint for DieAtFirst {
        fn reached(&self, _point: &'static str) -> Fate {
            Fate::Die
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("toft.db");
    let store = Store::open(&path, Arc::new(DieAtFirst)).await.unwrap();
    let died = store.write(|tx| records::insert(tx, &thing("one", &[]))).await.unwrap_err();
    assert_eq!(died.code, Code::Draining);
    assert!(store.is_dead());
    let refused = store.write(|tx| records::insert(tx, &thing("two", &[]))).await.unwrap_err();
    assert_eq!(refused.code, Code::Draining);
    // What was committed before the death stays, as after a real one.
    let store = Store::open(&path, Arc::new(AlwaysLive)).await.unwrap();
    assert_eq!(store.read(records::all::<Thing>).await.unwrap().len(), 1);
}

#[tokio::test]
async fn the_version_changes_with_every_commit_whoever_makes_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("toft.db");
    let store = Store::open(&path, Arc::new(AlwaysLive)).await.unwrap();
    let first = store.version();
    assert!(first.is_some());
    store.read(records::all::<Thing>).await.unwrap();
    store.rehearse(|tx| records::insert(tx, &thing("one", &[]))).await.unwrap();
    assert_eq!(store.version(), first, "nothing was committed");
    store.write(|tx| records::insert(tx, &thing("one", &[]))).await.unwrap();
    let second = store.version();
    assert_ne!(second, first);
    let other = Store::open(&path, Arc::new(AlwaysLive)).await.unwrap();
    other.write(|tx| records::insert(tx, &thing("two", &[]))).await.unwrap();
    let third = store.version();
    assert_ne!(third, second, "another process's commits count, too");
    other.close().await;
    store.close().await;
    assert_eq!(store.version(), None);
}

#[tokio::test]
async fn a_token_that_another_process_revokes_is_worthless_at_once() {
    let stage = Stage::new();
    let host = stage.open().await;
    let (token, secret) = host.tokens().create("panel", None).await.unwrap();
    let late = model::Time::from_unix_ms(model::Time::now().unix_ms() + 40);
    let (_, passing) = host.tokens().create("passing", Some(late)).await.unwrap();
    for _ in 0..2 {
        assert_eq!(host.tokens().verify(&secret).await.unwrap(), Actor::Token { id: token.id });
    }
    let beside = crate::tokens::Tokens::open(&stage.state_dir()).await.unwrap();
    beside.revoke(token.id).await.unwrap();
    assert_eq!(host.tokens().verify(&secret).await.unwrap_err().code, Code::Unauthenticated);
    // Known or not, a token ends when its time has come.
    let ended = async {
        while host.tokens().verify(&passing).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::stage::SOON, ended).await.unwrap();
}
