//! Devices, addresses and routes of the host's kernel, over netlink. It knows no rules and no records.
//! `HostPlumbing` uses it.
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use model::network::NetworkKind;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage as Message;
use rtnetlink::packet_route::address::{AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use rtnetlink::{AddressMessageBuilder, LinkBridge, LinkBridgePort, LinkUnspec, RouteMessageBuilder};

use sys::tap::Tap;

use super::cidr::Cidr;
use super::mac::{BRIDGE_PREFIX, Mac, TAP_PREFIX};
use super::netlink::Netlink;
use super::plumbing::{Foreign, PlumbingError, Segment, Surroundings};

/// Shorter prefixes than this are ways out by another name (VPNs split the default route in two), not ranges that
/// a network must stay clear of.
const RANGE_PREFIX_MIN: u8 = 8;

/// The reserved addresses 01:80:C2:00:00:0x by their last digit (IEEE 802.1D, table 7-10). Only pause frames, which
/// the kernel drops, cannot be among them (`BR_GROUPFWD_MACPAUSE`).
const RESERVED_BUT_PAUSE: u16 = !(1 << 1);

/// Size of packets with which a bridge is made, in bytes: any but that of a network, and large enough for IPv6, which the kernel would
/// otherwise begin there later and not as it is switched here.
const FIRST_MTU: u32 = 1400;

/// The host's devices, in the network namespace of the thread that opened it.
pub(super) struct Links(Netlink);

struct Device {
    index: u32,
    /// The first of its names, by which rules know it.
    name: String,
    mac: Option<Mac>,
    is_bridge: bool,
    is_ethernet: bool,
    is_up: bool,
    /// Index of the bridge or bond that it is part of.
    controller: Option<u32>,
    /// Largest packet in bytes.
    mtu: Option<u32>,
}

impl Links {
    /// Opens a socket; needs no privilege.
    pub(super) fn open() -> Result<Links, PlumbingError> {
        let opened = Netlink::open();
        opened
            .map(Links)
            .map_err(|cause| PlumbingError::Failed(format!("cannot open a netlink socket: {cause}")))
    }

    /// What the host has already.
    pub(super) fn surroundings(&self) -> Result<Surroundings, PlumbingError> {
        let links = self.all_links()?;
        let routes = self.routes()?;
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
    pub(super) fn uplinks(&self) -> Result<Vec<String>, PlumbingError> {
        let links = self.all_links()?;
        let mut uplinks = Vec::new();
        for route in self.routes()? {
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
    pub(super) fn ensure_bridge(&self, segment: &Segment) -> Result<(), PlumbingError> {
        let name = &segment.bridge;
        let mac = segment.bridge_mac();
        if self.find(name)?.is_none() {
            // With packets of another size than they get below: whoever changes that has chosen it, and the kernel does not ask
            // every port each time that one comes or goes (`br_mtu_auto_adjust`).
            let bridge = LinkBridge::new(name).address(mac.0.to_vec()).mtu(FIRST_MTU).mcast_snooping(false);
            let made = self.0.order(Message::NewLink(bridge.build()), NLM_F_CREATE | NLM_F_EXCL);
            made.map_err(|cause| failed("make", name, cause))?;
        }
        let index = self.own_bridge(segment)?.ok_or_else(|| vanished(name))?;
        // Guests speak IPv4 with the host; no IPv6 address of the host is to be reachable from them.
        set_switch(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        let forwarding = if segment.kind == NetworkKind::Nat { "1" } else { "0" };
        set_switch(&format!("ipv4/conf/{name}/forwarding"), forwarding)?;
        let address = AddressMessageBuilder::<Ipv4Addr>::new()
            .index(index)
            .address(segment.cidr.gateway(), segment.cidr.prefix());
        let addressed = self.0.order(Message::NewAddress(address.build()), NLM_F_CREATE | NLM_F_REPLACE);
        addressed.map_err(|cause| failed("give an address to", name, cause))?;
        let up = LinkUnspec::new_with_index(index).mtu(segment.mtu.into()).up();
        self.change(up.build()).map_err(|cause| failed("bring up", name, cause))
    }

    /// Puts the device of the host, behind which a network goes on, on its bridge, and brings it up; what else got there that
    /// is no server's is taken off. The rules that keep `ruled` from the host are in force.
    pub(super) fn ensure_device(&self, segment: &Segment, ruled: &[Foreign]) -> Result<(), PlumbingError> {
        let Some(name) = &segment.host_device else { return Ok(()) };
        let Some(bridge) = self.own_bridge(segment)? else { return Err(vanished(&segment.bridge)) };
        let device = self.usable(name, segment)?;
        // Another may have got the name since the rules were made.
        if !ruled.iter().any(|foreign| foreign.index == device.index && foreign.gateway.is_some()) {
            return Err(vanished(name));
        }
        for port in self.all_links()? {
            let is_strange = port.controller == Some(bridge)
                && port.index != device.index
                && !port.name.starts_with(TAP_PREFIX);
            if is_strange {
                let alone = LinkUnspec::new_with_index(port.index).nocontroller().build();
                self.change(alone).map_err(|cause| failed("disconnect", &port.name, cause))?;
            }
        }
        // The host is to hear nothing on it, and say nothing: as on taps.
        set_switch(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        let joined = LinkUnspec::new_with_index(device.index).controller(bridge).build();
        let watched = LinkBridgePort::new(device.index).group_fwd_mask(RESERVED_BUT_PAUSE).build();
        let up = LinkUnspec::new_with_index(device.index).up().build();
        for change in [joined, watched, up] {
            self.change(change).map_err(|cause| failed("connect", name, cause))?;
        }
        Ok(())
    }

    /// The device of that name, if a network may have it for itself. One that the host uses is left alone: it would be cut off.
    fn usable(&self, name: &str, segment: &Segment) -> Result<Device, PlumbingError> {
        let refuse = |detail: String| Err(PlumbingError::Unprepared(detail));
        let Some(device) = self.find(name)? else {
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
            let all = self.all_links()?;
            let of = all.iter().find(|other| other.index == controller).map_or("", |other| &other.name);
            if of != segment.bridge {
                return refuse(format!(
                    "{name} is part of {of}; choose another device, or a VLAN of {of}, or take it out with `ip link set \
                     {name} nomaster`"
                ));
            }
        } else {
            let addresses = self.0.dump(Message::GetAddress(AddressMessage::default()));
            let addresses = addresses.map_err(|cause| failed("look at", name, cause))?;
            let is_of_use = |address: &Message| match address {
                Message::NewAddress(AddressMessage { header, .. }) => {
                    header.index == device.index && header.scope != AddressScope::Link
                }
                _ => false,
            };
            if addresses.iter().any(is_of_use) {
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
    pub(super) fn foreign(&self, segments: &[Segment]) -> Result<Vec<Foreign>, PlumbingError> {
        let mut found: Vec<Foreign> = Vec::new();
        for segment in segments {
            let Some(name) = &segment.host_device else { continue };
            match self.usable(name, segment) {
                Ok(Device { index, .. }) => {
                    let gateway = Some((segment.bridge_mac(), segment.cidr.gateway()));
                    found.push(Foreign { index, gateway });
                }
                Err(PlumbingError::Unprepared(_)) => {}
                Err(trouble) => return Err(trouble),
            }
        }
        let all = self.all_links()?;
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
    pub(super) fn remove_bridge(&self, segment: &Segment) -> Result<(), PlumbingError> {
        match self.own_bridge(segment) {
            Ok(Some(index)) => self.delete(index, &segment.bridge),
            Ok(None) | Err(PlumbingError::Unprepared(_)) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Puts a tap on a bridge, and says its index. It is down, and carries nothing. Frames to reserved addresses are to go the way of
    /// all others, past the rules of `bridge toft`, instead of to the port itself, which no rule of a bridge would see of LLDP's.
    ///
    /// Taps have their bridge's hardware address: nobody ever sends from one, and an address of its own would be one more in a table that
    /// the kernel goes through for each port that comes (`br_fdb_unsync_static`).
    pub(super) fn join(&self, tap: &str, segment: &Segment) -> Result<u32, PlumbingError> {
        let bridge = self.own_bridge(segment)?.ok_or_else(|| vanished(&segment.bridge))?;
        let port = if_nametoindex(tap).map_err(|_| vanished(tap))?;
        set_switch(&format!("ipv6/conf/{tap}/disable_ipv6"), "1")?;
        let joined = LinkUnspec::new_with_index(port)
            .address(segment.bridge_mac().0.to_vec())
            .controller(bridge)
            .mtu(segment.mtu.into())
            .build();
        let watched = LinkBridgePort::new(port).group_fwd_mask(RESERVED_BUT_PAUSE).build();
        let changed = self.change(joined).and_then(|()| self.change(watched));
        changed.map(|()| port).map_err(|cause| match code(&cause) {
            Some(Errno::EXFULL) => PlumbingError::Failed(format!(
                "the bridge {} has as many interfaces as Linux gives one (1,023); stop servers of this network, or use \
                 another network for more",
                segment.bridge
            )),
            _ => failed("connect", tap, cause),
        })
    }

    /// Brings a tap up that [`Links::join`] has put on a bridge.
    pub(super) fn raise(&self, tap: &str, port: u32) -> Result<(), PlumbingError> {
        let up = LinkUnspec::new_with_index(port).up().build();
        self.change(up).map_err(|cause| failed("bring up", tap, cause))
    }

    /// Fails unless a tap is where and what [`Links::join`] has made it, which said its index. One that is up has carried what no rule
    /// has seen.
    pub(super) fn check_joined(&self, tap: &str, index: u32, segment: &Segment) -> Result<(), PlumbingError> {
        let bridge = self.own_bridge(segment)?.ok_or_else(|| vanished(&segment.bridge))?;
        let mut wanted = LinkMessage::default();
        wanted.header.index = index;
        let found = self.look(wanted, tap)?.ok_or_else(|| vanished(tap))?;
        let mtu = Some(segment.mtu.into());
        if found.is_up || found.name != tap || found.controller != Some(bridge) || found.mtu != mtu {
            return Err(PlumbingError::Failed(format!("{tap} is not as it was made")));
        }
        Ok(())
    }

    /// Removes a device, if it is there.
    pub(super) fn remove(&self, name: &str) -> Result<(), PlumbingError> {
        match self.find(name)? {
            Some(device) => self.delete(device.index, name),
            None => Ok(()),
        }
    }

    fn delete(&self, index: u32, name: &str) -> Result<(), PlumbingError> {
        let mut gone = LinkMessage::default();
        gone.header.index = index;
        match self.0.order(Message::DelLink(gone), 0) {
            Err(cause) if code(&cause) == Some(Errno::ENODEV) => Ok(()),
            other => other.map_err(|cause| failed("remove", name, cause)),
        }
    }

    /// Index of the network's bridge; none when there is no device of its name.
    fn own_bridge(&self, segment: &Segment) -> Result<Option<u32>, PlumbingError> {
        match self.find(&segment.bridge)? {
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

    fn find(&self, name: &str) -> Result<Option<Device>, PlumbingError> {
        let mut wanted = LinkMessage::default();
        wanted.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.look(wanted, name)
    }

    /// The one device that `wanted` describes; `name` is for the error.
    fn look(&self, wanted: LinkMessage, name: &str) -> Result<Option<Device>, PlumbingError> {
        match self.0.get(Message::GetLink(wanted)) {
            Ok(found) => Ok(devices(&found).next()),
            Err(cause) if code(&cause) == Some(Errno::ENODEV) => Ok(None),
            Err(cause) => Err(failed("find", name, cause)),
        }
    }

    fn all_links(&self) -> Result<Vec<Device>, PlumbingError> {
        let found = self.0.dump(Message::GetLink(LinkMessage::default()));
        let found = found.map_err(|cause| failed("list", "devices", cause))?;
        Ok(devices(&found).collect())
    }

    /// IPv4 routes of the main table.
    fn routes(&self) -> Result<Vec<RouteMessage>, PlumbingError> {
        let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let found = self.0.dump(Message::GetRoute(query)).map_err(|cause| failed("list", "routes", cause))?;
        let routes = found.into_iter().filter_map(|message| match message {
            Message::NewRoute(route) => Some(route),
            _ => None,
        });
        Ok(routes.filter(|route| route.header.table == RouteHeader::RT_TABLE_MAIN).collect())
    }

    fn change(&self, wanted: LinkMessage) -> io::Result<()> {
        self.0.order(Message::NewLink(wanted), 0)
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

fn devices(found: &[Message]) -> impl Iterator<Item = Device> {
    found.iter().filter_map(|message| match message {
        Message::NewLink(link) => Some(device(link)),
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
        is_up: message.header.flags.contains(LinkFlags::Up),
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

fn code(cause: &io::Error) -> Option<Errno> {
    cause.raw_os_error().map(Errno::from_raw)
}

fn failed(what: &str, name: &str, cause: io::Error) -> PlumbingError {
    if code(&cause) == Some(Errno::EPERM) {
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

/// A tap of this name that belongs to nothing.
pub(super) fn make_tap(name: &str) -> Result<Tap, PlumbingError> {
    Tap::create(name).map_err(|cause| tap_trouble(name, cause))
}

fn tap_trouble(name: &str, cause: io::Error) -> PlumbingError {
    match cause.kind() {
        io::ErrorKind::PermissionDenied => unprivileged(),
        io::ErrorKind::NotFound => PlumbingError::Unprepared(
            "/dev/net/tun is missing; load the kernel module with `modprobe tun`".to_owned(),
        ),
        _ => PlumbingError::Failed(format!("cannot make the tap {name}: {cause}")),
    }
}
