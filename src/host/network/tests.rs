//! Rules as text, and then everything on real devices in a network namespace of the test's own: guests are taps
//! whose frames the tests write and read.
mod behind;
mod dhcp;
mod facade;
mod frames;
mod ground;
mod real;
mod spares;

use model::network::NetworkKind;
use model::{Name, NetworkId};

use super::cidr::Cidr;
use super::mac::Mac;
use super::plumbing::{Foreign, Port, Segment, Wanted};
use super::rules;

fn segment(number: u8, kind: NetworkKind) -> Segment {
    Segment {
        id: NetworkId(uuid::Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + u128::from(number))),
        bridge: format!("toftbr{number}"),
        cidr: Cidr::for_network(&format!("10.77.{number}.0/24")).unwrap(),
        kind,
        mtu: 1500,
        host_device: None,
    }
}

fn port(segment: &Segment, last: u8, name: &str) -> Port {
    let [a, b, c, _] = segment.cidr.base().octets();
    let name: Name = name.parse().unwrap();
    Port { network: segment.id, mac: Mac([0x52, 0x54, 0, 0, c, last]), ipv4: [a, b, c, last].into(), name }
}

#[test]
fn the_ruleset_is_the_one_on_record() {
    let (nat, mut isolated) = (segment(0, NetworkKind::Nat), segment(1, NetworkKind::Isolated));
    isolated.host_device = Some("eth1".to_owned());
    let ports = vec![port(&nat, 2, "web1"), port(&nat, 3, "web2"), port(&isolated, 2, "db1")];
    let gateway = Some((isolated.bridge_mac(), isolated.cidr.gateway()));
    let foreign = [Foreign { index: 7, gateway }, Foreign { index: 9, gateway: None }];
    let wanted = Wanted { segments: vec![nat, isolated], ports };
    let text = rules::ruleset(&wanted, &["eth0".to_owned()], &foreign);
    assert_eq!(text, include_str!("tests/ruleset.nft"), "the text is:\n{text}");
}

#[test]
fn without_ports_there_are_no_empty_element_lists() {
    let wanted = Wanted { segments: vec![segment(0, NetworkKind::Nat)], ports: Vec::new() };
    assert!(!rules::ruleset(&wanted, &[], &[]).contains("elements"));
}
