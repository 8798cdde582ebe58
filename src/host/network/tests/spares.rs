//! Taps that wait for a server, on a real kernel.
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use model::network::NetworkKind;
use nix::net::if_::{if_nameindex, if_nametoindex};

use super::frames::Udp;
use super::ground::{Ground, PATIENCE, run};
use super::port;
use crate::network::plumbing::{Plumbing, Segment};
use crate::network::{Port, limits};

/// Its number.
fn tap(port: &Port) -> Option<u32> {
    if_nametoindex(port.tap().as_str()).ok()
}

/// Number of the tap that waits.
fn spare(ground: &Ground, segment: &Segment) -> Option<u32> {
    ground.plumbing.spare(segment.id)
}

/// The network's next interface, which has the tap that waits, if any does.
fn next(ground: &mut Ground, segment: &Segment, last: u8, name: &str) -> Port {
    let mac = ground.plumbing.promise(segment.id).expect("an interface is expected");
    let port = Port { mac, ..port(segment, last, name) };
    ground.wanted.ports.push(port.clone());
    port
}

/// Another thread removes what is not wanted any more.
async fn gone(tap: u32) {
    let end = Instant::now() + PATIENCE;
    while if_nameindex().unwrap().iter().any(|device| device.index() == tap) {
        assert!(Instant::now() < end, "it stays");
        tokio::task::yield_now().await;
    }
}

fn ruleset() -> String {
    String::from_utf8(Command::new("nft").args(["list", "ruleset"]).output().unwrap().stdout).unwrap()
}

fn switch(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap().trim().to_owned()
}

#[test]
fn a_tap_that_waits_becomes_the_next_servers_and_is_like_any_other() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "three"]).await;
        assert_eq!(switch(&format!("ipv6/conf/{}/disable_ipv6", segment.bridge)), "1", "from the beginning");
        ground.plumbing.expect(segment.clone()).await;
        assert_eq!(ground.plumbing.promise(segment.id), None, "a network without servers has one");
        let one = ground.plug(&segment, &ports[0]).await;
        ground.plumbing.expect(segment.clone()).await;
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&ground, &segment).expect("one that waits");
        let second = next(&mut ground, &segment, 9, "two");
        assert_eq!(ground.plumbing.promise(segment.id), None, "it is promised twice");
        // What looks after the network leaves it where it is, and a server that has its address already takes another.
        ground.ensure().await;
        let three = ground.plug(&segment, &ports[1]).await;
        assert_eq!(spare(&ground, &segment), Some(waits));

        let two = ground.plug(&segment, &second).await;
        assert_eq!(tap(&second), Some(waits));
        assert_eq!(spare(&ground, &segment), None);
        for port in [&ports[0], &second, &ports[1]] {
            assert_eq!(switch(&format!("ipv6/conf/{}/disable_ipv6", port.tap())), "1");
        }
        one.udp((two.mac, two.ipv4, 9), 9, b"a word");
        two.wait("the word", |frame| Udp::read(frame).filter(|udp| udp.data == b"a word"));
        two.udp((three.mac, three.ipv4, 9), 9, b"another");
        three.wait("the other", |frame| Udp::read(frame).filter(|udp| udp.data == b"another"));
        // It has rules of its own, as any.
        let forged = Udp { from: (ports[0].ipv4, 9), to: (three.ipv4, 9), data: b"forged".to_vec() };
        two.send(&forged.frame(three.mac, two.mac));
        two.udp((three.mac, three.ipv4, 9), 9, b"mark");
        assert!(three.frames_before(b"mark").iter().all(|frame| Udp::read(frame).is_none()));
    });
}

/// A server may be deleted before it starts, and start before what waits for it is there.
#[test]
fn one_that_is_promised_stays_until_it_is_plugged_in_and_is_not_waited_for() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one"]).await;
        let _holder = ground.plug(&segment, &ports[0]).await;
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&ground, &segment);
        assert!(waits.is_some());
        let promised = next(&mut ground, &segment, 9, "two");
        ground.plumbing.unplug(vec![promised.clone()]).await.unwrap();
        assert_eq!(spare(&ground, &segment), waits);
        let two = ground.plug(&segment, &promised).await;
        assert_eq!(tap(&promised), waits);

        let early = next(&mut ground, &segment, 10, "three");
        assert_ne!(early.mac, promised.mac);
        let three = ground.plug(&segment, &early).await;
        two.udp((three.mac, three.ipv4, 9), 9, b"a word");
        three.wait("the word", |frame| Udp::read(frame).filter(|udp| udp.data == b"a word"));
        // The next is another one's, and whoever has one is unplugged with it.
        ground.plumbing.expect(segment.clone()).await;
        ground.plumbing.unplug(vec![promised.clone(), early.clone()]).await.unwrap();
        assert_eq!((tap(&promised), tap(&early)), (None, None));
        assert!(spare(&ground, &segment).is_some());
    });
}

/// A server that is to stay off keeps nothing from the others.
#[test]
fn one_that_is_promised_and_not_taken_is_another_servers_in_the_end() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one"]).await;
        let _holder = ground.plug(&segment, &ports[0]).await;
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&ground, &segment).expect("one that waits");
        let off = next(&mut ground, &segment, 9, "off");
        // It waits for it, and nothing is let through in its name yet.
        ground.ensure().await;
        assert!(!ruleset().contains(&off.tap()));
        for _ in 1..limits::PASSED_MAX {
            ground.plumbing.expect(segment.clone()).await;
            assert_eq!(spare(&ground, &segment), Some(waits));
        }
        ground.plumbing.expect(segment.clone()).await;
        assert_eq!(spare(&ground, &segment), None);
        gone(waits).await;
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&ground, &segment).expect("another that waits");
        // It can be plugged in as ever.
        let _off = ground.plug(&segment, &off).await;
        assert_eq!(spare(&ground, &segment), Some(waits));
        assert!(tap(&off).is_some_and(|tap| tap != waits));
        ground.ensure().await;
        assert!(ruleset().contains(&off.tap()));
    });
}

#[test]
fn the_last_server_takes_the_tap_that_waits_with_it() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two"]).await;
        let _taps = [ground.plug(&segment, &ports[0]).await, ground.plug(&segment, &ports[1]).await];
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&ground, &segment).expect("one that waits");
        ground.plumbing.unplug(ports[..1].to_vec()).await.unwrap();
        assert_eq!(spare(&ground, &segment), Some(waits));
        ground.plumbing.unplug(ports[1..].to_vec()).await.unwrap();
        gone(waits).await;
        assert_eq!((spare(&ground, &segment), ground.plumbing.promise(segment.id)), (None, None));
        let again = ground.plug(&segment, &ports[0]).await;
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&ground, &segment).expect("one that waits");
        drop(again);
        ground.plumbing.remove(segment.clone()).await.unwrap();
        gone(waits).await;
    });
}

/// What it was made for may be gone meanwhile, or be another.
#[test]
fn one_that_is_not_what_it_was_is_not_used() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one"]).await;
        let _holder = ground.plug(&segment, &port(&segment, 9, "nine")).await;
        for harm in [
            "link delete toftbr0",
            "link set SPARE nomaster",
            "link set SPARE mtu 1280",
            "link set SPARE up",
            "link set SPARE name other",
            "link delete SPARE",
        ] {
            ground.plumbing.expect(segment.clone()).await;
            let waits = spare(&ground, &segment).expect("one that waits");
            let promised = next(&mut ground, &segment, 10, "two");
            ip(&format!("{}\n", harm.replace("SPARE", &promised.tap())));
            ground.ensure().await;
            let one = ground.plug(&segment, &ports[0]).await;
            let two = ground.plug(&segment, &promised).await;
            one.udp((two.mac, two.ipv4, 9), 9, b"a word");
            let heard = two.wait("the word", |frame| Udp::read(frame).map(|udp| udp.data));
            assert_eq!(heard, b"a word");
            assert!(tap(&promised).is_some_and(|tap| tap != waits), "{harm}");
            gone(waits).await;
            assert_eq!(spare(&ground, &segment), None, "{harm}");
            ground.plumbing.unplug(vec![promised.clone()]).await.unwrap();
            ground.wanted.ports.retain(|port| *port != promised);
        }
    });
}

/// Whoever has an address already gets its place.
#[test]
fn what_waits_is_the_last_that_a_full_bridge_has() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two", "three", "four"]).await;
        let _taps = [ground.plug(&segment, &ports[0]).await, ground.plug(&segment, &ports[1]).await];
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&ground, &segment).expect("one that waits");
        // With these three it has as many as Linux gives one.
        let pairs = (0..510).map(|n| {
            let (a, b) = (format!("a{n}"), format!("b{n}"));
            format!("link add {a} master toftbr0 type veth peer name {b}\nlink set {b} master toftbr0\n")
        });
        ip(&pairs.collect::<String>());

        let _three = ground.plug(&segment, &ports[2]).await;
        gone(waits).await;
        ground.plumbing.expect(segment.clone()).await;
        assert_eq!(spare(&ground, &segment), None, "there is no place for another");
        assert_eq!(ground.plumbing.promise(segment.id), None, "what cannot be made is promised");
        let refused = ground.plumbing.plug(segment.clone(), ports[3].clone()).await.unwrap_err();
        assert!(refused.to_string().contains("as many interfaces as Linux gives"), "{refused}");
    });
}

/// Does what these lines say.
fn ip(lines: &str) {
    let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    ip.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(ip.wait().unwrap().success());
}

#[test]
fn a_daemon_that_has_made_no_rules_yet_replaces_none() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two"]).await;
        let _one = ground.plug(&segment, &ports[0]).await;
        // Its rules are another version's, which has not all that this one asks for, or none.
        super::super::nft::apply("flush ruleset").await.unwrap();
        let next = super::super::HostPlumbing::new(ground.run_dir());
        let refused = next.plug(segment.clone(), ports[1].clone()).await.unwrap_err().to_string();
        assert!(refused.contains("not in force") && ruleset().is_empty(), "{refused}");
        assert!(next.ensure(ground.wanted.clone()).await.is_empty());
        next.plug(segment.clone(), ports[1].clone()).await.unwrap();
        assert!(ruleset().contains(&ports[0].mac.to_string()), "the server that runs was forgotten");
    });
}
