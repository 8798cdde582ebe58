//! Applies texts of [`rules`](super::rules) with `nft`, each in one transaction of the kernel.
//! It reads nothing back. `HostPlumbing` uses it.
use super::limits::NFT_MAX;
use super::plumbing::PlumbingError;
use super::program;

/// Applies all of `text` or nothing. Whatever `nft` complains of, nothing of the text is in force: that something was not
/// found is no tame case, since it may be a module of the kernel that the rules need.
pub(super) async fn apply(text: &str) -> Result<(), PlumbingError> {
    let nft = program::need("nft", "nftables")?;
    program::run(&nft, &["-f", "-"], text, NFT_MAX).await
}
