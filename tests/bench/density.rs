//! `density`: idle servers until there are a thousand or memory is short; how the last ones start beside the first, and
//! how long a daemon that is started again takes to find all of them.
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::Local;
use crate::ground::Ground;
use crate::host::{Host, id, server};
use crate::rows::{Report, Series};

/// Servers at most.
const SERVERS: usize = 1000;

/// How often the first and the last ten are started: ten starts are few where a machine is not equally fast at all times.
const TIMES: usize = 5;

/// Memory that is left to the host, in KiB.
const LEFT_KB: u64 = 2 << 20;

/// Longest wait for a daemon to find its servers.
const ADOPTED_MAX: Duration = Duration::from_secs(60);

/// Pause between two looks at what takes long beside it.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let (most, part, times) = (ground.samples(SERVERS, 6), ground.samples(10, 2), ground.samples(TIMES, 2));
    let mut host = Host::start_as_installed(ground);
    let mut client = host.local();
    // The default network has no thousand addresses.
    let network = json!({ "name": "wide", "ipv4_cidr": "172.30.0.0/20" });
    client.call("POST", "/v1/networks", Some("wait=30"), Some(&network));
    let before_kb = available_kb();
    let mut starts = Starts { host: &host, client, begun: 0 };
    let first = starts.several(part, times);
    let mut count = part;
    while count + part < most && available_kb() > LEFT_KB {
        starts.one();
        count += 1;
    }
    let last = starts.several(part, times);
    count += part;
    let each_kb = before_kb.saturating_sub(available_kb()) as f64 / count as f64;
    let rss_kb = host.status_kb("VmRSS");
    host.kill();
    let (text, begun) = ("adopted its machine", Instant::now());
    let known = host.log_count(text);
    host.open();
    while host.log_count(text) < known + count {
        assert!(begun.elapsed() < ADOPTED_MAX, "not all are found again:\n{}", host.told());
        std::thread::sleep(LOOK_AGAIN);
    }
    let adopted_s = begun.elapsed().as_secs_f64();
    let mut add = |case: &str, unit, samples: &[f64]| {
        report.add(Series { bench: "density", case, who: "toft", unit }, samples)
    };
    add("servers", "", &[count as f64]);
    let ratio = add("start_ms_last", "ms", &last) / add("start_ms_first", "ms", &first);
    add("host_kb_each", "kB", &[each_kb]);
    add("daemon_rss_kb", "kB", &[rss_kb]);
    add("adopted_s", "s", &[adopted_s]);
    report.bar(&format!("{count} servers at once, of {SERVERS}"), count == SERVERS);
    report.bar(&format!("the last start in {ratio:.2} × the time of the first, at most 1.3"), ratio <= 1.3);
    report.bar(&format!("all are found again in {adopted_s:.2} s, at most 5"), adopted_s <= 5.0);
}

/// Servers that start one after the other.
struct Starts<'a> {
    host: &'a Host,
    client: Local,
    begun: usize,
}

impl Starts<'_> {
    /// The server, and how long it took in ms.
    fn one(&mut self) -> (String, f64) {
        let mut body = server(&format!("idle-{}", self.begun));
        self.begun += 1;
        body["nics"] = json!([{ "network": "wide" }]);
        let begun = Instant::now();
        let server = id(&self.client.call("POST", "/v1/servers", None, Some(&body)));
        self.host.first_word(&server);
        (server, begun.elapsed().as_secs_f64() * 1e3)
    }

    /// Starts so many, so many times, each time in place of the ones before, and answers how long each took.
    fn several(&mut self, count: usize, times: usize) -> Vec<f64> {
        let mut all = Vec::new();
        let mut before = Vec::new();
        for _ in 0..times {
            for server in before {
                self.client.call("DELETE", &format!("/v1/servers/{server}"), Some("wait=30"), None);
            }
            let (servers, took): (Vec<_>, Vec<_>) = (0..count).map(|_| self.one()).unzip();
            all.extend(took);
            before = servers;
        }
        all
    }
}

fn available_kb() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("the host's memory");
    let line = text.lines().find(|line| line.starts_with("MemAvailable:")).expect("a figure");
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number")
}
