//! Limits as they reach the machine.
use model::server::CreateServer;
use wire::machine::{RateLimits, TokenBucket};

use crate::stage::{Stage, created};

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
