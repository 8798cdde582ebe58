//! Messages to the kernel's routing family and its answers, on the thread that asks: the kernel does what it is asked before the call
//! returns, so there is nothing to wait for. It knows no devices. `links` uses it.
//! Source: the kernel's Documentation/userspace-api/netlink/intro.rst.
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;

use super::limits::{ANSWER_BYTES_MAX, DUMPS_MAX};

/// A socket, in the network namespace of the thread that opened it.
pub(super) struct Netlink {
    fd: OwnedFd,
    /// Number of the last question; its answer bears it.
    asked: AtomicU32,
    /// What answers are received into: one for all questions, since so much memory costs more than most of them.
    buffer: RefCell<Vec<u8>>,
}

impl Netlink {
    /// Needs no privilege.
    pub(super) fn open() -> io::Result<Netlink> {
        let (flags, protocol) = (SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        Ok(Netlink { fd, asked: AtomicU32::new(0), buffer: RefCell::new(vec![0; ANSWER_BYTES_MAX]) })
    }

    /// Has something done; `flags` beyond `NLM_F_REQUEST` and `NLM_F_ACK` are the caller's. Fails with what the kernel says.
    pub(super) fn order(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_ACK | flags).map(|_| ())
    }

    /// What the kernel has of one thing.
    pub(super) fn get(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        Ok(self.exchange(message, NLM_F_ACK)?.found)
    }

    /// All that the kernel has of a kind. A list that changed while it was told is asked for again; of one that never stands still,
    /// the last.
    pub(super) fn dump(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 1..DUMPS_MAX {
            let answer = self.exchange(message.clone(), NLM_F_DUMP)?;
            if !answer.is_torn {
                return Ok(answer.found);
            }
        }
        let answer = self.exchange(message, NLM_F_DUMP)?;
        if answer.is_torn {
            tracing::warn!(
                "a list of the kernel's changed each time that it was told, and may lack something"
            );
        }
        Ok(answer.found)
    }

    fn exchange(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Answer> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = number;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let (mut answer, mut buffer) = (Answer::default(), self.buffer.borrow_mut());
        loop {
            let count = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
            if answer.read(buffer.get(..count).unwrap_or_default(), number)? {
                return Ok(answer);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Answer {
    found: Vec<RouteNetlinkMessage>,
    /// The list changed while it was told, and may lack something or have it twice.
    is_torn: bool,
}

impl Answer {
    /// Takes what one datagram tells; whether it is the end of the answer to the question of this number. What is left of an earlier
    /// answer is passed over, and what cannot be read, as of a device of a kind that nobody knew when this was written.
    fn read(&mut self, mut datagram: &[u8], number: u32) -> io::Result<bool> {
        while let Some(length) = datagram.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes) as usize) {
            let Some(bytes) = datagram.get(..length).filter(|bytes| !bytes.is_empty()) else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "an answer of the kernel is cut short",
                ));
            };
            datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
            let message = match NetlinkMessage::deserialize(bytes) {
                Ok(message) if message.header.sequence_number == number => message,
                Ok(_) => continue,
                Err(cause) => {
                    tracing::warn!("an answer of the kernel cannot be read: {cause}");
                    continue;
                }
            };
            self.is_torn |= message.header.flags & NLM_F_DUMP_INTR != 0;
            match message.payload {
                NetlinkPayload::InnerMessage(told) => self.found.push(told),
                NetlinkPayload::Error(said) => return said.code.map_or(Ok(true), |_| Err(said.to_io())),
                // A list that could not be told to its end ends with why.
                NetlinkPayload::Done(said) if said.code < 0 => {
                    return Err(io::Error::from_raw_os_error(said.code.saturating_neg()));
                }
                NetlinkPayload::Done(_) => return Ok(true),
                _ => {}
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBER: u32 = 7;

    fn numbered(kind: u16, flags: u16, number: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).unwrap();
        let header = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes()].concat();
        [&header[..], &number.to_ne_bytes(), &[0; 4], payload].concat()
    }

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        numbered(kind, 0, NUMBER, payload)
    }

    fn end(code: i32) -> Vec<u8> {
        message(ERROR, &[&code.to_ne_bytes()[..], &[0; 16]].concat())
    }

    /// `NLMSG_ERROR`, `NLMSG_DONE` and `RTM_NEWLINK`.
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    const NEW_LINK: u16 = 16;

    #[test]
    fn an_answer_ends_with_an_acknowledgement_a_refusal_or_the_end_of_a_list() {
        let mut answer = Answer::default();
        assert!(answer.read(&end(0), NUMBER).unwrap());
        assert_eq!(answer.read(&end(-17), NUMBER).unwrap_err().raw_os_error(), Some(17));
        assert!(answer.read(&message(DONE, &[0; 4]), NUMBER).unwrap());
        let broken = message(DONE, &(-105i32).to_ne_bytes());
        assert_eq!(answer.read(&broken, NUMBER).unwrap_err().raw_os_error(), Some(105));
        assert!(!answer.read(&[], NUMBER).unwrap());
        assert!(answer.found.is_empty() && !answer.is_torn);
    }

    #[test]
    fn only_the_answer_to_what_was_asked_counts() {
        let mut answer = Answer::default();
        let earlier = [numbered(NEW_LINK, 0, NUMBER - 1, &[0; 16]), numbered(DONE, 0, NUMBER - 1, &[0; 4])];
        assert!(!answer.read(&earlier.concat(), NUMBER).unwrap());
        assert!(answer.found.is_empty());
        assert!(answer.read(&[message(NEW_LINK, &[0; 16]), end(0)].concat(), NUMBER).unwrap());
        assert_eq!(answer.found.len(), 1);
    }

    #[test]
    fn a_list_that_changed_while_it_was_told_says_so() {
        let mut answer = Answer::default();
        let torn = numbered(DONE, NLM_F_DUMP_INTR, NUMBER, &[0; 4]);
        assert!(answer.read(&torn, NUMBER).unwrap() && answer.is_torn);
    }

    #[test]
    fn what_is_strange_is_passed_over_and_what_is_cut_is_an_error() {
        // Cut within its header, and of a kind that there is not.
        let strange = [message(NEW_LINK, &[0; 4]), message(9999, &[0; 4]), message(DONE, &[0; 4])].concat();
        let mut answer = Answer::default();
        assert!(answer.read(&strange, NUMBER).unwrap() && answer.found.len() < 2, "{answer:?}");
        for cut in [17, 19, 21] {
            let end = Answer::default().read(&strange[..cut], NUMBER);
            assert!(end.is_err() || !end.unwrap(), "{cut}");
        }
        assert!(answer.read(&[0; 16], NUMBER).is_err(), "a length of nothing does not hold it up");
    }
}
