//! Servers that go on from the memory of another, with the real daemon and VMM: each has what that one had at one moment,
//! in memory and on its disk, nobody sees what another writes, and what nobody has written is there once.
use std::collections::BTreeSet;
use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use hyper::Method;
use rustix::fs::{Advice, SeekFrom, fadvise};
use rustix::io::{ReadWriteFlags, preadv2};
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{MEMORY_BYTES, Orders, Stage, wait_for};
use crate::restores::{IMAGE, act, ledger, reaches};
use crate::world::inside;

const CLONES: usize = 6;

const WARM: usize = 2;

/// Kilobytes that belong to a process alone and that it has written.
fn private_dirty_kb(pid: i32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("a process's memory");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).expect("a figure");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

async fn many_from_one() {
    let stage = Stage::new();
    // The first of them are made of VMMs that wait, the others as they come.
    stage.open_well_with(Orders { warm_shells: WARM, ..Orders::default() }).await;
    stage.import_another(IMAGE, "ledger=20").await;
    let spec = json!({ "name": "web1", "image": IMAGE, "memory_bytes": MEMORY_BYTES });
    let accepted = stage.call(Method::POST, "/v1/servers", "make", Some(spec)).await;
    stage.succeeded(&accepted.operation()).await.unwrap();
    let first = text(&accepted.body["resource"]["id"]);
    reaches(&stage, &first, 20, 20).await;
    let taken = json!({ "name": "then", "memory": true });
    let path = format!("/v1/servers/{first}/actions/snapshot");
    let snapshot = stage.call(Method::POST, &path, "take", Some(taken)).await;
    stage.succeeded(&snapshot.operation()).await.unwrap();
    let snapshot = text(&snapshot.body["resource"]["id"]);
    let (moment, _) = ledger(&stage, &first).await.last().copied().expect("an entry");
    reaches(&stage, &first, moment + 20, 0).await;

    let shells = || -> Vec<i32> {
        let vmms = stage.vmms().into_iter();
        vmms.filter(|(label, _)| label.starts_with("shell-")).map(|(_, pid)| pid).collect()
    };
    let waiting = async || Some(shells()).filter(|found| found.len() == WARM);
    let waiting = wait_for("VMMs that wait", waiting).await.unwrap();
    let path = format!("/v1/snapshots/{snapshot}/actions/clone");
    let begun = Instant::now();
    let body = json!({ "name": "twin", "count": CLONES, "labels": { "of": "web1" } });
    let answer = stage.call(Method::POST, &path, "clone", Some(body.clone())).await;
    let items = answer.body["items"].as_array().expect("items").clone();
    assert_eq!(items.len(), CLONES);
    for item in &items {
        stage.knows(&text(&item["server_id"]));
        stage.succeeded(&text(&item["operation"]["id"])).await.unwrap();
    }
    println!("{CLONES} clones after {} ms", begun.elapsed().as_millis());
    let again = stage.call(Method::POST, &path, "clone", Some(body)).await;
    assert!(again.replayed && again.body["items"].as_array().is_some_and(|items| items.len() == CLONES));

    let mut apart: BTreeSet<(String, String)> = BTreeSet::new();
    let parent = stage.api().get(&format!("/v1/servers/{first}")).await;
    let addresses = |server: &Value| (text(&server["nics"][0]["mac"]), text(&server["nics"][0]["ipv4"]));
    apart.insert(addresses(&parent));
    for item in &items {
        let id = text(&item["server_id"]);
        let all = reaches(&stage, &id, 0, 20).await;
        assert!(all[0].0 <= moment + 1, "it went on from {all:?}, and the moment was {moment}");
        let server = stage.api().get(&format!("/v1/servers/{id}")).await;
        assert_eq!((&server["state"], &server["identity"]), (&json!("running"), &json!("unchanged")));
        assert_eq!(server["labels"]["of"], "web1");
        assert!(apart.insert(addresses(&server)), "{server}");
    }
    let vmms = stage.vmms();
    let taken = vmms.iter().filter(|(name, pid)| name.starts_with("twin") && waiting.contains(pid));
    assert_eq!(taken.count(), WARM, "{vmms:?}");
    for (name, pid) in vmms.iter().filter(|(name, _)| name.starts_with("twin")) {
        println!("{name}: {} kB private and dirty", private_dirty_kb(*pid));
    }
    // Once all run, nothing holds the snapshot: its file goes with the last of them.
    let gone = stage.call(Method::DELETE, &format!("/v1/snapshots/{snapshot}"), "drop", None).await;
    stage.succeeded(&gone.operation()).await.unwrap();
    let last = text(&items[CLONES - 1]["server_id"]);
    let entries = ledger(&stage, &last).await.len();
    reaches(&stage, &last, 0, entries + 10).await;

    // A clone is a server as any other: it hibernates, a snapshot is taken of it, and it goes back to that.
    act(&stage, &last, "hibernate", "sleep", json!({})).await;
    act(&stage, &last, "start", "wake", json!({})).await;
    let entries = ledger(&stage, &last).await.len();
    reaches(&stage, &last, 0, entries + 5).await;
    let taken = json!({ "name": "later", "memory": true });
    let path = format!("/v1/servers/{last}/actions/snapshot");
    let later = stage.call(Method::POST, &path, "take-later", Some(taken)).await;
    stage.succeeded(&later.operation()).await.unwrap();
    let path = format!("/v1/snapshots/{}/actions/clone", text(&later.body["resource"]["id"]));
    let answer = stage.call(Method::POST, &path, "clone-later", Some(json!({ "name": "grandchild" }))).await;
    stage.succeeded(&answer.operation()).await.unwrap();
    let id = text(&answer.body["items"][0]["server_id"]);
    stage.knows(&id);
    reaches(&stage, &id, 0, 10).await;
    // And the first one never noticed.
    let all = ledger(&stage, &first).await;
    assert!(all.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1));
    stage.close().await;
}

#[test]
fn clones_share_a_moment_and_nothing_after_it() {
    inside("clones::clones_share_a_moment_and_nothing_after_it", many_from_one());
}

/// Memory that its guest has written and will not look at again.
const WRITTEN_BYTES: u64 = 8 << 20;

/// Pages that a processor has just brought in are in its hands for a while, and stay when the cache is emptied: so many at most (the
/// kernel's `PAGEVEC_SIZE`, since 6.12 31).
const LEFT_MAX: usize = 31;

/// Whether a page of a file can be read without the disk. To look brings it in: each can be looked at once.
fn is_cached(file: &File, at: u64) -> bool {
    preadv2(file, &mut [IoSliceMut::new(&mut [0])], at, ReadWriteFlags::NOWAIT).is_ok()
}

async fn what_was_used() {
    let stage = Stage::new();
    stage.open_well().await;
    stage.import_another(IMAGE, "mem=8 ledger=20").await;
    let spec = json!({ "name": "web1", "image": IMAGE, "memory_bytes": MEMORY_BYTES });
    let accepted = stage.call(Method::POST, "/v1/servers", "make", Some(spec)).await;
    stage.succeeded(&accepted.operation()).await.unwrap();
    let first = text(&accepted.body["resource"]["id"]);
    reaches(&stage, &first, 5, 5).await;
    act(&stage, &first, "snapshot", "take", json!({ "name": "then", "memory": true })).await;
    let snapshot = async || stage.api().get("/v1/snapshots?name=then").await["items"][0].clone();
    let id = text(&snapshot().await["id"]);
    assert_eq!(snapshot().await["working_set_bytes"], Value::Null, "nobody has gone on from it");

    let path = format!("/v1/snapshots/{id}/actions/clone");
    let clone = async |name: &str| {
        let answer = stage.call(Method::POST, &path, name, Some(json!({ "name": name, "count": 1 }))).await;
        stage.succeeded(&answer.operation()).await.unwrap();
        stage.knows(&text(&answer.body["items"][0]["server_id"]));
    };
    clone("one").await;
    let known = async || snapshot().await["working_set_bytes"].as_u64();
    let used_bytes = wait_for("what the first clone used", known).await.unwrap();
    println!("a clone has used {used_bytes} bytes");
    assert!((4096..WRITTEN_BYTES / 2).contains(&used_bytes), "{used_bytes}");

    // Whether what the list says was read ahead for the next one is seen by pages that no clone looks at by itself.
    let directory = stage.scratch("state/snapshots").join(&id);
    let memory = File::open(directory.join("machine.memory")).expect("its memory");
    memory.sync_all().expect("written pages");
    fadvise(&memory, 0, None, Advice::Random).expect("a file that is read page by page");
    // What is being read is not forgotten, so that is waited for.
    let forget = |looked_at: &[u64]| {
        looked_at.iter().for_each(|at| memory.read_exact_at(&mut [0], *at).expect("a page"));
        fadvise(&memory, 0, None, Advice::DontNeed).expect("a cache to be emptied");
    };
    let holds_data = |at: &u64| rustix::fs::seek(&memory, SeekFrom::Data(*at)).is_ok_and(|data| data == *at);
    let pages = (0..MEMORY_BYTES).step_by(4096).filter(holds_data);
    forget(&[]);
    let cold: Vec<u64> = pages.filter(|at| !is_cached(&memory, *at)).collect();
    assert!(cold.len() as u64 * 4096 >= WRITTEN_BYTES / 2, "only {} pages are out of the cache", cold.len());

    forget(&cold);
    clone("two").await;
    let read = cold.iter().filter(|at| is_cached(&memory, **at)).count();
    assert!(read * 10 < cold.len(), "{read} of {} pages that nobody used were read", cold.len());

    let list = json!({ "runs": [[0, MEMORY_BYTES]] });
    std::fs::write(directory.join("machine.used"), list.to_string()).expect("a list of everything");
    forget(&cold);
    clone("three").await;
    let (mut unseen, mut in_a_row) = (cold.iter(), 0);
    let last_come = async || {
        let at = unseen.next_back().expect("pages that nobody has looked at");
        in_a_row = if is_cached(&memory, *at) { in_a_row + 1 } else { 0 };
        (in_a_row > LEFT_MAX).then_some(())
    };
    wait_for("memory that is read ahead", last_come).await.unwrap();
    // Every other page is waited for; what was asked for with it is there, too, then.
    unseen.clone().step_by(2).for_each(|at| memory.read_exact_at(&mut [0], *at).expect("a page"));
    let (read, seen) = (
        unseen.clone().skip(1).step_by(2).filter(|at| is_cached(&memory, **at)).count(),
        unseen.skip(1).step_by(2).count(),
    );
    assert!(read * 10 > seen * 9, "{read} of {seen} pages were read ahead");
    assert_eq!(known().await, Some(used_bytes), "it is found out once");
    stage.close().await;
}

#[test]
fn what_the_first_clone_has_used_is_read_ahead_for_the_next() {
    inside("clones::what_the_first_clone_has_used_is_read_ahead_for_the_next", what_was_used());
}
