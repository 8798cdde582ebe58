use std::collections::BTreeSet;

use super::*;

#[test]
fn a_servers_addresses_stay_and_all_differ() {
    let server = ServerId::new();
    let tried: Vec<Mac> = Mac::of_server(server, 0).collect();
    assert_eq!(tried, Mac::of_server(server, 0).collect::<Vec<_>>());
    assert!(tried.len() as u32 == MAC_TRIES_MAX && tried[0].to_string().starts_with("52:54:00:"));
    let distinct: BTreeSet<Mac> = tried.into_iter().chain(Mac::of_server(server, 1)).collect();
    assert!(distinct.len() as u32 > MAC_TRIES_MAX, "the digest repeats");
}

#[test]
fn names_fit_the_kernels_fifteen_characters_and_taps_are_told_from_bridges() {
    let tap = Mac([0x52, 0x54, 0, 0xab, 0, 0x0f]).tap_name();
    assert_eq!(tap, "tofttapab000f");
    assert!(tap.len() <= 15);
    assert!(!BRIDGE_PREFIX.starts_with(TAP_PREFIX) && !TAP_PREFIX.starts_with(BRIDGE_PREFIX));
}

#[test]
fn an_address_that_could_share_anothers_tap_is_no_servers() {
    let of_bridge = Mac::of_bridge(NetworkId::new());
    for mac in Mac::of_server(ServerId::new(), 0).take(9).chain([Mac::random()]) {
        assert!(Mac::is_of_some_server(&mac.to_string()), "{mac}");
        let Mac([.., a, b, c]) = mac;
        assert_eq!(Mac([0x02, 0x11, 0x22, a, b, c]).tap_name(), mac.tap_name());
    }
    for other in [
        "02:11:22:ab:cd:ef",
        "53:54:00:ab:cd:ef",
        "52:54:00:AB:cd:ef",
        "52:54:00:ab:cd",
        &of_bridge.to_string(),
    ] {
        assert!(!Mac::is_of_some_server(other), "{other}");
    }
}

#[test]
fn a_bridge_has_a_local_unicast_address() {
    let Mac([first, ..]) = Mac::of_bridge(NetworkId::new());
    assert_eq!(first & 0b11, 0b10);
}

#[test]
fn text_is_read_strictly() {
    assert_eq!("52:54:00:0a:0B:0c".parse::<Mac>().unwrap().to_string(), "52:54:00:0a:0b:0c");
    for bad in [
        "",
        "52:54:00:0a:0b",
        "52:54:00:0a:0b:0c:0d",
        "52-54-00-0a-0b-0c",
        "+2:54:00:0a:0b:0c",
        "é:54:00:0a:0b:0c",
    ] {
        assert!(bad.parse::<Mac>().is_err(), "{bad:?} was taken");
    }
}
