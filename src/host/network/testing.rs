//! [`Plumbing`] that only remembers, for tests of everything above it without privileges. It refuses what a real
//! host would refuse: a plug into a network that is not there.
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use model::NetworkId;

use super::mac::Mac;
use super::plumbing::{Plumbing, PlumbingError, Port, Segment, Surroundings, Wanted};

/// [`Plumbing`] that only remembers.
#[derive(Debug, Default)]
pub struct FakePlumbing {
    scene: Mutex<Scene>,
}

/// What a fake host has.
#[derive(Debug, Clone, Default)]
pub struct Scene {
    /// What [`Plumbing::surroundings`] answers.
    pub surroundings: Surroundings,
    /// When present, the host can do nothing, for this reason.
    pub trouble: Option<PlumbingError>,
    /// Networks that have a bridge.
    pub segments: BTreeMap<NetworkId, Segment>,
    /// Interfaces that DHCP and DNS of each network know.
    pub served: BTreeMap<NetworkId, Vec<Port>>,
    /// Taps that were made and not removed, by name.
    pub taps: BTreeMap<String, Port>,
    /// Networks of which [`Plumbing::expect`] was told, and their next interface's hardware address until that is promised.
    pub expected: BTreeMap<NetworkId, Option<Mac>>,
    /// What was written to each, packet after packet.
    pub sent: BTreeMap<String, Arc<File>>,
}

impl FakePlumbing {
    /// A host that has and knows nothing, and can do everything.
    pub fn new() -> FakePlumbing {
        FakePlumbing::default()
    }

    /// What the host has, to look at and to change.
    pub fn scene(&self) -> MutexGuard<'_, Scene> {
        self.scene.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn able(&self) -> Result<MutexGuard<'_, Scene>, PlumbingError> {
        let scene = self.scene();
        match &scene.trouble {
            Some(trouble) => Err(trouble.clone()),
            None => Ok(scene),
        }
    }
}

impl Plumbing for FakePlumbing {
    fn surroundings(&self) -> BoxFuture<'_, Surroundings> {
        let surroundings = self.scene().surroundings.clone();
        async { surroundings }.boxed()
    }

    fn ensure(&self, wanted: Wanted) -> BoxFuture<'_, BTreeMap<NetworkId, String>> {
        let troubles = match self.able() {
            Ok(mut scene) => {
                for segment in wanted.segments {
                    let ports =
                        wanted.ports.iter().filter(|port| port.network == segment.id).cloned().collect();
                    scene.served.insert(segment.id, ports);
                    scene.segments.insert(segment.id, segment);
                }
                BTreeMap::new()
            }
            Err(trouble) => wanted.segments.iter().map(|segment| (segment.id, trouble.to_string())).collect(),
        };
        async { troubles }.boxed()
    }

    fn serve(&self, segment: Segment, ports: Vec<Port>) -> BoxFuture<'_, Result<(), PlumbingError>> {
        let outcome = self.able().map(|mut scene| {
            scene.served.insert(segment.id, ports);
        });
        async { outcome }.boxed()
    }

    fn introduce(&self, segment: Segment, port: Port) -> BoxFuture<'_, Result<bool, PlumbingError>> {
        let outcome = self.able().map(|mut scene| {
            let Some(known) = scene.served.get_mut(&segment.id) else { return false };
            let shares =
                |other: &Port| other.ipv4 == port.ipv4 || other.mac == port.mac || other.name == port.name;
            match known.iter().find(|other| shares(other)) {
                Some(other) => *other == port,
                None => {
                    known.push(port);
                    true
                }
            }
        });
        async { outcome }.boxed()
    }

    fn plug(&self, segment: Segment, port: Port) -> BoxFuture<'_, Result<OwnedFd, PlumbingError>> {
        let outcome = self.able().and_then(|mut scene| {
            if !scene.segments.contains_key(&segment.id) {
                return Err(PlumbingError::Failed(format!("there is no bridge {}", segment.bridge)));
            }
            let stand_in = || {
                let tap = File::from(rustix::fs::memfd_create("tap", rustix::fs::MemfdFlags::CLOEXEC)?);
                Ok::<_, std::io::Error>((tap.try_clone()?, tap))
            };
            let (kept, tap) = stand_in().map_err(|cause| PlumbingError::Failed(cause.to_string()))?;
            scene.sent.insert(port.tap(), Arc::new(kept));
            scene.taps.insert(port.tap(), port);
            Ok(tap.into())
        });
        async { outcome }.boxed()
    }

    fn expect(&self, segment: Segment) -> BoxFuture<'_, ()> {
        self.scene().expected.entry(segment.id).or_default().get_or_insert_with(Mac::random);
        async {}.boxed()
    }

    fn promise(&self, network: NetworkId) -> Option<Mac> {
        self.scene().expected.get_mut(&network)?.take()
    }

    fn take_back(&self, network: NetworkId, mac: Mac) {
        self.scene().expected.insert(network, Some(mac));
    }

    fn unplug(&self, ports: Vec<Port>) -> BoxFuture<'_, Result<(), PlumbingError>> {
        let outcome = self.able().map(|mut scene| {
            for port in ports {
                scene.taps.remove(&port.tap());
                scene.sent.remove(&port.tap());
            }
        });
        async { outcome }.boxed()
    }

    fn remove(&self, segment: Segment) -> BoxFuture<'_, Result<(), PlumbingError>> {
        let outcome = self.able().map(|mut scene| {
            scene.segments.remove(&segment.id);
            scene.served.remove(&segment.id);
        });
        async { outcome }.boxed()
    }
}
