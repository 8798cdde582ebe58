//! `api`: reads of one server and lists of a hundred over TCP with a token, from a generator on the same processors;
//! and what the daemon holds of memory meanwhile.
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::Value;

use crate::client::{Client, remote, request};
use crate::ground::{Effort, Ground};
use crate::host::{Host, id, server};
use crate::rows::{Report, Series};

/// Servers that run.
const SERVERS: usize = 100;

/// Processors of the daemon, its servers and the generator.
const PROCESSORS: usize = 2;

/// Connections that are kept, with one request under way in each.
const CONNECTIONS: usize = 16;

pub(crate) fn run(ground: &Ground, report: &mut Report) {
    let (servers, spell) = match ground.effort {
        Effort::Full => (SERVERS, Duration::from_secs(5)),
        Effort::Smoke => (4, Duration::from_millis(200)),
    };
    // So many processors for all of it, the generator too, however many there are.
    let _few = Few::processors(PROCESSORS);
    let host = Host::start(ground);
    let mut client = host.local();
    let wait = Some("wait=30");
    let ids: Vec<String> = (0..servers)
        .map(|at| id(&client.call("POST", "/v1/servers", wait, Some(&server(&format!("api-{at}"))))))
        .collect();
    let idle_kb = host.status_kb("VmRSS");
    let token = host.token();
    let reads: Vec<Vec<u8>> =
        ids.iter().map(|id| request("GET", &format!("/v1/servers/{id}"), Some(&token), None, None)).collect();
    let list = vec![request("GET", "/v1/servers?limit=100", Some(&token), None, None)];
    let mut connections: Vec<Client<TcpStream>> = (0..CONNECTIONS).map(|_| remote(host.address())).collect();
    let body = {
        connections[0].send(&list[0]);
        connections[0].receive().1
    };
    let listed: Value = serde_json::from_slice(&body).expect("a list");
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(servers));
    let add = |report: &mut Report, case: &str, unit, samples: &[f64]| {
        report.add(Series { bench: "api", case, who: "toft", unit }, samples)
    };
    for (what, requests, least) in [("get", &reads, 20_000.0), ("list", &list, 2_000.0)] {
        // Once to warm up.
        load(&mut connections, requests, spell / 10);
        let (rates, waits) = load(&mut connections, requests, spell);
        let rate = add(report, &format!("{what}_per_s"), "1/s", &rates);
        add(report, &format!("{what}_ms"), "ms", &waits);
        let slow = waits.iter().filter(|wait| **wait > 5.0).count();
        let words = format!(
            "{rate:.0} {what}/s, at least {least:.0}, and {slow} of {} waited over 5 ms",
            waits.len()
        );
        report.bar(&words, rate >= least && slow * 100 <= waits.len());
    }
    let rss_kb = add(report, "daemon_rss_kb", "kB", &[host.status_kb("VmRSS")]);
    add(report, "daemon_rss_kb_before", "kB", &[idle_kb]);
    add(report, "daemon_rss_kb_most", "kB", &[host.status_kb("VmHWM")]);
    report.bar(&format!("the daemon has {:.1} MB, at most 30", rss_kb / 1e3), rss_kb <= 30_000.0);
}

/// This thread and what it starts have few processors until it is dropped.
struct Few(CpuSet);

impl Few {
    fn processors(count: usize) -> Few {
        let all = sched_getaffinity(Pid::from_raw(0)).expect("its processors");
        let mut few = CpuSet::new();
        let usable = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap_or(false));
        usable.take(count).for_each(|cpu| few.set(cpu).expect("one of its own"));
        sched_setaffinity(Pid::from_raw(0), &few).expect("processors of its own");
        Few(all)
    }
}

impl Drop for Few {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

/// Requests a second in each tenth of the spell, and the wait for each answer in milliseconds. Each connection has one
/// request under way; answers are read in the order of the connections, so a wait is never told too short.
fn load(
    connections: &mut [Client<TcpStream>],
    requests: &[Vec<u8>],
    spell: Duration,
) -> (Vec<f64>, Vec<f64>) {
    let (mut rates, mut waits) = (Vec::new(), Vec::new());
    let mut next = requests.iter().cycle();
    let mut sent = vec![Instant::now(); connections.len()];
    for (connection, sent) in connections.iter_mut().zip(&mut sent) {
        *sent = Instant::now();
        connection.send(next.next().expect("a request"));
    }
    for _ in 0..10 {
        let (begun, mut count) = (Instant::now(), 0u32);
        while begun.elapsed() < spell / 10 {
            for (connection, sent) in connections.iter_mut().zip(&mut sent) {
                let (status, _) = connection.receive();
                assert_eq!(status, 200);
                waits.push(sent.elapsed().as_secs_f64() * 1e3);
                count += 1;
                *sent = Instant::now();
                connection.send(next.next().expect("a request"));
            }
        }
        rates.push(f64::from(count) / begun.elapsed().as_secs_f64());
    }
    for connection in connections {
        connection.receive();
    }
    (rates, waits)
}
