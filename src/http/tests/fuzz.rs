//! Requests that fit the document and requests that break it, by the thousand.
use std::process::Stdio;

use serde_json::json;

use super::served::{Sent, Served};

#[tokio::test]
#[ignore = "needs python3 and a package registry, and takes minutes: run scripts/lib/fuzz-api --with-fakes"]
async fn schema_breaking_requests_are_answered_by_problems() {
    let served = Served::start().await;
    // What the document's examples name, so that they make real servers.
    let image = json!({ "name": "debian-12", "source": { "import_directory": "tiny" } });
    let imported = served.call("POST", "/v1/images", Sent::from(image).with("prefer", "wait=20")).await;
    assert_eq!(imported.status, 201);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/lib/fuzz-api");
    let status = tokio::process::Command::new(script)
        .arg(format!("http://{}", served.tcp))
        .arg(&served.token)
        .stdin(Stdio::null())
        .status()
        .await
        .unwrap();
    assert!(status.success(), "{status}");
    served.stop().await;
}
