//! What the host's kernel and programs are asked to do for networks, as a trait and plain data.
//! It knows no records. `Networks` asks; [`HostPlumbing`](super::HostPlumbing) does it on a real host, and
//! [`FakePlumbing`](super::testing::FakePlumbing) only remembers.
//!
//! Every call says what should be, not what to change, and can be repeated: after a crash the same call again
//! leads to the same end.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use futures_util::future::BoxFuture;
use model::network::NetworkKind;
use model::{Name, NetworkId};

use super::cidr::Cidr;
use super::mac::Mac;

/// The host's side of networks.
pub trait Plumbing: Send + Sync + 'static {
    /// What the host has already: a new network must stay clear of it. Empty where it cannot be read.
    fn surroundings(&self) -> BoxFuture<'_, Surroundings>;

    /// Makes devices, rules, DHCP and DNS be exactly as `wanted`, in place of what Toft made before; an interface
    /// that is not plugged in stays silent. A network
    /// that is not in it loses its rules; its other things go with [`Plumbing::remove`]. Answers what is wrong
    /// with each network that is not as it should be; the others are ready.
    fn ensure(&self, wanted: Wanted) -> BoxFuture<'_, BTreeMap<NetworkId, String>>;

    /// Makes DHCP and DNS of one network know exactly these interfaces.
    fn serve(&self, segment: Segment, ports: Vec<Port>) -> BoxFuture<'_, Result<(), PlumbingError>>;

    /// Makes DHCP and DNS of one network know this interface, too, in a time that does not grow with how many they know.
    /// False, with nothing changed, when they know something else of its addresses or name: then only all of it will do.
    fn introduce(&self, segment: Segment, port: Port) -> BoxFuture<'_, Result<bool, PlumbingError>>;

    /// Lets an interface speak and gives it a tap on the bridge, open as `wire::machine::Nic` wants it. The tap lives as long as a copy
    /// of the descriptor.
    fn plug(&self, segment: Segment, port: Port) -> BoxFuture<'_, Result<OwnedFd, PlumbingError>>;

    /// Another interface is likely to be plugged into this network soon: what of its tap can be made before is made, and lasts until
    /// the last interface of the network is unplugged.
    fn expect(&self, segment: Segment) -> BoxFuture<'_, ()>;

    /// The hardware address with which the next new interface of this network is plugged in soonest, unless another has it. It is told
    /// once. None where none is expected.
    fn promise(&self, network: NetworkId) -> Option<Mac>;

    /// No interface was recorded with the address that was promised.
    fn take_back(&self, network: NetworkId, mac: Mac);

    /// Silences interfaces and removes their taps.
    fn unplug(&self, ports: Vec<Port>) -> BoxFuture<'_, Result<(), PlumbingError>>;

    /// Removes a network: DHCP and DNS, bridge, rules, files; with the last one, forwarding.
    fn remove(&self, segment: Segment) -> BoxFuture<'_, Result<(), PlumbingError>>;
}

/// What the host has already.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Ranges that are routed somewhere, without the default route.
    pub ranges: Vec<Cidr>,
    /// Names of network devices.
    pub devices: Vec<String>,
}

/// Everything there should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Networks.
    pub segments: Vec<Segment>,
    /// Interfaces that have an address, whether their server runs or not.
    pub ports: Vec<Port>,
}

/// A network as the host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Whose it is.
    pub id: NetworkId,
    /// Name of the bridge device.
    pub bridge: String,
    /// Its addresses.
    pub cidr: Cidr,
    /// Whether it reaches the world.
    pub kind: NetworkKind,
    /// Largest packet in bytes.
    pub mtu: u16,
    /// The host's device that is on the bridge, too.
    pub host_device: Option<String>,
}

impl Segment {
    /// Hardware address of the bridge, by which it is known to be Toft's.
    pub fn bridge_mac(&self) -> Mac {
        match self.host_device {
            Some(_) => Mac::of_gateway(self.cidr),
            None => Mac::of_bridge(self.id),
        }
    }
}

/// A port of a bridge that is neither a server's tap nor the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foreign {
    /// Number of the device, which it keeps when it is renamed.
    pub index: u32,
    /// The gateway of the network that goes on behind it, which nobody there may claim to be; none when nothing is to
    /// pass, because no network has it.
    pub gateway: Option<(Mac, Ipv4Addr)>,
}

/// One interface of one server: the only addresses it may speak with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The network it is on.
    pub network: NetworkId,
    /// Hardware address; the tap's name follows from it.
    pub mac: Mac,
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Name under which the network's DNS knows it.
    pub name: Name,
}

impl Port {
    /// Name of its tap.
    pub fn tap(&self) -> String {
        self.mac.tap_name()
    }
}

/// Why the host could not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlumbingError {
    /// A privilege or a program is missing; the sentence says which and what to do.
    #[error("{0}")]
    Unprepared(String),
    /// It went wrong; the sentence says what.
    #[error("{0}")]
    Failed(String),
}
