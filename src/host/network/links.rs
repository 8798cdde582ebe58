//! Devices, addresses and routes of the host's kernel, over netlink. It knows no rules and no records.
//! `HostPlumbing` uses it. Every call opens a socket of its own, in the network namespace of the calling thread.
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use futures_util::TryStreamExt;
use model::network::NetworkKind;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use rtnetlink::{AddressMessageBuilder, Handle, LinkBridge, LinkBridgePort, LinkUnspec, RouteMessageBuilder};

use super::cidr::Cidr;
use super::mac::Mac;
use super::plumbing::{PlumbingError, Segment, Surroundings};

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
    mac: Option<Mac>,
    is_bridge: bool,
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
            devices: links.iter().filter_map(|(_, name)| name.clone()).collect(),
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
            let name = links.iter().find(|(index, _)| Some(*index) == out).and_then(|(_, name)| name.clone());
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
        match &segment.host_device {
            Some(device) => self.ensure_joined(device, index, segment).await,
            None => Ok(()),
        }
    }

    /// Puts a device of the host on the bridge of a network that goes on behind it, and brings it up. One that the host
    /// uses itself is left alone: it would be cut off.
    async fn ensure_joined(&self, name: &str, bridge: u32, segment: &Segment) -> Result<(), PlumbingError> {
        let refuse = |detail: String| Err(PlumbingError::Unprepared(detail));
        let Some(device) = self.find(name).await? else {
            return refuse(format!(
                "there is no device {name}, behind which the network goes on; connect or make it"
            ));
        };
        match device.controller {
            Some(controller) if controller == bridge => {}
            Some(_) => {
                return refuse(format!(
                    "{name} is part of another bridge or bond; take it out with `ip link set {name} nomaster`"
                ));
            }
            None => {
                let addresses = self.handle.address().get().set_link_index_filter(device.index).execute();
                let of_host = |message: &AddressMessage| message.header.family == AddressFamily::Inet;
                let addresses: Result<Vec<AddressMessage>, _> = addresses.try_collect().await;
                if addresses.map_err(|cause| failed("look at", name, cause))?.iter().any(of_host) {
                    return refuse(format!(
                        "{name} has an address of the host's, which nobody could reach any more; give the network a \
                         device or a VLAN of its own, or remove the address with `ip address flush dev {name}`"
                    ));
                }
            }
        }
        if device.mtu.is_some_and(|mtu| mtu < segment.mtu.into()) {
            return refuse(format!(
                "{name} carries no packets of {mtu} bytes, as servers send; allow it with `ip link set {name} mtu {mtu}`",
                mtu = segment.mtu
            ));
        }
        let joined = LinkUnspec::new_with_index(device.index).controller(bridge).up().build();
        self.handle.link().change(joined).execute().await.map_err(|cause| failed("connect", name, cause))
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
        joined.and(watched).and(up).map_err(|cause| failed("connect", tap, cause))
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

    async fn all_links(&self) -> Result<Vec<(u32, Option<String>)>, PlumbingError> {
        let messages: Result<Vec<LinkMessage>, _> = self.handle.link().get().execute().try_collect().await;
        let messages = messages.map_err(|cause| failed("list", "devices", cause))?;
        Ok(messages.iter().map(|message| (message.header.index, name(message))).collect())
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

fn name(message: &LinkMessage) -> Option<String> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn device(message: &LinkMessage) -> Device {
    let index = message.header.index;
    let mut device = Device { index, mac: None, is_bridge: false, controller: None, mtu: None };
    for attribute in &message.attributes {
        match attribute {
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
