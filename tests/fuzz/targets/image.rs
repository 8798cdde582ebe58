#![no_main]
use std::sync::LazyLock;

/// In memory, because what comes in is synced to the disk piece by piece. The next run finds what a crash leaves.
static PLACE: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir_in("/dev/shm").unwrap());

fuzz::target!(|data| host::fuzz::image(data, PLACE.path()));
