//! What the operation of a move tells while bytes go.
use model::EventId;
use model::server::ServerState;

use super::moves::{Ground, gone, has, slow_move, waited};
use super::*;

#[tokio::test]
async fn a_move_says_how_fast_it_goes_and_how_long_until_it_has_ended() {
    let ground = Ground::new().await;
    let (source, target) = (ground.stages[0].open().await, ground.stages[1].open().await);
    let moved = slow_move(&ground, &source, &target).await;
    waited("what is expected", async || {
        let told = source.operations().one(moved, None).await.unwrap().progress;
        told.remaining_s.is_some_and(|left_s| left_s <= 64) && told.bytes_per_s.is_some()
    })
    .await;
    source.operations().cancel(&Call::by_host(), moved).await.unwrap();
    let ended = stage::ended(&source, moved).await;
    assert!(ended.progress.bytes_done.is_some());
    assert_eq!((ended.progress.bytes_per_s, ended.progress.remaining_s), (None, None));
    gone(&target, ground.server).await;
    source.close().await;
    target.close().await;
}

#[tokio::test]
async fn a_move_of_files_goes_as_fast_as_is_asked_for_meanwhile() {
    let ground = Ground::new().await;
    let (source, target) = (ground.stages[0].open().await, ground.stages[1].open().await);
    let (call, id) = (Call::by_host(), ground.server);
    let unbound = LimitMigration::default();
    let early = source.migrations().limit(&call, id, unbound).await.unwrap_err();
    assert_eq!(early.code, Code::WrongState, "{early:?}");
    // At this speed it takes a minute.
    let moved = slow_move(&ground, &source, &target).await;
    assert_eq!(has(&source, id).await.unwrap().allowed_actions, ["limit-migration"]);
    let there = target.migrations().limit(&call, id, unbound).await.unwrap_err();
    assert_eq!(there.code, Code::WrongState, "{there:?}");
    let bad = LimitMigration { bandwidth_bytes_per_s: Some(1), ..unbound };
    assert_eq!(source.migrations().limit(&call, id, bad).await.unwrap_err().code, Code::Invalid);
    let keyed = stage::keyed("faster");
    let faster = source.migrations().limit(&keyed, id, unbound).await.unwrap();
    assert_eq!((faster.body.state, faster.replayed), (ServerState::Moving, false));
    assert!(source.migrations().limit(&keyed, id, unbound).await.unwrap().replayed);
    stage::succeeded(&source, moved).await;
    stage::until(&target, id, |server| server.state == ServerState::Stopped).await;
    let told = source.events().page(EventId(0), 1000).await.unwrap();
    let reasons = told.iter().filter(|event| event.kind == "server.migration_limited");
    let reasons: Vec<_> = reasons.filter_map(|event| event.data.reason.as_deref()).collect();
    assert_eq!(reasons, ["it goes on as fast as it can, and its guest may stand still for 50 ms"]);
    source.close().await;
    target.close().await;
}
