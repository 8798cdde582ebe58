//! Somebody who may write to a directory of the daemon's swaps a file for a link to a secret, over and over, while
//! the daemon opens it. Opening the ordinary way falls for it; opening as the host does never.
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use sys::beneath::{Access, open};

use crate::cell::PATIENCE;

const SECRET: &str = "secret";
const OURS: &str = "ours";
/// Openings that must all be right.
const ROUNDS: usize = 20_000;

struct Ground {
    directory: tempfile::TempDir,
}

impl Ground {
    /// `server/file` is ours; `other/file` is what it is swapped for, made by `link`.
    fn new(link: impl FnOnce(&Path)) -> Ground {
        let directory = tempfile::Builder::new().prefix("toft-racer").tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for folder in ["server", "other", "away"] {
            std::fs::create_dir(path(folder)).unwrap();
        }
        std::fs::write(path("server/file"), OURS).unwrap();
        std::fs::write(path("away/file"), SECRET).unwrap();
        link(directory.path());
        Ground { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Opens while `one` and `other` are exchanged; answers how often it was ours, and how often the secret.
    fn race(
        &self,
        (one, other): (&str, &str),
        rounds: usize,
        opener: impl Fn() -> io::Result<File>,
        enough: impl Fn(usize, usize) -> bool,
    ) -> (usize, usize) {
        let (one, other) = (self.path(one), self.path(other));
        let over = AtomicBool::new(false);
        let deadline = Instant::now() + PATIENCE;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    renameat2(AT_FDCWD, &one, AT_FDCWD, &other, RenameFlags::RENAME_EXCHANGE).unwrap();
                }
            });
            let (mut ours, mut secret) = (0, 0);
            for _ in 0..rounds {
                let mut text = String::new();
                let read = opener().and_then(|mut file| file.read_to_string(&mut text));
                match (read, text.as_str()) {
                    (Ok(_), SECRET) => secret += 1,
                    (Ok(_), _) => ours += 1,
                    // A link, seen and refused.
                    (Err(_), _) => (),
                }
                if enough(ours, secret) || Instant::now() > deadline {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
            (ours, secret)
        })
    }

    fn check(&self, swapped: (&str, &str)) {
        let state = self.directory.path();
        let host = || open(state, Path::new("server/file"), Access::Read);
        let (ours, secret) = self.race(swapped, ROUNDS, host, |_, _| false);
        assert_eq!(secret, 0, "the secret was opened; ours {ours} times");
        assert!(ours > 0, "the file was never opened, so nothing was raced");
        // The racer is real: the ordinary way falls for it.
        let careless = || File::open(state.join("server/file"));
        let (_, secret) = self.race(swapped, usize::MAX, careless, |ours, secret| ours > 0 && secret > 0);
        assert!(secret > 0, "the swap was never seen, so it proves nothing");
    }
}

#[test]
fn a_symbolic_link_swapped_in_is_not_followed() {
    let ground = Ground::new(|at| {
        std::os::unix::fs::symlink(at.join("away/file"), at.join("other/file")).unwrap();
    });
    ground.check(("server/file", "other/file"));
}

#[test]
fn a_hard_link_swapped_in_is_not_opened() {
    let ground = Ground::new(|at| std::fs::hard_link(at.join("away/file"), at.join("other/file")).unwrap());
    ground.check(("server/file", "other/file"));
}

#[test]
fn a_directory_swapped_for_a_link_is_not_entered() {
    let ground = Ground::new(|at| std::os::unix::fs::symlink(at.join("away"), at.join("link")).unwrap());
    ground.check(("server", "link"));
}
