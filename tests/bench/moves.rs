//! `migrate_tls_ms`: a server of 2 GiB whose guest has written 1.75 GiB moves to and fro between two daemons in network namespaces
//! of their own, over TLS, beside a bare program that moves as many pages over the same cable without. Whole calls of the API are counted. Then over
//! a link of 1 Gbit/s a guest that writes faster than that.
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::gaps::{self, REPORT_MS, Stood, TICKS};
use crate::ground::{Effort, Ground};
use crate::host::{Host, id, server};
use crate::migrate;
use crate::rows::{Report, Series};

/// Longest wait for a guest that fills its memory.
const SOON: Duration = Duration::from_secs(120);

/// A network that both hosts have.
const NETWORK: &str = "moves";

/// Two daemons, the target's network, and the cable between them.
struct Pair {
    hosts: [Host; 2],
    addresses: [SocketAddr; 2],
    holder: Child,
}

impl Pair {
    fn new(ground: &Ground, images: [(&str, String); 2]) -> Pair {
        let mut holder = Command::new("unshare");
        holder.args(["--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"]);
        let mut holder = holder.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("unshare");
        let mut up = std::io::BufReader::new(holder.stdout.take().expect("its output"));
        std::io::BufRead::read_line(&mut up, &mut String::new()).expect("a network");
        let pid = holder.id().to_string();
        let ip = |before: &[String], words: &[&str]| run_at(before, "ip", words);
        ip(&[], &["link", "add", "near", "type", "veth", "peer", "name", "far", "netns", &pid]);
        ip(&[], &["address", "add", "192.0.2.1/24", "dev", "near"]);
        ip(&[], &["link", "set", "near", "up"]);
        let there = ["nsenter".to_owned(), format!("--net=/proc/{pid}/ns/net")];
        ip(&there, &["address", "add", "192.0.2.2/24", "dev", "far"]);
        ip(&there, &["link", "set", "far", "up"]);
        let addresses: [SocketAddr; 2] =
            ["192.0.2.1:8687", "192.0.2.2:8687"].map(|text| text.parse().expect("an address"));
        let hosts = [
            Host::start_waiting(ground, addresses[0], None),
            Host::start_waiting(ground, addresses[1], Some(holder.id())),
        ];
        for host in &hosts {
            // The one that a host has by itself takes a range that is free there, which need not be free at the other.
            let network = json!({ "name": NETWORK, "ipv4_cidr": "172.29.0.0/24" });
            host.local().call("POST", "/v1/networks", Some("wait=30"), Some(&network));
            for (name, words) in &images {
                host.import(ground, name, words);
            }
        }
        Pair { hosts, addresses, holder }
    }

    /// Makes the cable one of 1 Gbit/s.
    fn slow_down(&self) {
        let there = self.there();
        for (before, device) in [(&[][..], "near"), (&there[..], "far")] {
            let shape = ["root", "tbf", "rate", "1gbit", "burst", "256kb", "latency", "20ms"];
            run_at(before, "tc", &[&["qdisc", "add", "dev", device][..], &shape].concat());
        }
    }

    fn there(&self) -> [String; 2] {
        ["nsenter".to_owned(), format!("--net=/proc/{}/ns/net", self.holder.id())]
    }

    /// Makes a server, and waits until its guest has said something.
    fn server(&self, name: &str, memory_mib: u64, word: &str) -> String {
        let mut spec = server(name);
        spec["image"] = json!(name);
        spec["memory_bytes"] = json!(memory_mib << 20);
        spec["nics"] = json!([{ "network": NETWORK }]);
        let made = self.hosts[0].local().call("POST", "/v1/servers", Some("wait=30"), Some(&spec));
        let server = id(&made);
        let end = Instant::now() + SOON;
        while !self.hosts[0].console(&server).contains(word) {
            assert!(Instant::now() < end, "{}", self.hosts[0].console(&server));
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// Moves a server from one to the other. Answers how long that took, in milliseconds.
    fn hop(&self, stood: &mut Stood, from: usize, server: &str, (downtime_ms, mode): (u32, &str)) -> f64 {
        let (source, target) = (&self.hosts[from], &self.hosts[1 - from]);
        stood.look_before(|| source.console(server));
        let ticket = target.local().call("POST", "/v1/migration-tickets", None, Some(&json!({})));
        let body = json!({
            "target": self.addresses[1 - from].to_string(),
            "ticket": ticket["ticket"],
            "downtime_ms": downtime_ms,
            "mode": mode,
        });
        let since_ns = gaps::last_ns(&source.console(server));
        let begun = Instant::now();
        let path = format!("/v1/servers/{server}/actions/migrate");
        let moved = source.local().call("POST", &path, Some("wait=60"), Some(&body));
        let operation = &moved["operation"];
        assert_eq!(operation["state"], "succeeded", "{operation}\n{}\n{}", source.told(), target.told());
        let whole_ms = begun.elapsed().as_secs_f64() * 1e3;
        let told = source.told_of("stood still for").expect("how long its guest stood still");
        let stood_us = told
            .split("stood still for ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        stood.blackout_ms.push(stood_us.expect("microseconds") / 1e3);
        stood.look_after(since_ns, || target.console(server));
        whole_ms
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // The daemons' servers go before their network does, with what is left of this.
        let _ = Command::new("ip").args(["link", "delete", "near"]).status();
        let _ = self.holder.kill().and_then(|()| self.holder.wait());
    }
}

/// Runs a program, by means of what goes before it.
fn run_at(before: &[String], program: &str, words: &[&str]) {
    let all = before.iter().map(String::as_str).chain([program]).chain(words.iter().copied());
    let all: Vec<&str> = all.collect();
    let (first, rest) = all.split_first().expect("a program");
    assert!(Command::new(first).args(rest).status().expect(first).success(), "{all:?}");
}

/// Bytes a second of the slow link.
const SLOW_BYTES_PER_S: f64 = 1e9 / 8.0;

/// How long a guest that outruns the link may stand still, in milliseconds.
const SLOW_DOWNTIME_MS: u32 = 50;

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let (memory_mib, mib) = match ground.effort {
        Effort::Full => (2048_u64, 1792),
        Effort::Smoke => (128, 64),
    };
    let (slow_memory_mib, slow_mib) = match ground.effort {
        Effort::Full => (1024_u64, 768),
        Effort::Smoke => (128, 64),
    };
    let series = |bench, case, who| Series { bench, case, who, unit: "ms" };
    let images = [
        ("fill", format!("dirty={mib},0,6000 {TICKS}")),
        ("busy", format!("dirty={slow_mib},400,,{REPORT_MS}")),
    ];
    let pair = Pair::new(ground, images);
    let server = pair.server("fill", memory_mib, "probe: dirty ok");
    let (mut whole_ms, mut mover_ms, mut stood) = (Vec::new(), Vec::new(), Stood::default());
    // There and back.
    for hop in 0..2 * ground.samples(6, 1) {
        migrate::have_memory(2 * mib);
        mover_ms.push(migrate::mover(ground, mib, Some((pair.holder.id(), pair.addresses[1].ip()))));
        migrate::have_memory(2 * mib);
        whole_ms.push(pair.hop(&mut stood, hop % 2, &server, (migrate::IDLE_DOWNTIME_MS, "auto")));
    }
    let toft = report.add(series("migrate_tls_ms", "idle", "toft"), &whole_ms);
    let mover = report.add(series("migrate_tls_ms", "idle", "mover"), &mover_ms);
    let ratio = mover / toft;
    report.add(Series { unit: "", ..series("migrate_tls_ratio", "idle", "toft") }, &[ratio]);
    report.bar(&format!("migrate_tls_ratio: {ratio:.2} of mover (wanted: at least 0.5)"), ratio >= 0.5);
    stood.tell(report, "idle, through daemons", migrate::IDLE_DOWNTIME_MS.into());

    pair.slow_down();
    let server = pair.server("busy", slow_memory_mib, "probe: dirty pass 2");
    let most = 2.0 * (slow_memory_mib << 20) as f64 / SLOW_BYTES_PER_S * 1e3;
    for (case, mode) in
        [("400 MiB/s over 1 Gbit/s", "pre_copy"), ("400 MiB/s over 1 Gbit/s, post_copy", "post_copy")]
    {
        let mut stood = Stood::default();
        // There and back, more than once.
        let hops = 0..2 * ground.samples(2, 1);
        let hop = |hop| pair.hop(&mut stood, hop % 2, &server, (SLOW_DOWNTIME_MS, mode));
        let whole_ms: Vec<f64> = hops.map(hop).collect();
        let whole = report.add(series("migrate_tls_ms", case, "toft"), &whole_ms);
        report
            .bar(&format!("migrate_tls_ms {case}: {whole:.0} ms (wanted: at most {most:.0})"), whole <= most);
        let gap = stood.tell(report, case, 100.0);
        // Memory that is owed has the guest wait after it stood still.
        if mode == "post_copy" {
            let text = format!("gap_ms {case}, whole move: {gap:.1} ms (wanted: at most 100)");
            report.bar(&text, gap <= 100.0);
        }
    }
}
