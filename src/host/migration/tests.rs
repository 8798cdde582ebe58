//! Two hosts in one process, each with a state directory of its own, over loopback.
use model::cpu::ComputeCpuBaseline;
use model::migration::{
    CreateMigrationTicket, MigrateServer, MigrationMode, MigrationPlan, MigrationTicket, ObstacleCode,
};
use model::network::{CreateNetwork, NetworkKind};
use model::server::{CpuTemplate, CreateServer, PatchServer, ServerAction, StopServer};
use model::{Code, Labels, ServerId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::Host;
use crate::stage::{self, SOON, Stage};

mod crowds;
mod cuts;
mod lineage;
mod live;
mod modes;
mod moves;
mod overlays;
mod paused;
mod progress;

/// A source with the server `web1`, and a target that waits.
struct Pair {
    source: Host,
    target: Host,
    server: ServerId,
    address: SocketAddr,
    _stages: [Stage; 2],
}

impl Pair {
    async fn new(target: Stage) -> Pair {
        let stages = [Stage::new(), target];
        let source = stages[0].open_with_image().await;
        let target = stages[1].open().await;
        let server = stage::created(&source, stage::server("web1")).await.id;
        let address = target.migrations().listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        Pair { source, target, server, address, _stages: stages }
    }

    async fn ticket(&self) -> MigrationTicket {
        ticket(&self.target, None).await.unwrap()
    }

    async fn plan(&self, ticket: &str) -> Result<MigrationPlan> {
        let spec = MigrateServer { mode: MigrationMode::Cold, ..spec(self.address, ticket.to_owned()) };
        self.source.migrations().plan(self.server, spec).await
    }

    async fn obstacles(&self) -> Vec<ObstacleCode> {
        let ticket = self.ticket().await.ticket;
        self.plan(&ticket).await.unwrap().blocked_by.iter().map(|obstacle| obstacle.code).collect()
    }

    async fn close(self) {
        self.source.close().await;
        self.target.close().await;
    }
}

fn spec(target: SocketAddr, ticket: String) -> MigrateServer {
    MigrateServer {
        target,
        ticket,
        mode: MigrationMode::Auto,
        bandwidth_bytes_per_s: None,
        downtime_ms: None,
    }
}

async fn ticket(host: &Host, lifetime_s: Option<u64>) -> Result<MigrationTicket> {
    let made = host.migrations().ticket(&Call::by_host(), CreateMigrationTicket { lifetime_s }).await?;
    Ok(made.body)
}

#[tokio::test]
async fn a_target_that_lacks_nothing_leaves_only_that_the_server_runs() {
    let pair = Pair::new(Stage::new()).await;
    stage::import(&pair.target).await;
    let ticket = pair.ticket().await;
    assert_eq!(ticket.target, pair.address);
    assert!(ticket.ticket.starts_with(&ticket.fingerprint));
    let plan = pair.plan(&ticket.ticket).await.unwrap();
    assert_eq!(plan.memory_bytes, 128 << 20);
    assert_eq!(plan.target_version, env!("CARGO_PKG_VERSION"));
    let codes: Vec<ObstacleCode> = plan.blocked_by.iter().map(|obstacle| obstacle.code).collect();
    assert_eq!(codes, [ObstacleCode::State], "{plan:?}");
    let spec = MigrateServer { mode: MigrationMode::Cold, ..spec(pair.address, ticket.ticket) };
    let refused = pair.source.migrations().migrate(&Call::by_host(), pair.server, spec).await.unwrap_err();
    assert_eq!(refused.code, Code::MigrationBlocked);
    let named: Vec<&str> = refused.errors.iter().map(|error| error.code.as_str()).collect();
    assert_eq!(named, ["state"]);
    pair.close().await;
}

#[tokio::test]
async fn everything_that_is_in_the_way_is_told_at_once() {
    let mut small = Stage::new();
    small.memory_bytes = 64 << 20;
    small.launch.set_trouble(Some(Error::new(Code::KvmUnavailable, "no KVM here")));
    let pair = Pair::new(small).await;
    assert_eq!(
        pair.obstacles().await,
        [ObstacleCode::Kvm, ObstacleCode::Memory, ObstacleCode::Image, ObstacleCode::State]
    );
    pair.close().await;
}

#[tokio::test]
async fn a_clock_that_runs_faster_there_is_in_the_way() {
    for (there_khz, more) in [(3_000_000, &[ObstacleCode::Tsc][..]), (2_000_000, &[])] {
        let target = Stage::new();
        target.launch.ticks_at(there_khz);
        let pair = Pair::new(target).await;
        pair._stages[0].launch.ticks_at(2_000_100);
        stage::import(&pair.target).await;
        assert_eq!(pair.obstacles().await, [more, &[ObstacleCode::State]].concat());
        pair.close().await;
    }
}

#[tokio::test]
async fn a_feature_that_is_missing_there_is_in_the_way_unless_the_guest_was_not_shown_it() {
    let target = Stage::new();
    target.launch.shows(&["avx"]);
    let pair = Pair::new(target).await;
    pair._stages[0].launch.shows(&["aes", "avx"]);
    stage::import(&pair.target).await;
    assert_eq!(pair.obstacles().await, [ObstacleCode::CpuFeatures, ObstacleCode::State]);

    let hosts =
        vec![pair.source.processor().shown().await.unwrap(), pair.target.processor().shown().await.unwrap()];
    let asked = ComputeCpuBaseline { hosts };
    let made = pair.source.cpu_baseline(&Call::by_host(), asked).await.unwrap().body;
    let hidden: Vec<_> = made.hidden.iter().map(|host| host.features.iter().collect::<Vec<_>>()).collect();
    assert_eq!(hidden, [vec!["aes"], vec![]]);
    let spec = CreateServer { cpu: made.cpu.clone(), ..stage::server("web2") };
    let shown = stage::created(&pair.source, spec).await;
    assert_eq!(shown.cpu, made.cpu);
    let pair = Pair { server: shown.id, ..pair };
    assert_eq!(pair.obstacles().await, [ObstacleCode::State]);

    let patch = PatchServer { cpu: Some(CpuTemplate::Host), ..PatchServer::default() };
    pair.source.servers().patch(&Call::by_host(), shown.id, patch).await.unwrap();
    assert_eq!(pair.obstacles().await, [ObstacleCode::State], "its next machine is another one, not this");
    pair.close().await;
}

#[tokio::test]
async fn features_that_a_host_cannot_show_are_refused_before_anything_is_made() {
    let stage = Stage::new();
    stage.launch.shows(&["avx"]);
    let host = stage.open_with_image().await;
    let listed = |names: &[&str]| CpuTemplate::Features(names.iter().copied().map(str::to_owned).collect());
    let asked = |cpu| CreateServer { cpu, ..stage::server("web1") };
    for (cpu, code) in [
        (listed(&["aes", "avx"]), "not_available"),
        (listed(&[]), "not_valid"),
        (listed(&["A"]), "not_valid"),
    ] {
        let refused = host.servers().create(&Call::by_host(), asked(cpu.clone())).await.unwrap_err();
        assert_eq!(refused.errors[0].pointer, "/cpu/features");
        assert_eq!(refused.errors[0].code, code, "{}", refused.detail);
        assert!(host.servers().plan(&Call::by_host(), asked(cpu)).await.is_err());
    }
    let made = stage::created(&host, asked(listed(&["avx", "lm"]))).await;
    let patch = PatchServer { cpu: Some(listed(&["aes"])), ..PatchServer::default() };
    let refused = host.servers().patch(&Call::by_host(), made.id, patch).await.unwrap_err();
    assert!(refused.errors[0].detail.contains("cannot show aes;"), "{}", refused.errors[0].detail);
    host.close().await;
}

#[tokio::test]
async fn every_address_is_none_to_move_to() {
    let pair = Pair::new(Stage::new()).await;
    for address in ["0.0.0.0:8687", "[::]:8687"] {
        let spec = spec(address.parse().unwrap(), pair.ticket().await.ticket);
        let refused = pair.source.migrations().plan(pair.server, spec).await.unwrap_err();
        assert_eq!((refused.code, refused.errors[0].pointer.as_str()), (Code::Invalid, "/target"));
    }
    pair.close().await;
}

#[tokio::test]
async fn a_name_an_address_or_a_network_that_is_taken_is_in_the_way() {
    let pair = Pair::new(Stage::new()).await;
    stage::import(&pair.target).await;
    let twin = stage::created(&pair.target, stage::server("web1")).await;
    assert_eq!(twin.nics[0].ipv4, pair.source.servers().one(pair.server).await.unwrap().nics[0].ipv4);
    assert_eq!(pair.obstacles().await, [ObstacleCode::Name, ObstacleCode::Network, ObstacleCode::State]);
    pair.close().await;
}

#[tokio::test]
async fn a_network_that_is_missing_or_of_another_range_is_in_the_way() {
    let pair = Pair::new(Stage::new()).await;
    stage::import(&pair.target).await;
    let network = |range: &str| CreateNetwork {
        host_device: None,
        name: "lan".parse().unwrap(),
        kind: NetworkKind::Isolated,
        ipv4_cidr: Some(range.to_owned()),
        labels: Labels::default(),
    };
    let made = pair.source.networks().create(&Call::by_host(), network("10.91.0.0/24")).await.unwrap();
    stage::succeeded(&pair.source, made.body.operation.id).await;
    let mut spec = stage::server("web2");
    spec.start = false;
    spec.nics = Some(vec![serde_json::from_value(serde_json::json!({ "network": "lan" })).unwrap()]);
    let server = stage::created(&pair.source, spec).await.id;
    let details = async || {
        let spec = self::spec(pair.address, pair.ticket().await.ticket);
        let plan = pair.source.migrations().plan(server, spec).await.unwrap();
        let found = plan.blocked_by.into_iter().filter(|found| found.code == ObstacleCode::Network);
        found.map(|found| found.detail).collect::<Vec<_>>()
    };
    assert!(details().await[0].contains("no network lan"));
    let made = pair.target.networks().create(&Call::by_host(), network("10.92.0.0/24")).await.unwrap();
    stage::succeeded(&pair.target, made.body.operation.id).await;
    assert!(details().await[0].contains("10.92.0.0/24 at the target and 10.91.0.0/24 at the source"));
    pair.close().await;
}

#[tokio::test]
async fn a_disk_that_the_target_has_no_room_for_is_in_the_way() {
    let pair = Pair::new(Stage::new()).await;
    stage::import(&pair.target).await;
    let (id, dirs) = (pair.server, pair.source.migrations().core.dirs.clone());
    let look = move |connection: &rusqlite::Connection| {
        source::offer(connection, &dirs, id, crate::cpu::Known::default())
    };
    let offer = pair.source.store().read(look).await.unwrap();
    // More than any disk has, in what comes now, in what the guest may write later, and in the two disks together.
    let huge = 1_u64 << 62;
    let written = |offer: &mut wire::peer::Offer| offer.disks[0].written_bytes = huge;
    let saved = |offer: &mut wire::peer::Offer| offer.saved_bytes = huge;
    let size = |offer: &mut wire::peer::Offer| offer.disks[0].size_bytes = huge;
    let both = |offer: &mut wire::peer::Offer| {
        offer.disks[0].size_bytes = u64::MAX;
        let second = wire::peer::OfferedDisk { volume: "data".to_owned(), ..offer.disks[0].clone() };
        offer.disks.push(second);
    };
    type Change<'a> = &'a dyn Fn(&mut wire::peer::Offer);
    let changes: [(Change<'_>, _); 5] = [
        (&|_| (), None),
        (&written, Some("are free")),
        (&saved, Some("are free")),
        (&size, Some("in all")),
        (&both, Some("in all")),
    ];
    for (number, (change, said)) in changes.into_iter().enumerate() {
        let mut offer = offer.clone();
        change(&mut offer);
        let made = pair.ticket().await.ticket.parse().unwrap();
        let (identity, mode) = (&pair.source.migrations().identity, MigrationMode::Auto);
        let plan = source::ask(identity, pair.address, made, offer, mode).await.unwrap();
        let found = plan.blocked_by.iter().map(|obstacle| obstacle.code).collect::<Vec<_>>();
        assert_eq!(found, said.map_or(vec![], |_| vec![ObstacleCode::Storage]), "{number}: {plan:?}");
        let detail = plan.blocked_by.first().map_or("", |obstacle| &obstacle.detail);
        assert!(detail.contains(said.unwrap_or_default()), "{number}: {detail}");
    }
    pair.close().await;
}

/// The tap of a server that runs here may have the name that it would have.
#[tokio::test]
async fn a_hardware_address_that_no_host_gives_is_taken_from_none() {
    let pair = Pair::new(Stage::new()).await;
    stage::import(&pair.target).await;
    let (id, dirs) = (pair.server, pair.source.migrations().core.dirs.clone());
    let look = move |connection: &rusqlite::Connection| {
        let offer = source::offer(connection, &dirs, id, crate::cpu::Known::default())?;
        let record = crate::store::records::one(connection, id.0)?;
        Ok((offer, crate::servers::moving::parcel::Packed::of(connection, record)?))
    };
    let (offer, mut packed) = pair.source.store().read(look).await.unwrap();
    let own = offer.nics[0].mac.clone();
    let alike = format!("02:11:22{}", &own[8..]);
    for (mac, is_taken) in [(&own, true), (&alike, false), (&"52:54:00:AB:CD:EF".to_owned(), false)] {
        packed.nics[0].mac.clone_from(mac);
        assert_eq!(packed.check().is_ok(), is_taken, "{mac}");
        let mut offer = offer.clone();
        offer.nics[0].mac.clone_from(mac);
        let found = target::judge(pair.target.migrations(), offer).await.unwrap();
        let kinds: Vec<_> = found.iter().map(|obstacle| obstacle.kind).collect();
        assert_eq!(
            kinds,
            if is_taken { vec![] } else { vec![wire::peer::ObstacleKind::Network] },
            "{found:?}"
        );
    }
    pair.close().await;
}

/// A host that has nothing against a server and runs this version. Answers where it waits; it has the target's certificate.
async fn host_of_version(pair: &Pair, program: &'static str) -> SocketAddr {
    use wire::peer::Message;
    let acceptor = TlsAcceptor::from(Arc::new(pair.target.migrations().identity.as_target().unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut link = link::Link::new(acceptor.accept(stream).await.unwrap());
            while let Ok(message) = link.message(SOON).await {
                let answer = match message {
                    Message::Greet { .. } => {
                        let (host, program) = ("other".to_owned(), program.to_owned());
                        Message::Welcome { host, program, may_owe: true }
                    }
                    Message::Ask(_) => Message::Verdict { blocked_by: Vec::new() },
                    other => panic!("{other:?}"),
                };
                link.send(&answer).await.unwrap();
            }
        }
    });
    address
}

#[tokio::test]
async fn memory_goes_to_no_host_of_another_version_and_a_server_that_is_off_does() {
    let pair = Pair::new(Stage::new()).await;
    let same = host_of_version(&pair, env!("CARGO_PKG_VERSION")).await;
    let other = host_of_version(&pair, "0.0.0-other").await;
    let in_the_way = async |target: SocketAddr| {
        let spec = spec(target, pair.ticket().await.ticket);
        pair.source.migrations().plan(pair.server, spec).await.unwrap().blocked_by
    };
    let act = async |action| {
        let asked = pair.source.servers().act(&Call::by_host(), pair.server, action).await.unwrap();
        stage::succeeded(&pair.source, asked.body.operation.id).await;
    };
    for (action, has_memory) in [
        (None, true),
        (Some(ServerAction::Hibernate), true),
        (Some(ServerAction::Stop(StopServer { grace_s: 0 })), false),
    ] {
        let what = format!("{action:?}");
        if let Some(action) = action {
            act(action).await;
        }
        let found = in_the_way(other).await;
        let codes: Vec<ObstacleCode> = found.iter().map(|obstacle| obstacle.code).collect();
        assert_eq!(codes, if has_memory { vec![ObstacleCode::Version] } else { vec![] }, "{what}");
        let names_both = |detail: &str| {
            [env!("CARGO_PKG_VERSION"), "0.0.0-other"].iter().all(|version| detail.contains(version))
        };
        assert!(found.iter().all(|obstacle| names_both(&obstacle.detail)), "{what}: {found:?}");
        assert_eq!(in_the_way(same).await, [], "{what}");
    }
    pair.close().await;
}

#[tokio::test]
async fn a_ticket_belongs_to_the_first_host_that_presents_it() {
    let pair = Pair::new(Stage::new()).await;
    let ticket = pair.ticket().await.ticket;
    pair.plan(&ticket).await.unwrap();
    pair.plan(&ticket).await.unwrap();
    let stage = Stage::new();
    let thief = stage.open_with_image().await;
    let server = stage::created(&thief, stage::server("web9")).await.id;
    let spec = spec(pair.address, ticket);
    let refused = thief.migrations().plan(server, spec).await.unwrap_err();
    assert_eq!((refused.code, refused.errors[0].code.as_str()), (Code::Invalid, "refused"));
    assert!(refused.detail.contains("presented by another host"), "{refused}");
    thief.close().await;
    pair.close().await;
}

#[tokio::test]
async fn a_ticket_of_another_host_or_of_none_or_too_old_is_refused() {
    let pair = Pair::new(Stage::new()).await;
    let good = pair.ticket().await;
    let (_, secret) = good.ticket.split_once('.').unwrap();
    let code = async |ticket: String| {
        let refused = pair.plan(&ticket).await.unwrap_err();
        (refused.code, refused.errors[0].code.clone())
    };
    let other = "0".repeat(64);
    assert_eq!(code(format!("{other}.{secret}")).await, (Code::Invalid, "other_host".to_owned()));
    assert_eq!(code(format!("{}.{other}", good.fingerprint)).await, (Code::Invalid, "refused".to_owned()));
    assert_eq!(code("nonsense".to_owned()).await, (Code::Invalid, "not_valid".to_owned()));
    pair.target
        .store()
        .write(|tx| Ok(tx.execute("UPDATE migration_tickets SET expires_ms = 0", [])?))
        .await
        .unwrap();
    assert_eq!(code(good.ticket).await, (Code::Invalid, "refused".to_owned()));
    pair.close().await;
}

#[tokio::test]
async fn nobody_is_home_where_no_host_waits() {
    let pair = Pair::new(Stage::new()).await;
    let ticket = pair.ticket().await.ticket;
    let stage = Stage::new();
    let silent = stage.open().await;
    assert_eq!(self::ticket(&silent, None).await.unwrap_err().code, Code::HostUnprepared);
    for lifetime_s in [0, limits::TICKET_S_MAX + 1] {
        assert_eq!(self::ticket(&pair.target, Some(lifetime_s)).await.unwrap_err().code, Code::Invalid);
    }
    silent.close().await;
    pair.target.migrations().close().await;
    assert_eq!(pair.plan(&ticket).await.unwrap_err().code, Code::HostUnreachable);
    pair.close().await;
}

#[tokio::test]
async fn a_host_is_the_same_after_it_was_opened_again() {
    let stage = Stage::new();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let host = stage.open().await;
        host.migrations().listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        seen.push(ticket(&host, None).await.unwrap().fingerprint);
        host.close().await;
    }
    assert_eq!(seen[0], seen[1]);
    let other = Stage::new();
    let host = other.open().await;
    host.migrations().listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    assert_ne!(ticket(&host, None).await.unwrap().fingerprint, seen[0]);
    host.close().await;
}

#[tokio::test]
async fn a_caller_without_a_certificate_or_with_nonsense_is_cut_off_and_others_are_served() {
    let pair = Pair::new(Stage::new()).await;
    let mut plain = TcpStream::connect(pair.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    // An alert at most, then the end.
    let read = tokio::time::timeout(SOON, plain.read_to_end(&mut rest)).await.expect("it is cut off");
    assert!(read.is_err() || rest.len() < 64);

    let fingerprint = pair.target.migrations().identity.fingerprint();
    let nameless =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
    let mut config = pair.source.migrations().identity.to(fingerprint).unwrap();
    config.client_auth_cert_resolver = nameless.client_auth_cert_resolver;
    let stream = TcpStream::connect(pair.address).await.unwrap();
    let name = rustls::pki_types::ServerName::IpAddress(pair.address.ip().into());
    let connected = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    // With TLS 1.3 the client learns of it when it reads.
    let served = match connected {
        Err(_) => false,
        Ok(stream) => link::Link::new(stream).receive().await.is_ok(),
    };
    assert!(!served, "a host that shows no certificate was served");

    let mut stranger = greeted(&pair).await;
    stranger.send(&wire::peer::Message::Refuse { detail: "hello".to_owned() }).await.unwrap();
    assert!(matches!(stranger.message(SOON).await, Ok(wire::peer::Message::Refuse { .. })));
    assert!(pair.plan(&pair.ticket().await.ticket).await.is_ok());
    pair.close().await;
}

/// A connection of the source on which nothing was said.
async fn greeted(pair: &Pair) -> link::Link<tokio_rustls::client::TlsStream<TcpStream>> {
    let fingerprint = pair.target.migrations().identity.fingerprint();
    let config = pair.source.migrations().identity.to(fingerprint).unwrap();
    let stream = TcpStream::connect(pair.address).await.unwrap();
    let name = rustls::pki_types::ServerName::IpAddress(pair.address.ip().into());
    link::Link::new(tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap())
}
