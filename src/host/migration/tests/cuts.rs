//! The connection of a move is cut after so many bytes, in either direction, and comes back.
use tokio::io::{AsyncReadExt, copy, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use super::moves::{Ground, comes_to_rest, listening, owners};
use super::*;

/// Bytes between two cuts that are tried: less than the handshake and the longer messages have.
const STEP: u64 = 397;

/// Passes on what goes between two hosts. The connection `cut`, of which 1 is that of the move, is cut when so many bytes have
/// gone in a direction: to the target, or to the source. Answers where it waits.
pub(super) async fn cable(
    to: SocketAddr,
    cut: usize,
    is_to_source: bool,
    most: u64,
) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let passing = tokio::spawn(async move {
        // With the cable, all that goes over it ends.
        let mut connections = JoinSet::new();
        for number in 0_usize.. {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(to).await.unwrap();
            if number != cut {
                connections.spawn(async move {
                    let _ = copy_bidirectional(&mut near, &mut far).await;
                });
                continue;
            }
            connections.spawn(async move {
                let ((near_in, mut near_out), (far_in, mut far_out)) = (near.split(), far.split());
                let (out_most, in_most) = if is_to_source { (u64::MAX, most) } else { (most, u64::MAX) };
                let (mut near_in, mut far_in) = (near_in.take(out_most), far_in.take(in_most));
                // Whichever way ends first takes the other along.
                tokio::select! {
                    _ = copy(&mut near_in, &mut far_out) => {}
                    _ = copy(&mut far_in, &mut near_out) => {}
                }
            });
        }
    });
    (address, passing)
}

/// One move over a cable that is cut. Answers whether the server has moved all the same.
async fn moved_over(is_to_source: bool, most: u64) -> bool {
    let ground = Ground::new().await;
    let hosts = [ground.stages[0].open().await, ground.stages[1].open().await];
    let (address, passing) = cable(listening(&hosts[1]).await, 1, is_to_source, most).await;
    let made = ticket(&hosts[1], None).await.unwrap().ticket;
    let asked = hosts[0].migrations().migrate(&Call::by_host(), ground.server, spec(address, made)).await;
    let operation = asked.unwrap().body.operation.id;
    assert!(owners([&hosts[0], &hosts[1]], ground.server).await <= 1, "both have it");
    let at = comes_to_rest(&ground, &hosts, &format!("cut after {most}")).await;
    let operation = stage::ended(&hosts[0], operation).await;
    assert_eq!(
        operation.state == model::operation::OperationState::Succeeded,
        at == 1,
        "{most}: {operation:?}"
    );
    passing.abort();
    for host in hosts {
        host.close().await;
    }
    at == 1
}

/// Tries cuts until a move takes no notice; answers how many there were, and how often it had moved all the same.
async fn cut_everywhere(is_to_source: bool) -> (u64, u64) {
    let (mut cuts, mut moved, mut in_a_row) = (0, 0, 0);
    // A cut behind the source's commit is not noticed either, so some more are tried.
    while in_a_row < 6 {
        let has_moved = moved_over(is_to_source, cuts * STEP).await;
        cuts += 1;
        moved += u64::from(has_moved);
        in_a_row = if has_moved { in_a_row + 1 } else { 0 };
    }
    (cuts, moved)
}

#[tokio::test]
async fn wherever_the_way_to_the_target_is_cut_one_host_has_the_server() {
    let (cuts, moved) = cut_everywhere(false).await;
    println!("{cuts} cuts on the way to the target, {moved} times it moved");
    assert!(cuts > 15, "{cuts}");
}

#[tokio::test]
async fn wherever_the_way_to_the_source_is_cut_one_host_has_the_server() {
    let (cuts, moved) = cut_everywhere(true).await;
    println!("{cuts} cuts on the way to the source, {moved} times it moved");
    assert!(cuts > 8, "{cuts}");
}
