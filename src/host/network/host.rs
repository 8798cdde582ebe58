//! [`Plumbing`] on a real host: netlink, nftables, dnsmasq, sysctl. It knows no records.
//! `src/bin/toftd.rs` makes one. Everything it does is in the network namespace of the daemon.
//!
//! Rules come before devices: a tap is up on a bridge only while the rules that bind it are in force.
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use model::NetworkId;
use model::network::NetworkKind;
use nix::net::if_::if_nametoindex;
use sys::tap::Tap;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::dnsmasq::{Dnsmasq, Served};
use super::elements::{Applied, Elements};
use super::forwarding::Forwarding;
use super::links::{self, Links};
use super::mac::Mac;
use super::nft;
use super::plumbing::{Foreign, Plumbing, PlumbingError, Port, Segment, Surroundings, Wanted};
use super::rules;
use super::spares::{Spare, Spares};
use crate::core::{AlwaysLive, Checkpoint, here};

/// [`Plumbing`] on a real host.
pub struct HostPlumbing {
    run_dir: PathBuf,
    forwarding: Forwarding,
    elements: Elements,
    spares: Spares,
    /// Held by whoever makes spare taps, and to see that nobody is making one. Taken before `state`.
    making: Arc<Mutex<()>>,
    checkpoint: Arc<dyn Checkpoint>,
    state: Mutex<State>,
    /// Each dnsmasq that this daemon has told something. Taken after `state` where both are needed.
    served: Mutex<BTreeMap<NetworkId, Served>>,
}

#[derive(Default)]
struct State {
    /// What the rules in force were made of.
    wanted: Wanted,
    /// Uplinks of the rules in force.
    uplinks: Vec<String>,
    /// Ports of bridges that these keep from the host.
    foreign: Vec<Foreign>,
}

impl HostPlumbing {
    /// What must not outlive a restart of the host is kept in `run_dir`, such as `/run/toft`: files of dnsmasq and
    /// the record of forwarding. Every user must be able to reach it, because dnsmasq drops its privileges.
    pub fn new(run_dir: impl Into<PathBuf>) -> HostPlumbing {
        let run_dir = run_dir.into();
        let forwarding = Forwarding::new(run_dir.join("forwarding"), Path::new("/proc/sys/net/ipv4"));
        HostPlumbing {
            run_dir,
            forwarding,
            elements: Elements::default(),
            spares: Spares::default(),
            making: Arc::default(),
            checkpoint: Arc::new(AlwaysLive),
            state: Mutex::default(),
            served: Mutex::default(),
        }
    }

    /// Tells of each thing done to the host. A checkpoint that wants death has to bring it about itself.
    pub fn watched(self, checkpoint: Arc<dyn Checkpoint>) -> HostPlumbing {
        HostPlumbing { checkpoint, ..self }
    }

    /// Number of the tap that waits.
    #[cfg(test)]
    pub(super) fn spare(&self, network: NetworkId) -> Option<u32> {
        self.spares.waiting(network)
    }

    fn did(&self, point: &'static str) {
        let _ = self.checkpoint.reached(point);
    }

    fn dnsmasq(&self, id: NetworkId) -> Dnsmasq {
        Dnsmasq::new(self.run_dir.join("networks").join(id.to_string()))
    }

    async fn ensure_all(&self, wanted: Wanted) -> BTreeMap<NetworkId, String> {
        let mut state = self.state.lock().await;
        let mut troubles = BTreeMap::new();
        let links = match self.ensure_rules(&mut state, &wanted).await {
            Ok(links) => links,
            Err(trouble) => {
                troubles.extend(wanted.segments.iter().map(|segment| (segment.id, trouble.to_string())));
                return troubles;
            }
        };
        for segment in &wanted.segments {
            let ports: Vec<Port> =
                wanted.ports.iter().filter(|port| port.network == segment.id).cloned().collect();
            let ready = match links.ensure_bridge(segment) {
                Ok(()) => {
                    self.did("network.bridge_made");
                    let served = self.ensure_served(segment, &ports).await;
                    served.and(links.ensure_device(segment, &state.foreign))
                }
                Err(trouble) => Err(trouble),
            };
            if let Err(trouble) = ready {
                troubles.insert(segment.id, trouble.to_string());
            }
        }
        troubles
    }

    async fn ensure_rules(&self, state: &mut State, wanted: &Wanted) -> Result<Links, PlumbingError> {
        let links = Links::open()?;
        let foreign = links.foreign(&wanted.segments)?;
        // The bridge of a network that is being deleted may be there still.
        if wanted.segments.is_empty() && foreign.is_empty() {
            self.clear_rules(state).await?;
            return Ok(links);
        }
        let nat = wanted.segments.iter().any(|segment| segment.kind == NetworkKind::Nat);
        let uplinks = if nat { links.uplinks()? } else { Vec::new() };
        super::dnsmasq::make_reachable(&self.run_dir).map_err(|cause| file_trouble(&self.run_dir, cause))?;
        let planned = self.forwarding.plan(&uplinks).map_err(forwarding_trouble)?;
        let mut in_force = wanted.clone();
        // A server that is off has no tap, or one that waits for it, and nothing that speaks in its name; plugging it in lets it.
        in_force.ports.retain(|port| {
            self.spares.is_next(port.network, port.mac) != Some(true)
                && if_nametoindex(port.tap().as_str()).is_ok()
        });
        nft::apply(&rules::ruleset(&in_force, &planned, &foreign)).await?;
        self.did("network.ruled");
        self.forwarding.switch_on(&planned).map_err(forwarding_trouble)?;
        state.wanted = in_force;
        state.uplinks = planned;
        state.foreign = foreign;
        Ok(links)
    }

    /// Nothing of Toft's rules and forwarding is left on a host without networks.
    async fn clear_rules(&self, state: &mut State) -> Result<(), PlumbingError> {
        nft::apply(&rules::removal()).await?;
        self.did("network.unruled");
        self.forwarding.restore().map_err(forwarding_trouble)?;
        state.wanted = Wanted::default();
        state.uplinks.clear();
        state.foreign.clear();
        Ok(())
    }

    async fn ensure_served(&self, segment: &Segment, ports: &[Port]) -> Result<(), PlumbingError> {
        let mut served = self.served.lock().await;
        // After a failure nobody knows what it was told.
        let before = served.remove(&segment.id);
        let serving = self.dnsmasq(segment.id).serve(before, segment, ports).await?;
        self.did("network.dnsmasq_told");
        served.insert(segment.id, serving);
        Ok(())
    }

    async fn introduce_one(&self, segment: &Segment, port: &Port) -> Result<bool, PlumbingError> {
        let mut served = self.served.lock().await;
        // As above.
        let Some(mut serving) = served.remove(&segment.id) else { return Ok(false) };
        let introduced =
            self.dnsmasq(segment.id).introduce(&mut serving, segment, std::slice::from_ref(port)).await?;
        self.did("network.dnsmasq_told");
        if introduced {
            served.insert(segment.id, serving);
        }
        Ok(introduced)
    }

    async fn plug_in(&self, segment: Segment, port: Port) -> Result<OwnedFd, PlumbingError> {
        let mut state = self.state.lock().await;
        self.admit(&mut state, &port).await?;
        drop(state);
        self.did("network.port_admitted");
        let links = Links::open()?;
        let name = port.tap();
        // What is just being made is its own.
        let is_awaited = self.spares.is_next(segment.id, port.mac) == Some(false);
        let making = if is_awaited { Some(self.making.lock().await) } else { None };
        let spare = self.spares.take(segment.id, port.mac);
        drop(making);
        let plugged = here(|| {
            if let Some(spare) = spare
                && let Some(tap) = self.use_spare(&links, spare, &name, &segment)?
            {
                return Ok(tap);
            }
            if if_nametoindex(name.as_str()).is_ok() {
                links.remove(&name)?;
            }
            self.make_port(&links, &name, &segment)
        });
        let tap = match plugged {
            Ok(tap) => tap,
            Err(cause) => {
                // The last place on a bridge may be that of one which waits, or is just being made.
                let _nobody = self.making.lock().await;
                here(|| {
                    drop(self.spares.forget(segment.id).ok_or(cause)?);
                    self.make_port(&links, &name, &segment)
                })?
            }
        };
        Ok(tap.into())
    }

    /// Brings a tap up that has waited. None when it is not what it was made as: somebody may have taken the bridge away, and the
    /// network brought it back.
    fn use_spare(
        &self,
        links: &Links,
        Spare { tap, index }: Spare,
        name: &str,
        segment: &Segment,
    ) -> Result<Option<Tap>, PlumbingError> {
        if let Err(cause) = links.check_joined(name, index, segment) {
            tracing::info!("a tap that was ready is not used: {cause}");
            return Ok(None);
        }
        links.raise(name, index)?;
        self.did("network.spare_plugged");
        Ok(Some(tap))
    }

    fn make_port(&self, links: &Links, name: &str, segment: &Segment) -> Result<Tap, PlumbingError> {
        let tap = links::make_tap(name)?;
        self.did("network.tap_made");
        let port = links.join(name, segment)?;
        links.raise(name, port)?;
        Ok(tap)
    }

    /// Only where a server runs: with the last one of a network its spare tap goes, too.
    async fn make_spare(&self, segment: Segment) {
        let alone = Arc::clone(&self.making).lock_owned().await;
        if !self.is_in_use(segment.id).await {
            return;
        }
        if let Some(useless) = self.spares.pass(segment.id) {
            return remove_later(Some(useless), alone);
        }
        let made = Links::open().and_then(|links| self.spares.make(&links, &segment));
        if let Err(cause) = made {
            // Whoever needs one makes it, and says why it cannot.
            tracing::info!("no tap can be kept ready: {cause}");
        }
    }

    async fn is_in_use(&self, network: NetworkId) -> bool {
        self.state.lock().await.wanted.ports.iter().any(|port| port.network == network)
    }

    /// Somebody may have flushed the tables; then they are made again before anything is let through. Not by a daemon that has not made
    /// them yet: an earlier one's, which may lack what this one puts into them, are all that holds for servers that run.
    async fn admit(&self, state: &mut State, port: &Port) -> Result<(), PlumbingError> {
        if self.elements.admit(port)? == Applied::NoTable {
            if !state.wanted.segments.iter().any(|segment| segment.id == port.network) {
                let detail =
                    "the rules of its network are not in force; start it again when the network is ready";
                return Err(PlumbingError::Failed(detail.to_owned()));
            }
            tracing::warn!("Toft's nftables rules were gone and are made again");
            let mut wanted = state.wanted.clone();
            wanted.ports.retain(|known| known.mac != port.mac);
            wanted.ports.push(port.clone());
            nft::apply(&rules::ruleset(&wanted, &state.uplinks, &state.foreign)).await?;
        }
        state.wanted.ports.retain(|known| known.mac != port.mac);
        state.wanted.ports.push(port.clone());
        Ok(())
    }

    async fn unplug_all(&self, ports: Vec<Port>) -> Result<(), PlumbingError> {
        let links = Links::open()?;
        for port in &ports {
            // What waits for one that was never plugged in goes in its time.
            let waits = self.spares.is_next(port.network, port.mac) == Some(true);
            if !waits && if_nametoindex(port.tap().as_str()).is_ok() {
                links.remove(&port.tap())?;
            }
            self.did("network.tap_removed");
        }
        let mut state = self.state.lock().await;
        state.wanted.ports.retain(|known| ports.iter().all(|port| port.mac != known.mac));
        // Without tables there is nothing to take out of them.
        self.elements.silence(&ports)?;
        drop(state);
        let networks: BTreeSet<NetworkId> = ports.iter().map(|port| port.network).collect();
        for network in networks {
            self.let_go(network).await;
        }
        Ok(())
    }

    /// Removes the spare tap of a network that has no server any more.
    async fn let_go(&self, network: NetworkId) {
        let alone = Arc::clone(&self.making).lock_owned().await;
        if self.is_in_use(network).await {
            return;
        }
        remove_later(self.spares.forget(network), alone);
    }

    async fn remove_network(&self, segment: Segment) -> Result<(), PlumbingError> {
        let mut state = self.state.lock().await;
        self.dnsmasq(segment.id).remove().await?;
        self.did("network.dnsmasq_removed");
        self.served.lock().await.remove(&segment.id);
        let links = Links::open()?;
        links.remove_bridge(&segment)?;
        self.did("network.bridge_removed");
        let mut wanted = state.wanted.clone();
        wanted.segments.retain(|other| other.id != segment.id);
        wanted.ports.retain(|port| port.network != segment.id);
        state.foreign = links.foreign(&wanted.segments)?;
        if wanted.segments.is_empty() && state.foreign.is_empty() {
            return self.clear_rules(&mut state).await;
        }
        nft::apply(&rules::ruleset(&wanted, &state.uplinks, &state.foreign)).await?;
        state.wanted = wanted;
        Ok(())
    }
}

impl Plumbing for HostPlumbing {
    fn surroundings(&self) -> BoxFuture<'_, Surroundings> {
        async {
            let found = match Links::open() {
                Ok(links) => links.surroundings(),
                Err(trouble) => Err(trouble),
            };
            found.unwrap_or_else(|trouble| {
                tracing::warn!("a new network may overlap what the host reaches: {trouble}");
                Surroundings::default()
            })
        }
        .boxed()
    }

    fn ensure(&self, wanted: Wanted) -> BoxFuture<'_, BTreeMap<NetworkId, String>> {
        self.ensure_all(wanted).boxed()
    }

    fn serve(&self, segment: Segment, ports: Vec<Port>) -> BoxFuture<'_, Result<(), PlumbingError>> {
        async move { self.ensure_served(&segment, &ports).await }.boxed()
    }

    fn introduce(&self, segment: Segment, port: Port) -> BoxFuture<'_, Result<bool, PlumbingError>> {
        async move { self.introduce_one(&segment, &port).await }.boxed()
    }

    fn plug(&self, segment: Segment, port: Port) -> BoxFuture<'_, Result<OwnedFd, PlumbingError>> {
        self.plug_in(segment, port).boxed()
    }

    fn expect(&self, segment: Segment) -> BoxFuture<'_, ()> {
        self.make_spare(segment).boxed()
    }

    fn promise(&self, network: NetworkId) -> Option<Mac> {
        self.spares.promise(network)
    }

    fn take_back(&self, network: NetworkId, mac: Mac) {
        self.spares.take_back(network, mac);
    }

    fn unplug(&self, ports: Vec<Port>) -> BoxFuture<'_, Result<(), PlumbingError>> {
        self.unplug_all(ports).boxed()
    }

    fn remove(&self, segment: Segment) -> BoxFuture<'_, Result<(), PlumbingError>> {
        async move {
            let id = segment.id;
            self.remove_network(segment).await?;
            self.let_go(id).await;
            Ok(())
        }
        .boxed()
    }
}

/// The kernel takes some 15 ms to remove a tap, for which nobody has to wait but who would make one.
fn remove_later(spare: Option<Spare>, alone: OwnedMutexGuard<()>) {
    tokio::task::spawn_blocking(move || {
        drop(spare);
        drop(alone);
    });
}

fn file_trouble(path: &Path, cause: io::Error) -> PlumbingError {
    let detail = format!("cannot write {}: {cause}", path.display());
    match cause.kind() {
        io::ErrorKind::PermissionDenied => PlumbingError::Unprepared(format!("{detail}; run toftd as root")),
        _ => PlumbingError::Failed(detail),
    }
}

fn forwarding_trouble(cause: io::Error) -> PlumbingError {
    match cause.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            PlumbingError::Unprepared(format!(
                "IPv4 forwarding cannot be switched on ({cause}); run toftd as root, with /proc/sys writable"
            ))
        }
        _ => PlumbingError::Failed(format!("IPv4 forwarding cannot be switched on: {cause}")),
    }
}
