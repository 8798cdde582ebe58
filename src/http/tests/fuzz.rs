//! Requests that fit the document and requests that break it, by the thousand.
use std::process::Stdio;

use super::served::Served;

#[tokio::test]
#[ignore = "needs python3 and a package registry, and takes minutes: run scripts/lib/fuzz-api --with-fakes"]
async fn schema_breaking_requests_are_answered_by_problems() {
    let served = Served::start().await;
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
