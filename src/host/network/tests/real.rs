//! What the plumbing does on a real kernel. Each test has a network namespace of its own and needs root.
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs, UdpSocket};

use futures_util::TryStreamExt;
use model::network::NetworkKind;
use nix::net::if_::if_nametoindex;
use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};
use sys::tap::Tap;

use super::dhcp::{address_of, lease};
use super::frames::{Arp, BROADCAST, Udp, dhcp, ethernet};
use super::ground::{Guest, PATIENCE, run};
use crate::network::elements::{Applied, Elements};
use crate::network::mac::Mac;
use crate::network::plumbing::{Plumbing, PlumbingError};
use crate::network::{firewall, nft};

const STRANGER: Mac = Mac([0x52, 0x54, 0, 0xee, 0xee, 0xee]);

/// Each forgery is followed by an honest packet; when that one has come, the forgery would have.
#[test]
fn forged_frames_do_not_leave_the_port_and_honest_ones_do() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["evil", "victim"]).await;
        let evil = ground.plug(&segment, &ports[0]).await;
        let victim = ground.plug(&segment, &ports[1]).await;
        let gateway = segment.cidr.gateway();
        // Where the kernel takes bridged IPv4 for its own it drops what is malformed and collects parts, before our rules
        // are asked. They must hold where it does not.
        let collects = std::path::Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables");
        if collects.exists() {
            std::fs::write(collects, "0").unwrap();
        }
        // A request for the victim's own address would be answered by the victim instead of being shown.
        let nobody = Ipv4Addr::new(10, 77, 0, 200);
        let own = (evil.mac, evil.ipv4);
        let udp = |from: Ipv4Addr, ports: (u16, u16)| Udp {
            from: (from, ports.0),
            to: (victim.ipv4, ports.1),
            data: b"forged".to_vec(),
        };
        let honest = udp(evil.ipv4, (1000, 1000));
        let tagged = [&[0, 5, 8, 0][..], &udp(gateway, (1000, 1000)).payload()].concat();
        let mut cut = Arp::request(own, nobody).payload();
        cut[4] = 8;
        let dhcp_answer = udp(evil.ipv4, (67, 68));
        let broadcast = |data| Udp { from: (Ipv4Addr::UNSPECIFIED, 68), to: (Ipv4Addr::BROADCAST, 67), data };
        let declines = |of| Udp { data: dhcp(4, of, Some(victim.ipv4)), ..udp(evil.ipv4, (68, 67)) };
        let lying = |at: usize, byte: u8| dhcp_answer.altered(victim.mac, evil.mac, at, byte);
        let mut router_advertisement = vec![0x60, 0, 0, 0, 0, 16, 58, 255];
        router_advertisement.extend([0xfe; 32]);
        router_advertisement.extend([134, 0, 0, 0, 64, 0, 0, 30, 0, 0, 0, 0, 0, 0, 0, 0]);
        let forgeries = [
            ("another's MAC", honest.frame(victim.mac, STRANGER)),
            ("the victim's MAC", honest.frame(victim.mac, victim.mac)),
            ("another's IPv4 address", udp(gateway, (1000, 1000)).frame(victim.mac, evil.mac)),
            ("no IPv4 address", udp(Ipv4Addr::UNSPECIFIED, (68, 67)).frame(victim.mac, evil.mac)),
            ("another's ARP address", Arp::request((evil.mac, gateway), nobody).frame(BROADCAST, evil.mac)),
            (
                "another's ARP hardware",
                Arp::request((STRANGER, evil.ipv4), nobody).frame(BROADCAST, evil.mac),
            ),
            (
                "an unasked ARP answer",
                Arp { operation: 2, sender: (evil.mac, gateway), target: (victim.mac, victim.ipv4) }
                    .frame(victim.mac, evil.mac),
            ),
            (
                "an ARP answer from nobody",
                Arp {
                    operation: 2,
                    sender: (evil.mac, Ipv4Addr::UNSPECIFIED),
                    target: (victim.mac, victim.ipv4),
                }
                .frame(victim.mac, evil.mac),
            ),
            (
                "a probe for another's address",
                Arp::request((evil.mac, Ipv4Addr::UNSPECIFIED), nobody).frame(BROADCAST, evil.mac),
            ),
            (
                "a probe for the gateway's address",
                Arp::request((evil.mac, Ipv4Addr::UNSPECIFIED), gateway).frame(BROADCAST, evil.mac),
            ),
            ("ARP of an odd shape", ethernet(BROADCAST, evil.mac, 0x0806, &cut)),
            ("a DHCP server's reply", dhcp_answer.frame(victim.mac, evil.mac)),
            (
                "a DHCP question for the victim",
                broadcast(dhcp(1, victim.mac, None)).frame(BROADCAST, evil.mac),
            ),
            ("a DHCP message of the victim", declines(victim.mac).frame(victim.mac, evil.mac)),
            (
                "the first part of one that names nobody yet",
                Udp { data: b"forged".to_vec(), ..declines(evil.mac) }.altered(victim.mac, evil.mac, 6, 0x20),
            ),
            ("one that is shorter than it says", lying(3, 0xff)),
            ("one whose header is longer than it", lying(0, 0x4f)),
            ("one that is of another version", lying(0, 0x65)),
            ("one that is the first of several parts", lying(6, 0x20)),
            ("an IPv6 router advertisement", ethernet(BROADCAST, evil.mac, 0x86dd, &router_advertisement)),
            ("a VLAN tag", ethernet(victim.mac, evil.mac, 0x8100, &tagged)),
            ("a provider's VLAN tag", ethernet(victim.mac, evil.mac, 0x88a8, &tagged)),
            ("a protocol nobody asked for", ethernet(victim.mac, evil.mac, 0x88b5, b"forged")),
            ("IPv4 cut short", ethernet(victim.mac, evil.mac, 0x0800, b"")),
            ("an 802.3 frame", ethernet(victim.mac, evil.mac, 46, &[0xaa; 46])),
        ];
        for (number, (what, forged)) in forgeries.iter().enumerate() {
            evil.send(forged);
            let mark = format!("mark {number}");
            evil.udp((victim.mac, victim.ipv4, 9), 9, mark.as_bytes());
            let before = victim.frames_before(mark.as_bytes());
            let passed =
                before.iter().any(|frame| frame[6..12] == forged[6..12] && frame[12..14] == forged[12..14]);
            assert!(!passed, "{what} left the port: {before:02x?}");
        }
        // The same victim hears what is honest, so it was not deaf.
        evil.send(&honest.frame(victim.mac, evil.mac));
        victim.wait("an honest packet", |frame| Udp::read(frame).filter(|udp| *udp == honest));
        // So does a datagram in parts, the later ones of which say no port.
        for (part, at, byte) in [("first", 6, 0x20), ("second", 7, 2)] {
            let udp = Udp { data: part.into(), ..honest.clone() };
            evil.send(&udp.altered(victim.mac, evil.mac, at, byte));
            victim.wait(part, |frame| frame[42..].starts_with(part.as_bytes()).then_some(()));
        }
        // And what a guest says to a DHCP server for itself.
        for (udp, to) in [(broadcast(dhcp(1, evil.mac, None)), BROADCAST), (declines(evil.mac), victim.mac)] {
            evil.send(&udp.frame(to, evil.mac));
            victim.wait("a question of its own", |frame| Udp::read(frame).filter(|heard| *heard == udp));
        }
        // And a probe by which a guest sees that nobody else has its own address.
        evil.send(&Arp::request((evil.mac, Ipv4Addr::UNSPECIFIED), evil.ipv4).frame(BROADCAST, evil.mac));
        let probe = victim.wait("a probe", |frame| {
            Arp::read(frame).filter(|arp| arp.sender == (evil.mac, Ipv4Addr::UNSPECIFIED))
        });
        assert_eq!(probe.target.1, evil.ipv4);
        assert_eq!(evil.resolve(gateway), Mac::of_bridge(segment.id));
    });
}

/// A service of the host. What has come for one of tokio's is not seen before its runtime has looked.
pub(super) fn listening(at: impl ToSocketAddrs) -> UdpSocket {
    let socket = UdpSocket::bind(at).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// What comes next, for which this waits.
fn awaited(socket: &UdpSocket) -> String {
    let mut buffer = [0; 16];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// What has come already, if anything has.
pub(super) fn heard(socket: &UdpSocket) -> Option<String> {
    socket.set_nonblocking(true).unwrap();
    let has_come = match socket.peek(&mut [0; 1]) {
        Ok(_) => true,
        Err(cause) => {
            assert_eq!(cause.kind(), ErrorKind::WouldBlock);
            false
        }
    };
    socket.set_nonblocking(false).unwrap();
    has_come.then(|| awaited(socket))
}

/// IEEE 802.1D, table 7-10: what a bridge keeps from passing on ends at its port, and what it carries at no socket.
#[test]
fn frames_that_bridges_keep_for_themselves_reach_nothing_of_the_host() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["evil", "victim"]).await;
        let evil = ground.plug(&segment, &ports[0]).await;
        let gateway = segment.cidr.gateway();
        let socket = listening("0.0.0.0:8080");
        // The bridge answers from now on.
        evil.resolve(gateway);
        // A host that does not look where an address should come from, as many do not.
        for device in ["all", &ports[0].tap()] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{device}/rp_filter"), "0").unwrap();
        }
        for last in 0..16 {
            let reserved = Mac([0x01, 0x80, 0xc2, 0, 0, last]);
            for from in [evil.ipv4, ports[1].ipv4, Ipv4Addr::new(8, 8, 8, 8)] {
                let udp = Udp { from: (from, 1), to: (gateway, 8080), data: b"to the host".to_vec() };
                evil.send(&udp.frame(reserved, evil.mac));
            }
            evil.send(
                &Arp::request((evil.mac, Ipv4Addr::new(8, 8, 8, 8)), gateway).frame(reserved, evil.mac),
            );
        }
        // What follows on the way is answered when all that came before has been looked at.
        evil.send(&Arp::request((evil.mac, evil.ipv4), gateway).frame(BROADCAST, evil.mac));
        let answer =
            evil.wait("the gateway's answer", |frame| Arp::read(frame).filter(|arp| arp.operation == 2));
        assert_eq!(answer.target, (evil.mac, evil.ipv4), "the host answered a frame that was not its own");
        assert_eq!(heard(&socket), None, "a guest reached a service of the host");
        // Without the rules it does.
        nft::apply("flush ruleset").await.unwrap();
        let udp = Udp { from: (evil.ipv4, 1), to: (gateway, 8080), data: b"unruled".to_vec() };
        evil.send(&udp.frame(Mac([0x01, 0x80, 0xc2, 0, 0, 0x0e]), evil.mac));
        assert_eq!(awaited(&socket), "unruled");
    });
}

#[test]
fn an_unplugged_or_unknown_tap_is_silent_and_plugging_in_again_mends_it() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["one", "two"]).await;
        let one = ground.plug(&segment, &ports[0]).await;
        let two = ground.plug(&segment, &ports[1]).await;
        let elements = Elements::default();
        assert_eq!(elements.silence(&ports[..1]), Ok(Applied::Yes));
        assert_eq!(elements.silence(&ports[..1]), Ok(Applied::Yes));
        one.udp((two.mac, two.ipv4, 9), 9, b"silenced");
        two.udp((one.mac, one.ipv4, 9), 9, b"mark");
        assert!(one.frames_before(b"mark").is_empty());
        // The tap of a machine that did not let go is replaced.
        let again = ground.plug(&segment, &ports[0]).await;
        again.udp((two.mac, two.ipv4, 9), 9, b"heard");
        let heard = two.frames_before(b"heard");
        assert!(heard.iter().all(|frame| Udp::read(frame).is_none()), "{heard:02x?}");
        ground.plumbing.unplug(ports.clone()).await.unwrap();
        ground.plumbing.unplug(ports.clone()).await.unwrap();
        let devices = ground.plumbing.surroundings().await.devices;
        assert!(!devices.contains(&ports[0].tap()), "{devices:?}");
    });
}

#[test]
fn flushed_rules_come_back_before_a_tap_does() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["evil", "victim"]).await;
        nft::apply("flush ruleset").await.unwrap();
        let evil = ground.plug(&segment, &ports[0]).await;
        let victim = ground.plug(&segment, &ports[1]).await;
        let forged =
            Udp { from: (segment.cidr.gateway(), 9), to: (victim.ipv4, 9), data: b"forged".to_vec() };
        evil.send(&forged.frame(victim.mac, evil.mac));
        evil.udp((victim.mac, victim.ipv4, 9), 9, b"mark");
        assert!(victim.frames_before(b"mark").iter().all(|frame| Udp::read(frame).is_none()));
    });
}

/// A kernel that has lost its modules says of rules that need them what it says of a chain that is not there.
#[test]
fn rules_of_which_the_kernel_lacks_a_part_leave_no_network_ready() {
    run(|mut ground| async move {
        let _world = uplink().await;
        let mut segment = super::segment(0, NetworkKind::Nat);
        segment.bridge = "toftbr0\" jump nowhere #".to_owned();
        ground.wanted.segments.push(segment.clone());
        let troubles = ground.plumbing.ensure(ground.wanted.clone()).await;
        assert!(troubles[&segment.id].contains("No such file or directory"), "{troubles:?}");
        assert_eq!(forwarding("up0"), "0", "what no rules guard is forwarded");
    });
}

/// Another host behind a tap that is the default route of the test's host.
pub(super) async fn uplink() -> Guest {
    let tap = Tap::create("up0").unwrap();
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    let connection = tokio::spawn(connection);
    let link = handle.link().get().match_name("up0".to_owned()).execute().try_next().await.unwrap().unwrap();
    let index = link.header.index;
    handle.address().add(index, IpAddr::V4([198, 51, 100, 1].into()), 24).execute().await.unwrap();
    handle.link().change(LinkUnspec::new_with_index(index).up().build()).execute().await.unwrap();
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway([198, 51, 100, 2].into())
        .output_interface(index)
        .build();
    handle.route().add(route).execute().await.unwrap();
    connection.abort();
    Guest::new(tap.into(), Mac([2, 0, 0, 0, 0, 2]), [198, 51, 100, 2].into())
}

fn forwarding(device: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{device}/forwarding")).unwrap().trim().to_owned()
}

#[test]
fn nat_leads_out_and_answers_back_in_and_nothing_else_passes() {
    run(|mut ground| async move {
        let world = uplink().await;
        let (nat, ports) = ground.network(0, NetworkKind::Nat, &["web1"]).await;
        let (isolated, others) = ground.network(1, NetworkKind::Isolated, &["db1"]).await;
        assert_eq!((forwarding("up0").as_str(), forwarding("all").as_str()), ("1", "0"));
        let web1 = ground.plug(&nat, &ports[0]).await;
        let db1 = ground.plug(&isolated, &others[0]).await;
        let (host, elsewhere) = (web1.resolve(nat.cidr.gateway()), Ipv4Addr::new(203, 0, 113, 9));

        web1.udp((host, elsewhere, 7), 4000, b"out");
        let (router, sent) = world.wait("a packet from inside", |frame| {
            let from = Mac(frame[6..12].try_into().unwrap());
            Udp::read(frame).filter(|udp| udp.data == b"out").map(|udp| (from, udp))
        });
        assert_eq!(
            (sent.from.0, sent.to),
            (Ipv4Addr::new(198, 51, 100, 1), (elsewhere, 7)),
            "not masqueraded"
        );

        let answer = Udp { from: sent.to, to: sent.from, data: b"back".to_vec() };
        world.send(&answer.frame(router, world.mac));
        let back = web1.wait("the answer", |frame| Udp::read(frame).filter(|udp| udp.data == b"back"));
        assert_eq!(back.to, (web1.ipv4, 4000));

        // From outside, between networks, and out of an isolated one: none of it arrives before the honest one.
        let barge = Udp { from: (elsewhere, 7), to: (web1.ipv4, 80), data: b"barge".to_vec() };
        world.send(&barge.frame(router, world.mac));
        let isolated_host = db1.resolve(isolated.cidr.gateway());
        db1.udp((isolated_host, web1.ipv4, 80), 1, b"cross");
        db1.udp((isolated_host, elsewhere, 80), 1, b"escape");
        web1.udp((host, db1.ipv4, 80), 1, b"cross");
        world.send(&Udp { data: b"mark".to_vec(), ..answer }.frame(router, world.mac));
        assert_eq!(web1.frames_before(b"mark").iter().filter_map(|frame| Udp::read(frame)).count(), 0);
        web1.udp((host, elsewhere, 7), 4000, b"mark");
        assert_eq!(world.frames_before(b"mark").iter().filter_map(|frame| Udp::read(frame)).count(), 0);

        // The host serves DHCP, DNS and ping to guests, and nothing else.
        let socket = listening("0.0.0.0:8080");
        web1.udp((host, nat.cidr.gateway(), 8080), 1, b"to the host");
        // What follows on the way is answered when all that came before has been looked at.
        web1.resolve(nat.cidr.gateway());
        assert_eq!(heard(&socket), None, "a guest reached a service of the host");
        socket.send_to(b"from the host", (web1.ipv4, 9)).unwrap();
        web1.wait("a packet from the host", |frame| {
            Udp::read(frame).filter(|udp| udp.data == b"from the host")
        });
    });
}

#[test]
fn what_the_host_serves_it_serves_at_the_gateway_of_the_guests_network_only() {
    run(|mut ground| async move {
        let _world = uplink().await;
        let (isolated, ports) = ground.network(0, NetworkKind::Isolated, &["db1"]).await;
        let (nat, _) = ground.network(1, NetworkKind::Nat, &[]).await;
        let db1 = ground.plug(&isolated, &ports[0]).await;
        let (gateway, outward) = (isolated.cidr.gateway(), Ipv4Addr::new(198, 51, 100, 1));
        let host = db1.resolve(gateway);
        let resolver = listening((outward, 53));
        let ask = |data: &[u8]| db1.udp((host, outward, 53), 4000, data);
        ask(b"ruled");
        for at in [outward, nat.cidr.gateway(), gateway] {
            // Type and code where UDP has a port, the checksum where it has the other (RFC 792).
            let ping = Udp { from: (db1.ipv4, 0x0800), to: (at, 0xf7f7), data: Vec::new() };
            db1.send(&ping.altered(host, db1.mac, 9, 1));
        }
        // What comes first is the answer to the last, and all that was sent before it has been looked at.
        let answered = db1.wait("an echo", |frame| {
            let is_echo = frame[12..14] == [8, 0] && frame[23] == 1 && frame[34] == 0;
            is_echo.then(|| <[u8; 4]>::try_from(&frame[26..30]).unwrap())
        });
        assert_eq!(Ipv4Addr::from(answered), gateway);
        assert_eq!(heard(&resolver), None, "a guest reached a resolver of the host");
        assert_eq!(address_of(&db1, gateway, "db1.toft.internal"), Some(db1.ipv4));
        assert_eq!(lease(&db1).address, db1.ipv4);
        // Without the rules it does.
        nft::apply("flush ruleset").await.unwrap();
        ask(b"unruled");
        assert_eq!(awaited(&resolver), "unruled");
    });
}

/// While somebody had flushed the rules, or before an upgrade to stricter ones.
#[test]
fn what_began_without_the_rules_does_not_go_on_under_them() {
    run(|mut ground| async move {
        let world = uplink().await;
        let (nat, ports) = ground.network(0, NetworkKind::Nat, &["web1"]).await;
        let web1 = ground.plug(&nat, &ports[0]).await;
        let gateway = nat.cidr.gateway();
        let (host, router) = (web1.resolve(gateway), world.resolve(Ipv4Addr::new(198, 51, 100, 1)));
        // Others still have the kernel keep account of connections.
        let theirs = "table inet theirs { chain seen { type filter hook input priority 1; ct state new; }; }";
        nft::apply(&format!("flush ruleset\n{theirs}")).await.unwrap();
        let [service, client] = [8080, 8081].map(|port| listening(("0.0.0.0", port)));
        let hears = |guest: &Guest, data: &str| {
            guest.wait(data, |frame| Udp::read(frame).filter(|udp| udp.data == data.as_bytes()));
        };
        let to_service = |data: &str| web1.udp((host, gateway, 8080), 9, data.as_bytes());
        let to_client = |data: &str| web1.udp((host, gateway, 8081), 9, data.as_bytes());
        let inward = |data: &str| {
            let udp = Udp { from: (world.ipv4, 7), to: (web1.ipv4, 80), data: data.into() };
            world.send(&udp.frame(router, world.mac));
        };
        // The guest begins the first, the host the second, and somebody outside the third; all are answered.
        to_service("asked");
        assert_eq!(awaited(&service), "asked");
        service.send_to(b"answer", (web1.ipv4, 9)).unwrap();
        hears(&web1, "answer");
        client.send_to(b"question", (web1.ipv4, 9)).unwrap();
        hears(&web1, "question");
        inward("inward");
        hears(&web1, "inward");
        web1.udp((host, world.ipv4, 7), 80, b"outward");
        hears(&world, "outward");

        ground.ensure().await;
        to_service("more");
        inward("more");
        to_client("reply");
        assert_eq!(awaited(&client), "reply");
        assert_eq!(heard(&service), None, "what a guest began without the rules goes on");
        client.send_to(b"mark", (web1.ipv4, 9)).unwrap();
        assert_eq!(web1.frames_before(b"mark").iter().filter_map(|frame| Udp::read(frame)).count(), 0);
    });
}

#[test]
fn a_removed_network_leaves_the_host_as_it_was() {
    run(|mut ground| async move {
        let _world = uplink().await;
        let before = ground.plumbing.surroundings().await;
        let (nat, ports) = ground.network(0, NetworkKind::Nat, &["web1"]).await;
        let (isolated, _) = ground.network(1, NetworkKind::Isolated, &[]).await;
        ground.ensure().await;
        drop(ground.plug(&nat, &ports[0]).await);
        ground.plumbing.unplug(ports.clone()).await.unwrap();
        for segment in [&nat, &isolated, &nat] {
            ground.plumbing.remove(segment.clone()).await.unwrap();
        }
        assert_eq!(ground.plumbing.surroundings().await, before);
        assert_eq!(forwarding("up0"), "0");
        for family in ["inet", "bridge"] {
            let refused = nft::apply(&format!("delete table {family} toft")).await.unwrap_err();
            assert!(refused.to_string().contains("No such file or directory"), "{refused}");
        }
        let elements = Elements::default();
        assert_eq!(elements.admit(&ports[0]), Ok(Applied::NoTable));
        assert_eq!(elements.silence(&ports), Ok(Applied::NoTable));
        assert!(!ground.dnsmasq(&nat).is_running());
        let left = std::fs::read_dir(ground.run_dir().join("networks")).unwrap().count();
        assert_eq!(left, 0);
    });
}

#[test]
fn a_device_of_somebody_else_is_left_alone_and_reported() {
    run(|mut ground| async move {
        let foreign = Tap::create("toftbr0").unwrap();
        let segment = super::segment(0, NetworkKind::Nat);
        ground.wanted.segments.push(segment.clone());
        let troubles = ground.plumbing.ensure(ground.wanted.clone()).await;
        assert!(troubles[&segment.id].contains("toftbr0"), "{troubles:?}");
        ground.plumbing.remove(segment).await.unwrap();
        assert!(ground.plumbing.surroundings().await.devices.contains(&"toftbr0".to_owned()));
        drop(foreign);
    });
}

#[test]
fn a_plug_into_a_bridge_that_is_gone_is_refused() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["web1"]).await;
        ground.plumbing.remove(segment.clone()).await.unwrap();
        ground.wanted.segments.clear();
        let refused = ground.plumbing.plug(segment, ports[0].clone()).await.unwrap_err();
        assert!(matches!(refused, PlumbingError::Failed(_)), "{refused}");
        assert_eq!(ground.plumbing.surroundings().await.devices, ["lo"]);
    });
}

#[test]
fn a_bridge_that_is_full_says_so() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["web1"]).await;
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        let connection = tokio::spawn(connection);
        let bridge = if_nametoindex(segment.bridge.as_str()).unwrap();
        // One is left over.
        for pair in 0..512 {
            let ends = [format!("left{pair}"), format!("right{pair}")];
            handle.link().add(LinkVeth::new(&ends[0], &ends[1]).build()).execute().await.unwrap();
            for end in ends.iter().skip(usize::from(pair == 0)) {
                let index = if_nametoindex(end.as_str()).unwrap();
                let joins = LinkUnspec::new_with_index(index).controller(bridge).build();
                handle.link().change(joins).execute().await.unwrap();
            }
        }
        connection.abort();
        let refused = ground.plumbing.plug(segment, ports[0].clone()).await.unwrap_err();
        assert!(refused.to_string().contains("another network"), "{refused}");
    });
}

#[test]
fn another_firewall_that_drops_what_passes_through_is_named_until_it_knows_the_bridges() {
    run(|mut ground| async move {
        // Toft's own tables are there and are nobody's.
        ground.network(0, NetworkKind::Nat, &["web"]).await;
        assert_eq!(firewall::droppers().await, Ok(Vec::new()));
        let theirs =
            "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }";
        nft::apply(theirs).await.unwrap();
        let found = firewall::droppers().await.unwrap();
        assert_eq!(found.iter().map(firewall::Chain::words).collect::<Vec<_>>(), ["ip filter FORWARD"]);
        // What the check advises is what makes it content.
        nft::apply("insert rule ip filter FORWARD iifname \"toftbr*\" accept").await.unwrap();
        assert_eq!(firewall::droppers().await, Ok(Vec::new()));
    });
}
