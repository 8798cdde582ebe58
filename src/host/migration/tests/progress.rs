//! What the operation of a move tells while bytes go.
use super::moves::{Ground, gone, slow_move, waited};
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
