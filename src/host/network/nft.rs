//! Applies texts of [`rules`](super::rules) with `nft`, each in one transaction of the kernel.
//! It reads nothing back. `HostPlumbing` uses it.
use super::limits::NFT_MAX;
use super::plumbing::PlumbingError;
use super::program;

/// Whether Toft's tables were there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Applied {
    /// The whole text is in force.
    Yes,
    /// Nothing was changed, because a table that the text adds to does not exist.
    NoTable,
}

/// Applies all of `text` or nothing.
pub(super) async fn apply(text: &str) -> Result<Applied, PlumbingError> {
    let nft = program::need("nft", "nftables")?;
    match program::run(&nft, &["-f", "-"], text, NFT_MAX).await {
        Ok(()) => Ok(Applied::Yes),
        Err(PlumbingError::Failed(detail)) if detail.contains("No such file or directory") => {
            Ok(Applied::NoTable)
        }
        Err(other) => Err(other),
    }
}
