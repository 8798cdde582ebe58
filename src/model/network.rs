//! Networks: layer 2 with addresses.
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::NetworkId;
use crate::name::{Labels, Name};
use crate::time::Time;

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Identity.
    pub id: NetworkId,
    /// Unique name; `default` is made on the daemon's first start.
    pub name: Name,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
    /// How it reaches the world.
    pub kind: NetworkKind,
    /// Its addresses, such as `10.77.0.0/24`.
    pub ipv4_cidr: String,
    /// The host's address on it: gateway, DHCP and DNS.
    #[schema(value_type = String, format = Ipv4)]
    pub ipv4_gateway: Ipv4Addr,
    /// Addresses that servers can have.
    pub addresses_total: u32,
    /// Addresses that servers have.
    pub addresses_used: u32,
    /// The host's bridge device.
    pub bridge: String,
    /// The host's network device that is on the bridge, too: the network goes on behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_device: Option<String>,
    /// Largest packet in bytes.
    pub mtu: u16,
    /// Whether the host's devices and rules are in place.
    pub state: NetworkState,
    /// Why it is not, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_detail: Option<String>,
    /// Version of this resource.
    pub generation: u64,
    /// When it was created.
    pub created_at: Time,
    /// When it last changed.
    pub updated_at: Time,
}

/// How a network reaches the world.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// Through the host, which rewrites the sender's address.
    #[default]
    Nat,
    /// Not at all: its servers see each other and the host's DHCP and DNS.
    Isolated,
}

/// Whether a network works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkState {
    /// Bridge, rules, DHCP and DNS are in place.
    Ready,
    /// Something is missing; see `state_detail`.
    Degraded,
    /// It is being deleted.
    Deleting,
}

/// Body of `POST /v1/networks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateNetwork {
    /// Unique name.
    pub name: Name,
    /// How it reaches the world.
    #[serde(default)]
    pub kind: NetworkKind,
    /// A private range (RFC 1918) of prefix length 16 to 29 that overlaps no other network; a free /24 when
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_cidr: Option<String>,
    /// A network device of the host, such as `eth1`, that the network is to have for itself: the network goes on behind it, to
    /// other hosts that have a network of the same name and range on that cable or VLAN. The host uses it for nothing else,
    /// and cannot be reached through it. Each host serves its own servers' DHCP, DNS and way out; which addresses
    /// are taken on other hosts it does not know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_device: Option<String>,
    /// The caller's own pairs.
    #[serde(default)]
    pub labels: Labels,
}

/// Answer to `POST /v1/networks?dry_run=true`: what would be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkPlan {
    /// The network as it would be; its id, range and bridge may differ when it is really made.
    pub network: Network,
    /// Each step, for people.
    pub steps: Vec<String>,
}

/// Body of `PATCH /v1/networks/{id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchNetwork {
    /// New name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Labels to set; null removes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<std::collections::BTreeMap<String, Option<String>>>,
}
