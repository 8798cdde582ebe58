//! The question whether a server could move, over HTTP. One host is both ends: it may ask itself.
use model::migration::{MigrationPlan, MigrationTicket, ObstacleCode};
use model::{Code, ServerId};
use serde_json::json;

use super::served::{Sent, Served};
use crate::stage;

fn path() -> &'static str {
    "/v1/migration-tickets"
}

#[tokio::test]
async fn what_is_in_the_way_is_answered_or_refused_with() {
    let served = Served::start().await;
    served.call("POST", path(), Sent::nothing()).await.problem(Code::HostUnprepared);
    let address = "127.0.0.1:0".parse().unwrap();
    let address = served.host.migrations().listen(address).await.unwrap();
    let ticket: MigrationTicket = served.call("POST", path(), Sent::nothing()).await.json(200);
    assert_eq!(ticket.target, address);
    let server = stage::created(&served.host, stage::server("web1")).await.id;
    let body = json!({ "target": address, "ticket": ticket.ticket, "mode": "cold" });
    let verb = format!("/v1/servers/{server}/actions/migrate");
    let plan: MigrationPlan =
        served.call("POST", &format!("{verb}?dry_run=true"), body.clone()).await.json(200);
    let codes: Vec<ObstacleCode> = plan.blocked_by.iter().map(|obstacle| obstacle.code).collect();
    use ObstacleCode::{Name, Network, State};
    assert_eq!(codes, [Name, Name, Network, State]);
    let problem = served.call("POST", &verb, body.clone()).await.problem(Code::MigrationBlocked);
    let named: Vec<&str> = problem.errors.iter().map(|error| error.code.as_str()).collect();
    assert_eq!(named, ["name", "name", "network", "state"]);
    let settle = format!("/v1/servers/{server}/actions/settle-migration");
    let said = json!({ "owner": "here", "proof": "I have looked at both" });
    served.call("POST", &settle, said).await.problem(Code::WrongState);
    let problem =
        served.call("POST", &settle, json!({ "owner": "here", "proof": "" })).await.problem(Code::Invalid);
    assert_eq!(problem.errors[0].pointer, "/proof");
    let limit = format!("/v1/servers/{server}/actions/limit-migration");
    served.call("POST", &limit, json!({ "downtime_ms": 100 })).await.problem(Code::WrongState);
    let problem = served.call("POST", &limit, json!({ "downtime_ms": 0 })).await.problem(Code::Invalid);
    assert_eq!(problem.errors[0].pointer, "/downtime_ms");
    let nobody = format!("/v1/servers/{}/actions/migrate", ServerId::new());
    served.call("POST", &nobody, body).await.problem(Code::NotFound);
    served.stop().await;
}

#[tokio::test]
async fn a_target_that_is_no_address_and_a_lifetime_out_of_range_are_refused() {
    let served = Served::start().await;
    let server = stage::created(&served.host, stage::server("web1")).await.id;
    let verb = format!("/v1/servers/{server}/actions/migrate?dry_run=true");
    for (target, ticket, pointer) in
        [("a.host:1", "x", "/target"), ("127.0.0.1", "x", "/target"), ("127.0.0.1:1", "x", "/ticket")]
    {
        let body = json!({ "target": target, "ticket": ticket });
        let problem = served.call("POST", &verb, body).await.problem(Code::Invalid);
        assert_eq!(problem.errors[0].pointer, pointer, "{problem:?}");
    }
    for (member, value) in [("bandwidth_bytes_per_s", 1), ("downtime_ms", 0)] {
        let body = json!({ "target": "127.0.0.1:1", "ticket": "x", member: value });
        let problem = served.call("POST", &verb, body).await.problem(Code::Invalid);
        assert_eq!(problem.errors[0].pointer, format!("/{member}"));
    }
    let problem = served.call("POST", path(), json!({ "lifetime_s": 0 })).await.problem(Code::Invalid);
    assert_eq!(problem.errors[0].pointer, "/lifetime_s");
    served.stop().await;
}
