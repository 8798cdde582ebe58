//! Hostile guests on the real daemon, with its own bridge and rules: what one sends under another's name does not leave
//! its port, and what it does to its devices is an event of its own server, which nobody else notices.
use std::collections::BTreeSet;
use std::process::Command;

use hyper::Method;
use serde_json::{Value, json};

use crate::api::text;
use crate::daemon::{MEMORY_BYTES, Stage, wait_for};
use crate::world::inside;

const EVIL: &str = "10.77.0.40";
const VICTIM: &str = "10.77.0.41";

/// What the probe guest's word `forge` sends.
const KINDS: [&str; 10] = [
    "mac",
    "ipv4",
    "no-ipv4",
    "arp-answer",
    "arp-question",
    "arp-hardware",
    "dhcp-answer",
    "router-advertisement",
    "vlan",
    "unknown-protocol",
];

/// Honest packets after which forged ones would have come: each follows a round of forgeries.
const ROUNDS: usize = 5;

async fn create(stage: &Stage, image: &str, nics: Value) -> String {
    let body = json!({ "name": image, "image": image, "memory_bytes": MEMORY_BYTES, "nics": nics });
    let answer = stage.call(Method::POST, "/v1/servers", &format!("create-{image}"), Some(body)).await;
    stage.succeeded(&answer.operation()).await.unwrap();
    text(&answer.body["resource"]["id"])
}

async fn console(stage: &Stage, id: &str) -> String {
    text(&stage.api().get(&format!("/v1/servers/{id}/console-log")).await)
}

/// The kinds of forged frames that the victim has told of.
fn forged(console: &str) -> BTreeSet<&str> {
    console.lines().filter_map(|line| line.trim().strip_prefix("probe: netwatch forged ")).collect()
}

fn honest(console: &str) -> usize {
    console.matches("probe: netwatch honest ").count()
}

#[test]
fn what_a_guest_forges_does_not_leave_its_port() {
    inside("hostile::what_a_guest_forges_does_not_leave_its_port", async {
        let stage = Stage::new();
        stage.open_well().await;
        stage.import_another("victim", &format!("ip={VICTIM} netwatch=600000")).await;
        stage.import_another("evil", &format!("ip={EVIL} gw={VICTIM} forge pause=200 loop")).await;
        let victim = create(&stage, "victim", json!([{ "ipv4": VICTIM }])).await;
        wait_for("a watching victim", async || {
            console(&stage, &victim).await.contains("netwatch ready").then_some(())
        })
        .await
        .unwrap();
        let evil = create(&stage, "evil", json!([{ "ipv4": EVIL }])).await;
        let heard = async |what: &str, enough: &dyn Fn(&str) -> bool| -> String {
            let found = wait_for(what, async || {
                let log = console(&stage, &victim).await;
                enough(&log).then_some(log)
            });
            match found.await {
                Ok(log) => log,
                Err(late) => {
                    panic!("{late}\n{}\n{}", console(&stage, &evil).await, console(&stage, &victim).await)
                }
            }
        };
        let log = heard("honest packets", &|log| honest(log) >= ROUNDS).await;
        assert!(forged(&log).is_empty(), "forged frames left the port: {:?}", forged(&log));
        let sent = console(&stage, &evil).await;
        assert!(sent.contains(&format!("probe: forge ok kinds={}", KINDS.len())), "{sent}");

        // The hole that shows that the victim would have told: without the rules of the bridge, all of it arrives.
        let opened = Command::new("nft").args(["delete", "table", "bridge", "toft"]).status().unwrap();
        assert!(opened.success());
        let all = BTreeSet::from(KINDS);
        // The last line may be half written.
        heard("forged frames where no rule stands", &|log| all.is_subset(&forged(log))).await;
        stage.close().await;
    });
}

#[test]
fn attacks_are_events_of_the_attackers_server_and_nobody_else_notices() {
    inside("hostile::attacks_are_events_of_the_attackers_server_and_nobody_else_notices", async {
        let stage = Stage::new();
        stage.open_well().await;
        stage.import().await;
        stage.import_another("evil", "evil-rng evil-blk evil-balloon evil-net evil-registers loop").await;
        let bystander = stage.create("bystander").await;
        let evil = create(&stage, "evil", json!([{}])).await;
        let (beats_before, _) = stage.beats(&bystander).await;
        // Every word once at least, so every device of the machine.
        let log = wait_for("a round of attacks", async || {
            let log = console(&stage, &evil).await;
            log.contains("probe: evil-registers ok").then_some(log)
        });
        let log = match log.await {
            Ok(log) => log,
            Err(late) => panic!("{late}\n{}", console(&stage, &evil).await),
        };
        assert!(!log.contains("FAILED"), "{log}");
        let faults: Vec<Value> = stage.api().log().await;
        let of = |id: &str| {
            faults.iter().filter(|event| is_fault(event) && event.to_string().contains(id)).count()
        };
        assert!(of(&evil) > 0, "{faults:?}");
        assert_eq!(of(&bystander), 0, "{faults:?}");
        wait_for("the bystander's beats", async || {
            let (beats, boots) = stage.beats(&bystander).await;
            assert_eq!(boots, 1);
            (beats > beats_before).then_some(())
        })
        .await
        .unwrap();
        let server = stage.api().get(&format!("/v1/servers/{evil}")).await;
        assert_eq!(server["state"], "running", "{server}");
        stage.close().await;
    });
}

fn is_fault(event: &Value) -> bool {
    event.to_string().contains("server.device_fault")
}
