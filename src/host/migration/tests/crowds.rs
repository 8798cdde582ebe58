//! Many at once: servers that move together, and strangers that only hold connections.
use futures_util::future::join_all;
use model::server::ServerState;

use super::moves::listening;
use super::*;

/// Connections that say nothing.
async fn silent(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    join_all((0..count).map(|_| async { TcpStream::connect(address).await.unwrap() })).await
}

#[tokio::test]
async fn as_many_servers_as_may_come_at_once_all_arrive() {
    let stages = [Stage::new(), Stage::new()];
    let source = stages[0].open_with_image().await;
    let target = stages[1].open_with_image().await;
    let make = async |number: usize| {
        let made = stage::created(&source, stage::server(&format!("web{number}"))).await;
        stage::until(&source, made.id, |server| server.state == ServerState::Running).await.id
    };
    let servers = join_all((0..limits::MOVES_MAX).map(make)).await;
    let address = listening(&target).await;
    let moves = join_all(servers.iter().map(async |id| {
        let made = ticket(&target, None).await.unwrap().ticket;
        source.migrations().migrate(&Call::by_host(), *id, spec(address, made)).await.unwrap().body.operation
    }));
    for operation in moves.await {
        stage::succeeded(&source, operation.id).await;
    }
    for id in servers {
        stage::until(&target, id, |server| server.state == ServerState::Running).await;
    }
    source.close().await;
    target.close().await;
}

#[tokio::test]
async fn one_server_too_many_is_told_so_and_comes_later() {
    let pair = Pair::new(Stage::new()).await;
    stage::import(&pair.target).await;
    let taken: Vec<_> = std::iter::from_fn(|| pair.target.migrations().places.of_move()).collect();
    assert_eq!(taken.len(), limits::MOVES_MAX);
    let migrate = async || {
        let spec = spec(pair.address, pair.ticket().await.ticket);
        pair.source.migrations().migrate(&Call::by_host(), pair.server, spec).await
    };
    assert_eq!(pair.obstacles().await, [ObstacleCode::Busy, ObstacleCode::State]);
    let refused = migrate().await.unwrap_err();
    assert_eq!((refused.code, refused.errors[0].code.as_str()), (Code::MigrationBlocked, "busy"));
    drop(taken);
    stage::succeeded(&pair.source, migrate().await.unwrap().body.operation.id).await;
    // Nothing of it is left, so as many may come as before.
    let again: Vec<_> = std::iter::from_fn(|| pair.target.migrations().places.of_move()).collect();
    assert_eq!(again.len(), limits::MOVES_MAX);
    pair.close().await;
}

#[tokio::test]
async fn a_crowd_of_strangers_is_closed_and_does_not_keep_out_who_is_waited_for() {
    let pair = Pair::new(Stage::new()).await;
    let made = pair.ticket().await.ticket;
    let mut crowd = silent(pair.address, limits::CONNECTIONS_MAX).await;
    // Each of them is served before the next one is taken, in the order in which they came.
    let mut extra = TcpStream::connect(pair.address).await.unwrap();
    let read = tokio::time::timeout(SOON, extra.read(&mut [0])).await.expect("it is closed");
    assert_eq!(read.unwrap_or(0), 0);
    let refused = pair.plan(&made).await.unwrap_err();
    assert_eq!(refused.code, Code::HostUnreachable, "{refused}");
    // Where a server comes from, it is another matter.
    let places = &pair.target.migrations().places;
    let known = places.expects(pair.address.ip());
    let again = pair.plan(&made).await;
    assert!(again.is_ok(), "{again:?}");
    drop(known);
    assert_eq!(pair.plan(&made).await.unwrap_err().code, Code::HostUnreachable);
    crowd.clear();
    let served = async || pair.plan(&made).await.ok();
    moves::waited("the strangers to be gone", async || served().await.is_some()).await;
    pair.close().await;
}
