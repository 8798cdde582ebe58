//! Networks that go on behind a device of the host, on a real kernel: another host is a tap whose frames the tests write and read.
use std::net::Ipv4Addr;

use futures_util::TryStreamExt;
use model::network::NetworkKind;
use rtnetlink::LinkUnspec;
use sys::tap::Tap;

use super::dhcp::lease;
use super::frames::{Arp, BROADCAST, Udp, dhcp, dns_question};
use super::ground::{Guest, run};
use super::port;
use super::real::{heard, listening, uplink};
use crate::network::mac::Mac;
use crate::network::plumbing::Plumbing;

/// A tap as the device of a host behind which a network goes on: whoever has its other end is on another host.
fn cable(name: &str, mac: Mac, ipv4: Ipv4Addr) -> Guest {
    Guest::new(Tap::create(name).unwrap().into(), mac, ipv4)
}

#[test]
fn a_network_goes_on_behind_a_device_and_the_host_itself_does_not() {
    run(|mut ground| async move {
        let mut lan = super::segment(0, NetworkKind::Isolated);
        lan.host_device = Some("cable0".to_owned());
        // The second is known here and has moved: nobody here may answer it any more but servers.
        let [near, far] = ["near", "far"].map(|name| port(&lan, if name == "near" { 2 } else { 3 }, name));
        let away = cable("cable0", far.mac, far.ipv4);
        ground.wanted.segments.push(lan.clone());
        ground.wanted.ports.extend([near.clone(), far.clone()]);
        ground.ensure().await;
        let server = ground.plug(&lan, &near).await;
        let gateway = lan.cidr.gateway();

        // The gateway is each host's own, and called alike on all of them.
        let host = server.resolve(gateway);
        assert_eq!(host, Mac::of_gateway(lan.cidr));
        // Servers on both hosts reach each other.
        away.udp((near.mac, near.ipv4, 9), 9, b"from afar");
        server.wait("a packet from afar", |frame| Udp::read(frame).filter(|udp| udp.data == b"from afar"));
        server.udp((far.mac, far.ipv4, 9), 9, b"to afar");
        away.wait("a packet to afar", |frame| Udp::read(frame).filter(|udp| udp.data == b"to afar"));

        // What is asked of the host from afar, by ARP, DHCP, DNS or ping, gets no answer, and what the host says is not heard there.
        away.send(&Arp::request((away.mac, away.ipv4), gateway).frame(BROADCAST, away.mac));
        for kind in [1, 3] {
            let data = dhcp(kind, away.mac, Some(away.ipv4));
            let udp = Udp { from: (Ipv4Addr::UNSPECIFIED, 68), to: (Ipv4Addr::BROADCAST, 67), data };
            away.send(&udp.frame(BROADCAST, away.mac));
        }
        let question = Udp { from: (away.ipv4, 4000), to: (gateway, 53), data: dns_question("near.toft") };
        away.send(&question.frame(host, away.mac));
        let socket = listening("0.0.0.0:8080");
        socket.set_broadcast(true).unwrap();
        for to in [away.ipv4, Ipv4Addr::new(10, 77, 0, 255)] {
            socket.send_to(b"from the host", (to, 9)).unwrap();
        }
        // Nor is what bridges must not pass on and hand to the port itself.
        let lldp = Mac([0x01, 0x80, 0xc2, 0, 0, 0x0e]);
        let sneaked = Udp { from: (away.ipv4, 9), to: (gateway, 8080), data: b"sneaked".to_vec() };
        away.send(&sneaked.frame(lldp, away.mac));
        let ipv6 = std::fs::read_to_string("/proc/sys/net/ipv6/conf/cable0/disable_ipv6").unwrap();
        assert_eq!(ipv6.trim(), "1");
        // Nobody there is a gateway or a DHCP server to servers here.
        away.send(&Arp::request((away.mac, gateway), near.ipv4).frame(BROADCAST, away.mac));
        away.send(&Arp::request((host, away.ipv4), near.ipv4).frame(BROADCAST, host));
        let offer = Udp { from: (far.ipv4, 67), to: (near.ipv4, 68), data: b"an offer".to_vec() };
        away.send(&offer.frame(near.mac, away.mac));
        away.udp((near.mac, near.ipv4, 9), 9, b"end of lies");
        for frame in server.frames_before(b"end of lies") {
            let (arp, udp) = (Arp::read(&frame), Udp::read(&frame));
            let is_lie = arp.is_some_and(|arp| (arp.sender.1 == gateway) != (arp.sender.0 == host))
                || udp.is_some_and(|udp| udp.from == (far.ipv4, 67));
            assert!(!is_lie, "a lie was heard: {frame:02x?}");
        }
        assert_eq!(heard(&socket), None, "the host heard it");
        // Broadcast, as all that asks for an address.
        assert_eq!(lease(&server).address, near.ipv4);
        server.udp((far.mac, far.ipv4, 9), 9, b"mark");
        for frame in away.frames_before(b"mark") {
            assert_ne!(frame[6..12], host.0, "the host was heard: {frame:02x?}");
            let udp = Udp::read(&frame);
            assert!(udp.is_none_or(|udp| udp.to.1 != 67), "a question for a DHCP server: {frame:02x?}");
        }

        // The device is the network's from then on, and nobody's when that is gone.
        let mut other = super::segment(1, NetworkKind::Isolated);
        other.host_device.clone_from(&lan.host_device);
        ground.wanted.segments.push(other);
        let troubles = ground.plumbing.ensure(ground.wanted.clone()).await;
        assert!(
            troubles.len() == 1 && troubles.values().all(|why| why.starts_with("cable0 is part of toftbr0;")),
            "{troubles:?}"
        );
        let other = ground.wanted.segments.pop().unwrap();
        ground.plumbing.remove(other).await.unwrap();
        // One that is called otherwise is not the network's any more, nor is it the host's.
        rename("cable0", "rope0").await;
        let troubles = ground.plumbing.ensure(ground.wanted.clone()).await;
        assert!(troubles[&lan.id].starts_with("there is no device cable0"), "{troubles:?}");
        away.udp((near.mac, near.ipv4, 9), 9, b"from nobody");
        away.send(&Arp::request((away.mac, away.ipv4), gateway).frame(BROADCAST, away.mac));
        assert_eq!(server.resolve(gateway), host);
        server.udp((far.mac, far.ipv4, 9), 9, b"to nobody");
        rename("rope0", "cable0").await;
        ground.ensure().await;
        server.udp((far.mac, far.ipv4, 9), 9, b"back");
        for frame in away.frames_before(b"back") {
            let udp = Udp::read(&frame);
            assert!(frame[6..12] != host.0 && udp.is_none_or(|udp| udp.data != b"to nobody"), "{frame:02x?}");
        }
        for segment in &ground.wanted.segments {
            ground.plumbing.remove(segment.clone()).await.unwrap();
        }
        assert!(ground.plumbing.surroundings().await.devices.contains(&"cable0".to_owned()));
    });
}

#[test]
fn a_device_that_is_missing_or_the_hosts_own_is_not_taken() {
    run(|mut ground| async move {
        let world = uplink().await;
        let mut lan = super::segment(0, NetworkKind::Isolated);
        for (device, why) in [("absent0", "there is no device absent0"), ("up0", "up0 has an address")] {
            lan.host_device = Some(device.to_owned());
            ground.wanted.segments = vec![lan.clone()];
            let troubles = ground.plumbing.ensure(ground.wanted.clone()).await;
            assert!(troubles[&lan.id].starts_with(why), "{troubles:?}");
        }
        // The host is still reached there.
        assert_ne!(world.resolve(Ipv4Addr::new(198, 51, 100, 1)), world.mac);
    });
}

/// Calls a device otherwise while it is up, as Linux allows.
async fn rename(from: &str, to: &str) {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    let connection = tokio::spawn(connection);
    let link = handle.link().get().match_name(from.to_owned()).execute().try_next().await.unwrap().unwrap();
    let change = LinkUnspec::new_with_index(link.header.index).name(to.to_owned()).build();
    handle.link().change(change).execute().await.unwrap();
    connection.abort();
}
