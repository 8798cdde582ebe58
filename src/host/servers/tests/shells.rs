//! VMMs that are kept ready, on fakes, through the facade.
use model::server::{CreateServer, Isolation, ServerAction, ServerState};
use model::{Code, ServerId};

use super::{START, delete, nothing_left, stop};
use crate::error::Error;
use crate::fake_vmm::Guest;
use crate::stage::{SOON, Stage, created, ended, server, succeeded, until};
use crate::{Call, Host};

async fn warm(warm_shells: usize) -> (Stage, Host) {
    let mut stage = Stage::new();
    stage.warm_shells = warm_shells;
    let host = stage.open_with_image().await;
    (stage, host)
}

/// Waits until so many can be taken, and no other has been started.
async fn ready(stage: &Stage, host: &Host, count: usize) {
    let end = tokio::time::Instant::now() + SOON;
    loop {
        let (started, ready) = (stage.launch.shells().len(), host.servers().workshop().shells.ready());
        if (started, ready) == (count, count) {
            return;
        }
        assert!(tokio::time::Instant::now() < end, "{started} are started, {ready} ready, and not {count}");
        tokio::task::yield_now().await;
    }
}

async fn act(host: &Host, id: ServerId, action: ServerAction) {
    let answer = host.servers().act(&Call::by_host(), id, action).await.unwrap();
    succeeded(host, answer.body.operation.id).await;
}

fn shells_directory_is_empty(stage: &Stage) -> bool {
    std::fs::read_dir(stage.state_dir().join("shells")).map_or(true, |entries| entries.count() == 0)
}

#[tokio::test]
async fn a_server_takes_a_vmm_that_is_ready_and_another_takes_its_place() {
    let (stage, host) = warm(2).await;
    assert!(stage.launch.alive().is_empty(), "an idle host has none");
    let first = created(&host, server("web1")).await;
    let (first, network) = (first.id, first.nics[0].network_id);
    ready(&stage, &host, 2).await;
    let waiting: Vec<i32> = stage.launch.shells().iter().map(|vmm| vmm.pid).collect();
    let end = tokio::time::Instant::now() + SOON;
    while !stage.plumbing.scene().expected.contains_key(&network) {
        assert!(tokio::time::Instant::now() < end, "nobody expects another interface");
        tokio::task::yield_now().await;
    }
    let expected = stage.plumbing.scene().expected[&network].expect("an address");
    // It would wait for a start that may never come.
    let off = created(&host, CreateServer { start: false, ..server("off") }).await;
    assert_ne!(off.nics[0].mac, expected.to_string());
    let mut spec = server("web2");
    spec.isolation = Isolation::Strict;
    let second = created(&host, spec).await;
    assert_eq!(second.nics[0].mac, expected.to_string());
    let second = second.id;
    ready(&stage, &host, 2).await;
    let taken =
        stage.launch.alive().into_iter().find(|vmm| waiting.contains(&vmm.pid) && vmm.spec().is_some());
    let taken = taken.expect("the second server has a VMM that was ready");
    let directory = stage.state_dir().join("servers").join(second.to_string());
    for file in ["control.sock", "will.json", "vmm.log"] {
        assert!(directory.join(file).exists(), "{file}");
    }
    assert_eq!(stage.launch.alive().len(), 4);
    // Why it ends is known as of any other: its group is found under its own name.
    stage.launch.run_out_of_memory(&taken);
    let failed = until(&host, second, |server| server.state_reason.is_some()).await;
    assert_eq!(failed.state_reason.unwrap().code, "out_of_memory");
    until(&host, second, |server| server.state == ServerState::Running).await;
    for id in [first, second, off.id] {
        delete(&host, id).await;
    }
    ready(&stage, &host, 2).await;
    assert_eq!(stage.launch.alive().len(), 2);
    host.close().await;
    assert!(shells_directory_is_empty(&stage));
    drop(host);
    let host = stage.open().await;
    nothing_left(&stage, &host).await;
    host.close().await;
}

#[tokio::test]
async fn what_a_server_takes_is_its_own_from_start_to_stop_and_over_a_restart_of_the_daemon() {
    let (stage, host) = warm(1).await;
    let id = created(&host, server("web1")).await.id;
    ready(&stage, &host, 1).await;
    act(&host, id, stop(0)).await;
    let waiting = stage.launch.shells()[0].pid;
    // A VMM of the real kind says nothing unless there is something to say.
    let log = stage.state_dir().join("servers").join(id.to_string()).join("vmm.log");
    std::fs::File::create(&log).unwrap();
    act(&host, id, START).await;
    let vmm = stage.launch.only();
    assert_eq!(vmm.pid, waiting);
    host.close().await;
    assert_eq!(stage.launch.alive().len(), 1, "those that are ready end with the daemon");
    drop(host);
    let host = stage.open().await;
    assert_eq!(host.servers().one(id).await.unwrap().state, ServerState::Running);
    act(&host, id, stop(0)).await;
    assert!(stage.launch.alive().is_empty());
    // What a VMM has said is kept: the next one of this server is started for it.
    std::fs::write(&log, "it said something").unwrap();
    act(&host, id, START).await;
    assert!(std::fs::read_to_string(&log).unwrap().starts_with("it said something"));
    host.close().await;
}

#[tokio::test]
async fn one_that_has_died_or_does_not_fit_costs_no_server() {
    let (stage, host) = warm(2).await;
    created(&host, server("web1")).await;
    ready(&stage, &host, 2).await;
    for vmm in stage.launch.shells() {
        vmm.kill();
        vmm.wait_for_end().await;
    }
    // They are replaced though nobody asks for a server.
    ready(&stage, &host, 2).await;
    for vmm in stage.launch.shells() {
        vmm.kill();
        vmm.wait_for_end().await;
    }
    let server2 = created(&host, server("web2")).await;
    assert_eq!(server2.state, ServerState::Running);
    ready(&stage, &host, 2).await;
    // A machine that cannot be built is told as ever, and leaves nothing.
    stage.launch.set_guest(Guest::CannotBoot);
    for vmm in stage.launch.shells() {
        vmm.kill();
        vmm.wait_for_end().await;
    }
    for at in 0..4 {
        let spec = server(&format!("bad{at}"));
        let accepted = host.servers().create(&Call::by_host(), spec).await.unwrap();
        assert!(ended(&host, accepted.body.operation.id).await.error.is_some());
    }
    ready(&stage, &host, 2).await;
    assert_eq!(stage.launch.alive().len(), 4);
    host.close().await;
    assert!(shells_directory_is_empty(&stage));
}

#[tokio::test]
async fn one_that_a_dying_launcher_has_not_told_of_is_ended() {
    let (stage, host) = warm(1).await;
    created(&host, server("web1")).await;
    ready(&stage, &host, 1).await;
    stage.launch.let_launcher_die(Error::new(Code::MachineFailed, "the launcher has ended"));
    created(&host, server("web2")).await;
    let untold = async {
        loop {
            match stage.launch.untold() {
                Some(vmm) => return vmm.wait_for_end().await,
                None => tokio::task::yield_now().await,
            }
        }
    };
    tokio::time::timeout(SOON, untold).await.expect("the end of what nobody knows");
    created(&host, server("web3")).await;
    ready(&stage, &host, 1).await;
    host.close().await;
    assert!(shells_directory_is_empty(&stage));
}
