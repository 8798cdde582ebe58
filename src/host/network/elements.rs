//! Elements of the sets of [`rules`](super::rules), over netlink: what changes when a server starts or ends. A program
//! for each of them would cost more than the machine's start. All of one change is in force or none of it.
//! It knows the sets' names and types, not what is done with them. `HostPlumbing` uses it.
//! Source: the kernel's linux/netfilter/nf_tables.h and nfnetlink.h.
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::limits::ACK_BYTES_MAX;
use super::links::unprivileged;
use super::plumbing::{PlumbingError, Port};

/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`: what is between them is one transaction.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// `NFNL_SUBSYS_NFTABLES`, which is also the upper half of its messages' types.
const NFTABLES: u16 = 10;

/// `NFT_MSG_NEWSETELEM` and `NFT_MSG_DELSETELEM`.
const NEW_ELEMENT: u16 = 12;
const DELETE_ELEMENT: u16 = 14;

/// `NLM_F_REQUEST`, `NLM_F_ACK`, `NLM_F_CREATE`.
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const CREATE: u16 = 0x400;

/// `NLMSG_ERROR`, which carries acknowledgements too.
const ERROR: u16 = 2;

/// `NFPROTO_BRIDGE`, the family of the table.
const BRIDGE: u8 = 7;

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// Bytes of `struct nlmsghdr`, and of that with `struct nfgenmsg`.
const HEADER_BYTES: usize = 16;

/// Bytes of a device's name in a key (`IFNAMSIZ`).
const NAME_BYTES: usize = 16;

/// Whether the sets were there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Applied {
    /// The whole change is in force.
    Yes,
    /// Nothing was changed, because a table or set that it is for does not exist.
    NoTable,
}

/// The sets' elements, in the network namespace of whoever uses it first. Its socket stays open: as one is closed, the kernel
/// waits until elements that were removed are taken apart, some 15 ms, and lets nobody change rules meanwhile.
#[derive(Debug, Default)]
pub(super) struct Elements(Mutex<Option<OwnedFd>>);

impl Elements {
    /// Lets `port` speak. Adding what is there changes nothing.
    pub(super) fn admit(&self, port: &Port) -> Result<Applied, PlumbingError> {
        self.commit(&batch(&changes(NEW_ELEMENT, port)))
    }

    /// Silences `ports`. Each is added first because removing what is not there would fail.
    pub(super) fn silence(&self, ports: &[Port]) -> Result<Applied, PlumbingError> {
        let change = |port| changes(NEW_ELEMENT, port).into_iter().chain(changes(DELETE_ELEMENT, port));
        self.commit(&batch(&ports.iter().flat_map(change).collect::<Vec<_>>()))
    }

    /// Puts it in force.
    fn commit(&self, batch: &Batch) -> Result<Applied, PlumbingError> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match exchange(&mut held, batch) {
            Ok(()) => Ok(Applied::Yes),
            Err(cause) => {
                // Answers may be left in it.
                *held = None;
                match cause {
                    Errno::ENOENT => Ok(Applied::NoTable),
                    Errno::EPERM | Errno::EACCES => Err(unprivileged()),
                    cause => {
                        let detail = format!("the kernel refuses a change of the rules: {cause}");
                        Err(PlumbingError::Failed(detail))
                    }
                }
            }
        }
    }
}

/// One element that comes or goes.
struct Change {
    kind: u16,
    set: &'static str,
    key: Vec<u8>,
}

/// A port's elements, as `rules` writes them: its name with each of its addresses.
fn changes(kind: u16, port: &Port) -> [Change; 3] {
    let key = |address: &[u8]| {
        let mut key = port.tap().into_bytes();
        key.resize(NAME_BYTES, 0);
        key.extend_from_slice(address);
        // Each part of a key fills whole registers of four bytes.
        key.resize(key.len().next_multiple_of(4), 0);
        key
    };
    [
        Change { kind, set: "senders", key: key(&port.mac.0) },
        Change { kind, set: "addresses", key: key(&port.ipv4.octets()) },
        Change { kind, set: "clients", key: key(&port.mac.0) },
    ]
}

/// A transaction and how many answers it has.
struct Batch {
    bytes: Vec<u8>,
    answers: usize,
}

fn batch(changes: &[Change]) -> Batch {
    let mut bytes = Vec::new();
    message(&mut bytes, BATCH_BEGIN, REQUEST, 0, NFTABLES, &[]);
    for Change { kind, set, key } in changes {
        let key = attribute(NESTED | 1, &attribute(1, key));
        let element = attribute(NESTED | 1, &key);
        let attributes = [text(1, "toft"), text(2, set), attribute(NESTED | 3, &element)].concat();
        let flags = if *kind == NEW_ELEMENT { REQUEST | ACK | CREATE } else { REQUEST | ACK };
        message(&mut bytes, NFTABLES << 8 | kind, flags, BRIDGE, 0, &attributes);
    }
    message(&mut bytes, BATCH_END, REQUEST, 0, NFTABLES, &[]);
    Batch { bytes, answers: changes.len() }
}

/// Appends a message: `struct nlmsghdr`, `struct nfgenmsg`, attributes. The kernel's answers tell by themselves which
/// is which, so all have the number 0.
fn message(bytes: &mut Vec<u8>, kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) {
    let length = u32::try_from(HEADER_BYTES + 4 + attributes.len()).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family, 0]);
    bytes.extend_from_slice(&resource.to_be_bytes());
    bytes.extend_from_slice(attributes);
}

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn text(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), &[0]].concat())
}

/// Sends it and reads every answer. The kernel does the work, a tenth of a millisecond, before it returns from the
/// call, so there is nothing to wait for.
fn exchange(held: &mut Option<OwnedFd>, batch: &Batch) -> Result<(), Errno> {
    let socket = match held {
        Some(socket) => socket,
        none => {
            let (flags, protocol) = (SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter);
            none.insert(socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?)
        }
    };
    send(socket.as_raw_fd(), &batch.bytes, MsgFlags::empty())?;
    let (mut left, mut buffer) = (batch.answers, vec![0; ACK_BYTES_MAX]);
    while left > 0 {
        let count = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
        left = left.saturating_sub(acknowledged(buffer.get(..count).unwrap_or_default())?);
    }
    Ok(())
}

/// How many messages the kernel acknowledges in one datagram. Fails with the first refusal.
fn acknowledged(mut datagram: &[u8]) -> Result<usize, Errno> {
    let mut count = 0;
    let number = |bytes: &[u8], at: usize| -> Option<[u8; 4]> { bytes.get(at..at + 4)?.try_into().ok() };
    while let (Some(length), Some(kind), Some(error)) =
        (number(datagram, 0), number(datagram, 4), number(datagram, HEADER_BYTES))
    {
        if u16::from_ne_bytes([kind[0], kind[1]]) == ERROR {
            match i32::from_ne_bytes(error) {
                0 => count += 1,
                refusal => return Err(Errno::from_raw(refusal.saturating_neg())),
            }
        }
        let length = u32::from_ne_bytes(length) as usize;
        datagram = datagram.get(length.next_multiple_of(4).max(HEADER_BYTES)..).unwrap_or_default();
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::mac::Mac;

    fn port() -> Port {
        Port {
            network: model::NetworkId(uuid::Uuid::nil()),
            mac: Mac([0x52, 0x54, 0, 1, 2, 3]),
            ipv4: [10, 77, 0, 2].into(),
            name: "web1".parse().unwrap(),
        }
    }

    #[test]
    fn a_key_is_the_taps_name_and_an_address_in_whole_registers() {
        let [senders, addresses, clients] = changes(NEW_ELEMENT, &port());
        assert_eq!(senders.key, *b"tofttap010203\0\0\0\x52\x54\0\x01\x02\x03\0\0");
        assert_eq!(addresses.key, *b"tofttap010203\0\0\0\x0a\x4d\0\x02");
        assert_eq!(clients.key, senders.key);
    }

    #[test]
    fn lengths_lead_from_message_to_message_and_from_attribute_to_attribute() {
        let Batch { bytes, answers } = batch(&changes(DELETE_ELEMENT, &port()));
        assert_eq!(answers, 3);
        let (mut kinds, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            let length = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            assert!(length >= HEADER_BYTES + 4 && length.is_multiple_of(4), "{length}");
            kinds.push(u16::from_ne_bytes(bytes[at + 4..at + 6].try_into().unwrap()));
            let mut attribute = at + HEADER_BYTES + 4;
            while attribute < at + length {
                let size = u16::from_ne_bytes(bytes[attribute..attribute + 2].try_into().unwrap()) as usize;
                attribute += size.next_multiple_of(4);
            }
            assert_eq!(attribute, at + length);
            at += length;
        }
        assert_eq!(kinds, [BATCH_BEGIN, 0x0a0e, 0x0a0e, 0x0a0e, BATCH_END]);
    }

    #[test]
    fn answers_of_any_shape_are_counted_or_refused() {
        let answer = |error: i32| {
            let mut bytes = 36u32.to_ne_bytes().to_vec();
            bytes.extend_from_slice(&ERROR.to_ne_bytes());
            bytes.resize(HEADER_BYTES, 0);
            bytes.extend_from_slice(&error.to_ne_bytes());
            bytes.resize(36, 0);
            bytes
        };
        assert_eq!(acknowledged(&[answer(0), answer(0)].concat()), Ok(2));
        assert_eq!(acknowledged(&[answer(0), answer(-2)].concat()), Err(Errno::ENOENT));
        assert_eq!(acknowledged(&[]), Ok(0));
        assert_eq!(acknowledged(&answer(0)[..17]), Ok(0));
        assert_eq!(acknowledged(&[0; 64]), Ok(0), "a length of nothing does not hold it up");
    }
}
