//! Many at once: servers that move together, and strangers that only hold connections.
use futures_util::future::join_all;
use model::server::ServerState;
use wire::peer::Message;

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
    let taken: Vec<_> =
        std::iter::from_fn(|| pair.target.migrations().coming.clone().try_acquire_owned().ok()).collect();
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
    let again: Vec<_> =
        std::iter::from_fn(|| pair.target.migrations().coming.clone().try_acquire_owned().ok()).collect();
    assert_eq!(again.len(), limits::MOVES_MAX);
    pair.close().await;
}

#[tokio::test]
async fn who_only_connects_keeps_nobody_out() {
    let pair = Pair::new(Stage::new()).await;
    let made = pair.ticket().await.ticket;
    let mut crowd = silent(pair.address, limits::STRANGERS_MAX).await;
    // One that has shown its ticket is not one of them, however many come behind it.
    let mut known = greeted(&pair).await;
    let (host, program) = ("source".to_owned(), "1".to_owned());
    let secret = made.split_once('.').unwrap().1.to_owned();
    known.send(&Message::Greet { host, program, ticket: secret }).await.unwrap();
    assert!(matches!(known.message(SOON).await, Ok(Message::Welcome { .. })));
    for mut oldest in std::mem::replace(&mut crowd, silent(pair.address, limits::STRANGERS_MAX).await) {
        let read = tokio::time::timeout(SOON, oldest.read(&mut [0])).await.expect("it is closed");
        assert_eq!(read.unwrap_or(0), 0);
    }
    let planned = pair.plan(&made).await;
    assert!(planned.is_ok(), "{planned:?}");
    known.send(&Message::Say(wire::peer::Saying::Abort)).await.unwrap();
    assert!(matches!(known.message(SOON).await, Ok(Message::Refuse { .. })), "it was closed with the crowd");
    pair.close().await;
}

#[tokio::test]
async fn nothing_long_is_read_from_who_has_shown_no_ticket() {
    let pair = Pair::new(Stage::new()).await;
    for (bytes, is_heard) in [(3000, true), (limits::STRANGER_FRAME_BYTES, false)] {
        let mut link = greeted(&pair).await;
        let (host, program) = ("h".repeat(bytes), "1".to_owned());
        let sent = link.send(&Message::Greet { host, program, ticket: "0".repeat(64) }).await;
        let answered = link.message(SOON).await;
        assert_eq!(
            matches!(answered, Ok(Message::Refuse { .. })),
            is_heard,
            "{bytes}: {sent:?} {answered:?}"
        );
    }
    pair.close().await;
}

#[tokio::test]
async fn what_another_host_says_to_people_is_of_bounded_length_and_plain() {
    let (near, far) = tokio::io::duplex(1 << 20);
    let (mut near, mut far) = (link::Link::new(near), link::Link::new(far));
    let detail = format!("no\x1b[2J\r\nroom {}", "x".repeat(100_000));
    near.send(&Message::Refuse { detail }).await.unwrap();
    let Ok(Message::Refuse { detail }) = far.message(SOON).await else { panic!("not what was sent") };
    assert!(detail.starts_with("no [2J  room xxx"), "{}", &detail[..40]);
    assert_eq!(detail.chars().count(), limits::TEXT_CHARS_MAX);
}
