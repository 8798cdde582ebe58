//! A set of pages of memory, one bit each: what is to be kept, copied or sent. Pages count from the first byte of
//! memory, region after region, as in [`crate::Extent`].
use crate::Extent;
use crate::marks::PAGE_BYTES;

/// Pages of one word.
const WORD: u64 = 64;

/// A set of pages.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Pages {
    pub(crate) words: Vec<u64>,
    pages: u64,
}

impl Pages {
    /// None of this many pages.
    pub fn of(pages: u64) -> Pages {
        Pages { words: vec![0; pages.div_ceil(WORD) as usize], pages }
    }

    /// All of this many pages.
    pub fn all(pages: u64) -> Pages {
        let mut all = Pages::of(pages);
        all.set_range(0, pages);
        all
    }

    /// How many are in it.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds a page.
    pub fn set(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / WORD) as usize) {
            *word |= 1 << (page % WORD);
        }
    }

    /// Adds the pages from one up to another.
    pub fn set_range(&mut self, from: u64, to: u64) {
        let (mut page, to) = (from, to.min(self.pages));
        while page < to {
            match self.words.get_mut((page / WORD) as usize) {
                Some(word) if page.is_multiple_of(WORD) && to - page >= WORD => {
                    *word = u64::MAX;
                    page += WORD;
                }
                _ => {
                    self.set(page);
                    page += 1;
                }
            }
        }
    }

    /// Whether a page is in it.
    pub fn has(&self, page: u64) -> bool {
        self.words.get((page / WORD) as usize).is_some_and(|word| word >> (page % WORD) & 1 == 1)
    }

    /// Takes a page out; answers whether it was in it.
    pub fn clear(&mut self, page: u64) -> bool {
        let had = self.has(page);
        if let Some(word) = self.words.get_mut((page / WORD) as usize) {
            *word &= !(1 << (page % WORD));
        }
        had
    }

    /// Adds what logs found, one for each region in their order: words of 64 pages, the first page lowest. Regions
    /// have whole words of pages ([`crate::layout::ram_ranges`] gives no others for a valid machine).
    pub fn add(&mut self, regions: &[Vec<u64>]) {
        for (word, found) in self.words.iter_mut().zip(regions.iter().flatten()) {
            *word |= found;
        }
    }

    /// Takes all pages of a part out that begins and ends with a word.
    pub fn clear_part(&mut self, part: Extent) {
        let word = |offset: u64| (offset / PAGE_BYTES / WORD) as usize;
        let words = self.words.get_mut(word(part.offset)..word(part.offset + part.bytes));
        words.unwrap_or_default().fill(0);
    }

    /// Adds what was found from `offset` on, which begins a word: words of 64 pages, the first page lowest.
    pub fn add_words(&mut self, offset: u64, found: &[u64]) {
        let from = (offset / PAGE_BYTES / WORD) as usize;
        for (word, found) in self.words.iter_mut().skip(from).zip(found) {
            *word |= found;
        }
    }

    /// The words of a part that begins and ends with a word.
    pub fn words_of(&self, part: Extent) -> &[u64] {
        let word = |offset: u64| (offset / PAGE_BYTES / WORD) as usize;
        self.words.get(word(part.offset)..word(part.offset + part.bytes)).unwrap_or_default()
    }

    /// Adds those of another set.
    pub fn join(&mut self, other: &Pages) {
        self.add_words(0, &other.words);
    }

    /// Those that are not in another set.
    pub fn without(&self, other: &Pages) -> Pages {
        let others = other.words.iter().copied().chain(std::iter::repeat(0));
        let words = self.words.iter().zip(others).map(|(word, other)| word & !other).collect();
        Pages { words, pages: self.pages }
    }

    /// How many of a part are in it that begins and ends with a word.
    pub fn count_of(&self, part: Extent) -> u64 {
        self.words_of(part).iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The first pages in a row of a part that are in it.
    pub fn first(&self, part: Extent) -> Option<Extent> {
        let (mut page, end) = (part.offset / PAGE_BYTES, (part.offset + part.bytes) / PAGE_BYTES);
        while page < end && !self.has(page) {
            // Whole words of nothing are the usual case.
            let is_nothing = self.words.get((page / WORD) as usize).is_none_or(|word| *word == 0);
            page = if is_nothing { (page / WORD + 1) * WORD } else { page + 1 };
        }
        let first = page;
        while page < end && self.has(page) {
            page += 1;
        }
        (page > first).then_some(Extent { offset: first * PAGE_BYTES, bytes: (page - first) * PAGE_BYTES })
    }

    /// Pages in a row that are in it, ascending.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        runs(&self.words).map(|(offset, bytes)| Extent { offset, bytes })
    }

    /// The same of a part that begins and ends with a word.
    pub fn extents_of(&self, part: Extent) -> impl Iterator<Item = Extent> + '_ {
        runs(self.words_of(part)).map(move |(offset, bytes)| Extent { offset: part.offset + offset, bytes })
    }
}

/// Pages in a row that are set, as offset and bytes.
pub(crate) fn runs(words: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let pages = words.len() as u64 * WORD;
    let word = |page: u64| words.get((page / WORD) as usize).copied().unwrap_or_default();
    let has = move |page: u64| word(page) >> (page % WORD) & 1 == 1;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < pages && !has(at) {
            // Whole words of nothing are the usual case.
            at = if at.is_multiple_of(WORD) && word(at) == 0 { at + WORD } else { at + 1 };
        }
        let start = at;
        while at < pages && has(at) {
            // And whole words of everything.
            at = if at.is_multiple_of(WORD) && word(at) == u64::MAX { at + WORD } else { at + 1 };
        }
        (at > start).then_some((start * PAGE_BYTES, (at - start) * PAGE_BYTES))
    })
}

#[cfg(test)]
mod tests;
