//! Devices, addresses and routes of the host's kernel, over netlink. It knows no rules and no records.
//! `HostPlumbing` uses it. Every call opens a socket of its own, in the network namespace of the calling thread.
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use futures_util::TryStreamExt;
use model::network::NetworkKind;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::address::{AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use rtnetlink::{AddressMessageBuilder, Handle, LinkBridge, LinkBridgePort, LinkUnspec, RouteMessageBuilder};

use super::cidr::Cidr;
use super::mac::{BRIDGE_PREFIX, Mac, TAP_PREFIX};
use super::plumbing::{Foreign, PlumbingError, Segment, Surroundings};

/// Shorter prefixes than this are ways out by another name (VPNs split the default route in two), not ranges that
/// a network must stay clear of.
const RANGE_PREFIX_MIN: u8 = 8;

/// The reserved addresses 01:80:C2:00:00:0x by their last digit (IEEE 802.1D, table 7-10). Only pause frames, which
/// the kernel drops, cannot be among them (`BR_GROUPFWD_MACPAUSE`).
const RESERVED_BUT_PAUSE: u16 = !(1 << 1);

/// A netlink socket.
pub(super) struct Links {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

struct Device {
    index: u32,
    /// The first of its names, by which rules know it.
    name: String,
    mac: Option<Mac>,
    is_bridge: bool,
    is_ethernet: bool,
    /// Index of the bridge or bond that it is part of.
    controller: Option<u32>,
    /// Largest packet in bytes.
    mtu: Option<u32>,
}

impl Links {
    /// Opens a socket; needs no privilege.
    pub(super) fn open() -> Result<Links, PlumbingError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|cause| PlumbingError::Failed(format!("cannot open a netlink socket: {cause}")))?;
        Ok(Links { handle, connection: tokio::spawn(connection) })
    }

    /// What the host has already.
    pub(super) async fn surroundings(&self) -> Result<Surroundings, PlumbingError> {
        let links = self.all_links().await?;
        let routes = self.routes().await?;
        Ok(Surroundings {
            ranges: routes
                .iter()
                .filter_map(destination)
                .filter(|r| r.prefix() >= RANGE_PREFIX_MIN)
                .collect(),
            devices: links.into_iter().map(|device| device.name).collect(),
        })
    }

    /// Names of the devices that have a default route.
    pub(super) async fn uplinks(&self) -> Result<Vec<String>, PlumbingError> {
        let links = self.all_links().await?;
        let mut uplinks = Vec::new();
        for route in self.routes().await? {
            if destination(&route).is_some() {
                continue;
            }
            let out = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            let name =
                links.iter().find(|device| Some(device.index) == out).map(|device| device.name.clone());
            uplinks.extend(name.filter(|name| !uplinks.contains(name)));
        }
        Ok(uplinks)
    }

    /// Makes the bridge of a network with its address, and brings it up. Fails when a device of that name is
    /// there that Toft did not make.
    pub(super) async fn ensure_bridge(&self, segment: &Segment) -> Result<(), PlumbingError> {
        let name = &segment.bridge;
        let mac = segment.bridge_mac();
        if self.find(name).await?.is_none() {
            let bridge =
                LinkBridge::new(name).address(mac.0.to_vec()).mtu(segment.mtu.into()).mcast_snooping(false);
            self.handle
                .link()
                .add(bridge.build())
                .execute()
                .await
                .map_err(|cause| failed("make", name, cause))?;
        }
        let index = self.own_bridge(segment).await?.ok_or_else(|| vanished(name))?;
        // Guests speak IPv4 with the host; no IPv6 address of the host is to be reachable from them.
        set_switch(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        let forwarding = if segment.kind == NetworkKind::Nat { "1" } else { "0" };
        set_switch(&format!("ipv4/conf/{name}/forwarding"), forwarding)?;
        let address = AddressMessageBuilder::<Ipv4Addr>::new()
            .index(index)
            .address(segment.cidr.gateway(), segment.cidr.prefix());
        let mut request = self
            .handle
            .address()
            .add(index, IpAddr::V4(segment.cidr.gateway()), segment.cidr.prefix())
            .replace();
        *request.message_mut() = address.build();
        request.execute().await.map_err(|cause| failed("give an address to", name, cause))?;
        let up = LinkUnspec::new_with_index(index).mtu(segment.mtu.into()).up().build();
        self.handle.link().change(up).execute().await.map_err(|cause| failed("bring up", name, cause))?;
        Ok(())
    }

    /// Puts the device of the host, behind which a network goes on, on its bridge, and brings it up; what else got there that
    /// is no server's is taken off. The rules that keep `ruled` from the host are in force.
    pub(super) async fn ensure_device(
        &self,
        segment: &Segment,
        ruled: &[Foreign],
    ) -> Result<(), PlumbingError> {
        let Some(name) = &segment.host_device else { return Ok(()) };
        let Some(bridge) = self.own_bridge(segment).await? else { return Err(vanished(&segment.bridge)) };
        let device = self.usable(name, segment).await?;
        // Another may have got the name since the rules were made.
        if !ruled.iter().any(|foreign| foreign.index == device.index && foreign.gateway.is_some()) {
            return Err(vanished(name));
        }
        for port in self.all_links().await? {
            let is_strange = port.controller == Some(bridge)
                && port.index != device.index
                && !port.name.starts_with(TAP_PREFIX);
            if is_strange {
                let alone = LinkUnspec::new_with_index(port.index).nocontroller().build();
                let taken_off = self.handle.link().change(alone).execute().await;
                taken_off.map_err(|cause| failed("disconnect", &port.name, cause))?;
            }
        }
        // The host is to hear nothing on it, and say nothing: as on taps.
        set_switch(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        let joined = LinkUnspec::new_with_index(device.index).controller(bridge).build();
        let watched = LinkBridgePort::new(device.index).group_fwd_mask(RESERVED_BUT_PAUSE).build();
        let up = LinkUnspec::new_with_index(device.index).up().build();
        for change in [joined, watched, up] {
            let changed = self.handle.link().change(change).execute().await;
            changed.map_err(|cause| failed("connect", name, cause))?;
        }
        Ok(())
    }

    /// The device of that name, if a network may have it for itself. One that the host uses is left alone: it would be cut off.
    async fn usable(&self, name: &str, segment: &Segment) -> Result<Device, PlumbingError> {
        let refuse = |detail: String| Err(PlumbingError::Unprepared(detail));
        let Some(device) = self.find(name).await? else {
            return refuse(format!(
                "there is no device {name}, behind which the network goes on; connect or make it"
            ));
        };
        if device.name != name {
            return refuse(format!(
                "{name} is another name of {own}; make the network with {own}",
                own = device.name
            ));
        }
        if device.is_bridge || !device.is_ethernet {
            return refuse(format!(
                "{name} cannot be part of a bridge; choose a network card, or a VLAN of one"
            ));
        }
        if let Some(controller) = device.controller {
            let all = self.all_links().await?;
            let of = all.iter().find(|other| other.index == controller).map_or("", |other| &other.name);
            if of != segment.bridge {
                return refuse(format!(
                    "{name} is part of {of}; choose another device, or a VLAN of {of}, or take it out with `ip link set \
                     {name} nomaster`"
                ));
            }
        } else {
            let addresses = self.handle.address().get().set_link_index_filter(device.index).execute();
            let addresses: Result<Vec<AddressMessage>, _> = addresses.try_collect().await;
            let addresses = addresses.map_err(|cause| failed("look at", name, cause))?;
            if addresses.iter().any(|address| address.header.scope != AddressScope::Link) {
                return refuse(format!(
                    "{name} has an address of the host's, which nobody could reach any more; give the network a \
                     device or a VLAN of its own, or remove the address with `ip address flush dev {name}`"
                ));
            }
        }
        if device.mtu.is_some_and(|mtu| mtu < segment.mtu.into()) {
            return refuse(format!(
                "{name} carries no packets of {mtu} bytes, as servers send; allow it with `ip link set {name} mtu {mtu}`",
                mtu = segment.mtu
            ));
        }
        Ok(device)
    }

    /// What is to be kept from the host: devices that networks go on behind, where those may have them, and whatever is on one of
    /// Toft's bridges that is no server's. Only on the bridge of a network without such a device that is the operator's to know.
    pub(super) async fn foreign(&self, segments: &[Segment]) -> Result<Vec<Foreign>, PlumbingError> {
        let mut found: Vec<Foreign> = Vec::new();
        for segment in segments {
            let Some(name) = &segment.host_device else { continue };
            match self.usable(name, segment).await {
                Ok(Device { index, .. }) => {
                    let gateway = Some((segment.bridge_mac(), segment.cidr.gateway()));
                    found.push(Foreign { index, gateway });
                }
                Err(PlumbingError::Unprepared(_)) => {}
                Err(trouble) => return Err(trouble),
            }
        }
        let all = self.all_links().await?;
        for bridge in all.iter().filter(|device| device.is_bridge && device.name.starts_with(BRIDGE_PREFIX)) {
            let of = segments.iter().find(|segment| segment.bridge == bridge.name);
            if of.is_some_and(|segment| segment.host_device.is_none()) {
                continue;
            }
            for port in all.iter().filter(|port| port.controller == Some(bridge.index)) {
                let is_known = found.iter().any(|foreign| foreign.index == port.index);
                if !is_known && !port.name.starts_with(TAP_PREFIX) {
                    found.push(Foreign { index: port.index, gateway: None });
                }
            }
        }
        Ok(found)
    }

    /// Removes the bridge of a network, if it is there and Toft's.
    pub(super) async fn remove_bridge(&self, segment: &Segment) -> Result<(), PlumbingError> {
        match self.own_bridge(segment).await {
            Ok(Some(index)) => self.delete(index, &segment.bridge).await,
            Ok(None) | Err(PlumbingError::Unprepared(_)) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Puts a tap on a bridge and brings it up. Frames to reserved addresses go the way of all others, past the rules
    /// of `bridge toft`, instead of to the port itself, which no rule of a bridge would see of LLDP's.
    pub(super) async fn enslave(&self, tap: &str, segment: &Segment) -> Result<(), PlumbingError> {
        let bridge = self.own_bridge(segment).await?.ok_or_else(|| vanished(&segment.bridge))?;
        let port = if_nametoindex(tap).map_err(|_| vanished(tap))?;
        set_switch(&format!("ipv6/conf/{tap}/disable_ipv6"), "1")?;
        let joined = LinkUnspec::new_with_index(port).controller(bridge).mtu(segment.mtu.into()).build();
        let watched = LinkBridgePort::new(port).group_fwd_mask(RESERVED_BUT_PAUSE).build();
        let up = LinkUnspec::new_with_index(port).up().build();
        // The kernel does them in this order; what it answers to each is heard together.
        let change = |wanted| self.handle.link().change(wanted).execute();
        let (joined, watched, up) = tokio::join!(change(joined), change(watched), change(up));
        joined.and(watched).and(up).map_err(|cause| match code(&cause) {
            Some(EXFULL) => PlumbingError::Failed(format!(
                "the bridge {} has as many interfaces as Linux gives one (1,023); stop servers of this network, or use \
                 another network for more",
                segment.bridge
            )),
            _ => failed("connect", tap, cause),
        })
    }

    /// Removes a device, if it is there.
    pub(super) async fn remove(&self, name: &str) -> Result<(), PlumbingError> {
        match self.find(name).await? {
            Some(device) => self.delete(device.index, name).await,
            None => Ok(()),
        }
    }

    async fn delete(&self, index: u32, name: &str) -> Result<(), PlumbingError> {
        match self.handle.link().del(index).execute().await {
            Err(cause) if code(&cause) == Some(ENODEV) => Ok(()),
            other => other.map_err(|cause| failed("remove", name, cause)),
        }
    }

    /// Index of the network's bridge; none when there is no device of its name.
    async fn own_bridge(&self, segment: &Segment) -> Result<Option<u32>, PlumbingError> {
        match self.find(&segment.bridge).await? {
            Some(Device { index, mac, is_bridge: true, .. }) if mac == Some(segment.bridge_mac()) => {
                Ok(Some(index))
            }
            Some(_) => Err(PlumbingError::Unprepared(format!(
                "a device named {} is there that Toft did not make; remove it with `ip link delete {}`",
                segment.bridge, segment.bridge
            ))),
            None => Ok(None),
        }
    }

    async fn find(&self, name: &str) -> Result<Option<Device>, PlumbingError> {
        match self.handle.link().get().match_name(name.to_owned()).execute().try_next().await {
            Ok(found) => Ok(found.map(|message| device(&message))),
            Err(cause) if code(&cause) == Some(ENODEV) => Ok(None),
            Err(cause) => Err(failed("find", name, cause)),
        }
    }

    async fn all_links(&self) -> Result<Vec<Device>, PlumbingError> {
        let messages: Result<Vec<LinkMessage>, _> = self.handle.link().get().execute().try_collect().await;
        let messages = messages.map_err(|cause| failed("list", "devices", cause))?;
        Ok(messages.iter().map(device).collect())
    }

    /// IPv4 routes of the main table.
    async fn routes(&self) -> Result<Vec<RouteMessage>, PlumbingError> {
        let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Result<Vec<RouteMessage>, _> =
            self.handle.route().get(query).execute().try_collect().await;
        let mut routes = routes.map_err(|cause| failed("list", "routes", cause))?;
        routes.retain(|route| route.header.table == RouteHeader::RT_TABLE_MAIN);
        Ok(routes)
    }
}

/// Where a route leads; none for a default route.
fn destination(route: &RouteMessage) -> Option<Cidr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(base))
            if route.header.destination_prefix_length > 0 =>
        {
            Some(Cidr::around(*base, route.header.destination_prefix_length))
        }
        _ => None,
    })
}

fn device(message: &LinkMessage) -> Device {
    let index = message.header.index;
    let mut device = Device {
        index,
        name: String::new(),
        mac: None,
        is_bridge: false,
        is_ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        controller: None,
        mtu: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name.clone_from(name),
            LinkAttribute::Address(bytes) => device.mac = bytes.as_slice().try_into().ok().map(Mac),
            LinkAttribute::Controller(index) => device.controller = Some(*index).filter(|index| *index > 0),
            LinkAttribute::Mtu(bytes) => device.mtu = Some(*bytes),
            LinkAttribute::LinkInfo(infos) => {
                device.is_bridge = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge)));
            }
            _ => {}
        }
    }
    device
}

/// Kernel without IPv6 has no such switch, and needs none.
fn set_switch(name: &str, value: &str) -> Result<(), PlumbingError> {
    match std::fs::write(Path::new("/proc/sys/net").join(name), value) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(cause) if cause.kind() == std::io::ErrorKind::PermissionDenied => Err(unprivileged()),
        Err(cause) => Err(PlumbingError::Failed(format!("cannot set {name}: {cause}"))),
        Ok(()) => Ok(()),
    }
}

const EPERM: i32 = 1;
const ENODEV: i32 = 19;
const EXFULL: i32 = 54;

fn code(cause: &rtnetlink::Error) -> Option<i32> {
    match cause {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().saturating_neg()),
        _ => None,
    }
}

fn failed(what: &str, name: &str, cause: rtnetlink::Error) -> PlumbingError {
    if code(&cause) == Some(EPERM) {
        return unprivileged();
    }
    PlumbingError::Failed(format!("cannot {what} {name}: {cause}"))
}

fn vanished(name: &str) -> PlumbingError {
    PlumbingError::Failed(format!("the device {name} is gone; it comes back within a minute"))
}

/// The daemon may not change network devices.
pub(super) fn unprivileged() -> PlumbingError {
    PlumbingError::Unprepared("the daemon may not change network devices; run toftd as root".to_owned())
}
