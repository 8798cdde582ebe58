//! Servers that go back to a snapshot or hibernate, with the real daemon and VMM and a guest that keeps the same ledger in its
//! memory and on its disk: whatever moment they are of, both are of the same, and its clock is right.
use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{MEMORY_BYTES, Stage, wait_for};
use crate::live::{count, counting};
use crate::world::inside;

pub(crate) const IMAGE: &str = "ledger";

/// How far after the moment the first entry is that counts. One line may be of two halves: where the machine that ended was
/// cut off, and where the guest was in its line at the moment.
const FIRST: u64 = 3;

/// An entry of a guest's ledger: its number, and the guest's clock in nanoseconds.
pub(crate) type Entry = (u64, u64);

pub(crate) async fn ledger(stage: &Stage, id: &str) -> Vec<Entry> {
    let answer = stage.api().read(&format!("/v1/servers/{id}/console-log")).await.expect("an answer");
    // A clone's console has nothing on it before its first word.
    let log = answer.body.as_str().unwrap_or_default();
    // A guest that stands still may have half written the last one: its number, and a part of its time.
    let log = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    assert!(!log.contains("FAILED") && !log.contains("broken"), "{log}");
    let entry = |line: &str| -> Option<Entry> {
        let (number, ns) = line.trim().strip_prefix("probe: ledger ")?.split_once(" ns=")?;
        Some((number.parse().ok()?, ns.parse().ok()?))
    };
    log.lines().filter_map(entry).collect()
}

/// Waits until the last entry is at least this one and there are so many in all.
pub(crate) async fn reaches(stage: &Stage, id: &str, number: u64, entries: usize) -> Vec<Entry> {
    let look = async || {
        let all = ledger(stage, id).await;
        (all.len() >= entries && all.last().is_some_and(|(last, _)| *last >= number)).then_some(all)
    };
    wait_for("the ledger's next entries", look).await.unwrap()
}

pub(crate) async fn act(stage: &Stage, id: &str, action: &str, key: &str, body: Value) -> Value {
    let path = format!("/v1/servers/{id}/actions/{action}");
    let answer = stage.call(Method::POST, &path, key, Some(body)).await;
    stage.succeeded(&answer.operation()).await.unwrap();
    stage.api().get(&format!("/v1/servers/{id}")).await
}

/// How far the time that a guest was away may be from how long it seemed here: it is told by the host's wall clock, which may be
/// slewed meanwhile, by half a millisecond a second.
const SLEWED: Duration = Duration::from_millis(100);

/// A server that hibernates, and when that was.
pub(crate) struct Asleep {
    /// Its last entry, and how many it had made.
    last: Entry,
    entries: usize,
    /// Before the last entry.
    not_before: Instant,
    /// When its machine was gone.
    gone: Instant,
}

/// Hibernates a server.
pub(crate) async fn falls_asleep(stage: &Stage, id: &str, key: &str) -> Asleep {
    let (last, _) = ledger(stage, id).await.last().copied().unwrap_or_default();
    // What counts further than the last entry says its time later than this.
    let not_before = Instant::now();
    reaches(stage, id, last + 10, 0).await;
    let now = act(stage, id, "hibernate", key, json!({})).await;
    assert_eq!(now["state"], "hibernated", "{now}");
    let gone = Instant::now();
    let all = ledger(stage, id).await;
    Asleep { last: all.last().copied().expect("an entry"), entries: all.len(), not_before, gone }
}

/// Starts a server, on whichever host it is. It counts on, and its clock has gone on by as much as it was away.
pub(crate) async fn wakes_with_the_right_time(stage: &Stage, id: &str, asleep: &Asleep, key: &str) {
    let Asleep { last, entries, not_before, gone } = *asleep;
    assert_eq!(ledger(stage, id).await.last(), Some(&last), "it was to stand still");
    let at_least = gone.elapsed();
    act(stage, id, "start", key, json!({})).await;
    let all = reaches(stage, id, last.0 + 10, entries + 10).await;
    let at_most = not_before.elapsed();
    // The first may have read its clock before the guest fell asleep, and say so only now.
    let next = all[entries + 1];
    assert_eq!(next.0, last.0 + 2);
    let shown = next.1.checked_sub(last.1).map(Duration::from_nanos).expect("the clock does not go back");
    println!("away for {at_least:?} to {at_most:?}, by its own clock {shown:?}");
    assert!(
        shown + SLEWED > at_least && shown < at_most + SLEWED,
        "{shown:?} of {at_least:?} to {at_most:?}"
    );
    // Of all that it has said since it booted.
    assert!(all.is_sorted_by_key(|(_, ns)| ns), "its clock went back: {all:?}");
    assert_eq!(count(stage, id).boots, 1);
}

async fn sleeps_and_wakes() {
    let stage = Stage::new();
    stage.open_well().await;
    stage.import_another(IMAGE, "ledger=20").await;
    let [id, awake] = [counting(&stage, "web1").await, counting(&stage, "awake").await];
    for round in 0..2 {
        let asleep = falls_asleep(&stage, &id, &format!("sleep-{round}")).await;
        assert!(!stage.vmms().contains_key("web1"));
        // No daemon that saw it go needs to be there when it comes back.
        if round == 1 {
            stage.kill().await;
            stage.open_well().await;
        }
        // Two seconds at least, by a guest that is not away.
        let last = count(&stage, &awake).last;
        reaches(&stage, &awake, last + 100, 0).await;
        wakes_with_the_right_time(&stage, &id, &asleep, &format!("wake-{round}")).await;
    }
    stage.close().await;
}

#[test]
fn a_hibernated_server_goes_on_where_it_was_with_the_right_time() {
    inside("restores::a_hibernated_server_goes_on_where_it_was_with_the_right_time", sleeps_and_wakes());
}

/// A server that shares holds its files of the snapshot and of those below it, and nobody's else.
async fn holds_its_own(stage: &Stage, id: &str) {
    let walls = stage.api().get(&format!("/v1/servers/{id}/isolation")).await["items"].clone();
    let holds = |item: &&Value| item["name"] == "descriptors";
    let descriptors = walls.as_array().and_then(|items| items.iter().find(holds)).expect("the item");
    assert_eq!(descriptors["stands"], true, "{descriptors}");
}

async fn back_and_back_again() {
    let stage = Stage::new();
    stage.open_well().await;
    stage.import_another(IMAGE, "ledger=20").await;
    let spec = json!({ "name": "web1", "image": IMAGE, "memory_bytes": MEMORY_BYTES });
    let accepted = stage.call(Method::POST, "/v1/servers", "make", Some(spec)).await;
    stage.succeeded(&accepted.operation()).await.unwrap();
    let id = text(&accepted.body["resource"]["id"]);
    reaches(&stage, &id, 20, 20).await;
    // What it goes back to is new since another one, which is deleted, but for what is needed of it.
    act(&stage, &id, "snapshot", "take-base", json!({ "name": "base", "memory": true })).await;
    let last = ledger(&stage, &id).await.last().map_or(0, |(last, _)| *last);
    // What counts further than the last entry says its time later than this.
    let not_before = Instant::now();
    reaches(&stage, &id, last + 10, 0).await;
    let spec = json!({ "name": "then", "memory": true, "incremental": true });
    act(&stage, &id, "snapshot", "take", spec).await;
    let snapshot = stage.api().get("/v1/snapshots?name=then").await["items"][0].clone();
    let base = text(&snapshot["parent_id"]);
    assert!(snapshot["inherited_bytes"].as_u64() > Some(0), "{snapshot}");
    let gone = stage.call(Method::DELETE, &format!("/v1/snapshots/{base}"), "drop-base", None).await;
    stage.succeeded(&gone.operation()).await.unwrap();
    let left = std::fs::read_dir(stage.scratch("state/snapshots").join(&base)).expect("what is needed of it");
    assert!(left.count() <= 2, "the deleted one's state is kept");
    let at_moment = ledger(&stage, &id).await.last().copied().expect("an entry");
    let taken = Instant::now();
    let before = stage.api().get(&format!("/v1/servers/{id}")).await;

    for round in 0..3 {
        // Far enough for what is on the disk to be another than the snapshot's.
        reaches(&stage, &id, at_moment.0 + 30, 0).await;
        let entries = ledger(&stage, &id).await.len();
        let vmm = stage.vmms()["web1"];
        let begun = Instant::now();
        let now = act(
            &stage,
            &id,
            "restore",
            &format!("back-{round}"),
            json!({ "snapshot": "then", "stop": true }),
        )
        .await;
        println!("round {round}: back after {} ms", begun.elapsed().as_millis());
        assert_ne!(stage.vmms()["web1"], vmm);
        for member in ["state", "name", "nics", "vcpus", "memory_bytes"] {
            assert_eq!(now[member], before[member]);
        }
        assert_eq!(now["shares_memory_of"], snapshot["id"]);
        holds_its_own(&stage, &id).await;
        let all = reaches(&stage, &id, 0, entries + 12).await;
        let (again, clock_ns) = all[entries..]
            .windows(3)
            .find_map(|next| (next[1].0 < next[0].0).then_some(next[2]))
            .or_else(|| all.get(entries + 1).copied())
            .expect("an entry after the restore");
        assert!(again <= at_moment.0 + FIRST, "it went on from {again}, and the moment was {at_moment:?}");
        // The guest's clock has not stood still meanwhile.
        let shown = clock_ns.checked_sub(at_moment.1).expect("the clock does not go back");
        let (shown, at_most) = (Duration::from_nanos(shown), not_before.elapsed());
        let at_least = begun.duration_since(taken);
        assert!(
            shown <= at_most && shown + Duration::from_secs(1) > at_least,
            "{shown:?} of {at_least:?} to {at_most:?}"
        );
    }

    // Its memory is the snapshot's files' until a snapshot is taken of it in its turn; it can hibernate as it is.
    act(&stage, &id, "snapshot", "take-again", json!({ "name": "again", "memory": true })).await;
    assert_eq!(stage.api().get(&format!("/v1/servers/{id}")).await["shares_memory_of"], Value::Null);
    for name in ["then", "again"] {
        let back = json!({ "snapshot": name, "stop": true });
        act(&stage, &id, "restore", &format!("back-to-{name}"), back).await;
        let entries = ledger(&stage, &id).await.len();
        let (last, _) = reaches(&stage, &id, 0, entries + 12).await[entries + 11];
        act(&stage, &id, "hibernate", &format!("sleep-{name}"), json!({})).await;
        let now = act(&stage, &id, "start", &format!("wake-{name}"), json!({})).await;
        assert_eq!((&now["state"], &now["shares_memory_of"]), (&json!("running"), &Value::Null));
        let entries = ledger(&stage, &id).await.len();
        let all = reaches(&stage, &id, 0, entries + 12).await;
        assert!(all[entries + 1].0 > last, "it went on from {}, and had come to {last}", all[entries + 1].0);
    }

    // Of its disk alone it starts afresh; off, it stays off.
    act(&stage, &id, "snapshot", "take-disk", json!({ "name": "disk" })).await;
    let now = act(&stage, &id, "restore", "disk", json!({ "snapshot": "disk", "stop": true })).await;
    assert_eq!(now["state"], "running");
    let begins = async || ledger(&stage, &id).await.last().is_some_and(|(last, _)| *last < 10).then_some(());
    wait_for("a ledger that begins anew", begins).await.unwrap();
    act(&stage, &id, "stop", "off", json!({ "grace_s": 0 })).await;
    let now = act(&stage, &id, "restore", "off-disk", json!({ "snapshot": "disk" })).await;
    assert_eq!(now["state"], "stopped");
    // And from there to the memory of a moment long ago.
    let entries = ledger(&stage, &id).await.len();
    let now = act(&stage, &id, "restore", "off-memory", json!({ "snapshot": "then" })).await;
    assert_eq!(now["state"], "running");
    let all = reaches(&stage, &id, 0, entries + 12).await;
    let again = all[entries + 1].0;
    assert!(again <= at_moment.0 + FIRST, "it went on from {again}, and the moment was {at_moment:?}");
    // Which it holds on to when there is no record of either snapshot.
    let then = format!("/v1/snapshots/{}", text(&snapshot["id"]));
    let gone = stage.call(Method::DELETE, &then, "drop-then", None).await;
    stage.succeeded(&gone.operation()).await.unwrap();
    assert!(!stage.scratch("state/snapshots").join(&base).exists(), "what nobody's list names is kept");
    holds_its_own(&stage, &id).await;
    reaches(&stage, &id, again + 20, 0).await;
    stage.close().await;
}

#[test]
fn memory_and_disk_are_of_one_moment_however_often_a_server_goes_back() {
    inside(
        "restores::memory_and_disk_are_of_one_moment_however_often_a_server_goes_back",
        back_and_back_again(),
    );
}
