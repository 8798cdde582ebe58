//! Networks through their facade, on a fake host.
use std::net::Ipv4Addr;
use std::sync::Arc;

use model::network::{CreateNetwork, Network, NetworkKind, NetworkState, PatchNetwork};
use model::operation::OperationState;
use model::page::ListQuery;
use model::server::ServerNic;
use model::{Code, Labels, NetworkId, ServerId};

use crate::Call;
use crate::error::Result;
use crate::network::addresses::Reservation;
use crate::network::cidr::Cidr;
use crate::network::limits;
use crate::network::testing::FakePlumbing;
use crate::network::{Networks, PlumbingError};
use crate::volumes::testing::{Place, ended};

struct Stage {
    place: Place,
    plumbing: Arc<FakePlumbing>,
}

impl Stage {
    fn new() -> Stage {
        Stage { place: Place::new(), plumbing: Arc::new(FakePlumbing::new()) }
    }

    async fn open(&self) -> Networks {
        let networks = Networks::new(self.place.open().await, self.plumbing.clone());
        networks.recover().await.unwrap();
        networks
    }
}

fn spec(name: &str, ipv4_cidr: Option<&str>) -> CreateNetwork {
    CreateNetwork {
        name: name.parse().unwrap(),
        kind: NetworkKind::Nat,
        ipv4_cidr: ipv4_cidr.map(str::to_owned),
        host_device: None,
        labels: Labels::default(),
    }
}

async fn all(networks: &Networks) -> Vec<Network> {
    networks.list(ListQuery::default()).await.unwrap().items
}

async fn created(networks: &Networks, spec: CreateNetwork) -> Network {
    let answer = networks.create(&Call::by_host(), spec).await.unwrap().body;
    let operation = ended(&networks.inner.core, answer.operation.id).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{:?}", operation.error);
    networks.one(answer.resource.unwrap().id).await.unwrap()
}

/// Reserves an address as `servers` does, and answers the interface.
async fn reserve(
    networks: &Networks,
    network: NetworkId,
    server: ServerId,
    asked: Option<Ipv4Addr>,
) -> Result<ServerNic> {
    let of = networks.clone();
    let reserve = move |tx: &crate::store::Tx<'_>| {
        let mac = Networks::free_mac(tx, of.promise(tx, network), (server, 0))?.to_string();
        let name = "web1".parse().unwrap();
        let wanted = Reservation { server, name: &name, index: 0, mac: &mac, ipv4: asked };
        let ipv4 = Networks::reserve(tx, network, wanted)?;
        Ok(ServerNic { network_id: network, index: 0, mac, ipv4, limits: Default::default() })
    };
    let nic = networks.inner.core.store.write(reserve).await?;
    networks.wake();
    Ok(nic)
}

#[tokio::test]
async fn the_first_start_makes_a_default_network_and_only_the_first() {
    let stage = Stage::new();
    let routed: [Cidr; 2] = ["10.77.0.0/16".parse().unwrap(), "10.78.0.0/25".parse().unwrap()];
    stage.plumbing.scene().surroundings.ranges.extend(routed);
    stage.plumbing.scene().surroundings.devices.push("toftbr0".to_owned());
    let networks = stage.open().await;
    let default = all(&networks).await.remove(0);
    assert_eq!((default.name.as_str(), default.state), ("default", NetworkState::Ready));
    assert_eq!((default.ipv4_cidr.as_str(), default.bridge.as_str()), ("10.78.1.0/24", "toftbr1"));
    assert_eq!((default.addresses_total, default.addresses_used), (253, 0));
    let answer = networks.delete(&Call::by_host(), default.id).await.unwrap().body;
    assert_eq!(ended(&networks.inner.core, answer.operation.id).await.state, OperationState::Succeeded);
    assert!(stage.plumbing.scene().segments.is_empty());
    networks.close().await;
    let networks = stage.open().await;
    assert!(all(&networks).await.is_empty());
    networks.close().await;
}

#[tokio::test]
async fn a_device_of_the_host_is_of_one_network_and_has_a_devices_name() {
    let stage = Stage::new();
    let networks = stage.open().await;
    let with =
        |name: &str, device: &str| CreateNetwork { host_device: Some(device.to_owned()), ..spec(name, None) };
    stage.plumbing.scene().surroundings.devices.push("bond0.100".to_owned());
    let lan = created(&networks, with("lan", "bond0.100")).await;
    assert_eq!(lan.host_device.as_deref(), Some("bond0.100"));
    assert_eq!(stage.plumbing.scene().segments[&lan.id].host_device, lan.host_device);
    let refused = async |device: &str| {
        let error = networks.create(&Call::by_host(), with("other", device)).await.unwrap_err();
        (error.code, error.errors[0].pointer.clone(), error.errors[0].code.clone())
    };
    let said = |code: &str| (Code::Invalid, "/host_device".to_owned(), code.to_owned());
    assert_eq!(refused("bond0.100").await, said("in_use"));
    assert_eq!(refused("bond0.10").await, said("not_found"));
    for device in
        ["", "eth*", "eth 1", "eth1\"", "a/b", ".", "..", "toftbr0", "tofttap000001", "sixteen-letters-"]
    {
        assert_eq!(refused(device).await, said("invalid"), "{device}");
    }
    networks.close().await;
}

#[tokio::test]
async fn without_privileges_the_default_network_is_degraded_and_says_why_until_it_works() {
    let stage = Stage::new();
    let trouble = PlumbingError::Unprepared("run toftd as root".to_owned());
    stage.plumbing.scene().trouble = Some(trouble);
    let networks = stage.open().await;
    let default = all(&networks).await.remove(0);
    assert_eq!(default.state, NetworkState::Degraded);
    assert_eq!(default.state_detail.as_deref(), Some("run toftd as root"));
    let refused = networks.check_ready(default.id).unwrap_err();
    assert_eq!(refused.code, Code::HostUnprepared);
    assert!(refused.detail.contains("run toftd as root"));
    // A network that somebody asks for is made or not; it is not left half made.
    let answer = networks.create(&Call::by_host(), spec("second", None)).await.unwrap().body;
    stage.plumbing.scene().trouble = Some(PlumbingError::Unprepared("still not root".to_owned()));
    let operation = ended(&networks.inner.core, answer.operation.id).await;
    assert_eq!(operation.error.unwrap().code, Code::HostUnprepared);
    stage.plumbing.scene().trouble = None;
    networks.close().await;
    let networks = stage.open().await;
    let left = all(&networks).await;
    assert_eq!(left.len(), 1);
    assert_eq!((left[0].state, left[0].state_detail.as_deref()), (NetworkState::Ready, None));
    networks.check_ready(left[0].id).unwrap();
    networks.close().await;
}

#[tokio::test]
async fn a_degraded_network_is_tried_again_soon_however_busy_the_host_is() {
    let stage = Stage::new();
    stage.plumbing.scene().trouble = Some(PlumbingError::Failed("not now".to_owned()));
    let networks = stage.open().await;
    stage.plumbing.scene().trouble = None;
    let id = all(&networks).await.remove(0).id;
    let begun = tokio::time::Instant::now();
    while networks.check_ready(id).is_err() {
        assert!(begun.elapsed() < limits::SETTLE_AGAIN * 2, "it stays degraded");
        tokio::time::sleep(limits::SETTLE_AGAIN / 8).await;
        networks.wake();
    }
    networks.close().await;
}

#[tokio::test]
async fn ranges_that_overlap_or_are_not_private_are_refused() {
    let stage = Stage::new();
    stage.plumbing.scene().surroundings.ranges.push("192.168.1.0/24".parse().unwrap());
    let networks = stage.open().await;
    for (range, told) in [
        ("10.77.0.0/25", "overlaps network default"),
        ("10.77.0.0/16", "overlaps network default"),
        ("192.168.0.0/16", "overlaps 192.168.1.0/24"),
        ("8.8.8.0/24", "not inside"),
        ("10.9.9.9/24", "write 10.9.9.0/24"),
    ] {
        let refused = networks.create(&Call::by_host(), spec("second", Some(range))).await.unwrap_err();
        assert_eq!(
            (refused.code, refused.errors[0].pointer.as_str()),
            (Code::Invalid, "/ipv4_cidr"),
            "{range}"
        );
        assert!(refused.detail.contains(told), "{range}: {}", refused.detail);
    }
    let taken = networks.create(&Call::by_host(), spec("default", None)).await.unwrap_err();
    assert_eq!(taken.code, Code::AlreadyExists);
    let second = created(&networks, spec("second", None)).await;
    assert_eq!((second.ipv4_cidr.as_str(), second.bridge.as_str()), ("10.77.1.0/24", "toftbr1"));
    networks.close().await;
}

#[tokio::test]
async fn addresses_are_given_once_kept_and_given_back() {
    let stage = Stage::new();
    let networks = stage.open().await;
    let small = created(&networks, spec("small", Some("10.5.0.0/29"))).await;
    let address = |last| Ipv4Addr::new(10, 5, 0, last);
    let first = ServerId::new();
    assert_eq!(reserve(&networks, small.id, first, None).await.unwrap().ipv4, address(2));
    let brief = ServerId::new();
    assert_eq!(reserve(&networks, small.id, brief, None).await.unwrap().ipv4, address(3));
    networks.inner.core.store.write(move |tx| Networks::release(tx, brief)).await.unwrap();
    assert_eq!(
        reserve(&networks, small.id, ServerId::new(), Some(address(4))).await.unwrap().ipv4,
        address(4)
    );
    for bad in [address(1), address(4), address(7), Ipv4Addr::new(10, 6, 0, 2)] {
        let refused = reserve(&networks, small.id, ServerId::new(), Some(bad)).await.unwrap_err();
        assert_eq!(refused.errors[0].pointer, "/nics/0/ipv4", "{bad}");
    }
    // The one that was given back comes last.
    for expected in [5, 6, 3] {
        assert_eq!(
            reserve(&networks, small.id, ServerId::new(), None).await.unwrap().ipv4,
            address(expected)
        );
    }
    let refused = reserve(&networks, small.id, ServerId::new(), None).await.unwrap_err();
    assert_eq!(refused.code, Code::NoAddress);
    assert_eq!(networks.one(small.id).await.unwrap().addresses_used, 5);
    let in_use = networks.delete(&Call::by_host(), small.id).await.unwrap_err();
    assert_eq!(in_use.code, Code::InUse);
    assert!(in_use.detail.contains("web1"), "{}", in_use.detail);
    for _ in 0..2 {
        networks.inner.core.store.write(move |tx| Networks::release(tx, first)).await.unwrap();
    }
    assert_eq!(networks.one(small.id).await.unwrap().addresses_used, 4);
    assert_eq!(reserve(&networks, small.id, ServerId::new(), None).await.unwrap().ipv4, address(2));
    networks.close().await;
}

#[tokio::test]
async fn an_interface_is_plugged_and_introduced_as_often_as_asked() {
    let stage = Stage::new();
    let networks = stage.open().await;
    let default = all(&networks).await.remove(0);
    let server = ServerId::new();
    let nic = reserve(&networks, default.id, server, None).await.unwrap();
    for _ in 0..2 {
        networks.plug(server, &nic).await.unwrap();
        networks.introduce(&nic).await.unwrap();
    }
    let scene = stage.plumbing.scene().clone();
    assert_eq!(scene.taps.len(), 1);
    assert!(
        scene.served[&default.id].iter().any(|port| port.ipv4 == nic.ipv4 && port.name.as_str() == "web1")
    );
    for _ in 0..2 {
        networks.unplug(server, std::slice::from_ref(&nic)).await.unwrap();
    }
    assert!(stage.plumbing.scene().taps.is_empty());
    let lease = networks.inner.core.store.read(move |c| Networks::lease(c, default.id)).await.unwrap();
    assert_eq!((lease.prefix, lease.gateway, lease.routed), (24, default.ipv4_gateway, true));
    stage.plumbing.scene().trouble = Some(PlumbingError::Unprepared("nft is missing".to_owned()));
    let refused = networks.plug(server, &nic).await.map(drop).unwrap_err();
    assert_eq!((refused.code, refused.detail.as_str()), (Code::HostUnprepared, "nft is missing"));
    networks.close().await;
}

/// One that had it may have taken it to another host.
#[tokio::test]
async fn the_next_interface_of_a_network_has_the_address_that_is_expected_and_no_other_ever_has() {
    let stage = Stage::new();
    let networks = stage.open().await;
    let [default, other] = [all(&networks).await.remove(0), created(&networks, spec("other", None)).await];
    let new = async |network: &Network| reserve(&networks, network.id, ServerId::new(), None).await.unwrap();
    let first = new(&default).await;
    networks.expect(std::slice::from_ref(&first)).await.unwrap();
    let promised = stage.plumbing.scene().expected[&default.id].expect("an address").to_string();
    // Not used up by a plan, nor by what is refused after it.
    let (of, server, store) = (networks.clone(), ServerId::new(), &networks.inner.core.store);
    let plan =
        move |tx: &crate::store::Tx<'_>| Networks::free_mac(tx, of.promise(tx, default.id), (server, 0));
    assert_eq!(store.rehearse(plan.clone()).await.unwrap().to_string(), promised);
    let refused = move |tx: &crate::store::Tx<'_>| {
        plan(tx)?;
        Err::<(), _>(crate::Error::new(Code::NoCapacity, "there is no room"))
    };
    store.write(refused.clone()).await.unwrap_err();
    store.write(move |tx| tx.attempt(|| refused(tx))).await.unwrap().unwrap_err();
    assert_ne!(new(&other).await.mac, promised);
    let next = reserve(&networks, default.id, server, None).await.unwrap();
    assert_eq!(next.mac, promised);
    assert_ne!(new(&default).await.mac, promised);
    networks.inner.core.store.write(move |tx| Networks::release(tx, server)).await.unwrap();
    assert_ne!(new(&default).await.mac, promised);
    networks.close().await;
}

#[tokio::test]
async fn names_and_labels_change_and_dns_follows_a_server() {
    let stage = Stage::new();
    let networks = stage.open().await;
    let default = all(&networks).await.remove(0);
    let server = ServerId::new();
    let nic = reserve(&networks, default.id, server, None).await.unwrap();
    networks
        .inner
        .core
        .store
        .write(move |tx| Networks::rename(tx, server, &"web9".parse().unwrap()))
        .await
        .unwrap();
    networks.introduce(&nic).await.unwrap();
    assert_eq!(stage.plumbing.scene().served[&default.id][0].name.as_str(), "web9");
    let labels = [("tier".to_owned(), Some("front".to_owned()))].into();
    let patch = PatchNetwork { name: Some("main".parse().unwrap()), labels: Some(labels) };
    let patched = networks.patch(&Call::by_host(), default.id, patch).await.unwrap().body;
    assert_eq!((patched.name.as_str(), patched.labels.value("tier")), ("main", Some("front")));
    let missing = networks.inner.core.store.read(|c| Networks::resolve(c, None)).await.unwrap_err();
    assert!(missing.detail.contains("default"), "{}", missing.detail);
    networks.inner.core.store.read(|c| Networks::resolve(c, Some("main"))).await.unwrap();
    networks.close().await;
}

/// A creation and a deletion that a crash cut off are brought to their end by the next life.
#[tokio::test]
async fn a_crash_at_any_point_is_made_good_by_the_next_start() {
    for point in 2..40 {
        let stage = Stage::new();
        let networks = Networks::new(stage.place.open_to_die_at(point).await, stage.plumbing.clone());
        let mut whole = false;
        if networks.recover().await.is_ok()
            && let Ok(answer) = networks.create(&Call::by_host(), spec("second", None)).await
            && settled(&networks).await
            && networks.delete(&Call::by_host(), answer.body.resource.unwrap().id).await.is_ok()
        {
            whole = settled(&networks).await;
        }
        networks.close().await;
        let networks = stage.open().await;
        let unfinished = networks.inner.core.store.read(crate::operations::unfinished).await.unwrap();
        assert!(unfinished.is_empty(), "point {point}: {unfinished:?}");
        let names: Vec<String> =
            all(&networks).await.iter().map(|network| network.name.to_string()).collect();
        assert!(names[0] == "default" && names.len() <= 2, "point {point}: {names:?}");
        assert!(
            all(&networks).await.iter().all(|network| network.state == NetworkState::Ready),
            "point {point}"
        );
        assert_eq!(stage.plumbing.scene().segments.len(), names.len(), "point {point}");
        networks.close().await;
        if whole {
            assert!(point > 6, "a life has more points than that");
            return;
        }
    }
    panic!("no life was long enough");
}

/// Waits until nothing is unfinished; false when this life has ended.
async fn settled(networks: &Networks) -> bool {
    let core = &networks.inner.core;
    loop {
        match core.store.read(crate::operations::unfinished).await {
            Err(_) => return false,
            Ok(unfinished) => match unfinished.first() {
                None => return true,
                Some(operation) => {
                    let mut changed = core.store.signals().operation(operation.id);
                    let _ =
                        tokio::time::timeout(std::time::Duration::from_millis(50), changed.changed()).await;
                }
            },
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_whose_operation_has_ended_is_there_however_many_are_made_at_once() {
    let stage = Stage::new();
    let networks = stage.open().await;
    let made = (0..8).map(|number| {
        let (networks, plumbing) = (networks.clone(), stage.plumbing.clone());
        tokio::spawn(async move {
            let network = created(&networks, spec(&format!("net{number}"), None)).await;
            networks.check_ready(network.id).unwrap();
            assert!(plumbing.scene().segments.contains_key(&network.id), "{network:?}");
        })
    });
    for network in made.collect::<Vec<_>>() {
        network.await.unwrap();
    }
    networks.close().await;
}
