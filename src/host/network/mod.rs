//! Networks: layer 2 with addresses. What the host's kernel needs is done through [`Plumbing`].
//! Called by the facade, and by `servers` for addresses and taps.
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use model::network::{CreateNetwork, Network, PatchNetwork};
use model::operation::Accepted;
use model::page::{ListQuery, Page};
use model::server::ServerNic;
use model::{Code, Name, NetworkId, ServerId};
use rusqlite::Connection;

use crate::call::{Answer, Call};
use crate::core::Shared;
use crate::error::{Error, Result};
use crate::store::Tx;

pub(crate) const TABLES: &str = crate::table!("networks");

/// What networks need of the host's kernel and tools: bridges, taps, rules, DHCP. Faked in plain tests.
pub trait Plumbing: Send + Sync + 'static {}

/// Networks, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Networks {
    core: Shared,
    plumbing: Arc<dyn Plumbing>,
}

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

/// Where an interface is, for cloud-init.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    /// Prefix length of the network.
    pub prefix: u8,
    /// Gateway and DNS.
    pub gateway: Ipv4Addr,
    /// Largest packet in bytes.
    pub mtu: u16,
    /// Whether the gateway reaches the world.
    pub routed: bool,
}

fn unbuilt() -> Error {
    Error::new(Code::HostUnprepared, "networks are not built yet")
}

impl Networks {
    pub(crate) fn new(core: Shared, plumbing: Arc<dyn Plumbing>) -> Networks {
        Networks { core, plumbing }
    }

    /// Makes the default network on the first start and brings every network's devices and rules up; what fails
    /// leaves that network `degraded`. Taps of running servers stay as they are.
    pub(crate) async fn recover(&self) -> Result<()> {
        let _ = &self.plumbing;
        Ok(())
    }

    /// Stops what only serves this daemon. Bridges, rules and DHCP stay for the running servers.
    pub(crate) async fn close(&self) {}

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Network>> {
        let _ = (&self.core, query);
        Err(unbuilt())
    }

    /// The network.
    pub async fn one(&self, id: NetworkId) -> Result<Network> {
        let _ = id;
        Err(unbuilt())
    }

    /// Makes one.
    pub async fn create(&self, call: &Call, spec: CreateNetwork) -> Result<Answer<Accepted<Network>>> {
        let _ = (call, spec);
        Err(unbuilt())
    }

    /// Name and labels.
    pub async fn patch(&self, call: &Call, id: NetworkId, patch: PatchNetwork) -> Result<Answer<Network>> {
        let _ = (call, id, patch);
        Err(unbuilt())
    }

    /// Deletes one. Fails with `in_use` while a server has an address on it.
    pub async fn delete(&self, call: &Call, id: NetworkId) -> Result<Answer<Accepted<Network>>> {
        let _ = (call, id);
        Err(unbuilt())
    }

    /// For `servers`: the network of this id or name, the default one when absent. Fails with `not_found`.
    pub(crate) fn resolve(connection: &Connection, id_or_name: Option<&str>) -> Result<Network> {
        let _ = (connection, id_or_name);
        Err(unbuilt())
    }

    /// For `servers`: fails with `host_unprepared`, saying what to do, while a network is degraded.
    pub(crate) fn check_ready(&self, id: NetworkId) -> Result<()> {
        let _ = id;
        Err(unbuilt())
    }

    /// For `servers`: reserves an address in the caller's transaction. Fails with `no_address`, or `invalid` with
    /// pointer `/nics/{index}/ipv4`.
    pub(crate) fn reserve(tx: &Tx<'_>, network: NetworkId, wanted: Reservation<'_>) -> Result<Ipv4Addr> {
        let _ = (tx, network, wanted);
        Err(unbuilt())
    }

    /// For `servers`: the DNS name of a server's addresses changes.
    pub(crate) fn rename(tx: &Tx<'_>, server: ServerId, name: &Name) -> Result<()> {
        let _ = (tx, server, name);
        Err(unbuilt())
    }

    /// For `servers`: gives all addresses of a server back. Repeatable.
    pub(crate) fn release(tx: &Tx<'_>, server: ServerId) -> Result<()> {
        let _ = (tx, server);
        Err(unbuilt())
    }

    /// For `servers`: after a transaction that reserved, renamed or released: DHCP and DNS follow in their time.
    pub(crate) fn wake(&self) {}

    /// For `servers`: how an interface on this network is configured.
    pub(crate) fn lease(connection: &Connection, network: NetworkId) -> Result<Lease> {
        let _ = (connection, network);
        Err(unbuilt())
    }

    /// For `servers`: makes the tap with its rules and opens it; DHCP knows the address when this returns.
    /// Repeatable: a tap that is left over is replaced. Fails with `host_unprepared` without privilege or tools.
    pub(crate) async fn plug(&self, server: ServerId, nic: &ServerNic) -> Result<OwnedFd> {
        let _ = (server, nic);
        Err(unbuilt())
    }

    /// For `servers`: removes tap and rules when the machine has ended. Repeatable.
    pub(crate) async fn unplug(&self, server: ServerId, nics: &[ServerNic]) -> Result<()> {
        let _ = (server, nics);
        Err(unbuilt())
    }
}
