use std::collections::BTreeSet;
use std::convert::Infallible;

use proptest::prelude::*;

use super::*;

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn next_free(range: Cidr, taken: &BTreeSet<Ipv4Addr>, latest: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
    range.next_free(latest, |address| Ok::<_, Infallible>(taken.contains(&address))).unwrap()
}

#[test]
fn what_a_network_may_have_is_told_from_what_it_may_not() {
    for good in ["10.77.0.0/24", "172.31.255.248/29", "192.168.0.0/16", "10.0.0.0/16"] {
        assert_eq!(Cidr::for_network(good).unwrap().to_string(), good);
    }
    let refused = [
        "",
        "10.0.0.0",
        "10.0.0.0/",
        "10.0.0.0/+8",
        "10.0.0.0/33",
        "10.0.0.0/024",
        "10.0.0/24",
        "10.0.0.0/24 ",
        "::/64",
        "10.0.0.1/24",
        "10.0.0.0/8",
        "10.0.0.0/30",
        "8.8.8.0/24",
        "172.32.0.0/24",
        "0.0.0.0/0",
    ];
    for bad in refused {
        assert!(Cidr::for_network(bad).is_err(), "{bad:?} was taken");
    }
}

#[test]
fn a_range_with_host_bits_is_refused_with_the_range_that_was_meant() {
    let told = Cidr::for_network("10.1.2.3/24").unwrap_err().to_string();
    assert_eq!(told, "10.1.2.3/24 is not the first address of its range; write 10.1.2.0/24");
}

#[test]
fn addresses_are_given_lowest_first_until_none_is_left() {
    let small = cidr("10.0.0.0/29");
    let mut taken = BTreeSet::new();
    let mut given = Vec::new();
    while let Some(address) = next_free(small, &taken, None) {
        assert!(taken.insert(address));
        given.push(address.to_string());
    }
    assert_eq!(given, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
    assert_eq!(small.places(), 5);
}

#[test]
fn an_address_that_was_given_back_is_given_again_after_all_others() {
    let small = cidr("10.0.0.0/29");
    let (mut latest, mut given) = (None, Vec::new());
    for _ in 0..7 {
        latest = next_free(small, &BTreeSet::from(["10.0.0.4".parse().unwrap()]), latest);
        given.push(latest.unwrap().to_string());
    }
    let round = ["10.0.0.2", "10.0.0.3", "10.0.0.5", "10.0.0.6"];
    assert_eq!(given, [&round[..], &round[..3]].concat());
    for outside in ["9.0.0.0", "10.0.0.7", "11.0.0.0"] {
        assert_eq!(next_free(small, &BTreeSet::new(), outside.parse().ok()).unwrap().to_string(), "10.0.0.2");
    }
}

#[test]
fn the_chosen_range_avoids_what_is_taken() {
    assert_eq!(free_range(&[]).unwrap().to_string(), "10.77.0.0/24");
    assert_eq!(free_range(&[cidr("10.77.0.0/25")]).unwrap().to_string(), "10.77.1.0/24");
    assert_eq!(free_range(&[cidr("10.0.0.0/8")]).unwrap().to_string(), "192.168.0.0/24");
    assert_eq!(free_range(&[cidr("0.0.0.0/0")]), None);
}

proptest! {
    #[test]
    fn reading_never_panics_and_what_is_read_prints_the_same(text in "[0-9./ ]{0,24}") {
        if let Ok(read) = text.parse::<Cidr>() {
            prop_assert_eq!(read.to_string().parse::<Cidr>(), Ok(read));
        }
    }

    #[test]
    fn the_next_free_address_has_a_place_and_is_not_taken(
        base in any::<u32>(), prefix in 16u8..=29, taken in proptest::collection::btree_set(0u32..40, 0..40),
        latest in proptest::option::of(0u32..40)
    ) {
        let range = Cidr::around(base.into(), prefix);
        let taken = taken.into_iter().map(|n| Ipv4Addr::from(u32::from(range.base()).wrapping_add(n))).collect();
        let latest = latest.map(|n| Ipv4Addr::from(u32::from(range.base()).wrapping_add(n)));
        match next_free(range, &taken, latest) {
            Some(address) => prop_assert!(range.has_place(address) && !taken.contains(&address)),
            None => prop_assert!(taken.len() as u32 >= range.places()),
        }
    }

    #[test]
    fn overlap_is_having_an_address_in_common(a in any::<u32>(), p in 24u8..=32, b in any::<u32>(), q in 24u8..=32) {
        let (one, other) = (Cidr::around(a.into(), p), Cidr::around((a ^ (b & 0x3ff)).into(), q));
        let common = (u32::from(one.base())..=u32::from(one.broadcast())).any(|x| other.contains(x.into()));
        prop_assert_eq!(one.overlaps(other), common);
        prop_assert_eq!(other.overlaps(one), common);
    }
}
