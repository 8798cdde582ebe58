//! Several peers on one control socket: each is served, none makes another wait.
use std::io::ErrorKind;
use std::time::Instant;

use wire::channel::{Channel, Error};
use wire::control::{Command, Message, Notice, Reply, Request};

use crate::probe_guest;
use crate::vmm_driver::{Machine, PATIENCE, Vmm, readable};

fn hear(channel: &Channel) -> Message {
    use std::os::fd::AsFd;
    assert!(readable(channel.as_fd(), Instant::now() + PATIENCE), "the VMM says nothing");
    channel.receive().unwrap().expect("the VMM lives").0
}

#[test]
fn every_peer_hears_the_news_and_each_only_its_own_replies() {
    let mut vmm = Vmm::start();
    let other = vmm.connect();
    // Served in the order of arrival, so the answer means that the connection is known.
    other.send(&Request { id: 99, command: Command::Hello { protocol: 1 } }, &[]).unwrap();
    assert!(matches!(hear(&other), Message::Reply { id: 99, result: Ok(Reply::Hello { .. }) }));
    vmm.try_boot(Machine::new(probe_guest::path(), "spin")).unwrap();
    assert_eq!(hear(&other), Message::Notice(Notice::Booted { resets: 0 }));
    other.send(&Request { id: 100, command: Command::WatchConsole { seen: 0 } }, &[]).unwrap();
    assert!(matches!(hear(&other), Message::Reply { id: 100, result: Ok(Reply::Done) }));
    assert!(matches!(hear(&other), Message::Notice(Notice::Console { written }) if written > 0));
    vmm.wait_for_console("probe: hello");
}

#[test]
fn a_peer_that_does_not_read_is_dropped_and_nobody_waits_for_it() {
    let mut vmm = Vmm::boot(Machine::new(probe_guest::path(), "spin"));
    let deaf = vmm.connect();
    let mut sent = 0;
    let dropped = loop {
        match deaf.send(&Request { id: sent, command: Command::Stats }, &[]) {
            Ok(()) => sent += 1,
            Err(Error::Socket(cause)) => break cause,
            Err(other) => panic!("{other}"),
        }
        assert!(sent < 100_000, "the VMM queues without bound");
    };
    assert!(matches!(dropped.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{dropped}");
    assert_eq!(vmm.stats().resets, 0);
}

#[test]
fn nonsense_costs_its_sender_the_connection_and_no_one_else() {
    let mut vmm = Vmm::start();
    let rude = vmm.connect();
    rude.send(&"no request", &[]).unwrap();
    {
        use std::os::fd::AsFd;
        assert!(readable(rude.as_fd(), Instant::now() + PATIENCE), "the VMM keeps the connection");
    }
    assert!(rude.receive::<Message>().unwrap().is_none());
    assert!(vmm.command(Command::Hello { protocol: 1 }).is_ok());
}

#[test]
fn more_peers_than_the_bound_are_refused_and_their_places_come_back() {
    let mut vmm = Vmm::start();
    let hello = |channel: &Channel| -> bool {
        let sent = channel.send(&Request { id: 1, command: Command::Hello { protocol: 1 } }, &[]);
        sent.is_ok() && matches!(channel.receive::<Message>(), Ok(Some(_)))
    };
    let mut peers: Vec<Channel> = (0..7).map(|_| vmm.connect()).collect();
    assert!(peers.iter().all(hello));
    assert!(!hello(&vmm.connect()));
    peers.pop();
    // The place is free when the VMM has noticed; a command that it answered later than that tells.
    vmm.command(Command::Hello { protocol: 1 }).unwrap();
    assert!(hello(&vmm.connect()));
}
