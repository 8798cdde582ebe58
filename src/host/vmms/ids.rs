//! User ids for VMMs: each process gets one that no other has, so that neither signals nor limits reach from one
//! server to another. Nothing is saved: a VMM owns no file, so an id means nothing once its process has ended.
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;

/// The first id and how many there are: above those that distributions and systemd hand to people, services and
/// containers, and below those that some systems take for negative.
const FIRST: u32 = 0x7800_0000;
const COUNT: u32 = 0x0100_0000;

/// Hands out ids.
#[derive(Debug)]
pub(super) struct Ids {
    next: u32,
    /// Of VMMs that an earlier daemon, or another on this host, has started.
    taken: HashSet<u32>,
}

impl Ids {
    /// Begins somewhere, so that daemons beside each other do not meet, and past what is in use.
    pub(super) fn new() -> std::io::Result<Ids> {
        let mut random = [0; 4];
        sys::random::fill(&mut random)?;
        let processes = std::fs::read_dir("/proc")?.flatten();
        // A process that ends meanwhile has given its id back.
        let owners = processes.filter_map(|process| process.metadata().ok()).map(|found| found.uid());
        let taken = owners.filter(|uid| (FIRST..FIRST + COUNT).contains(uid)).collect();
        Ok(Ids { next: u32::from_ne_bytes(random) % COUNT, taken })
    }

    /// An id that no VMM has. The range is so wide that none comes round again while its first process lives.
    pub(super) fn take(&mut self) -> u32 {
        // There are far fewer processes than ids, so one more step than there are taken ones always finds one.
        for _ in 0..=self.taken.len() {
            let id = FIRST + self.next;
            self.next = (self.next + 1) % COUNT;
            if !self.taken.contains(&id) {
                return id;
            }
        }
        FIRST + self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_id_is_handed_out_twice_or_while_it_is_in_use() {
        let mut ids = Ids { next: COUNT - 2, taken: HashSet::from([FIRST + COUNT - 1, FIRST + 1]) };
        let taken: Vec<u32> = (0..4).map(|_| ids.take()).collect();
        assert_eq!(taken, [FIRST + COUNT - 2, FIRST, FIRST + 2, FIRST + 3]);
        assert!(Ids::new().unwrap().take() >= FIRST);
    }
}
