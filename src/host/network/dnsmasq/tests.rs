use super::*;
use crate::network::cidr::Cidr;

fn segment(kind: NetworkKind) -> Segment {
    let cidr = Cidr::for_network("10.77.0.0/24").unwrap();
    Segment {
        id: model::NetworkId::new(),
        bridge: "toftbr0".to_owned(),
        cidr,
        kind,
        mtu: 1500,
        host_device: None,
    }
}

#[test]
fn an_isolated_network_has_neither_router_nor_outer_names() {
    let dnsmasq = Dnsmasq::new("/run/toft/networks/x".into());
    let nat = dnsmasq.config(&segment(NetworkKind::Nat));
    let isolated = dnsmasq.config(&segment(NetworkKind::Isolated));
    assert!(nat.contains("dhcp-option=option:router,10.77.0.1\n") && !nat.contains("no-resolv"));
    assert!(isolated.contains("dhcp-option=option:router\n") && isolated.contains("no-resolv\n"));
    for config in [nat, isolated] {
        assert!(config.contains("interface=toftbr0\nexcept-interface=lo\n"), "{config}");
        assert!(config.contains("dhcp-range=10.77.0.0,static,255.255.255.0,3600\n"), "{config}");
    }
}

#[test]
fn another_process_with_the_recorded_number_is_not_taken_for_dnsmasq() {
    let directory = tempfile::tempdir().unwrap();
    let dnsmasq = Dnsmasq::new(directory.path().to_owned());
    assert!(!dnsmasq.is_running());
    dnsmasq.replace("pid", &format!("{}\n", std::process::id())).unwrap();
    assert!(!dnsmasq.is_running());
    // Signalling it must not reach this test.
    dnsmasq.signal(Signal::TERM).unwrap();
    dnsmasq.replace("pid", "-1").unwrap();
    assert!(!dnsmasq.is_running());
}

#[test]
fn a_directory_that_keeps_dnsmasq_out_is_named() {
    let closed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let inner = closed.path().join("networks/x");
    make_reachable(&inner).unwrap();
    assert_eq!(barrier(&inner), Some(closed.path()));
    std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    assert_eq!(barrier(&inner), None);
}
