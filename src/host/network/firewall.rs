//! Whether somebody else's firewall drops what passes through the host. In nftables a packet is through when every table
//! lets it through, so that Toft's own `accept` overrides nobody's `drop`. Only looked at, never changed: whose rules these are
//! knows why they are there. Rules made with the old `iptables-legacy` are not seen. `report` asks.
use std::process::Stdio;

use serde::Deserialize;
use tokio::process::Command;

use super::limits::{FOREIGN_CHAINS_MAX, NFT_MAX};
use super::mac::BRIDGE_PREFIX;
use super::program;

/// Toft's tables are called so in every family.
const OWN_TABLE: &str = "toft";

/// Families whose `forward` hook servers' packets pass.
const FAMILIES: [&str; 3] = ["ip", "inet", "bridge"];

/// A chain at the `forward` hook that is not Toft's.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Chain {
    family: String,
    table: String,
    name: String,
    #[serde(default)]
    hook: Option<String>,
}

impl Chain {
    /// As `nft` and its users name it.
    pub(crate) fn words(&self) -> String {
        format!("{} {} {}", self.family, self.table, self.name)
    }
}

/// What `nft -j list chains` says.
#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    chain: Option<Chain>,
}

/// Chains that drop what they do not accept and have no rule about Toft's bridges; or why nobody can tell.
pub(crate) async fn droppers() -> Result<Vec<Chain>, String> {
    let mut found = Vec::new();
    for chain in foreign(&nft(&["-j", "list", "chains"]).await?)? {
        let Chain { family, table, name, .. } = &chain;
        let rules = nft(&["list", "chain", family, table, name]).await?;
        // Whoever wrote the bridges' names anywhere in the table has thought of them.
        if drops_the_rest(&rules) && !nft(&["list", "table", family, table]).await?.contains(BRIDGE_PREFIX) {
            found.push(chain);
        }
    }
    Ok(found)
}

async fn nft(arguments: &[&str]) -> Result<String, String> {
    let nft = program::find("nft").ok_or("nft is missing; install it with `apt install nftables`")?;
    let output = Command::new(nft).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(NFT_MAX, output)
        .await
        .map_err(|_| format!("nft did not end within {} s", NFT_MAX.as_secs()))?
        .map_err(|cause| format!("cannot start nft: {cause}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("nft failed").to_owned())
}

fn foreign(listing: &str) -> Result<Vec<Chain>, String> {
    let listing: Listing =
        serde_json::from_str(listing).map_err(|cause| format!("cannot read what nft lists: {cause}"))?;
    let chains = listing.nftables.into_iter().filter_map(|item| item.chain);
    let foreign = chains.filter(|chain| {
        chain.hook.as_deref() == Some("forward")
            && FAMILIES.contains(&chain.family.as_str())
            && chain.table != OWN_TABLE
    });
    Ok(foreign.take(FOREIGN_CHAINS_MAX).collect())
}

/// By its policy, or by a last rule that nothing gets past.
fn drops_the_rest(rules: &str) -> bool {
    let lines: Vec<&str> =
        rules.lines().map(str::trim).filter(|line| !line.is_empty() && *line != "}").collect();
    let policy = lines.iter().any(|line| line.starts_with("type ") && line.contains("policy drop"));
    let last = lines.last().map(|line| verdict(line)).unwrap_or_default();
    policy || last == "drop" || last == "reject" || last.starts_with("reject with ")
}

/// A rule without its counter, which stands before the verdict.
fn verdict(rule: &str) -> &str {
    let Some(rest) = rule.strip_prefix("counter packets ") else { return rule };
    rest.splitn(4, ' ').nth(3).unwrap_or_default()
}

#[cfg(test)]
mod tests;
