//! Networks: layer 2 with addresses. What the host's kernel and programs do for them goes through [`Plumbing`].
//! It knows no VMM and no HTTP. Called by the facade, and by `servers` for addresses and taps.
//!
//! ```text
//!  Networks (records, background work) ──▶ addresses (who has which)      pure: cidr · mac · rules
//!        └── Plumbing ──▶ HostPlumbing ──▶ spares, links (netlink) · elements · nft · dnsmasq · forwarding
//! ```
mod addresses;
pub(crate) mod announce;
pub mod cidr;
mod dnsmasq;
mod elements;
pub(crate) mod firewall;
mod forwarding;
mod host;
pub mod limits;
mod links;
pub mod mac;
mod netlink;
mod networks;
mod nft;
pub mod plumbing;
pub(crate) mod program;
mod records;
pub mod rules;
mod spares;
pub mod testing;

pub(crate) use addresses::{Reservation, owner};
pub use host::HostPlumbing;
pub(crate) use networks::Lease;
pub use networks::Networks;
pub use plumbing::{Plumbing, PlumbingError, Port, Segment, Surroundings, Wanted};

/// DNS domain of every network. `internal` is reserved for private use, so no name of the world is hidden.
pub const DOMAIN: &str = "toft.internal";

pub(crate) const TABLES: &str = concat!(
    crate::table!("networks"),
    "CREATE TABLE addresses (
        network TEXT NOT NULL REFERENCES networks (id), ipv4 INTEGER NOT NULL, mac TEXT NOT NULL UNIQUE,
        server TEXT NOT NULL, nic INTEGER NOT NULL, name TEXT NOT NULL, PRIMARY KEY (network, ipv4)) STRICT;
     CREATE UNIQUE INDEX addresses_by_server ON addresses (server, nic);"
);

/// The latest address that was chosen for an interface, as a number.
pub(crate) const LATEST: &str = "ALTER TABLE networks ADD COLUMN latest_ipv4 INTEGER;";

#[cfg(test)]
mod tests;
