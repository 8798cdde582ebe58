//! What dnsmasq says to guests, on a real kernel. Each test has a network namespace of its own and needs root.
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Instant;

use model::network::NetworkKind;

use super::frames::{BROADCAST, DhcpAnswer, Udp, dhcp, dns_question, with_option};
use super::ground::{Guest, PATIENCE, run};
use super::port;
use crate::network::HostPlumbing;
use crate::network::elements::{Applied, Elements};
use crate::network::mac::Mac;
use crate::network::plumbing::{Plumbing, Port};

/// Gets a lease as a DHCP client does, and answers the acknowledgement.
pub(super) fn lease(guest: &Guest) -> DhcpAnswer {
    lease_by(guest, |message| message)
}

/// The same, with what `alter` makes of each message.
fn lease_by(guest: &Guest, alter: impl Fn(Vec<u8>) -> Vec<u8>) -> DhcpAnswer {
    let ask = |kind, asked| {
        let message = alter(dhcp(kind, guest.mac, asked));
        let udp = Udp { from: (Ipv4Addr::UNSPECIFIED, 68), to: (Ipv4Addr::BROADCAST, 67), data: message };
        guest.ask("an answer of the DHCP server", &udp.frame(BROADCAST, guest.mac), |frame| {
            // Answers by broadcast are heard by all.
            let udp = Udp::read(frame).filter(|udp| udp.from.1 == 67 && udp.data[28..34] == guest.mac.0)?;
            // A late answer to the question before is none to this one.
            DhcpAnswer::read(&udp.data).filter(|answer| answer.kind != if kind == 1 { 5 } else { 2 })
        })
    };
    let offer = ask(1, None);
    assert_eq!(offer.kind, 2, "no offer");
    let given = ask(3, Some(offer.address));
    assert_eq!((given.kind, given.address), (5, offer.address), "not acknowledged");
    given
}

pub(super) fn address_of(guest: &Guest, gateway: Ipv4Addr, name: &str) -> Option<Ipv4Addr> {
    let host = guest.resolve(gateway);
    guest.udp((host, gateway, 53), 5353, &dns_question(name));
    let answer = guest.wait("an answer of the DNS server", |frame| {
        Udp::read(frame).filter(|udp| udp.from == (gateway, 53)).map(|udp| udp.data)
    });
    (answer[7] > 0).then(|| <[u8; 4]>::try_from(&answer[answer.len() - 4..]).unwrap().into())
}

#[test]
fn dhcp_gives_each_server_its_own_address_and_dns_knows_its_name() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["web1", "web2"]).await;
        let gateway = segment.cidr.gateway();
        let web2 = ground.plug(&segment, &ports[1]).await;
        let given = lease(&web2);
        assert_eq!(given.address, ports[1].ipv4);
        assert_eq!(given.option(3), Some(&gateway.octets()[..]), "router");
        assert_eq!(given.option(6), Some(&gateway.octets()[..]), "DNS");
        assert_eq!(address_of(&web2, gateway, "web1.toft.internal"), Some(ports[0].ipv4));
        assert_eq!(address_of(&web2, gateway, "web2"), Some(ports[1].ipv4));
        assert_eq!(address_of(&web2, gateway, "web3.toft.internal"), None);

        // As after a restart, when all that the sets have is what the rules' text says.
        ground.ensure().await;
        assert_eq!(lease(&web2).address, web2.ipv4);
        let web1 = ground.plug(&segment, &ports[0]).await;
        let question = Udp {
            from: (Ipv4Addr::UNSPECIFIED, 68),
            to: (Ipv4Addr::BROADCAST, 67),
            data: dhcp(1, web2.mac, None),
        };
        let host = UdpSocket::bind("0.0.0.0:8080").unwrap();
        let heard_with = |mark: &[u8]| {
            web2.send(&question.frame(BROADCAST, web2.mac));
            host.send_to(mark, (web1.ipv4, 9)).unwrap();
            let before = web1.frames_before(mark);
            before.iter().filter_map(|frame| Udp::read(frame)).any(|udp| udp == question)
        };
        web1.resolve(gateway);
        assert!(heard_with(b"plugged in"), "a question is not heard where it is broadcast");
        ground.ensure().await;
        assert_eq!(Elements::default().silence(&ports[1..]), Ok(Applied::Yes));
        assert!(!heard_with(b"silenced"), "a question is heard of one that is silenced");

        // web2 goes, and web3 gets its address while the lease of web2 still runs.
        let web3 = crate::network::Port { ipv4: ports[1].ipv4, ..port(&segment, 9, "web3") };
        ground.plumbing.unplug(vec![ports[1].clone()]).await.unwrap();
        ground.plumbing.serve(segment.clone(), vec![ports[0].clone(), web3.clone()]).await.unwrap();
        let guest = ground.plug(&segment, &web3).await;
        assert_eq!(lease(&guest).address, web3.ipv4);
        assert_eq!(address_of(&guest, gateway, "web3.toft.internal"), Some(web3.ipv4));
        assert_eq!(address_of(&guest, gateway, "web2.toft.internal"), None);
    });
}

#[test]
fn one_server_more_is_known_without_telling_all_again_and_one_less_is_forgotten() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["web1"]).await;
        let gateway = segment.cidr.gateway();
        let directory = ground.dnsmasq(&segment).directory;
        let pid = || std::fs::read_to_string(directory.join("pid")).unwrap();
        let added = |name: &str| std::fs::read_dir(directory.join(name)).unwrap().count();
        let (first, web2) = (pid(), port(&segment, 3, "web2"));
        let introduce = async |plumbing: &HostPlumbing, port: &Port| {
            plumbing.introduce(segment.clone(), port.clone()).await.unwrap()
        };
        // Twice, as after an answer that was lost.
        assert!(introduce(&ground.plumbing, &web2).await && introduce(&ground.plumbing, &web2).await);
        assert_eq!((added("hosts.d"), added("names.d")), (1, 1));
        let web1 = ground.plug(&segment, &ports[0]).await;
        // Told is soon known: dnsmasq may answer what was asked at the same time before.
        let knows = |name: &str, address: Option<Ipv4Addr>| {
            let end = Instant::now() + PATIENCE;
            while address_of(&web1, gateway, &format!("{name}.toft.internal")) != address {
                assert!(Instant::now() < end, "{name} does not become {address:?}");
            }
        };
        let guest = ground.plug(&segment, &web2).await;
        assert_eq!(lease(&guest).address, web2.ipv4);
        knows("web2", Some(web2.ipv4));
        knows("web1", Some(ports[0].ipv4));

        // What it knows otherwise is not added to.
        let renamed = Port { name: "web3".parse().unwrap(), ..web2.clone() };
        assert!(!introduce(&ground.plumbing, &renamed).await);
        ground.plumbing.serve(segment.clone(), vec![ports[0].clone(), renamed.clone()]).await.unwrap();
        assert_eq!((added("hosts.d"), added("names.d")), (0, 0));
        knows("web3", Some(web2.ipv4));
        knows("web1", Some(ports[0].ipv4));

        // Another daemon knows nothing of what this one told, and makes it exact.
        let (web4, late) = (port(&segment, 4, "web4"), port(&segment, 5, "late"));
        assert!(introduce(&ground.plumbing, &web4).await && introduce(&ground.plumbing, &late).await);
        let successor = HostPlumbing::new(ground.run_dir());
        assert!(!introduce(&successor, &web4).await);
        let left = vec![ports[0].clone(), renamed, web4.clone()];
        successor.serve(segment.clone(), left.clone()).await.unwrap();
        assert_eq!((added("hosts.d"), added("names.d")), (0, 0));
        knows("web4", Some(web4.ipv4));
        knows("late", None);
        assert_eq!(pid(), first, "it was started anew");

        // An address that was somebody's, or a directory that dnsmasq watches no more, needs a new start.
        let heir = Port { mac: Mac([0x52, 0x54, 0, 0, 0, 99]), name: "heir".parse().unwrap(), ..late };
        assert!(!introduce(&successor, &heir).await);
        successor.serve(segment.clone(), [left, vec![heir.clone()]].concat()).await.unwrap();
        let second = pid();
        assert_ne!(second, first);
        std::fs::remove_dir_all(directory.join("names.d")).unwrap();
        let web6 = port(&segment, 6, "web6");
        assert!(!introduce(&successor, &web6).await);
        successor.serve(segment.clone(), vec![ports[0].clone(), heir, web6.clone()]).await.unwrap();
        assert_ne!(pid(), second);
        knows("web6", Some(web6.ipv4));
        knows("web4", None);
    });
}

#[test]
fn a_new_daemon_finds_dnsmasq_again_and_a_dead_one_is_started() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Isolated, &["db1"]).await;
        let pid = || std::fs::read_to_string(ground.dnsmasq(&segment).directory.join("pid")).unwrap();
        let first = pid();
        let successor = crate::network::HostPlumbing::new(ground.run_dir());
        assert_eq!(successor.ensure(ground.wanted.clone()).await, Default::default());
        assert_eq!(pid(), first);
        ground.dnsmasq(&segment).stop().await.unwrap();
        successor.serve(segment.clone(), ports.clone()).await.unwrap();
        assert_ne!(pid(), first);
        let guest = ground.plug(&segment, &ports[0]).await;
        let given = lease(&guest);
        assert_eq!(given.address, ports[0].ipv4);
        assert_eq!(given.option(3), None, "an isolated network has no router");
    });
}

#[test]
fn a_dnsmasq_that_a_dead_daemon_was_starting_gives_way() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["web1"]).await;
        let dnsmasq = ground.dnsmasq(&segment);
        let first = std::fs::read_to_string(dnsmasq.directory.join("pid")).unwrap();
        // It has the network's address and port and has not got to its pid file.
        std::fs::remove_file(dnsmasq.directory.join("pid")).unwrap();
        let successor = crate::network::HostPlumbing::new(ground.run_dir());
        assert_eq!(successor.ensure(ground.wanted.clone()).await, Default::default());
        let second = std::fs::read_to_string(dnsmasq.directory.join("pid")).unwrap();
        assert_ne!(second, first);
        // One that has ended has no command line, also where nobody has reaped it yet.
        let line = std::fs::read(format!("/proc/{}/cmdline", first.trim())).unwrap_or_default();
        assert_eq!(line, b"", "two serve one network");
        let guest = ground.plug(&segment, &ports[0]).await;
        assert_eq!(lease(&guest).address, ports[0].ipv4);
    });
}

/// Clones of one machine may call themselves the same, and nothing keeps a guest from taking another's name.
#[test]
fn guests_that_call_themselves_alike_keep_each_its_own_lease() {
    run(|mut ground| async move {
        let (segment, ports) = ground.network(0, NetworkKind::Nat, &["web1", "web2"]).await;
        let gateway = segment.cidr.gateway();
        let guests = [ground.plug(&segment, &ports[0]).await, ground.plug(&segment, &ports[1]).await];
        let call = |message| with_option(message, 61, b"\xffa clone");
        for guest in &guests {
            assert_eq!(lease_by(guest, call).address, guest.ipv4);
        }
        for guest in &guests {
            let mut renewal = call(dhcp(3, guest.mac, None));
            // Number, flags and own address (RFC 2131, table 5): this answer and no other, and to this address.
            let number = [7, 7, 7, guest.mac.0[5]];
            renewal[4..8].copy_from_slice(&number);
            renewal[10] = 0;
            renewal[12..16].copy_from_slice(&guest.ipv4.octets());
            let question = Udp { from: (guest.ipv4, 68), to: (gateway, 67), data: renewal };
            let frame = question.frame(guest.resolve(gateway), guest.mac);
            let answer = guest.ask("an answer to a renewal", &frame, |frame| {
                let udp = Udp::read(frame).filter(|udp| udp.from.1 == 67 && udp.data[4..8] == number)?;
                DhcpAnswer::read(&udp.data)
            });
            assert_eq!((answer.kind, answer.address), (5, guest.ipv4), "not renewed");
        }
    });
}
