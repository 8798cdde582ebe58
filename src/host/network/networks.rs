//! The facade of networks: records, their background work, what `servers` needs. No device is touched here.
//!
//! A network's record is committed before its devices are made and is removed after they are gone, so whatever
//! a crash leaves, [`Networks::recover`] finds the record and makes or removes the rest.
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::network::{CreateNetwork, Network, NetworkKind, NetworkPlan, NetworkState, PatchNetwork};
use model::operation::Accepted;
use model::page::{ListQuery, Page};
use model::server::ServerNic;
use model::{Code, Name, NetworkId, ServerId};
use rusqlite::Connection;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::addresses::{self, Reservation};
use super::limits;
use super::mac::Mac;
use super::plumbing::{Plumbing, PlumbingError, Port};
use super::records::{
    BEING_SET_UP, DEFAULT, accept, announce, check_deletable, forget, insert, make_default, read_wanted,
    record_states, segment,
};
use crate::call::{Answer, Call};
use crate::core::Shared;
use crate::error::{Error, Result};
use crate::labels;
use crate::store::{Tx, records};

/// Networks, for callers. Cheap to clone.
#[derive(Clone)]
pub struct Networks {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) core: Shared,
    plumbing: Arc<dyn Plumbing>,
    /// What is wrong, by network; those that are absent are ready.
    troubles: Mutex<BTreeMap<NetworkId, String>>,
    /// Held for writing while everything is made to be as the records say, and for reading while one interface comes or
    /// goes, so that neither undoes the other.
    working: tokio::sync::RwLock<()>,
    /// Held while DHCP and DNS change, so that the last to write them has read the latest records.
    serving: tokio::sync::Mutex<()>,
    /// Whether the worker should look at everything, not only at DHCP and DNS.
    settle_asked: AtomicBool,
    changed: Notify,
    worker: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// Where an interface is, for cloud-init.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    /// Prefix length of the network.
    pub prefix: u8,
    /// Gateway and DNS.
    pub gateway: Ipv4Addr,
    /// Largest packet in bytes.
    pub mtu: u16,
    /// Whether the gateway reaches the world.
    pub routed: bool,
}

impl Networks {
    pub(crate) fn new(core: Shared, plumbing: Arc<dyn Plumbing>) -> Networks {
        let inner = Inner {
            core,
            plumbing,
            troubles: Mutex::default(),
            working: tokio::sync::RwLock::default(),
            serving: tokio::sync::Mutex::default(),
            settle_asked: AtomicBool::new(false),
            changed: Notify::new(),
            worker: Mutex::default(),
        };
        Networks { inner: Arc::new(inner) }
    }

    /// Makes the default network on the first start and brings every network's devices and rules up; what fails
    /// leaves that network `degraded`. Taps of running servers stay as they are.
    pub(crate) async fn recover(&self) -> Result<()> {
        let surroundings = self.inner.plumbing.surroundings().await;
        self.inner.core.store.write(move |tx| make_default(tx, &surroundings)).await?;
        self.inner.settle().await?;
        let inner = self.inner.clone();
        *lock(&self.inner.worker) = Some(tokio::spawn(async move { inner.work().await }));
        Ok(())
    }

    /// Stops what only serves this daemon. Bridges, rules and DHCP stay for the running servers.
    pub(crate) async fn close(&self) {
        let worker = lock(&self.inner.worker).take();
        if let Some(worker) = worker {
            // A piece of work that has begun is finished, so that nothing is half done without need.
            let _idle = self.inner.working.write().await;
            worker.abort();
        }
    }

    /// One page.
    pub async fn list(&self, query: ListQuery) -> Result<Page<Network>> {
        self.inner.core.store.read(move |connection| records::page(connection, &query)).await
    }

    /// The network.
    pub async fn one(&self, id: NetworkId) -> Result<Network> {
        self.inner.core.store.read(move |connection| records::one(connection, id.0)).await
    }

    /// Makes one.
    pub async fn create(&self, call: &Call, spec: CreateNetwork) -> Result<Answer<Accepted<Network>>> {
        let surroundings = self.inner.plumbing.surroundings().await;
        let actor = call.actor.clone();
        // One made while the host is being looked at would be recorded as ready, though nobody had made its bridge.
        let working = self.inner.working.read().await;
        let answer = self
            .inner
            .core
            .mutate(call, move |tx| {
                let network = insert(tx, spec, &surroundings)?;
                let operation = accept(tx, "network.create", &network, &actor)?;
                announce(tx, &network, "network.created", Some((&actor, Some(operation.id))))?;
                Ok(Accepted { operation, resource: Some(network) })
            })
            .await?;
        if let (false, Some(network)) = (answer.replayed, &answer.body.resource) {
            lock(&self.inner.troubles).entry(network.id).or_insert_with(|| BEING_SET_UP.to_owned());
            self.inner.ask_to_settle();
        }
        drop(working);
        Ok(answer)
    }

    /// What `create` would do; changes nothing. Fails as `create` would.
    pub async fn plan(&self, spec: CreateNetwork) -> Result<NetworkPlan> {
        let surroundings = self.inner.plumbing.surroundings().await;
        let rehearsed = move |tx: &Tx<'_>| {
            let network = insert(tx, spec, &surroundings)?;
            Ok(NetworkPlan { steps: steps(&network), network })
        };
        self.inner.core.store.rehearse(rehearsed).await
    }

    /// Name and labels.
    pub async fn patch(&self, call: &Call, id: NetworkId, patch: PatchNetwork) -> Result<Answer<Network>> {
        let conditions = call.clone();
        self.inner
            .core
            .mutate(call, move |tx| {
                let mut network: Network = records::one(tx, id.0)?;
                conditions.check_match(network.generation)?;
                if let Some(name) = patch.name {
                    network.name = name;
                }
                if let Some(changes) = patch.labels {
                    network.labels = labels::merge(&network.labels, changes)?;
                }
                records::save(tx, &mut network)?;
                announce(tx, &network, "network.updated", Some((&conditions.actor, None)))?;
                Ok(network)
            })
            .await
    }

    /// Deletes one. Fails with `in_use` while a server has an address on it.
    pub async fn delete(&self, call: &Call, id: NetworkId) -> Result<Answer<Accepted<Network>>> {
        let conditions = call.clone();
        let answer = self
            .inner
            .core
            .mutate(call, move |tx| {
                let mut network: Network = records::one(tx, id.0)?;
                conditions.check_match(network.generation)?;
                check_deletable(tx, &network)?;
                network.state = NetworkState::Deleting;
                network.state_detail = None;
                records::save(tx, &mut network)?;
                let operation = accept(tx, "network.delete", &network, &conditions.actor)?;
                announce(tx, &network, "network.deleting", Some((&conditions.actor, Some(operation.id))))?;
                Ok(Accepted { operation, resource: Some(network) })
            })
            .await?;
        self.inner.ask_to_settle();
        Ok(answer)
    }

    /// For `servers`: the network of this id or name, the default one when absent. Fails with `not_found`.
    pub(crate) fn resolve(connection: &Connection, id_or_name: Option<&str>) -> Result<Network> {
        let wanted = id_or_name.unwrap_or(DEFAULT);
        let found: Option<Network> = records::resolve(connection, wanted)?;
        match found {
            Some(network) if network.state == NetworkState::Deleting => {
                Err(Error::new(Code::NotFound, format!("network {wanted} is being deleted")))
            }
            Some(network) => Ok(network),
            None if id_or_name.is_none() => Err(Error::new(
                Code::NotFound,
                "the network `default` was deleted; name another network, ask for no interface with `nics: []`, or \
                 make a network called default",
            )),
            None => Err(Error::not_found("network", wanted)),
        }
    }

    /// For `servers`: the hardware address for which this network has made something beforehand, if it can be had. For one that is to
    /// be plugged in at once: until it is, nobody else is promised any.
    pub(crate) fn promise(&self, tx: &Tx<'_>, network: NetworkId) -> Option<Mac> {
        let mac = self.inner.plumbing.promise(network)?;
        let inner = self.inner.clone();
        tx.unless_kept(move || inner.plumbing.take_back(network, mac));
        Some(mac)
    }

    /// For `servers`: a hardware address that no interface has, for one of a server that is being made: what it was promised, if it was.
    pub(crate) fn free_mac(
        tx: &Tx<'_>,
        promised: Option<Mac>,
        (server, index): (ServerId, u8),
    ) -> Result<Mac> {
        addresses::free_mac(tx, promised, server, index)
    }

    /// For `servers`: fails with `host_unprepared`, saying what to do, while a network is degraded.
    pub(crate) fn check_ready(&self, id: NetworkId) -> Result<()> {
        match lock(&self.inner.troubles).get(&id) {
            Some(trouble) => {
                Err(Error::new(Code::HostUnprepared, format!("network {id} does not work: {trouble}")))
            }
            None => Ok(()),
        }
    }

    /// What is wrong with networks, by network.
    pub(crate) fn troubles(&self) -> BTreeMap<NetworkId, String> {
        lock(&self.inner.troubles).clone()
    }

    /// For `servers`: reserves an address in the caller's transaction. Fails with `no_address`, or `invalid` with
    /// pointer `/nics/{index}/ipv4`.
    pub(crate) fn reserve(tx: &Tx<'_>, network: NetworkId, wanted: Reservation<'_>) -> Result<Ipv4Addr> {
        addresses::reserve(tx, network, wanted)
    }

    /// For `servers`: the DNS name of a server's addresses changes.
    pub(crate) fn rename(tx: &Tx<'_>, server: ServerId, name: &Name) -> Result<()> {
        addresses::rename(tx, server, name)
    }

    /// For `servers`: gives all addresses of a server back. Repeatable.
    pub(crate) fn release(tx: &Tx<'_>, server: ServerId) -> Result<()> {
        addresses::release(tx, server)
    }

    /// For `servers`: after a transaction that reserved, renamed or released: DHCP and DNS follow in their time.
    pub(crate) fn wake(&self) {
        self.inner.changed.notify_one();
    }

    /// For `servers`: how an interface on this network is configured.
    pub(crate) fn lease(connection: &Connection, network: NetworkId) -> Result<Lease> {
        let network: Network = records::one(connection, network.0)?;
        Ok(Lease {
            prefix: addresses::range(&network)?.prefix(),
            gateway: network.ipv4_gateway,
            mtu: network.mtu,
            routed: network.kind == NetworkKind::Nat,
        })
    }

    /// For `servers`: makes the tap with its rules and opens it, and answers it with the network's largest packet. Repeatable: a tap that
    /// is left over is replaced. Fails with `host_unprepared` without privilege or tools.
    pub(crate) async fn plug(&self, server: ServerId, nic: &ServerNic) -> Result<(u16, OwnedFd)> {
        let _working = self.inner.working.read().await;
        let (id, mac) = (nic.network_id, nic.mac.clone());
        let look = move |connection: &Connection| {
            let network: Network = records::one(connection, id.0)?;
            Ok((segment(&network)?, addresses::of_interface(connection, id, &mac)?))
        };
        let (segment, port) = self.inner.core.store.glance(look).await?;
        let Some(port) = port else {
            let detail = format!("interface {} of server {server} has no address", nic.index);
            return Err(Error::new(Code::Internal, detail));
        };
        let mtu = segment.mtu;
        Ok((mtu, self.inner.plumbing.plug(segment, port).await.map_err(refused)?))
    }

    /// For `servers`: a server like this one is likely to be started next.
    pub(crate) async fn expect(&self, nics: &[ServerNic]) -> Result<()> {
        let _working = self.inner.working.read().await;
        for nic in nics {
            let id = nic.network_id;
            let look = move |connection: &Connection| segment(&records::one(connection, id.0)?);
            let segment = self.inner.core.store.glance(look).await?;
            self.inner.plumbing.expect(segment).await;
        }
        Ok(())
    }

    /// For `servers`: DHCP and DNS know the interface when this returns: before its machine runs, and so before anybody asks.
    /// Repeatable.
    pub(crate) async fn introduce(&self, nic: &ServerNic) -> Result<()> {
        let _working = self.inner.working.read().await;
        self.inner.introduce(nic.network_id, nic.mac.clone()).await?;
        self.inner.core.checkpoint("network.served")
    }

    /// For `servers`: removes tap and rules when the machine has ended. Repeatable.
    pub(crate) async fn unplug(&self, server: ServerId, nics: &[ServerNic]) -> Result<()> {
        let ports = nics.iter().map(|nic| {
            let mac =
                nic.mac.parse().map_err(|cause| Error::internal("a hardware address is not one", cause))?;
            // The name plays no part in what is removed; every server's id is a name.
            let name =
                server.to_string().parse().map_err(|cause| Error::internal("an id is not a name", cause))?;
            Ok(Port { network: nic.network_id, mac, ipv4: nic.ipv4, name })
        });
        let ports: Vec<Port> = ports.collect::<Result<_>>()?;
        if ports.is_empty() {
            return Ok(());
        }
        let _working = self.inner.working.read().await;
        self.inner.plumbing.unplug(ports).await.map_err(refused)
    }
}

impl Inner {
    fn ask_to_settle(&self) {
        self.settle_asked.store(true, Ordering::SeqCst);
        self.changed.notify_one();
    }

    /// Follows the records until the daemon ends: everything when asked and once in a while, so that rules that
    /// somebody flushed and a DHCP server that died come back; DHCP and DNS alone after each [`Networks::wake`].
    async fn work(&self) {
        let mut due = Instant::now() + self.pause();
        let mut gather = limits::SERVE_AFTER;
        loop {
            // However often it is woken, the time for everything comes.
            let _ = tokio::time::timeout_at(due, self.changed.notified()).await;
            let everything = self.settle_asked.swap(false, Ordering::SeqCst) || Instant::now() >= due;
            if !everything {
                tokio::time::sleep(gather).await;
            }
            let begun = Instant::now();
            let outcome = if everything { self.settle().await } else { self.serve_all().await };
            if !everything {
                let parts = begun.elapsed() * limits::SERVE_PARTS;
                gather = parts.clamp(limits::SERVE_AFTER, limits::SERVE_AFTER_MAX);
            }
            match outcome {
                Ok(()) if everything => due = Instant::now() + self.pause(),
                Ok(()) => {}
                Err(_) if self.core.store.is_dead() => return,
                Err(cause) => {
                    tracing::warn!("networks do not follow their records yet: {}", cause.chain());
                    due = Instant::now() + limits::SETTLE_AGAIN;
                }
            }
        }
    }

    /// How long until everything is looked at again.
    fn pause(&self) -> Duration {
        if lock(&self.troubles).is_empty() { limits::SETTLE_EVERY } else { limits::SETTLE_AGAIN }
    }

    /// Makes the host be as the records say, then the records say how the host is.
    async fn settle(&self) -> Result<()> {
        let _working = self.working.write().await;
        let (wanted, doomed) = self.core.store.read(read_wanted).await?;
        let troubles = self.plumbing.ensure(wanted).await;
        self.core.checkpoint("network.settled")?;
        // Before the record, which ends operations: whoever waited for one finds its network ready.
        *lock(&self.troubles) = troubles.clone();
        let failed = self.core.store.write(move |tx| record_states(tx, &troubles)).await?;
        for segment in doomed.into_iter().chain(failed) {
            let id = segment.id;
            self.plumbing.remove(segment).await.map_err(refused)?;
            self.core.checkpoint("network.removed")?;
            self.core.store.write(move |tx| forget(tx, id)).await?;
            lock(&self.troubles).remove(&id);
        }
        Ok(())
    }

    /// DHCP and DNS of one network know this interface as it was recorded last when this returns.
    async fn introduce(&self, id: NetworkId, mac: String) -> Result<()> {
        let _serving = self.serving.lock().await;
        let look = move |connection: &Connection| {
            let network: Network = records::one(connection, id.0)?;
            Ok((segment(&network)?, addresses::of_interface(connection, id, &mac)?))
        };
        let (of, port) = self.core.store.glance(look).await?;
        if let Some(port) = port
            && self.plumbing.introduce(of, port).await.map_err(refused)?
        {
            return Ok(());
        }
        let look = move |connection: &Connection| {
            let network: Network = records::one(connection, id.0)?;
            Ok((segment(&network)?, addresses::of_network(connection, id)?))
        };
        let (segment, ports) = self.core.store.read(look).await?;
        self.plumbing.serve(segment, ports).await.map_err(refused)
    }

    async fn serve_all(&self) -> Result<()> {
        let _working = self.working.read().await;
        let _serving = self.serving.lock().await;
        let (wanted, _) = self.core.store.read(read_wanted).await?;
        let mut ports: BTreeMap<NetworkId, Vec<Port>> = BTreeMap::new();
        for port in wanted.ports {
            ports.entry(port.network).or_default().push(port);
        }
        for segment in wanted.segments {
            let id = segment.id;
            if lock(&self.troubles).contains_key(&id) {
                continue;
            }
            if let Err(trouble) = self.plumbing.serve(segment, ports.remove(&id).unwrap_or_default()).await {
                tracing::warn!(network = %id, "{trouble}");
                self.ask_to_settle();
            }
        }
        self.core.checkpoint("network.served")
    }
}

/// What making it would do, for people.
fn steps(network: &Network) -> Vec<String> {
    let reach = match network.kind {
        NetworkKind::Nat => "let its servers out through the host's address",
        NetworkKind::Isolated => {
            "keep its servers from everything but each other and the host's DHCP and DNS"
        }
    };
    let device = network.host_device.as_ref().map(|device| {
        format!(
            "put {device} on the bridge, behind which the network goes on, and keep the host itself from it"
        )
    });
    let bridge = format!("make the bridge {} with the address {}", network.bridge, network.ipv4_gateway);
    let serve =
        format!("serve DHCP and DNS to {} addresses of {}", network.addresses_total, network.ipv4_cidr);
    std::iter::once(bridge).chain(device).chain([reach.to_owned(), serve]).collect()
}

fn refused(trouble: PlumbingError) -> Error {
    match trouble {
        PlumbingError::Unprepared(detail) => Error::new(Code::HostUnprepared, detail),
        PlumbingError::Failed(detail) => Error::new(Code::Internal, detail),
    }
}

/// A panic elsewhere leaves these maps whole: each change is one insert or remove.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
