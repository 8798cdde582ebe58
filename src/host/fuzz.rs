//! What fuzzers call: text that comes from callers and other hosts, files that come from those, images and snapshots. No part of the daemon. `tests/fuzz` calls it with new
//! bytes, and the tests here with the seeds kept there.
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::Ipv4Addr;

use model::page::Sort;
use model::{Labels, Name};

pub use crate::images::fuzz::image;
pub use crate::migration::carried;
use crate::network::cidr::{Cidr, free_range};
use crate::network::mac::Mac;
use crate::servers::moving::parcel::Packed;
pub use crate::snapshots::fuzz::{snapshot, used};
use crate::store::records::{cursor, open_cursor};
use crate::store::selector::{self, Term};

const SORTS: [Sort; 4] = [Sort::CreatedAt, Sort::CreatedAtDescending, Sort::Name, Sort::NameDescending];

/// Letters at the edges of what names, selectors and ranges may hold.
const ALPHABET: &[u8; 32] = b"az09-AZ._/=,!: 1234568bcdefx\t~@+";

/// Reads `data` as what its first byte says: 0x80 and above, since `http` has the others. From 0xC0 on the bytes stand
/// for letters that matter, of which text is then made more often than of others.
pub fn text(data: &[u8]) {
    let Some((kind @ 0x80.., rest)) = data.split_first() else { return };
    let spelt: Vec<u8>;
    let letters = if *kind < 0xC0 {
        rest
    } else {
        spelt = rest.iter().map(|byte| ALPHABET[usize::from(byte % 32)]).collect();
        &spelt
    };
    let Ok(text) = std::str::from_utf8(letters) else { return };
    match kind % 8 {
        0 => position(text, SORTS[usize::from(kind / 8 % 4)]),
        1 => selection(text),
        2 => name(text),
        3 => range(text),
        4 => hardware(text),
        5 => labels(text),
        6 => ranges(text),
        _ => packed(text),
    }
}

/// A cursor that opens is one that was given out.
fn position(text: &str, sort: Sort) {
    let Ok(last) = open_cursor(text, sort) else { return };
    let again = cursor(&last, sort);
    assert_eq!(open_cursor(&again, sort).expect("it was just made"), last);
    for other in SORTS.into_iter().filter(|other| *other != sort) {
        assert!(open_cursor(&again, other).is_err(), "a cursor opens in two orders");
    }
}

fn selection(text: &str) {
    let Ok(terms) = selector::parse(text) else { return };
    assert!(terms.len() <= crate::limits::SELECTOR_TERMS_MAX);
    let words = |term: &Term| match term {
        Term::Is(key, value) => (key.clone(), Some(format!("{key}={value}"))),
        Term::IsNot(key, value) => (key.clone(), Some(format!("{key}!={value}"))),
        Term::Has(key) => (key.clone(), None),
        Term::HasNot(key) => (key.clone(), Some(format!("!{key}"))),
    };
    let again: Vec<String> = terms.iter().map(words).map(|(key, shown)| shown.unwrap_or(key)).collect();
    assert!(terms.iter().all(|term| !words(term).0.is_empty()), "a label without a name");
    assert_eq!(selector::parse(&again.join(",")), Ok(terms));
}

fn name(text: &str) {
    let edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase());
    let (first, last) = (text.bytes().next(), text.bytes().last());
    let inner = text.bytes().all(|byte| edge(Some(byte)) || byte == b'-');
    let right = edge(first) && edge(last) && inner && text.len() <= 63;
    assert_eq!(Name::try_from(text.to_owned()).is_ok(), right, "{text:?}");
}

fn labels(text: &str) {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    let map: BTreeMap<String, String> =
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let Ok(labels) = Labels::try_from(map) else { return };
    assert!(labels.iter().count() <= model::limits::LABELS_MAX);
    for (key, value) in labels.iter() {
        assert!(
            !key.is_empty() && key.len() <= 63 && value.len() <= 63 && key.is_ascii() && value.is_ascii()
        );
        assert!(matches!(selector::parse(&format!("{key}={value}")).as_deref(), Ok([Term::Is(..)])));
    }
}

fn range(text: &str) {
    if let Ok(cidr) = text.parse::<Cidr>() {
        assert_eq!(cidr.to_string().parse(), Ok(cidr));
        assert!(cidr.contains(cidr.base()) && cidr.contains(cidr.broadcast()) && cidr.overlaps(cidr));
    }
    let Ok(cidr) = Cidr::for_network(text) else { return };
    assert!((16..=29).contains(&cidr.prefix()) && cidr.base().is_private() && cidr.broadcast().is_private());
    assert_eq!(cidr.places(), (1_u32 << (32 - cidr.prefix())) - 3);
    let mut taken = BTreeSet::new();
    for _ in 0..4 {
        let free = cidr.next_free(None, |address| Ok::<_, Infallible>(taken.contains(&address)));
        let Ok(Some(address)) = free else { panic!("a network has places") };
        assert!(cidr.has_place(address) && taken.insert(address));
    }
    assert!(![cidr.base(), cidr.gateway(), cidr.broadcast()].iter().any(|address| taken.contains(address)));
}

fn ranges(text: &str) {
    let taken: Vec<Cidr> = text.split_whitespace().take(64).filter_map(|range| range.parse().ok()).collect();
    if let Some(free) = free_range(&taken) {
        assert!(taken.iter().all(|range| !range.overlaps(free)), "{free} is taken");
        assert!(Cidr::for_network(&free.to_string()).is_ok());
    }
    let gateway = |range: &Cidr| Ipv4Addr::from(u32::from(range.base()).saturating_add(1));
    assert!(taken.iter().all(|range| range.gateway() == gateway(range)));
}

/// A server's record from another host, as its check lets it through.
fn packed(text: &str) {
    let Ok(packed) = serde_json::from_str::<Packed>(text) else { return };
    if packed.check().is_err() {
        return;
    }
    assert!(
        (1..=model::limits::VCPUS_MAX).contains(&packed.vcpus)
            && packed.nics.len() <= model::limits::NICS_MAX
    );
    assert!(packed.disks.iter().all(|disk| disk.volume.size_bytes <= model::limits::VOLUME_BYTES_MAX));
    let again = serde_json::to_string(&packed).expect("what was read can be written");
    assert_eq!(serde_json::from_str::<Packed>(&again).expect("it was just written"), packed);
}

fn hardware(text: &str) {
    let Ok(mac) = text.parse::<Mac>() else { return };
    assert_eq!(mac.to_string(), text.to_ascii_lowercase());
    // IFNAMSIZ with its terminator.
    assert!(mac.tap_name().len() < 16);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use seeds::INPUTS;
    use tempfile::TempDir;

    /// In memory where there is such a place, since what comes in is synced.
    fn place() -> TempDir {
        let shared = Path::new("/dev/shm");
        if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() }.unwrap()
    }

    #[test]
    fn seeds_of_callers_text_hold() {
        seeds::replay("api", super::text);
    }

    /// One that is no record any more would reach nothing.
    #[test]
    fn the_seed_of_a_record_from_another_host_is_read() {
        let kept = seeds::kept("api");
        let (_, seed) = kept.iter().find(|(name, _)| name == "packed").unwrap();
        let packed = serde_json::from_slice::<super::Packed>(&seed[1..]).unwrap();
        packed.check().unwrap();
    }

    #[test]
    fn seeds_of_images_hold() {
        let images = place();
        seeds::replay("image", |data| super::image(data, images.path()));
    }

    #[test]
    fn seeds_of_snapshots_hold() {
        let place = place();
        seeds::replay("snapshot", |data| super::snapshot(data, place.path()));
    }

    #[test]
    fn seeds_of_lists_of_used_memory_hold() {
        seeds::replay("used", super::used);
    }

    #[test]
    fn seeds_of_files_from_another_host_hold() {
        let place = place();
        seeds::replay("carried", |data| super::carried(data, place.path()));
    }

    #[test]
    fn inputs_near_the_seeds_of_lists_of_used_memory_hold() {
        seeds::vary("used", INPUTS, super::used);
    }

    #[test]
    fn inputs_near_the_seeds_of_files_from_another_host_hold() {
        let place = place();
        seeds::vary("carried", INPUTS, |data| super::carried(data, place.path()));
    }

    #[test]
    fn inputs_near_the_seeds_of_callers_text_hold() {
        seeds::vary("api", INPUTS, super::text);
    }

    #[test]
    fn inputs_near_the_seeds_of_images_hold() {
        let images = place();
        seeds::vary("image", INPUTS, |data| super::image(data, images.path()));
    }

    #[test]
    fn inputs_near_the_seeds_of_snapshots_hold() {
        let place = place();
        seeds::vary("snapshot", INPUTS, |data| super::snapshot(data, place.path()));
    }
}
