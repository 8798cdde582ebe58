//! Guests that talk too much, and VMMs that a guest has taken over.
use std::path::Path;

use model::Name;
use wire::control::{Notice, Sandbox};

use super::*;
use crate::seed::Seed;
use crate::servers::{limits, machine};

/// The detail with which the walls are reported that only the VMM itself can tell.
async fn said(host: &crate::Host, id: model::ServerId) -> String {
    // A daemon that has just started takes the process up in its own time.
    let found = async {
        loop {
            match host.servers().isolation(id).await {
                Err(cause) if cause.code == Code::WrongState => tokio::task::yield_now().await,
                found => return found.unwrap(),
            }
        }
    };
    let found = tokio::time::timeout(stage::SOON, found).await.expect("the machine at hand");
    let wall = found.items.into_iter().find(|item| item.name == Item::Landlock.name());
    wall.unwrap().detail
}

#[tokio::test]
async fn a_vmm_is_believed_what_it_said_before_its_guest_ran() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let before = said(&host, id).await;
    assert_eq!(before, format!("{:?}", Some(Sandbox::default())));
    // A guest has taken it over and has it say something else, also to the next daemon.
    stage.launch.only().set_sandbox(Sandbox { seccomp: true, landlock_abi: 9, rings_restricted: true });
    assert_eq!(said(&host, id).await, before);
    host.close().await;
    drop(host);
    let host = stage.open().await;
    until(&host, id, |server| server.state == ServerState::Running).await;
    assert_eq!(said(&host, id).await, before);
    // Another machine is another process, which is asked anew.
    let stopped = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    let started = host.servers().act(&Call::by_host(), id, START).await.unwrap();
    succeeded(&host, started.body.operation.id).await;
    assert_eq!(said(&host, id).await, before);
    host.close().await;
}

#[tokio::test]
async fn an_event_of_one_kind_hides_none_of_another() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    created(&host, server("web1")).await;
    let mut log = host.events().follow(Some(host.events().last())).await.unwrap();
    let vmm = stage.launch.only();
    vmm.say(Notice::Booted { resets: 1 });
    vmm.say(Notice::DeviceFault { device: "disk0".to_owned(), detail: "nonsense".to_owned() });
    vmm.say(Notice::GuestPanicked);
    let mut wanted = vec!["server.reset", "server.device_fault", "server.guest_panicked"];
    while !wanted.is_empty() {
        let events = tokio::time::timeout(stage::SOON, log.next()).await.expect("all kinds").unwrap();
        wanted.retain(|kind| !events.iter().any(|event| event.kind == *kind));
    }
    host.close().await;
}

#[test]
fn the_seed_disk_is_not_opened_behind_a_link() {
    let servers = tempfile::tempdir().unwrap();
    let (own, elsewhere) = (servers.path().join("one"), servers.path().join("elsewhere"));
    std::fs::create_dir(&elsewhere).unwrap();
    let name: Name = "web1".parse().unwrap();
    let seed = Seed {
        server: model::ServerId::new(),
        name: &name,
        default_user: "user",
        ssh_keys: &[],
        user_data: None,
        nics: Vec::new(),
        descent: 0,
    };
    let open = |directory: &Path| machine::fresh_seed(&directory.join("seed.img"), &seed);
    std::os::unix::fs::symlink(&elsewhere, &own).unwrap();
    assert!(open(&own).is_err(), "it was opened behind a link");
    std::fs::remove_file(&own).unwrap();
    std::fs::create_dir(&own).unwrap();
    open(&own).unwrap();
}

#[tokio::test]
async fn what_a_guest_causes_at_will_is_recorded_within_bounds() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let after = host.events().last();
    let vmm = stage.launch.only();
    for fault in 0..500 {
        vmm.say(Notice::DeviceFault { device: "disk0".to_owned(), detail: format!("fault {fault}") });
    }
    // A command and its answer pass behind the notices on the same connection.
    host.servers().metrics(id).await.unwrap();
    let mut log = host.events().follow(Some(after)).await.unwrap();
    let first = tokio::time::timeout(stage::SOON, log.next()).await.unwrap().unwrap();
    assert_eq!(first[0].kind, "server.device_fault");
    assert!(host.events().last().0 - after.0 <= 2);
    host.close().await;
}

#[tokio::test]
async fn a_vmm_that_answers_nobody_is_waited_for_once_before_it_is_killed() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let vmm = stage.launch.only();
    vmm.fall_silent();
    // It is being greeted again, for which it would have longer.
    let greeted = async {
        while vmm.unanswered() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(stage::SOON, greeted).await.expect("a greeting");
    let answer = host.servers().act(&Call::by_host(), id, stop(0)).await.unwrap();
    let operation = succeeded(&host, answer.body.operation.id).await;
    let took_ms = operation.finished_at.unwrap().unix_ms() - operation.created_at.unix_ms();
    assert!(took_ms < 3 * limits::QUIT.as_millis() as i64, "{took_ms} ms");
    host.close().await;
}
