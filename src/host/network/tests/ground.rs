//! A network namespace for one test, with guests in it. Its devices, rules and processes go with it.
use std::future::Future;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use model::network::NetworkKind;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use rustix::process::Signal;
use sys::tap::VNET_HEADER_BYTES;

use super::frames::{Arp, BROADCAST, Udp};
use super::{port, segment};
use crate::network::dnsmasq::Dnsmasq;
use crate::network::mac::Mac;
use crate::network::plumbing::{Plumbing, Port, Segment, Wanted};
use crate::network::{HostPlumbing, program};

/// Longest wait for a frame that must come.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How long a guest waits before it asks again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// A namespace with a host in it.
pub(super) struct Ground {
    pub(super) plumbing: HostPlumbing,
    pub(super) wanted: Wanted,
    run_dir: tempfile::TempDir,
}

/// Runs `test` in a namespace of its own, or says why it cannot.
pub(super) fn run<F: Future<Output = ()>>(test: impl FnOnce(Ground) -> F + Send + 'static) {
    for (needed, package) in [("nft", "nftables"), ("dnsmasq", "dnsmasq-base")] {
        if program::find(needed).is_none() {
            eprintln!("skipped: {needed} is missing; install {package}");
            return;
        }
    }
    let outcome = std::thread::spawn(move || {
        if let Err(cause) = unshare(CloneFlags::CLONE_NEWNET) {
            eprintln!("skipped: a network namespace needs root ({cause})");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(Ground::new()));
    });
    if let Err(panic) = outcome.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Ground {
    fn new() -> Ground {
        let run_dir = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir_in("/tmp")
            .unwrap();
        Ground { plumbing: HostPlumbing::new(run_dir.path()), wanted: Wanted::default(), run_dir }
    }

    /// Adds a network with a server for each name, and makes the host have them.
    pub(super) async fn network(
        &mut self,
        number: u8,
        kind: NetworkKind,
        names: &[&str],
    ) -> (Segment, Vec<Port>) {
        let segment = segment(number, kind);
        let ports: Vec<Port> = (2u8..).zip(names).map(|(last, name)| port(&segment, last, name)).collect();
        self.wanted.segments.push(segment.clone());
        self.wanted.ports.extend(ports.clone());
        self.ensure().await;
        (segment, ports)
    }

    pub(super) async fn ensure(&self) {
        assert_eq!(self.plumbing.ensure(self.wanted.clone()).await, Default::default());
    }

    pub(super) async fn plug(&self, segment: &Segment, port: &Port) -> Guest {
        let tap = self.plumbing.plug(segment.clone(), port.clone()).await.unwrap();
        Guest { tap, mac: port.mac, ipv4: port.ipv4 }
    }

    pub(super) fn run_dir(&self) -> &std::path::Path {
        self.run_dir.path()
    }

    pub(super) fn dnsmasq(&self, segment: &Segment) -> Dnsmasq {
        Dnsmasq::new(self.run_dir.path().join("networks").join(segment.id.to_string()))
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for segment in &self.wanted.segments {
            let _ = self.dnsmasq(segment).signal(Signal::KILL);
        }
    }
}

/// Whoever is at the other end of a tap.
pub(super) struct Guest {
    tap: OwnedFd,
    pub(super) mac: Mac,
    pub(super) ipv4: Ipv4Addr,
}

impl Guest {
    pub(super) fn new(tap: OwnedFd, mac: Mac, ipv4: Ipv4Addr) -> Guest {
        Guest { tap, mac, ipv4 }
    }

    pub(super) fn send(&self, frame: &[u8]) {
        let written = rustix::io::write(&self.tap, &[&[0; VNET_HEADER_BYTES], frame].concat()).unwrap();
        assert_eq!(written, VNET_HEADER_BYTES + frame.len());
    }

    /// The next frame; none when `deadline` passes. Requests for the guest's own address are answered, as any
    /// guest would.
    fn next(&self, deadline: Instant) -> Option<Vec<u8>> {
        loop {
            let mut buffer = vec![0; 2048];
            match rustix::io::read(&self.tap, &mut buffer) {
                Ok(read) => {
                    let frame = buffer[VNET_HEADER_BYTES..read].to_vec();
                    match Arp::read(&frame) {
                        Some(Arp { operation: 1, sender, target }) if target.1 == self.ipv4 => {
                            let answer = Arp { operation: 2, sender: (self.mac, self.ipv4), target: sender };
                            self.send(&answer.frame(sender.0, self.mac));
                        }
                        _ => return Some(frame),
                    }
                }
                Err(rustix::io::Errno::AGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    let mut descriptors = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
                    poll(&mut descriptors, PollTimeout::try_from(left).unwrap()).unwrap();
                }
                Err(cause) => panic!("cannot read from a tap: {}", io::Error::from(cause)),
            }
        }
    }

    /// The first frame of which `pick` makes something, within the patience of a test.
    pub(super) fn wait<T>(&self, what: &str, pick: impl Fn(&[u8]) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let frame = self.next(deadline).unwrap_or_else(|| panic!("{what} did not come"));
            if let Some(found) = pick(&frame) {
                return found;
            }
        }
    }

    /// Sends `question` until `pick` makes something of a frame that comes. Guests ask again, because a bridge
    /// drops what the host answers until the kernel has noticed that its first port is up.
    pub(super) fn ask<T>(&self, what: &str, question: &[u8], pick: impl Fn(&[u8]) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            self.send(question);
            let again = Instant::now() + ASK_AGAIN;
            while let Some(frame) = self.next(again) {
                if let Some(found) = pick(&frame) {
                    return found;
                }
            }
        }
        panic!("{what} did not come");
    }

    /// Every frame that comes before the one with this UDP content.
    pub(super) fn frames_before(&self, mark: &[u8]) -> Vec<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        let mut before = Vec::new();
        loop {
            let frame = self.next(deadline).expect("the frame that marks the end did not come");
            if Udp::read(&frame).is_some_and(|udp| udp.data == mark) {
                return before;
            }
            before.push(frame);
        }
    }

    /// Asks who has `ipv4`, and waits for the answer.
    pub(super) fn resolve(&self, ipv4: Ipv4Addr) -> Mac {
        let question = Arp::request((self.mac, self.ipv4), ipv4).frame(BROADCAST, self.mac);
        self.ask("an ARP answer", &question, |frame| {
            Arp::read(frame).filter(|arp| arp.operation == 2 && arp.sender.1 == ipv4).map(|arp| arp.sender.0)
        })
    }

    /// Sends UDP from the guest's own address.
    pub(super) fn udp(&self, to: (Mac, Ipv4Addr, u16), from_port: u16, data: &[u8]) {
        let udp = Udp { from: (self.ipv4, from_port), to: (to.1, to.2), data: data.to_vec() };
        self.send(&udp.frame(to.0, self.mac));
    }
}
