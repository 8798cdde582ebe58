//! Limits as they reach the machine, and those of the host.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use model::Code;
use model::server::{CreateNic, CreateServer, NicLimits, PatchServer, Rate};
use wire::machine::{RateLimits, TokenBucket};

use super::{START, stop};
use crate::stage::{SOON, Stage, created, server, succeeded};
use crate::{Call, Checkpoint, Fate};

#[tokio::test]
async fn limits_of_interfaces_are_changed_while_the_machine_runs() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let mut spec = server("web1");
    spec.nics = Some(vec![CreateNic::default(), CreateNic::default()]);
    let id = created(&host, spec).await.id;
    let patch = |limits: serde_json::Value| -> PatchServer {
        serde_json::from_value(serde_json::json!({ "nic_limits": limits })).unwrap()
    };
    let limits = serde_json::json!({ "tx_bytes": { "per_second": 1000 } });
    let wanted = patch(serde_json::json!([{ "index": 1, "limits": limits }]));
    let after = host.servers().patch(&Call::by_host(), id, wanted).await.unwrap().body;
    assert_eq!(after.nics[0].limits, NicLimits::default());
    assert_eq!(after.nics[1].limits.tx_bytes.unwrap().per_second, 1000);
    let live = stage.launch.only().nic_limits();
    assert_eq!(live[&1].1.bandwidth.unwrap().per_second, 1000);
    assert_eq!((live[&1].0.bandwidth, live[&0].1.bandwidth), (None, None));

    let bad = serde_json::json!({ "rx_packets": { "per_second": 0 } });
    let wrong = patch(serde_json::json!([
        { "index": 0, "limits": {} }, { "index": 0, "limits": bad }, { "index": 2, "limits": {} },
    ]));
    let refused = host.servers().patch(&Call::by_host(), id, wrong).await.unwrap_err();
    let pointers: Vec<_> = refused.errors.iter().map(|error| error.pointer.as_str()).collect();
    assert_eq!(
        pointers,
        ["/nic_limits/1/limits/rx_packets/per_second", "/nic_limits/1/index", "/nic_limits/2/index"]
    );
    // An empty set lifts the limits, at once and for the next machine.
    let lifted = patch(serde_json::json!([{ "index": 1, "limits": {} }]));
    let after = host.servers().patch(&Call::by_host(), id, lifted).await.unwrap().body;
    assert_eq!(after.nics[1].limits, NicLimits::default());
    assert_eq!(stage.launch.only().nic_limits()[&1].1.bandwidth, None);
    host.close().await;
}

#[tokio::test]
async fn each_direction_of_an_interface_has_its_own_limits_with_their_bursts() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let spec: CreateServer = serde_json::from_value(serde_json::json!({
        "name": "web1", "image": "tiny", "memory_bytes": 128 << 20,
        "disk_limits": { "bandwidth_bytes": { "per_second": 7, "burst": 70 } },
        "nics": [{ "limits": {
            "rx_bytes": { "per_second": 1 }, "rx_packets": { "per_second": 2, "burst": 20 },
            "tx_packets": { "per_second": 4, "burst": 40 },
        } }],
    }))
    .unwrap();
    created(&host, spec).await;
    let spec = stage.launch.only().spec().unwrap();
    let bucket = |per_second, burst| Some(TokenBucket { per_second, burst });
    let nic = &spec.nics[0];
    assert_eq!(nic.rx_limits, RateLimits { bandwidth: bucket(1, 1), operations: bucket(2, 20) });
    assert_eq!(nic.tx_limits, RateLimits { bandwidth: None, operations: bucket(4, 40) });
    assert_eq!(spec.disks[0].limits, RateLimits { bandwidth: bucket(7, 70), operations: None });
    host.close().await;
}

#[tokio::test]
async fn a_patch_of_one_limit_leaves_the_other_and_null_lifts_it() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    let patched = async |limits: serde_json::Value| {
        let patch: PatchServer =
            serde_json::from_value(serde_json::json!({ "disk_limits": limits })).unwrap();
        host.servers().patch(&Call::by_host(), id, patch).await.unwrap().body.volumes[0].limits
    };
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    let limits = patched(serde_json::json!({ "operations": { "per_second": 5, "burst": 50 } })).await;
    assert_eq!((limits.bandwidth_bytes, limits.operations), (None, rate(5, Some(50))));
    let limits = patched(serde_json::json!({ "bandwidth_bytes": { "per_second": 7 } })).await;
    assert_eq!((limits.bandwidth_bytes, limits.operations), (rate(7, None), rate(5, Some(50))));
    let limits = patched(serde_json::json!({ "operations": null })).await;
    assert_eq!((limits.bandwidth_bytes, limits.operations), (rate(7, None), None));
    let live = stage.launch.only().disk_limits();
    assert_eq!((live[&0].bandwidth.unwrap().burst, live[&0].operations), (7, None));
    host.close().await;
}

/// Dies with the first commit after it was told to.
#[derive(Default)]
struct DieOnCommit(AtomicBool);

impl Checkpoint for DieOnCommit {
    fn reached(&self, point: &'static str) -> Fate {
        if point == "commit" && self.0.load(Ordering::SeqCst) { Fate::Die } else { Fate::Live }
    }
}

#[tokio::test]
async fn limits_that_are_recorded_are_in_force_whoever_died_behind_the_record() {
    let stage = Stage::new();
    let host = stage.open_with_image().await;
    let id = created(&host, server("web1")).await.id;
    host.close().await;
    drop(host);
    let checkpoint = Arc::new(DieOnCommit::default());
    let host = stage.open_watched(checkpoint.clone()).await.unwrap();
    let patch: PatchServer = serde_json::from_value(serde_json::json!({
        "disk_limits": { "operations": { "per_second": 5 } },
        "nic_limits": [{ "index": 0, "limits": { "tx_bytes": { "per_second": 1000 } } }],
    }))
    .unwrap();
    checkpoint.0.store(true, Ordering::SeqCst);
    let died = host.servers().patch(&Call::by_host(), id, patch).await.unwrap_err();
    assert_eq!(died.code, Code::Draining);
    host.close().await;
    drop(host);
    let host = stage.open().await;
    let machine = stage.launch.only();
    let end = tokio::time::Instant::now() + SOON;
    let in_force = || {
        let (disks, nics) = (machine.disk_limits(), machine.nic_limits());
        let operations = disks.get(&0).and_then(|limits| limits.operations).map(|rate| rate.per_second);
        let sent = nics.get(&0).and_then(|(_, tx)| tx.bandwidth).map(|rate| rate.per_second);
        (operations, sent)
    };
    while in_force() != (Some(5), Some(1000)) {
        assert!(tokio::time::Instant::now() < end, "{:?}", in_force());
        tokio::task::yield_now().await;
    }
    host.close().await;
}

#[tokio::test]
async fn memory_is_never_promised_twice() {
    let mut stage = Stage::new();
    stage.memory_bytes = 300 << 20;
    let host = stage.open_with_image().await;
    created(&host, server("one")).await;
    created(&host, server("two")).await;
    let refused = host.servers().create(&Call::by_host(), server("three")).await.unwrap_err();
    assert_eq!(refused.code, Code::NoCapacity);
    let mut spec = server("three");
    spec.start = false;
    let three = created(&host, spec).await.id;
    let refused = host.servers().act(&Call::by_host(), three, START).await.unwrap_err();
    assert_eq!(refused.code, Code::NoCapacity);
    let one = host.servers().list(Default::default()).await.unwrap().items[0].id;
    let stopped = host.servers().act(&Call::by_host(), one, stop(0)).await.unwrap();
    succeeded(&host, stopped.body.operation.id).await;
    let started = host.servers().act(&Call::by_host(), three, START).await.unwrap();
    succeeded(&host, started.body.operation.id).await;
    host.close().await;
}
