use super::*;

#[test]
fn runs_are_found_at_every_place_of_a_word() {
    for (from, to) in [(0, 1), (63, 65), (64, 128), (1, 200), (255, 256), (0, 256), (130, 131)] {
        let mut pages = Pages::of(256);
        pages.set_range(from, to);
        let found: Vec<_> = runs(&pages.words).collect();
        assert_eq!(found, [(from * PAGE_BYTES, (to - from) * PAGE_BYTES)]);
        assert!(pages.clear(from) && !pages.clear(from));
    }
    let mut pages = Pages::of(256);
    pages.set_range(300, 400);
    assert_eq!(runs(&pages.words).count(), 0);
}

#[test]
fn all_pages_are_one_run_and_counted() {
    let all = Pages::all(1000);
    assert_eq!(all.count(), 1000);
    assert_eq!(all.extents().collect::<Vec<_>>(), [Extent { offset: 0, bytes: 1000 * PAGE_BYTES }]);
}

#[test]
fn logs_of_regions_lie_one_behind_the_other() {
    let mut pages = Pages::of(256);
    pages.set(3);
    pages.add(&[vec![1, 0], vec![1 << 63, 2]]);
    let found: Vec<_> = (0..256).filter(|page| pages.has(*page)).collect();
    assert_eq!(found, [0, 3, 191, 193]);
    let part = Extent { offset: 128 * PAGE_BYTES, bytes: 64 * PAGE_BYTES };
    assert_eq!(pages.words_of(part), [1 << 63]);
    let beyond = Extent { offset: 256 * PAGE_BYTES, bytes: 64 * PAGE_BYTES };
    assert!(pages.words_of(beyond).is_empty());
}

#[test]
fn a_part_is_added_and_taken_out_alone() {
    let word = 64 * PAGE_BYTES;
    let mut pages = Pages::all(256);
    pages.clear_part(Extent { offset: word, bytes: 2 * word });
    assert_eq!(pages.count(), 128);
    pages.add_words(2 * word, &[1 << 5]);
    let rest = Extent { offset: word, bytes: 2 * word };
    assert_eq!(pages.words_of(rest), [0, 1 << 5]);
    pages.clear_part(Extent { offset: 3 * word, bytes: 2 * word });
    assert_eq!(pages.count(), 129);
}
