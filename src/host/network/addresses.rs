//! Which interface has which address: rows in the caller's transaction. An address is reserved when its server
//! is made and given back when it is deleted, so it is known before the server boots and never moves.
//! It touches no device. `servers` calls it through [`Networks`](super::Networks).
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use model::network::Network;
use model::{Code, Name, NetworkId, ServerId};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::cidr::Cidr;
use super::mac::Mac;
use super::plumbing::Port;
use crate::error::{Error, Result};
use crate::store::{Tx, records};

/// An address to reserve for an interface.
pub(crate) struct Reservation<'a> {
    /// Whose interface.
    pub server: ServerId,
    /// The server's name, which DNS answers.
    pub name: &'a Name,
    /// Position of the interface.
    pub index: u8,
    /// Its hardware address.
    pub mac: &'a str,
    /// The address asked for; the next free one when absent.
    pub ipv4: Option<Ipv4Addr>,
}

/// A hardware address that no interface has, for interface `index` of a server that is being made: `promised`, if that is one.
pub(super) fn free_mac(
    connection: &Connection,
    promised: Option<Mac>,
    server: ServerId,
    index: u8,
) -> Result<Mac> {
    let mut statement = connection.prepare_cached("SELECT 1 FROM addresses WHERE mac = ?1")?;
    for mac in promised.into_iter().chain(Mac::of_server(server, index)) {
        if !statement.exists([mac.to_string()])? {
            return Ok(mac);
        }
    }
    Err(Error::new(Code::NoAddress, "no free hardware address was found; delete servers that are not used"))
}

/// Reserves an address. The network's record counts it.
pub(super) fn reserve(tx: &Tx<'_>, network: NetworkId, wanted: Reservation<'_>) -> Result<Ipv4Addr> {
    let mut network: Network = records::one(tx, network.0)?;
    let range = range(&network)?;
    let mac: Mac =
        wanted.mac.parse().map_err(|cause| Error::internal("a hardware address is not one", cause))?;
    let ipv4 = match wanted.ipv4 {
        Some(asked) => check_asked(tx, asked, range, &network, wanted.index)?,
        None => give_next(tx, &network, range)?,
    };
    tx.prepare_cached(
        "INSERT INTO addresses (network, ipv4, mac, server, nic, name) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .execute(params![
        network.id.to_string(),
        u32::from(ipv4),
        mac.to_string(),
        wanted.server.to_string(),
        wanted.index,
        wanted.name.as_str()
    ])?;
    count(tx, &mut network)?;
    Ok(ipv4)
}

/// Addresses go round: one that was just given back rests for as long as it can, so that neither a client that has not
/// noticed nor dnsmasq, which would have to be started anew, still knows it as somebody else's.
fn give_next(tx: &Tx<'_>, network: &Network, range: Cidr) -> Result<Ipv4Addr> {
    let id = network.id.to_string();
    let latest: Option<u32> = tx
        .prepare_cached("SELECT latest_ipv4 FROM networks WHERE id = ?1")?
        .query_row([&id], |row| row.get(0))?;
    let free = range.next_free(latest.map(Ipv4Addr::from), |address| is_taken(tx, network.id, address))?;
    let ipv4 = free.ok_or_else(|| exhausted(network))?;
    tx.prepare_cached("UPDATE networks SET latest_ipv4 = ?2 WHERE id = ?1")?
        .execute(params![id, u32::from(ipv4)])?;
    Ok(ipv4)
}

/// One look at an index, since a network can have thousands.
fn is_taken(connection: &Connection, network: NetworkId, ipv4: Ipv4Addr) -> Result<bool> {
    let mut statement =
        connection.prepare_cached("SELECT 1 FROM addresses WHERE network = ?1 AND ipv4 = ?2")?;
    Ok(statement.exists(params![network.to_string(), u32::from(ipv4)])?)
}

fn check_asked(tx: &Tx<'_>, asked: Ipv4Addr, range: Cidr, network: &Network, index: u8) -> Result<Ipv4Addr> {
    let pointer = format!("/nics/{index}/ipv4");
    if !range.has_place(asked) {
        let detail = format!(
            "{asked} cannot be used on network {} ({range}); choose one between {} and {}, or leave it out",
            network.name,
            Ipv4Addr::from(u32::from(range.gateway()).saturating_add(1)),
            Ipv4Addr::from(u32::from(range.broadcast()).saturating_sub(1)),
        );
        return Err(Error::invalid(pointer, "out_of_range", detail));
    }
    if is_taken(tx, network.id, asked)? {
        let detail = format!("{asked} belongs to another server; choose another, or leave it out");
        return Err(Error::invalid(pointer, "taken", detail));
    }
    Ok(asked)
}

fn exhausted(network: &Network) -> Error {
    Error::new(
        Code::NoAddress,
        format!(
            "all {} addresses of network {} ({}) belong to servers; delete servers, or make a larger network and \
             use that",
            network.addresses_total, network.name, network.ipv4_cidr
        ),
    )
}

/// Changes the name under which DNS knows a server.
pub(super) fn rename(tx: &Tx<'_>, server: ServerId, name: &Name) -> Result<()> {
    tx.prepare_cached("UPDATE addresses SET name = ?2 WHERE server = ?1")?
        .execute(params![server.to_string(), name.as_str()])?;
    Ok(())
}

/// Gives every address of a server back. Repeatable.
pub(super) fn release(tx: &Tx<'_>, server: ServerId) -> Result<()> {
    let networks: BTreeSet<NetworkId> = {
        let mut statement = tx.prepare_cached("DELETE FROM addresses WHERE server = ?1 RETURNING network")?;
        let rows = statement.query_map([server.to_string()], |row| row.get::<_, String>(0))?;
        rows.map(|id| {
            id?.parse().map_err(|cause| Error::internal("a record of the host cannot be read", cause))
        })
        .collect::<Result<_>>()?
    };
    for id in networks {
        if let Some(mut network) = records::find::<Network>(tx, id.0)? {
            count(tx, &mut network)?;
        }
    }
    Ok(())
}

/// Who has an address on the network, lowest address first.
pub(super) fn of_network(connection: &Connection, network: NetworkId) -> Result<Vec<Port>> {
    let mut statement = connection
        .prepare_cached("SELECT ipv4, mac, name FROM addresses WHERE network = ?1 ORDER BY ipv4")?;
    let rows = statement.query_map([network.to_string()], columns)?;
    rows.map(|row| port(network, row?)).collect()
}

/// The interface with this hardware address, if it has an address on the network.
pub(super) fn of_interface(connection: &Connection, network: NetworkId, mac: &str) -> Result<Option<Port>> {
    let mut statement =
        connection.prepare_cached("SELECT ipv4, mac, name FROM addresses WHERE network = ?1 AND mac = ?2")?;
    let row = statement.query_row([&network.to_string(), mac], columns).optional()?;
    row.map(|row| port(network, row)).transpose()
}

fn columns(row: &Row<'_>) -> rusqlite::Result<(u32, String, String)> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
}

fn port(network: NetworkId, (ipv4, mac, name): (u32, String, String)) -> Result<Port> {
    let unreadable = |cause: Box<dyn std::error::Error + Send + Sync>| {
        Error::internal("a record of the host cannot be read", cause)
    };
    Ok(Port {
        network,
        mac: mac.parse().map_err(|cause| unreadable(Box::new(cause)))?,
        ipv4: ipv4.into(),
        name: name.parse().map_err(|cause| unreadable(Box::new(cause)))?,
    })
}

/// Names of the servers that have an address on the network.
pub(super) fn users(connection: &Connection, network: NetworkId) -> Result<Vec<String>> {
    let mut statement =
        connection.prepare_cached("SELECT DISTINCT name FROM addresses WHERE network = ?1 ORDER BY name")?;
    let rows = statement.query_map([network.to_string()], |row| row.get(0))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Name of the server that has this address on the network, or this hardware address on any.
pub(crate) fn owner(
    connection: &Connection,
    network: NetworkId,
    ipv4: Ipv4Addr,
    mac: &str,
) -> Result<Option<String>> {
    let mut statement = connection.prepare_cached(
        "SELECT name FROM addresses WHERE (network = ?1 AND ipv4 = ?2) OR mac = ?3 ORDER BY name LIMIT 1",
    )?;
    let found = statement
        .query_row(params![network.to_string(), u32::from(ipv4), mac], |row| row.get(0))
        .optional()?;
    Ok(found)
}

/// The range of a network's record.
pub(super) fn range(network: &Network) -> Result<Cidr> {
    network.ipv4_cidr.parse().map_err(|cause| Error::internal("a record of the host cannot be read", cause))
}

fn count(tx: &Tx<'_>, network: &mut Network) -> Result<()> {
    network.addresses_used = tx
        .prepare_cached("SELECT count(*) FROM addresses WHERE network = ?1")?
        .query_row([network.id.to_string()], |row| row.get(0))?;
    records::save(tx, network)
}
