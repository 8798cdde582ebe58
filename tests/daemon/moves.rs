//! Two hosts that share nothing: each daemon has a directory, a network and control groups of its own, and between them
//! is one cable.
use std::process::{Child, Command, Stdio};

use hyper::Method;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::api::{Answer, text};
use crate::daemon::{Orders, Stage};
use crate::world::{inside, run};

const NEAR: &str = "192.0.2.1";
const FAR: &str = "192.0.2.2";
const PORT: u16 = 8687;

/// A source, a target, and the cable.
struct Hosts {
    source: Stage,
    target: Stage,
    /// A process that holds the target's network.
    holder: Child,
}

impl Hosts {
    /// Two hosts that wait for each other, both with the image.
    async fn new() -> Hosts {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]);
        let mut holder = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("unshare");
        let mut up = std::io::BufReader::new(holder.stdout.take().expect("its output"));
        std::io::BufRead::read_line(&mut up, &mut String::new()).expect("a network");
        let pid = holder.id().to_string();
        run("ip", &["link", "add", "near", "type", "veth", "peer", "name", "far", "netns", &pid]);
        run("ip", &["address", "add", &format!("{NEAR}/24"), "dev", "near"]);
        run("ip", &["link", "set", "near", "up"]);
        for line in
            [&["address", "add", &format!("{FAR}/24"), "dev", "far"][..], &["link", "set", "far", "up"]]
        {
            let net = format!("--net=/proc/{pid}/ns/net");
            run("nsenter", &[&[net.as_str(), "ip"], line].concat());
        }
        let (source, target) = (Stage::new(), Stage::on(Some(holder.id())));
        let hosts = Hosts { source, target, holder };
        hosts.open(&hosts.source, NEAR).await;
        hosts.open(&hosts.target, FAR).await;
        hosts.source.import().await;
        hosts.target.import().await;
        hosts
    }

    async fn open(&self, stage: &Stage, address: &str) {
        let flags = vec!["--migration-listen".to_owned(), format!("{address}:{PORT}")];
        if let Err(status) = stage.open(Orders { flags, ..Orders::default() }).await {
            panic!("the daemon ended with {status}:\n{}", stage.log());
        }
    }

    /// What asks the source to move a server to the target.
    async fn body(&self) -> Value {
        let made = self.target.api().call(Method::POST, "/v1/migration-tickets", None, None).await;
        let made = made.expect("an answer").body;
        assert_eq!(made["target"], format!("{FAR}:{PORT}"));
        json!({ "target": made["target"], "ticket": made["ticket"] })
    }

    async fn close(mut self) {
        self.source.clear().await;
        self.target.clear().await;
        self.source.end(Signal::SIGTERM).await;
        self.target.end(Signal::SIGTERM).await;
        self.source.left_nothing().await;
        self.target.left_nothing().await;
        self.holder.kill().and_then(|()| self.holder.wait()).expect("our child");
    }
}

async fn asked(stage: &Stage, server: &str, query: &str, body: &Value) -> Answer {
    let path = format!("/v1/servers/{server}/actions/migrate{query}");
    stage.api().call(Method::POST, &path, None, Some(body.clone())).await.expect("an answer")
}

fn codes(list: &Value) -> Vec<String> {
    list.as_array().unwrap_or_else(|| panic!("{list}")).iter().map(|item| text(&item["code"])).collect()
}

async fn one_host_asks_another() {
    let hosts = Hosts::new().await;
    let server = hosts.source.create("web1").await;
    let body = hosts.body().await;
    let plan = asked(&hosts.source, &server, "?dry_run=true", &body).await;
    assert_eq!(plan.status, 200, "{}", plan.body);
    assert_eq!(codes(&plan.body["blocked_by"]), ["vmm"], "{}", plan.body);
    let refused = asked(&hosts.source, &server, "", &body).await;
    assert_eq!((refused.status, refused.code()), (409, "migration_blocked"), "{}", refused.body);
    // Whoever has stolen the ticket comes too late with it.
    let thief = hosts.target.create("other").await;
    let stolen = asked(&hosts.target, &thief, "?dry_run=true", &body).await;
    assert_eq!((stolen.status, codes(&stolen.body["errors"])), (422, vec!["refused".to_owned()]));
    // What answers there has to be who made the ticket.
    let mut elsewhere = body.clone();
    elsewhere["target"] = json!(format!("{NEAR}:{PORT}"));
    let other = asked(&hosts.source, &server, "?dry_run=true", &elsewhere).await;
    assert_eq!((other.status, codes(&other.body["errors"])), (422, vec!["other_host".to_owned()]));
    // A host knows its tickets and itself again.
    hosts.target.kill().await;
    let nobody = asked(&hosts.source, &server, "?dry_run=true", &body).await;
    assert_eq!((nobody.status, nobody.code()), (502, "host_unreachable"), "{}", nobody.body);
    hosts.open(&hosts.target, FAR).await;
    let again = asked(&hosts.source, &server, "?dry_run=true", &body).await;
    // By now the thief's own server has the address.
    assert_eq!(codes(&again.body["blocked_by"]), ["network", "vmm"], "{}", again.body);
    hosts.close().await;
}

#[test]
fn a_host_says_what_is_in_the_way_to_whom_its_ticket_lets_in() {
    inside("moves::a_host_says_what_is_in_the_way_to_whom_its_ticket_lets_in", one_host_asks_another());
}
