//! One action on many servers, on fakes.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use model::server::{BulkActions, CreateServer, ServerState};
use model::{Code, Labels};

use super::{START, stop};
use crate::stage::{Stage, created, import, keyed, server, succeeded};
use crate::{Call, Checkpoint, Fate, Host};

fn labelled(name: &str, env: &str) -> CreateServer {
    let labels = std::collections::BTreeMap::from([("env".to_owned(), env.to_owned())]);
    CreateServer { labels: Labels::try_from(labels).unwrap(), ..server(name) }
}

fn off(spec: CreateServer) -> CreateServer {
    CreateServer { start: false, ..spec }
}

async fn act(host: &Host, selector: &str, action: model::server::ServerAction) -> BulkActions {
    host.servers().act_on_all(&Call::by_host(), selector.to_owned(), action).await.unwrap().body
}

#[tokio::test]
async fn each_server_with_the_labels_is_asked_and_no_other() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let one = created(&host, labelled("one", "test")).await.id;
    let two = created(&host, off(labelled("two", "test"))).await.id;
    let other = created(&host, labelled("other", "live")).await.id;
    let paused = act(&host, "env=test", model::server::ServerAction::Pause).await.items;
    assert_eq!(paused.iter().map(|item| item.server_id).collect::<Vec<_>>(), [one, two], "oldest first");
    succeeded(&host, paused[0].operation.as_ref().unwrap().id).await;
    let problem = paused[1].problem.as_ref().unwrap();
    assert_eq!((problem.code, paused[1].operation.is_none()), (Code::WrongState, true));
    assert_eq!(problem.instance, format!("/v1/servers/{two}/actions/pause"));
    assert!(problem.allowed_actions.as_ref().unwrap().contains(&"start".to_owned()));
    assert_eq!(host.servers().one(one).await.unwrap().state, ServerState::Paused);
    assert_eq!(host.servers().one(other).await.unwrap().state, ServerState::Running);
    assert_eq!(act(&host, "env=none", START).await.items, []);
    host.close().await;
}

#[tokio::test]
async fn a_selector_that_could_mean_everything_or_too_much_asks_nobody() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let refused = |selector: &str| {
        let (host, selector) = (host.clone(), selector.to_owned());
        async move {
            let refused = host.servers().act_on_all(&Call::by_host(), selector, START).await.unwrap_err();
            assert_eq!(refused.code, Code::InvalidRequest);
            refused.errors.into_iter().map(|error| (error.pointer, error.code)).next().unwrap()
        }
    };
    let at = |code: &str| ("label_selector".to_owned(), code.to_owned());
    for empty in ["", " ", ",", " , ,"] {
        assert_eq!(refused(empty).await, at("empty"), "{empty:?}");
    }
    assert_eq!(refused("a b").await, at("invalid"));
    for number in 0..=model::limits::BULK_SERVERS_MAX {
        let mut spec = off(labelled(&format!("web{number}"), "test"));
        spec.nics = Some(Vec::new());
        host.servers().create(&Call::by_host(), spec).await.unwrap();
    }
    assert_eq!(refused("env=test").await, at("too_many"));
    let operations = host.operations().list(Default::default()).await.unwrap().items;
    assert!(operations.iter().all(|operation| operation.kind != "server.start"));
    host.close().await;
}

#[tokio::test]
async fn nothing_stays_of_a_server_that_is_refused() {
    let mut stage = Stage::new();
    stage.memory_bytes = 400 << 20;
    let host = stage.open_with_image().await;
    for name in ["one", "two", "three", "four"] {
        created(&host, off(labelled(name, "test"))).await;
    }
    let items = act(&host, "env", START).await.items;
    let refused: Vec<_> = items.iter().filter_map(|item| item.problem.as_ref()).collect();
    assert!(!refused.is_empty() && refused.len() < 4, "{items:?}");
    assert!(refused.iter().all(|problem| problem.code == Code::NoCapacity));
    let operations = host.operations().list(Default::default()).await.unwrap().items;
    let started = operations.iter().filter(|operation| operation.kind == "server.start");
    assert_eq!(started.count(), 4 - refused.len());
    for item in &items {
        match &item.operation {
            Some(operation) => drop(succeeded(&host, operation.id).await),
            None => {
                let server = host.servers().one(item.server_id).await.unwrap();
                assert_eq!((server.state, server.operation_id), (ServerState::Stopped, None));
            }
        }
    }
    host.close().await;
}

/// Dies at the next commit once it is told to.
#[derive(Default)]
struct DieWhenTold(AtomicBool);

impl Checkpoint for DieWhenTold {
    fn reached(&self, point: &'static str) -> Fate {
        match point == "commit" && self.0.load(Ordering::SeqCst) {
            true => Fate::Die,
            false => Fate::Live,
        }
    }
}

#[tokio::test]
async fn a_daemon_that_dies_has_asked_all_and_tells_so_when_asked_again() {
    let stage = Stage::new();
    let checkpoint = Arc::new(DieWhenTold::default());
    let host = stage.open_watched(checkpoint.clone()).await.unwrap();
    import(&host).await;
    for name in ["one", "two", "three"] {
        created(&host, labelled(name, "test")).await;
    }
    checkpoint.0.store(true, Ordering::SeqCst);
    let selector = "env=test".to_owned();
    let died = host.servers().act_on_all(&keyed("k"), selector.clone(), stop(60)).await.unwrap_err();
    assert_eq!(died.code, Code::Draining);
    host.close().await;
    drop(host);

    let host = stage.open().await;
    created(&host, labelled("later", "test")).await;
    let answer = host.servers().act_on_all(&keyed("k"), selector, stop(60)).await.unwrap();
    assert!(answer.replayed);
    assert_eq!(answer.body.items.len(), 3, "one that came later is not touched");
    for item in answer.body.items {
        succeeded(&host, item.operation.unwrap().id).await;
        assert_eq!(host.servers().one(item.server_id).await.unwrap().state, ServerState::Stopped);
    }
    host.close().await;
}
