use model::server::Wanted;

use super::*;

fn server(state: ServerState, build: Option<&str>, actions: &[&str]) -> Server {
    let mut server: Server = serde_json::from_value(serde_json::json!({
        "id": ServerId::new(), "name": "web1", "description": "", "labels": {}, "state": state,
        "wanted": Wanted::Running, "allowed_actions": actions, "vcpus": 1, "memory_bytes": 1, "cpu": "host",
        "image_id": model::ImageId::new(), "volumes": [], "nics": [], "restart_policy": "never", "generation": 1,
        "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z",
    }))
    .unwrap();
    server.vmm_build = build.map(str::to_owned);
    server
}

#[test]
fn only_machines_of_another_build_that_are_at_rest_are_upgraded() {
    let outcome =
        |state, build, actions: &[&str]| line(&server(state, build, actions), "new").map(|line| line.outcome);
    let can = ["stop", "upgrade-vmm"];
    use ServerState::{Failed, Hibernated, Paused, Running, Stopped};
    assert_eq!(outcome(Running, Some("old"), &can), Some(Outcome::Planned));
    // One of a daemon that recorded no build.
    assert_eq!(outcome(Running, None, &can), Some(Outcome::Planned));
    assert_eq!(outcome(Running, Some("new"), &can), Some(Outcome::Current));
    assert_eq!(outcome(Running, Some("old"), &["stop"]), Some(Outcome::Skipped));
    assert_eq!(outcome(Paused, Some("old"), &["resume"]), Some(Outcome::Skipped));
    for state in [Stopped, Failed, Hibernated] {
        assert_eq!(outcome(state, None, &["start"]), None, "{state:?}");
    }
}
