#![no_main]
use std::sync::LazyLock;

/// In memory, because every input makes files. The next run finds what a crash leaves.
static PLACE: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir_in("/dev/shm").unwrap());

fuzz::target!(|data| host::fuzz::carried(data, PLACE.path()));
