//! What networks write into the records, each in one transaction: made, brought up, deleted. Nothing here
//! touches a device. `networks` calls it.
use std::collections::BTreeMap;

use model::event::EventData;
use model::network::{CreateNetwork, Network, NetworkKind, NetworkState};
use model::operation::{Operation, OperationState, Resource};
use model::{Code, Labels, Name, NetworkId, OperationId, Time};
use rusqlite::{Connection, OptionalExtension};
use uuid::Uuid;

use super::addresses;
use super::cidr::{self, Cidr};
use super::limits::{BRIDGES_MAX, DEVICE_NAME_MAX, MTU};
use super::mac::{BRIDGE_PREFIX, OWN_PREFIX};
use super::plumbing::{Segment, Surroundings, Wanted};
use crate::call::Actor;
use crate::error::{Error, Result};
use crate::events;
use crate::operations::{self, NewOperation, Outcome};
use crate::store::Tx;
use crate::store::records::{self, Record};

/// Name of the network that is made on the first start.
pub(super) const DEFAULT: &str = "default";

/// Key in the table `host` that remembers that the default network was made once: who deletes it means it.
const DEFAULT_MADE: &str = "default_network_made";

/// Why a network is degraded until its devices are there.
pub(super) const BEING_SET_UP: &str = "it is being set up";

impl Record for Network {
    const TABLE: &'static str = "networks";
    const NOUN: &'static str = "network";

    fn id(&self) -> Uuid {
        self.id.0
    }

    fn name(&self) -> &Name {
        &self.name
    }

    fn labels(&self) -> &Labels {
        &self.labels
    }

    fn touch(&mut self) {
        self.generation += 1;
        self.updated_at = Time::now();
    }
}

/// Makes the record of the default network, on the first start only.
pub(super) fn make_default(tx: &Tx<'_>, surroundings: &Surroundings) -> Result<()> {
    let made: Option<String> =
        tx.query_row("SELECT value FROM host WHERE key = ?1", [DEFAULT_MADE], |row| row.get(0)).optional()?;
    if made.is_some() {
        return Ok(());
    }
    let name =
        DEFAULT.parse().map_err(|cause| Error::internal("the default network's name is not one", cause))?;
    let spec = CreateNetwork {
        name,
        kind: NetworkKind::Nat,
        ipv4_cidr: None,
        host_device: None,
        labels: Labels::default(),
    };
    let network = insert(tx, spec, surroundings)?;
    tx.execute("INSERT INTO host (key, value) VALUES (?1, ?2)", [DEFAULT_MADE, &network.id.to_string()])?;
    announce(tx, &network, "network.created", Some((&Actor::Host, None)))
}

/// Adds the record of a network that has no devices yet.
pub(super) fn insert(tx: &Tx<'_>, spec: CreateNetwork, surroundings: &Surroundings) -> Result<Network> {
    let networks: Vec<Network> = records::all(tx)?;
    let range = choose_range(spec.ipv4_cidr.as_deref(), &networks, surroundings)?;
    if let Some(device) = &spec.host_device {
        check_device(device, &networks, surroundings)?;
    }
    let now = Time::now();
    let network = Network {
        id: NetworkId::new(),
        name: spec.name,
        labels: spec.labels,
        kind: spec.kind,
        ipv4_cidr: range.to_string(),
        ipv4_gateway: range.gateway(),
        addresses_total: range.places(),
        addresses_used: 0,
        bridge: choose_bridge(&networks, surroundings)?,
        mtu: MTU,
        host_device: spec.host_device,
        state: NetworkState::Degraded,
        state_detail: Some(BEING_SET_UP.to_owned()),
        generation: 1,
        created_at: now,
        updated_at: now,
    };
    records::insert(tx, &network)?;
    Ok(network)
}

fn choose_range(asked: Option<&str>, networks: &[Network], surroundings: &Surroundings) -> Result<Cidr> {
    let own = networks.iter().map(addresses::range).collect::<Result<Vec<_>>>()?;
    let Some(text) = asked else {
        let taken: Vec<Cidr> = own.into_iter().chain(surroundings.ranges.iter().copied()).collect();
        return cidr::free_range(&taken).ok_or_else(|| {
            Error::new(Code::NoAddress, "no private /24 is free on this host; name a range with `ipv4_cidr`")
        });
    };
    let refuse = |code, detail| Err(Error::invalid("/ipv4_cidr", code, detail));
    let range = match Cidr::for_network(text) {
        Ok(range) => range,
        Err(bad) => return refuse("invalid", bad.to_string()),
    };
    if let Some((_, other)) = own.iter().zip(networks).find(|(theirs, _)| theirs.overlaps(range)) {
        let detail =
            format!("{range} overlaps network {} ({}); choose another range", other.name, other.ipv4_cidr);
        return refuse("overlaps", detail);
    }
    if let Some(routed) = surroundings.ranges.iter().find(|routed| routed.overlaps(range)) {
        let detail =
            format!("{range} overlaps {routed}, which this host reaches otherwise; choose another range");
        return refuse("overlaps", detail);
    }
    Ok(range)
}

/// Fails for what no device can be called, for one that is not there, and for one that another network has. One that goes and
/// comes back later is its bridge's business.
fn check_device(device: &str, networks: &[Network], surroundings: &Surroundings) -> Result<()> {
    let refuse = |code, detail: String| Err(Error::invalid("/host_device", code, detail));
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let is_name = (1..=DEVICE_NAME_MAX).contains(&device.len()) && device.bytes().all(is_plain);
    if !is_name || device.starts_with('.') || device.starts_with(OWN_PREFIX) {
        let detail = format!(
            "must be a network device of the host, such as eth1: at most {DEVICE_NAME_MAX} letters, digits, `-`, `_` \
             and `.`, and none of Toft's own, which begin with `{OWN_PREFIX}`"
        );
        return refuse("invalid", detail);
    }
    if let Some(other) = networks.iter().find(|network| network.host_device.as_deref() == Some(device)) {
        return refuse("in_use", format!("network {} has {device} for itself", other.name));
    }
    if !surroundings.devices.iter().any(|known| known == device) {
        return refuse(
            "not_found",
            format!("this host has no device {device}; `ip link` lists those it has"),
        );
    }
    Ok(())
}

fn choose_bridge(networks: &[Network], surroundings: &Surroundings) -> Result<String> {
    (0..BRIDGES_MAX)
        .map(|number| format!("{BRIDGE_PREFIX}{number}"))
        .find(|name| {
            !surroundings.devices.contains(name) && !networks.iter().any(|network| network.bridge == *name)
        })
        .ok_or_else(|| {
            Error::new(
                Code::NoCapacity,
                format!("there are {BRIDGES_MAX} networks already; delete one that nothing needs"),
            )
        })
}

/// Fails unless nothing needs the network.
pub(super) fn check_deletable(tx: &Tx<'_>, network: &Network) -> Result<()> {
    if network.state == NetworkState::Deleting {
        let detail = format!("network {} is being deleted already", network.name);
        return Err(Error::new(Code::WrongState, detail));
    }
    match addresses::users(tx, network.id)?.as_slice() {
        [] => Ok(()),
        users => Err(Error::new(
            Code::InUse,
            format!(
                "servers have addresses on network {}: {}; delete them first",
                network.name,
                users.join(", ")
            ),
        )),
    }
}

/// What there should be, and what should go.
pub(super) fn read_wanted(connection: &Connection) -> Result<(Wanted, Vec<Segment>)> {
    let mut wanted = Wanted::default();
    let mut doomed = Vec::new();
    for network in records::all::<Network>(connection)? {
        if network.state == NetworkState::Deleting {
            doomed.push(segment(&network)?);
        } else {
            wanted.segments.push(segment(&network)?);
            wanted.ports.extend(addresses::of_network(connection, network.id)?);
        }
    }
    Ok((wanted, doomed))
}

/// A network as the host sees it.
pub(super) fn segment(network: &Network) -> Result<Segment> {
    Ok(Segment {
        id: network.id,
        bridge: network.bridge.clone(),
        cidr: addresses::range(network)?,
        kind: network.kind,
        mtu: network.mtu,
        host_device: network.host_device.clone(),
    })
}

/// Writes how each network is, and ends the operations that waited for it. A network that was asked for and
/// could not be set up is not kept: it is answered, to be removed.
pub(super) fn record_states(tx: &Tx<'_>, troubles: &BTreeMap<NetworkId, String>) -> Result<Vec<Segment>> {
    let mut failed = Vec::new();
    for mut network in records::all::<Network>(tx)? {
        if network.state == NetworkState::Deleting {
            continue;
        }
        let trouble = troubles.get(&network.id).cloned();
        if let Some(operation) = unfinished(tx, network.id, "network.create")? {
            let Some(trouble) = &trouble else {
                set_state(tx, &mut network, None)?;
                operations::finish(tx, operation, Outcome::Succeeded)?;
                continue;
            };
            let detail = format!("network {} could not be set up: {trouble}", network.name);
            operations::finish(tx, operation, Outcome::Failed(Error::new(Code::HostUnprepared, detail)))?;
            network.state = NetworkState::Deleting;
            network.state_detail = None;
            records::save(tx, &mut network)?;
            failed.push(segment(&network)?);
        } else {
            set_state(tx, &mut network, trouble)?;
        }
    }
    Ok(failed)
}

fn set_state(tx: &Tx<'_>, network: &mut Network, trouble: Option<String>) -> Result<()> {
    let state = if trouble.is_some() { NetworkState::Degraded } else { NetworkState::Ready };
    if network.state == state && network.state_detail == trouble {
        return Ok(());
    }
    network.state = state;
    network.state_detail = trouble;
    records::save(tx, network)?;
    announce(tx, network, "network.state_changed", None)
}

/// Removes the record of a network whose devices are gone, and ends the operation that deleted it.
pub(super) fn forget(tx: &Tx<'_>, id: NetworkId) -> Result<()> {
    let Some(network) = records::find::<Network>(tx, id.0)? else { return Ok(()) };
    let operation = unfinished(tx, id, "network.delete")?;
    records::remove::<Network>(tx, id.0)?;
    if let Some(operation) = operation {
        operations::finish(tx, operation, Outcome::Succeeded)?;
    }
    announce(tx, &network, "network.deleted", None)
}

/// The operation of this kind that works on the network.
fn unfinished(connection: &Connection, id: NetworkId, kind: &str) -> Result<Option<OperationId>> {
    let works_on_it = |operation: &Operation| {
        debug_assert!(operation.state != OperationState::Succeeded);
        operation.kind == kind && operation.resources.contains(&Resource::Network(id))
    };
    Ok(operations::unfinished(connection)?.into_iter().find(works_on_it).map(|operation| operation.id))
}

/// Accepts work on the network.
pub(super) fn accept(tx: &Tx<'_>, kind: &str, network: &Network, actor: &Actor) -> Result<Operation> {
    let resources = vec![Resource::Network(network.id)];
    operations::accept(tx, NewOperation { kind, resources, actor, cancellable: false })
}

/// Appends an event about the network.
pub(super) fn announce(
    tx: &Tx<'_>,
    network: &Network,
    kind: &str,
    cause: Option<(&Actor, Option<OperationId>)>,
) -> Result<()> {
    let state = serde_json::to_value(network.state)?;
    let data = EventData {
        resource: Some(Resource::Network(network.id)),
        generation: Some(network.generation),
        state: state.as_str().map(str::to_owned),
        reason: network.state_detail.clone(),
        operation_id: cause.and_then(|(_, operation)| operation),
        actor: cause.map(|(actor, _)| actor.to_string()),
    };
    events::append(tx, kind, data)?;
    Ok(())
}
