//! A tap becomes a port of its network's bridge: a few requests over netlink, which the kernel has answered as soon as they are
//! sent. So the thread that asks makes them one after the other; a task that waits for each answer takes longer than the
//! kernel. It knows no rules and no records. `HostPlumbing` uses it; [`Links`](super::links::Links) asks for all else.
use std::io;

use nix::net::if_::if_nametoindex;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use rtnetlink::{LinkBridgePort, LinkUnspec};

use super::links::{ENODEV, RESERVED_BUT_PAUSE, bridge_of, device, set_switch, unprivileged, vanished};
use super::plumbing::{PlumbingError, Segment};

/// Puts a tap on a bridge and brings it up. Frames to reserved addresses go the way of all others, past the rules
/// of `bridge toft`, instead of to the port itself, which no rule of a bridge would see of LLDP's. Blocks.
pub(super) fn join(tap: &str, segment: &Segment) -> Result<(), PlumbingError> {
    let talk = Talk::begin().map_err(|cause| failed("ask for", tap, &cause))?;
    let found = talk.find(&segment.bridge).map_err(|cause| failed("find", &segment.bridge, &cause))?;
    let bridge = bridge_of(segment, found.as_ref().map(device))?.ok_or_else(|| vanished(&segment.bridge))?;
    let port = if_nametoindex(tap).map_err(|_| vanished(tap))?;
    set_switch(&format!("ipv6/conf/{tap}/disable_ipv6"), "1")?;
    let joined = LinkUnspec::new_with_index(port).controller(bridge).mtu(segment.mtu.into()).build();
    let watched = LinkBridgePort::new(port).group_fwd_mask(RESERVED_BUT_PAUSE).build();
    let up = LinkUnspec::new_with_index(port).up().build();
    for wanted in [joined, watched, up] {
        talk.change(wanted).map_err(|cause| failed("connect", tap, &cause))?;
    }
    Ok(())
}

/// A socket, in the network namespace of the calling thread.
struct Talk(Socket);

impl Talk {
    fn begin() -> io::Result<Talk> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // An answer that is not there when the request is sent never comes.
        socket.set_non_blocking(true)?;
        Ok(Talk(socket))
    }

    /// The device of that name, if there is one.
    fn find(&self, name: &str) -> io::Result<Option<LinkMessage>> {
        let mut wanted = LinkMessage::default();
        wanted.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.ask(RouteNetlinkMessage::GetLink(wanted), NLM_F_REQUEST) {
            Ok(Some(RouteNetlinkMessage::NewLink(found))) => Ok(Some(found)),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(cause) if cause.raw_os_error() == Some(ENODEV) => Ok(None),
            Err(cause) => Err(cause),
        }
    }

    fn change(&self, wanted: LinkMessage) -> io::Result<()> {
        self.ask(RouteNetlinkMessage::NewLink(wanted), NLM_F_REQUEST | NLM_F_ACK).map(drop)
    }

    /// Answers what the kernel has answered: nothing where it has only agreed.
    fn ask(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Option<RouteNetlinkMessage>> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
        match answer.map_err(|cause| io::Error::new(io::ErrorKind::InvalidData, cause))?.payload {
            NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
            NetlinkPayload::Error(refusal) if refusal.code.is_some() => Err(refusal.to_io()),
            _ => Ok(None),
        }
    }
}

fn failed(what: &str, name: &str, cause: &io::Error) -> PlumbingError {
    if cause.kind() == io::ErrorKind::PermissionDenied {
        return unprivileged();
    }
    PlumbingError::Failed(format!("cannot {what} {name}: {cause}"))
}
