//! Taps that wait for a server, on a real kernel.
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use model::network::NetworkKind;
use nix::net::if_::if_nametoindex;

use super::frames::Udp;
use super::ground::{Ground, Guest, PATIENCE, run};
use super::port;
use crate::network::plumbing::{Plugged, Plumbing, Segment};
use crate::network::spares;

/// Its number.
fn spare(segment: &Segment) -> Option<u32> {
    if_nametoindex(spares::name(segment).as_str()).ok()
}

/// Another thread removes what is not wanted any more.
async fn gone(segment: &Segment) {
    let end = Instant::now() + PATIENCE;
    while spare(segment).is_some() {
        assert!(Instant::now() < end, "it stays");
        tokio::task::yield_now().await;
    }
}

fn switch(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap().trim().to_owned()
}

/// Two that are plugged in.
async fn hear_each_other(ground: &Ground, segment: &Segment, ports: &[crate::network::Port]) -> [Guest; 2] {
    let one = ground.plug(segment, &ports[0]).await;
    let two = ground.plug(segment, &ports[1]).await;
    one.udp((two.mac, two.ipv4, 9), 9, b"a word");
    let heard = two.wait("the word", |frame| Udp::read(frame).map(|udp| udp.data));
    assert_eq!(heard, b"a word");
    [one, two]
}

#[test]
fn a_tap_that_waits_becomes_the_next_servers_and_is_like_any_other() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two", "three"]).await;
        ground.plumbing.expect(segment.clone()).await;
        assert_eq!(spare(&segment), None, "a network without servers has one");
        let one = ground.plug(&segment, &ports[0]).await;
        ground.plumbing.expect(segment.clone()).await;
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&segment).expect("one that waits");
        // Nobody hears anything from it, and what looks after the network leaves it where it is.
        ground.ensure().await;
        assert_eq!(spare(&segment), Some(waits));

        let two = ground.plug(&segment, &ports[1]).await;
        assert_eq!(if_nametoindex(ports[1].tap().as_str()), Ok(waits));
        assert_eq!(spare(&segment), None);
        let three = ground.plug(&segment, &ports[2]).await;
        for port in &ports {
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

/// A machine is built with it meanwhile.
#[test]
fn one_that_is_taken_passes_nothing_before_it_is_up() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two"]).await;
        let _holder = ground.plug(&segment, &ports[0]).await;
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&segment).expect("one that waits");
        let Plugged { tap, up } = ground.plumbing.plug(segment.clone(), ports[1].clone()).await.unwrap();
        assert_eq!((spare(&segment), if_nametoindex(ports[1].tap().as_str()).ok()), (Some(waits), None));
        // Nobody takes it twice, and it is in the way of another until it has its name.
        ground.plumbing.expect(segment.clone()).await;
        assert_eq!(spare(&segment), Some(waits));
        up.await.unwrap();
        assert_eq!((spare(&segment), if_nametoindex(ports[1].tap().as_str()).ok()), (None, Some(waits)));
        drop(tap);

        // One that nobody needs any more goes with its descriptor, and what is left to do says so.
        ground.plumbing.expect(segment.clone()).await;
        let Plugged { tap, up } = ground.plumbing.plug(segment.clone(), ports[1].clone()).await.unwrap();
        drop(tap);
        gone(&segment).await;
        assert!(up.await.is_err());
    });
}

#[test]
fn the_last_server_takes_the_tap_that_waits_with_it() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two"]).await;
        let _taps = [ground.plug(&segment, &ports[0]).await, ground.plug(&segment, &ports[1]).await];
        ground.plumbing.expect(segment.clone()).await;
        ground.plumbing.unplug(ports[..1].to_vec()).await.unwrap();
        assert!(spare(&segment).is_some());
        ground.plumbing.unplug(ports[1..].to_vec()).await.unwrap();
        gone(&segment).await;
        let again = ground.plug(&segment, &ports[0]).await;
        ground.plumbing.expect(segment.clone()).await;
        assert!(spare(&segment).is_some());
        drop(again);
        ground.plumbing.remove(segment.clone()).await.unwrap();
        gone(&segment).await;
    });
}

/// What it was made for may be gone meanwhile, or be another.
#[test]
fn one_that_is_not_what_it_was_is_not_used() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two"]).await;
        let _holder = ground.plug(&segment, &port(&segment, 9, "nine")).await;
        for harm in [
            vec!["link", "delete", "toftbr0"],
            vec!["link", "set", "tofttap-0", "nomaster"],
            vec!["link", "set", "tofttap-0", "mtu", "1280"],
            vec!["link", "set", "tofttap-0", "up"],
            vec!["link", "delete", "tofttap-0"],
        ] {
            ground.plumbing.expect(segment.clone()).await;
            let waits = spare(&segment).expect("one that waits");
            assert!(Command::new("ip").args(&harm).status().unwrap().success());
            ground.ensure().await;
            let _taps = hear_each_other(&ground, &segment, &ports).await;
            for port in &ports {
                assert_ne!(if_nametoindex(port.tap().as_str()).unwrap(), waits, "{harm:?}");
            }
            assert_eq!(spare(&segment), None, "{harm:?}");
        }
    });
}

#[test]
fn what_waits_is_the_last_that_a_full_bridge_has() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two", "three", "four"]).await;
        let _taps = [ground.plug(&segment, &ports[0]).await, ground.plug(&segment, &ports[1]).await];
        ground.plumbing.expect(segment.clone()).await;
        let waits = spare(&segment).expect("one that waits");
        // With these three it has as many as Linux gives one.
        let pairs = (0..510).map(|n| {
            let (a, b) = (format!("a{n}"), format!("b{n}"));
            format!("link add {a} master toftbr0 type veth peer name {b}\nlink set {b} master toftbr0\n")
        });
        ip(&pairs.collect::<String>());

        let _three = ground.plug(&segment, &ports[2]).await;
        assert_eq!(if_nametoindex(ports[2].tap().as_str()), Ok(waits));
        ground.plumbing.expect(segment.clone()).await;
        assert_eq!(spare(&segment), None, "there is no place for another");
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
