//! The daemon dies at every checkpoint of a server's whole life, one after the other, and a client that repeats its
//! calls with their keys never notices: every call is carried out once and nothing is left over.
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use model::operation::OperationState;
use model::server::{DeleteServer, ServerAction, ServerState, StopServer};
use model::{Code, ServerId};

use super::nothing_left;
use crate::stage::{SOON, Stage, keyed, server, until};
use crate::{Checkpoint, Fate, Host, Result};

/// Dies at the checkpoint of this number and lets all others pass.
struct DieAt {
    number: u32,
    passed: AtomicU32,
    points: std::sync::Mutex<BTreeSet<&'static str>>,
}

impl Checkpoint for DieAt {
    fn reached(&self, point: &'static str) -> Fate {
        self.points.lock().unwrap().insert(point);
        let number = self.passed.fetch_add(1, Ordering::SeqCst) + 1;
        if number == self.number { Fate::Die } else { Fate::Live }
    }
}

/// What the client does, in order, and what the server is afterwards.
const LIFE: &[(&str, Option<ServerState>)] = &[
    ("create", Some(ServerState::Running)),
    ("pause", Some(ServerState::Paused)),
    ("resume", Some(ServerState::Running)),
    ("reset", Some(ServerState::Running)),
    ("reboot", Some(ServerState::Running)),
    ("stop", Some(ServerState::Stopped)),
    ("start", Some(ServerState::Running)),
    ("delete", None),
];

async fn call(host: &Host, verb: &str, id: Option<ServerId>) -> Result<(model::OperationId, ServerId)> {
    let servers = host.servers();
    let grace = |grace_s| StopServer { grace_s };
    let action = match verb {
        "pause" => ServerAction::Pause,
        "resume" => ServerAction::Resume,
        "reset" => ServerAction::Reboot(grace(0)),
        "reboot" => ServerAction::Reboot(grace(60)),
        "stop" => ServerAction::Stop(grace(60)),
        _ => ServerAction::Start,
    };
    let answer = match (verb, id) {
        ("create", _) => servers.create(&keyed(verb), server("web1")).await?,
        ("delete", Some(id)) => servers.delete(&keyed(verb), id, DeleteServer::default()).await?,
        (_, Some(id)) => servers.act(&keyed(verb), id, action).await?,
        (_, None) => panic!("{verb} needs a server"),
    };
    Ok((answer.body.operation.id, answer.body.resource.expect("a server").id))
}

/// One call, carried through: repeated with its key until it is answered, then waited for.
async fn carried_out(host: &Host, verb: &str, id: Option<ServerId>) -> Result<ServerId> {
    let (operation, id) = call(host, verb, id).await?;
    let deadline = tokio::time::Instant::now() + SOON;
    let operation = loop {
        // A daemon that has died wakes nobody, so the wait is cut short to find out.
        let found = host.operations().one(operation, Some(Duration::from_millis(50))).await?;
        if found.state.is_final() || tokio::time::Instant::now() > deadline {
            break found;
        }
    };
    assert_eq!(operation.state, OperationState::Succeeded, "{verb}: {operation:?}");
    Ok(id)
}

/// Lives the whole life with a daemon that dies at checkpoint `number`. Answers whether it died.
async fn live(number: u32, points: &mut BTreeSet<&'static str>) -> bool {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    host.close().await;
    drop(host);
    let checkpoint = Arc::new(DieAt { number, passed: AtomicU32::new(0), points: Default::default() });
    let mut died = false;
    let mut host = match stage.open_watched(checkpoint.clone()).await {
        Ok(host) => host,
        Err(cause) => {
            assert_eq!(cause.code, Code::Draining, "{}", cause.chain());
            died = true;
            stage.open().await
        }
    };
    let mut id = None;
    for (verb, state) in LIFE {
        loop {
            match carried_out(&host, verb, id).await {
                Ok(served) => {
                    id = Some(served);
                    break;
                }
                Err(cause) if cause.code == Code::Draining && !died => {
                    died = true;
                    host.close().await;
                    drop(host);
                    host = stage.open().await;
                }
                Err(cause) => panic!("checkpoint {number}, {verb}: {}", cause.chain()),
            }
        }
        if let (Some(state), Some(id)) = (state, id)
            && !host_is_dead(&host, died)
        {
            until(&host, id, |server| server.state == *state && server.operation_id.is_none()).await;
            let machines = stage.launch.alive().len();
            let wanted = if *state == ServerState::Stopped { 0 } else { 1 };
            assert_eq!(machines, wanted, "checkpoint {number}, after {verb}");
            assert_eq!(stage.plumbing.scene().taps.len(), wanted, "checkpoint {number}, after {verb}");
        }
    }
    // A daemon that died behind the last answer is followed by one that cleans up.
    host.close().await;
    drop(host);
    let host = stage.open().await;
    nothing_left(&stage, &host).await;
    host.close().await;
    points.extend(checkpoint.points.lock().unwrap().iter());
    died
}

/// A daemon that dies between a call's end and the look at it cannot be looked at; the next call finds out.
fn host_is_dead(host: &Host, died: bool) -> bool {
    !died && host.is_dead()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_daemon_that_dies_anywhere_converges() {
    let mut points = BTreeSet::new();
    let mut number = 1;
    while live(number, &mut points).await {
        number += 1;
        assert!(number < 1000, "the life does not end");
    }
    println!("died at {} checkpoints of {} kinds: {points:?}", number - 1, points.len());
    assert!(number > 40, "only {number} checkpoints: the instrumentation is gone");
}
