//! Whether the disk has room, asked before anything is begun. The answer can be outdated at once, so a disk that
//! fills up later is handled where it is written to. `volumes`, `images` and `store` ask.
use std::path::Path;

use model::Code;

use super::limits::RESERVE_BYTES;
use crate::error::{Error, Result};

/// The file system of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Space {
    /// In all.
    pub total_bytes: u64,
    /// For us to use.
    pub free_bytes: u64,
    /// In use. Some of what is neither may be kept for root, or for other users of a shared disk.
    pub used_bytes: u64,
}

/// Looks at the file system that holds `directory`.
pub(crate) fn look(directory: &Path) -> std::io::Result<Space> {
    let found = rustix::fs::statvfs(directory)?;
    Ok(Space {
        total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        used_bytes: found.f_blocks.saturating_sub(found.f_bfree).saturating_mul(found.f_frsize),
    })
}

/// Fails with `disk_full` when `now_bytes` cannot be written, or a file that grows to `later_bytes` could never be.
pub(crate) fn check(directory: &Path, now_bytes: u64, later_bytes: u64) -> Result<()> {
    let shown = directory.display();
    let space = look(directory).map_err(|cause| Error::file(format!("cannot look at {shown}"), cause))?;
    judge(space, now_bytes, later_bytes).map_err(|detail| Error::new(Code::DiskFull, detail))
}

fn judge(space: Space, now_bytes: u64, later_bytes: u64) -> std::result::Result<(), String> {
    if now_bytes.saturating_add(RESERVE_BYTES) > space.free_bytes {
        return Err(format!(
            "{now_bytes} bytes are needed, and {RESERVE_BYTES} are kept for the host, but only {} are free; delete \
             volumes or images, or add space",
            space.free_bytes
        ));
    }
    if later_bytes > space.total_bytes {
        return Err(format!(
            "{later_bytes} bytes are more than the {} that the host's disk has in all; ask for less",
            space.total_bytes
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_stays_and_what_can_never_fit_is_refused() {
        let space = Space { total_bytes: 1000 << 20, free_bytes: 100 << 20, used_bytes: 900 << 20 };
        assert_eq!(judge(space, 36 << 20, 1000 << 20), Ok(()));
        assert!(judge(space, (36 << 20) + 1, 0).unwrap_err().contains("are free"));
        assert!(judge(space, 0, (1000 << 20) + 1).unwrap_err().contains("in all"));
        assert!(judge(space, u64::MAX, u64::MAX).is_err());
    }
}
