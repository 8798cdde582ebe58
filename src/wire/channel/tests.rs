//! Documents and descriptors over a real socket pair.
use std::io::{Read, Seek, Write};

use super::*;
use crate::control::{Command, Request};

fn pair() -> (Channel, Channel) {
    let (one, other) = Socket::pair().unwrap();
    (Channel::new(one), Channel::new(other))
}

#[test]
fn a_document_arrives_with_its_descriptors() {
    let (one, other) = pair();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"kernel").unwrap();
    let request = Request { id: 7, command: Command::Hello { protocol: 1 } };
    one.send(&request, &[file.as_fd()]).unwrap();
    let (received, mut descriptors) = other.receive::<Request>().unwrap().unwrap();
    assert_eq!(received, request);
    let mut file = std::fs::File::from(descriptors.pop().unwrap());
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "kernel");
}

#[test]
fn an_event_loop_is_given_the_socket_itself() {
    let (one, other) = pair();
    assert_eq!(one.as_fd().as_raw_fd(), one.as_raw_fd());
    let same = Channel::new(Socket::from(one.as_fd().try_clone_to_owned().unwrap()));
    same.send(&Request { id: 1, command: Command::Stats }, &[]).unwrap();
    assert_eq!(other.receive::<Request>().unwrap().unwrap().0.id, 1);
}

#[test]
fn a_closed_peer_reads_as_the_end() {
    let (one, other) = pair();
    drop(one);
    assert!(other.receive::<Request>().unwrap().is_none());
}

#[test]
fn nonsense_is_an_error_and_the_next_packet_still_arrives() {
    let (one, other) = pair();
    one.send(&"not a request", &[]).unwrap();
    one.send(&Request { id: 1, command: Command::Stats }, &[]).unwrap();
    assert!(matches!(other.receive::<Request>(), Err(Error::Parse { .. })));
    assert_eq!(other.receive::<Request>().unwrap().unwrap().0.id, 1);
}

#[test]
fn a_document_longer_than_a_packet_is_not_sent() {
    let (one, _other) = pair();
    assert!(matches!(one.send(&"x".repeat(PACKET_BYTES_MAX), &[]), Err(Error::TooLong { .. })));
}
